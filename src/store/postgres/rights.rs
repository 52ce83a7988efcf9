//! The rights that a server needs, which the manual grants to the least role.

use tokio_postgres::types::Type;

use super::fault::Fault;
use super::rows::get;
use super::session::{Pool, Session};
use super::wall::Scope;
use crate::store::StoreError;

/// What the statements of this store do with each table, but for those of retention.
const RIGHTS: [(&str, &[&str]); 15] = [
    ("aegis_schema", &["SELECT"]),
    ("cluster", &["SELECT"]),
    ("import", &["SELECT"]),
    ("tombstone", &["SELECT"]),
    ("action", &["SELECT", "INSERT", "UPDATE"]),
    ("claim", &["SELECT", "INSERT", "UPDATE"]),
    ("event", &["SELECT", "INSERT"]),
    ("feed", &["SELECT", "INSERT"]),
    ("chain", &["SELECT", "INSERT"]),
    ("chainer", &["SELECT", "UPDATE"]),
    ("publisher", &["SELECT", "UPDATE"]),
    ("endpoint", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("undelivered", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("heartbeat", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("sweep", &["SELECT"]),
];

/// Checks that the user has every right on the tables that are there, and names those that are missing.
pub(super) async fn check(pool: &Pool, place: &str) -> Result<(), Fault> {
    const MISSING: &str = "SELECT 'USAGE' AS verb, 'the schema' AS name, 0 AS number WHERE current_schema() IS NULL \
         UNION ALL SELECT r.verb, 'the table ' || r.name, r.number \
         FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS r (name, verb, number) \
         WHERE NOT has_table_privilege(to_regclass(r.name), r.verb) \
         UNION ALL SELECT 'EXECUTE', 'the function ' || p.proname, 99 FROM pg_proc p \
         WHERE p.proname = 'aegis_insert' AND pg_function_is_visible(p.oid) \
         AND NOT has_function_privilege(p.oid, 'EXECUTE') ORDER BY number";
    let pairs = RIGHTS
        .iter()
        .flat_map(|(table, verbs)| verbs.iter().map(|verb| (*table, *verb)));
    let (tables, verbs): (Vec<&str>, Vec<&str>) = pairs.unzip();
    let session = Session::open(pool, Scope::Nobody).await?;
    let missing = session
        .query(
            MISSING,
            &[(&tables, Type::TEXT_ARRAY), (&verbs, Type::TEXT_ARRAY)],
        )
        .await?;
    let missing = missing
        .iter()
        .map(|row| {
            Ok(format!(
                "{} on {}",
                get::<&str>(row, "verb")?,
                get::<&str>(row, "name")?
            ))
        })
        .collect::<Result<Vec<_>, StoreError>>()?;
    let mut session = session;
    session.release();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Fault::Refused(StoreError::incompatible(format!(
        "the user lacks {} in the database at {place}; allowed is a user with all rights that the manual lists in 'The least \
         role' of 'scaling'",
        missing.join(", ")
    ))))
}
