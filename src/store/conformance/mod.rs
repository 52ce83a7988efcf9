//! The suite that every [`Store`] must pass.
//!
//! ```
//! # #[tokio::main] async fn main() {
//! use aegis_hitl::store::{MemoryStore, conformance};
//!
//! conformance::run(|| async { MemoryStore::new() }).await;
//! # }
//! ```

// A failed case panics, as a failed test does.
#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    clippy::panic,
    clippy::unwrap_used
)]

/// Returns what a variant holds.
macro_rules! unwrap_variant {
    ($value:expr, $variant:path) => {
        match $value {
            $variant(action) => action,
            other => panic!("not {}: {other:?}", stringify!($variant)),
        }
    };
}

mod backlog;
mod calls;
mod claims;
mod decisions;
mod deliveries;
mod expiry;
mod reads;
mod retention;
mod reviews;
mod submissions;
mod watching;

use std::future::Future;
use std::task::Poll;
use std::time::Duration;

use uuid::Uuid;

use super::{
    Acquire, Acquired, Actor, Cancel, Cancelled, Decide, DecideById, Decided, Fingerprinted,
    Finish, Finished, Identity, Renew, Renewed, Store, Submission, Submit, Submitted, Totals,
};
use crate::protocol::{Action, Decision, Digest, Payload, RequestId};

/// Far longer than any case takes. It only keeps a lost wake-up from hanging the suite.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs every case against a store.
///
/// `open` opens an empty store, which nothing else may use. The suite needs a tokio runtime whose
/// clock is not paused.
///
/// # Panics
///
/// If the store breaks the contract of [`Store`]. The panic's message and location name the case.
pub async fn run<S, F, Fut>(open: F)
where
    S: Store,
    F: Fn() -> Fut,
    Fut: Future<Output = S>,
{
    run_together(|| async { vec![open().await] }).await;
}

macro_rules! cases {
    ($open:expr, $($case:path),+ $(,)?) => {
        $({
            let stores = Stores($open().await);
            assert!(!stores.0.is_empty(), "there is no store to test");
            $case(&stores).await;
            stores.agree().await;
        })+
    };
}

/// Runs every case against several stores that share their records, as servers on one database do.
///
/// `open` opens stores on the same records, which must be empty. The cases spread their calls over
/// all of these stores.
///
/// # Panics
///
/// As [`run`].
pub async fn run_together<S, F, Fut>(open: F)
where
    S: Store,
    F: Fn() -> Fut,
    Fut: Future<Output = Vec<S>>,
{
    cases!(
        open,
        decisions::a_first_decision_is_recorded_and_found,
        decisions::the_same_call_is_replayed_and_another_is_a_duplicate,
        decisions::the_opposite_decision_is_a_conflict,
        submissions::a_submitted_action_is_pending_until_it_is_decided,
        submissions::a_second_submission_finds_the_first,
        decisions::only_what_was_submitted_is_decided_where_that_is_required,
        decisions::another_payload_is_a_mismatch,
        decisions::a_payload_is_kept_as_it_was_sent,
        decisions::tenants_threads_and_keys_do_not_meet,
        calls::a_call_id_finds_the_one_action_that_it_names,
        calls::a_tenants_call_id_is_its_own,
        calls::a_call_id_of_any_form_tells_a_retry,
        watching::a_decision_wakes_who_waits_for_it,
        watching::every_event_wakes_who_waits_for_all,
        decisions::of_many_calls_one_is_recorded,
        reviews::what_was_seen_is_decided,
        reviews::what_the_reviewer_edited_is_what_is_run,
        reviews::a_call_is_retried_by_its_own_actor_and_edit_alone,
        reviews::who_submitted_does_not_decide,
        reviews::a_pending_action_is_cancelled,
        claims::an_approval_is_spent_once,
        claims::only_what_was_approved_is_claimed,
        claims::the_holder_alone_renews_and_reports,
        claims::what_failed_is_decided_and_claimed_again,
        claims::a_late_copy_of_an_approval_does_not_approve_again,
        claims::a_lease_that_ends_leaves_the_outcome_unknown,
        claims::a_call_of_an_earlier_round_spends_nothing,
        claims::a_claims_own_retry_is_about_the_same_payload,
        claims::of_many_claimants_one_wins,
        expiry::an_action_expires_by_itself,
        expiry::what_the_first_submission_said_holds,
        expiry::a_submission_behind_its_end_is_not_recorded,
        expiry::a_claim_shows_its_end_as_it_is_kept,
        expiry::a_decision_and_an_expiry_race_and_one_wins,
        reads::a_list_is_filtered_and_in_order,
        reads::tenants_are_read_in_order_once_each,
        reads::pages_stay_right_while_actions_come_and_go,
        reads::each_transition_has_one_event_in_order,
        reads::tenants_do_not_meet_in_any_operation,
        backlog::the_oldest_of_all_tenants_tell_how_long_they_waited,
        decisions::a_dropped_call_is_settled_by_asking_again,
        deliveries::events_of_all_tenants_come_in_order,
        deliveries::a_new_endpoint_begins_now_or_at_the_oldest_event,
        deliveries::one_holder_at_a_time_delivers,
        deliveries::what_fails_is_parked_and_its_successors_wait,
        deliveries::a_mark_that_is_sent_again_changes_nothing_more,
        deliveries::what_is_given_up_is_a_dead_letter_until_it_is_resent,
        deliveries::a_stopped_endpoint_takes_nothing_until_it_is_resumed,
        deliveries::what_would_wait_for_longer_than_any_wait_is_due,
        deliveries::an_endpoint_is_forgotten_unless_it_is_held,
        deliveries::endpoints_do_not_meet,
        a_check_passes_and_leaves_nothing_on_record,
    );
}

/// Runs the cases of [`sweep`](Store::sweep), for stores that do not keep everything, as
/// [`run_together`] runs the others.
///
/// # Panics
///
/// As [`run`].
pub async fn run_retention<S, F, Fut>(open: F)
where
    S: Store,
    F: Fn() -> Fut,
    Fut: Future<Output = Vec<S>>,
{
    cases!(
        open,
        retention::what_is_over_goes_and_all_else_stays,
        retention::what_went_is_never_decided_again,
        retention::an_edited_payload_is_told_from_the_submitted_one,
        retention::a_key_of_two_tenants_goes_for_each_alone,
        retention::nothing_goes_before_its_time,
        retention::the_newest_stays_so_that_no_number_comes_twice,
        retention::what_went_makes_no_call_ambiguous,
        retention::a_sweep_goes_in_steps,
        retention::an_event_that_an_endpoint_has_not_had_keeps_its_action,
        retention::a_parked_event_keeps_its_action_and_a_dead_letter_does_not,
        retention::an_endpoint_that_is_given_up_keeps_nothing,
        retention::decisions_during_sweeps_are_recorded_once,
    );
}

struct Stores<S>(Vec<S>);

impl<S: Store> Stores<S> {
    fn at(&self, index: usize) -> &S {
        &self.0[index % self.0.len()]
    }

    async fn decide(&self, index: usize, request: Decide) -> Decided {
        let decided = self.at(index).decide(request).await;
        decided.expect("a decision was answered")
    }

    async fn submit(&self, index: usize, request: Submit) -> Submitted {
        let submitted = self.at(index).submit(request).await;
        submitted.expect("a submission was answered")
    }

    async fn decide_by_id(&self, index: usize, request: DecideById) -> Decided {
        let decided = self.at(index).decide_by_id(request).await;
        decided.expect("a decision by id was answered")
    }

    async fn cancel(&self, index: usize, request: Cancel) -> Cancelled {
        let cancelled = self.at(index).cancel(request).await;
        cancelled.expect("a cancellation was answered")
    }

    async fn acquire(&self, index: usize, request: Acquire) -> Acquired {
        let acquired = self.at(index).acquire(request).await;
        acquired.expect("a claim was answered")
    }

    async fn renew(&self, index: usize, request: Renew) -> Renewed {
        let renewed = self.at(index).renew(request).await;
        renewed.expect("a renewal was answered")
    }

    async fn finish(&self, index: usize, request: Finish) -> Finished {
        let finished = self.at(index).finish(request).await;
        finished.expect("a report was answered")
    }

    /// A pending action.
    async fn submitted(&self, key: &str, payload: Option<Fingerprinted>) -> Action {
        let submit = Submit {
            payload,
            ..submission(key)
        };
        unwrap_variant!(self.submit(0, submit).await, Submitted::Recorded)
    }

    /// Approves the action with a key.
    async fn approve(&self, key: &str) -> Action {
        let decided = self.decide(1, decision(key, Decision::Approve)).await;
        unwrap_variant!(decided, Decided::Recorded)
    }

    /// An action with a payload that was submitted and approved.
    async fn approved(&self, key: &str) -> Action {
        self.submitted(key, payload(r#"{"n": 1}"#)).await;
        self.approve(key).await
    }

    async fn find(&self, index: usize, id: Uuid) -> Option<Action> {
        self.at(index)
            .find(id, None)
            .await
            .expect("a read was answered")
    }

    async fn totals(&self) -> Totals {
        self.at(0).totals().await.expect("totals were answered")
    }

    /// Holds after every case: each transition has an event, and all stores see the same records.
    async fn agree(&self) {
        let totals = self.totals().await;
        assert!(totals.events >= totals.actions, "{totals:?}");
        for store in &self.0 {
            assert_eq!(store.totals().await.unwrap(), totals);
        }
    }
}

fn identity(tenant: &str, thread: &str, key: &str) -> Identity {
    Identity {
        tenant_id: tenant.parse().unwrap(),
        thread_id: thread.parse().unwrap(),
        idempotency_key: key.parse().unwrap(),
    }
}

fn payload(json: &str) -> Option<Fingerprinted> {
    Some(Fingerprinted::new(Payload::from_json(json).unwrap()).unwrap())
}

fn digest(json: &str) -> Option<Digest> {
    payload(json).map(|payload| Digest::from(*payload.digest()))
}

fn decision(key: &str, decision: Decision) -> Decide {
    Decide {
        identity: identity("tenant", "thread", key),
        decision,
        call_id: Some(RequestId::mint()),
        payload: None,
        comment: None,
        actor: Actor::new("reviewer"),
        require_submission: false,
        allow_self_approval: true,
    }
}

fn submission(key: &str) -> Submit {
    Submit {
        identity: identity("tenant", "thread", key),
        call_id: Some(RequestId::mint()),
        payload: None,
        submission: Submission::default(),
        only_existing: false,
        actor: Actor::new("agent"),
    }
}

fn id(action: &Action) -> Uuid {
    let id = action.request_id.as_uuid();
    id.expect("the store's id is a UUID")
}

/// Polls a future once and drops it.
async fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|context| {
        Poll::Ready(match future.as_mut().poll(context) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        })
    })
    .await
}

async fn a_check_passes_and_leaves_nothing_on_record<S: Store>(stores: &Stores<S>) {
    for store in &stores.0 {
        store.check().await.expect("a check passed");
    }
    assert_eq!(stores.totals().await, Totals::default());
}
