//! Reads a server's answer. The status alone is not trusted where the body says more.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, Response, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::read::{AnswerBody, BrokenOff};
use super::receipt::LazyAction;
use super::{Error, Outcome, Receipt};
use crate::layer::{Attempts, Confirmation, Delivery, NotRetried, ResponseHead, RetryError};
use crate::protocol::{
    Action, BoxError, Code, Decision, IdempotencyKey, Problem, RequestId, Status, TenantId,
    ThreadId,
};

/// An answer with its body, as far as it could be read.
pub(super) struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    attempts: u32,
    is_duplicate: bool,
    body: Result<Bytes, BoxError>,
    pub(super) told: Told,
}

/// What is told of a call besides its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    /// What is known of the delivery of the attempts before the one that was answered.
    pub(super) earlier: Delivery,
    pub(super) retry_after: Option<Duration>,
    pub(super) not_retried: Option<NotRetried>,
}

impl Answer {
    /// Takes the end of a call for an answer where there was one, if only its head.
    pub(super) fn of(result: Result<Response<AnswerBody>, RetryError>) -> Result<Self, Error> {
        let error = match result {
            Ok(response) => return Ok(Self::read(response)),
            Err(error) => error,
        };
        let broken = error
            .source()
            .and_then(|source| source.downcast_ref::<BrokenOff>());
        match broken {
            None => Err(Error::failed(error)),
            Some(broken) => Ok(Self {
                status: broken.status,
                headers: broken.headers.clone(),
                attempts: error.attempts(),
                is_duplicate: broken.status == StatusCode::CONFLICT,
                body: Err(broken.cause.to_string().into()),
                told: Told {
                    // Each attempt before it may have been acted upon.
                    earlier: match error.attempts() {
                        0 | 1 => Delivery::NeverSent,
                        _ => Delivery::Unknown,
                    },
                    retry_after: None,
                    not_retried: error.not_retried(),
                },
            }),
        }
    }

    fn read(response: Response<AnswerBody>) -> Self {
        let attempts = Attempts::of(&response);
        // A layer of the caller's may have turned the 409 into a success already; it left the mark.
        let is_duplicate = Confirmation::of(&response) == Some(Confirmation::Duplicate)
            && !response.headers().contains_key(RETRY_AFTER);
        let told = Told {
            earlier: Attempts::earlier(&response),
            retry_after: ResponseHead::of(&response).retry_after(),
            not_retried: NotRetried::of(&response),
        };
        let (head, body) = response.into_parts();
        Self {
            told,
            status: head.status,
            headers: head.headers,
            attempts,
            is_duplicate,
            body: body
                .into_inner()
                .ok_or_else(|| "the body is too long or came too late".into()),
        }
    }
}

/// What a decision's answer has to agree with.
pub(super) struct Expected {
    /// The tenant that was sent; `None` where the API key names it.
    pub(super) tenant: Option<TenantId>,
    pub(super) thread: ThreadId,
    pub(super) key: IdempotencyKey,
    pub(super) decision: Decision,
}

impl Expected {
    /// Compares an identity as far as it is told.
    fn is_named(&self, tenant: Option<&str>, thread: Option<&str>, key: Option<&str>) -> bool {
        let agree = |told: Option<&str>, sent: &str| told.is_none_or(|told| told == sent);
        self.tenant
            .as_ref()
            .is_none_or(|sent| agree(tenant, sent.as_str()))
            && agree(thread, self.thread.as_str())
            && agree(key, self.key.as_str())
    }
}

/// The members of an answer that a conclusion rests on, of a problem as well as of an action.
///
/// They are kept as raw values, so that a word, a time or a type that is new to this version fails none of the others. A
/// member that occurs twice does fail the whole: readers would disagree on which one holds.
#[derive(Default, Deserialize)]
struct View<'a> {
    #[serde(borrow, default)]
    request_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tenant_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    thread_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    idempotency_key: Option<&'a RawValue>,
    #[serde(borrow, default)]
    status: Option<&'a RawValue>,
    #[serde(borrow, default)]
    decision: Option<&'a RawValue>,
    #[serde(borrow, default)]
    code: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow, default)]
    action: Option<&'a RawValue>,
}

impl<'a> View<'a> {
    /// Reads a JSON object; an empty body is an object without members.
    fn of(body: &'a [u8]) -> Option<Self> {
        let body = body.trim_ascii();
        if body.is_empty() {
            return Some(Self::default());
        }
        // Without this, serde would take an array for the members in their order.
        if !body.starts_with(b"{") {
            return None;
        }
        serde_json::from_slice(body).ok()
    }

    /// The nested action, if it is an object.
    fn nested(&self) -> Option<Self> {
        Self::of(self.action?.get().as_bytes())
    }

    /// The code, by its own member or by the problem's type.
    fn code(&self) -> Option<Cow<'a, str>> {
        if let Some(code) = self.code {
            return Some(text(code));
        }
        match text(self.kind?) {
            Cow::Borrowed(kind) => kind.strip_prefix(URN).map(Cow::Borrowed),
            Cow::Owned(kind) => kind.strip_prefix(URN).map(|code| Cow::Owned(code.into())),
        }
    }

    fn decision(&self) -> Option<Cow<'a, str>> {
        self.decision.map(text)
    }

    /// What can be kept of an action that cannot be parsed as a whole.
    fn salvaged(&self) -> Option<Action> {
        let id = RequestId::new(text(self.request_id?)).ok()?;
        let status = serde_json::from_str(self.status?.get()).ok()?;
        let mut action = Action::new(id, status);
        action.decision = self.decision().and_then(|decision| decision.parse().ok());
        Some(action)
    }
}

const URN: &str = "urn:aegis:problem:";

/// A string's text. Any other value gives its JSON text, which agrees with no word of the protocol.
fn text(raw: &RawValue) -> Cow<'_, str> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

    serde_json::from_str::<Text<'_>>(raw.get()).map_or(Cow::Borrowed(raw.get()), |Text(text)| text)
}

/// Parses the action as a whole, or else keeps what there is of it.
pub(super) fn action_in(json: &[u8]) -> Option<Action> {
    serde_json::from_slice(json)
        .ok()
        .or_else(|| View::of(json)?.salvaged())
}

/// Parses a problem, with as much of its action as can be kept.
fn problem_in(body: &[u8], status: StatusCode) -> Option<Problem> {
    let view = View::of(body)?;
    let code = view
        .code()
        .and_then(|code| serde_json::to_string(&code).ok())
        .and_then(|code| serde_json::from_str::<Code>(&code).ok());
    if let Ok(mut problem) = serde_json::from_slice::<Problem>(body) {
        problem.code = code.unwrap_or(problem.code);
        return Some(problem);
    }
    let mut problem = Problem::new(code?, status.as_u16(), "", "");
    problem.action = view
        .action
        .and_then(|action| action_in(action.get().as_bytes()))
        .map(Box::new);
    Some(problem)
}

/// Says what keeps a body from being read as JSON: a coding that was not asked for, or another media type.
fn foreign(headers: &HeaderMap) -> Option<&'static str> {
    let is_coded = headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"));
    if is_coded {
        return Some("it has a content coding that was not asked for");
    }
    let is_json = headers.get_all(CONTENT_TYPE).iter().all(|value| {
        let essence = value.as_bytes().split(|byte| *byte == b';').next();
        let essence = essence.unwrap_or_default().trim_ascii();
        essence.eq_ignore_ascii_case(b"application/json")
            || essence.to_ascii_lowercase().ends_with(b"+json")
    });
    (!is_json).then_some("it is not JSON")
}

/// Turns the answer to a decision into a receipt or an error. Returns with the receipt whether the server told which decision
/// is on record.
pub(super) fn receipt(
    answer: Answer,
    expected: &Expected,
    call_id: RequestId,
) -> Result<(Receipt, bool), Error> {
    let Answer {
        status, attempts, ..
    } = answer;
    let outcome = match status {
        _ if answer.is_duplicate => Outcome::Duplicate,
        StatusCode::ACCEPTED => Outcome::Accepted,
        _ => return Err(refusal(answer)),
    };
    let fault = |what: &str| {
        Error::protocol(
            format!("the answer confirms nothing: {what}"),
            status,
            attempts,
        )
    };
    if let Some(foreign) = foreign(&answer.headers) {
        return Err(fault(foreign));
    }
    let body = match (outcome, answer.body) {
        (_, Ok(body)) => body,
        // The head says it: what the body would add is lost, the decision is not.
        (Outcome::Accepted, Err(_)) => Bytes::new(),
        (Outcome::Duplicate, Err(cause)) => {
            let fault = fault("it broke off before it told the decision on record");
            return Err(fault.with_source(cause));
        }
    };
    let view = View::of(&body).ok_or_else(|| fault("it is not a JSON object"))?;
    match view.code().as_deref() {
        // Without a code of ours the status speaks: the seed's server says no more.
        None | Some("duplicate") => {}
        Some("decision-conflict" | "payload-mismatch") => {
            return Err(Error::status(problem_in(&body, status), status, attempts));
        }
        Some(_) => return Err(fault("it has another code than 'duplicate'")),
    }
    let nested = view.nested();
    if view.action.is_some() && nested.is_none() {
        return Err(fault("its action is not a JSON object"));
    }
    let action = match (view.action, view.request_id) {
        (Some(action), _) => LazyAction::in_json(body.slice_ref(action.get().as_bytes())),
        (None, Some(_)) => LazyAction::in_json(body.clone()),
        (None, None) => LazyAction::default(),
    };
    let mut is_told = false;
    for view in [Some(&view), nested.as_ref()].into_iter().flatten() {
        let [tenant, thread, key] =
            [view.tenant_id, view.thread_id, view.idempotency_key].map(|raw| raw.map(text));
        if !expected.is_named(tenant.as_deref(), thread.as_deref(), key.as_deref()) {
            return Err(fault("it is about another tenant, thread or key"));
        }
        match view.decision() {
            None => {}
            Some(told) if told == expected.decision.as_str() => is_told = true,
            Some(told) if told == expected.decision.opposite().as_str() => {
                return Err(opposite(action.get().cloned(), status, attempts));
            }
            Some(_) => return Err(fault("the decision on record is none of the protocol's")),
        }
        if view.status.is_some_and(|status| text(status) == "PENDING") {
            return Err(fault("the action is still pending"));
        }
    }
    // A problem of a type that is not ours may be a gateway's, which knows nothing of the decision.
    let is_foreign =
        view.code().is_none() && view.kind.is_some_and(|kind| text(kind) != "about:blank");
    if outcome == Outcome::Duplicate && is_foreign && !is_told {
        return Err(fault("it is a problem of another kind"));
    }
    let request_id = [nested.as_ref(), Some(&view)]
        .into_iter()
        .flatten()
        .find_map(|view| RequestId::new(text(view.request_id?)).ok());
    let receipt = Receipt {
        outcome,
        decision: expected.decision,
        status,
        attempts,
        call_id,
        request_id,
        action,
    };
    Ok((receipt, is_told))
}

/// Completes the receipt of a bare 409 with what the status endpoint told.
pub(super) fn verified(
    receipt: Receipt,
    expected: &Expected,
    action: Action,
) -> Result<Receipt, Error> {
    let is_named = expected.is_named(
        action.tenant_id.as_ref().map(TenantId::as_str),
        action.thread_id.as_ref().map(ThreadId::as_str),
        action.idempotency_key.as_ref().map(IdempotencyKey::as_str),
    );
    if !is_named || action.status == Status::Pending {
        return Err(Error::unverified(&receipt));
    }
    match action.decision {
        Some(decision) if decision == receipt.decision => Ok(Receipt {
            request_id: Some(action.request_id.clone()),
            action: action.into(),
            ..receipt
        }),
        Some(decision) if decision == receipt.decision.opposite() => {
            Err(opposite(Some(action), receipt.status, receipt.attempts))
        }
        _ => Err(Error::unverified(&receipt)),
    }
}

/// Whatever the status says, a recorded opposite is no success.
fn opposite(action: Option<Action>, status: StatusCode, attempts: u32) -> Error {
    let code = Code::DecisionConflict;
    let mut problem = Problem::new(code, status.as_u16(), "Decision conflict", "");
    problem.action = action.map(Box::new);
    Error::conflict(problem, status, attempts)
}

/// Turns the answer to a status question into the action or an error.
pub(super) fn action(answer: Answer) -> Result<Action, Error> {
    let Answer {
        status, attempts, ..
    } = answer;
    if status != StatusCode::OK {
        return Err(refusal(answer));
    }
    let broken = "the status answer is not of the protocol";
    let body = answer
        .body
        .map_err(|error| Error::protocol_caused(broken, status, attempts, error))?;
    serde_json::from_slice(&body)
        .map_err(|error| Error::protocol_caused(broken, status, attempts, error))
}

fn refusal(answer: Answer) -> Error {
    let body = answer.body.ok();
    let problem = body.and_then(|body| problem_in(&body, answer.status));
    Error::status(problem, answer.status, answer.attempts)
}
