//! The tables of the database that is moved into, and where their rows come from.

use super::line::Kind::{self, Bytes, Call, Flag, Free, Id, Number, Text, Time};
use crate::protocol::Escaped;

/// A table of the target. Its rows are read in the order of its key on both sides.
#[derive(Debug)]
pub(in crate::store) struct Table {
    pub(in crate::store) name: &'static str,
    /// The columns, the key first.
    pub(in crate::store) columns: &'static [(&'static str, Kind)],
    /// How many of them are the key.
    pub(in crate::store) key: usize,
    /// Selects the columns in the embedded database, in the order of the key.
    pub(in crate::store) rows: &'static str,
    /// Counts the rows there by another way, so that none is left out.
    pub(in crate::store) count: &'static str,
}

impl Table {
    /// The names of the columns, separated by commas.
    pub(in crate::store) fn names(&self) -> String {
        names(self.columns)
    }

    /// The names of the columns of the key.
    pub(in crate::store) fn order(&self) -> String {
        names(self.columns.get(..self.key).unwrap_or_default())
    }

    /// The key in a line of the table, for people.
    pub(in crate::store) fn key_of(&self, line: &[u8]) -> String {
        let columns = line.split(|byte| *byte == b'\t' || *byte == b'\n');
        let key: Vec<_> = columns
            .take(self.key)
            .map(String::from_utf8_lossy)
            .collect();
        Escaped::line(&key.join(" ")).to_string()
    }
}

fn names(columns: &[(&'static str, Kind)]) -> String {
    let names: Vec<_> = columns.iter().map(|(name, _)| *name).collect();
    names.join(", ")
}

/// The number of an event within its action, and what joins both in the order of actions.
macro_rules! numbered {
    () => {
        "(SELECT count(*) FROM event p WHERE p.action = e.action AND p.seq <= e.seq)"
    };
}

/// All tables, in the order in which they are filled. Their numbers are on record while a move
/// lasts.
pub(in crate::store) const TABLES: &[Table] = &[
    Table {
        name: "action",
        columns: &[
            ("request_id", Id),
            ("tenant_id", Text),
            ("thread_id", Text),
            ("idempotency_key", Text),
            ("status", Text),
            ("decision", Text),
            ("execution", Text),
            ("closed", Text),
            ("digest", Bytes),
            ("payload", Text),
            ("edited_digest", Bytes),
            ("edited_payload", Text),
            ("comment", Free),
            ("title", Free),
            ("expires_at", Time),
            ("allow_edit", Flag),
            ("submitted_by", Free),
            ("decided_by", Free),
            ("result", Text),
            ("reason", Free),
            ("call_id", Call),
            ("created_at", Time),
            ("decided_at", Time),
            ("events", Number),
        ],
        key: 1,
        rows: "SELECT request_id, tenant_id, thread_id, idempotency_key, status, decision, execution, closed, digest, \
               payload, edited_digest, edited_payload, comment, title, expires_at, allow_edit, submitted_by, \
               decided_by, result, reason, call_id, created_at, decided_at, \
               (SELECT count(*) FROM event e WHERE e.action = a.id) FROM action a ORDER BY request_id",
        count: "SELECT count(*) FROM action",
    },
    Table {
        name: "claim",
        columns: &[
            ("request_id", Id),
            ("tenant_id", Text),
            ("token", Id),
            ("fence", Number),
            ("until", Time),
            ("actor", Free),
            ("call_id", Call),
        ],
        key: 1,
        // CROSS JOIN keeps the order of the tables, so that nothing has to be sorted.
        rows: "SELECT a.request_id, a.tenant_id, c.token, c.fence, c.until, c.actor, c.call_id \
               FROM action a CROSS JOIN claim c ON c.action = a.id ORDER BY a.request_id",
        count: "SELECT count(*) FROM claim",
    },
    Table {
        name: "event",
        columns: &[
            ("request_id", Id),
            ("number", Number),
            ("tenant_id", Text),
            ("at", Time),
            ("event_id", Id),
            ("actor", Free),
            ("kind", Text),
            ("from_status", Text),
            ("to_status", Text),
            ("decision", Text),
            ("execution", Text),
            ("call_id", Call),
            ("digest", Bytes),
            // No pass of whoever publishes looks at this epoch: these events have their positions.
            ("epoch", Number),
        ],
        key: 2,
        rows: concat!(
            "SELECT a.request_id, ",
            numbered!(),
            ", a.tenant_id, e.at, e.event_id, e.actor, e.kind, e.from_status, \
             e.to_status, e.decision, e.execution, e.call_id, \
             CASE e.digest WHEN x'' THEN a.digest ELSE e.digest END, 0 \
             FROM action a CROSS JOIN event e ON e.action = a.id ORDER BY a.request_id, e.seq"
        ),
        count: "SELECT count(*) FROM event",
    },
    Table {
        name: "feed",
        columns: &[
            ("position", Number),
            ("tenant_id", Text),
            ("request_id", Id),
            ("number", Number),
            ("at", Time),
            ("event_id", Id),
        ],
        key: 1,
        rows: concat!(
            "SELECT e.seq, a.tenant_id, a.request_id, ",
            numbered!(),
            ", e.at, e.event_id \
             FROM event e CROSS JOIN action a ON a.id = e.action ORDER BY e.seq"
        ),
        count: "SELECT count(*) FROM event",
    },
    Table {
        name: "endpoint",
        columns: &[
            ("name", Text),
            ("position", Number),
            ("stopped_at", Time),
            ("left_at", Time),
        ],
        key: 1,
        rows: "SELECT name, position, stopped_at, left_at FROM endpoint ORDER BY name",
        count: "SELECT count(*) FROM endpoint",
    },
    Table {
        name: "undelivered",
        columns: &[
            ("endpoint", Text),
            ("position", Number),
            ("tenant_id", Text),
            ("request_id", Id),
            ("parked_at", Time),
            ("attempts", Number),
            ("due", Time),
            ("given_up_at", Time),
            ("failure", Free),
        ],
        key: 2,
        rows: "SELECT n.name, u.event, a.tenant_id, a.request_id, u.parked_at, u.attempts, u.due, u.given_up_at, \
               u.failure FROM endpoint n CROSS JOIN undelivered u ON u.endpoint = n.id \
               CROSS JOIN event e ON e.seq = u.event CROSS JOIN action a ON a.id = e.action \
               ORDER BY n.name, u.event",
        count: "SELECT count(*) FROM undelivered",
    },
    Table {
        name: "tombstone",
        columns: &[
            ("identity", Bytes),
            ("request_id", Id),
            ("decision", Text),
            ("execution", Text),
            ("closed", Text),
            ("digest", Bytes),
            ("edited_digest", Bytes),
            ("created_at", Time),
            ("decided_at", Time),
        ],
        key: 1,
        rows: "SELECT identity, request_id, decision, execution, closed, digest, edited_digest, created_at, decided_at \
               FROM tombstone ORDER BY identity",
        count: "SELECT count(*) FROM tombstone",
    },
    Table {
        name: "swept",
        columns: &[("position", Number)],
        key: 1,
        rows: "SELECT event FROM swept ORDER BY event",
        count: "SELECT count(*) FROM swept",
    },
    Table {
        name: "postponed",
        columns: &[("until", Time), ("position", Number)],
        key: 2,
        rows: "SELECT until, event FROM postponed ORDER BY until, event",
        count: "SELECT count(*) FROM postponed",
    },
    Table {
        name: "chain",
        columns: &[
            ("tenant_id", Text),
            ("seq", Number),
            ("position", Number),
            ("links", Bytes),
            ("hash", Bytes),
        ],
        key: 2,
        rows: "SELECT tenant_id, seq, event, links, hash FROM chain ORDER BY tenant_id, seq",
        count: "SELECT count(*) FROM chain",
    },
];

/// How far sweeps have come.
pub(in crate::store) const SWEPT: &str = "SELECT coalesce(max(position), 0) FROM sweep";

/// The months of which there are events, such as `2026-11`: each gets a partition. Months by a clock
/// that was wrong by centuries do not.
pub(in crate::store) const MONTHS: &str = "SELECT DISTINCT strftime('%Y-%m', at / 1000000, 'unixepoch') FROM event \
     WHERE at >= 0 AND at < 4102444800000000 ORDER BY 1 DESC LIMIT 240";
