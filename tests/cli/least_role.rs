//! `aegis serve` under the role of the manual, which may do only what a server does.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use aegis_hitl::Decision;
use aegis_hitl::store::{Actor, Decide, Decided, Identity, PostgresStore, Store, Sweep};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_postgres::Client;

use crate::binary::{Served, aegis, run, serve};
use crate::support::manual::sql_of;
use crate::support::postgres::{Postgres, connect};
use crate::support::receiver::Receiver;
use crate::support::{Call, ends};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A database as the manual sets it up.
struct Database {
    server: Postgres,
    admin: Client,
    /// What a server needs besides to remove what is over.
    retention: String,
}

impl Database {
    async fn set_up() -> Self {
        let server = Postgres::start(&[]);
        let client = server.client("postgres").await;
        let create = "CREATE DATABASE aegis TEMPLATE template0";
        client.batch_execute(create).await.unwrap();
        let admin = server.client("aegis").await;
        let [roles, grants, retention, wall] = &sql_of("scaling.md", "The least role")[..] else {
            panic!("the roles, what they are granted, what retention needs, and the wall");
        };
        admin.batch_execute(roles).await.unwrap();
        let database = Self {
            server,
            admin,
            retention: retention.to_string(),
        };
        let owner = database.url("aegis_owner");
        run(aegis(&["migrate", "--store", &owner])).expect(0);
        let owner = connect(&database.url("aegis_owner")).await;
        owner.batch_execute(grants).await.unwrap();
        owner.batch_execute(wall).await.unwrap();
        database
    }

    fn url(&self, role: &str) -> String {
        self.server
            .url("aegis")
            .replace("aegis@", &format!("{role}@"))
    }

    fn command(&self) -> Command {
        let mut command = serve(Path::new(&self.url("aegis_server")));
        command.arg("--no-migrate");
        command
    }
}

async fn ask(
    server: &Served,
    method: &str,
    path: &str,
    key: Option<&str>,
    body: Value,
) -> (u16, Value) {
    let mut call =
        Call::new(server.addr, method, format!("/api/v1/hitl/{path}")).header("Tenant-Id", "acme");
    if let Some(key) = key {
        call = call
            .header("Thread-Id", "run-1")
            .header("Idempotency-Key", key);
    }
    let call = if method == "POST" {
        call.json(body.to_string())
    } else {
        call
    };
    let reply = call.send().await;
    (reply.status, reply.json())
}

async fn post(server: &Served, path: &str, key: Option<&str>, body: Value) -> Value {
    let (status, answer) = ask(server, "POST", path, key, body).await;
    assert!((200..300).contains(&status), "{path}: {status} {answer}");
    answer
}

async fn get(server: &Served, path: &str) -> Value {
    let (status, answer) = ask(server, "GET", path, None, Value::Null).await;
    assert_eq!(status, 200, "{path}: {answer}");
    answer
}

/// Waits until an action is so.
async fn until(server: &Served, id: &str, member: &str, word: &str) {
    ends(async {
        while get(server, &format!("actions/{id}")).await[member] != word {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_runs_with_exactly_the_rights_of_the_manual() {
    let database = Database::set_up().await;
    let receiver = Receiver::accepting().await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("aegis.toml");
    let config = format!(
        "[[webhook]]\nname = \"billing\"\nurl = \"{}\"\nsecret = \"{SECRET}\"\n",
        receiver.url()
    );
    std::fs::write(&file, config).unwrap();
    let mut command = database.command();
    command.arg("--config").arg(&file);
    let server = Served::start(command);

    // The whole loop, with a failure and an end by time.
    let body = json!({ "amount": 1 });
    let action = post(&server, "actions", Some("k-1"), body).await;
    let (id, seen) = (
        action["request_id"].as_str().unwrap(),
        json!({ "digest": action["digest"] }),
    );
    post(
        &server,
        &format!("actions/{id}/approve"),
        None,
        seen.clone(),
    )
    .await;
    let claim = post(&server, &format!("actions/{id}/claim"), None, seen.clone()).await;
    let token = json!({ "token": claim["claim"]["token"] });
    post(&server, &format!("actions/{id}/renew"), None, token.clone()).await;
    post(&server, &format!("actions/{id}/fail"), None, token).await;
    post(
        &server,
        &format!("actions/{id}/approve"),
        None,
        seen.clone(),
    )
    .await;
    let mut short = seen.clone();
    short["lease"] = 1.into();
    post(&server, &format!("actions/{id}/claim"), None, short).await;
    until(&server, id, "execution", "unknown").await;
    post(
        &server,
        &format!("actions/{id}/approve"),
        None,
        seen.clone(),
    )
    .await;
    let claim = post(&server, &format!("actions/{id}/claim"), None, seen).await;
    let token = json!({ "token": claim["claim"]["token"] });
    post(&server, &format!("actions/{id}/complete"), None, token).await;
    post(&server, "reject", Some("k-2"), json!({})).await;
    let soon = jiff::Timestamp::try_from(SystemTime::now() + Duration::from_secs(1)).unwrap();
    let body = json!({ "aegis": { "expires_at": soon.to_string() } });
    let expiring = post(&server, "actions", Some("k-3"), body).await;
    until(
        &server,
        expiring["request_id"].as_str().unwrap(),
        "closed",
        "expired",
    )
    .await;
    let cancelled = post(&server, "actions", Some("k-4"), json!({})).await;
    let cancelled = cancelled["request_id"].as_str().unwrap();
    post(
        &server,
        &format!("actions/{cancelled}/cancel"),
        None,
        json!({}),
    )
    .await;
    let list = get(&server, "actions").await;
    assert_eq!(list["actions"].as_array().unwrap().len(), 4);
    get(&server, &format!("status/{id}")).await;
    // submitted, approved, claimed, failed, approved, claimed, lost, approved, claimed, completed; rejected;
    // submitted, expired; submitted, cancelled
    receiver.until_accepted(15).await;
    let ready = Call::new(server.addr, "GET", "/readyz").send().await;
    assert_eq!(ready.status, 200);
    let url = database.url("aegis_server");
    let state = run(aegis(&["webhooks", "state", "--json", "--store", &url])).expect(0);
    assert_eq!(state.json()["endpoints"][0]["name"], "billing");
    let stderr = server.stop().expect(0).stderr;
    assert!(
        !stderr.contains("WARN") && !stderr.contains("ERROR"),
        "{stderr}"
    );
    let stands = stderr.matches("walls tenants off").count();
    assert_eq!(stands, 1, "{stderr}");
    run(aegis(&["webhooks", "forget", "billing", "--store", &url])).expect(0);

    // What the role may not do.
    let role = connect(&url).await;
    for denied in [
        "CREATE TABLE mine (x int)",
        "ALTER TABLE action ADD COLUMN mine int",
        "DROP TABLE event",
        "UPDATE event SET actor = 'somebody'",
        "DELETE FROM event",
        "TRUNCATE event",
        "UPDATE event_default SET actor = 'somebody'",
        "UPDATE feed SET position = 0",
        "DELETE FROM feed",
        "DELETE FROM action",
        "DELETE FROM claim",
        "UPDATE cluster SET epoch = 7",
        "DELETE FROM publisher",
        "INSERT INTO aegis_schema VALUES (99, 'me')",
        "ALTER TABLE action DISABLE ROW LEVEL SECURITY",
        "DROP POLICY aegis_tenants ON action",
        "SELECT * FROM event_default",
    ] {
        let error = role.batch_execute(denied).await.expect_err(denied);
        let code = error.code().map(|code| code.code());
        assert_eq!(code, Some("42501"), "{denied}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_right_of_the_manual_is_needed_and_named_where_it_is_missing() {
    let database = Database::set_up().await;
    let rows = database
        .admin
        .query(
            "SELECT table_name::text, privilege_type::text FROM information_schema.role_table_grants \
             WHERE grantee = 'aegis_server'",
            &[],
        )
        .await
        .unwrap();
    let granted: BTreeSet<(String, String)> =
        rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(granted.len() > 20, "{granted:?}");
    for (table, verb) in &granted {
        let change = |what: &str, to: &str| format!("{what} {verb} ON {table} {to} aegis_server");
        let revoke = change("REVOKE", "FROM");
        database.admin.batch_execute(&revoke).await.unwrap();
        let stderr = run(database.command()).expect(1).stderr;
        let says = format!("lacks {verb} on the table {table} ");
        assert!(stderr.contains(&says), "{says}: {stderr}");
        assert!(stderr.contains("The least role"), "{stderr}");
        database
            .admin
            .batch_execute(&change("GRANT", "TO"))
            .await
            .unwrap();
    }
    for (revoke, says) in [
        (
            "REVOKE EXECUTE ON FUNCTION aegis_insert FROM PUBLIC",
            "lacks EXECUTE on the function aegis_insert ",
        ),
        (
            "REVOKE INSERT ON event FROM aegis_server; REVOKE UPDATE ON action FROM aegis_server",
            "lacks UPDATE on the table action, INSERT on the table event, EXECUTE on",
        ),
        (
            "REVOKE USAGE ON SCHEMA public FROM aegis_server, PUBLIC",
            "lacks USAGE on the schema",
        ),
    ] {
        database.admin.batch_execute(revoke).await.unwrap();
        let stderr = run(database.command()).expect(1).stderr;
        assert!(stderr.contains(says), "{says}: {stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_rights_of_retention_a_server_removes_what_is_over() {
    let database = Database::set_up().await;
    let builder = PostgresStore::builder(database.url("aegis_server")).migrate(false);
    let store = builder.connect().await.unwrap();
    for key in ["k-1", "k-2", "k-3"] {
        let decide = Decide {
            identity: Identity {
                tenant_id: "acme".parse().unwrap(),
                thread_id: "run-1".parse().unwrap(),
                idempotency_key: key.parse().unwrap(),
            },
            decision: Decision::Reject,
            call_id: None,
            payload: None,
            comment: None,
            actor: Actor::new("reviewer"),
            require_submission: false,
            allow_self_approval: true,
        };
        let decided = store.decide(decide).await.unwrap();
        assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
    }
    let sweep = Sweep {
        retention: Duration::ZERO,
        limit: 10,
    };
    let refused = store.sweep(sweep.clone()).await.unwrap_err().to_string();
    assert!(
        refused.contains("permission denied for table postponed"),
        "{refused}"
    );
    let owner = connect(&database.url("aegis_owner")).await;
    owner.batch_execute(&database.retention).await.unwrap();
    // The newest stays.
    assert_eq!(store.sweep(sweep).await.unwrap().removed, 2);
    store.close().await;
}
