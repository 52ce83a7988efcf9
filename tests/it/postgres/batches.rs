//! New actions that share a transaction.

use std::time::Duration;

use aegis_hitl::store::{Decide, Decided, PostgresStore, Store, Submission, Submit, Submitted};
use futures_util::future::join_all;
use sha2::{Digest as _, Sha256};

use super::{actor, decision, identity, migrated, record};
use crate::support::postgres::{Postgres, connect};

/// Decides on all of the keys at once, and returns those that are recorded.
async fn decide_all<'a>(store: &PostgresStore, keys: &'a [String]) -> Vec<&'a str> {
    let deciding = keys.iter().map(|key| {
        let (store, request) = (store.clone(), decision(key));
        tokio::spawn(async move { store.decide(request).await.unwrap() })
    });
    let mut recorded = Vec::new();
    for (decided, key) in join_all(deciding).await.into_iter().zip(keys) {
        match decided.unwrap() {
            Decided::Recorded(action) => {
                assert_eq!(action.idempotency_key.unwrap().as_str(), key);
                recorded.push(key.as_str());
            }
            Decided::Duplicate(_) => {}
            other => panic!("{key}: {other:?}"),
        }
    }
    recorded
}

#[tokio::test(flavor = "multi_thread")]
async fn one_action_on_record_costs_those_beside_it_neither_their_records_nor_a_line_of_the_log() {
    // A server of its own, for its log.
    let server = Postgres::start(&[]);
    let store = PostgresStore::connect(&server.database().await).await;
    let store = store.unwrap();
    record(&store, "on-record").await;
    // The first of them meets it unprepared, and the next look before they insert.
    for round in 0..4 {
        let mut keys: Vec<_> = (0..100).map(|key| format!("{round}-{key}")).collect();
        keys.insert(50, "on-record".to_owned());
        let recorded = decide_all(&store, &keys).await;
        assert_eq!(recorded.len(), 100, "{round}");
        assert!(!recorded.contains(&"on-record"));
    }
    let totals = store.totals().await.unwrap();
    assert_eq!((totals.actions, totals.events), (401, 401));
    store.close().await;
    let log = server.logged();
    assert!(!log.contains("ERROR"), "{log}");
    assert!(!log.contains("on-record"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn submissions_and_decisions_share_a_transaction_and_keep_what_each_says() {
    let url = migrated().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let end = std::time::SystemTime::now() + Duration::from_secs(3600);
    let submitting = (0..20).map(|number| {
        let submit = Submit {
            identity: identity(&format!("submitted-{number}")),
            call_id: None,
            payload: None,
            submission: Submission {
                title: (number % 2 == 0).then(|| "a \0 title".to_owned()),
                expires_at: (number % 3 == 0).then_some(end),
                allow_edit: number % 5 == 0,
            },
            actor: actor(),
            only_existing: false,
        };
        let store = store.clone();
        async move {
            let Submitted::Recorded(action) = store.submit(submit).await.unwrap() else {
                panic!("not recorded");
            };
            action
        }
    });
    let deciding = (0..20).map(|number| {
        let decide = Decide {
            comment: (number % 2 == 0).then(|| "a comment".to_owned()),
            ..decision(&format!("decided-{number}"))
        };
        let store = store.clone();
        async move {
            let Decided::Recorded(action) = store.decide(decide).await.unwrap() else {
                panic!("not recorded");
            };
            action
        }
    });
    let (submitted, decided) = tokio::join!(join_all(submitting), join_all(deciding));
    for told in submitted.into_iter().chain(decided) {
        let id = told.request_id.as_uuid().unwrap();
        let kept = store.find(id, told.tenant_id.as_ref()).await.unwrap();
        assert_eq!(kept.unwrap(), told);
    }
    store.close().await;
    // Their columns agree with their events.
    let trail = PostgresStore::builder(&url).audit_trail().await.unwrap();
    let report = trail.verify(None).await.unwrap();
    assert_eq!(report.faults, Vec::<String>::new());
}

/// What a move leaves of an identity, by the description in the manual.
fn moved(texts: [&str; 3]) -> Vec<u8> {
    let start = |texts: &[&str]| {
        let mut digest = Sha256::new();
        for text in texts {
            digest.update([u8::try_from(text.len()).unwrap()]);
            digest.update(text);
        }
        digest.finalize()[..8].to_vec()
    };
    [start(&texts[..2]), start(&texts)].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_removed_before_a_move_stays_removed_whatever_it_is_named() {
    let url = migrated().await;
    let client = connect(&url).await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let long = "~".repeat(255);
    let names = ["a", "\\x41", "\\", "'", "%s", &long];
    for name in names {
        client
            .execute(
                "INSERT INTO tombstone (identity, request_id, decision, created_at, decided_at) \
                 VALUES ($1, gen_random_uuid(), 'approve', now(), now())",
                &[&moved([name, name, name])],
            )
            .await
            .unwrap();
    }
    // All of them at once, each beside one that is new.
    let deciding = names.iter().flat_map(|name| [(name, *name), (name, "new")]);
    let deciding = deciding.map(|(name, key)| {
        let mut request = decision(key);
        request.identity.tenant_id = name.parse().unwrap();
        request.identity.thread_id = name.parse().unwrap();
        let store = store.clone();
        async move { (key == "new", store.decide(request).await.unwrap()) }
    });
    for (is_new, decided) in join_all(deciding).await {
        match decided {
            Decided::Recorded(_) if is_new => {}
            Decided::Duplicate(_) if !is_new => {}
            other => panic!("{is_new}: {other:?}"),
        }
    }
    let totals = store.totals().await.unwrap();
    assert_eq!(totals.events, names.len() as u64);
    store.close().await;
}
