//! A store that fails on command.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::forward_the_human_loop;
use aegis_hitl::store::{Decide, Decided, Store, StoreError, Submit, Submitted, Totals, Watch};
use aegis_hitl::{Action, TenantId};
use tokio::sync::Notify;
use uuid::Uuid;

/// What a [`Faulty`] store does when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Mood {
    Well,
    /// Answers with an error.
    Fails,
    /// Answers only once [`Faulty::release`] is called.
    Hangs,
    /// Panics.
    Panics,
}

/// A store in front of another one, which fails on command.
#[derive(Clone)]
pub struct Faulty<St> {
    store: St,
    shared: Arc<Shared>,
}

struct Shared {
    mood: AtomicUsize,
    release: Notify,
    arrived: Notify,
    asked: AtomicUsize,
}

impl<St: Store> Faulty<St> {
    pub fn new(store: St, mood: Mood) -> Self {
        Self {
            store,
            shared: Arc::new(Shared {
                mood: AtomicUsize::new(mood as usize),
                release: Notify::new(),
                arrived: Notify::new(),
                asked: AtomicUsize::new(0),
            }),
        }
    }

    pub fn set(&self, mood: Mood) {
        self.shared.mood.store(mood as usize, Ordering::SeqCst);
    }

    /// Lets one call go on that hangs.
    pub fn release(&self) {
        self.shared.release.notify_one();
    }

    /// Waits until a call arrives.
    pub async fn arrived(&self) {
        self.shared.arrived.notified().await;
    }

    /// How many calls have come, of any kind.
    pub fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }

    async fn pass(&self) -> Result<(), StoreError> {
        self.shared.asked.fetch_add(1, Ordering::SeqCst);
        self.shared.arrived.notify_one();
        match self.shared.mood.load(Ordering::SeqCst) {
            mood if mood == Mood::Fails as usize => {
                Err(StoreError::unavailable("/secret/path: disk I/O error"))
            }
            mood if mood == Mood::Hangs as usize => {
                self.shared.release.notified().await;
                Ok(())
            }
            mood if mood == Mood::Panics as usize => panic!("as the test asked"),
            _ => Ok(()),
        }
    }
}

impl<St: Store> Store for Faulty<St> {
    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        self.pass().await?;
        self.store.decide(request).await
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        self.pass().await?;
        self.store.submit(request).await
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        self.pass().await?;
        self.store.find(id, tenant).await
    }

    forward_the_human_loop!(self, self.store, { self.pass().await? });

    fn watch(&self, id: Uuid) -> Watch {
        self.store.watch(id)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.pass().await?;
        self.store.check().await
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        self.store.totals().await
    }
}
