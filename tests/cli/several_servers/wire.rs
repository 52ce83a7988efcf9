//! What is asked and told, in the terms of HTTP.

use reqwest::Method;
use serde_json::{Value, json};

use super::history::Asked;
use super::load::{SECOND, Subject};
use crate::support::reference::{Request, Token};

/// An attempt in the terms of HTTP.
pub struct Wire {
    pub method: Method,
    pub path: String,
    pub is_keyed: bool,
    pub call: Option<usize>,
    pub body: Option<Value>,
}

/// The `X-Request-Id` of a call.
pub fn name_of(call: usize) -> String {
    format!("call-{call}")
}

/// How it is asked.
pub fn wire(subject: &Subject, asked: &Asked) -> Wire {
    let id = || subject.id.get().unwrap();
    let of_id = |verb: &str, call: Option<usize>, body: Value| Wire {
        method: Method::POST,
        path: format!("actions/{}/{verb}", id()),
        is_keyed: false,
        call,
        body: Some(body),
    };
    let keyed = |path: &str, call: Option<usize>, body: Value| Wire {
        method: Method::POST,
        path: path.to_owned(),
        is_keyed: true,
        call,
        body: Some(body),
    };
    let read = |path: String| Wire {
        method: Method::GET,
        path,
        is_keyed: false,
        call: None,
        body: None,
    };
    let payload = |version: Option<usize>| version.map_or(json!({}), |it| subject.payload(it));
    let with_digest = |version: Option<usize>| match version {
        Some(version) => json!({ "digest": subject.digest(version).to_string() }),
        None => json!({}),
    };
    let token = |token: Token| match token {
        Token::Fence(fence) => subject.token(fence),
        Token::Unknown => unreachable!("nobody asks with that"),
    };
    let request = match asked {
        Asked::Status => return read(format!("status/{}", id())),
        Asked::History => return read(format!("actions/{}", id())),
        Asked::Request(request) => request,
    };
    match request {
        Request::Submit {
            call,
            payload: version,
            expires,
            ..
        } => {
            let mut body = payload(*version);
            if let Some(expires) = expires {
                let expires = jiff::Timestamp::from_microsecond(*expires).unwrap();
                body["aegis"] = json!({ "expires_at": expires.to_string() });
            }
            keyed("actions", *call, body)
        }
        Request::Decide {
            decision,
            call,
            payload: version,
            ..
        } => keyed(decision.as_str(), *call, payload(*version)),
        Request::DecideById {
            decision,
            call,
            digest,
            ..
        } => of_id(decision.as_str(), *call, with_digest(*digest)),
        Request::Cancel { call, .. } => of_id("cancel", *call, json!({})),
        Request::Acquire {
            digest,
            lease,
            call,
            ..
        } => {
            let mut body = with_digest(*digest);
            body["lease"] = (lease / SECOND).into();
            of_id("claim", *call, body)
        }
        Request::Renew {
            token: held, lease, ..
        } => {
            let body = json!({ "token": token(*held), "lease": lease / SECOND });
            of_id("renew", None, body)
        }
        Request::Finish {
            token: held,
            report,
            call,
            ..
        } => {
            let verb = if report.is_ok() { "complete" } else { "fail" };
            of_id(verb, *call, json!({ "token": token(*held) }))
        }
    }
}

/// The model's word for an answer. `None` if the protocol has no such answer.
pub fn word(asked: &Asked, status: u16, is_replayed: bool, body: &Value) -> Option<&'static str> {
    let code = body["code"].as_str().unwrap_or_default();
    let Asked::Request(request) = asked else {
        return matches!(status, 200 | 404).then_some("shown");
    };
    let recorded = if is_replayed { "replayed" } else { "recorded" };
    Some(match (request, status, code) {
        (Request::Submit { .. }, 201, _) => "recorded",
        (Request::Submit { .. }, 200, _) => "existing",
        (Request::Decide { .. } | Request::DecideById { .. }, 202, _) => recorded,
        (Request::Decide { .. } | Request::DecideById { .. }, 409, "duplicate") => "duplicate",
        (Request::Decide { .. } | Request::DecideById { .. }, 422, "decision-conflict") => {
            "conflict"
        }
        (Request::Decide { .. } | Request::DecideById { .. }, 422, "action-closed") => "closed",
        (Request::Cancel { .. }, 202, _) => recorded,
        (Request::Cancel { .. }, 409, "duplicate") => "duplicate",
        (Request::Cancel { .. }, 422, "action-closed") => "decided",
        (Request::Acquire { .. }, 200, _) if is_replayed => "replayed",
        (Request::Acquire { .. }, 200, _) => "claimed",
        (Request::Acquire { .. }, 409, "already-claimed") => "already claimed",
        (Request::Acquire { .. }, 422, "not-approved") => "not approved",
        (Request::Renew { .. }, 200, _) => "extended",
        (Request::Finish { .. }, 200, _) => recorded,
        (
            Request::Acquire { .. } | Request::Renew { .. } | Request::Finish { .. },
            422,
            "claim-lost",
        ) => "lost",
        (_, 422, "payload-mismatch") => "payload mismatch",
        _ => return None,
    })
}
