//! Removing actions that are over.
//!
//! Any number of servers sweep. Each step locks the row of `sweep`, and a server that finds it
//! locked leaves the step to the one that has it. What the step may remove is locked too, so that
//! no decision or claim changes it meanwhile. What somebody else has locked is looked at later:
//! a step waits for nobody's decision.

mod step;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

pub(super) use self::step::Step;
use super::Inner;
use super::chain;
use super::fault::{Fault, unreadable};
use super::load;
use super::loaded::{Loaded, Missing};
use super::partitions;
use super::rows::{self, Bug, columns, get};
use super::session::{PLAIN, Session, Values};
use super::wall::Scope;
use super::write;
use crate::protocol::TenantId;
use crate::store::StoreError;
use crate::store::operation::{Aged, Operation, Sweep, Swept};

/// The most events that a step looks at in order, and so the most actions that it removes.
const LOOKS: usize = 256;

/// The most events that a step looks at again.
const LOOKS_AGAIN: i64 = 32;

/// How often a step is tried.
const ATTEMPTS: usize = 3;

/// How long one try may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is answered by a server that has nothing to do.
const NOTHING: Swept = Swept {
    removed: 0,
    has_more: false,
};

impl Inner {
    /// Removes some of what is over.
    pub(super) async fn sweep(&self, sweep: &Sweep) -> Result<Swept, StoreError> {
        // An event that has no position yet keeps none behind it.
        self.publish().await?;
        let mut attempts = 0;
        loop {
            let swept = tokio::time::timeout(PATIENCE, self.try_sweep(sweep)).await;
            // The connection is closed with the attempt, and its transaction ends by itself.
            match swept
                .unwrap_or_else(|_| Err(Fault::unknown("the database did not answer in time")))
            {
                Ok(swept) => {
                    if !swept.has_more && self.partitions.is_due() {
                        self.drop_partitions().await;
                    }
                    return Ok(swept);
                }
                Err(Fault::Refused(error)) => return Err(error),
                Err(Fault::Unknown(error)) => {
                    self.state.set_unsure();
                    return Err(error);
                }
                Err(Fault::Again(error)) => {
                    attempts += 1;
                    if attempts == ATTEMPTS {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Drops the partitions that sweeps have emptied. What is in the way may be gone next time.
    async fn drop_partitions(&self) {
        let dropping = partitions::drop_empty(&self.pool);
        match tokio::time::timeout(PATIENCE, dropping).await {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => {
                tracing::debug!(error = %fault.into_error(), "partitions without events cannot be dropped");
            }
            Err(_) => tracing::debug!("partitions without events cannot be dropped in time"),
        }
    }

    async fn try_sweep(&self, sweep: &Sweep) -> Result<Swept, Fault> {
        let session = Session::open(&self.pool, Scope::All).await?;
        let now = self.state.now();
        if !is_due(&session, before(sweep, now), now).await? {
            let mut session = session;
            session.release();
            return Ok(NOTHING);
        }
        let (unsure, begun) = (self.state.doubts(), Instant::now());
        let (started, indexed, locked) = tokio::join!(
            biased;
            session.begin(),
            session.run(PLAIN),
            session.query("SELECT position FROM sweep WHERE id = 1 FOR UPDATE SKIP LOCKED", &[]),
        );
        started?;
        indexed?;
        let locked = locked?;
        let Some(locked) = locked.first() else {
            session.roll_back().await;
            return Ok(NOTHING);
        };
        let mut loaded = self.look(&session, sweep, locked).await?;
        let swept = sweep.apply(&mut loaded).map_err(|missing| {
            Fault::Refused(unreadable(Bug(match missing {
                Missing::Calls(..) => "the calls of an action",
                Missing::Bug(what) => what,
            })))
        })?;
        let has_more = swept.has_more || loaded.step.as_ref().is_some_and(Step::is_at_its_end);
        let has_changed = loaded.has_changed();
        write::write_and_commit(session, &loaded, None).await?;
        if has_changed {
            self.state.set_written(unsure, begun);
            self.state
                .removed
                .fetch_add(swept.removed as u64, Ordering::Relaxed);
        }
        Ok(Swept { has_more, ..swept })
    }

    /// Reads what a step looks at, and locks what it may remove.
    async fn look(&self, session: &Session, sweep: &Sweep, locked: &Row) -> Result<Loaded, Fault> {
        const ENDPOINTS: &str =
            "SELECT name, position, holder, held_until, stopped_at, left_at FROM endpoint";
        // The newest event is read for its time.
        const EVENTS: &str = "WITH looked AS ( \
               (SELECT f.* FROM feed f WHERE f.position > $1 ORDER BY f.position LIMIT $2) \
               UNION SELECT f.* FROM feed f WHERE f.position IN ( \
                 SELECT position FROM postponed WHERE until <= $3 ORDER BY until, position LIMIT $4) \
               UNION SELECT f.* FROM feed f WHERE f.position = (SELECT position FROM publisher WHERE id = 1) \
             ) SELECT f.position, f.at, f.tenant_id, f.request_id, f.number, \
             coalesce(f.at <= $3 AND a.events = f.number AND a.state IN (2, 4, 5) AND a.removed_at IS NULL, false) AS may_go, \
             coalesce(octet_length(a.payload), 0)::bigint + coalesce(octet_length(a.edited_payload), 0) \
             + coalesce(octet_length(a.result), 0) AS size \
             FROM looked f LEFT JOIN action a ON a.tenant_id = f.tenant_id AND a.request_id = f.request_id";
        const POSTPONED: &str = "SELECT until, position FROM postponed WHERE until <= $1 ORDER BY until, position LIMIT $2";
        const NEWEST: &str =
            "SELECT tenant_id, request_id FROM action ORDER BY request_id DESC LIMIT 1";
        let position = rows::count(locked, "position")?;
        // Nothing that endpoints have received or not changes while the step runs.
        let (started, now) = tokio::join!(
            biased;
            session.run("LOCK TABLE endpoint IN EXCLUSIVE MODE"),
            session.query(load::NOW, &[]),
        );
        started?;
        let mut loaded = load::at(&self.state, &now?)?;
        let before = before(sweep, loaded.now.unwrap_or(UNIX_EPOCH));
        let looks = sweep.limit.clamp(LOOKS_AGAIN as usize, LOOKS);
        let (after, most) = (rows::number(position), rows::number(looks));
        let values: &Values<'_> = &[
            (&after, Type::INT8),
            (&most, Type::INT8),
            (&before, Type::TIMESTAMPTZ),
            (&LOOKS_AGAIN, Type::INT8),
        ];
        let again: &Values<'_> = &[(&before, Type::TIMESTAMPTZ), (&LOOKS_AGAIN, Type::INT8)];
        let (endpoints, newest, newest_action, postponed, events) = tokio::join!(
            biased;
            session.query(ENDPOINTS, &[]),
            session.query("SELECT position FROM publisher WHERE id = 1", &[]),
            session.query(NEWEST, &[]),
            session.query(POSTPONED, again),
            session.query(EVENTS, values),
        );
        let newest = newest?;
        let newest = newest.first().map(|row| rows::count(row, "position"));
        loaded.delivery.newest = newest.transpose()?;
        let events = events?;
        let times = events
            .iter()
            .map(|row| Ok((rows::count(row, "position")?, get(row, "at")?)));
        let times = times.collect::<Result<_, StoreError>>()?;
        let mut step = Step::new(position, looks, times);
        for (row, endpoint) in (0..).zip(&endpoints?) {
            step.add_endpoint(get(endpoint, "name")?, load::parse_endpoint(endpoint, row)?);
        }
        for row in &postponed? {
            step.add_postponed(get(row, "until")?, rows::count(row, "position")?);
        }
        let last = step.last_old(before, loaded.delivery.newest.unwrap_or(0));
        step.chained = chain_towards(session, last).await?;
        take(session, &mut loaded, &mut step, &events).await?;
        if let Some(row) = newest_action?.first() {
            let newest = (rows::word(row, "tenant_id")?, get(row, "request_id")?);
            step.newest_action = loaded.row_of(&newest);
        }
        loaded.step = Some(step);
        Ok(loaded)
    }
}

/// Up to when an action that is over must have ended.
fn before(sweep: &Sweep, now: SystemTime) -> SystemTime {
    now.checked_sub(sweep.retention).unwrap_or(UNIX_EPOCH)
}

/// Whether a step would find anything to do. It locks nothing, as mostly there is nothing.
async fn is_due(session: &Session, before: SystemTime, now: SystemTime) -> Result<bool, Fault> {
    const DUE: &str = "SELECT EXISTS (SELECT FROM postponed WHERE until <= $1) OR coalesce(( \
           SELECT f.at <= $1 OR f.at > $2 FROM feed f WHERE f.position > (SELECT position FROM sweep WHERE id = 1) \
           AND f.position < (SELECT position FROM publisher WHERE id = 1) ORDER BY f.position LIMIT 1), false) AS is_due";
    let values: &Values<'_> = &[(&before, Type::TIMESTAMPTZ), (&now, Type::TIMESTAMPTZ)];
    let found = session.read(DUE, values).await?;
    let is_due = found.first().map(|row| get(row, "is_due")).transpose()?;
    Ok(is_due.unwrap_or(false))
}

/// Returns the position up to which events are in the audit chain: only these may be removed. If it
/// is before `position`, the chain is extended first, by a few events.
async fn chain_towards(session: &Session, position: u64) -> Result<u64, Fault> {
    /// Some milliseconds. Deliveries wait meanwhile.
    const MOST: i64 = 128;

    chain::chain_towards(session, position, MOST).await
}

/// Locks the actions whose newest events these are, as far as nobody else has them locked.
async fn take(
    session: &Session,
    loaded: &mut Loaded,
    step: &mut Step,
    events: &[Row],
) -> Result<(), Fault> {
    const TAKE: &str = concat!(
        "SELECT k.position, ",
        columns!(listed),
        " FROM unnest($1::bigint[], $2::text[], $3::uuid[], $4::int[]) AS k (position, tenant_id, request_id, number) \
         JOIN action a ON a.tenant_id = k.tenant_id AND a.request_id = k.request_id \
         WHERE a.events = k.number AND a.removed_at IS NULL FOR UPDATE OF a SKIP LOCKED"
    );
    let mut sizes = HashMap::new();
    let (mut positions, mut numbers) = (Vec::new(), Vec::new());
    let (mut tenants, mut ids) = (Vec::<&str>::new(), Vec::<Uuid>::new());
    for row in events {
        if get(row, "may_go")? {
            let position: i64 = get(row, "position")?;
            let size = rows::count(row, "size")?;
            sizes.insert(position, usize::try_from(size).unwrap_or(usize::MAX));
            // Until it is taken.
            step.set_aged(position.unsigned_abs(), Aged::Busy);
            positions.push(position);
            tenants.push(get(row, "tenant_id")?);
            ids.push(get(row, "request_id")?);
            numbers.push(get::<i32>(row, "number")?);
        }
    }
    if positions.is_empty() {
        return Ok(());
    }
    let values: &Values<'_> = &[
        (&positions, Type::INT8_ARRAY),
        (&tenants, Type::TEXT_ARRAY),
        (&ids, Type::UUID_ARRAY),
        (&numbers, Type::INT4_ARRAY),
    ];
    for found in &session.query(TAKE, values).await? {
        let position: i64 = get(found, "position")?;
        let row = rows::number(loaded.actions.len());
        let size = sizes.get(&position).copied().unwrap_or(0);
        step.set_aged(position.unsigned_abs(), Aged::Free { row, size });
        if let Err(error) = load::add_outline(loaded, found) {
            // It stays, and keeps nothing else from being removed.
            tracing::warn!(%error, "an action that may be over cannot be read");
            step.leave(position.unsigned_abs());
        }
    }
    parked(session, loaded, step).await
}

/// Reads what endpoints have parked of the actions that are loaded.
async fn parked(session: &Session, loaded: &Loaded, step: &mut Step) -> Result<(), Fault> {
    const PARKED: &str = "SELECT u.endpoint, u.tenant_id, u.request_id, u.position, u.parked_at, u.attempts, u.due, \
         u.given_up_at, u.failure FROM unnest($1::text[], $2::uuid[]) AS k (tenant_id, request_id) \
         JOIN undelivered u ON u.tenant_id = k.tenant_id AND u.request_id = k.request_id \
         WHERE u.given_up_at IS NULL ORDER BY u.position";
    let keys = loaded.actions.iter().map(|action| &action.key);
    let (tenants, ids): (Vec<_>, Vec<_>) = keys.map(|(tenant, id)| (tenant.as_str(), *id)).unzip();
    let found = session
        .query(
            PARKED,
            &[(&tenants, Type::TEXT_ARRAY), (&ids, Type::UUID_ARRAY)],
        )
        .await?;
    for row in &found {
        let key: (TenantId, Uuid) = (rows::word(row, "tenant_id")?, get(row, "request_id")?);
        if let Some(of) = loaded.row_of(&key) {
            step.add_parked(get(row, "endpoint")?, of, load::parse(row)?);
        }
    }
    Ok(())
}

/// Writes what a step changed.
pub(super) async fn write(session: &Session, loaded: &Loaded) -> Result<(), Fault> {
    let Some(step) = loaded.step.as_ref().filter(|step| step.has_changed()) else {
        return Ok(());
    };
    let (removed, postponed, moved) = tokio::join!(
        biased;
        remove(session, loaded, step),
        write_postponed(session, step),
        move_on(session, step),
    );
    removed?;
    postponed?;
    moved
}

/// Strips the rows of the actions, and removes what belongs to them.
async fn remove(session: &Session, loaded: &Loaded, step: &Step) -> Result<(), Fault> {
    const OF: &str = "unnest($1::text[], $2::uuid[]) AS k (tenant_id, request_id)";
    const STRIP: &str = "payload = NULL, edited_payload = NULL, comment = NULL, title = NULL, expires_at = NULL, \
         allow_edit = NULL, submitted_by = NULL, decided_by = NULL, result = NULL, reason = NULL, call_id = NULL";
    if step.removed().is_empty() {
        return Ok(());
    }
    let actions = step.removed().iter().filter_map(|row| {
        let row = usize::try_from(*row).ok()?;
        Some(&loaded.actions.get(row)?.key)
    });
    let (tenants, ids): (Vec<_>, Vec<_>) =
        actions.map(|(tenant, id)| (tenant.as_str(), *id)).unzip();
    let keys: &Values<'_> = &[(&tenants, Type::TEXT_ARRAY), (&ids, Type::UUID_ARRAY)];
    let strip = [
        (&tenants as _, Type::TEXT_ARRAY),
        (&ids as _, Type::UUID_ARRAY),
        (&loaded.now as _, Type::TIMESTAMPTZ),
    ];
    let stripped = format!(
        "UPDATE action a SET removed_at = $3, {STRIP} FROM {OF} \
         WHERE a.tenant_id = k.tenant_id AND a.request_id = k.request_id"
    );
    let delete = |table: &str| {
        format!(
            "DELETE FROM {table} t USING {OF} WHERE t.tenant_id = k.tenant_id AND t.request_id = k.request_id"
        )
    };
    let filed = format!(
        "WITH gone AS ({} RETURNING t.position) INSERT INTO swept (position) SELECT position FROM gone",
        delete("feed")
    );
    let others = ["event", "claim", "undelivered"].map(delete);
    let [events, claims, undelivered] = &others;
    let (stripped, filed, events, claims, undelivered) = tokio::join!(
        biased;
        session.execute(&stripped, &strip),
        session.execute(&filed, keys),
        session.execute(events, keys),
        session.execute(claims, keys),
        session.execute(undelivered, keys),
    );
    for done in [stripped, filed, events, claims, undelivered] {
        done?;
    }
    Ok(())
}

async fn write_postponed(session: &Session, step: &Step) -> Result<(), Fault> {
    const DELETE: &str = "DELETE FROM postponed p USING unnest($1::timestamptz[], $2::bigint[]) AS n (until, position) \
         WHERE p.until = n.until AND p.position = n.position";
    const INSERT: &str = "INSERT INTO postponed (until, position) SELECT * FROM unnest($1::timestamptz[], $2::bigint[])";
    let columns =
        |(until, position): (SystemTime, u64)| (rows::kept_time(until), rows::number(position));
    let (untils, positions): (Vec<_>, Vec<_>) = step.looked_at().map(columns).unzip();
    let (new_untils, new_positions): (Vec<_>, Vec<_>) = step.newly_postponed().map(columns).unzip();
    if positions.is_empty() && new_positions.is_empty() {
        return Ok(());
    }
    let looked_at: &Values<'_> = &[
        (&untils, Type::TIMESTAMPTZ_ARRAY),
        (&positions, Type::INT8_ARRAY),
    ];
    let postponed: &Values<'_> = &[
        (&new_untils, Type::TIMESTAMPTZ_ARRAY),
        (&new_positions, Type::INT8_ARRAY),
    ];
    let (deleted, inserted) = tokio::join!(
        biased;
        session.execute(DELETE, looked_at),
        session.execute(INSERT, postponed),
    );
    deleted?;
    inserted?;
    Ok(())
}

async fn move_on(session: &Session, step: &Step) -> Result<(), Fault> {
    let (position, removed) = (
        rows::number(step.position),
        rows::number(step.removed().len()),
    );
    session
        .execute(
            "UPDATE sweep SET position = $1, tombstones = tombstones + $2 WHERE id = 1",
            &[(&position, Type::INT8), (&removed, Type::INT8)],
        )
        .await?;
    Ok(())
}
