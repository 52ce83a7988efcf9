//! Submissions, and what later ones find.

use super::{Stores, decision, id, payload, submission};
use crate::protocol::Decision::{Approve, Reject};
use crate::protocol::Status;
use crate::store::{Decided, Store, Submitted};

pub(super) async fn a_submitted_action_is_pending_until_it_is_decided<S: Store>(
    stores: &Stores<S>,
) {
    let mut request = submission("k");
    request.payload = payload(r#"{"n": 1}"#);
    let submitted = unwrap_variant!(stores.submit(0, request).await, Submitted::Recorded);
    assert_eq!(submitted.status, Status::Pending);
    assert_eq!((submitted.decision, submitted.decided_at), (None, None));
    assert_eq!(
        stores.find(1, id(&submitted)).await,
        Some(submitted.clone())
    );
    let totals = stores.totals().await;
    assert_eq!((totals.actions, totals.decisions, totals.events), (1, 0, 1));

    let decided = unwrap_variant!(
        stores.decide(1, decision("k", Reject)).await,
        Decided::Recorded
    );
    assert_eq!(decided.request_id, submitted.request_id);
    assert_eq!(decided.created_at, submitted.created_at);
    assert_eq!(decided.payload, submitted.payload);
    assert_eq!(decided.status, Status::Committed);
    assert_eq!(decided.decision, Some(Reject));
    assert_eq!(stores.find(2, id(&submitted)).await, Some(decided));
    let totals = stores.totals().await;
    assert_eq!((totals.actions, totals.decisions, totals.events), (1, 1, 2));
}

pub(super) async fn a_second_submission_finds_the_first<S: Store>(stores: &Stores<S>) {
    let mut request = submission("k");
    request.payload = payload(r#"{"a": 1, "b": 2}"#);
    let recorded = unwrap_variant!(stores.submit(0, request.clone()).await, Submitted::Recorded);
    for same in [r#"{"a": 1, "b": 2}"#, r#"{ "b": 2.0, "a": 1 }"#] {
        request.payload = payload(same);
        let existing =
            unwrap_variant!(stores.submit(1, request.clone()).await, Submitted::Existing);
        assert_eq!(existing, recorded);
    }
    request.payload = None;
    unwrap_variant!(stores.submit(2, request.clone()).await, Submitted::Existing);
    request.payload = payload(r#"{"a": 1}"#);
    let other = unwrap_variant!(stores.submit(0, request).await, Submitted::PayloadMismatch);
    assert_eq!(other, recorded);

    let decided = unwrap_variant!(
        stores.decide(1, decision("k", Approve)).await,
        Decided::Recorded
    );
    let existing = unwrap_variant!(stores.submit(2, submission("k")).await, Submitted::Existing);
    assert_eq!(existing, decided);
    assert_eq!(stores.totals().await.events, 2);
}
