//! The embedded store in a folder of its own, with a second hand on its rows.

use std::path::PathBuf;
use std::sync::Arc;

use super::forward_the_human_loop;
use aegis_hitl::store::{
    Decide, Decided, SqliteStore, Store, StoreError, Submit, Submitted, Totals, Watch, Watchers,
};
use aegis_hitl::{Action, TenantId};
use tempfile::TempDir;
use uuid::Uuid;

use super::rows::edit;

#[derive(Clone)]
pub struct Disk {
    store: SqliteStore,
    /// Where waits listen in place of the store's own watchers.
    deaf: Option<Watchers>,
    folder: Arc<TempDir>,
}

impl Default for Disk {
    fn default() -> Self {
        let folder = TempDir::new().unwrap();
        Self {
            store: SqliteStore::open(folder.path().join("aegis.db")).unwrap(),
            deaf: None,
            folder: Arc::new(folder),
        }
    }
}

impl Disk {
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("aegis.db")
    }

    /// The same records, whose decisions elsewhere wake nobody here.
    pub fn without_wake_ups(&self) -> Self {
        Self {
            deaf: Some(Watchers::new()),
            ..self.clone()
        }
    }

    /// Makes an approved action one whose execution failed.
    pub fn fail(&self, key: &str) {
        self.edit("status = 'FAILED', execution = 'failed'", key);
    }

    /// Makes a decided action one that had expired.
    pub fn close(&self, key: &str) {
        self.edit("closed = 'expired'", key);
    }

    fn edit(&self, change: &str, key: &str) {
        edit(&self.path(), change, key);
    }
}

impl Store for Disk {
    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        self.store.decide(request).await
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        self.store.submit(request).await
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        self.store.find(id, tenant).await
    }

    forward_the_human_loop!(self, self.store, {});

    fn watch(&self, id: Uuid) -> Watch {
        match &self.deaf {
            Some(watchers) => watchers.watch(id),
            None => self.store.watch(id),
        }
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.store.check().await
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        self.store.totals().await
    }
}
