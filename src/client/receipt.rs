//! The result of a successful call.

use std::fmt;
use std::sync::OnceLock;

use bytes::Bytes;
use http::StatusCode;

use super::answer::action_in;
use super::view::View;
use crate::protocol::{Action, Decision, RequestId};

/// What an answer says is on record, parsed on demand: most callers only want to know that it is.
#[derive(Clone, Default)]
pub(super) struct OnRecord {
    /// The answer, as far as it arrived.
    answer: Bytes,
    request_id: OnceLock<Option<RequestId>>,
    action: OnceLock<Option<Box<Action>>>,
}

impl OnRecord {
    /// Wraps an answer that was checked.
    pub(super) fn in_answer(answer: Bytes) -> Self {
        Self {
            answer,
            ..Self::default()
        }
    }

    /// Returns the server's id for the action.
    pub(super) fn request_id(&self) -> Option<&RequestId> {
        let parse = || {
            let view = View::so_far(&self.answer)?;
            view.nested()
                .and_then(|nested| nested.request_id())
                .or_else(|| view.request_id())
        };
        self.request_id.get_or_init(parse).as_ref()
    }

    pub(super) fn action(&self) -> Option<&Action> {
        let parse = || {
            let view = View::so_far(&self.answer)?;
            let json = match view.action {
                Some(action) => action.get().as_bytes(),
                None => &self.answer,
            };
            action_in(json).map(Box::new)
        };
        self.action.get_or_init(parse).as_deref()
    }
}

impl From<Action> for OnRecord {
    fn from(action: Action) -> Self {
        Self {
            answer: Bytes::new(),
            request_id: OnceLock::from(Some(action.request_id.clone())),
            action: OnceLock::from(Some(Box::new(action))),
        }
    }
}

impl fmt::Debug for OnRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the key and the payload, which must not be logged.
        f.debug_struct("OnRecord")
            .field("request_id", &self.request_id())
            .finish_non_exhaustive()
    }
}

/// Whether this call put the decision on record or found it there. Either way it is on record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_enums)]
pub enum Outcome {
    /// The server accepted this call's decision.
    Accepted,
    /// The server had recorded the same decision before, for another call with this key.
    Duplicate,
}

/// Proof that a decision is on record.
///
/// A whole answer says so, and agrees with the request in identity, decision and payload as far as
/// it names them. A 202 whose body breaks off is asked for again. If no attempt gets a whole answer,
/// the head of the last 202 counts, unless what arrived contradicts it or ends within a value that
/// might, or its stream was reset as never processed. A 202 whose body is late is not asked for
/// again, and otherwise counts alike. A cancellation takes a whole answer.
#[derive(Debug, Clone)]
pub struct Receipt {
    pub(super) outcome: Outcome,
    pub(super) decision: Decision,
    pub(super) status: StatusCode,
    pub(super) attempts: u32,
    pub(super) call_id: RequestId,
    pub(super) on_record: OnRecord,
}

impl Receipt {
    /// Returns whether this call put the decision on record or found it there.
    pub fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// Whether the decision was already on record.
    pub fn is_duplicate(&self) -> bool {
        self.outcome == Outcome::Duplicate
    }

    /// Returns the decision on record, which is the one that was asked for.
    pub fn decision(&self) -> Decision {
        self.decision
    }

    /// Returns the server's id for the action, to ask for its status. `None` if the server did not
    /// send it.
    pub fn request_id(&self) -> Option<&RequestId> {
        self.on_record.request_id()
    }

    /// Returns the id of this call (`X-Request-Id`), which all of its attempts carried.
    pub fn call_id(&self) -> &RequestId {
        &self.call_id
    }

    /// Returns how many attempts the call took.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Returns the status of the answer: 202 or 409.
    pub fn status_code(&self) -> StatusCode {
        self.status
    }

    /// Returns the action on record, if the server sent it.
    pub fn action(&self) -> Option<&Action> {
        self.on_record.action()
    }
}

/// Constructors for tests of code that uses [`AegisService`](super::AegisService).
#[cfg(feature = "test-util")]
impl Receipt {
    /// Makes the receipt of a call with one attempt, a minted call id and no action.
    ///
    /// ```
    /// use aegis_hitl::{Decision, DecisionRequest, Error, IdempotencyKey, Outcome, Receipt};
    /// use tower::{ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let double = service_fn(|request: DecisionRequest| async move {
    ///     Ok::<_, Error>(Receipt::new(Outcome::Accepted, request.decision()))
    /// });
    /// let request = DecisionRequest::new(Decision::Approve, IdempotencyKey::new("k-1")?);
    /// let receipt = double.oneshot(request).await?;
    /// assert_eq!(receipt.decision(), Decision::Approve);
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(outcome: Outcome, decision: Decision) -> Self {
        Self {
            outcome,
            decision,
            status: match outcome {
                Outcome::Accepted => StatusCode::ACCEPTED,
                Outcome::Duplicate => StatusCode::CONFLICT,
            },
            attempts: 1,
            call_id: RequestId::mint(),
            on_record: OnRecord::default(),
        }
    }

    /// Adds the action and its id, as a server would send them.
    #[must_use]
    pub fn with_action(mut self, action: Action) -> Self {
        self.on_record = action.into();
        self
    }

    /// Sets how many attempts the call took.
    #[must_use]
    pub fn with_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }
}
