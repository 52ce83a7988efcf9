//! The hosts that a server answers for, and the web pages that may change something.
//!
//! A server without API keys tells callers apart from strangers by its address alone, and a web
//! page in a local browser has access to that address. The page can make its own name resolve to a
//! loopback address (DNS rebinding), so that the server becomes the page's own origin. The name in
//! `Host` reveals this. `Origin` and `Sec-Fetch-Site` reveal a page that does not rebind.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method};

use super::arrival::Arrival;
use super::response::Rejection;
use crate::protocol::Code;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The longest DNS name.
const MAX_NAME_LEN: usize = 253;

/// A host that a server answers for: a name or an IP address, on any port.
///
/// ```
/// use aegis_hitl::server::Host;
///
/// let host: Host = "Aegis.Example.com".parse()?;
/// assert_eq!(host.to_string(), "aegis.example.com");
/// # Ok::<(), aegis_hitl::server::InvalidHost>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Host(Repr);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Repr {
    Address(IpAddr),
    /// In lower case, without a trailing dot.
    Name(String),
}

impl Host {
    fn is(&self, other: HostRef<'_>) -> bool {
        match (&self.0, other) {
            (Repr::Address(own), HostRef::Address(other)) => *own == other,
            (Repr::Name(own), HostRef::Name(other)) => own.eq_ignore_ascii_case(other),
            _ => false,
        }
    }
}

impl FromStr for Host {
    type Err = InvalidHost;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse::<Ipv6Addr>() {
            return Ok(Self(Repr::Address(IpAddr::V6(address).to_canonical())));
        }
        match Authority::parse(text) {
            Some(Authority { host, port: None }) if !text.ends_with(':') => Ok(Self(match host {
                HostRef::Address(address) => Repr::Address(address),
                HostRef::Name(name) => Repr::Name(name.to_ascii_lowercase()),
            })),
            _ => Err(InvalidHost(())),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Address(IpAddr::V4(address)) => write!(f, "{address}"),
            Repr::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Repr::Name(name) => f.write_str(name),
        }
    }
}

/// The error of parsing a [`Host`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidHost(());

impl fmt::Display for InvalidHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "not a host; allowed are a DNS name in ASCII and an IP address, without a scheme, a \
             port or a wildcard",
        )
    }
}

impl std::error::Error for InvalidHost {}

/// A host that a request names.
#[derive(Debug, Clone, Copy)]
enum HostRef<'a> {
    Address(IpAddr),
    Name(&'a str),
}

impl HostRef<'_> {
    fn is(self, other: HostRef<'_>) -> bool {
        match (self, other) {
            (Self::Address(one), HostRef::Address(other)) => one == other,
            (Self::Name(one), HostRef::Name(other)) => one.eq_ignore_ascii_case(other),
            _ => false,
        }
    }

    /// Names below `localhost` are loopback names (RFC 6761, section 6.3), and cannot be
    /// registered.
    fn is_loopback(self) -> bool {
        const LOCALHOST: &str = "localhost";
        match self {
            Self::Address(address) => address.is_loopback(),
            Self::Name(name) => {
                let split = name.len().checked_sub(LOCALHOST.len());
                let split = split.and_then(|at| name.split_at_checked(at));
                split.is_some_and(|(before, end)| {
                    end.eq_ignore_ascii_case(LOCALHOST)
                        && (before.is_empty() || before.ends_with('.'))
                })
            }
        }
    }
}

/// The value of a `Host` header.
#[derive(Debug, Clone, Copy)]
struct Authority<'a> {
    host: HostRef<'a>,
    port: Option<u16>,
}

impl<'a> Authority<'a> {
    /// Reads `host` or `host:port`. User information, and anything else that no browser sends, is
    /// invalid.
    fn parse(text: &'a str) -> Option<Self> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, rest) = rest.split_once(']')?;
                let address: Ipv6Addr = address.parse().ok()?;
                let port = match rest.strip_prefix(':') {
                    Some(port) => port,
                    None if rest.is_empty() => "",
                    None => return None,
                };
                (HostRef::Address(IpAddr::V6(address).to_canonical()), port)
            }
            None => {
                let (host, port) = text.split_once(':').unwrap_or((text, ""));
                (host_ref(host)?, port)
            }
        };
        let port = match port {
            "" => None,
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().ok()?)
            }
            _ => return None,
        };
        Some(Self { host, port })
    }

    fn of(value: &'a HeaderValue) -> Option<Self> {
        Self::parse(value.to_str().ok()?)
    }
}

fn host_ref(host: &str) -> Option<HostRef<'_>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Some(HostRef::Address(address.to_canonical()));
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    let is_label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    let is_name = name.len() <= MAX_NAME_LEN && name.split('.').all(is_label);
    is_name.then_some(HostRef::Name(name))
}

/// The hosts whose requests a server answers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostGuard<'a> {
    /// The configured hosts, in addition to the loopback names.
    hosts: &'a [Host],
    /// The address that the server listens on, if it is known.
    listening: Option<IpAddr>,
    /// Whether the server speaks TLS itself. Its own pages are then https.
    is_tls: bool,
}

impl<'a> HostGuard<'a> {
    pub(crate) fn new(hosts: &'a [Host], arrival: Arrival) -> Self {
        Self {
            hosts,
            listening: arrival.listening,
            is_tls: arrival.is_tls,
        }
    }

    /// Rejects requests for foreign hosts, and requests by foreign web pages that would change
    /// something.
    pub(crate) fn admit(&self, parts: &Parts) -> Result<(), Rejection> {
        let target = parts.uri.authority().map(|authority| authority.as_str());
        let target = target.map(Authority::parse);
        let headers = parts.headers.get_all(HOST).iter().map(Authority::of);
        // HTTP/2 and absolute targets can name two hosts. Both must be the server's own, since a
        // reader may look at either. Calls within a process name none; browsers always name one.
        let mut own: Option<Authority<'_>> = None;
        for named in target.into_iter().chain(headers) {
            match named {
                Some(authority) if self.answers_for(authority.host) => own = own.or(named),
                _ => {
                    return Err(Rejection::new(
                        Code::MisdirectedRequest,
                        "this server does not answer for the host that the request names; allowed \
                         are 'localhost', loopback addresses, the address that it listens on, and \
                         the hosts that it was given (--host)",
                    ));
                }
            }
        }
        self.admit_origin(parts, own)
    }

    /// Rejects requests by foreign web pages that would change something, whatever host they are
    /// for.
    pub(crate) fn admit_own_pages(&self, parts: &Parts) -> Result<(), Rejection> {
        let target = parts.uri.authority().map(|authority| authority.as_str());
        let header = parts.headers.get(HOST).and_then(Authority::of);
        let own = header.or_else(|| target.and_then(Authority::parse));
        self.admit_origin(parts, own)
    }

    fn admit_origin(&self, parts: &Parts, own: Option<Authority<'_>>) -> Result<(), Rejection> {
        if is_safe(&parts.method) {
            return Ok(());
        }
        let mut sites = parts.headers.get_all(SEC_FETCH_SITE).iter();
        let mut origins = parts.headers.get_all(ORIGIN).iter();
        if sites.all(is_own_site) && origins.all(|origin| self.is_own_origin(origin, own)) {
            return Ok(());
        }
        Err(Rejection::new(
            Code::Forbidden,
            "a web page of another origin may change nothing here; behind a proxy, name the host \
             that browsers see (--host)",
        ))
    }

    fn answers_for(&self, host: HostRef<'_>) -> bool {
        host.is_loopback() || self.is_listening_on(host) || self.was_given(host)
    }

    /// Returns whether the host is an address that the server listens on. If it listens on all
    /// addresses, every address is its own: a web page can rebind a name, not an address.
    fn is_listening_on(&self, host: HostRef<'_>) -> bool {
        match (self.listening, host) {
            (Some(own), HostRef::Address(address)) => {
                own.is_unspecified() || own.to_canonical() == address
            }
            _ => false,
        }
    }

    fn was_given(&self, host: HostRef<'_>) -> bool {
        self.hosts.iter().any(|own| own.is(host))
    }

    /// Returns whether the origin is the target of the request, or a configured host. A loopback
    /// origin must equal the target, port included: other programs on this machine are foreign.
    fn is_own_origin(&self, origin: &HeaderValue, target: Option<Authority<'_>>) -> bool {
        let Ok(origin) = origin.to_str() else {
            return false;
        };
        let (authority, default_port) = match origin.split_once("://") {
            Some(("http", authority)) if !self.is_tls => (authority, 80),
            Some(("https", authority)) => (authority, 443),
            _ => return false,
        };
        let Some(origin) = Authority::parse(authority) else {
            return false;
        };
        let port = |authority: Authority<'_>| authority.port.unwrap_or(default_port);
        target.is_some_and(|own| own.host.is(origin.host) && port(own) == port(origin))
            || self.was_given(origin.host)
    }
}

/// Returns whether the method is defined as safe. An unknown method may change something.
fn is_safe(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::OPTIONS].contains(method)
}

/// Any other value means a foreign origin, or an unknown one.
fn is_own_site(value: &HeaderValue) -> bool {
    ["same-origin", "none"].contains(&value.to_str().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers_for(listening: Option<&str>, host: &str) -> bool {
        let guard = HostGuard {
            hosts: &[],
            listening: listening.map(|address| address.parse().unwrap()),
            is_tls: false,
        };
        Authority::parse(host).is_some_and(|authority| guard.answers_for(authority.host))
    }

    #[test]
    fn the_address_listened_on_is_an_own_host_on_any_port() {
        for (listening, own, foreign) in [
            (None, "localhost", "192.0.2.7"),
            (Some("127.0.0.1"), "127.0.0.1", "192.0.2.7"),
            (Some("127.0.0.1"), "[::1]:8000", "0.0.0.0"),
            (Some("192.0.2.7"), "192.0.2.7:1", "192.0.2.8"),
            (Some("192.0.2.7"), "[::ffff:192.0.2.7]", "example.com"),
            (Some("::ffff:192.0.2.7"), "192.0.2.7", "[2001:db8::1]"),
            (Some("2001:db8::1"), "[2001:db8::1]:1", "[2001:db8::2]"),
            (Some("0.0.0.0"), "192.0.2.7", "example.com"),
            (Some("::"), "[2001:db8::1]", "192.0.2.7.example"),
        ] {
            assert!(answers_for(listening, own), "{listening:?} {own}");
            assert!(!answers_for(listening, foreign), "{listening:?} {foreign}");
        }
    }

    #[test]
    fn localhost_and_what_is_below_it_is_loopback_and_nothing_like_it() {
        for own in [
            "localhost",
            "LOCALHOST.",
            "a.localhost",
            "a.b.localhost:8000",
        ] {
            assert!(answers_for(None, own), "{own}");
        }
        for foreign in [
            "localhost.example",
            "alocalhost",
            "a-localhost",
            ".localhost",
            "localhost..",
            "local",
            "löcalhost",
            "127.1",
            "2130706433",
            "0x7f.0.0.1",
            "127.0.0.1.example",
        ] {
            assert!(!answers_for(None, foreign), "{foreign}");
        }
    }
}
