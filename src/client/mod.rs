//! [`AegisService`]: the layers around an HTTP client, for the endpoints of an approvals API.

mod answer;
mod builder;
mod connector;
mod endpoints;
mod error;
mod events;
mod human_loop;
mod operation;
mod proxy;
mod read;
mod receipt;
mod request;
mod run;
mod service;
mod sse;
#[cfg(feature = "tls")]
mod tls;
mod url;
mod view;
mod wait;

pub use self::builder::Builder;
pub use self::connector::{HttpBody, HttpClient, HttpClientError, HttpClientFuture};
pub use self::error::Error;
pub use self::events::{EventCursor, Events, EventsCall, InvalidCursor, StreamedEvent};
pub use self::operation::{
    ActionPage, Cancel, Claim, Claimed, Complete, DecideById, Fail, List, Look, OperationCall,
    Renew, Submit,
};
pub use self::receipt::{Outcome, Receipt};
pub use self::request::{DecisionCall, DecisionRequest, StatusCall};
pub use self::run::{Approved, RunCall, RunOutcome};
pub use self::service::{AegisService, OnDuplicate};
pub use self::wait::WaitCall;
