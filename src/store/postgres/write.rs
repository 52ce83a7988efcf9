//! Writing what an operation changed.

use std::borrow::Cow;
use std::collections::HashSet;
use std::time::SystemTime;

use tokio_postgres::types::Type;
use uuid::Uuid;

use super::fault::Fault;
use super::loaded::{Happened, Loaded, Loading};
use super::rows::{self, get, kept, kept_time};
use super::session::{Session, Values};
use super::sweep;
use crate::protocol::{Closed, Decision, Digest, Execution, JsonText, Payload};
use crate::store::operation::{Standing, Undelivered};

type Text<'a> = Option<Cow<'a, str>>;

/// Collects one value of each item.
macro_rules! column {
    ($items:expr, $item:ident => $value:expr) => {
        $items.iter().map(|$item| $value).collect::<Vec<_>>()
    };
}

fn text(text: Option<&String>) -> Text<'_> {
    text.map(|text| kept(text))
}

/// The columns of new events, as parameters.
struct Events<'a> {
    tenants: Vec<&'a str>,
    ids: Vec<Uuid>,
    numbers: Vec<i32>,
    ats: Vec<SystemTime>,
    event_ids: Vec<Uuid>,
    actors: Vec<Cow<'a, str>>,
    kinds: Vec<&'a str>,
    froms: Vec<Option<&'a str>>,
    tos: Vec<&'a str>,
    decisions: Vec<Option<&'a str>>,
    executions: Vec<Option<&'a str>>,
    calls: Vec<Option<&'a str>>,
    digests: Vec<Option<&'a [u8]>>,
}

impl<'a> Events<'a> {
    fn of(events: &[&'a Happened]) -> Self {
        Self {
            tenants: column!(events, event => event.key.0.as_str()),
            ids: column!(events, event => event.key.1),
            numbers: column!(events, event => event.number),
            ats: column!(events, event => event.at),
            event_ids: column!(events, event => event.id),
            actors: column!(events, event => kept(&event.actor)),
            kinds: column!(events, event => event.kind.as_str()),
            froms: column!(events, event => event.from.map(|from| from.as_str())),
            tos: column!(events, event => event.to.as_str()),
            decisions: column!(events, event => event.decision),
            executions: column!(events, event => event.execution),
            calls: column!(events, event => event.call_id.as_deref()),
            digests: column!(events, event => event.digest.as_ref().map(|digest| &digest.as_bytes()[..])),
        }
    }

    async fn insert(&self, session: &Session) -> Result<(), Fault> {
        if self.ids.is_empty() {
            return Ok(());
        }
        session
            .execute(
                "INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, from_status, to_status, \
                 decision, execution, call_id, digest, epoch) \
                 SELECT e.*, (SELECT epoch FROM cluster) FROM unnest($1::text[], $2::uuid[], $3::int[], \
                 $4::timestamptz[], $5::uuid[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[], \
                 $11::text[], $12::text[], $13::bytea[]) AS e",
                &[
                    (&self.tenants, Type::TEXT_ARRAY),
                    (&self.ids, Type::UUID_ARRAY),
                    (&self.numbers, Type::INT4_ARRAY),
                    (&self.ats, Type::TIMESTAMPTZ_ARRAY),
                    (&self.event_ids, Type::UUID_ARRAY),
                    (&self.actors, Type::TEXT_ARRAY),
                    (&self.kinds, Type::TEXT_ARRAY),
                    (&self.froms, Type::TEXT_ARRAY),
                    (&self.tos, Type::TEXT_ARRAY),
                    (&self.decisions, Type::TEXT_ARRAY),
                    (&self.executions, Type::TEXT_ARRAY),
                    (&self.calls, Type::TEXT_ARRAY),
                    (&self.digests, Type::BYTEA_ARRAY),
                ],
            )
            .await?;
        Ok(())
    }
}

/// A new action with its first event.
pub(super) type New<'a> = (&'a Loading, &'a Happened);

/// Inserts actions whose identities are not on record, in this order, each with its event. Returns
/// the ids of those that were inserted.
///
/// If `is_careful`, they are looked up first, and one that is on record costs the others nothing.
/// Otherwise the database then inserts all of them once more.
pub(super) async fn insert(
    session: &Session,
    new: &[New<'_>],
    is_careful: bool,
) -> Result<HashSet<Uuid>, Fault> {
    let tenants = column!(new, of => of.0.key.0.as_str());
    let ids = column!(new, of => of.0.key.1);
    let events = column!(new, of => of.1.id);
    let times = column!(new, of => of.1.at);
    let actors = column!(new, of => kept(&of.1.actor));
    let calls = some(column!(new, of => of.1.call_id.as_deref()));
    let new = column!(new, of => &of.0.record);
    let threads = column!(new, of => of.action.thread_id.as_ref().map(|thread| thread.as_str()));
    let keys = column!(new, of => of.action.idempotency_key.as_ref().map(|key| key.as_str()));
    let decisions = some(column!(new, of => of.action.decision.map(Decision::as_str)));
    let digests =
        some(column!(new, of => of.submitted_digest.as_ref().map(|digest| &digest.as_bytes()[..])));
    let payloads = some(column!(new, of => of.action.payload.as_ref().map(Payload::as_str)));
    let comments = some(column!(new, of => text(of.action.comment.as_ref())));
    let titles = some(column!(new, of => text(of.action.title.as_ref())));
    let expiries = some(column!(new, of => of.action.expires_at.map(kept_time)));
    let edits = some(column!(new, of => of.action.allow_edit));
    let inserted = session
        .query(
            "SELECT aegis_insert($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) AS ids",
            &[
                (&tenants, Type::TEXT_ARRAY),
                (&ids, Type::UUID_ARRAY),
                (&threads, Type::TEXT_ARRAY),
                (&keys, Type::TEXT_ARRAY),
                (&events, Type::UUID_ARRAY),
                (&times, Type::TIMESTAMPTZ_ARRAY),
                (&actors, Type::TEXT_ARRAY),
                (&calls, Type::TEXT_ARRAY),
                (&decisions, Type::TEXT_ARRAY),
                (&digests, Type::BYTEA_ARRAY),
                (&payloads, Type::TEXT_ARRAY),
                (&comments, Type::TEXT_ARRAY),
                (&titles, Type::TEXT_ARRAY),
                (&expiries, Type::TIMESTAMPTZ_ARRAY),
                (&edits, Type::BOOL_ARRAY),
                (&is_careful, Type::BOOL),
            ],
        )
        .await?;
    let inserted = inserted.first();
    let inserted = inserted
        .map(|row| get::<Vec<Uuid>>(row, "ids"))
        .transpose()?;
    Ok(inserted.unwrap_or_default().into_iter().collect())
}

/// The column, unless it has no value at all: then the array is NULL.
fn some<T>(column: Vec<Option<T>>) -> Option<Vec<Option<T>>> {
    column.iter().any(Option::is_some).then_some(column)
}

/// Writes all that was changed, and commits. The statements and the commit are sent together, as a
/// failed statement makes the commit a rollback.
pub(super) async fn write_and_commit(
    session: Session,
    loaded: &Loaded,
    endpoint: Option<&str>,
) -> Result<(), Fault> {
    let new: Vec<_> = loaded.new_actions().collect();
    if !new.is_empty() && insert(&session, &new, true).await?.len() < new.len() {
        session.roll_back().await;
        return Err(Fault::again("another server recorded the action just now"));
    }
    if loaded.delivery.is_new && !insert_endpoint(&session, endpoint.unwrap_or_default()).await? {
        session.roll_back().await;
        return Err(Fault::again(
            "another server recorded the endpoint just now",
        ));
    }
    let is_of_new = |event: &&Happened| new.iter().any(|(action, _)| action.key == event.key);
    let rest: Vec<_> = loaded
        .events
        .iter()
        .filter(|event| !is_of_new(event))
        .collect();
    let events = Events::of(&rest);
    let (updated, leased, appended, delivered, removed, forgotten, swept, committed) = tokio::join!(
        biased;
        update(&session, &loaded.actions),
        set_leases(&session, &loaded.actions),
        events.insert(&session),
        update_endpoint(&session, loaded, endpoint),
        change_undelivered(&session, loaded, endpoint),
        remove_endpoint(&session, loaded, endpoint),
        sweep::write(&session, loaded),
        session.commit(),
    );
    for done in [
        updated, leased, appended, delivered, removed, forgotten, swept,
    ] {
        match done {
            Ok(()) => {}
            // A statement that the server refused makes the commit a rollback. If no answer came,
            // both may have been carried out.
            Err(fault) => return Err(fault.before_commit()),
        }
    }
    committed?;
    finish(session)
}

pub(super) fn finish(mut session: Session) -> Result<(), Fault> {
    let is_sure = session.is_sure();
    session.release();
    if is_sure {
        Ok(())
    } else {
        Err(Fault::unknown("the database committed with a warning"))
    }
}

async fn update(session: &Session, actions: &[Loading]) -> Result<(), Fault> {
    let changed: Vec<_> = actions
        .iter()
        .filter(|action| action.is_changed && !action.is_new)
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let records: Vec<_> = changed.iter().map(|loading| &loading.record).collect();
    // A payload never changes once it is there, and it is large.
    let amended = |loading: &Loading| !loading.has_payload;
    let digests = column!(changed, loading => amended(loading)
        .then(|| loading.record.submitted_digest.as_ref().map(|digest| &digest.as_bytes()[..])).flatten());
    let payloads = column!(changed, loading => amended(loading)
        .then(|| loading.record.action.payload.as_ref().map(Payload::as_str)).flatten());
    let tenants = column!(changed, loading => loading.key.0.as_str());
    let ids = column!(changed, loading => loading.key.1);
    let statuses = column!(records, record => record.action.status.as_str());
    let decisions = column!(records, record => record.action.decision.map(Decision::as_str));
    let executions = column!(records, record => record.action.execution.map(Execution::as_str));
    let closed = column!(records, record => record.action.closed.map(Closed::as_str));
    let edits =
        column!(records, record => record.action.edited_payload.as_ref().map(Payload::as_str));
    let edit_digests = column!(records, record => record.action.edited_payload.as_ref()
        .and(record.action.digest.as_ref()).map(|digest: &Digest| &digest.as_bytes()[..]));
    let comments = column!(records, record => text(record.action.comment.as_ref()));
    let deciders = column!(records, record => text(record.action.decided_by.as_ref()));
    let results = column!(records, record => record.action.result.as_ref().map(JsonText::as_str));
    let reasons = column!(records, record => text(record.action.reason.as_ref()));
    let calls = column!(records, record => record.call_id.as_deref());
    let decided = column!(records, record => record.action.decided_at);
    let counts = column!(changed, loading => loading.events);
    session
        .execute(
            "UPDATE action a SET status = n.status, decision = n.decision, execution = n.execution, \
             closed = n.closed, digest = coalesce(a.digest, n.digest), payload = coalesce(a.payload, n.payload), \
             edited_digest = n.edited_digest, edited_payload = n.edited_payload, comment = n.comment, \
             decided_by = n.decided_by, result = n.result, reason = n.reason, call_id = n.call_id, \
             decided_at = n.decided_at, events = n.events \
             FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bytea[], \
             $8::text[], $9::bytea[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[], \
             $16::timestamptz[], $17::int[]) \
             AS n (tenant_id, request_id, status, decision, execution, closed, digest, payload, edited_digest, \
             edited_payload, comment, decided_by, result, reason, call_id, decided_at, events) \
             WHERE a.tenant_id = n.tenant_id AND a.request_id = n.request_id",
            &[
                (&tenants, Type::TEXT_ARRAY),
                (&ids, Type::UUID_ARRAY),
                (&statuses, Type::TEXT_ARRAY),
                (&decisions, Type::TEXT_ARRAY),
                (&executions, Type::TEXT_ARRAY),
                (&closed, Type::TEXT_ARRAY),
                (&digests, Type::BYTEA_ARRAY),
                (&payloads, Type::TEXT_ARRAY),
                (&edit_digests, Type::BYTEA_ARRAY),
                (&edits, Type::TEXT_ARRAY),
                (&comments, Type::TEXT_ARRAY),
                (&deciders, Type::TEXT_ARRAY),
                (&results, Type::TEXT_ARRAY),
                (&reasons, Type::TEXT_ARRAY),
                (&calls, Type::TEXT_ARRAY),
                (&decided, Type::TIMESTAMPTZ_ARRAY),
                (&counts, Type::INT4_ARRAY),
            ],
        )
        .await?;
    Ok(())
}

async fn set_leases(session: &Session, actions: &[Loading]) -> Result<(), Fault> {
    let leased = actions.iter().filter(|action| action.is_leased);
    let leased: Vec<_> = leased
        .filter_map(|action| Some((action, action.lease.as_ref()?)))
        .collect();
    if leased.is_empty() {
        return Ok(());
    }
    let tenants = column!(leased, of => of.0.key.0.as_str());
    let ids = column!(leased, of => of.0.key.1);
    let tokens = column!(leased, of => of.1.token);
    let fences = column!(leased, of => of.1.fence);
    let untils = column!(leased, of => of.1.until.map(kept_time));
    let actors = column!(leased, of => kept(&of.1.actor));
    let calls = column!(leased, of => of.1.call_id.as_deref());
    session
        .execute(
            "INSERT INTO claim (tenant_id, request_id, token, fence, until, actor, call_id) \
             SELECT * FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::bigint[], $5::timestamptz[], $6::text[], \
             $7::text[]) ON CONFLICT (tenant_id, request_id) DO UPDATE SET token = excluded.token, \
             fence = excluded.fence, until = excluded.until, actor = excluded.actor, call_id = excluded.call_id",
            &[
                (&tenants, Type::TEXT_ARRAY),
                (&ids, Type::UUID_ARRAY),
                (&tokens, Type::UUID_ARRAY),
                (&fences, Type::INT8_ARRAY),
                (&untils, Type::TIMESTAMPTZ_ARRAY),
                (&actors, Type::TEXT_ARRAY),
                (&calls, Type::TEXT_ARRAY),
            ],
        )
        .await?;
    Ok(())
}

async fn insert_endpoint(session: &Session, name: &str) -> Result<bool, Fault> {
    let inserted = session
        .execute(
            "INSERT INTO endpoint (name, position) VALUES ($1, 0) ON CONFLICT (name) DO NOTHING",
            &[(&name, Type::TEXT)],
        )
        .await?;
    Ok(inserted == 1)
}

async fn update_endpoint(
    session: &Session,
    loaded: &Loaded,
    name: Option<&str>,
) -> Result<(), Fault> {
    let changed = loaded
        .delivery
        .endpoint
        .as_ref()
        .filter(|_| loaded.delivery.is_changed);
    let (Some(name), Some(endpoint)) = (name, changed) else {
        return Ok(());
    };
    let holder = endpoint.held.map(|(holder, _)| holder);
    let until = endpoint.held.map(|(_, until)| kept_time(until));
    session
        .execute(
            "UPDATE endpoint SET position = $2, holder = $3, held_until = $4, stopped_at = $5, left_at = $6 WHERE name = $1",
            &[
                (&name, Type::TEXT),
                (&rows::number(endpoint.position), Type::INT8),
                (&holder, Type::UUID),
                (&until, Type::TIMESTAMPTZ),
                (&endpoint.stopped_at, Type::TIMESTAMPTZ),
                (&endpoint.left_at, Type::TIMESTAMPTZ),
            ],
        )
        .await?;
    Ok(())
}

/// Removes the endpoint, which is locked, and what it has not received.
async fn remove_endpoint(
    session: &Session,
    loaded: &Loaded,
    name: Option<&str>,
) -> Result<(), Fault> {
    let (Some(name), true) = (name, loaded.delivery.is_removed) else {
        return Ok(());
    };
    let values: &Values<'_> = &[(&name, Type::TEXT)];
    let (emptied, removed) = tokio::join!(
        biased;
        session.execute("DELETE FROM undelivered WHERE endpoint = $1", values),
        session.execute("DELETE FROM endpoint WHERE name = $1", values),
    );
    emptied?;
    removed?;
    Ok(())
}

async fn change_undelivered(
    session: &Session,
    loaded: &Loaded,
    name: Option<&str>,
) -> Result<(), Fault> {
    let changes = &loaded.delivery.changes;
    let (Some(name), false) = (name, changes.is_empty()) else {
        return Ok(());
    };
    let removed = changes.iter().filter(|(_, change)| change.is_none());
    let removed: Vec<_> = removed
        .map(|(position, _)| rows::number(*position))
        .collect();
    let set = changes.values().flatten();
    let set: Vec<(&Undelivered, &super::loaded::Key)> = set
        .filter_map(|of_it| Some((of_it, &loaded.delivery.places.get(&of_it.position)?.0)))
        .collect();
    let positions = column!(set, of => rows::number(of.0.position));
    let tenants = column!(set, of => of.1.0.as_str());
    let ids = column!(set, of => of.1.1);
    let sinces = column!(set, of => of.0.since);
    let attempts = column!(set, of => i32::try_from(of.0.attempts).unwrap_or(i32::MAX));
    let dues = column!(set, of => match of.0.standing {
        Standing::Due(due) => Some(kept_time(due)),
        Standing::Behind | Standing::Dead(_) => None,
    });
    let deaths = column!(set, of => match of.0.standing {
        Standing::Dead(given_up_at) => Some(given_up_at),
        Standing::Due(_) | Standing::Behind => None,
    });
    let failures = column!(set, of => text(of.0.failure.as_ref()));
    let gone: &Values<'_> = &[(&name, Type::TEXT), (&removed, Type::INT8_ARRAY)];
    let now: &Values<'_> = &[
        (&name, Type::TEXT),
        (&positions, Type::INT8_ARRAY),
        (&tenants, Type::TEXT_ARRAY),
        (&ids, Type::UUID_ARRAY),
        (&sinces, Type::TIMESTAMPTZ_ARRAY),
        (&attempts, Type::INT4_ARRAY),
        (&dues, Type::TIMESTAMPTZ_ARRAY),
        (&deaths, Type::TIMESTAMPTZ_ARRAY),
        (&failures, Type::TEXT_ARRAY),
    ];
    let remove = session.execute(
        "DELETE FROM undelivered WHERE endpoint = $1 AND position = ANY ($2)",
        gone,
    );
    let insert = session.execute(
        "INSERT INTO undelivered (endpoint, position, tenant_id, request_id, parked_at, attempts, due, given_up_at, \
         failure) SELECT $1, u.* FROM unnest($2::bigint[], $3::text[], $4::uuid[], $5::timestamptz[], $6::int[], \
         $7::timestamptz[], $8::timestamptz[], $9::text[]) AS u \
         ON CONFLICT (endpoint, position) DO UPDATE SET parked_at = excluded.parked_at, \
         attempts = excluded.attempts, due = excluded.due, given_up_at = excluded.given_up_at, \
         failure = excluded.failure",
        now,
    );
    let (removed, inserted) = tokio::join!(biased; remove, insert);
    removed?;
    inserted?;
    Ok(())
}
