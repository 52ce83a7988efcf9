//! The audit trails in a database, of either kind, beside the servers that use it.

use std::path::PathBuf;

use aegis_hitl::store::{
    AuditHead, AuditPage, AuditReport, AuditTrail, PostgresAuditTrail, StoreError,
};

use crate::failure::Failure;
use crate::store::Place;

#[derive(Debug)]
pub(crate) enum Trail {
    File(AuditTrail),
    Postgres(PostgresAuditTrail),
}

impl Trail {
    /// Opens the trails that are there. Nothing is made or migrated.
    pub(crate) async fn open(path: PathBuf) -> Result<Self, Failure> {
        let opened = match Place::new(path, None, true)? {
            Place::File(path) => AuditTrail::open(path).map(Self::File),
            Place::Postgres(builder) => builder.audit_trail().await.map(Self::Postgres),
        };
        opened.map_err(unread)
    }

    pub(crate) async fn tenants(&self) -> Result<Vec<String>, Failure> {
        match self {
            Self::File(trail) => trail.tenants(),
            Self::Postgres(trail) => trail.tenants().await,
        }
        .map_err(unread)
    }

    pub(crate) async fn head(&self, tenant: &str) -> Result<AuditHead, Failure> {
        match self {
            Self::File(trail) => trail.head(tenant),
            Self::Postgres(trail) => trail.head(tenant).await,
        }
        .map_err(unread)
    }

    pub(crate) async fn first_line(
        &self,
        tenant: &str,
        after: u64,
    ) -> Result<Option<String>, Failure> {
        match self {
            Self::File(trail) => trail.first_line(tenant, after),
            Self::Postgres(trail) => trail.first_line(tenant, after).await,
        }
        .map_err(unread)
    }

    pub(crate) async fn page(
        &self,
        tenant: &str,
        after: u64,
        to: u64,
        limit: usize,
    ) -> Result<Option<AuditPage>, Failure> {
        match self {
            Self::File(trail) => trail.page(tenant, after, to, limit),
            Self::Postgres(trail) => trail.page(tenant, after, to, limit).await,
        }
        .map_err(unread)
    }

    pub(crate) async fn verify(&self, tenant: Option<&str>) -> Result<AuditReport, Failure> {
        match self {
            Self::File(trail) => trail.verify(tenant),
            Self::Postgres(trail) => trail.verify(tenant).await,
        }
        .map_err(unread)
    }

    pub(crate) async fn has_hash(
        &self,
        tenant: Option<&str>,
        hash: &[u8; 32],
    ) -> Result<bool, Failure> {
        match self {
            Self::File(trail) => trail.has_hash(tenant, hash),
            Self::Postgres(trail) => trail.has_hash(tenant, hash).await,
        }
        .map_err(unread)
    }
}

fn unread(error: StoreError) -> Failure {
    Failure::other("the audit trail was not read").because(error)
}
