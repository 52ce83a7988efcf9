//! Where a request came from.

use std::net::IpAddr;

/// Where a request came from, as far as that is known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Arrival {
    /// The address that the server listens on.
    pub(crate) listening: Option<IpAddr>,
    /// The address of the client, or of the last proxy.
    pub(crate) peer: Option<IpAddr>,
}
