//! `aegis serve` on a PostgreSQL database.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::binary::{Served, aegis, run, serve};
use crate::manual::commands_of;
use crate::support::Call;
use crate::support::postgres::Postgres;

fn on(url: &str) -> Command {
    serve(Path::new(url))
}

async fn decide(server: &Served, decision: &str, key: &str) -> (u16, Value) {
    let call = Call::new(server.addr, "POST", format!("/api/v1/hitl/{decision}"))
        .header("Tenant-Id", "acme")
        .header("Thread-Id", "run-1")
        .header("Idempotency-Key", key)
        .json("{}");
    let reply = call.send().await;
    (reply.status, serde_json::from_slice(&reply.body).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_on_one_database_decide_once_and_are_replaced_at_will() {
    let url = Postgres::shared().database().await;
    let mut servers = [Served::start(on(&url)), Served::start(on(&url))];
    let (status, first) = decide(&servers[0], "approve", "k-1").await;
    assert_eq!(status, 202, "{first}");
    for round in 0..3 {
        // The one that recorded the decision goes first.
        let next = Served::start(on(&url));
        let gone = std::mem::replace(&mut servers[round % 2], next);
        if round == 0 {
            gone.kill();
        } else {
            gone.stop().expect(0);
        }
        for server in &servers {
            let (status, again) = decide(server, "approve", "k-1").await;
            assert_eq!(status, 409, "{again}");
            let (status, other) = decide(server, "reject", "k-1").await;
            assert_eq!(status, 422, "{other}");
            let ready = Call::new(server.addr, "GET", "/readyz").send().await;
            assert_eq!(ready.status, 200);
        }
        let (status, new) = decide(&servers[round % 2], "approve", &format!("new-{round}")).await;
        assert_eq!(status, 202, "{new}");
    }
    let state = run(aegis(&["webhooks", "state", "--json", "--store", &url])).expect(0);
    assert_eq!(state.json()["endpoints"], Value::Array(vec![]));
    for server in servers {
        let stderr = server.stop().expect(0).stderr;
        assert!(stderr.contains("store postgres://"), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_used_ends_the_start_without_its_password() {
    let url = Postgres::shared().database().await;
    let with_password = url.replace("aegis@", "aegis:s3cret@");
    for (url, no_migrate, code, says) in [
        (&*with_password, true, 1, "--no-migrate"),
        ("mysql://aegis:s3cret@host/aegis", false, 2, "mysql://…"),
        (
            "postgres://aegis:s3cret@host:0x1/aegis",
            false,
            2,
            "postgres://user@host:5432/database",
        ),
        (
            "postgres://aegis:s3cret@127.0.0.1:1/aegis",
            false,
            1,
            "cannot be reached",
        ),
    ] {
        let mut command = on(url);
        if no_migrate {
            command.arg("--no-migrate");
        }
        let ended = run(command).expect(code);
        assert!(ended.stderr.contains(says), "{says}: {ended:?}");
        assert!(!ended.stderr.contains("s3cret"), "{ended:?}");
    }
    // Nor does the help show it.
    let mut help = aegis(&["serve", "--help"]);
    help.env("AEGIS_STORE", &with_password);
    let help = run(help).expect(0);
    assert!(!help.stdout.contains("s3cret"), "{help:?}");
}

#[test]
fn the_commands_of_the_scaling_page_run_as_written() {
    let server = Postgres::start(&[]);
    let all = commands_of("scaling.md", "Start");
    let (create, rest): (Vec<_>, Vec<_>) =
        all.lines().partition(|line| line.starts_with("createdb"));
    let (serves, rest): (Vec<_>, Vec<_>) = rest
        .into_iter()
        .partition(|line| line.starts_with("aegis serve"));
    let path = std::env::var("PATH").unwrap_or_default();
    let binary = Path::new(env!("CARGO_BIN_EXE_aegis")).parent().unwrap();
    let path = format!("{}:{}:{path}", binary.display(), server.bin().display());
    let shell = |script: &str| {
        let mut shell = Command::new("bash");
        shell
            .args(["-euo", "pipefail", "-c", script])
            .env("PATH", &path);
        shell.env("PGHOST", server.folder()).env("PGUSER", "aegis");
        for name in [
            "AEGIS_TOKEN",
            "AEGIS_CONFIG",
            "AEGIS_TENANT",
            "AEGIS_THREAD",
        ] {
            shell.env_remove(name);
        }
        run(shell).expect(0)
    };
    shell(&create.join("\n"));
    // The ports of the page may be taken, and its PostgreSQL is the system's.
    let folder = server.folder().to_str().unwrap();
    let place = "host=/var/run/postgresql\"";
    let mut script = rest.join("\n");
    assert!(script.contains(place), "{script}");
    script = script.replace(place, &format!("host={folder}&user=aegis\""));
    let mut servers = Vec::new();
    for line in serves {
        let url = line
            .split_whitespace()
            .find(|word| word.starts_with("postgres://"))
            .unwrap();
        let url = url.replace("/var/run/postgresql", folder) + "&user=aegis";
        let served = Served::start(on(&url));
        let port = line
            .split_whitespace()
            .find_map(|word| word.strip_prefix("127.0.0.1:"));
        script = script.replace(
            &format!("http://127.0.0.1:{}", port.unwrap()),
            &served.url(),
        );
        servers.push(served);
    }
    assert_eq!(servers.len(), 2);
    let ended = shell(&script);
    assert!(
        ended.stdout.contains("charge-1") && ended.stdout.contains("approve"),
        "{ended:?}"
    );
    for served in servers {
        served.stop().expect(0);
    }
}

#[test]
fn commands_for_files_refuse_a_database_and_do_not_show_its_url() {
    let url = "postgres://aegis:s3cret@127.0.0.1:1/aegis";
    for arguments in [&["backup", "--store", url, "copy.db"][..], &["check", url]] {
        let ended = run(aegis(arguments)).expect(2);
        assert!(!ended.stderr.contains("s3cret"), "{ended:?}");
        assert!(
            ended.stderr.contains("allowed") || ended.stderr.contains("alone"),
            "{ended:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_how_the_connections_to_the_database_are_used() {
    let url = Postgres::shared().database().await;
    let server = Served::start(on(&url));
    let (status, _) = decide(&server, "approve", "k-1").await;
    assert_eq!(status, 202);
    let text = Call::new(server.addr, "GET", "/metrics").send().await.body;
    let text = String::from_utf8(text.to_vec()).unwrap();
    let value = |name: &str| {
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name}: {text}"))
            .parse::<u64>()
            .unwrap()
    };
    let open = value("aegis_store_connections{state=\"idle\"}")
        + value("aegis_store_connections{state=\"busy\"}");
    let limit = value("aegis_store_connections_limit");
    assert!(
        0 < open && open <= limit && limit == 16,
        "{open} of {limit}"
    );
    assert_eq!(value("aegis_store_connections_waiting"), 0);
    assert_eq!(value("aegis_tombstones"), 0);
    assert!(value("aegis_store_committed_requests_total") > 0);
    server.stop().expect(0);
}
