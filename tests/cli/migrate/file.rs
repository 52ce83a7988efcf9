//! A database file with a row of every kind.

use std::path::Path;
use std::time::{Duration, SystemTime};

use aegis_hitl::protocol::{ClaimToken, JsonText, Payload};
use aegis_hitl::store::{
    Acquire, Acquired, Actor, Cancel, Cancelled, Clock, Decide, DecideById, Decided,
    DeliveryResult, EndpointTaken, Fingerprinted, Finish, Finished, Identity, MarkDeliveries,
    Marked, Report, SqliteStore, Start, Store, Submission, Submit, Submitted, Sweep, TakeEndpoint,
};
use aegis_hitl::{Action, Decision, RequestId};
use uuid::Uuid;

use crate::support::ends;

const DAY: Duration = Duration::from_secs(24 * 3600);

pub(super) const TENANTS: [&str; 2] = ["acme", "globex"];

/// The keys that were decided and removed, each approved, of each tenant.
pub(super) const REMOVED: [&str; 2] = ["removed-1", "removed-2"];

pub(super) fn identity(tenant: &str, key: &str) -> Identity {
    Identity {
        tenant_id: tenant.parse().unwrap(),
        thread_id: "run-7".parse().unwrap(),
        idempotency_key: key.parse().unwrap(),
    }
}

pub(super) fn payload(text: &str) -> Option<Fingerprinted> {
    let payload = Payload::from_json(text).unwrap();
    Some(Fingerprinted::new(payload).unwrap())
}

/// The call that decides a key. The same for both tenants.
pub(super) fn call(key: &str) -> RequestId {
    let mut bytes = [7; 16];
    for (at, byte) in key.bytes().take(16).enumerate() {
        bytes[at] = byte;
    }
    Uuid::from_bytes(bytes).into()
}

pub(super) fn decision(tenant: &str, key: &str, decision: Decision) -> Decide {
    Decide {
        identity: identity(tenant, key),
        decision,
        call_id: Some(call(key)),
        payload: None,
        comment: None,
        actor: Actor::new("ada"),
        require_submission: false,
        allow_self_approval: true,
    }
}

fn submission(tenant: &str, key: &str) -> Submit {
    Submit {
        identity: identity(tenant, key),
        call_id: Some("call 1/\u{e9}".parse().unwrap_or_else(|_| call("submits"))),
        payload: payload(r#"{"amount":1200,"note":"a\\b\tc\u0000d"}"#),
        submission: Submission {
            title: Some("Refund\0 \u{2400}0\n\\N\t\u{b}\u{7f}".to_owned()),
            expires_at: None,
            allow_edit: true,
        },
        only_existing: false,
        actor: Actor::new("bot"),
    }
}

fn id(action: &Action) -> Uuid {
    action.request_id.as_uuid().unwrap()
}

async fn submitted(store: &SqliteStore, submit: Submit) -> Action {
    match store.submit(submit).await.unwrap() {
        Submitted::Recorded(action) => action,
        other => panic!("{other:?}"),
    }
}

pub(super) async fn decided<S: Store>(store: &S, decide: Decide) -> Action {
    match store.decide(decide).await.unwrap() {
        Decided::Recorded(action) => action,
        other => panic!("{other:?}"),
    }
}

/// Asks for a decision on an action whose time is over, which ends it.
async fn settled(store: &SqliteStore, tenant: &str, key: &str) {
    let decide = Decide {
        call_id: None,
        ..decision(tenant, key, Decision::Reject)
    };
    let refused = store.decide(decide).await.unwrap();
    assert!(!matches!(refused, Decided::Recorded(_)), "{refused:?}");
}

/// Submits, approves and claims an action.
async fn claimed(
    store: &SqliteStore,
    tenant: &str,
    key: &str,
    lease: Duration,
) -> (Uuid, ClaimToken) {
    let action = submitted(store, submission(tenant, key)).await;
    decided(store, decision(tenant, key, Decision::Approve)).await;
    let acquire = Acquire {
        id: id(&action),
        tenant_id: tenant.parse().unwrap(),
        digest: action.digest,
        lease,
        call_id: Some(call("claims")),
        actor: Actor::new("runner\0"),
    };
    match store.acquire(acquire).await.unwrap() {
        Acquired::Claimed(action, claim) => (id(&action), claim.token),
        other => panic!("{other:?}"),
    }
}

async fn finish(
    store: &SqliteStore,
    tenant: &str,
    claim: (Uuid, ClaimToken),
    report: Report,
) -> Finished {
    let finish = Finish {
        id: claim.0,
        tenant_id: tenant.parse().unwrap(),
        token: claim.1,
        report,
        call_id: None,
        actor: Actor::new("runner"),
    };
    store.finish(finish).await.unwrap()
}

/// Makes a database that has everything, and `large` actions of 200 KB. No server has it open then.
pub(super) async fn fill(path: &Path, large: usize) {
    let clock = Clock::new();
    clock.set_back(30 * DAY);
    let store = SqliteStore::open_with(path, clock.clone()).unwrap();
    for tenant in TENANTS {
        let submit = submission(tenant, "removed-expired");
        let soon = Some(clock.now() + Duration::from_secs(1));
        let submission = Submission {
            expires_at: soon,
            ..submit.submission
        };
        submitted(
            &store,
            Submit {
                submission,
                ..submit
            },
        )
        .await;
        clock.advance(Duration::from_secs(2));
        settled(&store, tenant, "removed-expired").await;
        for key in REMOVED {
            let approve = decision(tenant, key, Decision::Approve);
            let with_payload = payload(&format!(r#"{{"key":"{key}"}}"#));
            decided(
                &store,
                Decide {
                    payload: with_payload,
                    ..approve
                },
            )
            .await;
        }
    }
    clock.advance(10 * DAY);
    for tenant in TENANTS {
        each_kind(&store, &clock, tenant).await;
    }
    let sweep = Sweep {
        retention: 5 * DAY,
        limit: 100,
    };
    while store.sweep(sweep.clone()).await.unwrap().has_more {}
    assert_eq!(store.totals().await.unwrap().removed, 6);
    deliveries(&store, &clock).await;
    for number in 0..large {
        let text = format!(r#"{{"number":{number},"text":"{}"}}"#, "x".repeat(200_000));
        let approve = decision("acme", &format!("large-{number}"), Decision::Approve);
        decided(
            &store,
            Decide {
                payload: payload(&text),
                ..approve
            },
        )
        .await;
    }
    clock.advance(20 * DAY);
    // Some of the events are chained, and the newest are not.
    let chaining = async {
        while store.backlog().await.unwrap().unchained != Some(0) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    ends(chaining).await;
    decided(&store, decision("acme", "newest", Decision::Approve)).await;
    store.close().await;
    let verified = SqliteStore::verify(path).unwrap();
    assert_eq!(verified.faults, Vec::<String>::new());
}

async fn each_kind(store: &SqliteStore, clock: &Clock, tenant: &str) {
    let approve = |key: &str| decision(tenant, key, Decision::Approve);
    submitted(store, submission(tenant, "pending")).await;
    let late = submission(tenant, "pending-until");
    let then = Some(SystemTime::UNIX_EPOCH + Duration::from_micros(32_503_680_000_000_001));
    let until = Submission {
        expires_at: then,
        ..late.submission
    };
    submitted(
        store,
        Submit {
            submission: until,
            call_id: None,
            ..late
        },
    )
    .await;
    let comment = Some("no\0ne \\. \u{2400}".to_owned());
    decided(
        store,
        Decide {
            comment,
            actor: Actor::new("a\0b"),
            ..approve("decided")
        },
    )
    .await;
    decided(store, decision(tenant, "rejected", Decision::Reject)).await;
    // Its history goes back in time.
    submitted(store, submission(tenant, "set-back")).await;
    clock.set_back(Duration::from_secs(3600));
    decided(store, approve("set-back")).await;
    clock.advance(Duration::from_secs(3600));

    let edited = submitted(store, submission(tenant, "edited")).await;
    let edit = DecideById {
        id: id(&edited),
        tenant_id: tenant.parse().unwrap(),
        decision: Decision::Approve,
        call_id: Some(call("edits")),
        digest: edited.digest,
        edited: payload(r#"{"amount":12}"#),
        comment: None,
        actor: Actor::new("ada"),
        allow_self_approval: false,
    };
    let edited = store.decide_by_id(edit).await.unwrap();
    assert!(matches!(edited, Decided::Recorded(_)), "{edited:?}");

    claimed(store, tenant, "claimed", 300 * DAY).await;
    let completed = claimed(store, tenant, "completed", DAY).await;
    let result = JsonText::from_json(r#"{"refund":"re_1"}"#).unwrap();
    let finished = finish(store, tenant, completed, Report::Completed(Some(result))).await;
    assert!(matches!(finished, Finished::Recorded(_)), "{finished:?}");
    let failed = claimed(store, tenant, "failed", DAY).await;
    let finished = finish(
        store,
        tenant,
        failed,
        Report::Failed(Some("no\0 money".to_owned())),
    )
    .await;
    assert!(matches!(finished, Finished::Recorded(_)), "{finished:?}");
    let unknown = claimed(store, tenant, "unknown", Duration::from_secs(1)).await;
    let expires = submission(tenant, "expired");
    let soon = Some(clock.now() + Duration::from_secs(1));
    let until = Submission {
        expires_at: soon,
        ..expires.submission
    };
    submitted(
        store,
        Submit {
            submission: until,
            ..expires
        },
    )
    .await;
    let cancelled = submitted(store, submission(tenant, "cancelled")).await;
    let cancel = Cancel {
        id: id(&cancelled),
        tenant_id: tenant.parse().unwrap(),
        call_id: None,
        actor: Actor::new("bot"),
        may_cancel_all: false,
    };
    let cancelled = store.cancel(cancel).await.unwrap();
    assert!(matches!(cancelled, Cancelled::Recorded(_)), "{cancelled:?}");
    clock.advance(Duration::from_secs(2));
    let lost = finish(store, tenant, unknown, Report::Completed(None)).await;
    assert!(matches!(lost, Finished::Lost(_)), "{lost:?}");
    settled(store, tenant, "expired").await;
    decided(store, approve("last")).await;
}

/// An endpoint with a parked event, one behind it and a dead letter, and one that is stopped.
async fn deliveries(store: &SqliteStore, clock: &Clock) {
    let events = store.all_events(0, 1000).await.unwrap();
    let of = |tenant: &str, key: &str| {
        let mut positions = Vec::new();
        for (position, event) in &events {
            let action = event.action.as_ref().unwrap();
            let is_of = |name: Option<&str>, is: &str| name == Some(is);
            if is_of(action.tenant_id.as_ref().map(|it| it.as_str()), tenant)
                && is_of(action.idempotency_key.as_ref().map(|it| it.as_str()), key)
            {
                positions.push(*position);
            }
        }
        positions
    };
    let take = |endpoint: &str, holder| TakeEndpoint {
        endpoint: endpoint.to_owned(),
        start: Start::Oldest,
        holder,
        lease: DAY,
    };
    let mark = |endpoint: &str, holder, position, results| MarkDeliveries {
        endpoint: endpoint.to_owned(),
        holder,
        lease: Duration::ZERO,
        position,
        results,
        give_up_after: 40 * DAY,
        stop: false,
    };
    let failed = |attempts| DeliveryResult::Failed {
        attempts,
        wait: 35 * DAY,
        failure: "status 500\0".to_owned(),
    };
    let holder = Uuid::new_v4();
    let (parked, dead) = (of("acme", "completed"), of("globex", "failed"));
    for endpoint in ["hook", "stopped"] {
        let taken = store.take_endpoint(take(endpoint, holder)).await.unwrap();
        assert!(matches!(taken, EndpointTaken::Taken { .. }), "{taken:?}");
    }
    let results = vec![
        (parked[0], failed(3)),
        (parked[1], DeliveryResult::Behind),
        (dead[0], failed(1)),
    ];
    let newest = events.last().unwrap().0;
    let give_up_at_once = MarkDeliveries {
        give_up_after: Duration::ZERO,
        lease: DAY,
        ..mark("hook", holder, newest - 2, vec![(dead[0], failed(1))])
    };
    for request in [
        MarkDeliveries {
            lease: DAY,
            ..mark("hook", holder, newest - 3, results)
        },
        give_up_at_once,
        mark("hook", holder, newest - 2, vec![(parked[0], failed(4))]),
        MarkDeliveries {
            stop: true,
            ..mark("stopped", holder, 3, Vec::new())
        },
    ] {
        let marked = store.mark_deliveries(request).await.unwrap();
        assert!(matches!(marked, Marked::Recorded { .. }), "{marked:?}");
        clock.advance(Duration::from_secs(1));
    }
}
