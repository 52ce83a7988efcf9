//! A scripted HTTP peer, for testing clients and layers against failures of networks and servers.
//!
//! The peer listens on a loopback socket and speaks HTTP/1.1 and HTTP/2 (with prior knowledge),
//! whichever a connection begins with. For each request it plays the next [`Act`] of its script: an
//! answer, early, late or broken off; a lost reply; a refused or reset stream; a `GOAWAY`. It
//! records requests and counts connections, so that a test can tell what retries really did.
//!
//! ```
//! use aegis_hitl::layer::{Attempts, Backoff, RetryLayer};
//! use aegis_hitl::testing::{Act, Peer};
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::Full;
//! use hyper_util::client::legacy::Client;
//! use hyper_util::rt::TokioExecutor;
//! use tower::{Layer, ServiceExt};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The first reply is lost, the second is 503, all further ones are 200.
//! let peer = Peer::start([Act::lose_reply(), Act::answer(503), Act::answer(200)]).await;
//!
//! let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
//! let service = RetryLayer::new().backoff(Backoff::none()).layer(client);
//! let request = Request::post(peer.url())
//!     .header("idempotency-key", "k-1")
//!     .body(Full::from("the same each time"))?;
//! let response = service.oneshot(request).await?;
//!
//! assert_eq!((response.status().as_u16(), Attempts::of(&response)), (200, 3));
//! assert_eq!(peer.count(), 3);
//! for request in peer.requests() {
//!     assert_eq!(request.header("idempotency-key"), Some("k-1"));
//!     assert_eq!(request.body, "the same each time");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A peer that cannot continue, for example because no port is free, panics and so fails the test.

// See the module's doc.
#![allow(clippy::expect_used)]

mod act;
mod http1;
mod http2;

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::request::Parts;
use http::{HeaderMap, Method, Uri, Version};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

pub use self::act::Act;

/// A request as the peer received it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ReceivedRequest {
    /// The method.
    pub method: Method,
    /// The target. It has scheme and authority on HTTP/2 only.
    pub uri: Uri,
    /// The version of HTTP.
    pub version: Version,
    /// The headers.
    pub headers: HeaderMap,
    /// What the peer read of the body before it acted, or before the client broke off.
    pub body: Bytes,
}

impl ReceivedRequest {
    /// Returns the path.
    pub fn path(&self) -> &str {
        self.uri.path()
    }

    /// Returns a header's first value, if it is present and text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// A scripted HTTP peer on a loopback socket; see [the module](self) for an example.
///
/// When the last clone is dropped, the peer stops listening and closes its connections.
#[derive(Clone)]
pub struct Peer {
    listening: Arc<Listening>,
    state: Arc<State>,
}

struct Listening {
    address: SocketAddr,
    task: AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peer {
    /// Starts a peer that plays `script` and then repeats its last act. An empty script answers
    /// 200.
    ///
    /// # Panics
    ///
    /// If no port is free.
    pub async fn start(script: impl IntoIterator<Item = Act>) -> Self {
        Self::start_over(script, |stream| std::future::ready(Ok(stream))).await
    }

    /// Starts a peer on connections that `accept` makes from sockets, for example with a TLS
    /// handshake. If `accept` fails, the socket is closed and does not count as a connection.
    ///
    /// # Panics
    ///
    /// If no port is free.
    pub async fn start_over<F, Fut, I>(script: impl IntoIterator<Item = Act>, accept: F) -> Self
    where
        F: Fn(TcpStream) -> Fut + Send + 'static,
        Fut: Future<Output = io::Result<I>> + Send + 'static,
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("no port to listen on");
        Self::on(listener, script, accept)
    }

    fn on<F, Fut, I>(
        listener: TcpListener,
        script: impl IntoIterator<Item = Act>,
        accept: F,
    ) -> Self
    where
        F: Fn(TcpStream) -> Fut + Send + 'static,
        Fut: Future<Output = io::Result<I>> + Send + 'static,
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let address = listener.local_addr().expect("the listener has no address");
        let state = Arc::new(State {
            script: Mutex::new(script.into_iter().collect()),
            requests: Mutex::default(),
            connections: AtomicUsize::new(0),
        });
        let serving = state.clone();
        let task = tokio::spawn(async move {
            // Dropped with this task, which closes the connections.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                // Only for speed.
                let _ = stream.set_nodelay(true);
                let accepted = accept(stream);
                let state = serving.clone();
                connections.spawn(async move {
                    if let Ok(io) = accepted.await {
                        state.connections.fetch_add(1, Ordering::SeqCst);
                        // A client that breaks off needs no more service.
                        let _ = serve(io, state).await;
                    }
                });
            }
        });
        Self {
            listening: Arc::new(Listening {
                address,
                task: task.abort_handle(),
            }),
            state,
        }
    }

    /// Returns the address that the peer listens on.
    pub fn address(&self) -> SocketAddr {
        self.listening.address
    }

    /// Returns the base URL: `http://` and the address, without a trailing slash.
    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// Returns the requests so far, in the order in which their heads arrived.
    pub fn requests(&self) -> Vec<ReceivedRequest> {
        let requests = lock(&self.state.requests);
        requests.iter().map(Entry::request).collect()
    }

    /// Returns the number of requests so far, whatever became of them.
    pub fn count(&self) -> usize {
        lock(&self.state.requests).len()
    }

    /// Returns the number of connections so far, open or closed.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("address", &self.address())
            .field("requests", &self.count())
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

/// A loopback port that refuses connections until it is opened. It stays bound, so that nobody else
/// can listen on it.
///
/// ```
/// use aegis_hitl::testing::{Act, ClosedPort};
/// use tokio::net::TcpStream;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let port = ClosedPort::new();
/// let address = port.address();
/// assert!(TcpStream::connect(address).await.is_err());
///
/// let peer = port.open([Act::answer(200)]);
/// assert!(TcpStream::connect(address).await.is_ok());
/// assert_eq!(peer.address(), address);
/// # }
/// ```
#[derive(Debug)]
pub struct ClosedPort {
    // Bound, but not listening.
    socket: TcpSocket,
    address: SocketAddr,
}

impl ClosedPort {
    /// Takes a free port.
    ///
    /// # Panics
    ///
    /// If no port is free.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let socket = TcpSocket::new_v4().expect("no socket");
        socket
            .bind((Ipv4Addr::LOCALHOST, 0).into())
            .expect("no port to take");
        let address = socket.local_addr().expect("the socket has no address");
        Self { socket, address }
    }

    /// Returns the address that refuses connections.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the base URL: `http://` and the address, without a trailing slash.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Starts a [`Peer`] on this port.
    ///
    /// # Panics
    ///
    /// If the port cannot be listened on, or outside of a tokio runtime.
    pub fn open(self, script: impl IntoIterator<Item = Act>) -> Peer {
        let listener = self.socket.listen(1024).expect("the port cannot be opened");
        Peer::on(listener, script, |stream| std::future::ready(Ok(stream)))
    }
}

/// The time for a connection to write what it has before an answer breaks off.
const FLUSH: Duration = Duration::from_millis(20);

/// The state shared by all connections of a peer.
struct State {
    script: Mutex<VecDeque<Act>>,
    requests: Mutex<Vec<Entry>>,
    connections: AtomicUsize,
}

/// A request, whose body may still be arriving.
struct Entry {
    parts: Parts,
    body: BytesMut,
}

impl Entry {
    fn request(&self) -> ReceivedRequest {
        ReceivedRequest {
            method: self.parts.method.clone(),
            uri: self.parts.uri.clone(),
            version: self.parts.version,
            headers: self.parts.headers.clone(),
            body: self.body.clone().freeze(),
        }
    }
}

impl State {
    /// Records a request whose head arrived. Returns its number and the act for it.
    fn arrived(&self, parts: Parts) -> (usize, Act) {
        let mut requests = lock(&self.requests);
        requests.push(Entry {
            parts,
            body: BytesMut::new(),
        });
        let mut script = lock(&self.script);
        let act = if script.len() > 1 {
            script.pop_front()
        } else {
            script.front().cloned()
        };
        (requests.len() - 1, act.unwrap_or_else(|| Act::answer(200)))
    }

    /// Records a piece of a request's body.
    fn received(&self, entry: usize, data: &[u8]) {
        if let Some(entry) = lock(&self.requests).get_mut(entry) {
            entry.body.extend_from_slice(data);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves one connection in the version of HTTP that it begins with.
async fn serve<I>(mut io: I, state: Arc<State>) -> io::Result<()>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut read = BytesMut::with_capacity(PREFACE.len());
    while read.len() < PREFACE.len() && PREFACE.starts_with(&read) {
        if io.read_buf(&mut read).await? == 0 {
            return Ok(());
        }
    }
    let is_http2 = read.starts_with(PREFACE);
    let io = Rewound {
        read: read.freeze(),
        io,
    };
    if is_http2 {
        http2::serve(io, state).await;
    } else {
        http1::serve(io, state).await;
    }
    Ok(())
}

/// A connection whose first bytes were read and must be read again.
struct Rewound<I> {
    read: Bytes,
    io: I,
}

impl<I: AsyncRead + Unpin> AsyncRead for Rewound<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let length = self.read.len().min(buffer.remaining());
        buffer.put_slice(&self.read[..length]);
        self.read.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Rewound<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
