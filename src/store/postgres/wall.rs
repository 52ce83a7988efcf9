//! The second wall between tenants: row-level security.
//!
//! Each statement names its tenant. Where an operator has enabled the policies of the schema, one
//! that forgot it shows and writes nothing of another tenant, because the database compares each row
//! with the tenants that the transaction is about. Where a transaction does not say which these are,
//! its statements fail.
//!
//! Saying it costs a read a quarter more, so a server does not while the wall does not stand
//! for its user. When it is put up meanwhile, the first statement that fails tells, and is run again.

use std::borrow::Cow;
use std::slice;

use tokio_postgres::types::Type;

use super::fault::Fault;
use super::rows::get;
use super::session::{Pool, Session};
use crate::protocol::TenantId;
use crate::store::StoreError;

/// The tables with a policy.
const WALLED: [&str; 5] = ["action", "claim", "event", "feed", "chain"];

/// The tenants whose rows a transaction may see and write.
#[derive(Debug, Clone, Copy)]
pub(super) enum Scope<'a> {
    /// No table with a policy is touched.
    Nobody,
    Only(&'a [&'a TenantId]),
    /// For work on what all tenants have on record.
    All,
}

impl<'a> Scope<'a> {
    /// That of one tenant, or of all without one.
    pub(super) fn of(tenant: &'a Option<&'a TenantId>) -> Self {
        match tenant {
            Some(tenant) => Self::Only(slice::from_ref(tenant)),
            None => Self::All,
        }
    }

    /// The statement that lets a transaction through the wall, until it ends.
    pub(super) fn statement(self) -> Option<Cow<'static, str>> {
        match self {
            Self::Nobody => None,
            Self::All => Some("SET LOCAL aegis.tenants = '*'".into()),
            Self::Only(tenants) => Some(only(tenants).into()),
        }
    }
}

/// A `SELECT` costs some 15 us more than `SET`. But `pg_stat_statements` takes each text of a `SET`
/// for a statement of its own, and there may be many tenants.
fn only(tenants: &[&TenantId]) -> String {
    let mut sql = String::from("SELECT set_config('aegis.tenants', E'{");
    for (index, tenant) in tenants.iter().enumerate() {
        sql.push_str(if index == 0 { "\"" } else { ",\"" });
        for character in tenant.as_str().chars() {
            match character {
                // Once for the array, and each of these once for the string: in one with an E they
                // mean the same whatever `standard_conforming_strings` is.
                '\\' => sql.push_str(r"\\\\"),
                '"' => sql.push_str(r#"\\""#),
                '\'' => sql.push_str("''"),
                other => sql.push(other),
            }
        }
        sql.push('"');
    }
    sql.push_str("}', true)");
    sql
}

/// Looks whether the wall stands for the user of these connections, and logs it.
pub(super) async fn look(pool: &Pool, place: &str) -> Result<(), Fault> {
    const MISSING: &str = "SELECT w.name FROM unnest($1::text[]) WITH ORDINALITY AS w (name, number) \
         WHERE NOT row_security_active(w.name) ORDER BY w.number";
    let tables = &WALLED[..];
    let mut session = Session::open(pool, Scope::Nobody).await?;
    let missing = session
        .query(MISSING, &[(&tables, Type::TEXT_ARRAY)])
        .await?;
    session.release();
    let missing = missing
        .iter()
        .map(|row| get::<&str>(row, "name"))
        .collect::<Result<Vec<_>, StoreError>>()?;
    let state = &pool.manager().state;
    state.set_walled(missing.len() < WALLED.len());
    if missing.is_empty() {
        tracing::info!("row-level security walls tenants off from each other at {place}");
    } else if !state.is_walled() {
        tracing::info!(
            "row-level security is not enabled for this user at {place}: see 'The least role' of 'scaling' in the manual"
        );
    } else {
        tracing::warn!(
            "row-level security is not enabled for this user at {place} on the tables {}",
            missing.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
