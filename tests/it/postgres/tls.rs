//! TLS with the database.

use std::io;
use std::path::Path;
use std::sync::Arc;

use aegis_hitl::store::{PostgresStore, Store, StoreError};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::record;
use crate::support::HANG;
use crate::support::postgres::{Postgres, connect, leave};
use crate::support::process::port;
use crate::support::tls::{Authority, Certified, write_key};

/// The answer to a request for TLS.
const YES: &[u8] = b"S";
const NO: &[u8] = b"N";

/// A request for TLS: its length and its code.
const REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// A server with TLS, and what its clients know of its authority.
struct Secure {
    server: Postgres,
    authority: Authority,
    folder: TempDir,
}

impl Secure {
    /// Starts a server whose certificate is for `localhost`.
    fn start() -> Self {
        let authority = Authority::new("the database's authority");
        let settings = [
            "listen_addresses = '127.0.0.1'",
            "ssl = on",
            "ssl_ca_file = 'roots.pem'",
        ];
        let server = Postgres::start_at(port(), &settings, |data| {
            give(data, "roots.pem", &authority.pem());
            certify(data, &authority.issue("localhost"));
        });
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("roots.pem"), authority.pem()).unwrap();
        Self {
            server,
            authority,
            folder,
        }
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// The URL of its database at a host and port, with these parameters.
    fn url(&self, user: &str, host: &str, port: u16, parameters: &str) -> String {
        format!("postgres://{user}@{host}:{port}/postgres?{parameters}")
    }

    /// The parameters for a mode that trusts the authority.
    fn trusting(&self, mode: &str) -> String {
        format!("sslmode={mode}&sslrootcert={}", self.file("roots.pem"))
    }
}

/// Writes a file for a server that has this folder, which must be the only one who can read it.
fn give(data: &Path, name: &str, pem: &str) {
    write_key(&data.join(name), pem);
    leave(&data.join(name));
}

fn certify(data: &Path, certified: &Certified) {
    give(data, "server.crt", &certified.certificate);
    give(data, "server.key", &certified.key);
}

/// The error of a store that cannot be opened. It never shows a password.
async fn refused(url: &str) -> StoreError {
    let error = PostgresStore::connect(url).await.expect_err(url);
    let mut shown = format!("{error} {error:?}");
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        shown += &error.to_string();
        cause = error.source();
    }
    assert!(!shown.contains("s3cret"), "{shown}");
    error
}

/// Fails unless the error says each of these, and asks for a change of the settings.
fn says(error: &StoreError, words: &[&str]) {
    let text = error.to_string();
    assert!(error.is_incompatible(), "{error:?}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_connection_has_tls_with_the_certificate_of_the_host_that_was_named() {
    let secure = Secure::start();
    let port = secure.server.port();
    for mode in ["verify-full", "require"] {
        let url = secure.url("aegis", "localhost", port, &secure.trusting(mode));
        let store = PostgresStore::connect(&url).await.unwrap();
        record(&store, mode).await;
        let client = connect(&secure.server.url("postgres")).await;
        let found = client
            .query_one(
                "SELECT bool_and(s.ssl), count(*) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) \
                 WHERE a.application_name = 'aegis'",
                &[],
            )
            .await
            .unwrap();
        // The one that listens is among them.
        assert!(found.get::<_, bool>(0), "{mode}");
        assert!(found.get::<_, i64>(1) >= 2, "{mode}");
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_not_the_one_that_was_meant_is_refused() {
    let secure = Secure::start();
    let port = secure.server.port();
    let user = "aegis:s3cret";
    let trusting = secure.trusting("verify-full");

    let other_host = refused(&secure.url(user, "127.0.0.1", port, &trusting)).await;
    let place = format!("127.0.0.1:{port}/postgres");
    says(
        &other_host,
        &[&place, "for another host", "subjectAltName", "URL"],
    );

    let stranger = Authority::new("another authority");
    std::fs::write(secure.file("other.pem"), stranger.pem()).unwrap();
    let parameters = format!("sslmode=require&sslrootcert={}", secure.file("other.pem"));
    let place = format!("localhost:{port}/postgres");
    let trusted = ["authority that is not trusted", "sslrootcert", "system"];
    let unknown = refused(&secure.url(user, "localhost", port, &parameters)).await;
    says(&unknown, &[&[&*place][..], &trusted].concat());
    // Nor does the system trust it.
    for parameters in ["sslmode=verify-full", "sslmode=require&sslrootcert=system"] {
        let unknown = refused(&secure.url(user, "localhost", port, parameters)).await;
        says(&unknown, &[&[&*place][..], &trusted].concat());
    }

    let expired = secure.authority.issue_until("localhost", 2020);
    certify(&secure.server.data(), &expired);
    let admin = connect(&secure.server.url("postgres")).await;
    admin
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    let deadline = Instant::now() + HANG;
    let expired = loop {
        match PostgresStore::connect(secure.url(user, "localhost", port, &trusting)).await {
            Ok(store) => store.close().await,
            Err(error) => break error,
        }
        assert!(Instant::now() < deadline, "it keeps its certificate");
    };
    says(&expired, &[&place, "has expired", "valid now"]);
    assert!(!format!("{expired:?}").contains("s3cret"));
    // Without a mode that verifies, any certificate is taken.
    let unverified = secure.url("aegis", "127.0.0.1", port, "sslmode=prefer");
    let store = PostgresStore::connect(unverified).await.unwrap();
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_password_goes_over_tls_and_is_bound_to_it() {
    let secure = Secure::start();
    let port = secure.server.port();
    let admin = connect(&secure.server.url("postgres")).await;
    admin
        .batch_execute("CREATE ROLE locked LOGIN SUPERUSER PASSWORD 'right'")
        .await
        .unwrap();
    let bound = format!("{}&channel_binding=require", secure.trusting("verify-full"));
    let right = secure.url("locked:right", "localhost", port, &bound);
    PostgresStore::connect(&right).await.unwrap().close().await;
    let wrong = refused(&secure.url("locked:s3cret", "localhost", port, &bound)).await;
    says(&wrong, &["locked", "PGPASSWORD"]);
    // Without TLS the server does not let it in.
    let plain = secure.url("locked:s3cret", "localhost", port, "sslmode=disable");
    says(
        &refused(&plain).await,
        &["locked", "no encryption", "pg_hba.conf"],
    );

    // Somebody between the two has a certificate of his own, which is not looked at.
    let between = between(&Authority::new("anybody"), &secure).await;
    let unbound = "sslmode=prefer&channel_binding=disable";
    let through = secure.url("locked:right", "localhost", between, unbound);
    let store = PostgresStore::connect(&through).await.unwrap();
    store.close().await;
    for binding in ["prefer", "require"] {
        let parameters = format!("sslmode=prefer&channel_binding={binding}");
        let through = secure.url("locked:right", "localhost", between, &parameters);
        let seen = refused(&through).await;
        says(&seen, &["locked", "channel binding"]);
    }
}

/// Takes connections with TLS, and passes what comes on to the server, over TLS too.
async fn between(anybody: &Authority, secure: &Secure) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = anybody.issue("localhost").acceptor();
    let connector = TlsConnector::from(Arc::new(secure.authority.client()));
    let to = secure.server.port();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let (acceptor, connector) = (acceptor.clone(), connector.clone());
            tokio::spawn(async move {
                let mut client = acceptor.accept(requested(client, YES).await?).await?;
                let mut server = TcpStream::connect(("127.0.0.1", to)).await?;
                server.write_all(&REQUEST).await?;
                assert_eq!(server.read_u8().await?, YES[0]);
                let name = ServerName::try_from("localhost").unwrap();
                let mut server = connector.connect(name, server).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    port
}

/// Reads the request for TLS, and answers it.
async fn requested(mut client: TcpStream, answer: &[u8]) -> io::Result<TcpStream> {
    let mut request = [0; REQUEST.len()];
    client.read_exact(&mut request).await?;
    assert_eq!(request, REQUEST);
    client.write_all(answer).await?;
    Ok(client)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn where_tls_is_required_nothing_is_sent_without_it() {
    let authority = Authority::new("the database's authority");
    let folder = TempDir::new().unwrap();
    let roots = folder.path().join("roots.pem");
    std::fs::write(&roots, authority.pem()).unwrap();

    // A server that has none, or somebody before it who says so.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = tokio::spawn(async move {
        let mut heard = Vec::new();
        for _ in 0..2 {
            let (client, _) = listener.accept().await.unwrap();
            let mut client = requested(client, NO).await.unwrap();
            client.read_to_end(&mut heard).await.unwrap();
        }
        heard
    });
    for mode in ["require", "verify-full"] {
        let url = format!(
            "postgres://aegis:s3cret@localhost:{port}/aegis?sslmode={mode}&sslrootcert={}",
            roots.display()
        );
        let place = format!("localhost:{port}/aegis");
        says(
            &refused(&url).await,
            &[
                &place,
                "offers no TLS",
                "ssl=on",
                "sslmode=disable or prefer",
            ],
        );
    }
    assert_eq!(heard.await.unwrap(), b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_certificate_can_take_the_place_of_a_password() {
    let secure = Secure::start();
    let port = secure.server.port();
    let admin = connect(&secure.server.url("postgres")).await;
    admin
        .batch_execute("CREATE ROLE certified LOGIN SUPERUSER")
        .await
        .unwrap();
    let shown = |certified: &Certified, name: &str| {
        let folder = secure.folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let (certificate, key) = certified.write(Path::new(&folder));
        let parameters = format!(
            "{}&sslcert={}&sslkey={}",
            secure.trusting("verify-full"),
            certificate.display(),
            key.display()
        );
        secure.url("certified", "localhost", port, &parameters)
    };
    let right = shown(&secure.authority.issue("certified"), "right");
    let store = PostgresStore::connect(&right).await.unwrap();
    record(&store, "k").await;
    assert!(store.check().await.is_ok());
    store.close().await;

    let trusting = secure.trusting("verify-full");
    let none = secure.url("certified", "localhost", port, &trusting);
    says(&refused(&none).await, &["certified", "certificate"]);
    let another = shown(&secure.authority.issue("somebody"), "another");
    says(&refused(&another).await, &["certified", "does not let"]);
    let unknown = Authority::new("another authority").issue("certified");
    let unknown = shown(&unknown, "unknown");
    says(&refused(&unknown).await, &["sslcert", "trusts"]);
}
