//! What both sides of the wire share: header names, paths, identifiers, and the shapes of answers.
//!
//! Nothing here does I/O.

mod chain;
mod escape;
mod id;
mod prefix;

#[cfg(any(feature = "client", feature = "server"))]
mod action;
#[cfg(feature = "server")]
mod body;
#[cfg(any(feature = "client", feature = "server"))]
mod claim;
#[cfg(any(feature = "client", feature = "server"))]
mod digest;
#[cfg(any(feature = "client", feature = "server"))]
mod event;
#[cfg(any(feature = "client", feature = "server"))]
mod fingerprint;
#[cfg(any(feature = "client", feature = "server"))]
mod problem;
#[cfg(any(feature = "client", feature = "server"))]
mod url;

use http::HeaderName;

pub use self::id::{
    ApiKey, IdempotencyKey, InvalidValue, MAX_API_KEY_LEN, MAX_LEN, RequestId, TenantId, ThreadId,
};

pub use self::chain::ErrorChain;

pub use self::escape::Escaped;
#[cfg(feature = "server")]
pub(crate) use self::escape::Piece;

pub use self::prefix::{InvalidPrefix, Prefix};

#[cfg(any(feature = "client", feature = "server"))]
pub use self::{
    action::{Action, Closed, Decision, Execution, JsonText, Payload, Status, UnknownName},
    claim::{Claim, ClaimToken, InvalidToken},
    digest::{Digest, InvalidDigest},
    event::{Event, EventKind},
    problem::{Code, Problem},
};

pub(crate) use self::id::uuid_value;

#[cfg(any(feature = "client", feature = "server"))]
pub(crate) use self::{
    fingerprint::{Fingerprint, check_json},
    url::{check_host_and_port, split_scheme},
};

#[cfg(feature = "client")]
pub(crate) use self::fingerprint::RESERVED;

#[cfg(feature = "server")]
pub(crate) use self::{
    action::{entry, rfc3339},
    body::{Body, MAX_COMMENT_LEN, MAX_TITLE_LEN, edited, limited_comment},
    fingerprint::{canonical_json, write_json_string},
    id::{hex, unhex, uuid_v7},
};

/// Any error.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The header that names the tenant: `Tenant-Id`.
pub const TENANT_ID: HeaderName = HeaderName::from_static("tenant-id");

/// The header that names the thread: `Thread-Id`.
pub const THREAD_ID: HeaderName = HeaderName::from_static("thread-id");

/// The header that makes two requests the same call: `Idempotency-Key`.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The header that names one logical call across its attempts: `X-Request-Id`.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The response header that marks an answer recorded earlier: `Idempotency-Replayed: true`.
pub const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The path before `/hitl/…`: `/api/v1`.
pub const DEFAULT_PREFIX: &str = "/api/v1";

/// The default server, the same as the Python SDK's: `http://localhost:8000`.
pub const DEFAULT_BASE_URL: &str = "http://localhost:8000";
