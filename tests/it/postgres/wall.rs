//! Row-level security: the wall between tenants behind the statements' own conditions.

use std::sync::Mutex;

use aegis_hitl::TenantId;
use aegis_hitl::store::{
    Acquire, Acquired, Decide, Decided, Identity, PostgresBuilder, PostgresStore, Store,
    conformance,
};
use tokio::sync::OnceCell;
use tokio_postgres::Client;

use super::{actor, decision, id, identity, list};
use crate::support::manual::sql_of;
use crate::support::postgres::{Postgres, connect};
use crate::support::{HANG, ends};

/// The tables with a policy.
const WALLED: [&str; 5] = ["action", "claim", "event", "feed", "chain"];

/// A server whose databases are set up as the manual says.
pub(super) struct Walled {
    server: Postgres,
}

impl Walled {
    pub(super) async fn shared() -> &'static Self {
        static SHARED: OnceCell<Walled> = OnceCell::const_new();
        SHARED.get_or_init(|| Self::set_up(&[])).await
    }

    async fn set_up(settings: &[&str]) -> Self {
        let server = Postgres::start(settings);
        let client = server.client("postgres").await;
        let create = "CREATE DATABASE aegis TEMPLATE template0";
        client.batch_execute(create).await.unwrap();
        let [roles, grants, retention, wall] = &sql_of("scaling.md", "The least role")[..] else {
            panic!("the roles, what they are granted, what retention needs, and the wall");
        };
        let admin = server.client("aegis").await;
        admin.batch_execute(roles).await.unwrap();
        let url = of("aegis_owner", &server.url("aegis"));
        PostgresStore::builder(&url).migrate_schema().await.unwrap();
        let owner = connect(&url).await;
        for step in [grants, retention, wall] {
            owner.batch_execute(step).await.unwrap();
        }
        Self { server }
    }

    pub(super) fn server(&self) -> &Postgres {
        &self.server
    }

    /// Makes a database, and returns its URL as the least role.
    pub(super) async fn database(&self) -> String {
        let url = self.server.database_from("aegis").await;
        of("aegis_server", &url)
    }
}

/// The same URL for another role.
fn of(role: &str, url: &str) -> String {
    let (_, rest) = url.split_once('@').unwrap();
    format!("postgres://{role}@{rest}")
}

fn builder(url: &str) -> PostgresBuilder {
    PostgresStore::builder(url).migrate(false)
}

/// Opens servers on a database of their own, and closes those that were opened before.
async fn servers(batching: &[bool], last: &Mutex<Vec<PostgresStore>>) -> Vec<PostgresStore> {
    let url = Walled::shared().await.database().await;
    let mut stores = Vec::new();
    for batching in batching {
        let builder = builder(&url).connections(8).batching(*batching);
        stores.push(builder.connect().await.unwrap());
    }
    let before = std::mem::replace(&mut *last.lock().unwrap(), stores.clone());
    for store in before {
        store.close().await;
    }
    stores
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn servers_of_the_least_role_conform_behind_the_wall() {
    let last = Mutex::default();
    conformance::run_together(|| servers(&[true, false], &last)).await;
    conformance::run_retention(|| servers(&[false, true], &last)).await;
}

fn of_tenant(tenant: &str, key: &str) -> Identity {
    Identity {
        tenant_id: tenant.parse().unwrap(),
        ..identity(key)
    }
}

/// Records an action of a tenant with a claim, so that each table has a row of it.
async fn fill(store: &PostgresStore, tenant: &str) {
    let request = Decide {
        identity: of_tenant(tenant, "k"),
        ..decision("k")
    };
    let Decided::Recorded(action) = store.decide(request).await.unwrap() else {
        panic!("it is new");
    };
    let acquire = Acquire {
        id: id(&action),
        tenant_id: tenant.parse().unwrap(),
        digest: None,
        lease: HANG,
        call_id: None,
        actor: actor(),
    };
    let acquired = store.acquire(acquire).await.unwrap();
    assert!(matches!(acquired, Acquired::Claimed(..)), "{acquired:?}");
}

/// Waits until all events are published and chained.
async fn chained(store: &PostgresStore, url: &str) {
    store.newest_event().await.unwrap();
    let admin = connect(&of("aegis", url)).await;
    let left = "SELECT p.position - c.position FROM publisher p, chainer c";
    ends(async {
        while count(&admin, left).await > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A database with records of the tenants `a` and `b`, and its URL as the least role.
async fn filled() -> String {
    let url = Walled::shared().await.database().await;
    let store = builder(&url).connect().await.unwrap();
    fill(&store, "a").await;
    fill(&store, "b").await;
    chained(&store, &url).await;
    store.close().await;
    url
}

async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn refusal(client: &Client, sql: &str) -> String {
    let error = client.batch_execute(sql).await.expect_err(sql);
    error.code().unwrap().code().to_owned()
}

/// Begins a transaction about these tenants.
async fn begin(client: &Client, tenants: &str) {
    let begin = format!("ROLLBACK; BEGIN; SET LOCAL aegis.tenants = '{tenants}'");
    client.batch_execute(&begin).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_tenants_a_statement_fails_and_finds_nothing_missing() {
    let url = filled().await;
    let client = connect(&url).await;
    let statements = WALLED.map(|table| format!("SELECT FROM {table} WHERE tenant_id = 'a'"));
    for sql in &statements {
        // No such setting.
        assert_eq!(refusal(&client, sql).await, "42704", "{sql}");
    }
    let update = "UPDATE action SET comment = 'x' WHERE tenant_id = 'a'";
    assert_eq!(refusal(&client, update).await, "42704");
    for tenants in [r#"{"a"}"#, "{}", "*"] {
        begin(&client, tenants).await;
        client.batch_execute("COMMIT").await.unwrap();
        // Behind a pooler it is empty after a transaction of somebody else, which is no array.
        for sql in &statements {
            assert_eq!(refusal(&client, sql).await, "22P02", "{sql}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_one_tenant_sees_and_writes_nothing_of_another() {
    let url = filled().await;
    let client = connect(&url).await;
    for table in WALLED {
        begin(&client, r#"{"a"}"#).await;
        let rows = format!("SELECT count(*) FROM {table}");
        let own = count(&client, &rows).await;
        assert!(own > 0, "{table}");
        let others = format!("{rows} WHERE tenant_id <> 'a'");
        assert_eq!(count(&client, &others).await, 0, "{table}");
        begin(&client, r#"{"a","b"}"#).await;
        assert_eq!(count(&client, &rows).await, 2 * own, "{table}");
        begin(&client, "*").await;
        assert_eq!(count(&client, &rows).await, 2 * own, "{table}");
        for nobody in [
            "{}",
            r#"{"c"}"#,
            "{NULL}",
            r#"{"c",NULL}"#,
            r#"{""}"#,
            r#"{"*"}"#,
        ] {
            begin(&client, nobody).await;
            assert_eq!(count(&client, &rows).await, 0, "{table} {nobody}");
        }
    }
    for insert in [
        "INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, created_at, events) \
         VALUES ('b', gen_random_uuid(), 'run-1', 'new', 'PENDING', now(), 1)",
        "INSERT INTO claim (tenant_id, request_id, token, fence, actor) \
         VALUES ('b', gen_random_uuid(), gen_random_uuid(), 1, 'me')",
        "INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, epoch) \
         VALUES ('b', gen_random_uuid(), 1, now(), gen_random_uuid(), 'me', 'approved', 'COMMITTED', 1)",
        "INSERT INTO feed (position, tenant_id, request_id, number, at, event_id) \
         VALUES (1000, 'b', gen_random_uuid(), 1, now(), gen_random_uuid())",
        "INSERT INTO chain (tenant_id, seq, position, links, hash) \
         VALUES ('b', 1000, 1000, decode(repeat('00', 40), 'hex'), sha256(''))",
        // Nor does a row go over.
        "UPDATE action SET tenant_id = 'b'",
        "UPDATE claim SET tenant_id = 'b'",
    ] {
        begin(&client, r#"{"a"}"#).await;
        assert_eq!(refusal(&client, insert).await, "42501", "{insert}");
        begin(&client, r#"{"b"}"#).await;
        if insert.starts_with("INSERT") {
            client.batch_execute(insert).await.expect(insert);
        }
    }
    begin(&client, r#"{"a"}"#).await;
    for change in [
        "UPDATE action SET comment = 'x' WHERE tenant_id = 'b'",
        "UPDATE claim SET actor = 'x' WHERE tenant_id = 'b'",
        "DELETE FROM event WHERE tenant_id = 'b'",
        "DELETE FROM feed WHERE tenant_id = 'b'",
        "DELETE FROM claim WHERE tenant_id = 'b'",
    ] {
        let changed = client.execute(change, &[]).await.unwrap();
        assert_eq!(changed, 0, "{change}");
    }
    // The owner passes.
    let owner = connect(&of("aegis_owner", &url)).await;
    assert_eq!(count(&owner, "SELECT count(*) FROM action").await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_batch_of_tenants_with_odd_names_is_recorded_behind_the_wall() {
    let mut names: Vec<String> = [
        "'",
        "''",
        "\"",
        "\\",
        "\\\\",
        "\\'",
        "\"\\",
        "{",
        "}",
        "{}",
        "{\"a\"}",
        ",",
        "a,b",
        "*",
        "NULL",
        "null",
        "$1",
        "$$",
        "E'a'",
        "--",
        "/*",
        ";",
        "%",
        "\\n",
        "\\x41",
        "}',true);--",
    ]
    .map(str::to_owned)
    .into();
    names.push("'\\\"".repeat(85));
    for conforming in ["on", "off"] {
        let url = Walled::shared().await.database().await;
        let options = format!("{url}?options=-c%20standard_conforming_strings%3D{conforming}");
        let store = builder(&options).connect().await.unwrap();
        let deciding = names.iter().flat_map(|name| [(name, "k-1"), (name, "k-2")]);
        let deciding = deciding.map(|(name, key)| {
            let (store, identity) = (store.clone(), of_tenant(name, key));
            let request = Decide {
                identity,
                ..decision(key)
            };
            tokio::spawn(async move { store.decide(request).await.unwrap() })
        });
        for decided in futures_util::future::join_all(deciding).await {
            let decided = decided.unwrap();
            assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
        }
        let commits = store.statistics().writer.unwrap().commits;
        assert!(
            commits.count < names.len() as u64,
            "they share transactions: {commits:?}"
        );
        for name in &names {
            let tenant: TenantId = name.parse().unwrap();
            let found = store.list(list(&tenant)).await.unwrap().actions;
            assert_eq!(found.len(), 2, "{name}");
            assert!(
                found
                    .iter()
                    .all(|action| action.tenant_id.as_ref() == Some(&tenant)),
                "{name}"
            );
            let request = Decide {
                identity: of_tenant(name, "k-1"),
                ..decision("k-1")
            };
            let decided = store.decide(request).await.unwrap();
            assert!(
                matches!(decided, Decided::Duplicate(_)),
                "{name}: {decided:?}"
            );
        }
        store.close().await;
    }
}

/// Runs statements as psql does: each is a transaction, which locks one table.
async fn run_each(client: &Client, statements: &str) {
    for statement in statements.lines() {
        client.batch_execute(statement).await.unwrap();
    }
}

/// A database as a server of schema version 5 made it.
async fn of_version_5(server: &Postgres) -> String {
    let url = server.database().await;
    let client = connect(&url).await;
    for step in [
        include_str!("../../../src/store/postgres/schema/1.sql"),
        include_str!("../../../src/store/postgres/schema/2.sql"),
        include_str!("../../../src/store/postgres/schema/3.sql"),
        include_str!("../../../src/store/postgres/schema/4.sql"),
        include_str!("../../../src/store/postgres/schema/5.sql"),
        "CREATE TABLE aegis_schema (version integer PRIMARY KEY, made_by text NOT NULL, \
         made_at timestamptz NOT NULL DEFAULT clock_timestamp()); \
         INSERT INTO aegis_schema SELECT n, '0' FROM generate_series(1, 5) AS n",
    ] {
        client.batch_execute(step).await.unwrap();
    }
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_the_release_before_works_until_the_wall_is_put_up_and_then_fails() {
    let server = Postgres::start(&[]);
    let url = of_version_5(&server).await;
    let admin = connect(&url).await;
    let roles =
        "CREATE ROLE old LOGIN; GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO old";
    admin.batch_execute(roles).await.unwrap();
    let old = connect(&of("old", &url)).await;
    // What such a server sends: nothing about tenants.
    let insert = |key: &str| {
        format!(
            "BEGIN; SET LOCAL lock_timeout = '3s'; \
             INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, created_at, events) \
             VALUES ('acme', gen_random_uuid(), 'run-1', '{key}', 'PENDING', now(), 1); COMMIT"
        )
    };
    let find = "SELECT count(*) FROM action WHERE tenant_id = 'acme'";
    old.batch_execute(&insert("k-1")).await.unwrap();
    let store = PostgresStore::connect(&url).await.unwrap();
    old.batch_execute(&insert("k-2")).await.unwrap();
    assert_eq!(count(&old, find).await, 2);
    let tenant: TenantId = "acme".parse().unwrap();
    let page = store.list(list(&tenant)).await.unwrap();
    assert_eq!(page.actions.len(), 2);
    let [.., wall] = &sql_of("scaling.md", "The least role")[..] else {
        panic!("the wall");
    };
    run_each(&admin, wall).await;
    assert_eq!(refusal(&old, find).await, "42704");
    assert_eq!(refusal(&old, &insert("k-3")).await, "42704");
    old.batch_execute("ROLLBACK").await.unwrap();
    let down = wall.replace("ENABLE", "DISABLE");
    run_each(&admin, &down).await;
    assert_eq!(count(&old, find).await, 2);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policies_are_added_without_a_deadlock_with_who_works_on_the_tables() {
    let server = Postgres::shared();
    let url = of_version_5(server).await;
    // In another order than the migration, longer than PostgreSQL waits before it ends one of the two.
    let worker = connect(&url).await;
    worker
        .batch_execute("BEGIN; SELECT FROM feed; SELECT FROM chain")
        .await
        .unwrap();
    let migrating = tokio::spawn({
        let url = url.clone();
        async move { PostgresStore::builder(url).migrate_schema().await }
    });
    let watching = connect(&url).await;
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                 AND (wait_event_type = 'Lock' OR wait_event = 'PgSleep')";
    ends(async {
        while count(&watching, waits).await == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    worker.batch_execute("SELECT pg_sleep(1.5)").await.unwrap();
    let others = "SELECT FROM event; SELECT FROM claim; SELECT FROM action; COMMIT";
    worker.batch_execute(others).await.unwrap();
    migrating.await.unwrap().unwrap();
    let policies = "SELECT count(*) FROM pg_policies WHERE policyname = 'aegis_tenants'";
    assert_eq!(count(&watching, policies).await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_that_is_put_up_while_a_server_runs_fails_no_request() {
    let [.., wall] = &sql_of("scaling.md", "The least role")[..] else {
        panic!("the wall");
    };
    let tenant: TenantId = "a".parse().unwrap();
    for first in 0..5 {
        let url = Walled::shared().await.database().await;
        let owner = connect(&of("aegis_owner", &url)).await;
        let down = wall.replace("ENABLE", "DISABLE");
        run_each(&owner, &down).await;
        let store = builder(&url).connect().await.unwrap();
        fill(&store, "a").await;
        run_each(&owner, wall).await;
        // Each of them may be the first that meets it.
        for which in (0..5).cycle().skip(first).take(5) {
            match which {
                0 => fill(&store, "b").await,
                1 => assert_eq!(store.list(list(&tenant)).await.unwrap().actions.len(), 1),
                2 => assert!(!store.events(&tenant, 0, 10).await.unwrap().is_empty()),
                3 => {
                    let again = Decide {
                        identity: of_tenant("a", "k"),
                        ..decision("k")
                    };
                    let decided = store.decide(again).await.unwrap();
                    assert!(matches!(decided, Decided::Duplicate(_)), "{decided:?}");
                }
                _ => assert!(store.totals().await.unwrap().actions > 0),
            }
        }
        store.close().await;
    }
}

/// The nodes of logged plans that read a walled table without a condition on an index.
fn unindexed(log: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = log.lines().peekable();
    while let Some(line) = lines.next() {
        let is_scan = ["Seq Scan on ", "Index Scan", "Index Only Scan"]
            .iter()
            .any(|scan| line.contains(scan));
        let table = line.split(" on ").nth(1).unwrap_or_default();
        let table = table.split(' ').next().unwrap_or_default();
        let is_walled = WALLED.contains(&table) || table.starts_with("event_");
        let has_condition = lines.peek().is_some_and(|next| next.contains("Index Cond"));
        if is_scan && is_walled && !has_condition {
            found.push(line.trim().to_owned());
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn each_statement_finds_its_rows_by_an_index_behind_the_wall() {
    let walled = Walled::set_up(&["shared_preload_libraries = 'auto_explain'"]).await;
    let url = walled.database().await;
    let admin = connect(&of("aegis", &url)).await;
    let fill_up = "WITH made AS (SELECT n, gen_random_uuid() AS id, 'tenant-' || n % 100 AS tenant \
           FROM generate_series(1, 10000) AS n), \
         acted AS (INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, created_at, events) \
           SELECT tenant, id, 'run-1', 'k-' || n, 'PENDING', now(), 1 FROM made) \
         INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, epoch) \
           SELECT tenant, id, 1, now(), gen_random_uuid(), 'me', 'submitted', 'PENDING', 1 FROM made";
    admin.batch_execute(fill_up).await.unwrap();
    let store = builder(&url).connect().await.unwrap();
    chained(&store, &url).await;
    store.close().await;
    // An empty partition is read as is.
    let tidy = "DO $$ DECLARE part regclass; is_empty boolean; BEGIN \
         FOR part IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'event'::regclass LOOP \
           EXECUTE format('SELECT NOT EXISTS (SELECT FROM %s)', part) INTO is_empty; \
           IF is_empty THEN EXECUTE format('DROP TABLE %s', part); END IF; \
         END LOOP; END $$; ANALYZE";
    admin.batch_execute(tidy).await.unwrap();
    admin
        .batch_execute(
            "ALTER ROLE aegis_server SET auto_explain.log_min_duration = 0; \
             ALTER ROLE aegis_server SET auto_explain.log_nested_statements = on; \
             ALTER ROLE aegis_server SET enable_seqscan = off",
        )
        .await
        .unwrap();
    let before = walled.server().logged().len();
    let store = builder(&url).connect().await.unwrap();
    fill(&store, "tenant-7").await;
    let tenant: TenantId = "tenant-7".parse().unwrap();
    let page = store.list(list(&tenant)).await.unwrap();
    let first = id(&page.actions[0]);
    for tenant in [Some(&tenant), None] {
        assert!(store.find(first, tenant).await.unwrap().is_some());
        let call = uuid::Uuid::now_v7();
        assert!(store.find(call, tenant).await.unwrap().is_none());
    }
    assert!(store.look_up(first, &tenant).await.unwrap().is_some());
    let events = store.events(&tenant, 0, 10).await.unwrap();
    assert_eq!(events.len(), 10);
    let newest = store.newest_event().await.unwrap();
    assert_eq!(store.all_events(newest - 5, 10).await.unwrap().len(), 5);
    chained(&store, &url).await;
    store.close().await;
    let log = walled.server().logged().split_off(before);
    for statement in [
        "INSERT INTO feed",
        "INSERT INTO chain",
        "FOR UPDATE",
        "INSERT INTO action",
    ] {
        assert!(log.contains(statement), "{statement}");
    }
    assert_eq!(unindexed(&log), Vec::<String>::new());
}
