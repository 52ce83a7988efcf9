//! Partitions of past months that retention has emptied.
//!
//! Each month of events has a partition. One that is empty costs little, but each of them is planned
//! and looked through by whatever reads events, for ever.
//!
//! `DETACH … CONCURRENTLY` is not to be had beside a default partition, so dropping one needs the whole
//! of `event` for a moment. It asks for that no longer than [`LOCKED`], as all who come then wait behind
//! it, and tries again an hour later. While it has it, nobody can append, so what is empty stays so;
//! and it neither reads rows nor waits for a standby then. Whatever is appended later for that month
//! goes to the default partition.
//!
//! A file without a page holds nothing that anybody's snapshot can still see. A partition has none if
//! nothing was ever appended, or since a vacuum gave back what it had.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::fault::Fault;
use super::rows::get;
use super::session::{Pool, Session};
use super::wall::Scope;

/// How often a server looks for such partitions.
const EACH: Duration = Duration::from_secs(3600);

/// How long all may wait behind the lock, as PostgreSQL has it.
const LOCKED: &str = "50ms";

/// Of how many bytes a partition is vacuumed at once, if it has no rows. Autovacuum leaves a few that
/// are dead alone, and takes care of more.
const SMALL: i64 = 8 * 1024 * 1024;

/// What keeps two servers from making or dropping partitions at once.
const MAKES: i64 = 4_702_394_921_426_175_818;

/// The partitions that the store made and the user owns, of months that are over for a day: whoever
/// has taken the time has appended by then.
const PAST: &str = "SELECT c.relname::text AS name, pg_relation_size(c.oid) AS bytes \
     FROM pg_class p JOIN pg_inherits i ON i.inhparent = p.oid JOIN pg_class c ON c.oid = i.inhrelid \
     WHERE p.oid = to_regclass('event') AND p.relnamespace = c.relnamespace \
     AND c.relname ~ '^event_[0-9]{4}_[0-9]{2}$' \
     AND pg_has_role(p.relowner, 'USAGE') AND pg_has_role(c.relowner, 'USAGE') \
     AND substring(pg_get_expr(c.relpartbound, c.oid) FROM ' TO \\(''([^'']+)''\\)$')::timestamptz \
       < clock_timestamp() - interval '1 day' \
     ORDER BY c.relname";

/// When a server looked last.
#[derive(Debug, Default)]
pub(super) struct Looked(Mutex<Option<Instant>>);

impl Looked {
    /// Whether it is time to look again, which then counts as done.
    pub(super) fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| last.elapsed() >= EACH);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }
}

/// Drops the partitions that are over and empty, if the user may and nobody is in the way.
pub(super) async fn drop_empty(pool: &Pool) -> Result<(), Fault> {
    let mut session = Session::open(pool, Scope::Nobody).await?;
    let mut empty = Vec::new();
    for row in session.query(PAST, &[]).await? {
        let (name, bytes): (String, i64) = (get(&row, "name")?, get(&row, "bytes")?);
        if bytes > 0 && (bytes > SMALL || !is_vacuumed(&session, &name).await?) {
            continue;
        }
        empty.push(name);
    }
    session.release();
    for name in empty {
        drop_one(pool, &name).await?;
    }
    Ok(())
}

/// Vacuums a partition without rows. Returns whether it has no page left.
async fn is_vacuumed(session: &Session, name: &str) -> Result<bool, Fault> {
    let has_rows = format!("SELECT EXISTS (SELECT FROM ONLY {name}) AS answer");
    if is(session, &has_rows).await? {
        return Ok(false);
    }
    // It waits for nobody, and leaves what a snapshot can still see.
    session
        .run(&format!("VACUUM (SKIP_LOCKED, TRUNCATE) {name}"))
        .await?;
    is(
        session,
        &format!("SELECT pg_relation_size('{name}') = 0 AS answer"),
    )
    .await
}

async fn drop_one(pool: &Pool, name: &str) -> Result<(), Fault> {
    let session = Session::open(pool, Scope::Nobody).await?;
    // With the locks of both nobody appends. If a failover loses the drop, it is done again.
    // Whoever makes partitions has the same number.
    let lock = format!(
        "SET LOCAL lock_timeout = '{LOCKED}'; SET LOCAL synchronous_commit = local; \
         SELECT pg_advisory_xact_lock({MAKES}); \
         LOCK TABLE ONLY event, ONLY {name} IN ACCESS EXCLUSIVE MODE"
    );
    let is_empty = format!("SELECT pg_relation_size('{name}') = 0 AS answer");
    session.begin().await?;
    session.run(&lock).await?;
    if !is(&session, &is_empty).await? {
        session.roll_back().await;
        return Ok(());
    }
    session.run(&format!("DROP TABLE {name}")).await?;
    session.finish().await?;
    tracing::info!(partition = name, "a partition without events is dropped");
    Ok(())
}

/// The answer to a question.
async fn is(session: &Session, sql: &str) -> Result<bool, Fault> {
    let found = session.query(sql, &[]).await?;
    let row = found
        .first()
        .ok_or_else(|| Fault::again("the database has no answer"))?;
    Ok(get(row, "answer")?)
}
