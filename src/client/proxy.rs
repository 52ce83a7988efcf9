//! Whether connections go straight to the server or through a proxy.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{HeaderValue, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

use super::Error;
use super::connector::{Connected, Connection, HttpConnector, Tunnel};
use crate::protocol::BoxError;

/// Where the proxy is named.
#[derive(Clone)]
pub(super) enum ProxySetting {
    /// In `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, or their lower-case forms.
    Environment,
    /// There is none.
    Never,
    Url(String),
}

/// An HTTP proxy.
pub(super) struct Proxy {
    uri: Uri,
    authorization: Option<HeaderValue>,
}

impl ProxySetting {
    /// Returns the proxy for a server, which is one for the life of a client.
    pub(super) fn proxy_for(&self, base: &Uri) -> Result<Option<Proxy>, Error> {
        let found = match self {
            Self::Never => return Ok(None),
            // As in Go: a proxy's `localhost` is another machine.
            Self::Environment if is_loopback(base) => return Ok(None),
            Self::Environment => match Matcher::from_env().intercept(base) {
                None => return Ok(None),
                found => found,
            },
            Self::Url(url) => Matcher::builder().all(url.as_str()).build().intercept(base),
        };
        // Its URL may hold a password, so it is not repeated.
        let proxy = found
            .filter(|proxy| proxy.uri().scheme_str() == Some("http"))
            .ok_or_else(|| {
                Error::config("the proxy is unusable; allowed is http:// with a host")
            })?;
        let mut authorization = proxy.basic_auth().cloned();
        if let Some(authorization) = &mut authorization {
            authorization.set_sensitive(true);
        }
        Ok(Some(Proxy {
            uri: proxy.uri().clone(),
            authorization,
        }))
    }
}

fn is_loopback(base: &Uri) -> bool {
    let host = base.host().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || address
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Makes connections, straight or through the proxy.
#[derive(Clone)]
pub(super) enum Route {
    Direct(HttpConnector),
    /// The proxy is sent the requests themselves.
    Forward(HttpConnector, Uri),
    /// The proxy passes on bytes, so that TLS reaches from end to end.
    Tunnel(Tunnel<HttpConnector>),
}

impl Route {
    /// Returns the route to `base`, and the credential that the proxy wants to see on each request.
    pub(super) fn new(
        http: HttpConnector,
        base: &Uri,
        proxy: Option<Proxy>,
    ) -> (Self, Option<HeaderValue>) {
        let Some(Proxy { uri, authorization }) = proxy else {
            return (Self::Direct(http), None);
        };
        if base.scheme_str() != Some("https") {
            return (Self::Forward(http, uri), authorization);
        }
        let tunnel = Tunnel::new(uri, http);
        let tunnel = match authorization {
            Some(authorization) => tunnel.with_auth(authorization),
            None => tunnel,
        };
        (Self::Tunnel(tunnel), None)
    }
}

impl Service<Uri> for Route {
    type Response = RoutedStream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<RoutedStream, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        match self {
            Self::Direct(http) | Self::Forward(http, _) => http.poll_ready(cx).map_err(Into::into),
            Self::Tunnel(tunnel) => tunnel.poll_ready(cx).map_err(Into::into),
        }
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let stream = |io, is_forwarded| RoutedStream { io, is_forwarded };
        match self {
            Self::Direct(http) => {
                let connecting = http.call(server);
                Box::pin(async move { Ok(stream(connecting.await?, false)) })
            }
            Self::Forward(http, proxy) => {
                let connecting = http.call(proxy.clone());
                Box::pin(async move { Ok(stream(connecting.await?, true)) })
            }
            Self::Tunnel(tunnel) => {
                let connecting = tunnel.call(server);
                Box::pin(async move { Ok(stream(connecting.await?, false)) })
            }
        }
    }
}

/// A connection that knows whether a proxy reads its requests, which then name the server in full.
pub(super) struct RoutedStream {
    io: TokioIo<TcpStream>,
    is_forwarded: bool,
}

impl Connection for RoutedStream {
    fn connected(&self) -> Connected {
        self.io.connected().proxy(self.is_forwarded)
    }
}

impl Read for RoutedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl Write for RoutedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
