//! Many calls at once, of many clients, on few identities: each is decided once.

use std::collections::HashMap;
use std::sync::Arc;

use aegis_hitl::store::Store;
use aegis_hitl::{AegisService, Decision};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::rows::{counts, integrity, look_at};
use crate::support::{Disk, Running, alone, start};

const IDENTITIES: usize = 50;
const CALLS: usize = 500;

/// What one call was told.
struct Told {
    key: String,
    asked: Decision,
    status: u16,
    replayed: bool,
    on_record: String,
}

/// Sends all calls at once, half of them through `AegisService` and half as plain requests.
async fn all_at_once(server: &Running, decision: fn(usize, usize) -> Decision) -> Vec<Told> {
    let service = AegisService::builder()
        .base_url(format!("http://{}", server.addr))
        .tenant_id("t")
        .thread_id("h")
        .build()
        .unwrap();
    let barrier = Arc::new(Barrier::new(CALLS));
    let mut calls = JoinSet::new();
    for call in 0..CALLS {
        let (identity, round) = (call % IDENTITIES, call / IDENTITIES);
        let (key, asked) = (format!("key-{identity}"), decision(identity, round));
        let barrier = barrier.clone();
        if round % 2 == 0 {
            let service = service.clone();
            calls.spawn(async move {
                barrier.wait().await;
                through_the_service(&service, key, asked).await
            });
        } else {
            let request = server.post(asked.as_str(), &key);
            let request = match round {
                1 => request,
                _ => request.header("X-Request-Id", format!("call-{call}")),
            };
            calls.spawn(async move {
                barrier.wait().await;
                let reply = request.send().await;
                let body = reply.json();
                let action = if reply.status == 202 {
                    &body
                } else {
                    &body["action"]
                };
                Told {
                    key,
                    asked,
                    status: reply.status,
                    replayed: reply.header("idempotency-replayed").is_some(),
                    on_record: action["decision"].as_str().unwrap().to_owned(),
                }
            });
        }
    }
    calls.join_all().await
}

async fn through_the_service(service: &AegisService, key: String, asked: Decision) -> Told {
    let (status, attempts, action) = match service.execute(asked, key.as_str()).await {
        Ok(receipt) => {
            assert_eq!(receipt.decision(), asked);
            let action = receipt.action().unwrap().clone();
            (receipt.status_code(), receipt.attempts(), action)
        }
        Err(error) => {
            assert!(error.is_conflict(), "{error:?}");
            let action = error.recorded().unwrap().clone();
            (error.status_code().unwrap(), error.attempts(), action)
        }
    };
    assert_eq!(attempts, 1, "every first answer is final");
    Told {
        key,
        asked,
        status: status.as_u16(),
        replayed: action.replayed,
        on_record: action.decision.unwrap().to_string(),
    }
}

async fn assert_decided_once(disk: &Disk, told: &[Told]) {
    assert_eq!(told.len(), CALLS);
    let mut decided = HashMap::new();
    for call in told.iter().filter(|call| call.status == 202) {
        assert!(!call.replayed, "no two calls were the same call");
        let first = decided.insert(&call.key, call.asked);
        assert_eq!(first, None, "{} was accepted twice", call.key);
    }
    assert_eq!(decided.len(), IDENTITIES);
    for call in told {
        let on_record = decided[&call.key];
        assert_eq!(call.on_record, on_record.as_str());
        let expected: &[u16] = if call.asked == on_record {
            &[202, 409]
        } else {
            &[422]
        };
        assert!(expected.contains(&call.status), "{}", call.status);
    }

    let totals = disk.totals().await.unwrap();
    let all = [totals.actions, totals.decisions, totals.events];
    assert_eq!(all, [IDENTITIES as u64; 3]);
    let database = look_at(&disk.path());
    assert_eq!(counts(&database), [IDENTITIES as u64; 2]);
    assert_eq!(integrity(&database), "ok");
    let mut rows = database
        .prepare(
            "SELECT idempotency_key, action.decision, event.decision, \
             CASE kind WHEN 'approved' THEN 'approve' WHEN 'rejected' THEN 'reject' END FROM action \
             JOIN event ON event.action = action.id",
        )
        .unwrap();
    let rows = rows.query_map([], |row| {
        Ok((row.get(0)?, [row.get(1)?, row.get(2)?, row.get(3)?]))
    });
    let rows: HashMap<String, [String; 3]> = rows.unwrap().map(Result::unwrap).collect();
    assert_eq!(rows.len(), IDENTITIES);
    for (key, decision) in decided {
        assert_eq!(rows[key], [decision.as_str(); 3]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn five_hundred_calls_on_fifty_identities_record_fifty_decisions() {
    let _alone = alone().await;
    let disk = Disk::default();
    let server = start(disk.clone()).await;
    let told = all_at_once(&server, |identity, _| match identity % 2 {
        0 => Decision::Approve,
        _ => Decision::Reject,
    })
    .await;
    assert!(told.iter().all(|call| matches!(call.status, 202 | 409)));
    assert_decided_once(&disk, &told).await;
    assert!(server.stop().await.is_drained());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_opposite_decisions_on_the_same_identities_one_is_recorded_for_each() {
    let _alone = alone().await;
    let disk = Disk::default();
    let server = start(disk.clone()).await;
    // Both decisions go both ways: rounds 0 and 1 approve, 2 and 3 reject, and so on.
    let told = all_at_once(&server, |identity, round| {
        match (identity + round / 2) % 2 {
            0 => Decision::Approve,
            _ => Decision::Reject,
        }
    })
    .await;
    assert!(told.iter().any(|call| call.status == 422));
    assert_decided_once(&disk, &told).await;
    assert!(server.stop().await.is_drained());
}
