//! The audit trail of a database that servers may use.

mod actions;
mod links;
mod verify;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use self::links::{Link, Links};
use super::address::Address;
use super::chain::{self, entries};
use super::fault::Fault;
use super::rows::{self, get};
use super::session::{Pool, Session};
use super::state::State;
use super::wall::Scope;
use super::{PostgresBuilder, connected, import, schema};
use crate::store::audit::{Faults, line, origin};
use crate::store::{AuditHead, AuditPage, AuditReport, StoreError};

/// The most tenants that are read at once.
const TENANTS: i64 = 1000;

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
        let is_complete = import::check(&pool, &address.place()).await;
        is_complete.map_err(Fault::into_error)?;
        Ok(PostgresAuditTrail { pool })
    }
}

impl PostgresAuditTrail {
    /// Begins a transaction that sees one state of the database.
    async fn snapshot(&self) -> Result<Session, Fault> {
        let session = Session::open(&self.pool, Scope::All).await?;
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

    /// Verifies the chain of a tenant, or of each tenant, against the events on record, and each
    /// action against its events.
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
            verify::single_rows(&session, &mut faults).await?;
            for tenant in named_or_all(&session, tenant).await? {
                report.removed += verify::chain(&session, &tenant, &mut faults).await?;
                verify::feed(&session, &tenant, &mut faults).await?;
                actions::actions(&session, &tenant, &mut faults).await?;
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

/// The tenants that have links, places in the feed, events, or actions. Each is one search of an index.
async fn tenants(session: &Session) -> Result<BTreeSet<String>, Fault> {
    let mut found = BTreeSet::new();
    for table in ["chain", "feed", "event", "action"] {
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
