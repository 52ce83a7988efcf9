//! The HTTP client under `AegisService`: the one file that names hyper-util's legacy client.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use crate::protocol::BoxError;
use bytes::Bytes;
use http::header::PROXY_AUTHORIZATION;
use http::{HeaderValue, Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{CaptureConnection, capture_connection};
// Handed on to `proxy`, so that this stays the only file to change when that client goes.
pub(super) use hyper_util::client::legacy::connect::{
    Connected, Connection, HttpConnector, proxy::Tunnel,
};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pin_project_lite::pin_project;
use tower_service::Service;

use super::Error;
use super::proxy::{Proxy, Route};
use crate::layer::{Exchange, Failure, judge_hyper};

/// How long a connection may lie unused before it is closed. Shorter than the times after which servers and balancers drop
/// theirs, so that requests rarely meet a connection that is just being closed.
const IDLE: Duration = Duration::from_secs(5);

/// How often a connection on which answers are awaited is probed on HTTP/2, and how long the reply may take. A peer that is
/// gone without a word is found out by nothing else before the attempt's timeout.
const PING: Duration = Duration::from_secs(10);
const PONG: Duration = Duration::from_secs(5);

/// What an [`HttpClient`] is made by.
pub(super) struct ClientSettings {
    /// How long a connection may take to be made, name and TLS included.
    pub(super) connect_timeout: Duration,
    #[cfg_attr(not(feature = "tls"), expect(dead_code))]
    pub(super) root_certificates: Vec<Vec<u8>>,
    #[cfg_attr(not(feature = "tls"), expect(dead_code))]
    pub(super) client_identity: Option<Vec<u8>>,
    /// In place of roots and identity.
    #[cfg(feature = "tls")]
    pub(super) tls_config: Option<rustls::ClientConfig>,
    pub(super) http2_prior_knowledge: bool,
    pub(super) proxy: Option<Proxy>,
}

/// An HTTP client on hyper-util: pooled connections, HTTP/1.1, and for https HTTP/2 where the server offers it (ALPN).
///
/// It follows no redirects. A request that was queued on a pooled connection and handed back before it was started is put on
/// another connection; nothing of it was sent, so that is not an attempt, and servers do not see it.
#[derive(Clone)]
pub struct HttpClient {
    // Shared: hyper-util's client is a few hundred bytes, and every call has a clone for its retries.
    client: Arc<Client>,
    /// Whether a connection may carry other requests beside one that is given up.
    is_multiplexed: bool,
    /// What a proxy that reads the requests wants to see on each.
    proxy_authorization: Option<HeaderValue>,
}

enum Client {
    Http(legacy::Client<Timed<Route>, Full<Bytes>>),
    #[cfg(feature = "tls")]
    Https(legacy::Client<Timed<hyper_rustls::HttpsConnector<Route>>, Full<Bytes>>),
}

impl HttpClient {
    /// Makes a client for the scheme of `base`.
    pub(super) fn new(base: &Uri, mut settings: ClientSettings) -> Result<Self, Error> {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        // Divided among the addresses of a name, so that one that does not answer leaves time for the others.
        http.set_connect_timeout(Some(settings.connect_timeout));
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        builder
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .http2_keep_alive_interval(PING)
            .http2_keep_alive_timeout(PONG)
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
        let is_multiplexed = is_https || settings.http2_prior_knowledge;
        let client = if is_https {
            tls::client(&builder, tls::connector(route, settings)?, timeout)
        } else {
            Client::Http(builder.build(Timed::new(route, timeout)))
        };
        Ok(Self {
            client: Arc::new(client),
            is_multiplexed,
            proxy_authorization,
        })
    }
}

/// Bounds the making of a connection as a whole: a peer that takes the connection and says nothing in the TLS handshake was
/// never sent the request, so the call can be retried whatever its method.
#[derive(Clone)]
struct Timed<C> {
    inner: C,
    timeout: Duration,
}

impl<C> Timed<C> {
    fn new(inner: C, timeout: Duration) -> Self {
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
    // A box for each connection, beside all else that one costs.
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

#[cfg(feature = "tls")]
mod tls {
    use std::sync::Arc;
    use std::time::Duration;

    use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
    use hyper_util::client::legacy::Builder;
    use rustls::ClientConfig;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls_platform_verifier::Verifier;

    use super::{Client, ClientSettings, Error, Route, Timed};

    pub(super) fn connector(
        route: Route,
        mut settings: ClientSettings,
    ) -> Result<HttpsConnector<Route>, Error> {
        let http2_only = settings.http2_prior_knowledge;
        let mut config = match settings.tls_config.take() {
            Some(config)
                if settings.root_certificates.is_empty() && settings.client_identity.is_none() =>
            {
                config
            }
            Some(_) => {
                return Err(Error::config(
                    "both a TLS configuration and certificates are set; allowed is one, as the configuration has its own",
                ));
            }
            None => config(settings)?,
        };
        // The protocols are what the client speaks, and not a setting.
        config.alpn_protocols.clear();
        let builder = HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_only();
        Ok(if http2_only {
            builder.enable_http2().wrap_connector(route)
        } else {
            builder.enable_all_versions().wrap_connector(route)
        })
    }

    /// The platform's roots and what was added to them.
    fn config(settings: ClientSettings) -> Result<ClientConfig, Error> {
        let unusable = "the TLS configuration is unusable";
        let mut roots = Vec::new();
        for pem in settings.root_certificates {
            let before = roots.len();
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                roots.push(certificate.map_err(|error| {
                    Error::config_caused("the root certificate is not valid PEM", error)
                })?);
            }
            if roots.len() == before {
                return Err(Error::config(
                    "the root certificate holds no PEM certificate",
                ));
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Verifier::new_with_extra_roots(roots, provider.clone())
            .map_err(|error| Error::config_caused(unusable, error))?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::config_caused(unusable, error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        match settings.client_identity {
            Some(pem) => {
                let (chain, key) = identity(&pem)?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| Error::config_caused("the client identity is unusable", error))
            }
            None => Ok(builder.with_no_client_auth()),
        }
    }

    /// The certificate chain and the private key of a client.
    fn identity(
        pem: &[u8],
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
        let chain = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Error::config_caused("the client identity is not valid PEM", error))?;
        if chain.is_empty() {
            return Err(Error::config(
                "the client identity holds no PEM certificate; allowed is a chain, its own first, and a private key",
            ));
        }
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| {
            Error::config_caused("the client identity holds no PEM private key", error)
        })?;
        Ok((chain, key))
    }

    /// Whether a connection was not made as the server's certificate is not valid for it.
    pub(super) fn is_untrusted(error: &(dyn std::error::Error + 'static)) -> bool {
        let mut next = Some(error);
        for _ in 0..32 {
            let Some(error) = next else { break };
            let tls = error.downcast_ref::<rustls::Error>();
            if matches!(tls, Some(rustls::Error::InvalidCertificate(_))) {
                return true;
            }
            // What an `io::Error` wraps is not its source: that is the source of what it wraps.
            let io = error.downcast_ref::<std::io::Error>();
            next = match io.and_then(std::io::Error::get_ref) {
                Some(wrapped) => Some(wrapped),
                None => error.source(),
            };
        }
        false
    }

    pub(super) fn client(
        builder: &Builder,
        connector: HttpsConnector<Route>,
        timeout: Duration,
    ) -> Client {
        Client::Https(builder.build(Timed::new(connector, timeout)))
    }
}

#[cfg(not(feature = "tls"))]
mod tls {
    use std::convert::Infallible;
    use std::time::Duration;

    use hyper_util::client::legacy::Builder;

    use super::{Client, ClientSettings, Error, Route};

    pub(super) fn connector(_: Route, _: ClientSettings) -> Result<Infallible, Error> {
        Err(Error::config(
            "the base URL is https, which needs the crate feature 'tls'",
        ))
    }

    pub(super) fn client(_: &Builder, never: Infallible, _: Duration) -> Client {
        match never {}
    }
}

impl Service<Request<Full<Bytes>>> for HttpClient {
    type Response = Response<Incoming>;
    type Error = HttpClientError;
    type Future = HttpClientFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // hyper-util's client queues; it is always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Full<Bytes>>) -> Self::Future {
        if let Some(authorization) = &self.proxy_authorization {
            let headers = request.headers_mut();
            headers.insert(PROXY_AUTHORIZATION, authorization.clone());
        }
        let connection = self
            .is_multiplexed
            .then(|| capture_connection(&mut request));
        HttpClientFuture {
            exchange: Some(Exchange::begin()),
            connection: Abandoned(connection),
            inner: match &*self.client {
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
        connection: Abandoned,
        exchange: Option<Exchange>,
    }
}

/// Takes the connection of a request that is given up out of the pool, so that the next attempt is not put on a connection
/// that answers no more. On HTTP/1 hyper closes it anyhow; on HTTP/2 it would be used on.
struct Abandoned(Option<CaptureConnection>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        if let Some(connection) = &self.0
            && let Some(connection) = &*connection.connection_metadata()
        {
            connection.poison();
        }
    }
}

/// What an error proves of its exchange. A certificate that is not trusted now is not trusted in a second either.
fn judge(error: &legacy::Error) -> Failure {
    #[cfg(feature = "tls")]
    if tls::is_untrusted(error) {
        return Failure::Permanent;
    }
    judge_hyper(error)
}

impl Future for HttpClientFuture {
    type Output = Result<Response<Incoming>, HttpClientError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.inner.poll(cx));
        // It was answered or failed by itself, and the pool knows of that.
        this.connection.0 = None;
        Poll::Ready(result.map_err(|source| {
            if let Some(exchange) = this.exchange.take() {
                exchange.failed(judge(&source));
            }
            HttpClientError { source }
        }))
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
