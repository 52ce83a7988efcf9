//! Verification: the actions of a tenant against their events.

use std::collections::VecDeque;

use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::store::StoreError;
use crate::store::audit::Faults;
use crate::store::audit::history::{Event, History, Shown};
use crate::store::postgres::chain::Micros;
use crate::store::postgres::fault::Fault;
use crate::store::postgres::rows::{self, get};
use crate::store::postgres::session::{Session, Values};

/// The most rows of a table that are read at once.
const ROWS: i64 = 1024;

/// The events of a tenant, in the order of actions, and of their numbers within an action.
struct Events<'a> {
    session: &'a Session,
    tenant: &'a str,
    /// Whether the key of the last row that was read is left out.
    comparison: &'static str,
    after: (Uuid, i32, String),
    ready: VecDeque<Row>,
    is_last: bool,
}

impl<'a> Events<'a> {
    fn of(session: &'a Session, tenant: &'a str) -> Self {
        Self {
            session,
            tenant,
            comparison: ">=",
            after: (Uuid::nil(), i32::MIN, "-infinity".to_owned()),
            ready: VecDeque::new(),
            is_last: false,
        }
    }

    /// Returns the action of the next event, again until that is [taken](Self::take).
    async fn peek(&mut self) -> Result<Option<Uuid>, Fault> {
        if self.ready.is_empty() && !self.is_last {
            let next = format!(
                "SELECT request_id, number, at, at::text AS at_text, tenant_id, kind, from_status, to_status, \
                 decision, execution, call_id, actor, digest FROM event WHERE tenant_id = $1 \
                 AND (request_id, number, at) {} ($2, $3, $4::text::timestamptz) \
                 ORDER BY request_id, number, at LIMIT $5",
                self.comparison
            );
            let (action, number, at) = &self.after;
            let values: &Values<'_> = &[
                (&self.tenant, Type::TEXT),
                (action, Type::UUID),
                (number, Type::INT4),
                (at, Type::TEXT),
                (&ROWS, Type::INT8),
            ];
            self.ready = self.session.query(&next, values).await?.into();
            self.is_last = rows::number(self.ready.len()) < ROWS;
            self.comparison = ">";
            if let Some(last) = self.ready.back() {
                let (action, number) = (get(last, "request_id")?, get(last, "number")?);
                self.after = (action, number, get(last, "at_text")?);
            }
        }
        let action = self.ready.front().map(|row| get(row, "request_id"));
        Ok(action.transpose()?)
    }

    fn take(&mut self) -> Result<Option<Event>, StoreError> {
        let row = self.ready.pop_front();
        row.map(|row| event(&row)).transpose()
    }

    /// Takes the events in front of those of an action, or all: their own actions are not on record.
    async fn take_lost(&mut self, action: Option<Uuid>, faults: &mut Faults) -> Result<(), Fault> {
        let mut named = None;
        while let Some(lost) = self.peek().await?
            && action.is_none_or(|action| lost < action)
        {
            if let Some(event) = self.take()?
                && named.replace(lost) != Some(lost)
            {
                let fault = format!("it is not on record, and event {} of it is", event.number);
                faults.add(of_action(lost, self.tenant, &fault));
            }
        }
        Ok(())
    }
}

/// Compares each action of a tenant with its events, whether these are published or not. Both are
/// read in order.
pub(super) async fn actions(
    session: &Session,
    tenant: &str,
    faults: &mut Faults,
) -> Result<(), Fault> {
    let mut events = Events::of(session, tenant);
    let (mut after, mut comparison) = (Uuid::nil(), ">=");
    loop {
        let next = format!(
            "SELECT request_id, tenant_id, status, decision, execution, closed, digest, edited_digest, submitted_by, \
             decided_by, call_id, created_at, decided_at, events, removed_at IS NOT NULL AS is_removed \
             FROM action WHERE tenant_id = $1 AND request_id {comparison} $2 ORDER BY request_id LIMIT $3"
        );
        let values: &Values<'_> = &[
            (&tenant, Type::TEXT),
            (&after, Type::UUID),
            (&ROWS, Type::INT8),
        ];
        let page = session.query(&next, values).await?;
        for row in &page {
            after = get(row, "request_id")?;
            events.take_lost(Some(after), faults).await?;
            let (mut history, mut count) = (History::default(), 0);
            while events.peek().await? == Some(after)
                && let Some(event) = events.take()?
            {
                count += 1;
                if event.number != count {
                    history.break_off(event.number);
                }
                history.add(&event);
            }
            if let Some(fault) = fault(row, &history, count)? {
                faults.add(of_action(after, tenant, &fault));
            }
        }
        if rows::number(page.len()) < ROWS {
            break;
        }
        comparison = ">";
    }
    events.take_lost(None, faults).await
}

fn of_action(action: Uuid, tenant: &str, fault: &str) -> String {
    format!("the action with the id {action}, of tenant {tenant}: {fault}")
}

/// Returns what is wrong with an action that has so many events.
fn fault(row: &Row, history: &History, count: i64) -> Result<Option<String>, StoreError> {
    if get(row, "is_removed")? {
        let has_events = count > 0;
        return Ok(
            has_events.then(|| "retention removed it, and events of it are on record".to_owned())
        );
    }
    let shown = Shown {
        tenant: get(row, "tenant_id")?,
        status: get(row, "status")?,
        decision: get(row, "decision")?,
        execution: get(row, "execution")?,
        closed: get(row, "closed")?,
        created_at: Some(get::<Micros>(row, "created_at")?.0),
        decided_at: get::<Option<Micros>>(row, "decided_at")?.map(|at| at.0),
        call_id: get(row, "call_id")?,
        submitted_by: get(row, "submitted_by")?,
        decided_by: get(row, "decided_by")?,
        digest: get(row, "digest")?,
        edited_digest: get(row, "edited_digest")?,
    };
    let is_counted = i64::from(get::<i32>(row, "events")?) == count;
    let fault = history.fault(&shown);
    Ok(fault
        .or_else(|| (!is_counted).then(|| "its events is not the number of its events".to_owned())))
}

/// Reads an event. Names stay in the form of the database, as those of the action do.
fn event(row: &Row) -> Result<Event, StoreError> {
    Ok(Event {
        number: get::<i32>(row, "number")?.into(),
        at: get::<Micros>(row, "at")?.0,
        kind: get(row, "kind")?,
        from: get(row, "from_status")?,
        to: get(row, "to_status")?,
        decision: get(row, "decision")?,
        execution: get(row, "execution")?,
        call_id: get(row, "call_id")?,
        actor: get(row, "actor")?,
        tenant: get(row, "tenant_id")?,
        digest: get(row, "digest")?,
    })
}
