//! The metrics of the binary, read by Prometheus's own parser.

use std::fs;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::binary::{Served, aegis, run, serve};
use crate::python::{environment, python};
use crate::support::Call;

const PACKAGE: &str = "prometheus-client==0.22.1";

/// Prints each sample as `[name, labels, value]`, and the types by name.
const PARSE: &str = r#"
import json, sys, urllib.request
from prometheus_client.parser import text_string_to_metric_families

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(sys.argv[1], timeout=60) as answer:
    text = answer.read().decode()
families = list(text_string_to_metric_families(text))
print(json.dumps({
    "types": {family.name: family.type for family in families},
    "helps": {family.name: family.documentation for family in families},
    "samples": [[s.name, s.labels, float(s.value)] for family in families for s in family.samples],
}))
"#;

fn parsed(url: &str) -> Value {
    let import = "import prometheus_client.parser";
    let interpreter = environment("prometheus-client-0.22.1", &[PACKAGE], import);
    run(python(&interpreter, &["-c", PARSE, url]))
        .expect(0)
        .json()
}

fn metrics_url(server: &Served) -> String {
    let line = server.line("metrics on ").unwrap();
    line.split_once("metrics on ").unwrap().1.to_owned()
}

/// A server with keys, and metrics on a port of their own.
fn keyed(folder: &TempDir, change: impl FnOnce(&mut Command)) -> (Served, String) {
    let key = run(aegis(&[
        "keys", "new", "--tenant", "acme", "--name", "alice", "--scope", "admin", "--json",
    ]))
    .expect(0)
    .json();
    let keys = folder.path().join("keys");
    fs::write(&keys, key["line"].as_str().unwrap()).unwrap();
    let mut command = serve(&folder.path().join("aegis.db"));
    command.arg("--keys").arg(keys);
    change(&mut command);
    let secret = key["secret"].as_str().unwrap().to_owned();
    (Served::start(command), secret)
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_reads_every_line() {
    let folder = TempDir::new().unwrap();
    let (server, secret) = keyed(&folder, |command| {
        command.args(["--metrics-listen", "127.0.0.1:0"]);
        let config = folder.path().join("aegis.toml");
        // Nothing listens there, and nothing has to.
        let webhook = "[[webhook]]\nname = \"billing-1\"\n\
                       url = \"http://127.0.0.1:9/\"\nformat = \"slack\"\ntenants = [\"nobody\"]\n\
                       [serve]\npublic-url = \"https://aegis.example.com\"\n";
        fs::write(&config, webhook).unwrap();
        command.arg("--config").arg(config);
    });
    let url = metrics_url(&server);
    let call = Call::post(server.addr, "approve", "k").without("Tenant-Id");
    let call = call.header("Authorization", format!("Bearer {secret}"));
    assert_eq!(call.send().await.status, 202);

    let read = parsed(&url);
    let types = read["types"].as_object().unwrap();
    for (name, kind) in [
        ("aegis_build_info", "gauge"),
        ("aegis_connections", "gauge"),
        ("aegis_requests", "counter"),
        ("aegis_request_duration_seconds", "histogram"),
        ("aegis_decisions", "counter"),
        ("aegis_claims", "counter"),
        ("aegis_events", "counter"),
        ("aegis_store_ready", "gauge"),
        ("aegis_store_queued_requests", "gauge"),
        ("aegis_store_committed_requests", "counter"),
        ("aegis_store_commit_duration_seconds", "histogram"),
        ("aegis_oldest_pending_seconds", "gauge"),
        ("aegis_oldest_unclaimed_seconds", "gauge"),
        ("aegis_webhook_behind_events", "gauge"),
        ("aegis_webhook_parked_events", "gauge"),
        ("aegis_webhook_dead_events", "gauge"),
        ("aegis_webhook_stopped", "gauge"),
        ("aegis_removed_actions", "counter"),
        ("aegis_webhook_behind_seconds", "gauge"),
        ("aegis_webhook_deliveries", "counter"),
        ("aegis_tombstones", "gauge"),
        ("aegis_audit_unchained_events", "gauge"),
        ("aegis_reload_failures", "counter"),
        ("aegis_reload_last_success_timestamp_seconds", "gauge"),
    ] {
        assert_eq!(types[name], kind, "{name}");
        assert_ne!(read["helps"][name], "", "{name}");
    }
    assert_eq!(types.len(), 24, "{types:?}");
    let samples = read["samples"].as_array().unwrap();
    for expected in [
        serde_json::json!(["aegis_decisions_total", {"decision": "approve"}, 1.0]),
        serde_json::json!(["aegis_webhook_dead_events", {"webhook": "billing-1"}, 0.0]),
    ] {
        assert!(samples.contains(&expected), "{expected}: {read}");
    }
    let labels: Vec<_> = samples
        .iter()
        .flat_map(|sample| sample[1].as_object().unwrap().keys())
        .collect();
    for label in labels {
        let known = [
            "decision", "endpoint", "event", "le", "outcome", "status", "version", "webhook",
        ];
        assert!(known.contains(&label.as_str()), "{label}");
    }

    // A taken address is an error of the start.
    let addr = url.strip_prefix("http://").unwrap();
    let addr = addr.strip_suffix("/metrics").unwrap();
    let mut second = serve(&folder.path().join("other.db"));
    second.args(["--metrics-listen", addr]);
    let ended = Served::try_start(second).err().unwrap().expect(1);
    assert!(ended.stderr.contains("for metrics"), "{ended:?}");
    server.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_address_for_metrics_comes_from_the_environment_or_the_file_too() {
    for from_file in [false, true] {
        let folder = TempDir::new().unwrap();
        let (server, _) = keyed(&folder, |command| {
            if from_file {
                let config = folder.path().join("aegis.toml");
                fs::write(&config, "[serve]\nmetrics-listen = \"127.0.0.1:0\"\n").unwrap();
                command.arg("--config").arg(config);
            } else {
                command.env("AEGIS_METRICS_LISTEN", "127.0.0.1:0");
            }
        });
        let url = metrics_url(&server);
        let addr = url.strip_prefix("http://").unwrap();
        let addr = addr.strip_suffix("/metrics").unwrap().parse().unwrap();
        let reply = Call::new(addr, "GET", "/metrics").send().await;
        assert_eq!(reply.status, 200);
        let reply = Call::new(server.addr, "GET", "/metrics").send().await;
        assert_eq!(reply.status, 404);
        server.stop().expect(0);
    }
}
