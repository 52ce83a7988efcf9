//! Decisions by id, on what the reviewer saw, and cancellations.

use super::claims::{claim, failure, report};
use super::{Stores, decision, digest, id, payload, submission};
use crate::protocol::Decision::{self, Approve, Reject};
use crate::protocol::{Action, Closed, RequestId, Status};
use crate::store::{
    Acquire, Acquired, Actor, Cancel, Cancelled, Decide, DecideById, Decided, Finished, Store,
    Submission, Submit, Submitted,
};

pub(super) fn review(action: &Action, decision: Decision) -> DecideById {
    DecideById {
        id: id(action),
        tenant_id: action.tenant_id.clone().unwrap(),
        decision,
        call_id: Some(RequestId::mint()),
        digest: action.digest,
        edited: None,
        comment: None,
        actor: Actor::new("reviewer"),
        allow_self_approval: false,
    }
}

pub(super) fn cancellation(action: &Action) -> Cancel {
    Cancel {
        id: id(action),
        tenant_id: action.tenant_id.clone().unwrap(),
        call_id: Some(RequestId::mint()),
        actor: Actor::new("agent"),
        may_cancel_all: false,
    }
}

pub(super) async fn what_was_seen_is_decided<S: Store>(stores: &Stores<S>) {
    let pending = stores.submitted("k", payload(r#"{"n": 1}"#)).await;
    let blind = DecideById {
        digest: None,
        ..review(&pending, Approve)
    };
    let refused = stores.decide_by_id(0, blind).await;
    assert_eq!(
        unwrap_variant!(refused, Decided::DigestMissing),
        pending.clone()
    );
    let other = DecideById {
        digest: digest(r#"{"n": 2}"#),
        ..review(&pending, Reject)
    };
    let refused = stores.decide_by_id(1, other.clone()).await;
    assert_eq!(unwrap_variant!(refused, Decided::PayloadMismatch), pending);

    let request = DecideById {
        comment: Some("fine".to_owned()),
        ..review(&pending, Approve)
    };
    let recorded = stores.decide_by_id(0, request.clone()).await;
    let recorded = unwrap_variant!(recorded, Decided::Recorded);
    assert_eq!(recorded.status, Status::Committed);
    assert_eq!(recorded.decision, Some(Approve));
    assert_eq!(recorded.decided_by.as_deref(), Some("reviewer"));
    assert_eq!(recorded.comment, request.comment);
    assert_eq!(stores.find(1, id(&pending)).await, Some(recorded.clone()));
    // A call's own retry is answered whatever it saw.
    for digest in [request.digest, None, other.digest] {
        let retry = DecideById {
            digest,
            ..request.clone()
        };
        unwrap_variant!(stores.decide_by_id(2, retry).await, Decided::Replayed);
    }
    let again = stores.decide_by_id(0, review(&pending, Approve)).await;
    assert_eq!(unwrap_variant!(again, Decided::Duplicate), recorded.clone());
    let opposite = stores.decide_by_id(1, review(&pending, Reject)).await;
    assert_eq!(unwrap_variant!(opposite, Decided::Conflict), recorded);
    assert_eq!(stores.totals().await.events, 2);
}

pub(super) async fn what_the_reviewer_edited_is_what_is_run<S: Store>(stores: &Stores<S>) {
    let fixed = stores.submitted("k-1", payload(r#"{"n": 1}"#)).await;
    let edited = DecideById {
        edited: payload(r#"{"n": 2}"#),
        ..review(&fixed, Approve)
    };
    let refused = stores.decide_by_id(0, edited).await;
    assert_eq!(unwrap_variant!(refused, Decided::EditNotAllowed), fixed);

    let submit = Submit {
        payload: payload(r#"{"n": 1}"#),
        submission: Submission {
            allow_edit: true,
            ..Submission::default()
        },
        ..submission("k-2")
    };
    let pending = stores.submit(1, submit.clone()).await;
    let pending = unwrap_variant!(pending, Submitted::Recorded);
    let edited = DecideById {
        edited: payload(r#"{"n": 2}"#),
        ..review(&pending, Approve)
    };
    let recorded = stores.decide_by_id(2, edited.clone()).await;
    let recorded = unwrap_variant!(recorded, Decided::Recorded);
    assert_eq!(recorded.digest, digest(r#"{"n": 2}"#));
    assert_eq!(recorded.payload, pending.payload);
    let text = recorded.edited_payload.as_ref().unwrap().as_str();
    assert_eq!(text, r#"{"n": 2}"#);
    assert_eq!(stores.find(0, id(&pending)).await, Some(recorded.clone()));
    unwrap_variant!(
        stores.decide_by_id(1, edited.clone()).await,
        Decided::Replayed
    );
    let unedited = DecideById {
        edited: None,
        ..edited.clone()
    };
    let otherwise = DecideById {
        edited: payload(r#"{"n": 3}"#),
        ..edited
    };
    // The same call with another edit is no retry of it.
    for other in [unedited, otherwise] {
        for digest in [other.digest, recorded.digest] {
            let other = DecideById {
                digest,
                ..other.clone()
            };
            // Without an edit, and with the digest on record, it asks for what is there.
            let is_there = other.edited.is_none() && digest == recorded.digest;
            let answered = stores.decide_by_id(2, other).await;
            let answered = match is_there {
                true => unwrap_variant!(answered, Decided::Replayed),
                false => unwrap_variant!(answered, Decided::PayloadMismatch),
            };
            assert_eq!(answered.edited_payload, recorded.edited_payload);
        }
    }

    // Decisions are compared with what is on record, submissions with what was submitted.
    for (n, is_on_record) in [(1, false), (2, true)] {
        let sent = payload(&format!(r#"{{"n": {n}}}"#));
        let by_key = Decide {
            payload: sent.clone(),
            ..decision("k-2", Approve)
        };
        let decided = stores.decide(n, by_key).await;
        let submitted = stores
            .submit(
                n,
                Submit {
                    payload: sent,
                    ..submit.clone()
                },
            )
            .await;
        if is_on_record {
            unwrap_variant!(decided, Decided::Duplicate);
            unwrap_variant!(submitted, Submitted::PayloadMismatch);
        } else {
            unwrap_variant!(decided, Decided::PayloadMismatch);
            unwrap_variant!(submitted, Submitted::Existing);
        }
    }
    let stale = stores.decide_by_id(0, review(&pending, Approve)).await;
    unwrap_variant!(stale, Decided::PayloadMismatch);
    let edited_again = DecideById {
        edited: payload(r#"{"n": 3}"#),
        ..review(&recorded, Approve)
    };
    let refused = stores.decide_by_id(1, edited_again).await;
    unwrap_variant!(refused, Decided::PayloadMismatch);
    let original = Acquire {
        digest: pending.digest,
        ..claim(&pending)
    };
    unwrap_variant!(stores.acquire(2, original).await, Acquired::PayloadMismatch);
    stores.claimed(0, claim(&recorded)).await;
}

pub(super) async fn a_call_is_retried_by_its_own_actor_and_edit_alone<S: Store>(
    stores: &Stores<S>,
) {
    let submit = Submit {
        payload: payload(r#"{"n": 1}"#),
        submission: Submission {
            allow_edit: true,
            ..Submission::default()
        },
        ..submission("k-1")
    };
    let pending = stores.submit(0, submit).await;
    let pending = unwrap_variant!(pending, Submitted::Recorded);
    let approval = review(&pending, Approve);
    let recorded = stores.decide_by_id(1, approval.clone()).await;
    let recorded = unwrap_variant!(recorded, Decided::Recorded);
    let by_another = DecideById {
        actor: Actor::new("another reviewer"),
        ..approval.clone()
    };
    let answered = stores.decide_by_id(2, by_another).await;
    assert_eq!(unwrap_variant!(answered, Decided::Duplicate), recorded);
    let edited = DecideById {
        edited: payload(r#"{"n": 2}"#),
        ..approval.clone()
    };
    let answered = stores.decide_by_id(0, edited.clone()).await;
    unwrap_variant!(answered, Decided::PayloadMismatch);

    let by_key = decision("k-2", Approve);
    let first = stores.decide(1, by_key.clone()).await;
    unwrap_variant!(first, Decided::Recorded);
    let by_another = Decide {
        actor: Actor::new("another reviewer"),
        ..by_key
    };
    let answered = stores.decide(2, by_another).await;
    unwrap_variant!(answered, Decided::Duplicate);

    // The form of before the failure, with an edit: it neither counts as recorded nor decides anew.
    let (_, held) = stores.claimed(0, claim(&recorded)).await;
    let report = report(&recorded, &held, failure());
    unwrap_variant!(stores.finish(1, report).await, Finished::Recorded);
    let answered = stores.decide_by_id(2, edited).await;
    let failed = unwrap_variant!(answered, Decided::PayloadMismatch);
    assert_eq!(failed.status, Status::Failed);
    let answered = stores.decide_by_id(0, approval).await;
    let failed = unwrap_variant!(answered, Decided::Replayed);
    assert_eq!(failed.status, Status::Failed);
    assert_eq!(failed.edited_payload, None);
}

pub(super) async fn who_submitted_does_not_decide<S: Store>(stores: &Stores<S>) {
    let pending = stores.submitted("k", None).await;
    let own = DecideById {
        actor: Actor::new("agent"),
        ..review(&pending, Approve)
    };
    let refused = stores.decide_by_id(0, own.clone()).await;
    assert_eq!(
        unwrap_variant!(refused, Decided::SelfApproval),
        pending.clone()
    );
    let by_key = Decide {
        actor: Actor::new("agent"),
        allow_self_approval: false,
        ..decision("k", Reject)
    };
    unwrap_variant!(stores.decide(1, by_key).await, Decided::SelfApproval);
    assert_eq!(stores.totals().await.decisions, 0);
    let allowed = DecideById {
        allow_self_approval: true,
        ..own
    };
    unwrap_variant!(stores.decide_by_id(2, allowed).await, Decided::Recorded);
}

pub(super) async fn a_pending_action_is_cancelled<S: Store>(stores: &Stores<S>) {
    let pending = stores.submitted("k-1", payload(r#"{"n": 1}"#)).await;
    let request = cancellation(&pending);
    let other = Cancel {
        actor: Actor::new("another agent"),
        ..request.clone()
    };
    let refused = stores.cancel(0, other.clone()).await;
    assert_eq!(refused, Cancelled::Forbidden);
    let cancelled = stores.cancel(1, request.clone()).await;
    let cancelled = unwrap_variant!(cancelled, Cancelled::Recorded);
    assert_eq!(cancelled.status, Status::Committed);
    assert_eq!(cancelled.decision, Some(Reject));
    assert_eq!(cancelled.closed, Some(Closed::Cancelled));
    assert_eq!(cancelled.decided_by.as_deref(), Some("agent"));
    assert_eq!(stores.find(2, id(&pending)).await, Some(cancelled.clone()));
    unwrap_variant!(stores.cancel(0, request.clone()).await, Cancelled::Replayed);
    // A rejection under the call id of the cancellation is no retry of it.
    let by_key = Decide {
        call_id: request.call_id.clone(),
        ..decision("k-1", Reject)
    };
    let by_id = DecideById {
        call_id: request.call_id,
        ..review(&pending, Reject)
    };
    for again in [
        stores.decide(1, by_key).await,
        stores.decide_by_id(2, by_id).await,
    ] {
        assert_eq!(
            unwrap_variant!(again, Decided::Duplicate),
            cancelled.clone()
        );
    }
    let again = stores.cancel(1, cancellation(&pending)).await;
    assert_eq!(
        unwrap_variant!(again, Cancelled::Duplicate),
        cancelled.clone()
    );
    assert_eq!(stores.cancel(2, other).await, Cancelled::Forbidden);

    let approved = stores.decide(0, decision("k-1", Approve)).await;
    assert_eq!(
        unwrap_variant!(approved, Decided::Closed),
        cancelled.clone()
    );
    let rejected = stores.decide_by_id(1, review(&pending, Reject)).await;
    assert_eq!(
        unwrap_variant!(rejected, Decided::Duplicate),
        cancelled.clone()
    );
    let claimed = stores.acquire(2, claim(&pending)).await;
    assert_eq!(unwrap_variant!(claimed, Acquired::NotApproved), cancelled);

    let decided = stores.approved("k-2").await;
    let late = stores.cancel(0, cancellation(&decided)).await;
    assert_eq!(unwrap_variant!(late, Cancelled::Decided), decided);
    let pending = stores.submitted("k-3", None).await;
    let by_admin = Cancel {
        actor: Actor::new("admin"),
        may_cancel_all: true,
        ..cancellation(&pending)
    };
    unwrap_variant!(stores.cancel(1, by_admin).await, Cancelled::Recorded);
}
