//! The parts of a URL that `Uri` does not check.

use std::net::Ipv6Addr;

/// Splits off the scheme, in lower case.
pub(crate) fn split_scheme<'a>(
    url: &'a str,
    allowed: &[&'static str],
) -> Option<(&'static str, &'a str)> {
    let (scheme, rest) = url.split_once("://")?;
    let mut allowed = allowed.iter();
    let scheme = allowed.find(|allowed| scheme.eq_ignore_ascii_case(allowed))?;
    Some((scheme, rest))
}

/// Checks a host and its port, because `Uri` accepts a port of any number and then uses another one.
pub(crate) fn check_host_and_port(authority: &str) -> Result<(), &'static str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest
            .split_once(']')
            .filter(|(address, _)| address.parse::<Ipv6Addr>().is_ok())
            .ok_or("has a malformed IPv6 address")?,
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    if host.is_empty() {
        return Err("has no host");
    }
    if !port.is_empty() && !port.strip_prefix(':').is_some_and(is_port) {
        return Err("has a port that is no number from 1 to 65535");
    }
    Ok(())
}

fn is_port(port: &str) -> bool {
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    is_number && port.parse::<u16>().is_ok_and(|port| port > 0)
}
