//! Reads the headers of a request.

use http::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName,
    HeaderValue,
};

use super::response::Rejection;
use crate::protocol::{
    Code, IDEMPOTENCY_KEY, IdempotencyKey, InvalidValue, MAX_LEN, RequestId, TENANT_ID, THREAD_ID,
    ThreadId, X_REQUEST_ID,
};

/// A header, and its name as people write it.
pub(crate) struct Field {
    name: HeaderName,
    label: &'static str,
}

impl Field {
    const fn new(name: HeaderName, label: &'static str) -> Self {
        Self { name, label }
    }
}

pub(crate) static TENANT: Field = Field::new(TENANT_ID, "Tenant-Id");
static THREAD: Field = Field::new(THREAD_ID, "Thread-Id");
static KEY: Field = Field::new(IDEMPOTENCY_KEY, "Idempotency-Key");
static CALL: Field = Field::new(X_REQUEST_ID, "X-Request-Id");
static CREDENTIAL: Field = Field::new(AUTHORIZATION, "Authorization");
static MEDIA_TYPE: Field = Field::new(CONTENT_TYPE, "Content-Type");
static LENGTH: Field = Field::new(CONTENT_LENGTH, "Content-Length");

/// The headers whose repetition could change the meaning of a request.
static SINGLE: [&Field; 7] = [
    &TENANT,
    &THREAD,
    &KEY,
    &CALL,
    &CREDENTIAL,
    &MEDIA_TYPE,
    &LENGTH,
];

/// Rejects repeated headers. Two servers that read such a request could each take a different
/// value.
pub(crate) fn reject_repeated(headers: &HeaderMap) -> Result<(), Rejection> {
    // Most requests repeat no header at all, which costs no search to see.
    if headers.len() == headers.keys_len() {
        return Ok(());
    }
    for field in SINGLE {
        if headers.get_all(&field.name).iter().nth(1).is_some() {
            let label = field.label;
            return Err(Rejection::invalid(format!(
                "the {label} header is repeated; allowed is one"
            )));
        }
    }
    Ok(())
}

pub(crate) fn missing(field: &Field) -> String {
    let label = field.label;
    format!("the {label} header is missing; allowed are 1 to {MAX_LEN} visible ASCII characters")
}

/// Reads an identifier, if the header is present.
pub(crate) fn identifier<T>(
    headers: &HeaderMap,
    field: &Field,
    parse: impl FnOnce(String) -> Result<T, InvalidValue>,
) -> Result<Option<T>, Rejection> {
    header(headers, field, |value| {
        // An invalid UTF-8 byte becomes a non-ASCII character, which the parser rejects.
        parse(String::from_utf8_lossy(value.as_bytes()).into_owned())
    })
}

fn header<T>(
    headers: &HeaderMap,
    field: &Field,
    parse: impl FnOnce(&HeaderValue) -> Result<T, InvalidValue>,
) -> Result<Option<T>, Rejection> {
    let Some(value) = headers.get(&field.name) else {
        return Ok(None);
    };
    parse(value)
        .map(Some)
        .map_err(|error| Rejection::invalid(format!("the {} header: {error}", field.label)))
}

pub(crate) fn thread_id(headers: &HeaderMap) -> Result<ThreadId, Rejection> {
    identifier(headers, &THREAD, ThreadId::new)?.ok_or_else(|| Rejection::invalid(missing(&THREAD)))
}

pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<IdempotencyKey, Rejection> {
    header(headers, &KEY, IdempotencyKey::from_header)?
        .ok_or_else(|| Rejection::invalid(missing(&KEY)))
}

pub(crate) fn call_id(headers: &HeaderMap) -> Result<Option<RequestId>, Rejection> {
    identifier(headers, &CALL, RequestId::new)
}

/// Returns the `X-Request-Id` to repeat in the response: the one received, if it is valid.
pub(crate) fn call_id_to_echo(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut values = headers.get_all(X_REQUEST_ID).iter();
    let value = values.next().filter(|_| values.next().is_none())?;
    let bytes = value.as_bytes();
    let valid = (1..=MAX_LEN).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic);
    valid.then(|| value.clone())
}

/// Rejects compressed bodies.
pub(crate) fn reject_encoded(headers: &HeaderMap) -> Result<(), Rejection> {
    for value in headers.get_all(CONTENT_ENCODING) {
        let identity = value.as_bytes().split(|byte| *byte == b',').all(|coding| {
            let coding = coding.trim_ascii();
            coding.is_empty() || coding.eq_ignore_ascii_case(b"identity")
        });
        if !identity {
            return Err(Rejection::new(
                Code::UnsupportedMediaType,
                "the body has a content coding; allowed is 'identity', or no Content-Encoding \
                 header",
            ));
        }
    }
    Ok(())
}

/// Rejects bodies that are not declared as JSON.
pub(crate) fn reject_other_than_json(headers: &HeaderMap) -> Result<(), Rejection> {
    let reason = match headers.get(CONTENT_TYPE) {
        Some(value) if is_json(value.as_bytes()) => return Ok(()),
        Some(_) => "the Content-Type is not JSON",
        None => "the body has no Content-Type",
    };
    Err(Rejection::new(
        Code::UnsupportedMediaType,
        format!("{reason}; allowed are 'application/json' and 'application/*+json'"),
    ))
}

/// Rejects bodies that are not declared as the form of a web page.
pub(crate) fn reject_other_than_form(headers: &HeaderMap) -> Result<(), Rejection> {
    let value = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let essence = value.unwrap_or_default().split(|byte| *byte == b';').next();
    let essence = essence.unwrap_or_default().trim_ascii();
    if essence.eq_ignore_ascii_case(b"application/x-www-form-urlencoded") {
        return Ok(());
    }
    Err(Rejection::new(
        Code::UnsupportedMediaType,
        "the body is not a form; allowed is 'application/x-www-form-urlencoded'",
    ))
}

fn is_json(media_type: &[u8]) -> bool {
    if media_type == b"application/json" {
        return true;
    }
    let essence = media_type.split(|byte| *byte == b';').next();
    let essence = essence.unwrap_or_default().trim_ascii();
    let Ok(essence) = std::str::from_utf8(essence) else {
        return false;
    };
    let essence = essence.to_ascii_lowercase();
    let Some(subtype) = essence.strip_prefix("application/") else {
        return false;
    };
    match subtype.strip_suffix("+json") {
        Some(name) => !name.is_empty() && name.bytes().all(is_token),
        None => subtype == "json",
    }
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_known_by_its_media_type() {
        for value in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/json ;x=\"a;b\"",
            "application/vnd.acme.v2+json",
        ] {
            assert!(is_json(value.as_bytes()), "{value}");
        }
        for value in [
            "",
            "json",
            "text/json",
            "text/plain",
            "application/jsonp",
            "application/+json",
            "application/a/b+json",
            "application/json, text/plain",
            "application/xml+json+x",
            "application/é+json",
        ] {
            assert!(!is_json(value.as_bytes()), "{value}");
        }
    }
}
