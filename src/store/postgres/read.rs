//! Reads.

use std::time::{Duration, SystemTime};

use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::Inner;
use super::fault::Fault;
use super::load;
use super::loaded::Key;
use super::rows::{self, EVENT, columns, get};
use super::session::{Session, Values};
use super::wall::Scope;
use crate::protocol::{Action, Event, TenantId, ThreadId};
use crate::store::operation::{Cursor, List, Order, Page};
use crate::store::{Backlog, StoreError, Totals};

/// How long a read is tried.
const DEADLINE: Duration = Duration::from_secs(10);

/// Selects an action by the store's id.
const BY_ID: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM action a WHERE a.request_id = $1 AND a.removed_at IS NULL"
);

impl Inner {
    /// Runs one statement that reads. What it shows is durable.
    pub(super) async fn read(
        &self,
        scope: Scope<'_>,
        sql: &str,
        values: &Values<'_>,
    ) -> Result<Vec<Row>, StoreError> {
        let reading = async {
            let mut attempts = 0;
            loop {
                match self.read_once(scope, sql, values).await {
                    Ok(Some(rows)) => return Ok(rows),
                    // This says nothing of the next time, so it is no attempt.
                    Ok(None) => {}
                    Err(Fault::Refused(error)) => return Err(error),
                    // One connection may have been lost long ago.
                    Err(fault) if attempts == 2 => return Err(fault.into_error()),
                    Err(_) => attempts += 1,
                }
            }
        };
        let read = tokio::time::timeout(DEADLINE, reading).await;
        read.unwrap_or_else(|_| {
            Err(StoreError::unavailable(
                "the database did not answer in time",
            ))
        })
    }

    /// Reads, unless something happened meanwhile after which what was read may not be durable: a
    /// commit is unknown, or a connection was made, which may lead to another server.
    async fn read_once(
        &self,
        scope: Scope<'_>,
        sql: &str,
        values: &Values<'_>,
    ) -> Result<Option<Vec<Row>>, Fault> {
        let mut session = Session::open(&self.pool, scope).await?;
        // A row may be visible before it is durable: when the wait of its commit for a standby was cut
        // off, or after a failover. One durable write covers all that came before it in the log.
        while !self.state.is_sure() {
            self.beat(session).await?;
            session = Session::open(&self.pool, scope).await?;
        }
        let doubts = self.state.doubts();
        let rows = session.read(sql, values).await?;
        self.cover(session).await?;
        let is_durable = self.state.doubts() == doubts || self.state.is_sure();
        Ok(is_durable.then_some(rows))
    }

    /// Finds an action by its id, or else by a call that names exactly one.
    pub(super) async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        if let Some(action) = self.by_id(id, tenant).await? {
            return Ok(Some(action));
        }
        let (call, scope) = (id.to_string(), Scope::of(&tenant));
        let mut named = match tenant.map(TenantId::as_str) {
            Some(tenant) => {
                const NAMED: &str = "SELECT DISTINCT tenant_id, request_id FROM event \
                                     WHERE call_id = $1 AND tenant_id = $2 LIMIT 2";
                let values: &Values<'_> = &[(&call, Type::TEXT), (&tenant, Type::TEXT)];
                self.read(scope, NAMED, values).await?
            }
            None => {
                const NAMED: &str =
                    "SELECT DISTINCT tenant_id, request_id FROM event WHERE call_id = $1 LIMIT 2";
                self.read(scope, NAMED, &[(&call, Type::TEXT)]).await?
            }
        }
        .iter()
        .map(load::key)
        .collect::<Result<Vec<_>, _>>()?;
        if named.is_empty() {
            // Calls on record come first, so that no repeated call can hide them.
            named = self.repeated(id, tenant).await?;
        }
        match &named[..] {
            [(tenant, id)] => self.by_id(*id, Some(tenant)).await,
            _ => Ok(None),
        }
    }

    /// Finds up to two of the actions that a call named and did not change. What was removed since is
    /// not among them.
    async fn repeated(
        &self,
        call: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Vec<Key>, StoreError> {
        const THERE: &str = "SELECT a.tenant_id, a.request_id FROM action a \
             JOIN unnest($1::text[], $2::uuid[]) AS k (tenant_id, request_id) \
             ON a.tenant_id = k.tenant_id AND a.request_id = k.request_id \
             WHERE a.removed_at IS NULL LIMIT 2";
        let mut named = self.repeats.of(call);
        named.retain(|(of, _)| tenant.is_none_or(|tenant| of == tenant));
        if named.is_empty() {
            return Ok(named);
        }
        let keys = named.iter().map(|(tenant, id)| (tenant.as_str(), *id));
        let (tenants, ids): (Vec<_>, Vec<_>) = keys.unzip();
        let values: &Values<'_> = &[(&tenants, Type::TEXT_ARRAY), (&ids, Type::UUID_ARRAY)];
        let found = self.read(Scope::of(&tenant), THERE, values).await?;
        found.iter().map(load::key).collect()
    }

    async fn by_id(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        let scope = Scope::of(&tenant);
        let found = match tenant.map(TenantId::as_str) {
            Some(tenant) => {
                let sql = format!("{BY_ID} AND a.tenant_id = $2");
                let values: &Values<'_> = &[(&id, Type::UUID), (&tenant, Type::TEXT)];
                self.read(scope, &sql, values).await?
            }
            None => self.read(scope, BY_ID, &[(&id, Type::UUID)]).await?,
        };
        found.first().map(rows::action).transpose()
    }

    /// Reads an action with its history.
    pub(super) async fn with_history(
        &self,
        id: Uuid,
        tenant: &TenantId,
    ) -> Result<Option<Action>, StoreError> {
        // One statement, so that both are of one moment.
        let sql = format!(
            concat!(
                "SELECT ",
                columns!(),
                ", {} FROM action a JOIN event e ON e.tenant_id = a.tenant_id \
                 AND e.request_id = a.request_id AND e.at >= a.created_at \
                 WHERE a.tenant_id = $1 AND a.request_id = $2 AND a.removed_at IS NULL ORDER BY e.number"
            ),
            EVENT
        );
        let name = tenant.as_str();
        let values: &Values<'_> = &[(&name, Type::TEXT), (&id, Type::UUID)];
        let found = self.read(Scope::Only(&[tenant]), &sql, values).await?;
        let Some(first) = found.first() else {
            return Ok(None);
        };
        let mut action = rows::action(first)?;
        let history: Result<Vec<Event>, _> = found.iter().map(rows::event).collect();
        action.history = Some(history?);
        Ok(Some(action))
    }

    /// Reads a page of a list. The id of an action is its place.
    pub(super) async fn page(&self, list: &List) -> Result<Page, StoreError> {
        let (comparison, direction, first) = match list.order() {
            Order::OldestFirst => (">", "ASC", Uuid::nil()),
            Order::NewestFirst => ("<", "DESC", Uuid::max()),
        };
        let after = list
            .after
            .map_or(first, |cursor| Uuid::from_u128(cursor.position()));
        let states: Vec<_> = list.states().map(|state| state.number as i16).collect();
        let thread = list.thread_id.as_ref().map(ThreadId::as_str);
        // One more shows whether another page follows.
        let most = rows::number(list.limit).saturating_add(1);
        let tenant = list.tenant_id.as_str();
        // Each state is read in order from an index, so a page costs the same however many actions a
        // tenant has. Of a thread, the actions are picked out of its own.
        let of_thread = if thread.is_some() {
            "AND a.thread_id = $5"
        } else {
            "AND $5::text IS NULL"
        };
        let sql = format!(
            concat!(
                "SELECT ",
                columns!(listed),
                " FROM unnest($2::smallint[]) AS s (state) CROSS JOIN LATERAL ( \
                 SELECT * FROM action o WHERE o.tenant_id = $1 AND o.state = s.state AND o.request_id {} $3 \
                 AND o.removed_at IS NULL {} ORDER BY o.request_id {} LIMIT $4) AS a ORDER BY a.request_id {} LIMIT $4"
            ),
            comparison,
            of_thread.replace("a.thread_id", "o.thread_id"),
            direction,
            direction
        );
        let values: &Values<'_> = &[
            (&tenant, Type::TEXT),
            (&states, Type::INT2_ARRAY),
            (&after, Type::UUID),
            (&most, Type::INT8),
            (&thread, Type::TEXT),
        ];
        let scope = Scope::Only(&[&list.tenant_id]);
        let found = self.read(scope, &sql, values).await?;
        let has_more = found.len() > list.limit;
        let shown = found.iter().take(list.limit);
        let actions: Vec<Action> = shown.map(rows::listed).collect::<Result<_, _>>()?;
        let last = actions.last().filter(|_| has_more);
        let next = last.and_then(|action| action.request_id.as_uuid());
        Ok(Page {
            next: next.map(|id| Cursor::new(id.as_u128())),
            actions,
        })
    }

    /// Reads tenants in order. Each is one search of an index, however many actions it has.
    pub(super) async fn tenants_after(
        &self,
        after: Option<&TenantId>,
        limit: usize,
    ) -> Result<Vec<TenantId>, StoreError> {
        const NEXT: &str = "WITH RECURSIVE t AS ( \
               (SELECT tenant_id FROM action WHERE tenant_id > $1 AND removed_at IS NULL ORDER BY tenant_id LIMIT 1) \
               UNION ALL \
               SELECT (SELECT a.tenant_id FROM action a WHERE a.tenant_id > t.tenant_id \
               AND a.removed_at IS NULL ORDER BY a.tenant_id LIMIT 1) FROM t WHERE t.tenant_id IS NOT NULL \
             ) SELECT tenant_id FROM t WHERE tenant_id IS NOT NULL LIMIT $2";
        let (after, limit) = (after.map_or("", TenantId::as_str), rows::number(limit));
        let values: &Values<'_> = &[(&after, Type::TEXT), (&limit, Type::INT8)];
        let found = self.read(Scope::All, NEXT, values).await?;
        found
            .iter()
            .map(|row| rows::word(row, "tenant_id"))
            .collect()
    }

    /// Reads the events behind a position, of a tenant or of all.
    pub(super) async fn events_after(
        &self,
        tenant: Option<&TenantId>,
        after: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Event)>, StoreError> {
        self.publish().await?;
        let (after, limit) = (rows::number(after), rows::number(limit));
        let name = tenant.map(TenantId::as_str);
        let of_tenant = if tenant.is_some() {
            "f.tenant_id = $3"
        } else {
            "$3::text IS NULL"
        };
        let sql = events(&format!(
            "{of_tenant} AND f.position > $1 ORDER BY f.position LIMIT $2"
        ));
        let values: &Values<'_> = &[
            (&after, Type::INT8),
            (&limit, Type::INT8),
            (&name, Type::TEXT),
        ];
        let found = self.read(Scope::of(&tenant), &sql, values).await?;
        let events = found
            .iter()
            .map(|row| Ok((rows::count(row, "position")?, rows::shown_event(row)?)));
        events.collect()
    }

    pub(super) async fn waits(&self) -> Result<Backlog, StoreError> {
        const OLDEST: &str = "SELECT clock_timestamp() AS now, \
             (SELECT greatest(p.position - c.position, 0) FROM publisher p, chainer c) AS unchained, \
             (SELECT min(created_at) FROM action WHERE status = 'PENDING') AS pending, \
             (SELECT min(decided_at) FROM action WHERE status = 'COMMITTED' AND decision = 'approve' \
             AND execution IS NULL AND submitted_by IS NOT NULL) AS unclaimed, \
             (SELECT tombstones FROM sweep WHERE id = 1) AS tombstones";
        let found = self.read(Scope::All, OLDEST, &[]).await?;
        let Some(row) = found.first() else {
            return Ok(Backlog::default());
        };
        let now = self.state.set_time(get(row, "now")?);
        let age = |name: &str| -> Result<Option<Duration>, StoreError> {
            let begun: Option<SystemTime> = get(row, name)?;
            Ok(begun.map(|at| now.duration_since(at).unwrap_or_default()))
        };
        Ok(Backlog {
            pending: age("pending")?,
            unclaimed: age("unclaimed")?,
            tombstones: get::<Option<i64>>(row, "tombstones")?.map(i64::unsigned_abs),
            unchained: get::<Option<i64>>(row, "unchained")?.map(i64::unsigned_abs),
            ..Backlog::default()
        })
    }

    pub(super) async fn count_rows(&self) -> Result<Totals, StoreError> {
        const COUNTS: &str = "SELECT a.*, (SELECT count(*) FROM event) AS events FROM ( \
             SELECT count(*) FILTER (WHERE removed_at IS NULL) AS actions, \
             count(decision) FILTER (WHERE removed_at IS NULL) AS decisions, \
             count(removed_at) + (SELECT count(*) FROM tombstone) AS removed FROM action) AS a";
        let found = self.read(Scope::All, COUNTS, &[]).await?;
        let Some(row) = found.first() else {
            return Ok(Totals::default());
        };
        Ok(Totals {
            actions: rows::count(row, "actions")?,
            decisions: rows::count(row, "decisions")?,
            events: rows::count(row, "events")?,
            removed: rows::count(row, "removed")?,
        })
    }
}

/// Selects events of the feed `f` with their actions.
pub(super) fn events(rest: &str) -> String {
    format!(
        concat!(
            "SELECT f.position, {}, ",
            columns!(listed),
            " FROM feed f \
             JOIN event e ON e.tenant_id = f.tenant_id AND e.request_id = f.request_id AND e.number = f.number AND e.at = f.at \
             JOIN action a ON a.tenant_id = f.tenant_id AND a.request_id = f.request_id WHERE {}"
        ),
        EVENT, rest
    )
}
