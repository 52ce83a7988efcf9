//! The tables `chain` and `chainer`: the events of each tenant as a hash chain.
//!
//! The chain is extended behind the decisions, in the order of the feed. There is no leader: the
//! server that has the row of `chainer` chains the next events and writes how far it came, in one
//! transaction. The others leave it to that server, and a crash leaves nothing half done.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type, accepts};
use uuid::Uuid;

use super::Inner;
use super::fault::{Fault, unreadable};
use super::rows::{self, free, get};
use super::session::Session;
use super::wall::Scope;
use crate::store::StoreError;
use crate::store::audit::{Entry, Hash, Pace, Run, origin};

/// The most events that are chained in one transaction.
const MOST: i64 = 1024;

/// An event takes the database some 20 us, about as long as its decision: in a tenth of the time it
/// chains thousands a second.
const PACE: Pace = Pace { busy: 9, idle: 1 };

/// The most such transactions when the store is closed, and how long they may take.
const LAST_STEPS: usize = 4;
const LAST_TIME: Duration = Duration::from_secs(1);

/// Selects the events at positions of the feed, in order, with the columns that [`entry`] reads. The
/// event of a position that was deleted by hand is NULL.
///
/// Each is looked up in its index, however few rows the tables have. What a submission says is read
/// for the event of the submission alone.
pub(super) fn entries(which: &str) -> String {
    format!(
        "SELECT f.position, e.tenant_id, e.event_id, e.kind, e.at, e.actor, e.call_id, e.from_status, \
         e.to_status, e.decision, e.execution, e.digest, e.request_id, a.thread_id, a.idempotency_key, \
         CASE e.kind WHEN 'submitted' THEN a.title END AS title, \
         CASE e.kind WHEN 'submitted' THEN a.expires_at END AS expires_at, \
         CASE e.kind WHEN 'submitted' THEN a.allow_edit END AS allow_edit \
         FROM (SELECT * FROM feed WHERE {which}) AS f \
         LEFT JOIN LATERAL (SELECT * FROM event o WHERE o.tenant_id = f.tenant_id \
         AND o.request_id = f.request_id AND o.number = f.number AND o.at = f.at LIMIT 1) AS e ON true \
         LEFT JOIN LATERAL (SELECT o.thread_id, o.idempotency_key, o.title, o.expires_at, o.allow_edit \
         FROM action o WHERE o.tenant_id = f.tenant_id AND o.request_id = f.request_id LIMIT 1) AS a ON true \
         ORDER BY f.position"
    )
}

/// Reads an event as an entry, whose number is still 0; `None` if it is not on record. Whatever an
/// edit by hand has written into the row, there is an entry: one row must not keep the others from
/// being chained.
pub(super) fn entry(row: &Row) -> Result<Option<Entry<'_>>, StoreError> {
    let Some(tenant) = get::<Option<&str>>(row, "tenant_id")? else {
        return Ok(None);
    };
    let text = |name| Ok::<_, StoreError>(get::<Option<&str>>(row, name)?.map(Cow::Borrowed));
    let id = |name| {
        let id = get::<Option<Uuid>>(row, name)?;
        Ok::<_, StoreError>(id.map(|id| Cow::Owned(id.as_bytes().to_vec())))
    };
    Ok(Some(Entry {
        seq: 0,
        tenant_id: tenant.into(),
        id: id("event_id")?.unwrap_or_default(),
        kind: text("kind")?.unwrap_or_default(),
        at: get::<Micros>(row, "at")?.0,
        actor: free(row, "actor")?.unwrap_or_default(),
        call_id: text("call_id")?,
        from_status: text("from_status")?,
        to_status: text("to_status")?.unwrap_or_default(),
        decision: text("decision")?,
        execution: text("execution")?,
        digest: get::<Option<&[u8]>>(row, "digest")?.map(Cow::Borrowed),
        request_id: id("request_id")?,
        thread_id: text("thread_id")?,
        idempotency_key: text("idempotency_key")?,
        title: free(row, "title")?,
        expires_at: get::<Option<Micros>>(row, "expires_at")?.map(|at| at.0),
        allow_edit: get(row, "allow_edit")?,
    }))
}

/// A time as microseconds since 1970. Any is read, even the infinite ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Micros(pub(super) i64);

impl<'a> FromSql<'a> for Micros {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        /// From 1970 to 2000, from where PostgreSQL counts.
        const BETWEEN: i64 = 946_684_800_000_000;

        Ok(Self(
            i64::from_be_bytes(raw.try_into()?).saturating_add(BETWEEN),
        ))
    }

    accepts!(TIMESTAMPTZ);
}

/// The hash in a row of the chain.
pub(super) fn hash(row: &Row) -> Result<Hash, StoreError> {
    let bytes: &[u8] = get(row, "hash")?;
    bytes.try_into().map_err(unreadable)
}

/// The position up to which all events are chained, or 0.
///
/// It grows only, so what is read without a lock stays true.
pub(super) async fn reached(session: &Session) -> Result<u64, Fault> {
    const REACHED: &str = "SELECT position FROM chainer WHERE id = 1";
    let found = session.query(REACHED, &[]).await?;
    let reached = found.first().map(|row| rows::count(row, "position"));
    Ok(reached.transpose()?.unwrap_or(0))
}

/// Chains up to `limit` events in an open transaction, if those up to `position` are not chained.
/// Returns the position up to which all are. Only these may be removed.
///
/// It waits for nobody: if another server chains just now, this one leaves it to that.
pub(super) async fn chain_towards(
    session: &Session,
    position: u64,
    limit: i64,
) -> Result<u64, Fault> {
    let before = reached(session).await?;
    if before >= position {
        return Ok(before);
    }
    const TAKE: &str = "SELECT position FROM chainer WHERE id = 1 FOR UPDATE SKIP LOCKED";
    let taken = session.query(TAKE, &[]).await?;
    let Some(taken) = taken.first() else {
        return Ok(before);
    };
    // Each statement from here on sees what the server before has committed.
    let reached = rows::count(taken, "position")?;
    let after = rows::number(reached);
    let next = entries("position > $1 ORDER BY position LIMIT $2");
    let values = &[(&after as _, Type::INT8), (&limit as _, Type::INT8)];
    let found = session.query(&next, values).await?;
    let Some(last) = found.last() else {
        return Ok(reached);
    };
    let reached = rows::count(last, "position")?;
    insert(session, &runs(session, &found).await?).await?;
    session
        .execute(
            "UPDATE chainer SET position = $1 WHERE id = 1",
            &[(&rows::number(reached), Type::INT8)],
        )
        .await?;
    Ok(reached)
}

/// Computes the links of events that follow on what is chained.
async fn runs(session: &Session, found: &[Row]) -> Result<Vec<Run>, Fault> {
    let mut tenants: Vec<&str> = Vec::new();
    for row in found {
        tenants.extend(get::<Option<&str>>(row, "tenant_id")?);
    }
    tenants.sort_unstable();
    tenants.dedup();
    const TIPS: &str = "SELECT t.tenant_id, c.seq, c.hash FROM unnest($1::text[]) AS t (tenant_id) \
         CROSS JOIN LATERAL (SELECT o.seq, o.hash FROM chain o WHERE o.tenant_id = t.tenant_id \
         ORDER BY o.seq DESC LIMIT 1) AS c";
    let tips = session.query(TIPS, &[(&tenants, Type::TEXT_ARRAY)]).await?;
    let mut runs: BTreeMap<&str, Run> = BTreeMap::new();
    for tip in &tips {
        let tenant: &str = get(tip, "tenant_id")?;
        let end = (rows::count(tip, "seq")?, hash(tip)?);
        runs.insert(tenant, Run::behind(tenant.to_owned(), end));
    }
    let mut text = String::new();
    for row in found {
        let Some(mut entry) = entry(row)? else {
            continue;
        };
        let tenant: &str = get(row, "tenant_id")?;
        let run = runs
            .entry(tenant)
            .or_insert_with(|| Run::behind(tenant.to_owned(), (0, origin(tenant))));
        run.add(get(row, "position")?, &mut entry, &mut text);
    }
    Ok(runs.into_values().collect())
}

async fn insert(session: &Session, runs: &[Run]) -> Result<(), Fault> {
    let tenants: Vec<&str> = runs.iter().map(|run| run.tenant.as_str()).collect();
    let seqs: Vec<i64> = runs.iter().map(|run| rows::number(run.seq)).collect();
    let positions: Vec<i64> = runs.iter().map(|run| run.position).collect();
    let links: Vec<&[u8]> = runs.iter().map(|run| &run.links[..]).collect();
    let hashes: Vec<&[u8]> = runs.iter().map(|run| &run.hash[..]).collect();
    session
        .execute(
            "INSERT INTO chain (tenant_id, seq, position, links, hash) \
             SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bytea[], $5::bytea[])",
            &[
                (&tenants, Type::TEXT_ARRAY),
                (&seqs, Type::INT8_ARRAY),
                (&positions, Type::INT8_ARRAY),
                (&links, Type::BYTEA_ARRAY),
                (&hashes, Type::BYTEA_ARRAY),
            ],
        )
        .await?;
    Ok(())
}

impl Inner {
    /// Chains some of the events that are published. Returns how long to rest.
    pub(super) async fn chain(&self) -> Duration {
        let begun = Instant::now();
        let has_more = match self.chain_next().await {
            Ok(has_more) => has_more,
            // The next step would fail alike, until somebody repairs the tables.
            Err(Fault::Refused(error)) => {
                tracing::warn!(%error, "the audit chain cannot be extended");
                false
            }
            Err(fault) => {
                tracing::debug!(error = %fault.into_error(), "the audit chain is not extended now");
                false
            }
        };
        let is_busy = self.state.running.load(Ordering::Relaxed) > 0;
        PACE.rest(begun.elapsed(), has_more, is_busy)
    }

    /// Chains what the last requests left, so that after the last server no event waits for the
    /// next one to be chained. After a long backlog, another server or the next start goes on.
    pub(super) async fn chain_the_rest(&self) {
        let chaining = async {
            if self.publish().await.is_ok() {
                for _ in 0..LAST_STEPS {
                    if !matches!(self.chain_next().await, Ok(true)) {
                        break;
                    }
                }
            }
        };
        // What is cut off here is rolled back.
        let _ = tokio::time::timeout(LAST_TIME, chaining).await;
    }

    /// Returns whether more can be chained at once.
    async fn chain_next(&self) -> Result<bool, Fault> {
        const BEHIND: &str = "SELECT c.position AS chained, p.position AS published \
                              FROM chainer c, publisher p WHERE c.position < p.position";
        let mut session = Session::open(&self.pool, Scope::All).await?;
        let found = session.query(BEHIND, &[]).await?;
        let Some(behind) = found.first() else {
            session.release();
            return Ok(false);
        };
        let chained = rows::count(behind, "chained")?;
        let published = rows::count(behind, "published")?;
        session.begin().await?;
        // Nobody waits for it, and on a slow disk as many reads take their time.
        session.run("SET LOCAL statement_timeout = '60s'").await?;
        let reached = chain_towards(&session, published, MOST).await?;
        session.finish().await?;
        Ok(reached > chained && reached < published)
    }
}
