//! Checks of a request's head that HTTP requires and hyper leaves to the server.

use http::header::{HOST, TRANSFER_ENCODING};
use http::{HeaderMap, StatusCode, Version, request::Parts};

use super::response::Rejection;

/// The largest head of a request, in bytes.
pub(crate) const MAX_BYTES: usize = 32 * 1024;

/// Rejects a head that is malformed, too large, or declares an unknown transfer coding.
pub(crate) fn check(parts: &Parts) -> Result<(), Rejection> {
    size(parts)?;
    host(parts.version, &parts.headers)?;
    transfer_coding(&parts.headers)
}

fn size(parts: &Parts) -> Result<(), Rejection> {
    // Each field also has a colon, a space and a line ending, or their equivalent in HTTP/2.
    let fields = parts.headers.iter();
    let fields = fields.map(|(name, value)| name.as_str().len() + value.len() + 4);
    let target = parts.uri.path_and_query().map_or("", |it| it.as_str());
    if target.len() + fields.sum::<usize>() <= MAX_BYTES {
        return Ok(());
    }
    Err(Rejection::invalid(format!(
        "the target and the headers have too many bytes; allowed are {MAX_BYTES}"
    ))
    .with_status(
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        "The headers are too large",
    ))
}

/// RFC 9112, section 3.2: an HTTP/1.1 request has exactly one `Host`, and its value is a host.
fn host(version: Version, headers: &HeaderMap) -> Result<(), Rejection> {
    let mut values = headers.get_all(HOST).iter();
    let Some(value) = values.next() else {
        return match version {
            Version::HTTP_11 => Err(Rejection::invalid(
                "the Host header is missing; allowed is one",
            )),
            _ => Ok(()),
        };
    };
    if values.next().is_some() {
        return Err(Rejection::invalid(
            "the Host header is repeated; allowed is one",
        ));
    }
    if is_host(value.as_bytes()) {
        return Ok(());
    }
    Err(Rejection::invalid(
        "the Host header is no host; allowed is a name or an address, with or without a port",
    ))
}

/// Returns whether this is a name or an IP address, with or without a port (RFC 3986, section
/// 3.2.2). An IPv6 address is in brackets. A comma is not allowed in a name: it would separate two
/// hosts.
fn is_host(value: &[u8]) -> bool {
    let (host, port) = match value.iter().rposition(|byte| *byte == b']') {
        Some(end) => value.split_at(end + 1),
        None => value.split_at(
            value
                .iter()
                .position(|byte| *byte == b':')
                .unwrap_or(value.len()),
        ),
    };
    let is_address = |byte: &u8| byte.is_ascii_hexdigit() || b":.".contains(byte);
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=".contains(byte);
    let is_host = match host.strip_prefix(b"[") {
        Some(rest) => rest
            .strip_suffix(b"]")
            .is_some_and(|address| !address.is_empty() && address.iter().all(is_address)),
        None => !host.is_empty() && host.iter().all(is_name),
    };
    let is_port = match port.split_first() {
        Some((colon, digits)) => *colon == b':' && digits.iter().all(u8::is_ascii_digit),
        None => true,
    };
    is_host && is_port
}

/// RFC 9112, section 6.1. hyper checks that the last coding is `chunked`, and then decodes as if it
/// were the only one.
fn transfer_coding(headers: &HeaderMap) -> Result<(), Rejection> {
    let mut chunked = 0;
    for value in headers.get_all(TRANSFER_ENCODING) {
        for coding in value.as_bytes().split(|byte| *byte == b',') {
            let coding = coding.trim_ascii();
            if coding.eq_ignore_ascii_case(b"chunked") {
                chunked += 1;
            } else if !coding.is_empty() {
                return Err(Rejection::invalid(
                    "the body has a transfer coding that is not known here; allowed is 'chunked'",
                )
                .with_status(
                    StatusCode::NOT_IMPLEMENTED,
                    "The transfer coding is not known",
                ));
            }
        }
    }
    if chunked > 1 {
        return Err(Rejection::invalid(
            "the transfer coding 'chunked' is repeated; allowed is one",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_with_or_without_a_port() {
        for good in [
            "h",
            "a.example:80",
            "127.0.0.1",
            "[::1]",
            "[::1]:8000",
            "h:",
        ] {
            assert!(is_host(good.as_bytes()), "{good}");
        }
        for bad in [
            "", ":80", "a b", "u@h", "h/x", "h,g", "h:x", "h:1:2", "::1", "[::1",
        ] {
            assert!(!is_host(bad.as_bytes()), "{bad}");
        }
    }
}
