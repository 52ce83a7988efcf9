//! Reads a server's answer. Where the body says more than the status, the status alone is not
//! trusted.

use std::error::Error as StdError;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde::Deserialize;
use serde::de::value::{self, StrDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer};

use super::error::tells_the_state;
use super::read::{AnswerBody, BrokenOff, End};
use super::receipt::OnRecord;
use super::view::{View, Word};
use super::{Error, Outcome, Receipt};
use crate::layer::{
    Attempts, Confirmation, Delivery, Failure, NotRetried, ResponseHead, RetryError, judge_hyper,
};
use crate::protocol::{
    Action, BoxError, Code, Decision, Digest, Fingerprint, IdempotencyKey, Problem, RequestId,
    Status, TenantId, ThreadId,
};

/// What is wrong with an answer that does not agree with the names in the request.
const ANOTHER: &str = "it is about another action, tenant, thread or key";

/// An answer with its body, as far as the body could be read.
pub(super) struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    attempts: u32,
    is_duplicate: bool,
    body: AnswerBody,
    /// Why the body broke off, if the head alone does not say enough.
    cause: Option<BoxError>,
    /// Whether the stream of the answer was reset as one that was never processed.
    is_disowned: bool,
    pub(super) told: Told,
}

/// What is known about a call besides its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    /// What is known about the delivery of the attempts before the one that was answered.
    pub(super) earlier: Delivery,
    pub(super) retry_after: Option<Duration>,
    pub(super) not_retried: Option<NotRetried>,
}

impl Answer {
    /// Takes the end of a call as an answer if there was one, even if only its head arrived.
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
                body: AnswerBody {
                    read: broken.read.clone(),
                    end: End::BrokenOff,
                },
                cause: Some(broken.cause.to_string().into()),
                is_disowned: judge_hyper(&*broken.cause) == Failure::Refused,
                told: Told {
                    // Any attempt before it may have been acted upon.
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

    pub(super) fn read(response: Response<AnswerBody>) -> Self {
        let attempts = Attempts::of(&response);
        // A layer of the caller may already have turned the 409 into a success. It left the mark.
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
            body,
            cause: None,
            is_disowned: false,
        }
    }

    /// Whether the body arrived whole.
    pub(super) fn is_whole(&self) -> bool {
        self.body.end == End::Whole
    }

    /// Returns the body if it arrived whole, or else why it did not.
    fn whole(self) -> Result<Bytes, BoxError> {
        match self.body.end {
            End::Whole => Ok(self.body.read),
            End::Late => Err("the body came too late".into()),
            End::TooLong => Err("the body is too long".into()),
            End::BrokenOff => Err(self.cause.unwrap_or_else(|| "the body broke off".into())),
        }
    }
}

/// The action that an answer has to be about, as far as the request named it.
#[derive(Clone, Copy, Default)]
pub(super) struct Subject<'a> {
    /// The tenant that was sent. `None` if the API key names it.
    pub(super) tenant: Option<&'a TenantId>,
    pub(super) thread: Option<&'a ThreadId>,
    pub(super) key: Option<&'a IdempotencyKey>,
    /// The server's id.
    pub(super) id: Option<&'a RequestId>,
}

impl Subject<'_> {
    /// Compares an identity with as much of it as the answer contains.
    fn is_named(&self, view: &View<'_>) -> bool {
        let is_id = |id: &RequestId| {
            !view.request_id.is_there() || view.request_id().is_some_and(|told| is_same(&told, id))
        };
        self.tenant.is_none_or(|sent| view.tenant_id.agrees(sent))
            && self.thread.is_none_or(|sent| view.thread_id.agrees(sent))
            && self
                .key
                .is_none_or(|sent| view.idempotency_key.agrees(sent))
            && self.id.is_none_or(is_id)
    }

    /// The same for an action.
    pub(super) fn is_of(&self, action: &Action) -> bool {
        fn agree<T: PartialEq>(told: Option<&T>, sent: Option<&T>) -> bool {
            told.is_none() || sent.is_none() || told == sent
        }
        agree(action.tenant_id.as_ref(), self.tenant)
            && agree(action.thread_id.as_ref(), self.thread)
            && agree(action.idempotency_key.as_ref(), self.key)
            && self.id.is_none_or(|id| is_same(&action.request_id, id))
    }
}

/// Compares ids. A UUID has more than one spelling.
pub(super) fn is_same(one: &RequestId, other: &RequestId) -> bool {
    one == other
        || one
            .as_uuid()
            .is_some_and(|one| other.as_uuid() == Some(one))
}

/// What the answer to a decision has to agree with.
pub(super) struct Expected<'a> {
    pub(super) subject: Subject<'a>,
    pub(super) decision: Decision,
    pub(super) payload: Decided<'a>,
}

/// The payload that was decided on.
pub(super) enum Decided<'a> {
    /// The request named it by its digest, if at all.
    Digest(Option<Digest>),
    /// The request's body has it. Its digest is computed once an answer has one too.
    Body(&'a [u8]),
}

impl Decided<'_> {
    /// Whether a digest that an answer has is the one of this payload. Without either it is.
    fn agrees(&self, told: &Word<'_>) -> bool {
        if !told.is_there() {
            return true;
        }
        let sent = match self {
            Self::Digest(digest) => *digest,
            Self::Body(body) => match Fingerprint::in_body(body) {
                Ok(fingerprint) => fingerprint.map(|fingerprint| Digest::from(fingerprint.0)),
                // A digest that cannot be checked confirms nothing.
                Err(_) => return false,
            },
        };
        sent.is_none_or(|sent| told.text().and_then(|text| text.parse().ok()) == Some(sent))
    }
}

/// Parses the whole action, or else keeps what there is of it.
pub(super) fn action_in(json: &[u8]) -> Option<Action> {
    serde_json::from_slice(json)
        .ok()
        .or_else(|| View::of(json)?.salvaged())
}

/// Parses a problem, with as much of its action as possible.
fn problem_in(body: &[u8], status: StatusCode) -> Option<Problem> {
    let view = View::of(body)?;
    let code = view.code().map(code_of);
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

/// Whether the action in a problem, if there is one, is the one that the request named.
fn is_about(body: &[u8], subject: &Subject<'_>) -> bool {
    let nested = View::of(body).and_then(|view| view.nested());
    nested.is_none_or(|action| subject.is_named(&action))
}

fn code_of(word: &str) -> Code {
    let word: StrDeserializer<'_, value::Error> = word.into_deserializer();
    Code::deserialize(word).unwrap_or(Code::Unknown)
}

/// Returns why a body is not to be read as JSON: a content coding that was not requested, or
/// another media type.
///
/// One pass over the few headers of an answer is cheaper than two lookups.
fn foreign(headers: &HeaderMap) -> Option<&'static str> {
    for (name, value) in headers {
        if name == CONTENT_ENCODING && !value.as_bytes().eq_ignore_ascii_case(b"identity") {
            return Some("it has a content coding that was not asked for");
        }
        if name == CONTENT_TYPE && !is_json(value.as_bytes()) {
            return Some("it is not JSON");
        }
    }
    None
}

/// Returns why an answer is not an event stream that can be read.
pub(super) fn is_event_stream(headers: &HeaderMap) -> Result<(), &'static str> {
    if headers
        .get(CONTENT_ENCODING)
        .is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        return Err("it has a content coding that was not asked for");
    }
    let media_type = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let essence = media_type.and_then(|media_type| media_type.split(|byte| *byte == b';').next());
    let essence = essence.unwrap_or_default().trim_ascii();
    if essence.eq_ignore_ascii_case(b"text/event-stream") {
        Ok(())
    } else {
        Err("it is not an event stream")
    }
}

/// Whether a head allows an empty body: it announces one, or names no media type, as the Python SDK's
/// server does.
fn may_be_empty(headers: &HeaderMap) -> bool {
    !headers.contains_key(CONTENT_TYPE)
        || headers
            .get(CONTENT_LENGTH)
            .is_some_and(|length| length == "0")
}

fn is_json(media_type: &[u8]) -> bool {
    let essence = media_type.split(|byte| *byte == b';').next();
    let essence = essence.unwrap_or_default().trim_ascii();
    essence.eq_ignore_ascii_case(b"application/json")
        || essence.to_ascii_lowercase().ends_with(b"+json")
}

/// Turns the answer to a decision into a receipt or an error. Also returns whether the server said
/// which decision is on record.
pub(super) fn receipt(
    answer: Answer,
    expected: &Expected<'_>,
    call_id: RequestId,
) -> Result<(Receipt, bool), Error> {
    let Answer {
        status, attempts, ..
    } = answer;
    let outcome = match status {
        _ if answer.is_duplicate => Outcome::Duplicate,
        StatusCode::ACCEPTED => Outcome::Accepted,
        _ => return Err(refusal(answer, &expected.subject)),
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
    if answer.is_disowned {
        return Err(fault("its stream was refused"));
    }
    let end = answer.body.end;
    let body = match (outcome, end) {
        (_, End::Whole) => answer.body.read,
        // The head says it, and as much of the body as arrived must not contradict it.
        (Outcome::Accepted, End::Late | End::BrokenOff) => answer.body.read,
        (Outcome::Accepted, End::TooLong) => return Err(fault("it is too long")),
        (Outcome::Duplicate, _) => {
            let cause = answer.whole().err();
            let fault = fault("it broke off before it told the decision on record");
            return Err(cause.into_iter().fold(fault, Error::with_source));
        }
    };
    if outcome == Outcome::Duplicate && body.trim_ascii().is_empty() {
        // White space is the beginning of an answer that was cut off.
        if !body.is_empty() {
            return Err(fault("it is blank"));
        }
        // A connection that closes after such a head looks the same.
        if !may_be_empty(&answer.headers) {
            return Err(fault("it is declared as JSON and is empty"));
        }
    }
    let view = match end {
        End::Whole => View::of(&body),
        _ => View::so_far(&body),
    };
    let view = view.ok_or_else(|| fault("it is not a JSON object"))?;
    if view.is_cut_off {
        return Err(fault(
            "it broke off in a member that tells what is on record",
        ));
    }
    match view.code() {
        // Without one of our codes the status decides: the Python SDK's server says no more.
        None | Some("duplicate") => {}
        Some("decision-conflict" | "payload-mismatch") => {
            let problem = problem_in(&body, status);
            let problem = problem.filter(|_| is_about(&body, &expected.subject));
            let problem = problem.ok_or_else(|| fault(ANOTHER))?;
            return Err(Error::status(Some(problem), status, attempts));
        }
        Some(_) => return Err(fault("it has another code than 'duplicate'")),
    }
    let nested = view.nested();
    if view.action.is_some() && nested.is_none() {
        return Err(fault("its action is not a JSON object"));
    }
    let mut is_told = false;
    for view in [Some(&view), nested.as_ref()].into_iter().flatten() {
        if !expected.subject.is_named(view) {
            return Err(fault(ANOTHER));
        }
        match &view.decision {
            Word::Absent => {}
            Word::Null => return Err(fault("the action on record has no decision")),
            told if told.is(expected.decision.as_str()) => is_told = true,
            told if told.is(expected.decision.opposite().as_str()) => {
                let action = OnRecord::in_answer(body.clone()).action().cloned();
                return Err(opposite(action, status, attempts));
            }
            _ => return Err(fault("the decision on record is none of the protocol's")),
        }
        if view.status.is(Status::Pending.as_str()) {
            return Err(fault("the action is still pending"));
        }
        if !expected.payload.agrees(&view.digest) {
            return Err(fault("it is about another payload"));
        }
    }
    // A problem with a foreign type may come from a gateway, which knows nothing about the
    // decision. `about:blank` says no more than the status (RFC 9457), as a bare body does.
    let is_foreign = view.code().is_none() && view.kind.is_there() && !view.kind.is("about:blank");
    if outcome == Outcome::Duplicate && is_foreign && !is_told {
        return Err(fault("it is a problem of another kind"));
    }
    let receipt = Receipt {
        outcome,
        decision: expected.decision,
        status,
        attempts,
        call_id,
        on_record: OnRecord::in_answer(body),
    };
    Ok((receipt, is_told))
}

/// Completes the receipt of a bare 409 with the status endpoint's answer.
pub(super) fn verified(
    receipt: Receipt,
    expected: &Expected<'_>,
    action: Action,
) -> Result<Receipt, Error> {
    // If the 409 contained an id, the status belongs to it. Otherwise the call's own id was asked
    // for.
    let is_asked_for = receipt
        .request_id()
        .is_none_or(|id| is_same(id, &action.request_id));
    let digest = action.digest.map(|digest| digest.to_string().into());
    let agrees = expected.subject.is_of(&action)
        && expected
            .payload
            .agrees(&digest.map_or(Word::Absent, Word::Text));
    if !is_asked_for || !agrees || action.status == Status::Pending {
        return Err(Error::unverified(&receipt));
    }
    match action.decision {
        Some(decision) if decision == receipt.decision => Ok(Receipt {
            on_record: action.into(),
            ..receipt
        }),
        Some(_) => Err(opposite(Some(action), receipt.status, receipt.attempts)),
        None => Err(Error::unverified(&receipt)),
    }
}

/// A recorded opposite is not a success, whatever the status.
fn opposite(action: Option<Action>, status: StatusCode, attempts: u32) -> Error {
    let code = Code::DecisionConflict;
    let mut problem = Problem::new(code, status.as_u16(), "Decision conflict", "");
    problem.action = action.map(Box::new);
    Error::conflict(problem, status, attempts)
}

/// Turns the answer to a status request into the action or an error. `tenant` is the one that was
/// sent.
pub(super) fn action(answer: Answer, tenant: Option<&TenantId>) -> Result<Action, Error> {
    let subject = Subject {
        tenant,
        ..Subject::default()
    };
    let Object(action, told) = object::<Action>(answer, &[StatusCode::OK], &subject)?;
    match (tenant, &action.tenant_id) {
        (Some(asked), Some(named)) if asked != named => {
            Err(told.fault("it is about another tenant"))
        }
        _ => Ok(action),
    }
}

/// A JSON object that an answer consists of, and the answer's head.
pub(super) struct Object<T>(pub(super) T, pub(super) Head);

/// What an error says about the answer that it rests on.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    attempts: u32,
}

impl Head {
    /// The head of an answer to the only attempt.
    pub(super) fn of<B>(response: &Response<B>) -> Self {
        Self {
            status: response.status(),
            attempts: 1,
        }
    }

    /// The answer is not what the protocol says.
    pub(super) fn fault(self, what: impl std::fmt::Display) -> Error {
        let detail = format!("the answer is not of the protocol: {what}");
        Error::protocol(detail, self.status, self.attempts)
    }
}

/// Reads an answer that has one of these statuses and is a JSON object, whole. Any other answer is
/// an error. A refusal has to be about `subject`.
pub(super) fn object<T: DeserializeOwned>(
    answer: Answer,
    statuses: &[StatusCode],
    subject: &Subject<'_>,
) -> Result<Object<T>, Error> {
    let head = Head {
        status: answer.status,
        attempts: answer.attempts,
    };
    if !statuses.contains(&head.status) {
        return Err(refusal(answer, subject));
    }
    if let Some(foreign) = foreign(&answer.headers) {
        return Err(head.fault(foreign));
    }
    let body = answer
        .whole()
        .map_err(|error| head.fault("its body is incomplete").with_source(error))?;
    // An array would be read as the members in their order.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(head.fault("it is not a JSON object"));
    }
    let object = serde_json::from_slice(&body).map_err(|error| head.fault(unreadable(&error)))?;
    Ok(Object(object, head))
}

/// The same for an answer that is one action, which has to be the one that the request named.
pub(super) fn action_of(
    answer: Answer,
    statuses: &[StatusCode],
    subject: &Subject<'_>,
) -> Result<Object<Action>, Error> {
    let Object(action, head) = object::<Action>(answer, statuses, subject)?;
    if !subject.is_of(&action) {
        return Err(head.fault(ANOTHER));
    }
    Ok(Object(action, head))
}

/// Reads the answer to a decision by id, which has no key. Only a server of this protocol serves
/// it, so a 409 has to say what is on record.
pub(super) fn receipt_by_id(
    mut answer: Answer,
    expected: &Expected<'_>,
    call_id: RequestId,
) -> Result<(Receipt, Head), Error> {
    let head = Head {
        status: answer.status,
        attempts: answer.attempts,
    };
    answer.is_duplicate =
        head.status == StatusCode::CONFLICT && !answer.headers.contains_key(RETRY_AFTER);
    let (receipt, is_told) = receipt(answer, expected, call_id)?;
    if receipt.is_duplicate() && !is_told {
        return Err(head.fault("it does not name the decision on record"));
    }
    Ok((receipt, head))
}

/// Says where the JSON is malformed. The parser's own message may repeat values of the answer,
/// which must not be logged.
fn unreadable(error: &serde_json::Error) -> String {
    format!("line {}, column {}", error.line(), error.column())
}

/// Turns any other answer than the one that was asked for into an error.
pub(super) fn refusal(answer: Answer, subject: &Subject<'_>) -> Error {
    let (status, attempts) = (answer.status, answer.attempts);
    let is_in_flight = answer.headers.contains_key(RETRY_AFTER);
    let is_foreign = foreign(&answer.headers).is_some();
    let body = answer.whole().ok().filter(|_| !is_foreign);
    let is_about = body.as_ref().is_none_or(|body| is_about(body, subject));
    let problem = body.and_then(|body| problem_in(&body, status));
    if let Some(problem) = &problem
        && !is_about
        && tells_the_state(problem.code, status)
    {
        return Head { status, attempts }.fault(ANOTHER);
    }
    let problem = problem.filter(|_| is_about);
    let code = problem.as_ref().map(|problem| problem.code);
    if status == StatusCode::CONFLICT && !is_in_flight && code != Some(Code::AlreadyClaimed) {
        let head = Head { status, attempts };
        return head.fault("it is a conflict that this call cannot have");
    }
    Error::status(problem, status, attempts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_that_says_so_may_be_empty() {
        for (json, length, expected) in [
            (false, None, true),
            (false, Some("5"), true),
            (true, Some("0"), true),
            (true, Some("5"), false),
            (true, None, false),
        ] {
            let mut headers = HeaderMap::new();
            if json {
                let json = HeaderValue::from_static("application/json");
                headers.insert(CONTENT_TYPE, json);
            }
            if let Some(length) = length {
                headers.insert(CONTENT_LENGTH, HeaderValue::from_static(length));
            }
            assert_eq!(may_be_empty(&headers), expected, "{headers:?}");
        }
    }

    #[test]
    fn a_malformed_answer_is_shown_by_the_place_of_its_fault_alone() {
        let error = serde_json::from_str::<Action>("{\n\"secret\": x}").unwrap_err();
        assert_eq!(unreadable(&error), "line 2, column 11");
    }
}
