//! The URLs in the settings. Each part is checked separately, because `Uri` accepts a port of any
//! number and then uses another one.

use http::Uri;

use super::Error;
use crate::protocol::{Prefix, check_host_and_port, split_scheme};

/// Parses the URL of a server.
pub(super) fn parse_base(url: &str) -> Result<Uri, Error> {
    const ALLOWED: &str =
        "allowed is http:// or https:// with a host, and if need be a port and a path";
    // A URL may contain a password, so the message repeats neither a part of it nor the parser's
    // words.
    let wrong = |fault: &str| Error::config(format!("the base URL {fault}; {ALLOWED}"));
    let (scheme, rest) = split_scheme(url, &["http", "https"])
        .ok_or_else(|| wrong("has no scheme http or https"))?;
    if rest.contains(['?', '#']) {
        return Err(wrong("has a query or a fragment"));
    }
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if authority.contains('@') {
        return Err(wrong("has a user or a password"));
    }
    check_host_and_port(authority).map_err(wrong)?;
    // The rule for prefixes applies, because this path stands before one.
    if path.ends_with("//") || Prefix::new(path).is_err() {
        return Err(wrong(
            "has a path with an escape, a character that is none of a URL, or a segment that is empty, '.' or '..'",
        ));
    }
    // The scheme in lower case, because it is compared later.
    format!("{scheme}://{rest}")
        .parse()
        .map_err(|_| wrong("is malformed"))
}

/// Checks the URL of a proxy.
pub(super) fn check_proxy(url: &str) -> Result<(), &'static str> {
    let (_, rest) = split_scheme(url, &["http"]).ok_or("has another scheme than http")?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#']) {
        return Err("has a path, a query or a fragment");
    }
    match authority.split_once('@') {
        // In a user or a password it is written as %40.
        Some((_, host)) if host.contains('@') => Err("has more than one '@'"),
        Some((_, host)) => check_host_and_port(host),
        None => check_host_and_port(authority),
    }
}

/// Checks the host and port of a proxy whose URL was parsed elsewhere.
pub(super) fn check_proxy_host(uri: &Uri) -> Result<(), &'static str> {
    if uri.scheme_str() != Some("http") {
        return Err("has another scheme than http");
    }
    check_host_and_port(uri.authority().map_or("", |authority| authority.as_str()))
}

/// Returns a base URL if it may be logged: not if it could contain a password or a token.
pub(super) fn shown(url: &str) -> &str {
    if parse_base(url).is_ok() {
        url
    } else {
        "(malformed)"
    }
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn only_a_base_url_without_a_secret_is_shown() {
        assert_eq!(shown("http://host:1/path"), "http://host:1/path");
        for url in ["http://user:secret@host", "http://host?secret", "secret"] {
            assert_eq!(shown(url), "(malformed)");
        }
    }
}
