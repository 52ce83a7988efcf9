//! The decision table: what a request means, given what is on record. Every store uses it.

use std::borrow::Cow;

use super::Actor;
use super::operation::Record;
use crate::protocol::{Decision, RequestId, Status};

/// What a store has on record for an identity, as far as the rule needs it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recorded<'a> {
    pub(crate) status: Status,
    pub(crate) decision: Option<Decision>,
    /// Whether the action expired or was cancelled.
    pub(crate) closed: bool,
    /// The payload's digest; `None` if the action has no payload.
    pub(crate) digest: Option<&'a [u8; 32]>,
    /// The [canonical](canonical_call) `X-Request-Id` of the call that made the recorded decision.
    pub(crate) call_id: Option<&'a str>,
}

/// The requested decision, as far as the rule needs it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) decision: Decision,
    pub(crate) digest: Option<&'a [u8; 32]>,
    /// The call's [canonical](canonical_call) `X-Request-Id`.
    pub(crate) call_id: Option<&'a str>,
}

/// The form in which call ids are compared. A UUID has many spellings, and stores keep it as 16
/// bytes.
pub(crate) fn canonical_call(call_id: &RequestId) -> Cow<'_, str> {
    match call_id.as_uuid() {
        Some(uuid) => uuid.to_string().into(),
        None => call_id.as_str().into(),
    }
}

/// What a store must do with the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ruling {
    Record,
    Replay,
    Duplicate,
    Conflict,
    PayloadMismatch,
    Closed,
}

/// Rules on a decision for an identity that is on record.
pub(crate) fn rule(recorded: Recorded<'_>, asked: Asked<'_>) -> Ruling {
    if payloads_differ(recorded.digest, asked.digest) {
        return Ruling::PayloadMismatch;
    }
    // The call that closed the action asked for no decision, so no decision is its retry.
    let same_call =
        !recorded.closed && asked.call_id.is_some() && asked.call_id == recorded.call_id;
    let decision = match (recorded.status, recorded.decision) {
        // A late retry of the call whose decision failed since: nobody has decided again.
        (Status::Failed, Some(decision)) if same_call && decision == asked.decision => {
            return Ruling::Replay;
        }
        // Carrying out the recorded decision failed, or is in doubt: a human decides again.
        (Status::Failed, _) => return Ruling::Record,
        // A store never reads an unknown status. If it did, a decided action would still be
        // decided.
        (Status::Pending, _) | (Status::Committed | Status::Other, None) => return Ruling::Record,
        (Status::Committed | Status::Other, Some(decision)) => decision,
    };
    if decision == asked.decision {
        if same_call {
            Ruling::Replay
        } else {
            Ruling::Duplicate
        }
    } else if recorded.closed {
        Ruling::Closed
    } else {
        Ruling::Conflict
    }
}

/// Whether this decision, this call and this actor are the ones on record, so that the request is
/// the call's own retry.
pub(crate) fn is_replay(
    record: &Record,
    decision: Decision,
    call_id: Option<&RequestId>,
    actor: &Actor,
) -> bool {
    record.action.decision == Some(decision) && is_same_call(record, call_id, actor)
}

/// Whether this call of this actor made the decision on record. A call id is the caller's to
/// choose, so another actor's call is another one, whatever its id.
pub(crate) fn is_same_call(record: &Record, call_id: Option<&RequestId>, actor: &Actor) -> bool {
    let call_id = call_id.map(canonical_call);
    call_id.is_some()
        && call_id.as_deref() == record.call_id.as_deref()
        && record.action.decided_by.as_deref() == Some(actor.as_str())
}

/// Whether two payloads differ. A missing payload matches any: a caller that sends only the key
/// means the payload on record.
pub(crate) fn payloads_differ(recorded: Option<&[u8; 32]>, asked: Option<&[u8; 32]>) -> bool {
    matches!((recorded, asked), (Some(recorded), Some(asked)) if recorded != asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Decision::{Approve, Reject};

    const ONE: [u8; 32] = [1; 32];
    const TWO: [u8; 32] = [2; 32];

    fn committed(decision: Decision) -> Recorded<'static> {
        Recorded {
            status: Status::Committed,
            decision: Some(decision),
            closed: false,
            digest: Some(&ONE),
            call_id: Some("call-1"),
        }
    }

    fn asks(decision: Decision) -> Asked<'static> {
        Asked {
            decision,
            digest: None,
            call_id: None,
        }
    }

    #[test]
    fn a_pending_or_failed_action_is_decided() {
        for status in [Status::Pending, Status::Failed] {
            for decision in [None, Some(Approve), Some(Reject)] {
                let recorded = Recorded {
                    status,
                    decision,
                    ..committed(Approve)
                };
                assert_eq!(rule(recorded, asks(Approve)), Ruling::Record);
            }
        }
    }

    #[test]
    fn only_the_recorded_call_itself_is_a_replay() {
        for (call_id, ruling) in [
            (Some("call-1"), Ruling::Replay),
            (Some("call-2"), Ruling::Duplicate),
            (None, Ruling::Duplicate),
        ] {
            let asked = Asked {
                call_id,
                ..asks(Approve)
            };
            assert_eq!(rule(committed(Approve), asked), ruling);
        }
        let unnamed = Recorded {
            call_id: None,
            ..committed(Approve)
        };
        assert_eq!(rule(unnamed, asks(Approve)), Ruling::Duplicate);
    }

    #[test]
    fn the_opposite_decision_is_a_conflict_even_from_the_same_call() {
        let asked = Asked {
            call_id: Some("call-1"),
            ..asks(Reject)
        };
        assert_eq!(rule(committed(Approve), asked), Ruling::Conflict);
    }

    #[test]
    fn a_closed_action_answers_closed_only_to_the_opposite_decision() {
        let expired = Recorded {
            closed: true,
            ..committed(Reject)
        };
        assert_eq!(rule(expired, asks(Approve)), Ruling::Closed);
        assert_eq!(rule(expired, asks(Reject)), Ruling::Duplicate);
    }

    #[test]
    fn another_payload_is_a_mismatch_before_anything_else() {
        for status in [Status::Pending, Status::Committed, Status::Failed] {
            let recorded = Recorded {
                status,
                ..committed(Approve)
            };
            let asked = Asked {
                digest: Some(&TWO),
                ..asks(Reject)
            };
            assert_eq!(rule(recorded, asked), Ruling::PayloadMismatch);
        }
    }

    #[test]
    fn no_payload_never_mismatches() {
        assert!(!payloads_differ(None, Some(&ONE)));
        assert!(!payloads_differ(Some(&ONE), None));
        assert!(!payloads_differ(Some(&ONE), Some(&ONE)));
        assert!(payloads_differ(Some(&ONE), Some(&TWO)));
    }
}
