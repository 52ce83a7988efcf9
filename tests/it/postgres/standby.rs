//! What a synchronous standby has, and what it has not.

use std::process::Command;
use std::time::{Duration, SystemTime};

use aegis_hitl::store::{Decided, PostgresStore, Store};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use super::{decision, id, identity, list, record};
use crate::support::HANG;
use crate::support::postgres::{Postgres, connect};
use crate::support::process::Process;

/// The sessions that wait for a standby.
pub const WAITING: &str = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'";

/// For longer than this no server shows what waited for a standby, and was cut off.
const COVERS: Duration = Duration::from_secs(1);

/// Sets the standbys that commits wait for.
pub async fn set_standbys(operator: &Client, names: &str) {
    // It must not wait itself.
    operator
        .batch_execute("SET synchronous_commit = local")
        .await
        .unwrap();
    let set = format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'");
    operator.batch_execute(&set).await.unwrap();
    operator
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
}

/// Makes commits wait for a standby that there is not, and returns once they do.
pub async fn cut_off_standbys(operator: &Client) {
    set_standbys(operator, "nobody").await;
    // A signal reloads it, and for a moment commits wait for none.
    loop {
        let probing = operator.batch_execute(
            "BEGIN; SET LOCAL synchronous_commit = on; SELECT pg_logical_emit_message(true, '', ''); COMMIT",
        );
        let mut probing = std::pin::pin!(probing);
        let patience = Duration::from_millis(300);
        if let Ok(committed) = tokio::time::timeout(patience, &mut probing).await {
            committed.unwrap();
            continue;
        }
        let cancelled = operator.cancel_token().cancel_query(NoTls).await;
        cancelled.unwrap();
        probing.await.unwrap();
        break;
    }
}

/// Runs a query that finds one number until it is another one than 0.
pub async fn until(operator: &Client, sql: &str) {
    let deadline = tokio::time::Instant::now() + HANG;
    while operator.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0 {
        assert!(tokio::time::Instant::now() < deadline, "{sql}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Opens a server that has made all of its connections. After it makes one, which may lead elsewhere, it
/// writes before it answers, and that would hide what is tested here.
async fn warm(url: &str) -> PostgresStore {
    let store = PostgresStore::builder(url).connections(6).connect().await;
    let store = store.unwrap();
    let deadline = tokio::time::Instant::now() + HANG;
    loop {
        let reading = (0..12).map(|_| store.find(Uuid::new_v4(), None));
        for found in futures_util::future::join_all(reading).await {
            assert!(found.unwrap().is_none());
        }
        let made = store.statistics().connections.unwrap();
        if made.idle + made.busy == made.limit {
            return store;
        }
        assert!(tokio::time::Instant::now() < deadline, "{made:?}");
    }
}

/// When a server last wrote its heartbeat.
async fn beaten(operator: &Client) -> SystemTime {
    let found = operator.query_one("SELECT max(at) FROM heartbeat", &[]);
    found.await.unwrap().get(0)
}

/// The removed key of a database file that was moved here.
const MOVED: &str = "INSERT INTO tombstone (identity, request_id, decision, created_at, decided_at) \
     SELECT substring(sha256('\\x04'::bytea || 'acme' || '\\x05' || 'run-1') FOR 8) \
     || substring(sha256('\\x04'::bytea || 'acme' || '\\x05' || 'run-1' || '\\x03' || 'old') FOR 8), \
     gen_random_uuid(), 'approve', now(), now()";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_no_standby_has_is_not_shown_by_another_server_either() {
    // A server of its own: the setting is that of the whole server.
    let server = Postgres::start(&[]);
    let url = server.database().await;
    let one = PostgresStore::connect(&url).await.unwrap();
    let other = warm(&url).await;
    let operator = connect(&url).await;
    operator.batch_execute(MOVED).await.unwrap();
    cut_off_standbys(&operator).await;
    let deciding = {
        let one = one.clone();
        tokio::spawn(async move { one.decide(decision("k")).await })
    };
    // Somebody who has waited for it loses patience. The commit began to wait after its state changed.
    let long = format!(
        "SELECT count(*) {WAITING} AND clock_timestamp() - state_change > make_interval(secs => {})",
        COVERS.as_secs_f64() * 3.0
    );
    until(&operator, &long).await;
    let cancel = format!("SELECT count(pg_cancel_backend(pid)) {WAITING}");
    operator.query_one(&cancel, &[]).await.unwrap();
    until(&operator, "SELECT count(*) FROM action").await;

    // The other server had no fault, and nobody tells it of this one.
    let visible = operator.query_one("SELECT request_id FROM action", &[]);
    let action: Uuid = visible.await.unwrap().get(0);
    let tenant = identity("k").tenant_id;
    let list = list(&tenant);
    // What locks and records nothing shows nothing about the standby.
    let old = other.decide(decision("old")).await.unwrap();
    assert!(matches!(old, Decided::Duplicate(_)), "{old:?}");
    let (found, looked_up, listed) = tokio::join!(
        other.find(action, None),
        other.look_up(action, &tenant),
        other.list(list),
    );
    assert!(found.unwrap_err().is_unavailable());
    assert!(looked_up.unwrap_err().is_unavailable());
    assert!(listed.unwrap_err().is_unavailable());
    // Nor does a transaction of new actions none of which is new.
    let reading = (0..20).map(|number| {
        let other = other.clone();
        async move {
            tokio::time::sleep(COVERS * number / 20).await;
            other.find(action, None).await
        }
    });
    let (decided, read) = tokio::join!(
        other.decide(decision("k")),
        futures_util::future::join_all(reading)
    );
    assert!(decided.unwrap_err().is_unavailable());
    for found in read {
        assert!(found.unwrap_err().is_unavailable());
    }
    assert!(deciding.await.unwrap().unwrap_err().is_unavailable());

    set_standbys(&operator, "").await;
    assert!(other.find(action, None).await.unwrap().is_some());
    let decided = other.decide(decision("k")).await.unwrap();
    assert!(matches!(decided, Decided::Duplicate(_)), "{decided:?}");
    one.close().await;
    other.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn reads_write_nothing_where_no_standby_is_waited_for() {
    let url = Postgres::shared().database().await;
    let store = warm(&url).await;
    let action = record(&store, "k").await;
    let operator = connect(&url).await;
    let before = beaten(&operator).await;
    // The passes that publish the event, which are durable writes too, are long over by then.
    let end = tokio::time::Instant::now() + 3 * COVERS;
    while tokio::time::Instant::now() < end {
        assert!(store.find(id(&action), None).await.unwrap().is_some());
        tokio::time::sleep(COVERS / 10).await;
    }
    assert_eq!(beaten(&operator).await, before);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn reads_go_on_beside_a_standby_that_answers() {
    let server = Postgres::start(&[]);
    let url = server.database().await;
    let folder = TempDir::new().unwrap();
    let mut receive = Command::new(server.bin().join("pg_receivewal"));
    receive.args(["--no-loop", "--synchronous", "--username=aegis", "--host"]);
    receive
        .arg(server.folder())
        .arg("--directory")
        .arg(folder.path());
    receive.env("PGAPPNAME", "standby");
    let _standby = Process::start(receive);
    let operator = connect(&url).await;
    set_standbys(&operator, "standby").await;
    until(
        &operator,
        "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'",
    )
    .await;
    let one = PostgresStore::connect(&url).await.unwrap();
    let other = warm(&url).await;
    let action = record(&one, "k").await;
    let before = beaten(&operator).await;
    let deadline = tokio::time::Instant::now() + HANG;
    // Sooner or later nothing covers what is read but a write of the reader's own.
    while beaten(&operator).await == before {
        let reading = (0..32).map(|_| other.find(id(&action), None));
        for found in futures_util::future::join_all(reading).await {
            assert!(found.unwrap().is_some());
        }
        assert!(tokio::time::Instant::now() < deadline);
        tokio::time::sleep(COVERS / 10).await;
    }
    one.close().await;
    other.close().await;
}
