//! HTTP itself: the checks of a request, and the shape of a response.

pub(crate) mod head;
pub(crate) mod headers;
pub(crate) mod response;
pub(crate) mod room;

mod arrival;
mod body;
mod host;
mod rate;

pub use self::host::{Host, InvalidHost};
pub use self::rate::{InvalidRate, Rate};
pub use self::response::ResponseBody;

pub(crate) use self::arrival::{Arrival, Peer};
pub(crate) use self::body::RequestBody;
pub(crate) use self::host::HostGuard;
pub(crate) use self::rate::RateLimiter;
pub(crate) use self::response::{Rejection, Response};
pub(crate) use self::room::{HeldBytes, HeldText, Holder};
