//! The audit trail of a database that servers may use.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::address::Address;
use super::chain::{self, entries};
use super::fault::Fault;
use super::rows::{self, get};
use super::session::{Pool, Session};
use super::state::State;
use super::{PostgresBuilder, connected, schema};
use crate::store::audit::{Comparison, Faults, Hash, line, link, links, origin};
use crate::store::{AuditHead, AuditPage, AuditReport, StoreError};

/// The most rows of the chain that are read at once: 3 MB, if all of them are full.
const RUNS: i64 = 64;

/// The most events that are read at once.
const EVENTS: i64 = 1024;

/// The most tenants that are read at once.
const TENANTS: i64 = 1000;

/// The most faults of one kind that are read.
const FAULTS: i64 = 100;

/// The audit trails in a PostgreSQL database, for reading. Servers may use it.
///
/// It needs a user who may read, and works on a standby, too. Each method reads one state of the
/// database, in a transaction of its own.
#[derive(Debug)]
pub struct PostgresAuditTrail {
    pool: Pool,
}

impl PostgresBuilder {
    /// Connects to the database for reading its audit trails. Nothing is made or migrated.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub async fn audit_trail(self) -> Result<PostgresAuditTrail, StoreError> {
        let address = Address::parse(&self.url.0)?;
        let state = Arc::new(State::new(self.clock));
        let pool = connected(&address, &state, 1).await?;
        let is_current = schema::current(&pool, &address.place()).await;
        is_current.map_err(Fault::into_error)?;
        Ok(PostgresAuditTrail { pool })
    }
}

impl PostgresAuditTrail {
    /// Begins a transaction that sees one state of the database.
    async fn snapshot(&self) -> Result<Session, Fault> {
        let session = Session::open(&self.pool).await?;
        session.begin_read().await?;
        Ok(session)
    }

    /// Returns the tenants that have events, or once had, in order.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub async fn tenants(&self) -> Result<Vec<String>, StoreError> {
        Box::pin(async {
            let session = self.snapshot().await?;
            let tenants = tenants(&session).await?;
            session.roll_back().await;
            Ok(tenants.into_iter().collect())
        })
        .await
        .map_err(Fault::into_error)
    }

    /// Returns the end of a tenant's chain. A tenant without events has an empty chain.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub async fn head(&self, tenant: &str) -> Result<AuditHead, StoreError> {
        Box::pin(async {
            let session = self.snapshot().await?;
            let head = head(&session, tenant).await?;
            session.roll_back().await;
            Ok(head)
        })
        .await
        .map_err(Fault::into_error)
    }

    /// Returns the line with which an export begins that leaves out the first `after` links of a
    /// tenant. It has the hash of the last of those. `None` if there are fewer.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub async fn first_line(&self, tenant: &str, after: u64) -> Result<Option<String>, StoreError> {
        Box::pin(async {
            let session = self.snapshot().await?;
            let mut links = Links::before(&session, tenant, after).await?;
            while links.seq < after && links.next().await?.is_some() {}
            let line = (links.seq == after).then(|| line::from(tenant, after, &links.hash));
            session.roll_back().await;
            Ok(line)
        })
        .await
        .map_err(Fault::into_error)
    }

    /// Returns the lines of up to `limit` links of a tenant, behind the link `after` and up to the
    /// link `to`. `None` if there are none.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub async fn page(
        &self,
        tenant: &str,
        after: u64,
        to: u64,
        limit: usize,
    ) -> Result<Option<AuditPage>, StoreError> {
        Box::pin(async {
            let session = self.snapshot().await?;
            let mut shown = Vec::new();
            let mut links = Links::before(&session, tenant, after).await?;
            while shown.len() < limit && links.seq < to {
                match links.next().await? {
                    Some(link) if link.seq > after => shown.push(link),
                    Some(_) => {}
                    None => break,
                }
            }
            let lines = lines(&session, tenant, &shown).await?;
            session.roll_back().await;
            Ok(shown.last().map(|last| AuditPage {
                lines,
                seq: last.seq,
            }))
        })
        .await
        .map_err(Fault::into_error)
    }

    /// Verifies the chain of a tenant, or of each tenant, against the events on record.
    ///
    /// This reads all of them in one transaction, for as long as which PostgreSQL removes no rows
    /// that were changed or deleted since.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub async fn verify(&self, tenant: Option<&str>) -> Result<AuditReport, StoreError> {
        Box::pin(async {
            let session = self.snapshot().await?;
            let (mut report, mut faults) = (AuditReport::default(), Faults::default());
            for tenant in named_or_all(&session, tenant).await? {
                report.removed += verify_chain(&session, &tenant, &mut faults).await?;
                verify_feed(&session, &tenant, &mut faults).await?;
                report.heads.push(head(&session, &tenant).await?);
            }
            report.faults = faults.into_vec();
            session.roll_back().await;
            Ok(report)
        })
        .await
        .map_err(Fault::into_error)
    }

    /// Whether the chain of a tenant, or of any tenant, has this hash: as a head that it has now,
    /// or had earlier.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub async fn has_hash(
        &self,
        tenant: Option<&str>,
        hash: &[u8; 32],
    ) -> Result<bool, StoreError> {
        Box::pin(async {
            let session = self.snapshot().await?;
            let mut is_found = false;
            for tenant in named_or_all(&session, tenant).await? {
                let mut links = Links::all(&session, &tenant);
                is_found = links.hash == *hash;
                while !is_found && let Some(link) = links.next().await? {
                    is_found = link.hash == *hash;
                }
                if is_found {
                    break;
                }
            }
            session.roll_back().await;
            Ok(is_found)
        })
        .await
        .map_err(Fault::into_error)
    }
}

async fn named_or_all(session: &Session, tenant: Option<&str>) -> Result<BTreeSet<String>, Fault> {
    match tenant {
        Some(tenant) => Ok(BTreeSet::from([tenant.to_owned()])),
        None => tenants(session).await,
    }
}

/// The tenants that have links, places in the feed, or events. Each is one search of an index.
async fn tenants(session: &Session) -> Result<BTreeSet<String>, Fault> {
    let mut found = BTreeSet::new();
    for table in ["chain", "feed", "event"] {
        // No name is empty, but an edit by hand can make it so.
        let (mut last, mut comparison) = (String::new(), ">=");
        loop {
            let next = format!(
                "WITH RECURSIVE t AS ( \
                   (SELECT tenant_id FROM {table} WHERE tenant_id {comparison} $1 ORDER BY tenant_id LIMIT 1) \
                   UNION ALL \
                   SELECT (SELECT o.tenant_id FROM {table} o WHERE o.tenant_id > t.tenant_id \
                   ORDER BY o.tenant_id LIMIT 1) FROM t WHERE t.tenant_id IS NOT NULL \
                 ) SELECT tenant_id FROM t WHERE tenant_id IS NOT NULL LIMIT $2"
            );
            let values = &[(&last as _, Type::TEXT), (&TENANTS as _, Type::INT8)];
            let page = session.query(&next, values).await?;
            for row in &page {
                last = get(row, "tenant_id")?;
                found.insert(last.clone());
            }
            if rows::number(page.len()) < TENANTS {
                break;
            }
            comparison = ">";
        }
    }
    Ok(found)
}

async fn head(session: &Session, tenant: &str) -> Result<AuditHead, Fault> {
    const TIP: &str = "SELECT seq, hash FROM chain WHERE tenant_id = $1 ORDER BY seq DESC LIMIT 1";
    const FILED: &str =
        "SELECT count(*) AS events FROM feed WHERE tenant_id = $1 AND position > $2";
    let tip = session.query(TIP, &[(&tenant, Type::TEXT)]).await?;
    let (seq, hash) = match tip.first() {
        Some(row) => (rows::count(row, "seq")?, chain::hash(row)?),
        None => (0, origin(tenant)),
    };
    let reached = rows::number(chain::reached(session).await?);
    let values = &[(&tenant as _, Type::TEXT), (&reached as _, Type::INT8)];
    let filed = count(&session.query(FILED, values).await?)?;
    let unchained = filed + unfiled(session, tenant).await?;
    Ok(AuditHead::new(tenant, seq, hash, unchained))
}

fn count(found: &[Row]) -> Result<u64, StoreError> {
    let row = found.first();
    row.map_or(Ok(0), |row| rows::count(row, "events"))
}

/// Counts the events of a tenant that no pass has published yet. No index leads to those of one
/// tenant.
async fn unfiled(session: &Session, tenant: &str) -> Result<u64, Fault> {
    const LAST: &str = "SELECT c.epoch, pg_snapshot_xmax(p.snapshot)::text AS next, \
         ARRAY(SELECT x::text FROM pg_snapshot_xip(p.snapshot) AS x) AS open FROM publisher p, cluster c";
    const FRESH: &str = "SELECT count(*) AS events FROM ( \
           (SELECT tenant_id FROM event WHERE epoch = $1 AND xid >= $2::text::xid8 OFFSET 0) \
           UNION ALL \
           (SELECT tenant_id FROM event WHERE epoch = $1 AND xid = ANY ($3::text[]::xid8[]) OFFSET 0) \
         ) AS fresh WHERE tenant_id = $4";
    let last = session.query(LAST, &[]).await?;
    let Some(last) = last.first() else {
        return Ok(0);
    };
    let (epoch, next): (i32, &str) = (get(last, "epoch")?, get(last, "next")?);
    let open: Vec<&str> = get(last, "open")?;
    let values = &[
        (&epoch as _, Type::INT4),
        (&next as _, Type::TEXT),
        (&open as _, Type::TEXT_ARRAY),
        (&tenant as _, Type::TEXT),
    ];
    Ok(count(&session.query(FRESH, values).await?)?)
}

/// Reads the next runs behind a link.
async fn runs(session: &Session, tenant: &str, after: i64) -> Result<Vec<Row>, Fault> {
    const NEXT: &str = "SELECT position, seq, links, hash FROM chain WHERE tenant_id = $1 \
                        AND seq > $2 ORDER BY seq LIMIT $3";
    let values = &[
        (&tenant as _, Type::TEXT),
        (&after as _, Type::INT8),
        (&RUNS as _, Type::INT8),
    ];
    session.query(NEXT, values).await
}

#[derive(Debug, Clone, Copy)]
struct Link {
    seq: u64,
    position: i64,
    leaf: Hash,
    hash: Hash,
}

/// The links of a tenant in order.
struct Links<'a> {
    session: &'a Session,
    tenant: &'a str,
    /// The last link that was given.
    seq: u64,
    hash: Hash,
    /// The number that the last row has that was read.
    read: i64,
    ready: VecDeque<(i64, Hash)>,
}

impl<'a> Links<'a> {
    fn all(session: &'a Session, tenant: &'a str) -> Self {
        Self {
            session,
            tenant,
            seq: 0,
            hash: origin(tenant),
            read: i64::MIN,
            ready: VecDeque::new(),
        }
    }

    /// Begins behind the run that ends at a link or in front of it.
    async fn before(session: &'a Session, tenant: &'a str, seq: u64) -> Result<Self, Fault> {
        const BEFORE: &str = "SELECT seq, hash FROM chain WHERE tenant_id = $1 AND seq <= $2 \
                              ORDER BY seq DESC LIMIT 1";
        let mut links = Self::all(session, tenant);
        let seq = rows::number(seq);
        let values = &[(&tenant as _, Type::TEXT), (&seq as _, Type::INT8)];
        if let Some(row) = session.query(BEFORE, values).await?.first() {
            links.read = get(row, "seq")?;
            (links.seq, links.hash) = (rows::count(row, "seq")?, chain::hash(row)?);
        }
        Ok(links)
    }

    async fn next(&mut self) -> Result<Option<Link>, Fault> {
        if self.ready.is_empty() {
            for run in runs(self.session, self.tenant, self.read).await? {
                self.read = get(&run, "seq")?;
                self.ready.extend(links(get(&run, "links")?));
            }
        }
        let Some((position, leaf)) = self.ready.pop_front() else {
            return Ok(None);
        };
        self.seq += 1;
        self.hash = link(&self.hash, &leaf);
        Ok(Some(Link {
            seq: self.seq,
            position,
            leaf,
            hash: self.hash,
        }))
    }
}

/// The lines of links.
async fn lines(session: &Session, tenant: &str, shown: &[Link]) -> Result<Vec<String>, Fault> {
    let positions: Vec<i64> = shown.iter().map(|link| link.position).collect();
    let at = entries("position = ANY ($1) AND tenant_id = $2");
    let values = &[
        (&positions as _, Type::INT8_ARRAY),
        (&tenant as _, Type::TEXT),
    ];
    let found = session.query(&at, values).await?;
    let mut events = HashMap::new();
    for row in &found {
        if let Some(entry) = chain::entry(row)? {
            events.insert(get::<i64>(row, "position")?, entry);
        }
    }
    let missing = positions.into_iter();
    let missing = missing.filter(|position| !events.contains_key(position));
    let swept = swept(session, missing.collect()).await?;
    let lines = shown
        .iter()
        .map(|link| match events.get_mut(&link.position) {
            Some(entry) => {
                let mut text = String::new();
                entry.seq = link.seq;
                entry.write(&mut text);
                line::event(&text, &link.hash)
            }
            None if swept.contains(&link.position) => {
                line::removed(link.seq, &link.leaf, &link.hash)
            }
            None => line::missing(link.seq, &link.leaf, &link.hash),
        });
    Ok(lines.collect())
}

/// Those of some positions whose events sweeps removed.
async fn swept(session: &Session, positions: Vec<i64>) -> Result<HashSet<i64>, Fault> {
    if positions.is_empty() {
        return Ok(HashSet::new());
    }
    const SWEPT: &str = "SELECT position FROM swept WHERE position = ANY ($1)";
    let found = session
        .query(SWEPT, &[(&positions, Type::INT8_ARRAY)])
        .await?;
    let swept = found.iter().map(|row| Ok(get(row, "position")?));
    swept.collect()
}

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
async fn verify_chain(session: &Session, tenant: &str, faults: &mut Faults) -> Result<u64, Fault> {
    let mut events = Events {
        session,
        tenant,
        after: i64::MIN,
        ready: VecDeque::new(),
        is_last: false,
    };
    let reached = rows::number(chain::reached(session).await?);
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
                    } else if let Some(entry) = chain::entry(row)? {
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
            comparison.end_run(end, read, chain::hash(run)?);
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

/// Finds events of a tenant that no pass will ever publish, and places in the feed that no pass gave.
/// Neither gets into the chain, but lists and histories show them.
async fn verify_feed(session: &Session, tenant: &str, faults: &mut Faults) -> Result<(), Fault> {
    const UNFILED: &str = "SELECT e.event_id FROM event e, publisher p, cluster c WHERE e.tenant_id = $1 \
         AND (e.epoch <> c.epoch OR pg_visible_in_snapshot(e.xid, p.snapshot)) \
         AND NOT EXISTS (SELECT FROM feed f WHERE f.tenant_id = e.tenant_id AND f.request_id = e.request_id \
         AND f.number = e.number AND f.at = e.at AND f.event_id = e.event_id) LIMIT $2";
    const NOT_GIVEN: &str = "SELECT f.position FROM feed f, publisher p WHERE f.tenant_id = $1 \
         AND f.position > p.position ORDER BY f.position LIMIT $2";
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
    Ok(())
}
