//! HTTP itself: what a request must look like, and what an answer looks like.

pub(crate) mod head;
pub(crate) mod headers;
pub(crate) mod response;

mod body;
mod host;

pub use self::host::{Host, InvalidHost};
pub use self::response::ResponseBody;

pub(crate) use self::body::RequestBody;
pub(crate) use self::host::HostGuard;
pub(crate) use self::response::{Rejection, Response};
