#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::super::address::Address;
use super::super::state::State;
use super::super::{PostgresStore, connected};
use super::*;
use crate::protocol::IdempotencyKey;
use crate::store::{Actor, Clock, Decide, Identity, Store};

#[path = "../../../../tests/support/postgres.rs"]
#[allow(dead_code, unreachable_pub, reason = "other tests use more of it")]
mod server;

use server::Postgres;

fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

fn statement(names: &[&str]) -> String {
    let tenants: Vec<_> = names.iter().map(|name| tenant(name)).collect();
    let tenants: Vec<_> = tenants.iter().collect();
    Scope::Only(&tenants).statement().unwrap().into_owned()
}

#[test]
fn what_a_transaction_is_about_is_an_array_of_quoted_names() {
    for (names, array) in [
        (&[][..], "{}"),
        (&["acme"], r#"{"acme"}"#),
        (&["a", "b,c"], r#"{"a","b,c"}"#),
        (&["NULL", "{*}"], r#"{"NULL","{*}"}"#),
        (&["it's"], r#"{"it''s"}"#),
        (&["\""], r#"{"\\""}"#),
        (&["\\"], r#"{"\\\\"}"#),
    ] {
        let expected = format!("SELECT set_config('aegis.tenants', E'{array}', true)");
        assert_eq!(statement(names), expected);
    }
    assert_eq!(Scope::Nobody.statement(), None);
    let all = Scope::All.statement().unwrap();
    assert_eq!(all, "SET LOCAL aegis.tenants = '*'");
}

/// Connections of a user behind the wall, to a database with an action of `a` and one of `b`.
async fn walled(server: &Postgres) -> Pool {
    let url = server.database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    for name in ["a", "b"] {
        let decide = Decide {
            identity: Identity {
                tenant_id: tenant(name),
                thread_id: "run-1".parse().unwrap(),
                idempotency_key: IdempotencyKey::mint(),
            },
            decision: crate::protocol::Decision::Approve,
            call_id: None,
            payload: None,
            comment: None,
            actor: Actor::new("reviewer"),
            require_submission: false,
            allow_self_approval: true,
        };
        store.decide(decide).await.unwrap();
    }
    store.newest_event().await.unwrap();
    let owner = server::connect(&url).await;
    let left = "SELECT p.position - c.position FROM publisher p, chainer c";
    while owner.query_one(left, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        tokio::task::yield_now().await;
    }
    store.close().await;
    let role = "CREATE ROLE guest LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO guest";
    owner.batch_execute(role).await.unwrap();
    for table in WALLED {
        let enable = format!("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY");
        owner.batch_execute(&enable).await.unwrap();
    }
    let address = Address::parse(&url.replace("aegis@", "guest@")).unwrap();
    let state = Arc::new(State::new(Clock::new()));
    connected(&address, &state, 2).await.unwrap()
}

/// The tenants of whom a statement without a condition shows rows.
async fn shown(session: &Session, table: &str) -> Result<Vec<String>, Fault> {
    let all = format!("SELECT DISTINCT tenant_id FROM {table} ORDER BY tenant_id");
    let found = session.read(&all, &[]).await?;
    let found = found.iter().map(|row| Ok(get(row, "tenant_id")?));
    found.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_forgot_its_tenant_shows_and_changes_nothing_of_another() {
    let server = Postgres::start(&[]);
    let pool = walled(&server).await;
    let [a, b] = [tenant("a"), tenant("b")];
    for (scope, tenants) in [
        (Scope::Only(&[&a]), &["a"][..]),
        (Scope::of(&Some(&b)), &["b"]),
        (Scope::Only(&[&a, &b]), &["a", "b"]),
        (Scope::of(&None), &["a", "b"]),
        (Scope::Only(&[]), &[]),
    ] {
        for table in ["action", "event", "feed", "chain"] {
            let mut session = Session::open(&pool, scope).await.unwrap();
            assert_eq!(shown(&session, table).await.unwrap(), tenants, "{table}");
            session.release();
        }
        let session = Session::open(&pool, scope).await.unwrap();
        session.begin().await.unwrap();
        let all = "UPDATE action SET comment = 'changed'";
        let changed = session.execute(all, &[]).await.unwrap();
        assert_eq!(changed, tenants.len() as u64, "{scope:?}");
        session.roll_back().await;
        let session = Session::open(&pool, scope).await.unwrap();
        session.begin_read().await.unwrap();
        let all = session.query("SELECT FROM event", &[]).await.unwrap();
        assert_eq!(all.len(), tenants.len(), "{scope:?}");
        session.roll_back().await;
    }
    // What is said once does not hold for the next transaction, nor outside of one.
    let session = Session::open(&pool, Scope::Only(&[&a])).await.unwrap();
    session.query("SELECT FROM action", &[]).await.unwrap_err();
    drop(session);
    let session = Session::open(&pool, Scope::Nobody).await.unwrap();
    shown(&session, "action").await.unwrap_err();
    drop(session);
    let session = Session::open(&pool, Scope::Nobody).await.unwrap();
    session.begin().await.unwrap();
    session.query("SELECT FROM feed", &[]).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_reads_the_names_as_they_are() {
    let names = [
        "'", "\"", "\\", "\\'", "{a,b}", "NULL", "*", "a\"',\\b", "\\x27",
    ];
    let tenants = names.map(tenant);
    let tenants: Vec<_> = tenants.iter().collect();
    let server = Postgres::start(&[]);
    for conforming in ["on", "off"] {
        let option = format!("?options=-c%20standard_conforming_strings%3D{conforming}");
        let address = Address::parse(&format!("{}{option}", server.url("postgres"))).unwrap();
        let state = Arc::new(State::new(Clock::new()));
        let pool = connected(&address, &state, 1).await.unwrap();
        let mut session = Session::open(&pool, Scope::Only(&tenants)).await.unwrap();
        let said = "SELECT current_setting('aegis.tenants')::text[] AS said";
        let found = session.read(said, &[]).await.unwrap();
        let said: Vec<String> = get(&found[0], "said").unwrap();
        assert_eq!(said, names, "{conforming}");
        session.release();
    }
}
