//! The links of a tenant, in order.

use std::collections::VecDeque;

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use crate::store::audit::{Hash, link, links, origin};
use crate::store::postgres::chain;
use crate::store::postgres::fault::Fault;
use crate::store::postgres::rows::{self, get};
use crate::store::postgres::session::Session;

/// The most rows of the chain that are read at once: 3 MB, if all of them are full.
pub(super) const RUNS: i64 = 64;

/// Reads the next runs behind a link.
pub(super) async fn runs(session: &Session, tenant: &str, after: i64) -> Result<Vec<Row>, Fault> {
    const NEXT: &str = "SELECT position, seq, links, hash FROM chain WHERE tenant_id = $1 \
                        AND seq > $2 ORDER BY seq LIMIT $3";
    let values = &[
        (&tenant as _, Type::TEXT),
        (&after as _, Type::INT8),
        (&RUNS as _, Type::INT8),
    ];
    session.query(NEXT, values).await
}

/// A link of a tenant's chain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    pub(super) seq: u64,
    pub(super) position: i64,
    pub(super) leaf: Hash,
    pub(super) hash: Hash,
}

/// The links of a tenant in order.
pub(super) struct Links<'a> {
    session: &'a Session,
    tenant: &'a str,
    /// The last link that was given.
    pub(super) seq: u64,
    pub(super) hash: Hash,
    /// The number that the last row has that was read.
    read: i64,
    ready: VecDeque<(i64, Hash)>,
}

impl<'a> Links<'a> {
    pub(super) fn all(session: &'a Session, tenant: &'a str) -> Self {
        Self {
            session,
            tenant,
            seq: 0,
            hash: origin(tenant),
            read: i64::MIN,
            ready: VecDeque::new(),
        }
    }

    /// Begins behind the run that ends at a link or in front of it.
    pub(super) async fn before(
        session: &'a Session,
        tenant: &'a str,
        seq: u64,
    ) -> Result<Self, Fault> {
        const BEFORE: &str = "SELECT seq, hash FROM chain WHERE tenant_id = $1 AND seq <= $2 \
                              ORDER BY seq DESC LIMIT 1";
        let mut links = Self::all(session, tenant);
        let seq = rows::number(seq);
        let values = &[(&tenant as _, Type::TEXT), (&seq as _, Type::INT8)];
        if let Some(row) = session.query(BEFORE, values).await?.first() {
            links.read = get(row, "seq")?;
            (links.seq, links.hash) = (rows::count(row, "seq")?, chain::hash(row)?);
        }
        Ok(links)
    }

    pub(super) async fn next(&mut self) -> Result<Option<Link>, Fault> {
        if self.ready.is_empty() {
            for run in runs(self.session, self.tenant, self.read).await? {
                self.read = get(&run, "seq")?;
                self.ready.extend(links(get(&run, "links")?));
            }
        }
        let Some((position, leaf)) = self.ready.pop_front() else {
            return Ok(None);
        };
        self.seq += 1;
        self.hash = link(&self.hash, &leaf);
        Ok(Some(Link {
            seq: self.seq,
            position,
            leaf,
            hash: self.hash,
        }))
    }
}
