//! The HTTP client under `AegisService`: the one file that names hyper-util's legacy client.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pin_project_lite::pin_project;
use tower_service::Service;

use super::Error;

/// How long a connection may lie unused before it is closed. Shorter than the times after which servers and balancers drop
/// theirs, so that requests rarely meet a connection that is just being closed.
const IDLE: Duration = Duration::from_secs(5);

/// An HTTP client on hyper-util: pooled connections, HTTP/1.1, and for https HTTP/2 where the server offers it (ALPN).
///
/// It follows no redirects. A request that was queued on a pooled connection and handed back before it was started is put on
/// another connection; nothing of it was sent, so that is not an attempt, and servers do not see it.
#[derive(Clone)]
pub struct HttpClient {
    // Shared: hyper-util's client is a few hundred bytes, and every call has a clone for its retries.
    client: Arc<Client>,
}

enum Client {
    Http(legacy::Client<HttpConnector, Full<Bytes>>),
    #[cfg(feature = "tls")]
    Https(legacy::Client<hyper_rustls::HttpsConnector<HttpConnector>, Full<Bytes>>),
}

impl HttpClient {
    /// Makes a client for the scheme of `base`.
    pub(super) fn new(
        base: &Uri,
        connect_timeout: Duration,
        root_certificates: Vec<Vec<u8>>,
    ) -> Result<Self, Error> {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        // A connect that takes too long was never sent and can be retried whatever the method.
        http.set_connect_timeout(Some(connect_timeout));
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        builder
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new());
        if base.scheme_str() == Some("https") {
            return tls::connector(http, root_certificates).map(|connector| Self {
                client: Arc::new(tls::client(&builder, connector)),
            });
        }
        Ok(Self {
            client: Arc::new(Client::Http(builder.build(http))),
        })
    }
}

#[cfg(feature = "tls")]
mod tls {
    use std::sync::Arc;

    use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
    use hyper_util::client::legacy::{Builder, connect::HttpConnector};
    use rustls::ClientConfig;
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    use rustls_platform_verifier::Verifier;

    use super::{Client, Error};

    pub(super) fn connector(
        mut http: HttpConnector,
        root_certificates: Vec<Vec<u8>>,
    ) -> Result<HttpsConnector<HttpConnector>, Error> {
        let unusable = "the TLS configuration is unusable";
        let mut roots = Vec::new();
        for pem in root_certificates {
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
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::config_caused(unusable, error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        http.enforce_http(false);
        Ok(HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_only()
            .enable_all_versions()
            .wrap_connector(http))
    }

    pub(super) fn client(builder: &Builder, connector: HttpsConnector<HttpConnector>) -> Client {
        Client::Https(builder.build(connector))
    }
}

#[cfg(not(feature = "tls"))]
mod tls {
    use std::convert::Infallible;

    use hyper_util::client::legacy::{Builder, connect::HttpConnector};

    use super::{Client, Error};

    pub(super) fn connector(_: HttpConnector, _: Vec<Vec<u8>>) -> Result<Infallible, Error> {
        Err(Error::config(
            "the base URL is https, which needs the crate feature 'tls'",
        ))
    }

    pub(super) fn client(_: &Builder, never: Infallible) -> Client {
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

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        HttpClientFuture {
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
    }
}

impl Future for HttpClientFuture {
    type Output = Result<Response<Incoming>, HttpClientError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project()
            .inner
            .poll(cx)
            .map_err(|source| HttpClientError { source })
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
