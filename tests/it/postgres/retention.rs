//! Removing what is over, where several servers share the records.

use std::collections::HashSet;
use std::time::Duration;

use aegis_hitl::store::{
    Acquire, Acquired, Clock, Decide, DecideById, Decided, Fingerprinted, List, PostgresStore,
    Store, Submission, Submit, Submitted, Sweep, Swept,
};
use aegis_hitl::{Decision, Payload, RequestId};
use tokio_postgres::Client;

use super::{actor, decision, id, identity, list, record};
use crate::retention::{
    HOUR, approve, goes_once_delivered, is_there, steps, submit, sweep, table, until,
};
use crate::support::ends;
use crate::support::postgres::{Postgres, connect};

async fn stores<const N: usize>() -> ([PostgresStore; N], Client) {
    let url = Postgres::shared().database().await;
    let mut stores = Vec::new();
    for _ in 0..N {
        stores.push(PostgresStore::connect(&url).await.unwrap());
    }
    (stores.try_into().unwrap(), connect(&url).await)
}

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

fn submission(key: &str) -> Submit {
    Submit {
        identity: identity(key),
        call_id: None,
        payload: None,
        submission: Submission::default(),
        only_existing: false,
        actor: actor(),
    }
}

/// One step, of whatever is over.
fn step() -> Sweep {
    Sweep {
        retention: Duration::ZERO,
        limit: 1024,
    }
}

/// Every position is that of an event on record, or of one that a sweep removed, and every tombstone
/// is counted.
async fn adds_up(client: &Client) {
    let wrong = "SELECT count(*) FROM ( \
         SELECT p FROM publisher, generate_series(1, position) AS p \
         EXCEPT (SELECT position FROM swept UNION ALL SELECT f.position FROM feed f JOIN event e \
         ON e.event_id = f.event_id)) AS lost";
    assert_eq!(number(client, wrong).await, 0, "an event is lost");
    let both = "SELECT count(*) FROM swept JOIN feed USING (position)";
    assert_eq!(number(client, both).await, 0);
    let counted = "SELECT (SELECT count(removed_at) FROM action) - (SELECT tombstones FROM sweep)";
    assert_eq!(number(client, counted).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_removed_is_answered_by_key_and_unknown_by_id() {
    let ([store], _) = stores().await;
    table(store.clone()).await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_steps_back_delays_a_removal_and_hastens_none() {
    let clock = Clock::standing_at(std::time::SystemTime::now());
    let url = Postgres::shared().database().await;
    let builder = PostgresStore::builder(url).clock(clock.clone());
    let store = builder.connect().await.unwrap();
    steps(&store, &clock).await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_goes_only_once_its_webhook_has_had_its_events() {
    let ([store], _) = stores().await;
    goes_once_delivered(&store).await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_was_written_stays_in_a_tombstone() {
    let ([store], client) = stores().await;
    let submit_it = Submit {
        payload: Some(payload(r#"{"n": 1}"#)),
        submission: Submission {
            title: Some("a title".to_owned()),
            expires_at: Some(std::time::SystemTime::now() + HOUR),
            allow_edit: true,
        },
        ..submission("k")
    };
    let Submitted::Recorded(action) = store.submit(submit_it).await.unwrap() else {
        panic!("it is not new");
    };
    let decide = DecideById {
        id: id(&action),
        tenant_id: identity("k").tenant_id,
        decision: Decision::Approve,
        call_id: Some(RequestId::mint()),
        digest: action.digest,
        edited: Some(payload(r#"{"n": 2}"#)),
        comment: Some("a comment".to_owned()),
        actor: actor(),
        allow_self_approval: true,
    };
    let decided = store.decide_by_id(decide).await.unwrap();
    assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
    submit(&store).await;
    assert_eq!(sweep(&store, Duration::ZERO).await, 1);
    let left = "SELECT array_to_string(array(SELECT key FROM jsonb_each(to_jsonb(a)) \
         WHERE value <> 'null' ORDER BY key), ' ') FROM action a WHERE removed_at IS NOT NULL";
    let left: String = client.query_one(left, &[]).await.unwrap().get(0);
    assert_eq!(
        left,
        "created_at decided_at decision digest edited_digest events idempotency_key removed_at \
         request_id state status tenant_id thread_id"
    );
    adds_up(&client).await;
    store.close().await;
}

fn payload(json: &str) -> Fingerprinted {
    Fingerprinted::new(Payload::from_json(json).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_of_a_store_with_nothing_to_remove_locks_and_writes_nothing() {
    let ([store], client) = stores().await;
    approve(&store, "k").await;
    submit(&store).await;
    let nothing = Swept {
        removed: 0,
        has_more: false,
    };
    for _ in 0..5 {
        let sweep = Sweep {
            retention: HOUR,
            ..step()
        };
        assert_eq!(store.sweep(sweep).await.unwrap(), nothing);
    }
    let touched = "SELECT count(*) FROM sweep WHERE xmax <> 0";
    assert_eq!(number(&client, touched).await, 0);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_servers_that_sweep_at_once_remove_each_action_once() {
    const KEYS: usize = 1500;
    let (stores, client) = stores::<2>().await;
    let deciding = (0..KEYS).map(|key| {
        let store = stores[key % 2].clone();
        tokio::spawn(async move { record(&store, &format!("k-{key}")).await })
    });
    futures_util::future::join_all(deciding).await;
    submit(&stores[0]).await;
    let sweeping = stores.clone().map(|store| {
        tokio::spawn(async move {
            let (mut removed, mut idle) = (0, 0);
            while idle < 20 {
                let swept = store.sweep(step()).await.unwrap();
                removed += swept.removed;
                idle += usize::from(!swept.has_more);
            }
            removed
        })
    });
    let mut removed = Vec::new();
    for swept in sweeping {
        removed.push(swept.await.unwrap());
    }
    assert_eq!(removed.iter().sum::<usize>(), KEYS, "{removed:?}");
    let counted = stores.iter().map(|store| store.statistics().removed);
    assert_eq!(counted.sum::<u64>(), KEYS as u64);
    assert_eq!(
        stores[1].backlog().await.unwrap().tombstones,
        Some(KEYS as u64)
    );
    assert_eq!(stores[0].totals().await.unwrap().actions, 1, "{removed:?}");
    adds_up(&client).await;
    for store in stores {
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_another_keeps_from_sweeping_does_not_wait() {
    let ([store], client) = stores().await;
    approve(&store, "k").await;
    submit(&store).await;
    let hold = "BEGIN; SELECT FROM sweep FOR UPDATE";
    client.batch_execute(hold).await.unwrap();
    let swept = ends(store.sweep(step())).await.unwrap();
    assert_eq!((swept.removed, swept.has_more), (0, false));
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(store.sweep(step()).await.unwrap().removed, 1);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_somebody_is_at_stays_until_the_next_time() {
    let ([store], client) = stores().await;
    let [first, second] = [approve(&store, "k-1").await, approve(&store, "k-2").await];
    submit(&store).await;
    let hold = format!("BEGIN; SELECT FROM action WHERE request_id = '{first}' FOR UPDATE");
    client.batch_execute(&hold).await.unwrap();
    // It waits for nobody.
    let begun = std::time::Instant::now();
    assert_eq!(ends(sweep(&store, Duration::ZERO)).await, 1);
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert!(is_there(&store, first).await && !is_there(&store, second).await);
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(sweep(&store, Duration::ZERO).await, 1);
    assert!(!is_there(&store, first).await);
    adds_up(&client).await;
    store.close().await;
}

/// How many wait for a lock in this database.
async fn waiting(client: &Client) -> i64 {
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                   AND wait_event_type = 'Lock'";
    number(client, waiting).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_comes_while_an_action_is_removed_finds_its_tombstone() {
    let ([here, there], client) = stores().await;
    let action = record(&here, "k").await;
    submit(&here).await;
    here.newest_event().await.unwrap();
    // The step comes to a stand when it has stripped the action, and before it commits.
    let hold = "BEGIN; SELECT FROM feed FOR UPDATE";
    client.batch_execute(hold).await.unwrap();
    let sweeping = tokio::spawn(async move { here.sweep(step()).await });
    until(async || waiting(&client).await == 1).await;
    let requests = {
        let (tenant_id, of) = (identity("k").tenant_id, id(&action));
        let acquire = Acquire {
            id: of,
            tenant_id: tenant_id.clone(),
            digest: None,
            lease: HOUR,
            call_id: None,
            actor: actor(),
        };
        let by_id = DecideById {
            id: of,
            tenant_id,
            decision: Decision::Reject,
            call_id: None,
            digest: None,
            edited: None,
            comment: None,
            actor: actor(),
            allow_self_approval: true,
        };
        let same = decision("k");
        let other = Decide {
            decision: Decision::Reject,
            ..decision("k")
        };
        let store = there.clone();
        tokio::spawn(async move {
            tokio::join!(
                store.decide(same),
                store.decide(other),
                store.submit(submission("k")),
                store.decide_by_id(by_id),
                store.acquire(acquire),
            )
        })
    };
    // Those by key take turns, and so do those by id.
    until(async || waiting(&client).await == 3).await;
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(ends(sweeping).await.unwrap().unwrap().removed, 1);
    let (same, other, submitted, by_id, acquired) = ends(requests).await.unwrap();
    let Decided::Duplicate(left) = same.unwrap() else {
        panic!("decided again");
    };
    assert_eq!(left.request_id, action.request_id);
    assert_eq!(
        (left.decided_by, left.decided_at),
        (None, action.decided_at)
    );
    assert!(matches!(other.unwrap(), Decided::Conflict(_)));
    assert!(matches!(submitted.unwrap(), Submitted::Existing(_)));
    assert!(matches!(by_id.unwrap(), Decided::NotFound));
    assert!(matches!(acquired.unwrap(), Acquired::NotFound));
    adds_up(&client).await;
    there.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_is_resent_while_a_sweep_begins_keeps_its_action() {
    let ([store], client) = stores().await;
    let action = approve(&store, "k").await;
    submit(&store).await;
    store.newest_event().await.unwrap();
    let dead = "INSERT INTO endpoint (name, position, holder, held_until) \
                VALUES ('a', 2, gen_random_uuid(), now() + interval '1 hour'); \
                INSERT INTO undelivered SELECT 'a', position, tenant_id, request_id, now(), 9, NULL, now() \
                FROM feed WHERE position = 1";
    client.batch_execute(dead).await.unwrap();
    // As a server resends it.
    let resend = "BEGIN; SELECT FROM endpoint WHERE name = 'a' FOR UPDATE; \
                  UPDATE undelivered SET given_up_at = NULL, due = now()";
    client.batch_execute(resend).await.unwrap();
    let sweeping = tokio::spawn({
        let store = store.clone();
        async move { store.sweep(step()).await }
    });
    until(async || waiting(&client).await == 1).await;
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(ends(sweeping).await.unwrap().unwrap().removed, 0);
    assert!(is_there(&store, action).await);
    let due = store.due_deliveries("a", 10, HOUR).await.unwrap();
    assert_eq!(due.deliveries.len(), 1);
    client
        .batch_execute("DELETE FROM undelivered")
        .await
        .unwrap();
    assert_eq!(sweep(&store, Duration::ZERO).await, 1);
    adds_up(&client).await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn decisions_submissions_and_claims_race_with_sweeps_and_each_key_is_decided_once() {
    const KEYS: usize = 150;
    const CALLS: usize = 8;
    let (stores, client) = stores::<2>().await;
    let (is_over, over) = tokio::sync::watch::channel(false);
    let sweeping = stores.clone().map(|store| {
        let over = over.clone();
        tokio::spawn(async move {
            let mut removed = 0;
            while !*over.borrow() {
                removed += store.sweep(step()).await.unwrap().removed;
            }
            removed
        })
    });
    let asking = (0..KEYS * CALLS).map(|number| {
        // Each key is asked for at different times, by both servers.
        let (store, key) = (stores[number % 2].clone(), number * 7 % KEYS);
        tokio::spawn(async move {
            let name = format!("k-{key}");
            if number % 3 == 0 {
                let submitted = store.submit(submission(&name)).await.unwrap();
                assert!(!matches!(submitted, Submitted::NotFound));
            }
            let decide = Decide {
                decision: [Decision::Approve, Decision::Reject][key % 2],
                ..decision(&name)
            };
            let (recorded, action) = match store.decide(decide).await.unwrap() {
                Decided::Recorded(action) => (Some(key), action),
                Decided::Duplicate(action) => (None, action),
                other => panic!("{other:?}"),
            };
            let acquire = Acquire {
                id: id(&action),
                tenant_id: identity(&name).tenant_id,
                digest: None,
                lease: HOUR,
                call_id: None,
                actor: actor(),
            };
            let acquired = store.acquire(acquire).await.unwrap();
            let claimed = match acquired {
                Acquired::Claimed(..) => Some(id(&action)),
                _ => None,
            };
            (recorded, claimed)
        })
    });
    let (mut recorded, mut claimed) = (HashSet::new(), HashSet::new());
    for asked in ends(futures_util::future::join_all(asking)).await {
        let (key, claim) = asked.unwrap();
        if let Some(key) = key {
            assert!(recorded.insert(key), "decided twice: {key}");
        }
        if let Some(claim) = claim {
            assert!(claimed.insert(claim), "claimed twice: {claim}");
        }
    }
    is_over.send_replace(true);
    for swept in sweeping {
        swept.await.unwrap();
    }
    assert_eq!(recorded.len(), KEYS);
    submit(&stores[0]).await;
    sweep(&stores[1], Duration::ZERO).await;
    // What was claimed is still there, and everything else is gone.
    for action in &claimed {
        assert!(is_there(&stores[0], *action).await, "{action}");
    }
    let totals = stores[0].totals().await.unwrap();
    assert_eq!(totals.actions as usize, claimed.len() + 1);
    assert_eq!(totals.removed as usize, KEYS - claimed.len());
    adds_up(&client).await;
    for store in stores {
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_costs_the_same_however_many_tombstones_there_are() {
    let ([store], client) = stores().await;
    for key in ["k-1", "k-2"] {
        record(&store, key).await;
        store
            .submit(submission(&format!("pending-{key}")))
            .await
            .unwrap();
    }
    let tombstones = "INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, \
         created_at, decided_at, events, removed_at) SELECT tenant, gen_random_uuid(), 'run-1', 'gone-' || n, \
         'COMMITTED', 'approve', now(), now(), 1, now() \
         FROM generate_series(1, 20000) AS n, unnest(array['acme', 'aaa']) AS tenant; ANALYZE action";
    client.batch_execute(tombstones).await.unwrap();
    // What a connection has read is counted when it is closed.
    let read = "SELECT sum(idx_tup_read + idx_tup_fetch)::bigint + (SELECT seq_tup_read FROM pg_stat_user_tables \
         WHERE relname = 'action') FROM pg_stat_user_indexes WHERE relname = 'action'";
    store.close().await;
    let before = number(&client, read).await;
    let url = Postgres::shared().url(&name(&client).await);
    let store = PostgresStore::connect(&url).await.unwrap();
    let all = list(&identity("k").tenant_id);
    let of_thread = List {
        thread_id: Some(identity("k").thread_id),
        ..all.clone()
    };
    for list in [all, of_thread] {
        assert_eq!(store.list(list).await.unwrap().actions.len(), 4);
    }
    assert_eq!(store.tenants(None, 10).await.unwrap().len(), 1);
    store.backlog().await.unwrap();
    assert_eq!(sweep(&store, HOUR).await, 0);
    store.close().await;
    let mut looked = 0;
    until(async || number(&client, read).await > before).await;
    looked += number(&client, read).await - before;
    assert!(looked < 500, "{looked} rows were read");
}

async fn name(client: &Client) -> String {
    let row = client.query_one("SELECT current_database()::text", &[]);
    row.await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_the_schema_before_cannot_bring_back_what_was_removed() {
    let ([store], client) = stores().await;
    let action = approve(&store, "k").await;
    submit(&store).await;
    assert_eq!(sweep(&store, Duration::ZERO).await, 1);
    // As it writes a claim, and a decision.
    for change in [
        "execution = 'claimed', events = events + 1",
        "execution = 'failed', status = 'FAILED', reason = 'a reason'",
        "decided_by = 'somebody'",
    ] {
        let sql = format!("UPDATE action SET {change} WHERE request_id = '{action}'");
        let refused = client.batch_execute(&sql).await.unwrap_err();
        let refused = refused.as_db_error().unwrap();
        assert_eq!(refused.constraint(), Some("action_removed"), "{change}");
    }
    // It does not say when it leaves an endpoint, and that it was left before must not count.
    let left = "INSERT INTO endpoint (name, position, holder, held_until, left_at) VALUES ('a', 0, gen_random_uuid(), \
         now(), '2001-01-01'); UPDATE endpoint SET holder = NULL, held_until = NULL";
    client.batch_execute(left).await.unwrap();
    let late = "SELECT count(*) FROM endpoint WHERE left_at > now() - interval '1 minute'";
    assert_eq!(number(&client, late).await, 1);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_the_schema_before_is_taken_over_with_what_is_on_record() {
    let url = Postgres::shared().database().await;
    let client = connect(&url).await;
    for step in [
        include_str!("../../../src/store/postgres/schema/1.sql"),
        include_str!("../../../src/store/postgres/schema/2.sql"),
        "CREATE TABLE aegis_schema (version integer PRIMARY KEY, made_by text NOT NULL, \
         made_at timestamptz NOT NULL DEFAULT clock_timestamp()); INSERT INTO aegis_schema VALUES (1, '0'), (2, '0'); \
         INSERT INTO endpoint (name, position) VALUES ('left', 0); \
         INSERT INTO endpoint VALUES ('held', 0, gen_random_uuid(), now()); \
         INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, digest, payload, \
         created_at, decided_at, events) SELECT 'acme', ('01900000-0000-7000-8000-00000000000' || n)::uuid, 'run-1', 'k-' || n, 'COMMITTED', 'approve', \
         sha256('1'), '1', now(), now(), 1 FROM generate_series(1, 3) AS n; \
         INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, decision, epoch) \
         SELECT tenant_id, request_id, 1, created_at, gen_random_uuid(), 'reviewer', 'approved', 'COMMITTED', 'approve', 1 \
         FROM action",
    ] {
        client.batch_execute(step).await.unwrap();
    }
    let store = PostgresStore::connect(&url).await.unwrap();
    let left = "SELECT count(*) FROM endpoint WHERE (name = 'left') = (left_at IS NOT NULL)";
    assert_eq!(number(&client, left).await, 2);
    client.batch_execute("DELETE FROM endpoint").await.unwrap();
    submit(&store).await;
    assert_eq!(sweep(&store, Duration::ZERO).await, 3);
    let decided = store.decide(decision("k-2")).await.unwrap();
    assert!(matches!(decided, Decided::Duplicate(_)), "{decided:?}");
    adds_up(&client).await;
    store.close().await;
}
