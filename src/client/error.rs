//! Why a call of [`AegisService`](super::AegisService) put no decision on record.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use http::StatusCode;

use super::Receipt;
use super::answer::Told;
use crate::layer::{Delivery, NotRetried, RetryError};
use crate::protocol::{
    Action, BoxError, Code, Escaped, IdempotencyKey, InvalidValue, Problem, RequestId,
};

/// Why a call failed: the kind of failure, what is known about the delivery, and what the server
/// said.
///
/// An error never stands for a confirmed decision. The decision may still be on record; see
/// [`is_outcome_unknown`](Self::is_outcome_unknown). Asking again with the same key is then safe
/// and settles it.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: Kind,
    detail: String,
    status: Option<StatusCode>,
    attempts: u32,
    delivery: Delivery,
    /// What is known about the delivery of the attempts before the one that was answered.
    earlier: Delivery,
    retry_after: Option<Duration>,
    not_retried: Option<NotRetried>,
    key: Option<IdempotencyKey>,
    call_id: Option<RequestId>,
    problem: Option<Problem>,
    source: Option<BoxError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Config,
    Request,
    Transport,
    Timeout,
    Conflict,
    Closed,
    /// What a claim needs is not there: the approval, or the live claim.
    Claim,
    Refused,
    Unavailable,
    Protocol,
}

impl Error {
    fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self {
            inner: Box::new(Inner {
                kind,
                detail: detail.into(),
                status: None,
                attempts: 0,
                delivery: Delivery::NeverSent,
                earlier: Delivery::NeverSent,
                retry_after: None,
                not_retried: None,
                key: None,
                call_id: None,
                problem: None,
                source: None,
            }),
        }
    }

    pub(super) fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    pub(super) fn config(detail: impl Into<String>) -> Self {
        Self::new(Kind::Config, detail)
    }

    pub(super) fn config_caused(detail: &str, source: impl Into<BoxError>) -> Self {
        Self::config(detail).with_source(source)
    }

    pub(super) fn request(detail: impl Into<String>) -> Self {
        Self::new(Kind::Request, detail)
    }

    pub(super) fn invalid(value: InvalidValue) -> Self {
        Self::request("the request names an invalid value").with_source(value)
    }

    /// The call ran out of time before anything was sent.
    pub(super) fn never_ready() -> Self {
        Self::new(
            Kind::Timeout,
            "the HTTP service was not ready before the deadline",
        )
    }

    /// Nobody decided in time. The wait itself changed nothing.
    pub(super) fn undecided() -> Self {
        Self::new(Kind::Timeout, "the action was not decided in time")
    }

    /// No question of a wait has been answered. It is the source of [`Self::undecided`].
    pub(super) fn unanswered() -> Self {
        Self::new(Kind::Timeout, "the server did not answer in time")
    }

    /// The lease ended, as far as this side can tell, before it could be renewed.
    pub(super) fn lease_ended() -> Self {
        let mut this = Self::new(Kind::Timeout, "the claim could not be renewed in time");
        this.inner.delivery = Delivery::Unknown;
        this
    }

    /// Nothing came of an event stream for too long.
    pub(super) fn silent() -> Self {
        Self::new(Kind::Timeout, "the event stream was silent for too long")
    }

    pub(super) fn disconnected(source: impl Into<BoxError>) -> Self {
        Self::new(Kind::Transport, "the event stream broke off").with_source(source)
    }

    pub(super) fn failed(error: RetryError) -> Self {
        let (attempts, delivery) = (error.attempts(), error.delivery());
        let not_retried = error.not_retried();
        let mut this = if error.is_timeout() {
            Self::new(Kind::Timeout, "the server did not answer in time").with_source(error)
        } else {
            let detail = match delivery {
                Delivery::NeverSent => "the request could not be sent",
                Delivery::Unknown | Delivery::Answered => "the connection failed before an answer",
            };
            let this = Self::new(Kind::Transport, detail);
            match error.into_inner() {
                Some(source) => this.with_source(source),
                None => this,
            }
        };
        this.inner.attempts = attempts;
        this.inner.delivery = delivery;
        this.inner.not_retried = not_retried;
        this
    }

    /// Adds what is known about the call besides its answer.
    pub(super) fn told(mut self, told: Told) -> Self {
        self.inner.earlier = told.earlier;
        self.inner.delivery = self.inner.delivery.max(told.earlier);
        self.inner.retry_after = told.retry_after;
        self.inner.not_retried = told.not_retried;
        self
    }

    /// Adds the names of the call.
    pub(super) fn named(
        mut self,
        key: Option<&IdempotencyKey>,
        call_id: Option<&RequestId>,
    ) -> Self {
        self.inner.key = key.cloned();
        self.inner.call_id = call_id.cloned();
        self
    }

    fn answered(kind: Kind, detail: String, status: StatusCode, attempts: u32) -> Self {
        let mut this = Self::new(kind, detail);
        this.inner.status = Some(status);
        this.inner.attempts = attempts;
        this.inner.delivery = Delivery::Answered;
        this
    }

    /// The server answered, but not according to the protocol.
    pub(super) fn protocol(detail: impl Into<String>, status: StatusCode, attempts: u32) -> Self {
        Self::answered(Kind::Protocol, detail.into(), status, attempts)
    }

    /// The server considered the call a duplicate, and the decision on record could not be
    /// determined.
    pub(super) fn unverified(receipt: &Receipt) -> Self {
        let detail =
            "the server has a decision under this key, but which one could not be verified";
        Self::protocol(detail, receipt.status, receipt.attempts)
    }

    /// Another decision or another payload is on record.
    pub(super) fn conflict(problem: Problem, status: StatusCode, attempts: u32) -> Self {
        let recorded = problem.action.as_ref().and_then(|action| action.decision);
        let detail = match (problem.code, recorded) {
            (Code::PayloadMismatch, _) => "the key is on record with another payload".to_owned(),
            (_, Some(decision)) => format!("the decision on record is '{decision}'"),
            (_, None) => "the opposite decision is on record".to_owned(),
        };
        let mut this = Self::answered(Kind::Conflict, detail, status, attempts);
        this.inner.problem = Some(problem);
        this
    }

    /// The server answered with an error status.
    pub(super) fn status(problem: Option<Problem>, status: StatusCode, attempts: u32) -> Self {
        let code = problem
            .as_ref()
            .map(|problem| problem.code)
            .filter(|code| tells_the_state(*code, status))
            .unwrap_or(Code::Unknown);
        if let Code::DecisionConflict | Code::PayloadMismatch = code
            && let Some(problem) = problem
        {
            return Self::conflict(problem, status, attempts);
        }
        let (kind, what) = match status {
            _ if code == Code::ActionClosed => (Kind::Closed, "the action is closed"),
            _ if code == Code::AlreadyClaimed => (Kind::Claim, "another call claimed the action"),
            _ if code == Code::NotApproved => (Kind::Claim, "the action is not approved"),
            _ if code == Code::ClaimLost => (Kind::Claim, "the claim is lost"),
            status if status.is_server_error() => (Kind::Unavailable, "the server is unavailable"),
            // A 409 that gets here has a `Retry-After`: the first call is still in flight.
            StatusCode::REQUEST_TIMEOUT | StatusCode::CONFLICT => (
                Kind::Unavailable,
                "the server did not settle the request in time",
            ),
            status if status.is_client_error() => (Kind::Refused, "the server refused the request"),
            _ => (
                Kind::Protocol,
                "the server answered with an unexpected status",
            ),
        };
        let mut detail = format!("{what} ({status})");
        if let Some(problem) = problem
            .as_ref()
            .filter(|problem| !problem.detail.is_empty())
        {
            detail.push_str(": ");
            // From another program: limited in length, and on one line.
            let said: String = problem.detail.chars().take(500).collect();
            detail.push_str(&Escaped::line(&said).to_string());
        }
        let mut this = Self::answered(kind, detail, status, attempts);
        this.inner.problem = problem;
        this
    }

    /// Whether a setting of the builder is wrong. Nothing was sent.
    pub fn is_config(&self) -> bool {
        self.inner.kind == Kind::Config
    }

    /// Whether the call itself is wrong: a tenant, a thread, a key or a payload is missing or
    /// invalid. Nothing was sent.
    pub fn is_request(&self) -> bool {
        self.inner.kind == Kind::Request
    }

    /// Whether no attempt was sent: no connection could be made, or the server refused the stream
    /// before it processed it.
    pub fn is_connect(&self) -> bool {
        self.inner.kind == Kind::Transport && self.inner.delivery == Delivery::NeverSent
    }

    /// Whether the connection failed, before or after something was sent.
    pub fn is_transport(&self) -> bool {
        self.inner.kind == Kind::Transport
    }

    /// Whether the last attempt or the whole call ran out of time.
    pub fn is_timeout(&self) -> bool {
        self.inner.kind == Kind::Timeout
    }

    /// Whether the opposite decision or another payload is on record; [`recorded`](Self::recorded)
    /// holds it.
    pub fn is_conflict(&self) -> bool {
        self.inner.kind == Kind::Conflict
    }

    /// Whether the action is on record with another payload than the one that was sent, seen, or
    /// about to be run. Such an error [is a conflict](Self::is_conflict) too.
    pub fn is_payload_mismatch(&self) -> bool {
        self.is_conflict() && self.code() == Some(Code::PayloadMismatch)
    }

    /// Whether another call spent the approval; [`recorded`](Self::recorded) tells what became of
    /// it. It is never a success: the action was not claimed by this call.
    pub fn is_already_claimed(&self) -> bool {
        self.inner.kind == Kind::Claim && self.code() == Some(Code::AlreadyClaimed)
    }

    /// Whether the action cannot be claimed, because it is pending or rejected, or because its
    /// execution failed and nobody has decided again.
    pub fn is_not_approved(&self) -> bool {
        self.inner.kind == Kind::Claim && self.code() == Some(Code::NotApproved)
    }

    /// Whether the token is not that of a live claim: the lease has ended, or another outcome is on
    /// record.
    pub fn is_claim_lost(&self) -> bool {
        self.inner.kind == Kind::Claim && self.code() == Some(Code::ClaimLost)
    }

    /// Whether the server says that it has no such action, rather than something in between that
    /// it has no such path.
    pub(super) fn is_unknown_action(&self) -> bool {
        self.is_not_found() && self.code() == Some(Code::NotFound)
    }

    fn code(&self) -> Option<Code> {
        self.inner.problem.as_ref().map(|problem| problem.code)
    }

    /// Whether the same call may succeed later, without a change.
    pub(super) fn is_transient(&self) -> bool {
        let was_worth_it = matches!(
            self.inner.not_retried,
            Some(
                NotRetried::Attempts
                    | NotRetried::Budget
                    | NotRetried::Deadline
                    | NotRetried::RetryAfter
            )
        );
        was_worth_it || matches!(self.inner.kind, Kind::Timeout) || self.is_rate_limited()
    }

    /// Whether the action expired or was cancelled, or is decided and cannot be cancelled.
    pub fn is_closed(&self) -> bool {
        self.inner.kind == Kind::Closed
    }

    /// Whether the server refused the request with another status from 400 to 499.
    pub fn is_refused(&self) -> bool {
        self.inner.kind == Kind::Refused
    }

    /// Whether the credential is missing, unknown, or does not allow the call: 401 or 403.
    pub fn is_unauthorized(&self) -> bool {
        matches!(
            self.inner.status,
            Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
        )
    }

    /// Whether a quota or a rate limit is used up: 429.
    pub fn is_rate_limited(&self) -> bool {
        self.inner.status == Some(StatusCode::TOO_MANY_REQUESTS)
    }

    /// Whether the server does not know the action: 404.
    pub fn is_not_found(&self) -> bool {
        self.inner.status == Some(StatusCode::NOT_FOUND)
    }

    /// Whether the server could not serve the request after all retries: 5xx, 408, or 409 with
    /// `Retry-After`.
    pub fn is_unavailable(&self) -> bool {
        self.inner.kind == Kind::Unavailable
    }

    /// Whether the server's answer was not of this protocol.
    pub fn is_protocol(&self) -> bool {
        self.inner.kind == Kind::Protocol
    }

    /// Whether what was asked for may be on record although the call failed. Asking again with the
    /// same key settles it, and for calls by id with the same [`call_id`](Self::call_id).
    pub fn is_outcome_unknown(&self) -> bool {
        match self.inner.kind {
            Kind::Config | Kind::Request | Kind::Conflict | Kind::Closed => false,
            Kind::Transport | Kind::Timeout => self.inner.delivery != Delivery::NeverSent,
            Kind::Unavailable | Kind::Protocol => true,
            // The refusal covers its own attempt only. What became of an earlier one is unknown: it
            // may have been granted the very claim that this one was refused.
            Kind::Refused | Kind::Claim => self.inner.earlier != Delivery::NeverSent,
        }
    }

    /// Returns the key of the call. `None` if the call was not begun, or asked for a status.
    ///
    /// Together with the [`call_id`](Self::call_id) it identifies this very call, so that it can be
    /// made again.
    pub fn idempotency_key(&self) -> Option<&IdempotencyKey> {
        self.inner.key.as_ref()
    }

    /// Returns the `X-Request-Id` of the call. `None` if the call was not begun, or asked for a
    /// status.
    pub fn call_id(&self) -> Option<&RequestId> {
        self.inner.call_id.as_ref()
    }

    /// Returns how long the server asks to wait before the next call (`Retry-After`), if it does.
    pub fn retry_after(&self) -> Option<Duration> {
        self.inner.retry_after
    }

    /// Returns why no other attempt was made. `None` if none would have been worth it.
    pub fn not_retried(&self) -> Option<NotRetried> {
        self.inner.not_retried
    }

    /// Returns the worst that is known about the delivery of all attempts.
    pub fn delivery(&self) -> Delivery {
        self.inner.delivery
    }

    /// Returns the number of attempts started.
    pub fn attempts(&self) -> u32 {
        self.inner.attempts
    }

    /// Returns the status of the last answer, if there was one.
    pub fn status_code(&self) -> Option<StatusCode> {
        self.inner.status
    }

    /// Returns the server's RFC 9457 problem, if it sent one.
    pub fn problem(&self) -> Option<&Problem> {
        self.inner.problem.as_ref()
    }

    /// Returns the action on record, if the server sent it.
    pub fn recorded(&self) -> Option<&Action> {
        self.problem()?.action.as_deref()
    }
}

/// Whether a code tells the state of the action: the protocol has it, and with this status. Of a
/// gateway's 502 or a proxy's 407 it is no code of the server's. Some servers answer 409 with a code
/// that ours has with 422.
pub(super) fn tells_the_state(code: Code, status: StatusCode) -> bool {
    match code {
        Code::DecisionConflict
        | Code::PayloadMismatch
        | Code::ActionClosed
        | Code::NotApproved
        | Code::ClaimLost => {
            matches!(
                status,
                StatusCode::UNPROCESSABLE_ENTITY | StatusCode::CONFLICT
            )
        }
        Code::AlreadyClaimed => status == StatusCode::CONFLICT,
        _ => false,
    }
}

/// Constructors for tests of code that uses [`AegisService`](super::AegisService).
#[cfg(feature = "test-util")]
impl Error {
    /// Makes the error of a call that was answered with this status, and with this problem in the
    /// body.
    ///
    /// ```
    /// use aegis_hitl::Error;
    /// use aegis_hitl::protocol::{Code, Problem};
    /// use http::StatusCode;
    ///
    /// let problem = Problem::new(Code::DecisionConflict, 422, "Decision conflict", "");
    /// let conflict = Error::from_answer(StatusCode::UNPROCESSABLE_ENTITY, problem);
    /// assert!(conflict.is_conflict() && !conflict.is_outcome_unknown());
    ///
    /// let unavailable = Error::from_answer(StatusCode::SERVICE_UNAVAILABLE, None);
    /// assert!(unavailable.is_unavailable() && unavailable.is_outcome_unknown());
    /// ```
    pub fn from_answer(status: StatusCode, problem: impl Into<Option<Problem>>) -> Self {
        Self::status(problem.into(), status, 1)
    }

    /// Makes the error of a call with one attempt that timed out and may have been acted upon.
    ///
    /// ```
    /// let late = aegis_hitl::Error::from_timeout();
    /// assert!(late.is_timeout() && late.is_outcome_unknown());
    /// ```
    pub fn from_timeout() -> Self {
        let mut this = Self::new(Kind::Timeout, "the server did not answer in time");
        this.inner.attempts = 1;
        this.inner.delivery = Delivery::Unknown;
        this
    }

    /// Makes the error of a call with one attempt that could not connect.
    ///
    /// ```
    /// let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    /// let unreachable = aegis_hitl::Error::from_connect(refused);
    /// assert!(unreachable.is_connect() && !unreachable.is_outcome_unknown());
    /// ```
    pub fn from_connect(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        let mut this = Self::new(Kind::Transport, "the request could not be sent");
        this.inner.attempts = 1;
        this.with_source(source)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.detail)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The problem contains the action, and the action the payload. Neither may be logged.
        f.debug_struct("Error")
            .field("kind", &self.inner.kind)
            .field("detail", &self.inner.detail)
            .field("status", &self.inner.status)
            .field("attempts", &self.inner.attempts)
            .field("delivery", &self.inner.delivery)
            .field("not_retried", &self.inner.not_retried)
            .field("call_id", &self.inner.call_id)
            .field("source", &self.inner.source)
            .finish_non_exhaustive()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.inner.source {
            Some(source) => Some(&**source),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(code: Code, status: StatusCode) -> Error {
        Error::status(Some(Problem::new(code, status.as_u16(), "", "")), status, 1)
    }

    #[test]
    fn an_error_is_of_one_kind_alone() {
        let all = [
            Error::config("c"),
            Error::request("r"),
            Error::disconnected("d"),
            Error::undecided(),
            answered(Code::DecisionConflict, StatusCode::CONFLICT),
            answered(Code::ActionClosed, StatusCode::CONFLICT),
            answered(Code::NotApproved, StatusCode::CONFLICT),
            Error::status(None, StatusCode::NOT_FOUND, 1),
            Error::status(None, StatusCode::BAD_GATEWAY, 1),
            Error::protocol("p", StatusCode::OK, 1),
        ];
        for (at, error) in all.iter().enumerate() {
            let kinds = [
                error.is_config(),
                error.is_request(),
                error.is_transport(),
                error.is_timeout(),
                error.is_conflict(),
                error.is_closed(),
                error.is_not_approved(),
                error.is_refused(),
                error.is_unavailable(),
                error.is_protocol(),
            ];
            let mut expected = [false; 10];
            expected[at] = true;
            assert_eq!(kinds, expected, "{error:?}");
        }
    }

    #[test]
    fn the_cause_of_an_error_is_its_source() {
        let caused = Error::disconnected("reset");
        assert_eq!(caused.source().unwrap().to_string(), "reset");
        assert!(Error::undecided().source().is_none());
    }
}
