//! What is on record at the end: each event once, and in the one order in which it was read.

use std::collections::HashMap;

use tokio_postgres::Client;

use super::cluster::Cluster;
use super::feed::{Follower, Received};
use super::history::{Asked, Attempt};
use super::load::Load;
use super::wire::name_of;
use crate::support::random::Random;
use crate::support::reference::Request;

/// Numbers that must all be zero, each with what it counts.
const WRONG: [(&str, &str); 7] = [
    (
        "actions whose events have a gap, are there twice, or are not as many as they say",
        "SELECT count(*) FROM action a LEFT JOIN (SELECT tenant_id, request_id, count(*) AS events, \
         count(DISTINCT number) AS numbers, min(number) AS first, max(number) AS last FROM event \
         GROUP BY tenant_id, request_id) e USING (tenant_id, request_id) \
         WHERE (e.events, e.numbers, e.first, e.last) IS DISTINCT FROM (a.events::bigint, a.events::bigint, 1, a.events)",
    ),
    (
        "events of no action",
        "SELECT count(*) FROM event e LEFT JOIN action a USING (tenant_id, request_id) WHERE a.status IS NULL",
    ),
    (
        "events that are not in the feed once",
        "SELECT count(*) FROM (SELECT e.event_id FROM event e LEFT JOIN feed f \
         ON f.event_id = e.event_id AND f.tenant_id = e.tenant_id AND f.request_id = e.request_id \
         AND f.number = e.number AND f.at = e.at GROUP BY e.event_id HAVING count(f.position) <> 1) x",
    ),
    (
        "rows of the feed without an event",
        "SELECT count(*) FROM feed f LEFT JOIN event e ON e.event_id = f.event_id WHERE e.event_id IS NULL",
    ),
    (
        "positions of the feed that are missing",
        "SELECT (SELECT coalesce(max(position), 0) FROM feed) - (SELECT count(*) FROM feed)",
    ),
    (
        "actions that are not as their last event left them",
        "SELECT count(*) FROM action a JOIN event e ON e.tenant_id = a.tenant_id AND e.request_id = a.request_id \
         AND e.number = a.events WHERE (e.to_status, e.decision, e.execution) \
         IS DISTINCT FROM (a.status, a.decision, a.execution)",
    ),
    (
        "claims that are live on one side only",
        "SELECT count(*) FROM action a LEFT JOIN claim c USING (tenant_id, request_id) \
         WHERE (a.execution IS NOT DISTINCT FROM 'claimed') <> (c.until IS NOT NULL)",
    ),
];

/// Asserts that the record is sound, has all that was acknowledged, and was read so. Returns the number of events.
pub async fn check(cluster: &Cluster, load: &Load, followers: &[Follower]) -> usize {
    let client = cluster.client().await;
    for (what, sql) in WRONG {
        let row = client.query_one(sql, &[]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 0, "{what}");
    }
    assert_acknowledged(&client, load).await;
    let count: i64 = client
        .query_one("SELECT count(*) FROM event", &[])
        .await
        .unwrap()
        .get(0);
    let count = usize::try_from(count).unwrap();

    // The whole feed at once, at another server than the rest.
    let whole = Follower::new(&cluster.addrs()[1..2]);
    let reading = tokio::spawn(whole.clone().follow(Random::new(0, 0)));
    whole.reach(count).await;
    reading.abort();
    let whole = whole.received();
    assert!(whole.is_sorted_by(|one, next| one.position < next.position));
    let of_action = by_action(&whole);
    let rows = client
        .query(
            "SELECT request_id, event_id, kind FROM event ORDER BY request_id, number",
            &[],
        )
        .await
        .unwrap();
    let mut on_record: HashMap<String, Vec<[String; 2]>> = HashMap::new();
    for row in rows {
        let id: uuid::Uuid = row.get(0);
        let event: uuid::Uuid = row.get(1);
        let events = on_record.entry(id.to_string()).or_default();
        events.push([event.to_string(), row.get(2)]);
    }
    assert_eq!(of_action, on_record);
    for follower in followers {
        follower.reach(count).await;
        let received = follower.received();
        let differs = received
            .iter()
            .zip(&whole)
            .find(|(one, other)| one != other);
        assert_eq!(differs, None);
        assert_eq!(received.len(), whole.len());
    }
    count
}

fn by_action(feed: &[Received]) -> HashMap<String, Vec<[String; 2]>> {
    let mut of_action: HashMap<String, Vec<[String; 2]>> = HashMap::new();
    for event in feed {
        let events = of_action.entry(event.request_id.clone()).or_default();
        events.push([event.id.clone(), event.kind.clone()]);
    }
    of_action
}

/// Asserts that every transition that a call was told to have made is there, once.
async fn assert_acknowledged(client: &Client, load: &Load) {
    let rows = client
        .query(
            "SELECT request_id, call_id, kind FROM event WHERE call_id IS NOT NULL",
            &[],
        )
        .await
        .unwrap();
    let mut made: HashMap<(String, String, String), usize> = HashMap::new();
    for row in rows {
        let id: uuid::Uuid = row.get(0);
        *made
            .entry((id.to_string(), row.get(1), row.get(2)))
            .or_default() += 1;
    }
    for (transition, count) in &made {
        assert_eq!(*count, 1, "{transition:?}");
    }
    for subject in load.subjects() {
        for attempt in subject.attempts() {
            let Some((call, kind)) = acknowledged(&attempt) else {
                continue;
            };
            let id = subject.id.get().unwrap().clone();
            let transition = (id, name_of(call), kind.to_owned());
            assert!(
                made.contains_key(&transition),
                "{}: {attempt}",
                subject.key()
            );
        }
    }
}

/// The call and the kind of the transition that it was told to have made.
fn acknowledged(attempt: &Attempt) -> Option<(usize, &'static str)> {
    let (_, told) = attempt.told.as_ref()?;
    let Asked::Request(request) = &attempt.asked else {
        return None;
    };
    if !matches!(told.word, "recorded" | "replayed" | "claimed") {
        return None;
    }
    let (call, kind) = match request {
        Request::Submit { call, .. } => (call, "submitted"),
        Request::Decide { decision, call, .. } | Request::DecideById { decision, call, .. } => {
            let kind = match decision {
                aegis_hitl::Decision::Approve => "approved",
                aegis_hitl::Decision::Reject => "rejected",
            };
            (call, kind)
        }
        Request::Cancel { call, .. } => (call, "cancelled"),
        Request::Acquire { call, .. } => (call, "claimed"),
        Request::Renew { .. } => return None,
        // A report that is told again may have been made by another call with the same token.
        Request::Finish { .. } if told.word == "replayed" => return None,
        Request::Finish { call, report, .. } => (
            call,
            if report.is_ok() {
                "completed"
            } else {
                "failed"
            },
        ),
    };
    Some(((*call)?, kind))
}
