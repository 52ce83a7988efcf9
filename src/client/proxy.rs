//! Whether connections go directly to the server, through a proxy, or to a Unix socket.

use std::ffi::OsString;
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
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
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
            Self::Environment => match named_by(|name| std::env::var_os(name), base)? {
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

/// Returns the proxy that the environment names for `base`, read as curl reads it: the lower-case
/// form of a variable comes first, and an empty one counts as not set.
///
/// Whoever configures a proxy may have to keep requests from going out directly. So a value that
/// cannot be used is an error.
fn named_by(
    variable: impl Fn(&str) -> Option<OsString>,
    base: &Uri,
) -> Result<Option<Intercept>, Error> {
    let value = |name: &str| match variable(name).map(OsString::into_string) {
        None => Ok(None),
        Some(Ok(value)) => Ok(Some(value).filter(|value| !value.trim().is_empty())),
        Some(Err(_)) => Err(Error::config(format!(
            "the environment variable '{name}' is not UTF-8"
        ))),
    };
    let either = |name: &str| match value(&name.to_ascii_lowercase())? {
        None => value(name),
        lower => Ok::<_, Error>(lower),
    };
    let of_scheme = match base.scheme_str() {
        Some("https") => either("HTTPS_PROXY")?,
        // In a CGI program the upper-case variable is a header of the request. On Windows the two
        // are the same one.
        _ if variable("REQUEST_METHOD").is_some() => match cfg!(windows) {
            true => None,
            false => value("http_proxy")?,
        },
        _ => either("HTTP_PROXY")?,
    };
    let proxy = match of_scheme {
        None => either("ALL_PROXY")?,
        of_scheme => of_scheme,
    };
    let Some(proxy) = proxy else {
        return Ok(None);
    };
    let spared = either("NO_PROXY")?.unwrap_or_default();
    // The matcher takes the asterisk for names alone.
    if spared.split(',').any(|entry| entry.trim() == "*") {
        return Ok(None);
    }
    let proxied_by = |proxy: &str| {
        let matcher = Matcher::builder().all(proxy).no(spared.as_str());
        matcher.build().intercept(base)
    };
    if proxied_by("http://proxy.invalid").is_none() {
        return Ok(None);
    }
    match proxied_by(&proxy) {
        None => Err(unusable("in the environment is malformed")),
        found => Ok(found),
    }
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

    /// The proxy for a server under an environment: its URL, or `-` for none, or `!` for an error.
    fn named(environment: &[(&str, &str)], url: &str) -> String {
        let variable = |name: &str| {
            let (_, value) = environment.iter().find(|(set, _)| *set == name)?;
            Some(value.into())
        };
        match named_by(variable, &url.parse().unwrap()) {
            Ok(Some(proxy)) => proxy.uri().to_string(),
            Ok(None) => "-".to_owned(),
            Err(error) => {
                assert!(error.is_config(), "{error:?}");
                assert!(!error.to_string().contains("secret"), "{error}");
                "!".to_owned()
            }
        }
    }

    #[test]
    fn an_empty_variable_hides_no_other_and_the_lower_case_one_comes_first() {
        let (one, other) = ("http://one:1", "http://other:2");
        for (environment, expected) in [
            (&[][..], "-"),
            (&[("HTTP_PROXY", ""), ("http_proxy", one)], "http://one:1/"),
            (&[("HTTP_PROXY", one), ("http_proxy", "")], "http://one:1/"),
            (&[("HTTP_PROXY", "  "), ("ALL_PROXY", one)], "http://one:1/"),
            (&[("ALL_PROXY", ""), ("all_proxy", one)], "http://one:1/"),
            (
                &[("HTTP_PROXY", other), ("http_proxy", one)],
                "http://one:1/",
            ),
            (
                &[("http_proxy", one), ("NO_PROXY", ""), ("no_proxy", "*")],
                "-",
            ),
            (&[("HTTPS_PROXY", one)], "-"),
            // A header of a CGI request, and what cannot be one.
            (&[("HTTP_PROXY", one), ("REQUEST_METHOD", "GET")], "-"),
            #[cfg(not(windows))]
            (
                &[("http_proxy", one), ("REQUEST_METHOD", "GET")],
                "http://one:1/",
            ),
        ] {
            let named = named(environment, "http://server.invalid");
            assert_eq!(named, expected, "{environment:?}");
        }
    }

    #[test]
    fn an_https_server_has_a_variable_of_its_own() {
        let (one, other) = ("http://one:1", "http://other:2");
        for (environment, expected) in [
            (&[("HTTP_PROXY", one)][..], "-"),
            (
                &[("HTTPS_PROXY", one), ("HTTP_PROXY", other)],
                "http://one:1/",
            ),
            (
                &[("ALL_PROXY", one), ("HTTP_PROXY", other)],
                "http://one:1/",
            ),
            (
                &[("HTTPS_PROXY", one), ("REQUEST_METHOD", "GET")],
                "http://one:1/",
            ),
        ] {
            let named = named(environment, "https://server.invalid");
            assert_eq!(named, expected, "{environment:?}");
        }
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_an_error_wherever_another_one_would_be_found() {
        let bad = "http://us er:secret@host";
        for (environment, expected) in [
            (&[("HTTP_PROXY", bad), ("http_proxy", "")][..], "!"),
            (&[("HTTP_PROXY", bad), ("ALL_PROXY", "http://one:1")], "!"),
            (
                &[("http_proxy", "::::"), ("HTTP_PROXY", "http://one:1")],
                "!",
            ),
            (&[("ALL_PROXY", bad), ("all_proxy", "")], "!"),
            (&[("HTTP_PROXY", bad), ("NO_PROXY", "*")], "-"),
            (&[("HTTPS_PROXY", bad)], "-"),
        ] {
            let named = named(environment, "http://server.invalid");
            assert_eq!(named, expected, "{environment:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_variable_that_is_not_utf_8_is_an_error_that_names_it() {
        use std::os::unix::ffi::OsStringExt;

        for set in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "no_proxy"] {
            let variable = |name: &str| match name {
                name if name == set => Some(OsString::from_vec(b"http://secret\xff".to_vec())),
                "all_proxy" => Some("http://one:1".into()),
                _ => None,
            };
            let base = "http://server.invalid".parse().unwrap();
            let named = named_by(variable, &base).map(|found| found.is_some());
            if set == "ALL_PROXY" {
                // Its lower-case form comes first.
                assert!(named.unwrap());
                continue;
            }
            let error = named.unwrap_err();
            assert!(
                error.is_config() && error.to_string().contains(set),
                "{error}"
            );
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn the_asterisk_spares_addresses_too() {
        for (spared, expected) in [
            ("*", "-"),
            ("a, *", "-"),
            ("192.0.2.2", "-"),
            ("192.0.2.0/24", "-"),
            ("192.0.2.3", "http://one:1/"),
            (",,", "http://one:1/"),
        ] {
            let environment = [("http_proxy", "http://one:1"), ("no_proxy", spared)];
            let named = named(&environment, "http://192.0.2.2:8000");
            assert_eq!(named, expected, "{spared}");
        }
    }

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
