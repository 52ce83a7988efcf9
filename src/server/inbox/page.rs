//! Pages as responses.

use std::fmt::Display;
use std::sync::LazyLock;
use std::time::SystemTime;

use askama::Template;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderValue, StatusCode};
use sha2::{Digest, Sha256};

use super::text::{self, Html};
use super::viewer::Viewer;
use crate::protocol::{Closed, Decision, Escaped, Execution, Status, TenantId, hex};
use crate::server::http::{Rejection, Response, ResponseBody};

/// Nothing is loaded from elsewhere, no script or style stands in a page, and no other page frames
/// one.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; \
     form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
);

/// What is around each page.
pub(super) struct Frame {
    pub(super) viewer: Option<Who>,
    /// The tenant whose actions the page shows.
    pub(super) tenant: Option<Html>,
    /// Where changes are announced.
    pub(super) live: Option<String>,
    /// Changes when the page shows something else.
    pub(super) version: String,
}

pub(super) struct Who {
    pub(super) name: Html,
    pub(super) sees_all: bool,
    pub(super) has_session: bool,
}

impl Frame {
    /// The frame of a page for anyone.
    pub(super) fn bare() -> Self {
        Self {
            viewer: None,
            tenant: None,
            live: None,
            version: String::new(),
        }
    }

    /// The frame of a page that follows the actions of a tenant.
    pub(super) fn of(viewer: &Viewer, tenant: Option<&TenantId>) -> Self {
        let live = tenant.map_or_else(
            || "/live".to_owned(),
            |tenant| link("/live", &[("tenant", tenant.as_str())]),
        );
        Self {
            viewer: Some(Who {
                name: Html::line(viewer.actor.as_str()),
                sees_all: viewer.tenant.is_none(),
                has_session: viewer.has_session,
            }),
            tenant: tenant.map(|tenant| Html::line(tenant.as_str())),
            live: Some(live),
            ..Self::bare()
        }
    }

    /// Leaves the page as it is, whatever happens.
    pub(super) fn without_live(mut self) -> Self {
        self.live = None;
        self
    }

    /// Sets what the page shows, as far as it can change.
    pub(super) fn with_version(mut self, shown: impl Display) -> Self {
        let digest: [u8; 32] = Sha256::digest(shown.to_string().as_bytes()).into();
        self.version = hex(&digest)[..16].to_owned();
        self
    }

    pub(super) fn style(&self) -> String {
        STYLE.url()
    }

    pub(super) fn script(&self) -> String {
        SCRIPT.url()
    }
}

/// A file that pages refer to.
pub(super) struct Asset {
    path: &'static str,
    media_type: HeaderValue,
    content: &'static str,
    digest: LazyLock<String>,
}

macro_rules! asset {
    ($path:literal, $media_type:literal, $file:literal) => {
        Asset {
            path: $path,
            media_type: HeaderValue::from_static($media_type),
            content: include_str!($file),
            digest: LazyLock::new(|| digest(include_str!($file))),
        }
    };
}

pub(super) static STYLE: Asset = asset!("/style.css", "text/css; charset=utf-8", "style.css");
pub(super) static SCRIPT: Asset = asset!("/inbox.js", "text/javascript; charset=utf-8", "inbox.js");

fn digest(content: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(content.as_bytes()).into();
    hex(&digest)[..16].to_owned()
}

impl Asset {
    /// Each version has a URL of its own, so browsers may keep it for good.
    fn url(&self) -> String {
        format!("{}?{}", self.path, *self.digest)
    }

    pub(super) fn response(&self) -> Response {
        let mut response = Response::new(ResponseBody::whole(self.content));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, self.media_type.clone());
        headers.insert(
            CACHE_CONTROL,
            HeaderValue::from_static("public, max-age=31536000, immutable"),
        );
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response
    }
}

/// Returns a page.
pub(super) fn page(status: StatusCode, template: &impl Template) -> Response {
    let Ok(html) = template.render() else {
        // No template fails, and a buffer that does not grow ends the process.
        return Rejection::unavailable("the page cannot be shown").into_response();
    };
    html_response(status, html)
}

pub(super) fn html_response(status: StatusCode, html: String) -> Response {
    let mut response = Response::new(ResponseBody::whole(html));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/html; charset=utf-8"),
    );
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_SECURITY_POLICY, POLICY);
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// 303. The next page is a `GET`, so that reloading it sends nothing again.
pub(super) fn see_other(location: &str) -> Response {
    let mut response = html_response(StatusCode::SEE_OTHER, String::new());
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

#[derive(Template)]
#[template(path = "error.html", config = "src/server/inbox/askama.toml")]
struct ErrorPage {
    frame: Frame,
    title: String,
    detail: String,
}

/// Shows a rejection.
pub(in crate::server) fn rejected(rejection: Rejection) -> Response {
    let (title, detail) = rejection.words();
    let template = ErrorPage {
        frame: Frame::bare(),
        title: title.to_owned(),
        detail: detail.to_owned(),
    };
    let mut shown = page(rejection.status(), &template);
    // Such as when to try again, and which methods are allowed.
    let response = rejection.into_response();
    for (name, value) in response.headers() {
        if !shown.headers().contains_key(name) {
            shown.headers_mut().insert(name, value.clone());
        }
    }
    shown
}

/// A path with a query.
pub(super) fn link(path: &str, query: &[(&str, &str)]) -> String {
    let mut written = form_urlencoded::Serializer::new(String::new());
    for (name, value) in query {
        if !value.is_empty() {
            written.append_pair(name, value);
        }
    }
    match written.finish() {
        query if query.is_empty() => path.to_owned(),
        query => format!("{path}?{query}"),
    }
}

/// A time, exact and in words.
#[derive(Debug, Clone)]
pub(super) struct When {
    pub(super) exact: String,
    pub(super) text: String,
}

impl When {
    pub(super) fn past(at: SystemTime) -> Self {
        Self {
            exact: exact(at),
            text: text::age(at, SystemTime::now()),
        }
    }

    pub(super) fn future(at: SystemTime) -> Self {
        Self {
            exact: exact(at),
            text: text::until(at, SystemTime::now()),
        }
    }
}

fn exact(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at).map_or_else(
        |_| "-".to_owned(),
        |at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    )
}

/// Where an action stands, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) label: &'static str,
    /// `care` stands out: somebody has to do something, or nobody knows what was done.
    pub(super) class: &'static str,
}

impl Standing {
    pub(super) fn of(action: &crate::protocol::Action) -> Self {
        let (label, class) = match (
            action.status,
            action.closed,
            action.decision,
            action.execution,
        ) {
            (Status::Pending, ..) => ("Waiting", "waiting"),
            (_, Some(Closed::Expired), ..) => ("Expired", "closed"),
            (_, Some(Closed::Cancelled), ..) => ("Cancelled", "closed"),
            (_, Some(_), ..) => ("Closed", "closed"),
            (.., Some(Execution::Unknown)) => ("Outcome unknown", "care"),
            (.., Some(Execution::Failed)) => ("Failed", "bad"),
            (.., Some(Execution::Claimed)) => ("Running", "running"),
            (.., Some(Execution::Completed)) => ("Done", "good"),
            (_, None, Some(Decision::Reject), _) => ("Rejected", "closed"),
            (_, None, Some(Decision::Approve), None) => ("Approved, not picked up", "care"),
            _ => ("On record", "closed"),
        };
        Self { label, class }
    }
}

/// What an action is called: its title, or else its key.
pub(super) fn name(action: &crate::protocol::Action) -> &str {
    let key = action.idempotency_key.as_ref().map(|key| key.as_str());
    let title = action
        .title
        .as_deref()
        .filter(|title| !title.trim().is_empty());
    title.or(key).unwrap_or("An action")
}

/// A text for the title of a page, which takes no markup.
pub(super) fn plain(text: &str) -> String {
    Escaped::line(text).to_string()
}
