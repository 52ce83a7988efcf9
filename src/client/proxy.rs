//! Whether connections go directly to the server, through a proxy, or to a Unix socket.

use std::future::Future;
use std::io;
use std::net::IpAddr;
#[cfg(unix)]
use std::path::Path;
use std::pin::Pin;
#[cfg(unix)]
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{HeaderValue, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;
use tower_service::Service;

use super::connector::{Connected, Connection, HttpConnector, Tunnel};
use super::{Error, url};
use crate::protocol::BoxError;

/// Where the proxy is configured.
#[derive(Clone)]
pub(super) enum ProxySetting {
    /// In `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, or their lower-case forms.
    Environment,
    /// Nowhere: there is none.
    Never,
    Url(String),
}

/// An HTTP proxy.
pub(super) struct Proxy {
    uri: Uri,
    authorization: Option<HeaderValue>,
}

impl ProxySetting {
    /// Returns the proxy for a server. It does not change during a client's life.
    pub(super) fn proxy_for(&self, base: &Uri) -> Result<Option<Proxy>, Error> {
        let found = match self {
            Self::Never => return Ok(None),
            // As in Go: a proxy's `localhost` is another machine.
            Self::Environment if is_loopback(base) => return Ok(None),
            Self::Environment => match Matcher::from_env().intercept(base) {
                // Whoever configures a proxy may have to keep requests from going out directly.
                None if names_unusable(base) => {
                    return Err(unusable("in the environment is malformed"));
                }
                None => return Ok(None),
                found => found,
            },
            Self::Url(url) => {
                url::check_proxy(url).map_err(unusable)?;
                Matcher::builder().all(url.as_str()).build().intercept(base)
            }
        };
        let proxy = found.ok_or_else(|| unusable("is malformed"))?;
        url::check_proxy_host(proxy.uri()).map_err(unusable)?;
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

/// Whether the environment names an invalid proxy for `base`. The matcher ignores it silently.
fn names_unusable(base: &Uri) -> bool {
    let value = |name: &str| {
        let lower = name.to_ascii_lowercase();
        let value = std::env::var(lower).or_else(|_| std::env::var(name));
        value.ok().filter(|value| !value.trim().is_empty())
    };
    let is_proxied = |proxy: String| {
        let matcher = Matcher::builder()
            .all(proxy)
            .no(value("NO_PROXY").unwrap_or_default());
        matcher.build().intercept(base).is_some()
    };
    let of_scheme = match base.scheme_str() {
        Some("https") => value("HTTPS_PROXY"),
        // In a CGI program the variable is a header of the request.
        _ if std::env::var_os("REQUEST_METHOD").is_some() => None,
        _ => value("HTTP_PROXY"),
    };
    is_proxied("http://proxy.invalid".to_owned())
        && of_scheme
            .or_else(|| value("ALL_PROXY"))
            .is_some_and(|proxy| !is_proxied(proxy))
}

/// The URL may contain a password, so the message does not repeat it.
fn unusable(fault: &str) -> Error {
    Error::config(format!(
        "the URL of the proxy {fault}; allowed is http:// with a host, and if need be a port, a user and a password"
    ))
}

fn is_loopback(base: &Uri) -> bool {
    let host = base.host().unwrap_or_default();
    let host = host.strip_suffix('.').unwrap_or(host);
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    host.eq_ignore_ascii_case("localhost")
        || address
            .parse::<IpAddr>()
            .is_ok_and(|address| address.to_canonical().is_loopback())
        // An address may have fewer than four numbers.
        || host.starts_with("127.") && host.split('.').all(is_number)
}

/// Makes connections, directly or through the proxy.
#[derive(Clone)]
pub(super) enum Route {
    Direct(HttpConnector),
    /// To this socket, whatever the server.
    #[cfg(unix)]
    Unix(Arc<Path>),
    /// Requests are sent to the proxy itself.
    Forward(HttpConnector, Uri),
    /// The proxy forwards bytes, so TLS is end to end.
    Tunnel(Tunnel<HttpConnector>),
}

impl Route {
    /// Returns the route to `base`, and the credential for the proxy on each request.
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
            #[cfg(unix)]
            Self::Unix(_) => Poll::Ready(Ok(())),
            Self::Tunnel(tunnel) => tunnel.poll_ready(cx).map_err(Into::into),
        }
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let stream = |io, is_forwarded| RoutedStream {
            io: Io::Tcp(io),
            is_forwarded,
        };
        match self {
            Self::Direct(http) => {
                let connecting = http.call(server);
                Box::pin(async move { Ok(stream(connecting.await?, false)) })
            }
            #[cfg(unix)]
            Self::Unix(path) => {
                let path = Arc::clone(path);
                Box::pin(async move {
                    Ok(RoutedStream {
                        io: Io::Unix(TokioIo::new(UnixStream::connect(path).await?)),
                        is_forwarded: false,
                    })
                })
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

/// A connection that knows whether a proxy reads its requests. These then name the server in full.
pub(super) struct RoutedStream {
    io: Io,
    is_forwarded: bool,
}

enum Io {
    Tcp(TokioIo<TcpStream>),
    #[cfg(unix)]
    Unix(TokioIo<UnixStream>),
}

/// Calls a method of whichever stream it is.
macro_rules! delegate {
    ($self:ident, $io:ident => $call:expr) => {
        match &$self.io {
            Io::Tcp($io) => $call,
            #[cfg(unix)]
            Io::Unix($io) => $call,
        }
    };
    (mut $self:ident, $io:ident => $call:expr) => {
        match &mut $self.io {
            Io::Tcp($io) => $call,
            #[cfg(unix)]
            Io::Unix($io) => $call,
        }
    };
}

impl Connection for RoutedStream {
    fn connected(&self) -> Connected {
        // Without the addresses, which the client would copy into the extensions of every answer.
        Connected::new().proxy(self.is_forwarded)
    }
}

impl Read for RoutedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        delegate!(mut self, io => Pin::new(io).poll_read(cx, buffer))
    }
}

impl Write for RoutedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        delegate!(mut self, io => Pin::new(io).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(mut self, io => Pin::new(io).poll_write_vectored(cx, buffers))
    }

    fn is_write_vectored(&self) -> bool {
        delegate!(self, io => io.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(mut self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(mut self, io => Pin::new(io).poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_localhost_and_addresses_of_loopback_are_loopback() {
        let is_loopback = |host: &str| is_loopback(&format!("http://{host}/").parse().unwrap());
        for host in [
            "localhost",
            "LOCALHOST.",
            "127.0.0.1",
            "127.9.8.7:80",
            "127.1",
            "[::1]",
            "[::ffff:127.0.0.1]",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example",
            "10.0.0.1",
            "10.1",
            "127.example",
            "127.0.0.1.example",
            "127..1",
            "128.0.0.1",
            "[::2]",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
