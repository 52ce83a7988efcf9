//! Connections: accepting, serving, limiting and closing them.

pub(crate) mod accept;
pub(crate) mod descriptors;

mod activity;
mod connection;
mod places;
mod socket;
mod stream;
#[cfg(feature = "tls")]
mod tls;

/// Without the feature no server has TLS.
#[cfg(not(feature = "tls"))]
mod tls {
    use std::io;
    use std::sync::Arc;

    use super::activity::Activity;
    use super::socket::Socket;
    use super::stream::Stream;

    #[derive(Debug, Clone)]
    pub(crate) enum Acceptor {}

    impl Acceptor {
        pub(super) async fn accept(&self, _: Socket, _: &Arc<Activity>) -> io::Result<Stream> {
            match *self {}
        }
    }
}

pub(crate) use self::activity::Timeouts;
pub(crate) use self::places::{ConnectionLimits, Places};
pub(crate) use self::socket::Listener;
pub(crate) use self::tls::Acceptor;
#[cfg(feature = "tls")]
pub use self::tls::{InvalidTls, Tls};
