//! The order of all events, and who learns of them.
//!
//! Transactions of several servers commit in another order than they began, so no number that an
//! event has when it is appended can be a cursor: a reader that has passed 17 may miss a 16 that is
//! committed later. Whoever publishes therefore gives the positions, in one transaction at a time.
//! It takes the events that its snapshot sees and that the snapshot of the transaction before it did
//! not see. These are all events of transactions that began after that snapshot (`xid >= xmax`), and
//! of those that were in progress then (`xip`). This is exact: nothing is missed or taken twice,
//! a transaction that stays open for hours holds up only its own events, and one that is rolled back
//! leaves no gap. Reading transactions, such as those of `pg_dump`, have no number and hold up nothing.
//! A crash never makes a number below `xmax` new again: a transaction that a snapshot sees as ended
//! has its end in the log before the commit of the pass, which is durable before a position is read.
//!
//! Within one pass events are in the order of the numbers of their transactions: if one request was
//! answered before another was sent, its event comes first. Those of one action are in the order of
//! their own numbers.
//!
//! Numbers of transactions mean nothing in another cluster. When a database was restored into one,
//! which its identifier shows, a new epoch begins: see [`Inner::check_cluster`].
//!
//! `xid8`, `pg_snapshot` and their functions are PostgreSQL's, since version 13. YugabyteDB and
//! CockroachDB have no snapshots to ask for. There, the order would be that of the commits' hybrid
//! times, below what is still open.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tokio_postgres::types::Type;
use uuid::Uuid;

use super::Inner;
use super::fault::Fault;
use super::loaded::Happened;
use super::rows::{self, get};
use super::session::{PLAIN, Session, Values};
use super::wall::Scope;
use crate::protocol::TenantId;
use crate::store::StoreError;

/// The most events of this server that are told from those of others.
const OWN: usize = 16_384;

/// For the statement that publishes. What has piled up, because somebody had the row of `publisher`
/// locked for long, can only be published at once.
const PATIENT: &str = "SET LOCAL statement_timeout = '15min'";

/// The most events that one read looks through for whom to wake.
const PAGE: i64 = 1000;

/// Passes of this server, one at a time.
#[derive(Debug, Default)]
pub(super) struct Publisher {
    asked: AtomicU64,
    /// Everyone who had asked by then is served.
    served: tokio::sync::Mutex<u64>,
}

/// What this server knows of the feed.
#[derive(Debug, Default)]
pub(super) struct Follower {
    seen: AtomicU64,
    own: Mutex<Own>,
}

/// The newest events that this server appended. It has woken its own waiters for these.
#[derive(Debug, Default)]
struct Own {
    order: VecDeque<Uuid>,
    known: HashSet<Uuid>,
}

impl Follower {
    /// Begins behind this position.
    pub(super) fn begin_behind(&self, position: u64) {
        self.seen.store(position, Ordering::SeqCst);
    }

    /// Notes events that are about to be committed.
    pub(super) fn expect<'a>(&self, events: impl IntoIterator<Item = &'a Happened>) {
        let mut own = self.own();
        for event in events {
            own.order.push_back(event.id);
            own.known.insert(event.id);
            if own.order.len() > OWN
                && let Some(oldest) = own.order.pop_front()
            {
                own.known.remove(&oldest);
            }
        }
    }

    fn own(&self) -> std::sync::MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Publishes everything that was committed before this call.
    ///
    /// Those who ask during a pass share the next one.
    pub(super) async fn publish(&self) -> Result<(), StoreError> {
        let ticket = self.publisher.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut served = self.publisher.served.lock().await;
        if *served >= ticket {
            return Ok(());
        }
        let asked = self.publisher.asked.load(Ordering::SeqCst);
        let mut attempts = 0;
        while let Err(fault) = self.pass().await {
            attempts += 1;
            if matches!(fault, Fault::Unknown(_)) {
                self.state.set_unsure();
            }
            if attempts == 3 || matches!(fault, Fault::Refused(_)) {
                return Err(fault.into_error());
            }
        }
        *served = asked;
        Ok(())
    }

    async fn pass(&self) -> Result<(), Fault> {
        const LAST: &str = "SELECT p.position, pg_snapshot_xmax(p.snapshot)::text AS next, \
             ARRAY(SELECT x::text FROM pg_snapshot_xip(p.snapshot) AS x) AS open, c.epoch, \
             c.identifier = s.system_identifier \
             AND pg_snapshot_xmax(p.snapshot) <= pg_snapshot_xmax(pg_current_snapshot()) AS is_same \
             FROM publisher p, cluster c, pg_control_system() s WHERE p.id = 1 AND c.id = 1";
        // Each side of OR has an index of its own.
        const FRESH: &str = "SELECT EXISTS (SELECT FROM event WHERE epoch = $1 AND xid >= $2::text::xid8) \
             OR EXISTS (SELECT FROM event WHERE epoch = $1 AND xid = ANY ($3::text[]::xid8[])) AS is_fresh";
        let session = Session::open(&self.pool, Scope::All).await?;
        let mut last = Last::read(&session.query(LAST, &[]).await?)?;
        if !last.is_same {
            Box::pin(self.check_cluster()).await?;
            last = Last::read(&session.query(LAST, &[]).await?)?;
        }
        let fresh = session.read(FRESH, &last.values()).await?;
        let is_fresh = fresh.first().map(|row| get(row, "is_fresh")).transpose()?;
        if is_fresh == Some(false) {
            let mut session = session;
            session.release();
            return Ok(());
        }
        // Again with the lock: another server may have had a pass since. The row is locked first and
        // read then, as a statement that waits for a lock goes on with what else it had read before.
        let (unsure, begun) = (self.state.doubts(), Instant::now());
        let (started, indexed, locked, last, patient) = tokio::join!(
            biased;
            session.begin(),
            session.run(PLAIN),
            session.run("SELECT FROM publisher WHERE id = 1 FOR UPDATE"),
            session.query(LAST, &[]),
            session.run(PATIENT),
        );
        started?;
        indexed?;
        locked?;
        patient?;
        let last = Last::read(&last?)?;
        if !last.is_same {
            session.roll_back().await;
            return Err(Fault::again("the database was restored just now"));
        }
        let [epoch, next, open] = last.values();
        let position = rows::number(last.position);
        session
            .execute(
                "WITH fresh AS ( \
                   SELECT tenant_id, request_id, number, at, event_id, xid::text::bigint AS xid FROM event \
                   WHERE epoch = $1 AND xid >= $2::text::xid8 \
                   UNION ALL \
                   SELECT tenant_id, request_id, number, at, event_id, xid::text::bigint AS xid FROM event \
                   WHERE epoch = $1 AND xid = ANY ($3::text[]::xid8[]) \
                 ), ranked AS ( \
                   SELECT *, max(xid) OVER of_action AS rank, max(at) OVER of_action AS moment FROM fresh \
                   WINDOW of_action AS (PARTITION BY tenant_id, request_id ORDER BY number) \
                 ), filed AS ( \
                   INSERT INTO feed (position, tenant_id, request_id, number, at, event_id) \
                   SELECT $4 + row_number() OVER (ORDER BY rank, moment, request_id, number), \
                   tenant_id, request_id, number, at, event_id FROM ranked RETURNING position \
                 ) \
                 UPDATE publisher SET position = $4 + (SELECT count(*) FROM filed), snapshot = pg_current_snapshot()",
                &[epoch, next, open, (&position, Type::INT8)],
            )
            .await?;
        session.finish().await?;
        self.state.set_written(unsure, begun);
        Ok(())
    }

    /// Begins a new epoch if the database is in another cluster than before.
    ///
    /// What is not in the feed yet is filed first. The lock keeps others from appending with the
    /// number of the old epoch meanwhile.
    pub(super) async fn check_cluster(&self) -> Result<(), Fault> {
        const SAME: &str = "SELECT c.identifier = s.system_identifier \
             AND pg_snapshot_xmax(p.snapshot) <= pg_snapshot_xmax(pg_current_snapshot()) AS is_same \
             FROM cluster c, publisher p, pg_control_system() s WHERE c.id = 1 AND p.id = 1";
        let session = Session::open(&self.pool, Scope::All).await?;
        let is_same = |found: &[tokio_postgres::Row]| -> Result<bool, StoreError> {
            Ok(found
                .first()
                .map(|row| get(row, "is_same"))
                .transpose()?
                .unwrap_or(false))
        };
        if is_same(&session.query(SAME, &[]).await?)? {
            let mut session = session;
            session.release();
            return Ok(());
        }
        session.begin().await?;
        session
            .run("LOCK TABLE event IN SHARE MODE; SELECT FROM publisher FOR UPDATE")
            .await?;
        if is_same(&session.query(SAME, &[]).await?)? {
            session.roll_back().await;
            return Ok(());
        }
        tracing::warn!(
            "the database is in another cluster than before; a new epoch of its events begins"
        );
        // All of them are looked through, once.
        session
            .run(
                "SET LOCAL statement_timeout = 0; \
                 WITH missing AS ( \
                   SELECT e.* FROM event e WHERE NOT EXISTS (SELECT FROM feed f WHERE f.event_id = e.event_id) \
                 ), ranked AS ( \
                   SELECT *, max(at) OVER (PARTITION BY tenant_id, request_id ORDER BY number) AS moment FROM missing \
                 ), filed AS ( \
                   INSERT INTO feed (position, tenant_id, request_id, number, at, event_id) \
                   SELECT (SELECT position FROM publisher) + row_number() OVER (ORDER BY moment, request_id, number), \
                   tenant_id, request_id, number, at, event_id FROM ranked RETURNING position \
                 ) \
                 UPDATE publisher SET position = position + (SELECT count(*) FROM filed), \
                 snapshot = pg_current_snapshot(); \
                 UPDATE cluster SET epoch = epoch + 1, identifier = (SELECT system_identifier FROM pg_control_system())",
            )
            .await?;
        session.finish().await
    }

    /// Wakes those who wait here for what other servers recorded.
    pub(super) async fn follow(&self) -> Result<(), StoreError> {
        let is_watched = !self.watchers.is_empty();
        self.publish().await?;
        if !is_watched {
            // Whoever comes now reads first, and sees all this.
            let newest = self.newest_position().await?;
            self.follower.begin_behind(newest);
            return Ok(());
        }
        loop {
            let seen = rows::number(self.follower.seen.load(Ordering::SeqCst));
            let values: &Values<'_> = &[(&seen, Type::INT8), (&PAGE, Type::INT8)];
            let found = self
                .read(
                    Scope::All,
                    "SELECT position, tenant_id, request_id, event_id FROM feed WHERE position > $1 \
                     ORDER BY position LIMIT $2",
                    values,
                )
                .await?;
            for row in &found {
                let event: Uuid = get(row, "event_id")?;
                if !self.follower.own().known.remove(&event) {
                    let tenant: TenantId = rows::word(row, "tenant_id")?;
                    self.watchers.wake(get(row, "request_id")?, &tenant);
                }
                self.follower
                    .seen
                    .store(rows::count(row, "position")?, Ordering::SeqCst);
            }
            if (found.len() as i64) < PAGE {
                return Ok(());
            }
        }
    }

    /// The newest position that was given.
    pub(super) async fn newest_position(&self) -> Result<u64, StoreError> {
        let found = self
            .read(
                Scope::Nobody,
                "SELECT position FROM publisher WHERE id = 1",
                &[],
            )
            .await?;
        found
            .first()
            .map_or(Ok(0), |row| rows::count(row, "position"))
    }
}

/// What the pass before this one left.
struct Last {
    position: u64,
    epoch: i32,
    /// The number from which on transactions had not begun.
    next: String,
    /// The numbers of those that were in progress.
    open: Vec<String>,
    /// Whether these numbers are of the cluster that the database is in.
    is_same: bool,
}

impl Last {
    fn read(found: &[tokio_postgres::Row]) -> Result<Self, Fault> {
        let row = found
            .first()
            .ok_or_else(|| Fault::again("the database has no publisher"))?;
        Ok(Self {
            position: rows::count(row, "position")?,
            epoch: get(row, "epoch")?,
            next: get(row, "next")?,
            open: get(row, "open")?,
            is_same: get(row, "is_same")?,
        })
    }

    fn values(&self) -> [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] {
        [
            (&self.epoch, Type::INT4),
            (&self.next, Type::TEXT),
            (&self.open, Type::TEXT_ARRAY),
        ]
    }
}
