//! What a database holds, read beside the server that has it.

use std::path::Path;

use rusqlite::{Connection, OpenFlags};

use super::HANG;

/// Opens a database to look at it, beside the server that has it.
pub fn look_at(database: &Path) -> Connection {
    let connection =
        Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    connection.busy_timeout(HANG).unwrap();
    connection
}

/// Decisions and events, as of one moment.
pub fn counts(database: &Connection) -> [u64; 2] {
    let sql = "SELECT (SELECT count(decision) FROM action), (SELECT count(*) FROM event)";
    let count = |row: &rusqlite::Row<'_>, at| row.get::<_, i64>(at).map(i64::unsigned_abs);
    let counts = database.query_row(sql, [], |row| Ok([count(row, 0)?, count(row, 1)?]));
    counts.unwrap()
}

/// What SQLite says of the file: `ok` if it is sound.
pub fn integrity(database: &Connection) -> String {
    database
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap()
}

/// Changes the row of a key behind the store's back.
pub fn edit(database: &Path, change: &str, key: &str) {
    let connection =
        Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_WRITE).unwrap();
    connection.busy_timeout(HANG).unwrap();
    let sql = format!("UPDATE action SET {change} WHERE idempotency_key = ?1");
    assert_eq!(connection.execute(&sql, [key]).unwrap(), 1);
}
