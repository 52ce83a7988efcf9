//! The schema: how it is made, and how it gets from one version to the next.

use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::fault::{Fault, of_database};
use super::rows::get;
use super::session::{Pool, Session};
use super::wall::Scope;
use crate::store::StoreError;

/// Each entry takes the schema to the next version, from version 0 on. A released entry never
/// changes, and servers of the release before must be able to work beside it.
const MIGRATIONS: [&str; 9] = [
    include_str!("schema/1.sql"),
    include_str!("schema/2.sql"),
    include_str!("schema/3.sql"),
    include_str!("schema/4.sql"),
    include_str!("schema/5.sql"),
    include_str!("schema/6.sql"),
    include_str!("schema/7.sql"),
    include_str!("schema/8.sql"),
    include_str!("schema/9.sql"),
];

/// The version that the last entry leads to.
const CURRENT: usize = MIGRATIONS.len();

/// The least version of PostgreSQL, as the server numbers it.
const LEAST: i32 = 140_000;

/// What keeps two servers from migrating at once. Any number that nobody else uses does.
const LOCK: &str = "SELECT pg_advisory_xact_lock(4702394921426175817)";

/// Checks that the server can keep this store.
pub(super) async fn check(pool: &Pool, place: &str) -> Result<(), Fault> {
    let session = Session::open(pool, Scope::Nobody).await?;
    let refused = |detail: String| Err(Fault::Refused(StoreError::incompatible(detail)));
    // First of all, as what is asked next may not be there in another one.
    let found = session
        .query(
            "SELECT current_setting('server_version_num')::int AS number, current_setting('server_version') AS version, \
             version() AS product",
            &[],
        )
        .await?;
    let row = only(&found)?;
    let (version, product): (&str, &str) = (get(row, "version")?, get(row, "product")?);
    if let Some(product) = other_product(product) {
        return refused(format!(
            "the database at {place} is {product}; allowed is PostgreSQL 14 and later"
        ));
    }
    if get::<i32>(row, "number")? < LEAST {
        return refused(format!(
            "PostgreSQL at {place} has version {version}; allowed is 14 and later"
        ));
    }
    let found = session
        .query(
            "SELECT current_setting('server_encoding') AS encoding, current_setting('synchronous_commit') AS commits, \
             current_setting('fsync') AS fsync, \
             current_setting('log_parameter_max_length_on_error') <> '0' \
             OR current_setting('log_parameter_max_length') <> '0' \
             AND (current_setting('log_statement') IN ('mod', 'all') OR current_setting('log_duration') = 'on' \
             OR current_setting('log_min_duration_statement') <> '-1' \
             OR current_setting('log_min_duration_sample') <> '-1' \
             OR current_setting('log_transaction_sample_rate') <> '0') AS logs_values",
            &[],
        )
        .await?;
    let row = only(&found)?;
    let encoding: &str = get(row, "encoding")?;
    if encoding != "UTF8" {
        return refused(format!(
            "the database at {place} has the encoding {encoding}; allowed is UTF8"
        ));
    }
    if get::<&str>(row, "fsync")? != "on" {
        tracing::warn!(
            "PostgreSQL at {place} runs with fsync=off: a crash loses decisions, and may spoil the database"
        );
    }
    if get(row, "logs_values")? {
        tracing::warn!(
            "PostgreSQL at {place} logs the parameters of statements, which have keys and payloads; \
             log_parameter_max_length = 0 and log_parameter_max_length_on_error = 0 keep them out"
        );
    }
    if get::<&str>(row, "commits")? == "off" {
        tracing::warn!(
            "PostgreSQL at {place} has synchronous_commit=off; the store's own transactions wait for the disk"
        );
    }
    let mut session = session;
    session.release();
    Ok(())
}

/// The product that a database says it is, unless that is PostgreSQL. Some speak its protocol, and say
/// that they are of a version of it. One even says that it is PostgreSQL.
fn other_product(version: &str) -> Option<String> {
    let number = version.split(' ').nth(1).unwrap_or_default();
    match number.split_once("-YB-") {
        Some((_, number)) => Some(format!("YugabyteDB {number}")),
        None if version.starts_with("PostgreSQL ") => None,
        None => version.split(" (").next().map(str::to_owned),
    }
}

fn only(found: &[Row]) -> Result<&Row, Fault> {
    found
        .first()
        .ok_or_else(|| Fault::again("the database has no settings"))
}

/// Takes the schema to the current version, or only checks that it is there.
pub(super) async fn migrate(pool: &Pool, place: &str, allowed: bool) -> Result<(), Fault> {
    if version(pool, place).await? == CURRENT {
        return Ok(());
    }
    if !allowed {
        let found = version(pool, place).await?;
        return Err(Fault::Refused(StoreError::incompatible(format!(
            "the database at {place} has schema version {found}; this release needs version {CURRENT}, and may not make it \
             (--no-migrate)"
        ))));
    }
    let session = Session::open(pool, Scope::Nobody).await?;
    session.begin().await?;
    session
        .run("SET LOCAL lock_timeout = '60s'; SET LOCAL statement_timeout = 0")
        .await?;
    session.run(LOCK).await?;
    let migrated = async {
        session
            .run(
                "CREATE TABLE IF NOT EXISTS aegis_schema (version integer PRIMARY KEY, \
                 made_by text NOT NULL, made_at timestamptz NOT NULL DEFAULT clock_timestamp())",
            )
            .await?;
        // Another server may have been first.
        let found = read(&session).await?;
        known(found, place)?;
        for (version, step) in (1..).zip(MIGRATIONS).skip(found) {
            session.run(step).await?;
            session
                .execute(
                    "INSERT INTO aegis_schema (version, made_by) VALUES ($1, $2)",
                    &[
                        (&version, Type::INT4),
                        (&env!("CARGO_PKG_VERSION"), Type::TEXT),
                    ],
                )
                .await?;
            tracing::info!(version, "the schema is migrated");
        }
        Ok(())
    };
    migrated
        .await
        .map_err(|fault: Fault| explain(fault, place))?;
    session.finish().await
}

/// Checks that the schema is the current one, for those who only read.
pub(super) async fn current(pool: &Pool, place: &str) -> Result<(), Fault> {
    let detail = match version(pool, place).await? {
        CURRENT => return Ok(()),
        0 => format!("the database at {place} is empty; allowed is one that aegis made"),
        older => format!(
            "the database at {place} has the older schema version {older}, which the next 'aegis serve' brings up to date"
        ),
    };
    Err(Fault::Refused(StoreError::incompatible(detail)))
}

/// Reads the version of the schema; 0 if there is none.
async fn version(pool: &Pool, place: &str) -> Result<usize, Fault> {
    let session = Session::open(pool, Scope::Nobody).await?;
    let is_there = session
        .query(
            "SELECT to_regclass('aegis_schema') IS NOT NULL AS is_there",
            &[],
        )
        .await?;
    let is_there = is_there
        .first()
        .map(|row| get(row, "is_there"))
        .transpose()?;
    let found = match is_there {
        Some(true) => read(&session)
            .await
            .map_err(|fault| explain(fault, place))?,
        _ => 0,
    };
    let mut session = session;
    session.release();
    known(found, place)?;
    Ok(found)
}

async fn read(session: &Session) -> Result<usize, Fault> {
    let found = session
        .query(
            "SELECT coalesce(max(version), 0) AS version FROM aegis_schema",
            &[],
        )
        .await?;
    let version: i32 = found
        .first()
        .map(|row| get(row, "version"))
        .transpose()?
        .unwrap_or(0);
    Ok(usize::try_from(version).unwrap_or(usize::MAX))
}

fn known(found: usize, place: &str) -> Result<(), Fault> {
    if found <= CURRENT {
        return Ok(());
    }
    Err(Fault::Refused(StoreError::incompatible(format!(
        "the database at {place} has schema version {found}, of a newer release; this release reads versions 1 to {CURRENT}"
    ))))
}

/// Says which right is missing.
pub(super) fn explain(fault: Fault, place: &str) -> Fault {
    let error = fault.into_error();
    let database = of_database(&error).and_then(tokio_postgres::Error::as_db_error);
    Fault::Refused(match database {
        Some(refusal) if *refusal.code() == SqlState::INSUFFICIENT_PRIVILEGE => {
            StoreError::incompatible(format!(
                "the user may not make the tables in the database at {place} ({}); allowed is a user with CREATE on the schema, \
             such as the owner of the database",
                refusal.message()
            ))
        }
        Some(refusal) => StoreError::incompatible(format!(
            "the schema of the database at {place} cannot be made: {}",
            refusal.message()
        ))
        .with_source(error.clone()),
        None => error,
    })
}
