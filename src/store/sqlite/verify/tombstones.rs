//! What stayed of actions that were removed: whether a key could be decided twice.

use rusqlite::Connection;

use crate::store::audit::Faults;

/// Statements that find what must not be, each with what it is.
const FAULTS: [(&str, &str); 6] = [
    (
        "SELECT hex(identity) FROM tombstone JOIN action USING (identity)",
        "its action is on record as well",
    ),
    (
        "SELECT hex(identity) FROM tombstone WHERE request_id IN (SELECT request_id FROM action) \
         OR request_id IN (SELECT request_id FROM tombstone GROUP BY request_id HAVING count(*) > 1)",
        "another action has its id",
    ),
    (
        "SELECT hex(identity) FROM tombstone WHERE decided_at < created_at",
        "it was decided before it came on record",
    ),
    (
        "SELECT tombstones FROM sweep WHERE tombstones <> (SELECT count(*) FROM tombstone)",
        "there are not as many tombstones as actions that were removed",
    ),
    (
        "SELECT position FROM sweep WHERE position > (SELECT coalesce(max(seq), 0) FROM event)",
        "the sweeps have come further than the events",
    ),
    (
        "SELECT seq FROM swept JOIN event ON event.seq = swept.event",
        "an event that a sweep removed is on record",
    ),
];

pub(super) fn check(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    for (sql, fault) in FAULTS {
        let mut check = connection.prepare(sql)?;
        let mut wrong = check.query([])?;
        while let Some(row) = wrong.next()? {
            match row.get_ref(0)?.as_str() {
                Ok(identity) => faults.add(format!("tombstone {identity}: {fault}")),
                Err(_) => faults.add(fault.to_owned()),
            }
        }
    }
    Ok(())
}
