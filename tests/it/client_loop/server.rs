//! The client against the server, over sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use aegis_hitl::client::{Approved, EventCursor, RunOutcome};
use aegis_hitl::protocol::{Closed, EventKind};
use aegis_hitl::{AegisService, Decision, Error, Execution, Status};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{digest, payload, service};
use crate::support::{Disk, HANG, Running, ends, start};

async fn served() -> (Running, AegisService) {
    let server = start(Disk::default()).await;
    let aegis = service(&format!("http://{}", server.addr));
    (server, aegis)
}

/// Waits until the action with the key is pending, and returns its id.
async fn pending(aegis: &AegisService) -> aegis_hitl::RequestId {
    let mut events = aegis.events().after(EventCursor::oldest()).stream();
    let submitted = ends(events.next()).await.unwrap().unwrap();
    assert_eq!(submitted.event.kind, EventKind::Submitted);
    submitted.event.action.unwrap().request_id
}

async fn work(approved: Approved) -> Result<Value, serde_json::Error> {
    approved.parse()
}

#[tokio::test]
async fn an_action_goes_through_the_loop() {
    let (server, aegis) = served().await;
    let submit = || aegis.submit("k-1").payload(&payload()).title("Pay");
    let action = submit().await.unwrap();
    let id = action.request_id;
    assert_eq!(
        (action.status, action.digest),
        (Status::Pending, Some(digest()))
    );
    assert_eq!(submit().await.unwrap().request_id, id);
    let other = aegis
        .submit("k-1")
        .payload(&json!({"n": 1}))
        .await
        .unwrap_err();
    assert!(other.is_payload_mismatch() && !other.is_outcome_unknown());
    let page = aegis.list().status(Status::Pending).limit(1).await.unwrap();
    assert_eq!((page.actions.len(), page.next_cursor), (1, None));

    let early = aegis.claim(id.clone()).digest(digest()).await.unwrap_err();
    assert!(early.is_not_approved());
    let wait = aegis.wait_for_decision(id.clone(), HANG).into_future();
    let waiting = tokio::spawn(wait);
    let unseen = aegis.approve_action(id.clone()).await.unwrap_err();
    assert!(unseen.is_refused(), "{unseen:?}");
    let approve = || aegis.approve_action(id.clone()).digest(digest());
    assert!(!approve().comment("ok").await.unwrap().is_duplicate());
    assert!(approve().await.unwrap().is_duplicate());
    let conflict = aegis
        .reject_action(id.clone())
        .digest(digest())
        .await
        .unwrap_err();
    assert!(conflict.is_conflict());
    let decided = ends(waiting).await.unwrap().unwrap();
    assert_eq!(decided.comment.as_deref(), Some("ok"));

    let claim = |call: &str| {
        aegis
            .claim(id.clone())
            .digest(digest())
            .call_id(call.to_owned())
    };
    let claimed = claim("call-1").await.unwrap();
    let token = claimed.claim.token;
    // Its own retry gets the same token, and another call nothing.
    assert_eq!(claim("call-1").await.unwrap().claim.token, token);
    let spent = claim("call-2").await.unwrap_err();
    assert!(spent.is_already_claimed() && !spent.is_outcome_unknown());
    aegis.renew(id.clone(), &token).await.unwrap();
    let closed = aegis.cancel(id.clone()).await.unwrap_err();
    assert!(closed.is_closed());
    let complete = || aegis.complete(id.clone(), &token).result(&[1]);
    assert_eq!(
        complete().await.unwrap().execution,
        Some(Execution::Completed)
    );
    assert!(complete().await.unwrap().replayed);
    let lost = aegis.fail(id.clone(), &token).await.unwrap_err();
    assert!(lost.is_claim_lost());
    let look = aegis.look(id.clone()).await.unwrap();
    assert_eq!(look.result.unwrap().as_str(), "[1]");
    assert_eq!(look.history.unwrap().len(), 4);

    let events = aegis.events().after(EventCursor::oldest()).stream();
    let kinds: Vec<_> = ends(
        events
            .take(4)
            .map(|event| event.unwrap().event.kind)
            .collect(),
    )
    .await;
    use EventKind::{Approved, Claimed, Completed, Submitted};
    assert_eq!(kinds, [Submitted, Approved, Claimed, Completed]);
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn a_cancelled_and_an_expired_action_are_not_run() {
    let (server, aegis) = served().await;
    let run = |key: &str| aegis.action(key.to_owned()).payload(&payload());
    let action = aegis.submit("k-1").payload(&payload()).await.unwrap();
    assert!(
        !aegis
            .cancel(action.request_id.clone())
            .await
            .unwrap()
            .is_duplicate()
    );
    assert!(
        aegis
            .cancel(action.request_id)
            .await
            .unwrap()
            .is_duplicate()
    );
    let outcome = ends(run("k-1").run_once(work)).await.unwrap();
    assert!(matches!(outcome, RunOutcome::Cancelled(_)), "{outcome:?}");

    let soon = SystemTime::now() + Duration::from_secs(1);
    let outcome = ends(run("k-2").expires_at(soon).run_once(work))
        .await
        .unwrap();
    let RunOutcome::Expired(action) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(
        (action.decision, action.closed),
        (Some(Decision::Reject), Some(Closed::Expired))
    );
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn an_edited_action_is_run_as_edited_and_only_once() {
    let (server, aegis) = served().await;
    let run = || {
        aegis
            .action("k-1")
            .payload(&payload())
            .allow_edit(true)
            .run_once(work)
    };
    let running = tokio::spawn(run());
    let id = pending(&aegis).await;
    let edited = json!({"amount": 1});
    let approve = aegis.approve_action(id).digest(digest());
    approve.edited_payload(&edited).await.unwrap();
    let outcome = ends(running).await.unwrap().unwrap();
    let RunOutcome::Completed { value, .. } = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(value, edited);
    let RunOutcome::AlreadyRun(action) = ends(run()).await.unwrap() else {
        panic!("it ran again");
    };
    assert_eq!(action.result.unwrap().parse::<Value>().unwrap(), edited);
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn an_action_that_is_edited_to_nothing_is_run_as_nothing() {
    let (server, aegis) = served().await;
    let run = aegis.action("k-1").payload(&payload()).allow_edit(true);
    let running = tokio::spawn(run.run_once(work));
    let id = pending(&aegis).await;
    let approve = aegis.approve_action(id).digest(digest());
    approve.edited_payload(&json!({})).await.unwrap();
    let outcome = ends(running).await.unwrap().unwrap();
    let RunOutcome::Completed { value, .. } = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(value, json!({}));
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn of_many_processes_with_one_key_one_runs_it() {
    let (server, aegis) = served().await;
    let ran = Arc::new(AtomicUsize::new(0));
    let runs: Vec<_> = (0..8)
        .map(|_| {
            let ran = ran.clone();
            // Each with connections of its own.
            let aegis = service(&format!("http://{}", server.addr));
            tokio::spawn(
                aegis
                    .action("k-1")
                    .payload(&payload())
                    .run_once(
                        |_| async move { Ok::<_, Error>(ran.fetch_add(1, Ordering::SeqCst)) },
                    ),
            )
        })
        .collect();
    let id = pending(&aegis).await;
    aegis.approve_action(id).digest(digest()).await.unwrap();
    let mut completed = 0;
    for run in runs {
        match ends(run).await.unwrap().unwrap() {
            RunOutcome::Completed { .. } => completed += 1,
            RunOutcome::AlreadyRun(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((completed, ran.load(Ordering::SeqCst)), (1, 1));
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn a_run_that_dies_is_not_run_again_before_another_approval() {
    let (server, aegis) = served().await;
    let action = aegis.submit("k-1").payload(&payload()).await.unwrap();
    let id = action.request_id;
    let approve = || aegis.approve_action(id.clone()).digest(digest());
    approve().await.unwrap();
    let call = || {
        aegis
            .action("k-1")
            .payload(&payload())
            .lease(Duration::from_secs(1))
    };
    let (began, begun) = oneshot::channel();
    let dies = tokio::spawn(call().run_once(|_| async move {
        began.send(()).unwrap();
        std::future::pending::<Result<(), Error>>().await
    }));
    ends(begun).await.unwrap();
    dies.abort();
    assert!(ends(dies).await.unwrap_err().is_cancelled());
    let RunOutcome::AlreadyRun(_) = ends(call().run_once(work)).await.unwrap() else {
        panic!("it ran again");
    };
    // Its lease ends.
    let events = aegis.events().after(EventCursor::oldest()).stream();
    let lost = events.filter(|event| {
        let kind = event.as_ref().unwrap().event.kind;
        std::future::ready(kind == EventKind::ClaimLost)
    });
    ends(Box::pin(lost).next()).await.unwrap().unwrap();
    let RunOutcome::AlreadyRun(action) = ends(call().run_once(work)).await.unwrap() else {
        panic!("it ran again");
    };
    assert_eq!(action.execution, Some(Execution::Unknown));
    // A human decides that it runs again.
    assert!(!approve().await.unwrap().is_duplicate());
    let RunOutcome::Completed { value, .. } = ends(call().run_once(work)).await.unwrap() else {
        panic!("it did not run");
    };
    assert_eq!(value, payload());
    assert!(server.stop().await.is_drained());
}
