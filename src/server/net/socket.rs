//! What a server listens on, and the sockets that it accepts.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
#[cfg(unix)]
use tokio::net::{UnixListener, UnixStream};

/// What a server listens on.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
}

impl Listener {
    /// Returns the address, which a Unix socket does not have.
    pub(crate) fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Some),
            #[cfg(unix)]
            Self::Unix(_) => Ok(None),
        }
    }

    /// Accepts a connection, with the address of its peer. A peer on a Unix socket has none.
    pub(super) async fn accept(&self) -> io::Result<(Socket, Option<IpAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok((Socket::Tcp(stream), Some(address.ip())))
            }
            #[cfg(unix)]
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                Ok((Socket::Unix(stream), None))
            }
        }
    }
}

/// The connections that wait to be accepted when a listener is closed, which is at the end of these.
///
/// For their clients they are open, and may have requests on their way.
#[derive(Debug)]
pub(super) enum Waiting {
    Tcp(std::net::TcpListener),
    #[cfg(unix)]
    Unix(std::os::unix::net::UnixListener),
}

impl Listener {
    /// Stops listening for what is not waiting yet.
    pub(super) fn into_waiting(self) -> io::Result<Waiting> {
        match self {
            Self::Tcp(listener) => listener.into_std().map(Waiting::Tcp),
            #[cfg(unix)]
            Self::Unix(listener) => listener.into_std().map(Waiting::Unix),
        }
    }
}

impl Waiting {
    /// Accepts a connection without a wait. The runtime may not know yet that there is one.
    fn accept(&self) -> io::Result<(Socket, Option<IpAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok((
                    Socket::Tcp(TcpStream::from_std(stream)?),
                    Some(address.ip()),
                ))
            }
            #[cfg(unix)]
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok((Socket::Unix(UnixStream::from_std(stream)?), None))
            }
        }
    }
}

impl Iterator for Waiting {
    type Item = (Socket, Option<IpAddr>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.accept() {
                Ok(accepted) => return Some(accepted),
                Err(error) if is_of_one_connection(&error) => {}
                // Mostly that there is none.
                Err(_) => return None,
            }
        }
    }
}

/// Returns whether the error concerns only the incoming connection, and not the listener.
pub(super) fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// An accepted connection.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

impl Socket {
    /// Sends each segment at once. Responses are small and complete, so a delay gains nothing.
    pub(super) fn set_nodelay(&self) {
        match self {
            Self::Tcp(stream) => _ = stream.set_nodelay(true),
            #[cfg(unix)]
            Self::Unix(_) => {}
        }
    }
}

/// Reads from and writes to whichever stream an enum holds.
macro_rules! delegate_io {
    ($either:ident { $($(#[$cfg:meta])? $variant:ident),+ $(,)? }) => {
        impl AsyncRead for $either {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $($(#[$cfg])? Self::$variant(io) => Pin::new(io).poll_read(cx, buffer),)+
                }
            }
        }

        impl AsyncWrite for $either {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $($(#[$cfg])? Self::$variant(io) => Pin::new(io).poll_write(cx, bytes),)+
                }
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                slices: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $($(#[$cfg])? Self::$variant(io) => Pin::new(io).poll_write_vectored(cx, slices),)+
                }
            }

            fn is_write_vectored(&self) -> bool {
                match self {
                    $($(#[$cfg])? Self::$variant(io) => io.is_write_vectored(),)+
                }
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $($(#[$cfg])? Self::$variant(io) => Pin::new(io).poll_flush(cx),)+
                }
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    $($(#[$cfg])? Self::$variant(io) => Pin::new(io).poll_shutdown(cx),)+
                }
            }
        }
    };
}
pub(super) use delegate_io;

delegate_io!(Socket {
    Tcp,
    #[cfg(unix)]
    Unix,
});
