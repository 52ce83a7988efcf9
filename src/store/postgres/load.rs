//! Reading what an operation may change, and locking it.

use std::time::SystemTime;

use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use super::fault::Fault;
use super::loaded::{Key, Loaded};
use super::rows::{self, columns, free_text, get};
use super::session::{Session, Values};
use super::state::State;
use crate::protocol::TenantId;
use crate::store::operation::{Endpoint, Operation, Standing, Tombstone, Undelivered};
use crate::store::{
    Acquire, Cancel, Decide, DecideById, Finish, Forget, Identity, MarkDeliveries, Renew, Resend,
    Resume, StoreError, Submit, TakeEndpoint,
};

/// What an operation is about.
#[derive(Debug, Clone, Copy)]
pub(super) enum Subject<'a> {
    Identity(&'a Identity),
    Action(&'a TenantId, Uuid),
    Endpoint(&'a str, Extent<'a>),
}

/// How much of an endpoint is read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Extent<'a> {
    Alone,
    /// What is parked, and the newest event.
    Parked,
    /// What is undelivered of the actions of these events.
    Of(&'a [(u64, crate::store::DeliveryResult)]),
    /// The dead letters with these ids or all of them, and what else is undelivered of their
    /// actions.
    Dead(Option<&'a [Uuid]>),
}

/// An operation of which this store knows what it is about.
pub(super) trait Located: Operation + Sync {
    fn subject(&self) -> Subject<'_>;
}

macro_rules! located {
    ($($operation:ty: $operation_value:ident => $subject:expr;)+) => {
        $(impl Located for $operation {
            fn subject(&self) -> Subject<'_> {
                let $operation_value = self;
                $subject
            }
        })+
    };
}

located! {
    Decide: it => Subject::Identity(&it.identity);
    Submit: it => Subject::Identity(&it.identity);
    DecideById: it => Subject::Action(&it.tenant_id, it.id);
    Cancel: it => Subject::Action(&it.tenant_id, it.id);
    Acquire: it => Subject::Action(&it.tenant_id, it.id);
    Renew: it => Subject::Action(&it.tenant_id, it.id);
    Finish: it => Subject::Action(&it.tenant_id, it.id);
    TakeEndpoint: it => Subject::Endpoint(&it.endpoint, Extent::Parked);
    MarkDeliveries: it => Subject::Endpoint(&it.endpoint, Extent::Of(&it.results));
    Resend: it => Subject::Endpoint(&it.endpoint, Extent::Dead(it.events.as_deref()));
    Resume: it => Subject::Endpoint(&it.endpoint, Extent::Alone);
    Forget: it => Subject::Endpoint(&it.endpoint, Extent::Alone);
}

impl From<StoreError> for Fault {
    /// Of a row that cannot be read, which it cannot be next time either.
    fn from(error: StoreError) -> Self {
        Self::Refused(error)
    }
}

pub(super) const NOW: &str = "SELECT clock_timestamp() AS now";

/// Begins a transaction, and reads what an operation is about, locked until it ends.
///
/// The lock of an action is that of all that belongs to it. The statements are sent together, and
/// each sees what was committed before the lock was had.
pub(super) async fn load(
    session: &Session,
    state: &State,
    subject: Subject<'_>,
) -> Result<Loaded, Fault> {
    match subject {
        Subject::Identity(identity) => {
            let [tenant, thread, key] = [
                identity.tenant_id.as_str(),
                identity.thread_id.as_str(),
                identity.idempotency_key.as_str(),
            ];
            let values: &Values<'_> = &[
                (&tenant, Type::TEXT),
                (&thread, Type::TEXT),
                (&key, Type::TEXT),
            ];
            const OF: &str = "a.tenant_id = $1 AND a.thread_id = $2 AND a.idempotency_key = $3";
            let mut loaded = action(session, state, OF, values).await?;
            if loaded.actions.is_empty() && loaded.tombstone.is_none() {
                loaded.tombstone = imported_tombstone(session, identity).await?;
            }
            Ok(loaded)
        }
        Subject::Action(tenant, id) => {
            let tenant = tenant.as_str();
            let values: &Values<'_> = &[(&tenant, Type::TEXT), (&id, Type::UUID)];
            action(
                session,
                state,
                "a.tenant_id = $1 AND a.request_id = $2 AND a.removed_at IS NULL",
                values,
            )
            .await
        }
        Subject::Endpoint(name, extent) => endpoint(session, state, name, extent).await,
    }
}

async fn action(
    session: &Session,
    state: &State,
    condition: &str,
    values: &Values<'_>,
) -> Result<Loaded, Fault> {
    let action = format!(
        concat!("SELECT ", columns!(), " FROM action a WHERE {} FOR UPDATE"),
        condition
    );
    let claim = format!(
        "SELECT c.token, c.fence, c.until, c.actor, c.call_id FROM claim c \
         JOIN action a ON a.tenant_id = c.tenant_id AND a.request_id = c.request_id WHERE {condition}"
    );
    let (begun, action, claim, now) = tokio::join!(
        biased;
        session.begin(),
        session.query(&action, values),
        session.query(&claim, values),
        session.query(NOW, &[]),
    );
    begun?;
    let mut loaded = at(state, &now?)?;
    if let Some(row) = action?.first() {
        loaded.is_locked = true;
        match rows::tombstone(row)? {
            Some(tombstone) => loaded.tombstone = Some(tombstone),
            None => add(&mut loaded, row)?,
        }
    }
    if let Some(row) = claim?.first()
        && let Some(action) = loaded.actions.first_mut()
    {
        action.lease = Some(rows::lease(row)?);
    }
    Ok(loaded)
}

/// Reads what stayed of an action that was removed before its database was moved into this one.
async fn imported_tombstone(
    session: &Session,
    identity: &Identity,
) -> Result<Option<Tombstone>, Fault> {
    const OF: &str = "SELECT request_id, decision, execution, closed, digest, edited_digest, created_at, decided_at, \
                      decided_at AS removed_at FROM tombstone WHERE identity = $1";
    let digest = &identity.digest()[..];
    let found = session.query(OF, &[(&digest, Type::BYTEA)]).await?;
    let tombstone = found.first().map(rows::tombstone).transpose()?;
    Ok(tombstone.flatten())
}

/// An empty ledger at the time that was read.
pub(super) fn at(state: &State, now: &[Row]) -> Result<Loaded, Fault> {
    let row = now
        .first()
        .ok_or_else(|| Fault::again("the database has no time"))?;
    let now: SystemTime = get(row, "now")?;
    Ok(Loaded::at(state.set_time(now)))
}

/// Adds an action that was read.
pub(super) fn add(loaded: &mut Loaded, row: &Row) -> Result<(), StoreError> {
    let number = rows::number(loaded.actions.len());
    let (record, events) = rows::record(row, number)?;
    loaded.add(key(row)?, record, events);
    Ok(())
}

/// Adds an action that was read without what can be large.
pub(super) fn add_outline(loaded: &mut Loaded, row: &Row) -> Result<(), StoreError> {
    let number = rows::number(loaded.actions.len());
    let (record, events) = rows::listed_record(row, number)?;
    loaded.add(key(row)?, record, events);
    Ok(())
}

/// Which action a row is, or belongs to.
pub(super) fn key(row: &Row) -> Result<Key, StoreError> {
    Ok((rows::word(row, "tenant_id")?, get(row, "request_id")?))
}

/// Reads the claims on the actions that are loaded.
pub(super) async fn leases(session: &Session, loaded: &mut Loaded) -> Result<(), Fault> {
    let keys = loaded.actions.iter().map(|action| &action.key);
    let (tenants, ids): (Vec<_>, Vec<_>) = keys.map(|(tenant, id)| (tenant.as_str(), *id)).unzip();
    let found = session
        .query(
            "SELECT c.tenant_id, c.request_id, c.token, c.fence, c.until, c.actor, c.call_id \
             FROM claim c JOIN unnest($1::text[], $2::uuid[]) AS k (tenant_id, request_id) \
             ON c.tenant_id = k.tenant_id AND c.request_id = k.request_id",
            &[(&tenants, Type::TEXT_ARRAY), (&ids, Type::UUID_ARRAY)],
        )
        .await?;
    for row in &found {
        let key = key(row)?;
        let mut actions = loaded.actions.iter_mut();
        if let Some(action) = actions.find(|action| action.key == key) {
            action.lease = Some(rows::lease(row)?);
        }
    }
    Ok(())
}

/// Reads the kinds of the transitions that a call made of an action.
pub(super) async fn calls(
    session: &Session,
    loaded: &mut Loaded,
    row: i64,
    call: String,
) -> Result<(), Fault> {
    let key: Option<Key> = usize::try_from(row)
        .ok()
        .and_then(|row| Some(loaded.actions.get(row)?.key.clone()));
    let mut kinds = Vec::new();
    if let Some((tenant, id)) = key {
        let tenant = tenant.as_str();
        let values: &Values<'_> = &[
            (&tenant, Type::TEXT),
            (&id, Type::UUID),
            (&call, Type::TEXT),
        ];
        const MADE: &str = "SELECT DISTINCT e.kind FROM event e \
                            WHERE e.tenant_id = $1 AND e.request_id = $2 AND e.call_id = $3";
        for row in session.query(MADE, values).await? {
            kinds.push(rows::word(&row, "kind")?);
        }
    }
    loaded.calls.insert((row, call), kinds);
    Ok(())
}

async fn endpoint(
    session: &Session,
    state: &State,
    name: &str,
    extent: Extent<'_>,
) -> Result<Loaded, Fault> {
    let values: &Values<'_> = &[(&name, Type::TEXT)];
    let (begun, found, newest, now) = tokio::join!(
        biased;
        session.begin(),
        session.query(
            "SELECT position, holder, held_until, stopped_at, left_at FROM endpoint WHERE name = $1 FOR UPDATE",
            values,
        ),
        session.query("SELECT position FROM publisher", &[]),
        session.query(NOW, &[]),
    );
    begun?;
    let mut loaded = at(state, &now?)?;
    let newest = newest?;
    let newest = newest
        .first()
        .map(|row| rows::count(row, "position"))
        .transpose()?;
    loaded.delivery.newest = newest;
    let Some(row) = found?.into_iter().next() else {
        return Ok(loaded);
    };
    loaded.delivery.endpoint = Some(parse_endpoint(&row, 0)?);
    undelivered(session, &mut loaded, name, extent).await?;
    Ok(loaded)
}

/// Reads an endpoint. `number` becomes the number of its row.
pub(super) fn parse_endpoint(row: &Row, number: i64) -> Result<Endpoint, StoreError> {
    let (holder, until): (Option<Uuid>, Option<SystemTime>) =
        (get(row, "holder")?, get(row, "held_until")?);
    Ok(Endpoint {
        row: number,
        position: rows::count(row, "position")?,
        held: holder.zip(until),
        stopped_at: get(row, "stopped_at")?,
        left_at: get(row, "left_at")?,
    })
}

/// Reads what an endpoint has not received, as far as an operation may look at it.
async fn undelivered(
    session: &Session,
    loaded: &mut Loaded,
    name: &str,
    extent: Extent<'_>,
) -> Result<(), Fault> {
    const SELECT: &str = "SELECT u.position, u.tenant_id, u.request_id, f.event_id, u.parked_at, u.attempts, u.due, \
                          u.given_up_at, u.failure FROM undelivered u JOIN feed f ON f.position = u.position \
                          WHERE u.endpoint = $1 AND ";
    let positions: Vec<i64>;
    let (condition, value, kind): (&str, &(dyn ToSql + Sync), Type) = match extent {
        Extent::Alone => return Ok(()),
        Extent::Parked => ("u.given_up_at IS NULL AND $2", &true, Type::BOOL),
        Extent::Of(results) => {
            positions = results
                .iter()
                .map(|(position, _)| rows::number(*position))
                .collect();
            let places = session
                .query(
                    "SELECT position, tenant_id, request_id, event_id FROM feed WHERE position = ANY ($1)",
                    &[(&positions, Type::INT8_ARRAY)],
                )
                .await?;
            for row in &places {
                add_place(loaded, row)?;
            }
            let of = "(u.tenant_id, u.request_id) IN (SELECT o.tenant_id, o.request_id FROM feed o WHERE o.position = ANY ($2))";
            (of, &positions, Type::INT8_ARRAY)
        }
        Extent::Dead(ref events) => {
            let of = "(u.tenant_id, u.request_id) IN (SELECT d.tenant_id, d.request_id FROM undelivered d \
                      JOIN feed o ON o.position = d.position WHERE d.endpoint = $1 AND d.given_up_at IS NOT NULL \
                      AND ($2::uuid[] IS NULL OR o.event_id = ANY ($2)))";
            (of, events, Type::UUID_ARRAY)
        }
    };
    let sql = format!("{SELECT}{condition}");
    for row in session
        .query(&sql, &[(&name, Type::TEXT), (value, kind)])
        .await?
    {
        add_place(loaded, &row)?;
        let undelivered = parse(&row)?;
        loaded
            .delivery
            .undelivered
            .insert(undelivered.position, undelivered);
    }
    Ok(())
}

fn add_place(loaded: &mut Loaded, row: &Row) -> Result<(), StoreError> {
    let place = (key(row)?, get(row, "event_id")?);
    loaded
        .delivery
        .places
        .insert(rows::count(row, "position")?, place);
    Ok(())
}

/// Reads what is undelivered of one event.
pub(super) fn parse(row: &Row) -> Result<Undelivered, StoreError> {
    let (due, given_up_at): (Option<SystemTime>, Option<SystemTime>) =
        (get(row, "due")?, get(row, "given_up_at")?);
    Ok(Undelivered {
        position: rows::count(row, "position")?,
        since: get(row, "parked_at")?,
        attempts: get::<i32>(row, "attempts")?.unsigned_abs(),
        standing: match (due, given_up_at) {
            (_, Some(given_up_at)) => Standing::Dead(given_up_at),
            (Some(due), None) => Standing::Due(due),
            (None, None) => Standing::Behind,
        },
        failure: free_text(row, "failure")?,
    })
}
