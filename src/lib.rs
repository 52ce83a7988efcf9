#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

pub mod layer;
pub mod protocol;

#[doc(inline)]
pub use crate::layer::AegisLayer;

#[doc(inline)]
pub use crate::protocol::{ApiKey, IdempotencyKey, RequestId, TenantId, ThreadId};

#[cfg(any(feature = "client", feature = "server"))]
#[doc(inline)]
pub use crate::protocol::{Action, Decision, Execution, Payload, Status};

#[cfg(feature = "server")]
pub mod server;
#[cfg(feature = "server")]
pub mod store;

#[cfg(feature = "client")]
pub mod client;

#[cfg(feature = "client")]
#[doc(inline)]
pub use crate::client::{AegisService, DecisionRequest, Error, Outcome, Receipt};
