//! The audit trail of a database that a server may have open.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::chain;
use super::list::snapshot;
use super::sweep;
use super::{StoreError, schema, verify};
use crate::store::audit::{Comparison, Faults, Hash, line, link, links, origin};
use crate::store::{AuditHead, AuditPage, AuditReport};

/// Selects the runs with a tenant's links behind another link, in order.
pub(super) const RUNS: &str = "SELECT event, seq, links, hash FROM chain WHERE tenant_id = ?1 AND seq > ?2 \
                    ORDER BY seq";

/// The last run that has no link behind another.
pub(super) const BEFORE: &str = "SELECT seq, hash FROM chain WHERE tenant_id = ?1 AND seq <= ?2 \
                      ORDER BY seq DESC LIMIT 1";

/// The next tenant of each table, and its first row.
pub(super) const NEXT_TENANT: [(&str, &str); 2] = [
    (
        "SELECT tenant_id, event FROM chain WHERE tenant_id > ?1 ORDER BY tenant_id LIMIT 1",
        "the audit chain: its row of event",
    ),
    (
        "SELECT tenant_id, seq FROM event WHERE tenant_id > ?1 ORDER BY tenant_id LIMIT 1",
        "event",
    ),
];
pub(super) const UNCHAINED: &str = "SELECT count(*) FROM event WHERE tenant_id = ?1 AND seq > ?2";

/// The audit trails in a database file, for reading. A server may have it open.
///
/// All methods block. Each reads one state of the database, in a transaction of its own. So an
/// export does not make the server's log grow, however slowly it goes.
#[derive(Debug)]
pub struct AuditTrail {
    connection: Connection,
    path: PathBuf,
}

impl AuditTrail {
    /// Opens the database at `database`.
    ///
    /// # Errors
    ///
    /// As [`SqliteStore::verify`](super::SqliteStore::verify).
    pub fn open(database: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = database.as_ref().to_owned();
        let connection = verify::open(&path)?;
        Ok(Self { connection, path })
    }

    fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let read = snapshot(&self.connection).and_then(|snapshot| read(&snapshot));
        read.map_err(|error| schema::unreadable(&self.path, error))
    }

    /// Returns the tenants that have events, or once had, in order.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn tenants(&self) -> Result<Vec<String>, StoreError> {
        self.read(|connection| {
            let tenants = tenants(connection, &mut Faults::default())?;
            Ok(tenants.into_iter().collect())
        })
    }

    /// Returns the end of a tenant's chain. A tenant without events has an empty chain.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn head(&self, tenant: &str) -> Result<AuditHead, StoreError> {
        self.read(|connection| head(connection, tenant))
    }

    /// Returns the line with which an export begins that leaves out the first `after` links of a
    /// tenant. It has the hash of the last of those. `None` if there are fewer.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn first_line(&self, tenant: &str, after: u64) -> Result<Option<String>, StoreError> {
        self.read(|connection| {
            let (mut seq, mut hash) = before(connection, tenant, after)?;
            each_link(connection, tenant, (seq, hash), |link| {
                if link.seq <= after {
                    (seq, hash) = (link.seq, link.hash);
                }
                Ok(link.seq < after)
            })?;
            Ok((seq == after).then(|| line::from(tenant, seq, &hash)))
        })
    }

    /// Returns the lines of up to `limit` links of a tenant, behind the link `after` and up to the
    /// link `to`. `None` if there are none.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn page(
        &self,
        tenant: &str,
        after: u64,
        to: u64,
        limit: usize,
    ) -> Result<Option<AuditPage>, StoreError> {
        self.read(|connection| {
            let mut page = AuditPage {
                lines: Vec::new(),
                seq: after,
            };
            let mut event = connection.prepare_cached(chain::AT)?;
            let start = before(connection, tenant, after)?;
            each_link(connection, tenant, start, |link| {
                if link.seq > to || page.lines.len() >= limit {
                    return Ok(false);
                }
                if link.seq > after {
                    let values = params![link.event, tenant];
                    let text = event.query_row(values, |row| text_of(row, link.seq));
                    page.seq = link.seq;
                    page.lines.push(match text.optional()? {
                        Some(text) => line::event(&text, &link.hash),
                        None if sweep::is_swept(connection, link.event)? => {
                            line::removed(link.seq, &link.leaf, &link.hash)
                        }
                        None => line::missing(link.seq, &link.leaf, &link.hash),
                    });
                }
                Ok(true)
            })?;
            Ok((!page.lines.is_empty()).then_some(page))
        })
    }

    /// Verifies the chain of a tenant, or of each tenant, against the events on record.
    ///
    /// This reads all of them in one transaction, for as long as which the server's log grows.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn verify(&self, tenant: Option<&str>) -> Result<AuditReport, StoreError> {
        self.read(|connection| {
            let (mut report, mut faults) = (AuditReport::default(), Faults::default());
            for tenant in named_or_all(connection, tenant, &mut faults)? {
                report.removed += verify_chain(connection, &tenant, &mut faults)?;
                report.heads.push(head(connection, &tenant)?);
            }
            report.faults = faults.into_vec();
            Ok(report)
        })
    }

    /// Whether the chain of a tenant, or of any tenant, has this hash: as a head that it has now,
    /// or had earlier.
    ///
    /// # Errors
    ///
    /// If the database cannot be read.
    pub fn has_hash(&self, tenant: Option<&str>, hash: &[u8; 32]) -> Result<bool, StoreError> {
        self.read(|connection| {
            for tenant in named_or_all(connection, tenant, &mut Faults::default())? {
                let start = origin(&tenant);
                let mut is_found = start == *hash;
                each_link(connection, &tenant, (0, start), |link| {
                    is_found |= link.hash == *hash;
                    Ok(!is_found)
                })?;
                if is_found {
                    return Ok(true);
                }
            }
            Ok(false)
        })
    }
}

/// Checks the chains of all tenants, for a check of the whole database.
pub(super) fn check(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    for tenant in tenants(connection, faults)? {
        verify_chain(connection, &tenant, faults)?;
    }
    Ok(())
}

fn named_or_all(
    connection: &Connection,
    tenant: Option<&str>,
    faults: &mut Faults,
) -> rusqlite::Result<BTreeSet<String>> {
    match tenant {
        Some(tenant) => Ok(BTreeSet::from([tenant.to_owned()])),
        None => tenants(connection, faults),
    }
}

/// The tenants that have links or events. Each is one search of an index.
fn tenants(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (sql, what) in NEXT_TENANT {
        let mut next = connection.prepare_cached(sql)?;
        // As bytes, because an edit by hand may have written what is no text.
        let mut last = Vec::new();
        loop {
            let value = ToSqlOutput::Borrowed(ValueRef::Text(&last));
            let row = next.query_row([value], |row| {
                Ok((row.get_ref(0)?.as_bytes()?.to_vec(), row.get::<_, i64>(1)?))
            });
            let Some((tenant, number)) = row.optional()? else {
                break;
            };
            match str::from_utf8(&tenant) {
                Ok(tenant) => drop(found.insert(tenant.to_owned())),
                Err(_) => faults.add(format!("{what} {number}: tenant_id cannot be read")),
            }
            last = tenant;
        }
        // No name is empty, but an edit by hand can make it so, and nothing comes before it.
        let value = ToSqlOutput::Borrowed(ValueRef::Text(b""));
        let sql = sql.replace("> ?1", "= ?1");
        if connection.prepare_cached(&sql)?.exists([value])? {
            found.insert(String::new());
        }
    }
    Ok(found)
}

fn head(connection: &Connection, tenant: &str) -> rusqlite::Result<AuditHead> {
    let (seq, hash) = chain::tip(connection, tenant)?;
    let reached = chain::reached(connection)?;
    let unchained: i64 = connection
        .prepare_cached(UNCHAINED)?
        .query_row(params![tenant, reached], |row| row.get(0))?;
    Ok(AuditHead::new(tenant, seq, hash, unchained.unsigned_abs()))
}

/// The number and the hash of the last link of the run that ends at a link or in front of it.
fn before(connection: &Connection, tenant: &str, seq: u64) -> rusqlite::Result<(u64, Hash)> {
    let seq = i64::try_from(seq).unwrap_or(i64::MAX);
    let found = connection
        .prepare_cached(BEFORE)?
        .query_row(params![tenant, seq], |row| {
            Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get(1)?))
        })
        .optional()?;
    Ok(found.unwrap_or_else(|| (0, origin(tenant))))
}

struct Link {
    seq: u64,
    event: i64,
    leaf: Hash,
    hash: Hash,
}

/// Goes through the links behind the end of a run, for as long as `more` says so.
fn each_link(
    connection: &Connection,
    tenant: &str,
    (mut seq, mut hash): (u64, Hash),
    mut more: impl FnMut(Link) -> rusqlite::Result<bool>,
) -> rusqlite::Result<()> {
    let mut read = connection.prepare_cached(RUNS)?;
    let after = i64::try_from(seq).unwrap_or(i64::MAX);
    let mut runs = read.query(params![tenant, after])?;
    while let Some(run) = runs.next()? {
        for (event, leaf) in links(run.get_ref(2)?.as_blob()?) {
            seq += 1;
            hash = link(&hash, &leaf);
            let link = Link {
                seq,
                event,
                leaf,
                hash,
            };
            if !more(link)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The text of the entry of an event that was selected for [`chain::entry`].
fn text_of(row: &Row<'_>, seq: u64) -> rusqlite::Result<String> {
    let mut entry = chain::entry(row)?;
    entry.seq = seq;
    let mut text = String::new();
    entry.write(&mut text);
    Ok(text)
}

/// Compares a tenant's links with its events. Both are read in order. Returns how many events sweeps
/// have removed.
fn verify_chain(
    connection: &Connection,
    tenant: &str,
    faults: &mut Faults,
) -> rusqlite::Result<u64> {
    let reached = chain::reached(connection)?;
    let mut events = connection.prepare_cached(chain::OF_TENANT)?;
    let mut events = events.query(params![tenant, reached])?;
    let mut event = events.next()?;
    let mut runs = connection.prepare_cached(RUNS)?;
    let mut runs = runs.query(params![tenant, i64::MIN])?;
    let mut comparison = Comparison::new(tenant, faults);
    while let Some(run) = runs.next()? {
        for (position, leaf) in links(run.get_ref(2)?.as_blob()?) {
            let seq = comparison.link(position, &leaf);
            while let Some(row) = event {
                let found: i64 = row.get(0)?;
                if found >= position {
                    break;
                }
                comparison.unchained(found);
                event = events.next()?;
            }
            match event {
                Some(row) if row.get::<_, i64>(0)? == position => {
                    comparison.event(chain::entry(row)?, &leaf);
                    event = events.next()?;
                }
                _ => comparison.gone(position, seq, sweep::is_swept(connection, position)?),
            }
        }
        comparison.end_run(run.get(0)?, run.get(1)?, run.get(3)?);
    }
    while let Some(row) = event {
        comparison.unchained(row.get(0)?);
        event = events.next()?;
    }
    Ok(comparison.removed())
}
