//! Where a request came from.

use std::net::IpAddr;

/// Where a request came from, as far as that is known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Arrival {
    /// The address that the server listens on. A Unix socket has none.
    pub(crate) listening: Option<IpAddr>,
    /// The address of the client, or of the last proxy.
    pub(crate) peer: Option<IpAddr>,
    /// Whether it came by TLS of this server's own.
    pub(crate) is_tls: bool,
}
