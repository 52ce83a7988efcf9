//! What cannot be opened, and what the error says.

use aegis_hitl::store::{PostgresStore, StoreError};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn servers_that_start_at_once_make_the_schema_once() {
    let url = Postgres::shared().database().await;
    let opening =
        (0..8).map(|_| tokio::spawn(PostgresStore::builder(&url).connections(2).connect()));
    for opened in futures_util::future::join_all(opening).await {
        opened.unwrap().unwrap();
    }
}
