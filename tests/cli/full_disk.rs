//! A server whose disk is full acknowledges nothing, says so, and goes on by itself once there is room.

use std::collections::HashMap;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use aegis_hitl::layer::Backoff;
use aegis_hitl::{AegisService, Receipt};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::binary::{Served, aegis};
use crate::support::rows::{counts, integrity, look_at};
use crate::support::{Call, HANG, Reply, alone};

/// The largest file that may be, in blocks of 512 or 1024 bytes, as the shell has it.
const LIMIT: usize = 1024;

/// Calls that are made while the disk is full.
const LATE: usize = 12;

/// Longer than the pause between two attempts of the store to recover.
const PAUSE: Duration = Duration::from_millis(400);

fn large() -> serde_json::Value {
    json!({ "text": "x".repeat(100_000) })
}

async fn decide(server: &Served, key: &str) -> Reply {
    Call::post(server.addr, "approve", key)
        .json(large().to_string())
        .send()
        .await
}

async fn readiness(server: &Served) -> Reply {
    Call::new(server.addr, "GET", "/readyz").send().await
}

/// Decides until the store has no room left even to recover, and returns what was acknowledged.
async fn fill(server: &Served) -> HashMap<String, String> {
    let mut acknowledged = HashMap::new();
    let since = Instant::now();
    for number in 0.. {
        assert!(since.elapsed() < HANG, "the disk is not full");
        let key = format!("early-{number}");
        let reply = decide(server, &key).await;
        match reply.status {
            202 => {
                acknowledged.insert(key, reply.request_id());
            }
            _ => {
                assert_unavailable(&reply);
                // As long as the log can be emptied into the database there is room once more.
                if readiness(server).await.status == 503 {
                    sleep(PAUSE).await;
                    if readiness(server).await.status == 503 {
                        break;
                    }
                }
            }
        }
    }
    acknowledged
}

fn assert_unavailable(reply: &Reply) {
    assert_eq!(reply.status, 503, "{reply:?}");
    assert_eq!(reply.header("retry-after"), Some("1"), "{reply:?}");
    assert_eq!(reply.text("code"), "unavailable", "{reply:?}");
}

fn make_room(server: &Served) {
    let pid = server.pid().to_string();
    let done = Command::new("prlimit")
        .args(["--pid", &pid, "--fsize=unlimited"])
        .output()
        .unwrap_or_else(|error| panic!("prlimit: {error}; apt-get install util-linux"));
    assert!(done.status.success(), "{done:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_full_disk_is_503_and_what_was_acknowledged_stays() {
    let _alone = alone().await;
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    // Past the limit a write fails, as on a full disk; it would also send a signal, if that were not ignored.
    let script = format!("trap '' XFSZ; ulimit -S -f {LIMIT}; exec \"$@\"");
    let mut command = Command::new("sh");
    let binary = aegis(&["serve", "--listen", "127.0.0.1:0", "--store"]);
    command
        .args(["-c", &script, "sh"])
        .arg(binary.get_program());
    command.args(binary.get_args()).arg(&store);
    let server = Served::start(command);
    assert_eq!(readiness(&server).await.status, 200);

    let mut acknowledged = fill(&server).await;
    assert!(!acknowledged.is_empty());
    for key in ["full-1", "full-2"] {
        assert_unavailable(&decide(&server, key).await);
        assert_unavailable(&readiness(&server).await);
    }
    let live = Call::new(server.addr, "GET", "/livez").send().await;
    assert_eq!(live.status, 200);

    // Calls that begin now are answered 503, and end well all the same.
    let refused = watch::Sender::new(0);
    let (service, mut refusals) = (counting(&server, refused.clone()), refused.subscribe());
    let mut late = JoinSet::new();
    for number in 0..LATE {
        let (service, key) = (service.clone(), format!("late-{number}"));
        late.spawn(async move {
            let receipt = service.reject(key.as_str()).payload(&large()).await;
            (key, receipt.unwrap())
        });
    }
    let all = refusals.wait_for(|refusals| *refusals >= LATE);
    timeout(HANG, all).await.unwrap().unwrap();
    assert!(late.try_join_next().is_none());

    make_room(&server);
    let since = Instant::now();
    while readiness(&server).await.status != 200 {
        assert!(since.elapsed() < HANG, "it does not recover");
        sleep(Duration::from_millis(20)).await;
    }
    let late: Vec<(String, Receipt)> = timeout(HANG, late.join_all()).await.unwrap();
    for (key, receipt) in late {
        assert!(receipt.attempts() > 1);
        acknowledged.insert(key, receipt.request_id().unwrap().to_string());
    }

    let database = look_at(&store);
    assert_eq!(integrity(&database), "ok");
    let [decisions, events] = counts(&database);
    assert_eq!(decisions, events);
    for (key, id) in &acknowledged {
        let sql = "SELECT request_id, decision FROM readable_action WHERE idempotency_key = ?1";
        let row = database.query_row(sql, [key], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
        });
        let expected = if key.starts_with("late") {
            "reject"
        } else {
            "approve"
        };
        assert_eq!(row.unwrap(), (id.clone(), expected.to_owned()), "{key}");
    }
    drop(database);
    let ended = server.stop().expect(0);
    assert!(ended.stderr.contains("the store is unready"), "{ended:?}");
    assert!(
        ended.stderr.contains("the store is ready again"),
        "{ended:?}"
    );
}

type Refused = watch::Sender<usize>;
type Counting = tower::util::BoxCloneSyncService<
    Request<Full<Bytes>>,
    Response<Incoming>,
    hyper_util::client::legacy::Error,
>;

/// A client that counts the answers that are 503.
fn counting(server: &Served, refused: Refused) -> AegisService<Counting> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let refused = Arc::new(refused);
    let service = tower::service_fn(move |request| {
        let (call, refused) = (client.request(request), refused.clone());
        async move {
            let answer = call.await?;
            refused.send_modify(|count| *count += usize::from(answer.status() == 503));
            Ok(answer)
        }
    });
    AegisService::builder()
        .base_url(server.url())
        .tenant_id("acme")
        .thread_id("run-7")
        .max_retries(1000)
        .backoff(Backoff::constant(Duration::from_millis(50)))
        .build_with(Counting::new(service))
        .unwrap()
}
