//! The bytes of a connection, with or without TLS.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::socket::{Socket, delegate_io};
#[cfg(feature = "tls")]
use super::tls::TlsStream;

/// One type for all connections, so that hyper is compiled once.
pub(super) enum Stream {
    Plain(Socket),
    #[cfg(feature = "tls")]
    Tls(Box<TlsStream>),
}

delegate_io!(Stream {
    Plain,
    #[cfg(feature = "tls")]
    Tls,
});
