//! What is in the way of every write, though the database takes heartbeats.

use std::time::Duration;

use aegis_hitl::store::{
    Cancel, Cancelled, PostgresStore, Store, StoreError, Submission, Submit, Submitted,
};

use super::{actor, decision, id, identity, record};
use crate::support::postgres::{Postgres, connect};
use crate::support::{Log, start};

/// Makes every insert of an event fail as on a full disk whose write-ahead log has room.
const FILL: &str = "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
     RAISE EXCEPTION 'could not extend file \"base/5/16384\": No space left on device' USING ERRCODE = '53100'; \
     END $$; \
     CREATE TRIGGER fill BEFORE INSERT ON event FOR EACH STATEMENT EXECUTE FUNCTION fill()";
const MAKE_ROOM: &str = "DROP TRIGGER fill ON event; DROP FUNCTION fill()";

const FULL: &str = "the disk of the database is full";

fn says_full(error: &StoreError) {
    assert!(error.is_unavailable(), "{error:?}");
    assert_eq!(error.to_string(), FULL);
}

fn is_ready(store: &PostgresStore) -> bool {
    store.statistics().writer.unwrap().is_ready
}

// On one thread, whose log is read.
#[tokio::test]
async fn a_full_disk_of_the_database_is_named_until_something_is_recorded() {
    let log = Log::capture(tracing::Level::WARN);
    let url = Postgres::shared().database().await;
    let client = connect(&url).await;
    for batching in [true, false] {
        let builder = PostgresStore::builder(&url).batching(batching);
        let store = builder.connect().await.unwrap();
        let key = |name: &str| format!("{name}-{batching}");
        record(&store, &key("before")).await;
        let submit = Submit {
            identity: identity(&key("pending")),
            call_id: None,
            payload: None,
            submission: Submission::default(),
            only_existing: false,
            actor: actor(),
        };
        let submitted = store.submit(submit).await.unwrap();
        let Submitted::Recorded(pending) = submitted else {
            panic!("it is new: {submitted:?}");
        };
        store.check().await.unwrap();

        client.batch_execute(FILL).await.unwrap();
        for name in ["one", "two"] {
            says_full(&store.decide(decision(&key(name))).await.unwrap_err());
        }
        // Longer than a durable write counts as proof of the next one.
        tokio::time::sleep(Duration::from_millis(100)).await;
        says_full(&store.check().await.unwrap_err());
        assert!(!is_ready(&store));
        let server = start(store.clone()).await;
        let red = server.get("/readyz").send().await;
        assert_eq!(red.status, 503, "{red:?}");
        // What changes an action, too.
        let cancel = || Cancel {
            id: id(&pending),
            tenant_id: identity("k").tenant_id,
            call_id: None,
            actor: actor(),
            may_cancel_all: true,
        };
        says_full(&store.cancel(cancel()).await.unwrap_err());

        client.batch_execute(MAKE_ROOM).await.unwrap();
        says_full(&store.check().await.unwrap_err());
        let cancelled = store.cancel(cancel()).await.unwrap();
        assert!(matches!(cancelled, Cancelled::Recorded(_)), "{cancelled:?}");
        store.check().await.unwrap();
        assert!(is_ready(&store));
        assert_eq!(server.get("/readyz").send().await.status, 200);
        record(&store, &key("one")).await;
        store.close().await;
    }
    let text = log.text();
    let unready: Vec<_> = text
        .lines()
        .filter(|line| line.contains("the store is unready"))
        .collect();
    // Once by each store.
    assert_eq!(unready.len(), 2, "{text}");
    assert!(unready.iter().all(|line| line.contains(FULL)), "{text}");
}
