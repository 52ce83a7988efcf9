//! The HTTP client under `AegisService`. The only file that names hyper-util's legacy client.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::io;
use std::mem;
#[cfg(unix)]
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use crate::protocol::BoxError;
use bytes::Bytes;
use http::header::{HOST, PROXY_AUTHORIZATION};
use http::uri::Authority;
use http::{HeaderValue, Request, Response, Uri, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{CaptureConnection, capture_connection};
// Re-exported for `proxy` and `tls`, so that only this file changes when that client is replaced.
pub(super) use hyper_util::client::legacy::Builder;
pub(super) use hyper_util::client::legacy::connect::{
    Connected, Connection, HttpConnector, proxy::Tunnel,
};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pin_project_lite::pin_project;
use tower_service::Service;

use super::Error;
use super::proxy::{Proxy, Route};
#[cfg(feature = "tls")]
use super::tls;
use crate::layer::{Exchange, Failure, judge_hyper};

/// How long an idle connection stays open. Shorter than the idle timeouts of servers and balancers,
/// so that requests rarely meet a connection that is being closed.
const IDLE: Duration = Duration::from_secs(5);

/// When to ping an HTTP/2 connection that has answers pending.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeepAlive {
    pub(super) interval: Duration,
    /// The time limit for the reply.
    pub(super) timeout: Duration,
}

impl Default for KeepAlive {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
        }
    }
}

/// The settings of an [`HttpClient`].
pub(super) struct ClientSettings {
    /// The time limit for making a connection, including name resolution and TLS.
    pub(super) connect_timeout: Duration,
    #[cfg_attr(not(feature = "tls"), expect(dead_code))]
    pub(super) root_certificates: Vec<Vec<u8>>,
    #[cfg_attr(not(feature = "tls"), expect(dead_code))]
    pub(super) client_identity: Option<Vec<u8>>,
    /// Replaces roots and identity.
    #[cfg(feature = "tls")]
    pub(super) tls_config: Option<rustls::ClientConfig>,
    pub(super) http2_prior_knowledge: bool,
    pub(super) http2_keep_alive: KeepAlive,
    pub(super) proxy: Option<Proxy>,
    /// Replaces the server's address, and the proxy.
    #[cfg(unix)]
    pub(super) unix_socket: Option<Arc<Path>>,
}

/// An HTTP client on hyper-util, with pooled connections. It speaks HTTP/1.1, and for https HTTP/2
/// where the server offers it (ALPN).
///
/// It follows no redirects. A request that was queued on a pooled connection and handed back before
/// it was started goes to another connection. Nothing of it was sent, so this does not count as an
/// attempt, and servers do not see it.
#[derive(Clone)]
pub struct HttpClient {
    // Shared: hyper-util's client takes a few hundred bytes, and every call clones it for its
    // retries.
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    /// Whether a connection may carry other requests besides one that is abandoned.
    is_multiplexed: bool,
    /// The credential for each request to a proxy that reads requests.
    proxy_authorization: Option<HeaderValue>,
    /// The server's authority and its `Host` header, which hyper-util would format for each
    /// request. `None` if a connection may be HTTP/2, where there is no such header.
    host: Option<(Authority, HeaderValue)>,
}

pub(super) enum Client {
    Http(legacy::Client<Timed<Route>, Full<Bytes>>),
    #[cfg(feature = "tls")]
    Https(legacy::Client<Timed<hyper_rustls::HttpsConnector<Route>>, Full<Bytes>>),
}

impl HttpClient {
    /// Makes a client for the scheme of `base`.
    pub(super) fn new(base: &Uri, mut settings: ClientSettings) -> Result<Self, Error> {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        // Divided among the addresses of a name, so that an unresponsive one leaves time for the
        // others.
        http.set_connect_timeout(Some(settings.connect_timeout));
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        builder
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .http2_keep_alive_interval(settings.http2_keep_alive.interval)
            .http2_keep_alive_timeout(settings.http2_keep_alive.timeout)
            .http2_keep_alive_while_idle(false)
            .http2_only(settings.http2_prior_knowledge);
        let is_https = base.scheme_str() == Some("https");
        http.enforce_http(!is_https);
        if settings.proxy.is_some() && settings.http2_prior_knowledge && !is_https {
            return Err(Error::config(
                "HTTP/2 by prior knowledge does not go through a proxy; allowed is one of the two",
            ));
        }
        let timeout = settings.connect_timeout;
        let (route, proxy_authorization) = Route::new(http, base, settings.proxy.take());
        #[cfg(unix)]
        let route = settings.unix_socket.take().map_or(route, Route::Unix);
        let is_multiplexed = is_https || settings.http2_prior_knowledge;
        let client = if is_https {
            tls::client(&builder, route, settings, timeout)?
        } else {
            Client::Http(builder.build(Timed::new(route, timeout)))
        };
        Ok(Self {
            shared: Arc::new(Shared {
                client,
                is_multiplexed,
                proxy_authorization,
                host: if is_multiplexed { None } else { host(base) },
            }),
        })
    }
}

/// Returns the authority of an http server and its `Host` header.
fn host(base: &Uri) -> Option<(Authority, HeaderValue)> {
    let authority = base.authority()?;
    let host = match authority.port_u16() {
        None | Some(80) => authority.host(),
        Some(_) => authority.as_str(),
    };
    Some((authority.clone(), HeaderValue::from_str(host).ok()?))
}

#[cfg(not(feature = "tls"))]
mod tls {
    use super::{Builder, Client, ClientSettings, Duration, Error, Route};

    pub(super) fn client(
        _: &Builder,
        _: Route,
        _: ClientSettings,
        _: Duration,
    ) -> Result<Client, Error> {
        Err(Error::config(
            "the base URL is https, which needs the crate feature 'tls'",
        ))
    }
}

/// Limits the time for making a connection as a whole. A peer that accepts the connection but is
/// silent in the TLS handshake was never sent the request, so the call can be retried whatever its
/// method.
#[derive(Clone)]
pub(super) struct Timed<C> {
    inner: C,
    timeout: Duration,
}

impl<C> Timed<C> {
    pub(super) fn new(inner: C, timeout: Duration) -> Self {
        // A longer timeout means no limit, and timers cannot represent a clock's last instants.
        let timeout = timeout.min(Duration::from_secs(u64::from(u32::MAX)));
        Self { inner, timeout }
    }
}

impl<C> Service<Uri> for Timed<C>
where
    C: Service<Uri>,
    C::Error: Into<BoxError>,
    C::Future: Send + 'static,
    C::Response: 'static,
{
    type Response = C::Response;
    type Error = BoxError;
    // One box per connection is little compared with the rest of its cost.
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connected = tokio::time::timeout(self.timeout, self.inner.call(uri));
        Box::pin(async move {
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the connection took too long");
            connected.await.map_err(late)?.map_err(Into::into)
        })
    }
}

impl Service<Request<Full<Bytes>>> for HttpClient {
    type Response = Response<HttpBody>;
    type Error = HttpClientError;
    type Future = HttpClientFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // hyper-util's client queues, so it is always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Full<Bytes>>) -> Self::Future {
        let shared = &*self.shared;
        if let Some(authorization) = &shared.proxy_authorization {
            let headers = request.headers_mut();
            headers.insert(PROXY_AUTHORIZATION, authorization.clone());
        }
        if let Some((server, host)) = &shared.host
            && request.uri().authority().map(Authority::as_str) == Some(server.as_str())
        {
            let headers = request.headers_mut();
            headers.entry(HOST).or_insert_with(|| host.clone());
        }
        let connection = shared
            .is_multiplexed
            .then(|| capture_connection(&mut request));
        HttpClientFuture {
            exchange: Some(Exchange::begin()),
            connection: Awaited::new(connection),
            inner: match &shared.client {
                Client::Http(client) => client.request(request),
                #[cfg(feature = "tls")]
                Client::Https(client) => client.request(request),
            },
        }
    }
}

impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpClient").finish_non_exhaustive()
    }
}

pin_project! {
    /// The future of [`HttpClient`].
    #[must_use = "futures do nothing unless polled"]
    pub struct HttpClientFuture {
        #[pin]
        inner: legacy::ResponseFuture,
        connection: Awaited,
        exchange: Option<Exchange>,
    }
}

/// The connection that an answer is awaited on. If the wait is abandoned, the connection leaves the
/// pool, so that the next attempt does not use one that no longer answers. hyper closes it anyway
/// on HTTP/1, but would keep using it on HTTP/2.
#[derive(Debug, Default)]
struct Awaited {
    /// `None` on HTTP/1.
    connection: Option<CaptureConnection>,
    is_waiting: bool,
}

impl Awaited {
    fn new(connection: Option<CaptureConnection>) -> Self {
        Self {
            connection,
            is_waiting: true,
        }
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        if self.is_waiting
            && let Some(connection) = &self.connection
            && let Some(connection) = &*connection.connection_metadata()
        {
            connection.poison();
        }
    }
}

/// Judges what an error proves about its exchange. A certificate that is not trusted now will not
/// be trusted a second later either.
fn judge(error: &legacy::Error) -> Failure {
    #[cfg(feature = "tls")]
    if tls::is_untrusted(error) {
        return Failure::Permanent;
    }
    judge_hyper(error)
}

impl Future for HttpClientFuture {
    type Output = Result<Response<HttpBody>, HttpClientError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.inner.poll(cx));
        // It was answered or failed by itself, and the pool knows.
        let mut connection = mem::take(this.connection);
        connection.is_waiting = false;
        Poll::Ready(match result {
            Ok(response) => {
                let is_stream = response.version() == Version::HTTP_2;
                Ok(response.map(|inner| HttpBody {
                    inner,
                    is_stream,
                    connection,
                }))
            }
            Err(source) => {
                if let Some(exchange) = this.exchange.take() {
                    exchange.failed(judge(&source));
                }
                Err(HttpClientError { source })
            }
        })
    }
}

pin_project! {
    /// The body of an answer.
    ///
    /// Dropping it while more is awaited removes its connection from the pool.
    #[derive(Debug)]
    pub struct HttpBody {
        #[pin]
        inner: Incoming,
        // Whether it arrives over an HTTP/2 stream.
        is_stream: bool,
        connection: Awaited,
    }
}

impl Body for HttpBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        let frame = this.inner.as_mut().poll_frame(cx);
        this.connection.is_waiting = frame.is_pending();
        match ready!(frame) {
            // hyper treats a stream that is reset with NO_ERROR, by RST_STREAM or by GOAWAY, as
            // ended.
            None if *this.is_stream && !this.inner.is_end_stream() => {
                let error = "the stream was reset before its end";
                Poll::Ready(Some(Err(error.into())))
            }
            frame => Poll::Ready(frame.map(|frame| frame.map_err(Into::into))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl fmt::Debug for HttpClientFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpClientFuture").finish_non_exhaustive()
    }
}

/// Why an HTTP exchange failed.
#[derive(Debug)]
pub struct HttpClientError {
    source: legacy::Error,
}

impl fmt::Display for HttpClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.source.is_connect() {
            "no connection"
        } else {
            "the HTTP exchange failed"
        })
    }
}

impl StdError for HttpClientError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.source)
    }
}
