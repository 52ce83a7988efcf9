//! What cannot be opened, and what the error says.

use aegis_hitl::store::{PostgresStore, Store, StoreError};

use super::decision;
#[cfg(feature = "server")]
use super::{migrated, name_of};
#[cfg(feature = "server")]
use crate::support::Log;
use crate::support::postgres::{Postgres, connect};

async fn refused(url: &str) -> StoreError {
    let opened = PostgresStore::builder(url).connect().await;
    let error = opened.expect_err(url);
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("s3cret"), "{shown}");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_opened_is_refused_with_what_to_change() {
    let server = Postgres::shared();
    let folder = server.folder().to_str().unwrap().replace('/', "%2F");

    let missing = refused(&server.url("missing")).await;
    assert!(
        missing.is_incompatible() && missing.to_string().contains("createdb"),
        "{missing}"
    );

    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let nobody = refused(&format!("postgres://aegis:s3cret@127.0.0.1:{port}/aegis")).await;
    assert!(
        nobody.is_unavailable() && nobody.to_string().contains("refused"),
        "{nobody}"
    );

    let admin = server.client("postgres").await;
    let role = "CREATE ROLE locked LOGIN PASSWORD 'right'; CREATE ROLE guest LOGIN";
    admin.batch_execute(role).await.unwrap();
    let wrong = refused(&format!("postgres://locked:s3cret@{folder}/postgres")).await;
    let says = wrong.to_string();
    assert!(
        wrong.is_incompatible() && says.contains("locked") && says.contains("PGPASSWORD"),
        "{says}"
    );
    let none = refused(&format!("postgres://locked@{folder}/postgres")).await;
    assert!(
        none.is_incompatible() && none.to_string().contains("password"),
        "{none}"
    );
    let stranger = refused(&format!("postgres://stranger:s3cret@{folder}/postgres")).await;
    assert!(stranger.is_incompatible(), "{stranger}");

    let url = server.database().await;
    let guest = url.replace("aegis@", "guest@");
    let rights = refused(&guest).await;
    assert!(
        rights.is_incompatible() && rights.to_string().contains("CREATE"),
        "{rights}"
    );

    let unmade = PostgresStore::builder(&url)
        .migrate(false)
        .connect()
        .await
        .unwrap_err();
    assert!(
        unmade.is_incompatible() && unmade.to_string().contains("--no-migrate"),
        "{unmade}"
    );

    PostgresStore::connect(&url).await.unwrap().close().await;
    PostgresStore::builder(&url)
        .migrate(false)
        .connect()
        .await
        .unwrap()
        .close()
        .await;
    let client = connect(&url).await;
    let newer = "INSERT INTO aegis_schema (version, made_by) VALUES (99, '9.9.9')";
    client.batch_execute(newer).await.unwrap();
    let newer = refused(&url).await;
    let says = newer.to_string();
    assert!(
        newer.is_incompatible() && says.contains("99") && says.contains("versions 1 to "),
        "{says}"
    );

    let latin = "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1'";
    admin.batch_execute(latin).await.unwrap();
    let latin = refused(&server.url("latin")).await;
    assert!(
        latin.is_incompatible() && latin.to_string().contains("UTF8"),
        "{latin}"
    );
}

/// Makes a database say that it has another version, or is another product, and returns its URL.
async fn pretending(number: u32, version: &str, product: &str) -> String {
    let url = Postgres::shared().database().await;
    let client = connect(&url).await;
    let name = url.rsplit('/').next().unwrap();
    // What the database itself has under these names is found behind these.
    let pretend = format!(
        "CREATE SCHEMA pretended; \
         CREATE FUNCTION pretended.current_setting(name text) RETURNS text STABLE LANGUAGE sql AS $$ \
           SELECT CASE name WHEN 'server_version_num' THEN '{number}' WHEN 'server_version' THEN '{version}' \
           ELSE pg_catalog.current_setting(name) END $$; \
         CREATE FUNCTION pretended.version() RETURNS text STABLE LANGUAGE sql AS $$ SELECT '{product}' $$; \
         ALTER DATABASE {name} SET search_path = pretended, pg_catalog, public"
    );
    client.batch_execute(&pretend).await.unwrap();
    url
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_version_that_is_too_old_is_refused_before_anything_is_made() {
    for (number, version) in [
        (90_624, "9.6.24"),
        (130_023, "13.23 (Debian 13.23-1)"),
        (139_999, "13.9999"),
    ] {
        let product =
            format!("PostgreSQL {version} on x86_64-pc-linux-gnu, compiled by gcc, 64-bit");
        let url = pretending(number, version, &product).await;
        let says = |error: StoreError| {
            let text = error.to_string();
            assert!(error.is_incompatible(), "{error:?}");
            for part in [version, "PostgreSQL at", "allowed is 14 and later"] {
                assert!(text.contains(part), "no {part:?} in {text:?}");
            }
        };
        says(refused(&url).await);
        says(
            PostgresStore::builder(&url)
                .migrate_schema()
                .await
                .unwrap_err(),
        );
        let client = connect(&url).await;
        let made = "SELECT count(*) FROM pg_class WHERE relnamespace = 'pretended'::regnamespace";
        let made = client.query_one(made, &[]).await.unwrap();
        assert_eq!(made.get::<_, i64>(0), 0, "{version}");
    }
    let oldest = "PostgreSQL 14.0 on x86_64-pc-linux-gnu, compiled by gcc, 64-bit";
    let url = pretending(140_000, "14.0", oldest).await;
    PostgresStore::connect(&url).await.unwrap().close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_only_speaks_the_protocol_is_refused_by_its_name() {
    let cockroach = "CockroachDB CCL v25.2.1 (x86_64-pc-linux-gnu, built 2025/06/04, go1.23.7)";
    let yugabyte =
        "PostgreSQL 15.12-YB-2025.1.0.1-b3 on x86_64-pc-linux-gnu, compiled by clang, 64-bit";
    // Its version is one of PostgreSQL that it takes after, which may be recent enough some day.
    for (number, version, product, name) in [
        (130_000, "13.0.0", cockroach, "CockroachDB CCL v25.2.1"),
        (180_000, "18.0.0", cockroach, "CockroachDB CCL v25.2.1"),
        (
            150_012,
            "15.12-YB-2025.1.0.1-b3",
            yugabyte,
            "YugabyteDB 2025.1.0.1-b3",
        ),
    ] {
        let refused = refused(&pretending(number, version, product).await).await;
        let text = refused.to_string();
        assert!(refused.is_incompatible(), "{refused:?}");
        let says = format!("is {name}; allowed is PostgreSQL 14");
        assert!(text.contains(&says), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn servers_that_start_at_once_make_the_schema_once() {
    let url = Postgres::shared().database().await;
    let opening =
        (0..8).map(|_| tokio::spawn(PostgresStore::builder(&url).connections(2).connect()));
    for opened in futures_util::future::join_all(opening).await {
        opened.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_refusal_of_the_database_tells_of_a_row_is_not_told_to_logs() {
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let client = connect(&url).await;
    // PostgreSQL's detail is 'Failing row contains (acme, …)'.
    let refuse = "ALTER TABLE action ADD CONSTRAINT mine CHECK (idempotency_key <> 'k-hidden')";
    client.batch_execute(refuse).await.unwrap();
    let refused = store.decide(decision("k-hidden")).await.unwrap_err();
    let mut told = refused.to_string();
    let mut source = std::error::Error::source(&refused);
    while let Some(error) = source {
        told.push_str(&format!(": {error}"));
        source = error.source();
    }
    assert!(told.contains("SQLSTATE 23514"), "{told}");
    for hidden in ["acme", "k-hidden", "run-1"] {
        assert!(!told.contains(hidden), "{told}");
    }
    store.close().await;
}

// On one thread, whose log is read.
#[cfg(feature = "server")]
#[tokio::test]
async fn a_server_warns_of_a_database_that_logs_parameters() {
    const NEVER: &str = "log_parameter_max_length = 0";
    let log = Log::capture(tracing::Level::WARN);
    let url = migrated().await;
    let client = connect(&url).await;
    let warnings = async || {
        PostgresStore::connect(&url).await.unwrap().close().await;
        log.text().matches(NEVER).count()
    };
    assert_eq!(warnings().await, 0, "{}", log.text());
    let set = async |setting: &str| {
        let set = format!("ALTER DATABASE {} SET {setting}", name_of(&url));
        client.batch_execute(&set).await.unwrap();
    };
    set("log_min_duration_statement = '1h'").await;
    assert_eq!(warnings().await, 1, "{}", log.text());
    set(NEVER).await;
    assert_eq!(warnings().await, 1, "{}", log.text());
    set("log_parameter_max_length_on_error = 64").await;
    assert_eq!(warnings().await, 2, "{}", log.text());
}
