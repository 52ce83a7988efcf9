//! Verification: the links of a tenant against its events.

use std::collections::VecDeque;

use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::links::{RUNS, runs};
use super::swept;
use crate::store::StoreError;
use crate::store::audit::{Comparison, Faults, links};
use crate::store::postgres::chain::{entries, entry, hash, reached};
use crate::store::postgres::fault::Fault;
use crate::store::postgres::rows::{self, get};
use crate::store::postgres::session::Session;

/// The most events that are read at once.
const EVENTS: i64 = 1024;

/// The most faults of one kind that are read.
const FAULTS: i64 = 100;

/// The places of a tenant in the feed, in order, with their events.
struct Events<'a> {
    session: &'a Session,
    tenant: &'a str,
    after: i64,
    ready: VecDeque<Row>,
    is_last: bool,
}

impl Events<'_> {
    /// Returns the next place, again until it is [taken](Self::take).
    async fn peek(&mut self) -> Result<Option<(i64, &Row)>, Fault> {
        if self.ready.is_empty() && !self.is_last {
            let next = entries("tenant_id = $1 AND position > $2 ORDER BY position LIMIT $3");
            let values = &[
                (&self.tenant as _, Type::TEXT),
                (&self.after as _, Type::INT8),
                (&EVENTS as _, Type::INT8),
            ];
            self.ready = self.session.query(&next, values).await?.into();
            self.is_last = rows::number(self.ready.len()) < EVENTS;
            if let Some(last) = self.ready.back() {
                self.after = get(last, "position")?;
            }
        }
        let row = self.ready.front();
        Ok(row
            .map(|row| Ok::<_, StoreError>((get(row, "position")?, row)))
            .transpose()?)
    }

    fn take(&mut self) {
        self.ready.pop_front();
    }
}

/// Compares a tenant's links with its events. Both are read in order. Returns how many events sweeps
/// have removed.
pub(super) async fn chain(
    session: &Session,
    tenant: &str,
    faults: &mut Faults,
) -> Result<u64, Fault> {
    let mut events = Events {
        session,
        tenant,
        after: i64::MIN,
        ready: VecDeque::new(),
        is_last: false,
    };
    let reached = rows::number(reached(session).await?);
    let mut comparison = Comparison::new(tenant, faults);
    let mut read = i64::MIN;
    loop {
        let page = runs(session, tenant, read).await?;
        let mut gone = Vec::new();
        for run in &page {
            for (position, leaf) in links(get(run, "links")?) {
                let seq = comparison.link(position, &leaf);
                let mut is_there = false;
                while let Some((found, row)) = events.peek().await? {
                    if found > position {
                        break;
                    }
                    if found < position {
                        comparison.unchained(found);
                    } else if let Some(entry) = entry(row)? {
                        is_there = true;
                        comparison.event(entry, &leaf);
                    }
                    events.take();
                }
                if !is_there {
                    gone.push((position, seq));
                }
            }
            read = get(run, "seq")?;
            let end = get(run, "position")?;
            comparison.end_run(end, read, hash(run)?);
            if end > reached {
                comparison.beyond(end, reached);
            }
        }
        let positions = gone.iter().map(|(position, _)| *position).collect();
        let swept = swept(session, positions).await?;
        for (position, seq) in gone {
            comparison.gone(position, seq, swept.contains(&position));
        }
        if rows::number(page.len()) < RUNS {
            break;
        }
    }
    while let Some((found, _)) = events.peek().await?
        && found <= reached
    {
        comparison.unchained(found);
        events.take();
    }
    Ok(comparison.removed())
}

/// Finds the tables of one row that have none: without it the statements that read it find nothing,
/// and no server goes on.
pub(super) async fn single_rows(session: &Session, faults: &mut Faults) -> Result<(), Fault> {
    const MISSING: &str = "SELECT name FROM (VALUES ('publisher', EXISTS (SELECT FROM publisher WHERE id = 1)), \
         ('cluster', EXISTS (SELECT FROM cluster WHERE id = 1)), ('chainer', EXISTS (SELECT FROM chainer WHERE id = 1)) \
         ) AS found (name, is_there) WHERE NOT is_there";
    for row in session.query(MISSING, &[]).await? {
        let name: &str = get(&row, "name")?;
        faults.add(format!("the table {name}: its row is missing"));
    }
    Ok(())
}

/// Finds events of a tenant that no pass will ever publish, or that one publishes twice, and places
/// in the feed that no pass gave. What is not published does not get into the chain, but lists and
/// histories show it.
pub(super) async fn feed(
    session: &Session,
    tenant: &str,
    faults: &mut Faults,
) -> Result<(), Fault> {
    const UNFILED: &str = "SELECT e.event_id FROM event e, publisher p, cluster c WHERE e.tenant_id = $1 \
         AND (e.epoch <> c.epoch OR pg_visible_in_snapshot(e.xid, p.snapshot)) \
         AND NOT EXISTS (SELECT FROM feed f WHERE f.tenant_id = e.tenant_id AND f.request_id = e.request_id \
         AND f.number = e.number AND f.at = e.at AND f.event_id = e.event_id) LIMIT $2";
    const NOT_GIVEN: &str = "SELECT f.position FROM feed f, publisher p WHERE f.tenant_id = $1 \
         AND f.position > p.position ORDER BY f.position LIMIT $2";
    const TWICE: &str = "SELECT max(f.position) AS position, min(f.position) AS first FROM feed f \
         WHERE f.tenant_id = $1 GROUP BY f.request_id, f.number HAVING count(*) > 1 ORDER BY 1 LIMIT $2";
    // The next pass takes what the snapshot of the last one does not see.
    const AGAIN: &str = "SELECT f.position FROM publisher p, cluster c, event e, feed f WHERE e.tenant_id = $1 \
         AND e.epoch = c.epoch AND e.xid >= pg_snapshot_xmin(p.snapshot) \
         AND NOT pg_visible_in_snapshot(e.xid, p.snapshot) AND f.tenant_id = e.tenant_id \
         AND f.request_id = e.request_id AND f.number = e.number AND f.at = e.at ORDER BY f.position LIMIT $2";
    let values = &[(&tenant as _, Type::TEXT), (&FAULTS as _, Type::INT8)];
    for row in session.query(UNFILED, values).await? {
        let id: Uuid = get(&row, "event_id")?;
        faults.add(format!(
            "the event with the id {id}, of tenant {tenant}, has no position in the feed"
        ));
    }
    for row in session.query(NOT_GIVEN, values).await? {
        let position: i64 = get(&row, "position")?;
        faults.add(format!(
            "event {position}: no position as high was given, and tenant {tenant} has it"
        ));
    }
    for row in session.query(TWICE, values).await? {
        let (position, first): (i64, i64) = (get(&row, "position")?, get(&row, "first")?);
        faults.add(format!(
            "event {position}: it is event {first} of tenant {tenant} once more"
        ));
    }
    for row in session.query(AGAIN, values).await? {
        let position: i64 = get(&row, "position")?;
        faults.add(format!(
            "event {position}: it is published, and the row of publisher has it as one of tenant {tenant} to publish"
        ));
    }
    Ok(())
}
