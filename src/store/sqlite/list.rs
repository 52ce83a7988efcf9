//! Pages of actions, and of events.

use std::time::{Duration, SystemTime};

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use uuid::Uuid;

use super::deliveries::seq;
use super::rows::{self, from_micros, optional_text, text};
use super::{chain, sweep};
use crate::protocol::{Action, Event, RequestId, TenantId, ThreadId};
use crate::store::Backlog;
use crate::store::identity;
use crate::store::operation::{Cursor, LeftIn, List, Order, Page};

/// Holds what the database shows, so that the statements of one read agree with each other.
pub(super) fn snapshot(connection: &Connection) -> rusqlite::Result<Transaction<'_>> {
    connection.unchecked_transaction()
}

/// The most actions of a thread that are looked through for a page of its list.
const MANY: usize = if cfg!(test) { 64 } else { 10_000 };

/// Reads a page of a list, as of one moment.
pub(super) fn page(connection: &Connection, list: &List) -> rusqlite::Result<Page> {
    let connection = &snapshot(connection)?;
    let order = list.order();
    let after = match (list.after, order) {
        // A position that no row can have is behind the last one.
        (Some(cursor), _) => i64::try_from(cursor.position()).unwrap_or(i64::MAX),
        (None, Order::OldestFirst) => 0,
        (None, Order::NewestFirst) => i64::MAX,
    };
    let thread = list.thread_id.as_ref();
    let of_thread = thread.map(|thread| of_thread(connection, list, thread, after));
    let mut found = match of_thread.transpose()?.flatten() {
        Some(found) => found,
        None => in_order(connection, list, after)?,
    };
    found.sort_unstable();
    if order == Order::NewestFirst {
        found.reverse();
    }
    let has_more = found.len() > list.limit;
    found.truncate(list.limit);
    let next = found.last().filter(|_| has_more);
    let next = next.map(|row| Cursor::new(u128::from(row.unsigned_abs())));
    let mut actions = Vec::with_capacity(found.len());
    for row in found {
        actions.extend(rows::listed(connection, row)?);
    }
    Ok(Page { actions, next })
}

/// The rows of a thread that the list lets through, behind a position and in any order. `None` if
/// the thread has too many.
///
/// The actions of a thread are neighbours in the index of identities. An index of threads of its own
/// would touch a further page with nearly every decision, which took a fifth of the rate.
fn of_thread(
    connection: &Connection,
    list: &List,
    thread: &ThreadId,
    after: i64,
) -> rusqlite::Result<Option<Vec<i64>>> {
    let [mut first, mut last] = [[0x00; 16], [0xff; 16]];
    for end in [&mut first, &mut last] {
        end[..8].copy_from_slice(&identity::thread(&list.tenant_id, thread));
    }
    let mut read = connection.prepare_cached(OF_THREAD)?;
    let tenant = list.tenant_id.as_str();
    let mut rows = read.query(params![
        first,
        last,
        tenant,
        thread.as_str(),
        MANY as i64 + 1
    ])?;
    let mut found = Vec::new();
    let mut seen = 0;
    while let Some(row) = rows.next()? {
        seen += 1;
        if seen > MANY {
            return Ok(None);
        }
        let (id, number): (i64, i64) = (row.get(0)?, row.get(1)?);
        let is_behind = match list.order() {
            Order::OldestFirst => id > after,
            Order::NewestFirst => id < after,
        };
        if is_behind && list.states().any(|state| state.number == number) {
            found.push(id);
        }
    }
    Ok(Some(found))
}

/// The plus keeps SQLite from taking the index of tenants.
const OF_THREAD: &str = "SELECT id, state FROM action WHERE identity BETWEEN ?1 AND ?2 \
                         AND +tenant_id = ?3 AND thread_id = ?4 LIMIT ?5";

/// The first rows behind a position that the list lets through, and perhaps some more.
///
/// Each state that the filters let through is read in order from an index. So a page costs the same
/// however many actions a tenant has, and however few match. The actions of a thread of many are
/// picked out on the way: the more it has, the sooner there are enough.
fn in_order(connection: &Connection, list: &List, after: i64) -> rusqlite::Result<Vec<i64>> {
    // One more shows whether another page follows.
    let most = i64::try_from(list.limit)
        .unwrap_or(i64::MAX)
        .saturating_add(1);
    let thread = list.thread_id.as_ref().map(ThreadId::as_str);
    let mut read = connection.prepare_cached(ids(list.order()))?;
    let mut found = Vec::new();
    for state in list.states() {
        let tenant = list.tenant_id.as_str();
        let values = params![tenant, thread, state.number, after, most];
        let rows = read.query_map(values, |row| row.get::<_, i64>(0))?;
        for row in rows {
            found.push(row?);
        }
    }
    Ok(found)
}

/// Selects the rows of one state.
fn ids(order: Order) -> &'static str {
    match order {
        Order::OldestFirst => {
            "SELECT id FROM action WHERE tenant_id = ?1 AND state = ?3 AND id > ?4 \
             AND (?2 IS NULL OR thread_id = ?2) ORDER BY id LIMIT ?5"
        }
        Order::NewestFirst => {
            "SELECT id FROM action WHERE tenant_id = ?1 AND state = ?3 AND id < ?4 \
             AND (?2 IS NULL OR thread_id = ?2) ORDER BY id DESC LIMIT ?5"
        }
    }
}

/// Selects the columns that [`event`] reads, in its order.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT seq, event_id, kind, at, actor, action, to_status, decision, execution FROM event WHERE ",
            $rest
        )
    };
}

const HISTORY: &str = select!("action = ?1 ORDER BY seq");

const ALL_EVENTS: &str = select!("seq > ?1 ORDER BY seq LIMIT ?2");

const EVENTS: &str = select!("tenant_id = ?3 AND seq > ?1 ORDER BY seq LIMIT ?2");

fn event(row: &Row<'_>) -> rusqlite::Result<Event> {
    let id = RequestId::from(Uuid::from_bytes(row.get(1)?));
    let at = from_micros(row.get(3)?);
    Ok(Event::new(id, text(row, 2)?, at, row.get::<_, String>(4)?))
}

/// Reads an action by its id, with its history.
pub(super) fn with_history(
    connection: &Connection,
    id: Uuid,
    tenant: &TenantId,
) -> rusqlite::Result<Option<Action>> {
    let connection = &snapshot(connection)?;
    let Some(mut record) = rows::by_request_id(connection, id, tenant)? else {
        return Ok(None);
    };
    let mut read = connection.prepare_cached(HISTORY)?;
    let events = read.query_map([record.row], event)?;
    record.action.history = Some(events.collect::<rusqlite::Result<_>>()?);
    Ok(Some(record.action))
}

/// Reads the events of a tenant, or of all tenants, behind a position.
pub(super) fn events(
    connection: &Connection,
    tenant: Option<&TenantId>,
    after: u64,
    limit: usize,
) -> rusqlite::Result<Vec<(u64, Event)>> {
    let connection = &snapshot(connection)?;
    let after = i64::try_from(after).unwrap_or(i64::MAX);
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut read = connection.prepare_cached(tenant.map_or(ALL_EVENTS, |_| EVENTS))?;
    let mut found = match tenant {
        Some(tenant) => read.query(params![after, limit, tenant.as_str()])?,
        None => read.query([after, limit])?,
    };
    let mut events = Vec::new();
    while let Some(row) = found.next()? {
        let position = row.get::<_, i64>(0)?.unsigned_abs();
        events.push((position, with_action(connection, row)?));
    }
    Ok(events)
}

/// Reads tenants in order. Each is one search of an index, however many actions it has.
pub(super) fn tenants(
    connection: &Connection,
    after: Option<TenantId>,
    limit: usize,
) -> rusqlite::Result<Vec<TenantId>> {
    let connection = &snapshot(connection)?;
    let mut read = connection.prepare_cached(NEXT_TENANT)?;
    let mut tenants: Vec<TenantId> = Vec::new();
    while tenants.len() < limit {
        let after = tenants.last().or(after.as_ref());
        let after = after.map_or("", TenantId::as_str);
        match read.query_row([after], |row| optional_text(row, 0))? {
            Some(tenant) => tenants.push(tenant),
            None => break,
        }
    }
    Ok(tenants)
}

const NEXT_TENANT: &str = "SELECT min(tenant_id) FROM action WHERE tenant_id > ?1";

/// Reads the event at a position.
pub(super) fn event_at(connection: &Connection, seq: i64) -> rusqlite::Result<Option<Event>> {
    let mut read = connection.prepare_cached(select!("seq = ?1"))?;
    let read = read.query_row([seq], |row| with_action(connection, row));
    read.optional()
}

/// Reads an event with its action, as the event left it.
fn with_action(connection: &Connection, row: &Row<'_>) -> rusqlite::Result<Event> {
    let mut event = event(row)?;
    if let Some(action) = rows::listed(connection, row.get(5)?)? {
        let left_in = LeftIn {
            status: text(row, 6)?,
            decision: optional_text(row, 7)?,
            execution: optional_text(row, 8)?,
        };
        event.action = Some(Box::new(left_in.shown(action, &event)));
    }
    Ok(event)
}

/// The position of the newest event.
pub(super) fn newest_event(connection: &Connection) -> rusqlite::Result<u64> {
    let newest = connection
        .prepare_cached("SELECT max(seq) FROM event")?
        .query_row([], |row| row.get::<_, Option<i64>>(0))?;
    Ok(newest.unwrap_or(0).unsigned_abs())
}

/// When the oldest waits began. Each is the first entry of an index of its own.
const OLDEST_PENDING: &str = "SELECT min(created_at) FROM action WHERE status = 'PENDING'";
const OLDEST_UNCLAIMED: &str = "SELECT min(decided_at) FROM action WHERE status = 'COMMITTED' \
     AND decision = 'approve' AND execution IS NULL AND submitted_by IS NOT NULL";

/// Reads how long the oldest actions have waited.
pub(super) fn backlog(connection: &Connection, now: SystemTime) -> rusqlite::Result<Backlog> {
    let age = |sql: &str| -> rusqlite::Result<Option<Duration>> {
        let begun: Option<i64> = connection
            .prepare_cached(sql)?
            .query_row([], |row| row.get(0))?;
        Ok(begun.map(|at| now.duration_since(from_micros(at)).unwrap_or_default()))
    };
    let unchained = seq(newest_event(connection)?) - chain::reached(connection)?;
    Ok(Backlog {
        pending: age(OLDEST_PENDING)?,
        unclaimed: age(OLDEST_UNCLAIMED)?,
        unchained: Some(unchained.max(0).unsigned_abs()),
        tombstones: Some(sweep::tombstones(connection)?),
    })
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::store::SqliteStore;
    use crate::store::sqlite::{audit, deliveries};

    /// The plan of a statement, one line for each table that it reads.
    fn plan(connection: &Connection, sql: &str) -> Vec<String> {
        let sql = format!("EXPLAIN QUERY PLAN {sql}");
        let mut plan = connection.prepare(&sql).unwrap();
        let mut rows = plan.raw_query();
        let mut lines = Vec::new();
        while let Some(row) = rows.next().unwrap() {
            lines.push(row.get(3).unwrap());
        }
        lines
    }

    #[tokio::test]
    async fn every_read_of_many_rows_uses_an_index_and_sorts_nothing() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("aegis.db");
        let store = SqliteStore::open(&path).unwrap();
        let connection = Connection::open(&path).unwrap();
        let mut reads = vec![
            (OF_THREAD, "sqlite_autoindex_action_2"),
            (HISTORY, "event_action"),
            (EVENTS, "event_tenant"),
            (NEXT_TENANT, "action_state"),
            (rows::DUE, "action_expiry"),
            (rows::DUE, "claim_until"),
            (rows::BY_CALL, "event_call"),
            (rows::HAS_MADE, "event_action"),
            (ALL_EVENTS, "INTEGER PRIMARY KEY"),
            (OLDEST_PENDING, "action_pending"),
            (OLDEST_UNCLAIMED, "action_unclaimed"),
            (deliveries::DUE, "undelivered_due"),
            (deliveries::TOO_LATE, "undelivered_due"),
            (deliveries::NEXT, "undelivered_due"),
            (deliveries::FIRST_PARKED, "undelivered_action"),
            (deliveries::PARKED, "undelivered"),
            (sweep::BETWEEN, "INTEGER PRIMARY KEY"),
            (sweep::AGED, "event_action"),
            (sweep::IS_SWEPT, "swept USING INTEGER PRIMARY KEY"),
            (sweep::POSTPONED, "PRIMARY KEY"),
            (sweep::NEWEST_ACTION, "SEARCH action"),
            (chain::NEXT, "event USING INTEGER PRIMARY KEY"),
            (chain::OF_TENANT, "event_tenant"),
            (chain::AT, "event USING INTEGER PRIMARY KEY"),
            (chain::TIP, "sqlite_autoindex_chain_1"),
            (chain::REACHED, "chain"),
            (audit::RUNS, "sqlite_autoindex_chain_1"),
            (audit::BEFORE, "sqlite_autoindex_chain_1"),
            (audit::UNCHAINED, "event_tenant"),
            (audit::NEXT_TENANT[0].0, "sqlite_autoindex_chain_1"),
            (audit::NEXT_TENANT[1].0, "event_tenant"),
        ];
        for order in [Order::OldestFirst, Order::NewestFirst] {
            reads.push((ids(order), "action_state"));
        }
        for (sql, index) in reads {
            let plan = plan(&connection, sql);
            let uses = |line: &&String| line.starts_with("SEARCH") && line.contains(index);
            assert_eq!(plan.iter().filter(uses).count(), 1, "{sql}: {plan:?}");
            let is_slow = |line: &String| {
                // A scan of a subquery reads only what that has found.
                line.contains("TEMP B-TREE")
                    || line.starts_with("SCAN") && !line.contains("subquery")
            };
            assert!(!plan.iter().any(is_slow), "{sql}: {plan:?}");
        }
        store.close().await;
    }

    #[tokio::test]
    async fn a_thread_of_many_actions_is_listed_like_one_of_few() {
        use crate::store::{Actor, Identity, Store, Submission, Submit, Submitted};

        let folder = TempDir::new().unwrap();
        let store = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
        let tenant: TenantId = "t".parse().unwrap();
        let mut expected: [Vec<_>; 2] = Default::default();
        for number in 0..2 * MANY {
            // One of the threads has too many, the other has few.
            let is_few = number % 9 == 0;
            let submit = Submit {
                identity: Identity {
                    tenant_id: tenant.clone(),
                    thread_id: ["many", "few"][usize::from(is_few)].parse().unwrap(),
                    idempotency_key: format!("k-{number}").parse().unwrap(),
                },
                call_id: None,
                payload: None,
                submission: Submission::default(),
                only_existing: false,
                actor: Actor::new("anonymous"),
            };
            let Submitted::Recorded(action) = store.submit(submit).await.unwrap() else {
                panic!("it is new");
            };
            expected[usize::from(is_few)].push(action.request_id);
        }
        assert!(expected[0].len() > MANY && expected[1].len() < MANY);
        for (thread, mut expected) in ["many", "few"].into_iter().zip(expected) {
            for status in [Some(crate::protocol::Status::Pending), None] {
                let mut found = Vec::new();
                let mut after = None;
                loop {
                    let list = List {
                        tenant_id: tenant.clone(),
                        status,
                        decision: None,
                        execution: None,
                        not_picked_up: false,
                        thread_id: Some(thread.parse().unwrap()),
                        after,
                        limit: 7,
                    };
                    let page = store.list(list).await.unwrap();
                    found.extend(page.actions.into_iter().map(|action| action.request_id));
                    after = page.next;
                    if after.is_none() {
                        break;
                    }
                }
                assert_eq!(found, expected, "{thread} {status:?}");
                expected.reverse();
            }
        }
        store.close().await;
    }
}
