//! TLS: the certificate of a server, and the handshake of a connection.

mod certificate;
mod expiry;
mod stream;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use self::stream::Counted;
use super::activity::Activity;
use super::socket::Socket;
use super::stream::Stream;
use crate::protocol::{Code, Problem};
use crate::server::ops::metrics::Metrics;

pub use self::certificate::{InvalidTls, Tls};
pub(super) use self::stream::TlsStream;

/// The first byte of a TLS connection: a record of the handshake.
const HANDSHAKE: u8 = 22;

/// How much of a plain HTTP request is read before the connection is closed.
const MAX_DISCARDED: u64 = 64 * 1024;

/// Makes TLS connections, each with the certificate that is current when it begins.
#[derive(Debug, Clone)]
pub(crate) struct Acceptor(watch::Receiver<Tls>);

impl Acceptor {
    pub(crate) fn new(tls: watch::Receiver<Tls>) -> Self {
        Self(tls)
    }

    /// Watches when the certificate ends, for as long as it is polled.
    pub(crate) async fn watch_expiry(self, metrics: Arc<Metrics>) -> Infallible {
        expiry::watch(self.0, &metrics).await
    }

    /// Waits for the handshake of a client. Whoever speaks plain HTTP is told so.
    pub(super) async fn accept(
        &self,
        mut socket: Socket,
        activity: &Arc<Activity>,
    ) -> io::Result<Stream> {
        let mut first = [0];
        socket.read_exact(&mut first).await?;
        if first[0] != HANDSHAKE && first[0].is_ascii_alphabetic() {
            refuse_plain_http(socket).await?;
            return Err(io::Error::other("the client speaks plain HTTP"));
        }
        let config = self.0.borrow().config();
        let socket = Counted::new(first[0], socket);
        let stream = TlsAcceptor::from(config).accept(socket).await?;
        let stream = TlsStream::new(stream, Arc::clone(activity));
        Ok(Stream::Tls(Box::new(stream)))
    }
}

/// Answers a request of HTTP/1.1, and reads away what the client still sends: a connection that is
/// closed before its bytes are read may lose the answer.
async fn refuse_plain_http(mut socket: Socket) -> io::Result<()> {
    let problem = Problem::new(
        Code::InvalidRequest,
        400,
        "The request is invalid",
        "the request came by plain HTTP, and this port speaks TLS; allowed are https:// URLs",
    );
    let body = serde_json::to_string(&problem)?;
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(answer.as_bytes()).await?;
    socket.shutdown().await?;
    tokio::io::copy(&mut socket.take(MAX_DISCARDED), &mut tokio::io::sink()).await?;
    Ok(())
}
