//! Commits that are not known to be one.

use std::sync::Arc;
use std::time::Duration;

use aegis_hitl::Decision::Approve;
use aegis_hitl::RequestId;
use aegis_hitl::protocol::EventKind;
use aegis_hitl::store::{
    Acquire, Acquired, Decide, DecideById, Decided, Finish, Finished, PostgresStore, Report, Store,
    Submission, Submit, Submitted,
};

use super::proxy::{Cut, Proxy};
use super::standby::{WAITING, cut_off_standbys, set_standbys};
use super::{actor, decision, id, identity, name_of, record};
use crate::support::HANG;
use crate::support::postgres::{Postgres, connect};

const CUTS: [Cut; 3] = [Cut::Before, Cut::After, Cut::Late];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_connection_that_is_lost_at_a_commit_never_makes_a_wrong_answer() {
    let server = Postgres::shared();
    let url = server.database().await;
    let proxy = Proxy::start(server.socket()).await;
    let store = PostgresStore::connect(proxy.url(name_of(&url)))
        .await
        .unwrap();
    let mut cuts = 0;
    for (number, cut) in CUTS.into_iter().enumerate() {
        for call_id in [None, Some(RequestId::mint())] {
            // A new action, which is recorded in a batch.
            let key = format!("new-{number}-{}", call_id.is_some());
            let request = Decide {
                call_id: call_id.clone(),
                ..decision(&key)
            };
            proxy.arm(cut).await;
            let Decided::Recorded(action) = store.decide(request).await.unwrap() else {
                panic!("{cut:?}: what this call recorded is not a duplicate");
            };
            cuts += 1;
            assert_eq!(proxy.cuts(), cuts, "{cut:?}");
            let kinds = history(&store, &action).await;
            assert_eq!(kinds, [EventKind::Approved], "{cut:?}");

            // An action that is on record.
            let key = format!("known-{number}-{}", call_id.is_some());
            let submit = Submit {
                identity: identity(&key),
                call_id: None,
                payload: None,
                submission: Submission::default(),
                only_existing: false,
                actor: actor(),
            };
            let Submitted::Recorded(action) = store.submit(submit).await.unwrap() else {
                panic!("it is new");
            };
            let review = DecideById {
                id: id(&action),
                tenant_id: identity(&key).tenant_id,
                decision: Approve,
                call_id: call_id.clone(),
                digest: None,
                edited: None,
                comment: None,
                actor: actor(),
                allow_self_approval: true,
            };
            proxy.arm(cut).await;
            let decided = store.decide_by_id(review).await.unwrap();
            assert!(
                matches!(decided, Decided::Recorded(_)),
                "{cut:?}: {decided:?}"
            );
            let acquire = Acquire {
                id: id(&action),
                tenant_id: identity(&key).tenant_id,
                digest: None,
                lease: HANG,
                call_id: call_id.clone(),
                actor: actor(),
            };
            proxy.arm(cut).await;
            let Acquired::Claimed(_, claim) = store.acquire(acquire).await.unwrap() else {
                panic!("{cut:?}: the claim is the caller's");
            };
            let finish = Finish {
                id: id(&action),
                tenant_id: identity(&key).tenant_id,
                token: claim.token.clone(),
                report: Report::Completed(None),
                call_id: call_id.clone(),
                actor: actor(),
            };
            proxy.arm(cut).await;
            let finished = store.finish(finish).await.unwrap();
            assert!(
                matches!(finished, Finished::Recorded(_)),
                "{cut:?}: {finished:?}"
            );
            cuts += 3;
            assert_eq!(proxy.cuts(), cuts, "{cut:?}");
            let expected = [
                EventKind::Submitted,
                EventKind::Approved,
                EventKind::Claimed,
                EventKind::Completed,
            ];
            assert_eq!(history(&store, &action).await, expected, "{cut:?}");
        }
    }
    let totals = store.totals().await.unwrap();
    assert_eq!((totals.actions, totals.events), (12, 6 + 6 * 4));
    let events = store.all_events(0, 100).await.unwrap();
    assert_eq!(events.len() as u64, totals.events);
}

async fn history(store: &PostgresStore, action: &aegis_hitl::Action) -> Vec<EventKind> {
    let tenant = action.tenant_id.as_ref().unwrap();
    let found = store.look_up(id(action), tenant).await.unwrap().unwrap();
    let history = found.history.unwrap();
    history.iter().map(|event| event.kind).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_no_standby_has_is_neither_acknowledged_nor_shown() {
    without_standby("pg_cancel_backend", &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_no_standby_has_is_not_acknowledged_where_the_database_is_told_not_to_warn() {
    without_standby("pg_cancel_backend", &["client_min_messages = error"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_session_left_behind_that_was_ended_is_neither_acknowledged_nor_shown() {
    without_standby("pg_terminate_backend", &[]).await;
}

async fn without_standby(how: &'static str, settings: &[&str]) {
    // A server of its own: the setting is that of the whole server.
    let server = Postgres::start(settings);
    let url = server.database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let operator = connect(&url).await;
    cut_off_standbys(&operator).await;
    let deadline = tokio::time::Instant::now() + HANG;
    let canceller = {
        let operator = connect(&url).await;
        tokio::spawn(async move {
            while tokio::time::Instant::now() < deadline {
                let cancel = format!("SELECT {how}(pid) {WAITING}");
                operator.batch_execute(&cancel).await.unwrap();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
    };
    let request = Decide {
        call_id: Some(RequestId::mint()),
        ..decision("k")
    };
    let decided = store.decide(request.clone()).await;
    assert!(decided.unwrap_err().is_unavailable(), "{how}");
    // The row can be seen, and may still be lost.
    let visible = operator
        .query_one("SELECT count(*) FROM action", &[])
        .await
        .unwrap();
    assert_eq!(visible.get::<_, i64>(0), 1, "{how}");
    let call: uuid::Uuid = request.call_id.as_ref().unwrap().as_uuid().unwrap();
    let found = store.find(call, None).await;
    assert!(found.unwrap_err().is_unavailable(), "{how}");
    let other = Decide {
        call_id: Some(RequestId::mint()),
        ..decision("k")
    };
    let duplicate = store.decide(other.clone()).await;
    assert!(duplicate.unwrap_err().is_unavailable(), "{how}");
    assert!(store.check().await.unwrap_err().is_unavailable(), "{how}");

    canceller.abort();
    set_standbys(&operator, "").await;
    let decided = store.decide(request).await.unwrap();
    assert!(
        matches!(decided, Decided::Replayed(_)),
        "{how}: {decided:?}"
    );
    let duplicate = store.decide(other).await.unwrap();
    assert!(
        matches!(duplicate, Decided::Duplicate(_)),
        "{how}: {duplicate:?}"
    );
    assert!(store.find(call, None).await.unwrap().is_some());
    assert_eq!(store.all_events(0, 10).await.unwrap().len(), 1);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_decision_is_durable_where_commits_are_told_later_not_to_wait_for_the_disk() {
    // Nothing else brings the log to the disk meanwhile.
    let server = Postgres::start(&["wal_writer_delay = 10s"]);
    let url = server.database().await;
    let store = PostgresStore::builder(&url).connections(2).connect().await;
    let store = store.unwrap();
    let operator = connect(&url).await;
    for sql in [
        "ALTER SYSTEM SET synchronous_commit = off",
        "SELECT pg_reload_conf()",
    ] {
        operator.batch_execute(sql).await.unwrap();
    }
    let deadline = tokio::time::Instant::now() + HANG;
    loop {
        let shown = operator.query_one("SHOW synchronous_commit", &[]).await;
        if shown.unwrap().get::<_, String>(0) == "off" {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline);
    }
    let mut actions = Vec::new();
    for number in 0..8 {
        actions.push(record(&store, &format!("k-{number}")).await);
    }
    server.stop();
    server.run();
    let store = PostgresStore::connect(&url).await.unwrap();
    for action in actions {
        assert!(store.find(id(&action), None).await.unwrap().is_some());
    }
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn decisions_go_on_when_the_database_is_back_after_a_crash() {
    let server = Arc::new(Postgres::start(&[]));
    let url = server.database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let mut recorded = 0;
    for round in 0..3 {
        let mut deciding = Vec::new();
        for number in 0..64 {
            let (store, request) = (store.clone(), decision(&format!("k-{round}-{number}")));
            deciding.push(tokio::spawn(async move { store.decide(request).await }));
        }
        tokio::task::yield_now().await;
        let restarting = server.clone();
        let restarting = tokio::task::spawn_blocking(move || {
            restarting.stop();
            restarting.run();
        });
        let answers = futures_util::future::join_all(deciding).await;
        restarting.await.unwrap();
        let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
        for answer in answers.iter().flatten() {
            assert!(matches!(answer, Decided::Recorded(_)), "{answer:?}");
        }
        // What was refused is settled by asking again.
        for (number, answer) in answers.iter().enumerate() {
            let request = decision(&format!("k-{round}-{number}"));
            let mut decided = store.decide(request.clone()).await;
            for _ in 0..20 {
                if decided.is_ok() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                decided = store.decide(request.clone()).await;
            }
            let was_recorded = matches!(answer, Ok(Decided::Recorded(_)));
            match decided.unwrap() {
                Decided::Recorded(_) => assert!(!was_recorded, "an acknowledged decision is lost"),
                Decided::Duplicate(_) | Decided::Replayed(_) => {}
                other => panic!("{other:?}"),
            }
            recorded += 1;
        }
        assert_eq!(store.totals().await.unwrap().events, recorded);
    }
}
