//! The description as a page. It has no script and refers to no file.

use std::sync::LazyLock;

use askama::Template;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{
    CONTENT_SECURITY_POLICY, HeaderMap, HeaderValue, REFERRER_POLICY, X_FRAME_OPTIONS,
};
use sha2::{Digest, Sha256};

use super::document::{description, is_required, problems};
use super::endpoints::{ENDPOINTS, Endpoint};

const STYLE: &str = concat!(
    include_str!("../../inbox/style.css"),
    include_str!("docs.css")
);

/// The one style that stands in the page is allowed by its digest.
static POLICY: LazyLock<Option<HeaderValue>> = LazyLock::new(|| {
    let digest = STANDARD.encode(Sha256::digest(STYLE.as_bytes()));
    HeaderValue::try_from(format!(
        "default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    ))
    .ok()
});

#[derive(Template)]
#[template(path = "docs.html", config = "src/server/ops/openapi/askama.toml")]
struct Docs {
    has_keys: bool,
    endpoints: Vec<Entry>,
}

impl Docs {
    fn style(&self) -> &'static str {
        STYLE
    }
}

struct Entry {
    id: &'static str,
    method: &'static str,
    path: String,
    summary: &'static str,
    text: String,
    parameters: Vec<Row>,
    body: Option<(&'static str, bool)>,
    answers: Vec<Answer>,
}

struct Row {
    name: &'static str,
    place: &'static str,
    is_required: bool,
    text: String,
}

struct Answer {
    status: u16,
    text: String,
}

impl Entry {
    fn of(endpoint: &Endpoint, prefix: &str, has_keys: bool) -> Self {
        let before = if endpoint.is_under_prefix { prefix } else { "" };
        let parameters = endpoint.parameters.iter().map(|parameter| Row {
            name: parameter.name(),
            place: parameter.place(),
            is_required: is_required(*parameter, endpoint, has_keys),
            text: plain(&parameter.text(has_keys)),
        });
        let successes = endpoint.successes.iter().map(|success| Answer {
            status: success.status,
            text: format!(
                "{} {}: {}",
                plain(success.text),
                success.media_type,
                success.schema
            ),
        });
        let problems = problems(endpoint).into_iter().map(|(status, codes)| {
            let codes: Vec<_> = codes.iter().map(|code| code.as_str()).collect();
            Answer {
                status: status.as_u16(),
                text: codes.join(", "),
            }
        });
        Self {
            id: endpoint.id,
            method: endpoint.method,
            path: format!("{before}{}", endpoint.path),
            summary: endpoint.summary,
            text: plain(&description(endpoint, has_keys)),
            parameters: parameters.collect(),
            body: endpoint.body,
            answers: successes.chain(problems).collect(),
        }
    }
}

/// The text without its marks of code.
fn plain(text: &str) -> String {
    text.replace('`', "")
}

pub(super) fn html(prefix: &str, has_keys: bool) -> String {
    let endpoints = ENDPOINTS.iter();
    let page = Docs {
        has_keys,
        endpoints: endpoints
            .map(|endpoint| Entry::of(endpoint, prefix, has_keys))
            .collect(),
    };
    // No template fails, and a buffer that does not grow ends the process.
    page.render().unwrap_or_default()
}

/// Adds the headers that keep the page to itself.
pub(super) fn protect(headers: &mut HeaderMap) {
    if let Some(policy) = &*POLICY {
        headers.insert(CONTENT_SECURITY_POLICY, policy.clone());
    }
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("same-origin"));
}
