//! TLS of the server's own, by files.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::binary::{Served, aegis, run, serve};
use crate::support::tls::{Certified, write_key};
use crate::support::{Call, HANG, Reply, ends, raw};

struct Place {
    folder: TempDir,
    identity: Certified,
    certificate: PathBuf,
    key: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let identity = Certified::new();
        let (certificate, key) = identity.write(folder.path());
        Self {
            folder,
            identity,
            certificate,
            key,
        }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("aegis.db")
    }

    fn serve(&self) -> Command {
        let mut command = serve(&self.store());
        command.arg("--tls-cert").arg(&self.certificate);
        command.arg("--tls-key").arg(&self.key);
        command
    }
}

async fn send(identity: &Certified, server: &Served, call: Call) -> Reply {
    let stream = identity.connect(server.addr, &[]).await.unwrap();
    ends(call.send_over("https", stream)).await.unwrap()
}

fn set_mode(file: &Path, mode: u32) {
    fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_speaks_https_with_both_versions_of_http() {
    let place = Place::new();
    let server = Served::start(place.serve());
    assert_eq!(server.url(), format!("https://{}", server.addr));
    for (number, protocol) in ["h2", "http/1.1"].into_iter().enumerate() {
        let stream = place.identity.connect(server.addr, &[protocol]).await;
        let stream = stream.unwrap();
        let settled = stream.get_ref().1.alpn_protocol();
        assert_eq!(settled, Some(protocol.as_bytes()));
        let call = Call::post(server.addr, "approve", &format!("k-{number}"));
        let call = if protocol == "h2" { call.http2() } else { call };
        let reply = ends(call.send_over("https", stream)).await.unwrap();
        assert_eq!(reply.status, 202);
    }
    let approve = |ca: &[&str]| {
        let mut command = aegis(&["approve", "k-2", "--tenant", "t", "--thread", "h"]);
        command
            .args(["--retries", "0", "--url", &server.url()])
            .args(ca);
        run(command)
    };
    approve(&["--ca", place.certificate.to_str().unwrap()]).expect(0);
    let ended = approve(&[]).expect(1);
    assert!(ended.stderr.contains("certificate"), "{ended:?}");
    let answer = raw(server.addr, "GET /livez HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    server.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn links_and_cookies_are_https_and_metrics_stay_plain() {
    let place = Place::new();
    let mut command = aegis(&["serve"]);
    let config = place.folder.path().join("aegis.toml");
    let text = format!(
        "[serve]\nlisten = \"127.0.0.1:0\"\nmetrics-listen = \"127.0.0.1:0\"\nstore = {:?}\n\
         tls-cert = {:?}\n",
        place.store(),
        place.certificate
    );
    fs::write(&config, text).unwrap();
    command.arg("--config").arg(&config);
    command.env("AEGIS_TLS_KEY", &place.key);
    let server = Served::start(command);
    let metrics = server.line("metrics on http://").unwrap();
    let metrics = metrics.split("http://").nth(1).unwrap();
    let metrics = metrics.trim_end_matches("/metrics").parse().unwrap();
    let scrape = Call::new(metrics, "GET", "/metrics").send().await;
    assert_eq!(scrape.status, 200);
    let link = server.line("inbox: https://").unwrap();
    let code = link.split_once("code=").unwrap().1;
    let code = code.split(' ').next().unwrap();
    let sign_in = Call::new(server.addr, "POST", "/sign-in")
        .header("Content-Type", "application/x-www-form-urlencoded")
        .header("Origin", server.url())
        .body(format!("code={code}"));
    let reply = send(&place.identity, &server, sign_in).await;
    assert_eq!(reply.status, 303);
    let cookie = reply.header("set-cookie").unwrap();
    assert!(cookie.starts_with("__Host-aegis="), "{cookie}");
    let session = cookie.split(';').next().unwrap();
    let list = Call::new(server.addr, "GET", "/tenants").header("Cookie", session);
    let reply = send(&place.identity, &server, list).await;
    assert_eq!(reply.status, 200);
    server.stop().expect(0);
}

#[test]
fn files_that_cannot_be_used_are_named_and_no_database_is_made() {
    let place = Place::new();
    let other = Certified::new();
    let path = |name: &str, text: &str| {
        let path = place.folder.path().join(name);
        write_key(&path, text);
        path
    };
    let empty = path("empty.pem", "");
    let broken = path(
        "broken.pem",
        "-----BEGIN CERTIFICATE-----\n???\n-----END CERTIFICATE-----\n",
    );
    let wrong = path("other.pem", &other.key);
    let missing = place.folder.path().join("missing.pem");
    let folder = place.folder.path();
    let (certificate, key) = (&*place.certificate, &*place.key);
    for (certificate, key, file, shown) in [
        (&*missing, key, "missing.pem", "No such file"),
        (folder, key, "", "no regular file"),
        (&empty, key, "empty.pem", "no certificate"),
        (&broken, key, "broken.pem", "not valid PEM"),
        (certificate, &missing, "missing.pem", "No such file"),
        (certificate, folder, "", "no regular file"),
        (certificate, &empty, "empty.pem", "no private key"),
        (certificate, certificate, "cert.pem", "can be read"),
        (certificate, &wrong, "other.pem does not fit", "cert.pem"),
    ] {
        let mut command = serve(&place.store());
        command.arg("--tls-cert").arg(certificate);
        command.arg("--tls-key").arg(key);
        let ended = run(command).expect(2);
        for part in [file, shown] {
            assert!(ended.stderr.contains(part), "{part}: {ended:?}");
        }
        assert!(!place.store().exists());
    }
    for (flag, other) in [("--tls-cert", "--tls-key"), ("--tls-key", "--tls-cert")] {
        let mut command = serve(&place.store());
        command.arg(flag).arg(certificate);
        let ended = run(command).expect(2);
        assert!(
            ended.stderr.contains(&format!(
                "no {}",
                match other {
                    "--tls-key" => "private key (--tls-key)",
                    _ => "certificate (--tls-cert)",
                }
            )),
            "{ended:?}"
        );
        assert!(!place.store().exists());
    }
}

#[test]
fn a_public_url_without_tls_does_not_go_with_a_certificate() {
    let place = Place::new();
    for (url, code) in [
        ("http://aegis.example.com", 2),
        ("https://aegis.example.com", 0),
    ] {
        let mut command = place.serve();
        command.args(["--public-url", url]);
        let ended = match Served::try_start(command) {
            Ok(server) => server.stop(),
            Err(ended) => ended,
        };
        let ended = ended.expect(code);
        assert_eq!(
            ended.stderr.contains("--public-url"),
            code == 2,
            "{ended:?}"
        );
    }
}

#[test]
fn a_key_that_others_can_read_or_replace_is_refused() {
    let place = Place::new();
    for mode in [0o644, 0o604, 0o660, 0o620, 0o602, 0o666] {
        set_mode(&place.key, mode);
        let ended = run(place.serve()).expect(2);
        for part in ["key.pem", &format!("{mode:04o}"), "chmod"] {
            assert!(ended.stderr.contains(part), "{part}: {ended:?}");
        }
        assert!(!ended.text().contains("PRIVATE"), "{ended:?}");
    }
    for mode in [0o600, 0o400, 0o640, 0o440] {
        set_mode(&place.key, mode);
        Served::start(place.serve()).stop().expect(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_reads_the_certificate_again() {
    let place = Place::new();
    let server = Served::start(place.serve());
    let mut kept = place.identity.connect(server.addr, &[]).await.unwrap();
    let mut ask = async || {
        let request = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n";
        kept.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\"ok\"}") {
            assert_ne!(ends(kept.read_buf(&mut answer)).await.unwrap(), 0);
        }
    };
    ask().await;
    let new = Certified::new();
    new.write(place.folder.path());
    server.signal("HUP");
    let said = server.line("cert.pem").unwrap();
    assert!(said.contains("INFO") && said.contains("key.pem"), "{said}");
    let approve = |key: &str| Call::post(server.addr, "approve", key);
    let reply = send(&new, &server, approve("k-1")).await;
    assert_eq!(reply.status, 202);
    assert!(place.identity.connect(server.addr, &[]).await.is_err());
    ask().await;
    server.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_certificate_leaves_the_one_in_force() {
    let place = Place::new();
    let server = Served::start(place.serve());
    let other = Certified::new();
    let (good, key) = (&place.identity.certificate, &place.identity.key);
    for (certificate, key, mode, shown) in [
        ("", &**key, 0o600, "cert.pem: there is no certificate"),
        (&**good, "", 0o600, "key.pem: there is no private key"),
        // As between the two files of a renewal.
        (&*other.certificate, key, 0o600, "key.pem does not fit"),
        (good, &other.key, 0o600, "key.pem does not fit"),
        (good, key, 0o644, "0644"),
    ] {
        fs::write(&place.certificate, certificate).unwrap();
        write_key(&place.key, key);
        set_mode(&place.key, mode);
        server.signal("HUP");
        let said = server.line(".pem").unwrap();
        assert!(said.contains("ERROR") && said.contains(shown), "{said}");
        assert!(said.contains("stays in force"), "{said}");
        let call = Call::new(server.addr, "GET", "/livez");
        assert_eq!(send(&place.identity, &server, call).await.status, 200);
    }
    fs::remove_file(&place.key).unwrap();
    server.signal("HUP");
    let said = server.line("key.pem").unwrap();
    assert!(said.contains("ERROR"), "{said}");
    let ended = server.stop().expect(0);
    assert!(!ended.text().contains("PRIVATE"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_no_handshake_and_for_the_request_in_flight() {
    let place = Place::new();
    let mut command = place.serve();
    command.env("AEGIS_LOG", "info,aegis_hitl=trace");
    let server = Served::start(command);
    let submit = Call::post(server.addr, "actions", "k");
    let id = send(&place.identity, &server, submit).await.request_id();
    let mut stalled = TcpStream::connect(server.addr).unwrap();
    stalled.set_read_timeout(Some(HANG)).unwrap();
    stalled.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
    let mut waiting = place.identity.connect(server.addr, &[]).await.unwrap();
    let request = format!(
        "GET /api/v1/hitl/status/{id} HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\n\
         Prefer: wait=55\r\n\r\n"
    );
    waiting.write_all(request.as_bytes()).await.unwrap();
    assert!(server.line("waits for a decision").is_some());
    server.signal("TERM");
    let _ = stalled.read_to_end(&mut Vec::new());
    let mut answer = String::new();
    ends(waiting.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("PENDING"), "{answer}");
    server.ended().expect(0);
}
