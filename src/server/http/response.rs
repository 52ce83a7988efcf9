//! Responses: an action, or a problem that says why there is none.

use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::Stream;
use http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderValue, StatusCode};
use http_body::{Body, Frame, SizeHint};
use serde::Serialize;

use super::rate::Rate;
use super::room::{FREE, Holder, Room};
use crate::protocol::{Action, Code, Problem};

/// The body of a response: a JSON text that is complete from the start, or a stream of events.
pub struct ResponseBody(Content);

enum Content {
    Whole(Bytes),
    Streamed(Pin<Box<dyn Stream<Item = Bytes> + Send>>),
}

impl ResponseBody {
    pub(crate) fn whole(bytes: impl Into<Bytes>) -> Self {
        Self(Content::Whole(bytes.into()))
    }

    pub(crate) fn streamed(stream: impl Stream<Item = Bytes> + Send + 'static) -> Self {
        Self(Content::Streamed(Box::pin(stream)))
    }
}

impl Default for ResponseBody {
    fn default() -> Self {
        Self::whole(Bytes::new())
    }
}

impl fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").finish_non_exhaustive()
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.0 {
            Content::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Content::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Content::Streamed(stream) => stream
                .as_mut()
                .poll_next(cx)
                .map(|next| next.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(&self.0, Content::Whole(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Content::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Streamed(_) => SizeHint::default(),
        }
    }
}

pub(crate) type Response = http::Response<ResponseBody>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// The problem of a request that is not successful. It is boxed because it is the rare case.
#[derive(Debug)]
pub(crate) struct Rejection(Box<RejectionParts>);

#[derive(Debug)]
struct RejectionParts {
    status: StatusCode,
    problem: Problem,
    allow: Option<&'static str>,
    /// When to send the request again, in seconds. Where it is `None`, a status that invites a
    /// retry says one second.
    retry_after: Option<u64>,
    location: Option<HeaderValue>,
}

impl Rejection {
    pub(crate) fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        let (status, title) = match code {
            Code::Duplicate => (StatusCode::CONFLICT, "This decision is on record already"),
            Code::DecisionConflict => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "The opposite decision is on record",
            ),
            Code::PayloadMismatch => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "The key is on record with another payload",
            ),
            Code::ActionClosed => (StatusCode::UNPROCESSABLE_ENTITY, "The action is closed"),
            Code::NotApproved => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "The action is not approved",
            ),
            Code::AlreadyClaimed => (StatusCode::CONFLICT, "The approval is spent"),
            Code::ClaimLost => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "The token is not that of a live claim",
            ),
            Code::SelfApproval => (
                StatusCode::FORBIDDEN,
                "Who submitted the action may not decide on it",
            ),
            Code::EditNotAllowed => (
                StatusCode::FORBIDDEN,
                "The payload of this action may not be edited",
            ),
            Code::InvalidRequest => (StatusCode::BAD_REQUEST, "The request is malformed"),
            Code::Unauthorized => (StatusCode::UNAUTHORIZED, "The credential is not accepted"),
            Code::Forbidden => (StatusCode::FORBIDDEN, "This is not allowed"),
            Code::NotFound => (StatusCode::NOT_FOUND, "There is nothing here"),
            Code::MethodNotAllowed => (
                StatusCode::METHOD_NOT_ALLOWED,
                "The path does not take this method",
            ),
            Code::RequestTimeout => (
                StatusCode::REQUEST_TIMEOUT,
                "The request did not arrive in time",
            ),
            Code::PayloadTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "The body is too large"),
            Code::UnsupportedMediaType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "The body is not declared as JSON",
            ),
            Code::MisdirectedRequest => (
                StatusCode::MISDIRECTED_REQUEST,
                "The request is for another host",
            ),
            Code::QuotaExceeded => (StatusCode::TOO_MANY_REQUESTS, "The quota is spent"),
            Code::Unavailable | Code::Unknown => (
                StatusCode::SERVICE_UNAVAILABLE,
                "The server cannot answer now",
            ),
        };
        Self(Box::new(RejectionParts {
            status,
            problem: Problem::new(code, status.as_u16(), title, detail),
            allow: None,
            retry_after: None,
            location: None,
        }))
    }

    /// 400.
    pub(crate) fn invalid(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::InvalidRequest, detail)
    }

    /// 404.
    pub(crate) fn not_found(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::NotFound, detail)
    }

    /// 503. The client is to send the request again with the same key.
    pub(crate) fn unavailable(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Unavailable, detail)
    }

    /// 429, with the time after which the next request is allowed.
    pub(crate) fn too_often(whose: &'static str, rate: Rate, wait: Duration) -> Self {
        let mut rejection = Self::new(
            Code::QuotaExceeded,
            format!("allowed are {rate} requests of {whose}"),
        );
        // Rounded up, as a client that comes too early is refused again.
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        rejection.0.retry_after = Some(seconds.max(1));
        rejection
    }

    /// 405, with the methods that the path allows.
    pub(crate) fn method(allow: &'static str) -> Self {
        let mut rejection = Self::new(
            Code::MethodNotAllowed,
            format!("allowed methods are: {allow}"),
        );
        rejection.0.allow = Some(allow);
        rejection
    }

    /// Sets a more specific status, where the code covers several.
    pub(crate) fn with_status(mut self, status: StatusCode, title: &'static str) -> Self {
        self.0.status = status;
        self.0.problem.status = status.as_u16();
        self.0.problem.title = title.into();
        self
    }

    /// Adds the action on record, and the path of its status.
    pub(crate) fn with_action(mut self, action: Action, location: Option<HeaderValue>) -> Self {
        self.0.problem = self.0.problem.with_action(action);
        self.0.location = location;
        self
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.0.status
    }

    /// The title and the detail, for people.
    pub(crate) fn words(&self) -> (&str, &str) {
        (&self.0.problem.title, &self.0.problem.detail)
    }

    pub(crate) fn into_response(self) -> Response {
        let RejectionParts {
            status,
            problem,
            allow,
            retry_after,
            location,
        } = *self.0;
        let mut response = serialized(status, PROBLEM_JSON, &problem);
        let headers = response.headers_mut();
        // A plain 409 is a confirmation. With `Retry-After` it would mean "in flight", so only
        // responses that invite a retry have that header.
        if matches!(
            status,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS
        ) {
            headers.insert(RETRY_AFTER, retry_after.unwrap_or(1).into());
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(allow) = allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if let Some(location) = location {
            headers.insert(LOCATION, location);
        }
        response
    }
}

/// Returns a JSON response.
pub(crate) fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    serialized(status, JSON, value)
}

/// Returns a response with a text.
pub(crate) fn text(media_type: &'static str, text: String) -> Response {
    whole(StatusCode::OK, HeaderValue::from_static(media_type), text)
}

fn serialized<T: Serialize>(status: StatusCode, media_type: HeaderValue, value: &T) -> Response {
    let Ok(text) = serde_json::to_vec(value) else {
        // This happens only if RFC 3339 cannot express a time. The state of the record is then
        // unknown.
        return Rejection::unavailable("the record cannot be shown").into_response();
    };
    whole(status, media_type, text)
}

fn whole(status: StatusCode, media_type: HeaderValue, text: impl Into<Bytes>) -> Response {
    let mut response = Response::new(ResponseBody::whole(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, media_type);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Holds the body in the room for answers until it is sent. If there is no room, the response is
/// 503.
pub(crate) fn within(room: &Room, holder: Holder, mut response: Response) -> Response {
    // A text that is there for all, such as a style sheet, takes no memory for one of them.
    if let Content::Whole(body) = &mut response.body_mut().0
        && body.len() > FREE
        && body.is_unique()
    {
        // Nothing else refers to the text, so this copies nothing.
        match room.hold(holder, std::mem::take(body).into()) {
            Some(held) => *body = held,
            None => {
                return Rejection::unavailable(
                    "too many large answers are on their way; send the request again",
                )
                .into_response();
            }
        }
    }
    response
}

/// Removes the body, as the response to a `HEAD` has none, and keeps its length.
pub(crate) fn without_body(response: &mut Response) {
    if let Content::Whole(bytes) = std::mem::take(response.body_mut()).0 {
        let len = bytes.len();
        response.headers_mut().insert(CONTENT_LENGTH, len.into());
    }
}

/// Closes the connection after this response.
pub(crate) fn close_after(response: &mut Response) {
    response
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
}
