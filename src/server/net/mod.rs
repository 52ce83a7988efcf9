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

#[cfg(not(feature = "tls"))]
#[path = "no_tls.rs"]
mod tls;

pub(crate) use self::activity::Timeouts;
pub(crate) use self::places::{ConnectionLimits, Places};
pub(crate) use self::socket::Listener;
pub(crate) use self::tls::Acceptor;
#[cfg(feature = "tls")]
pub use self::tls::{InvalidTls, Tls};
