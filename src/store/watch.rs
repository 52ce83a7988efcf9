//! Wake-ups for those who wait for an action to change.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use uuid::Uuid;

use crate::protocol::TenantId;

/// The subscriptions to actions, tenants and all events. A store has one set, and reports every commit to it.
#[derive(Clone, Default)]
pub struct Watchers {
    topics: Arc<Mutex<HashMap<Topic, watch::Sender<()>>>>,
    /// Somebody subscribed while nobody else had.
    first: Arc<Notify>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Topic {
    Action(Uuid),
    Tenant(TenantId),
    /// Every event.
    All,
}

impl Watchers {
    /// Makes an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Subscribes to an action.
    pub fn watch(&self, id: Uuid) -> Watch {
        self.subscribe(Topic::Action(id))
    }

    /// Subscribes to a tenant's events.
    pub fn watch_tenant(&self, tenant: &TenantId) -> Watch {
        self.subscribe(Topic::Tenant(tenant.clone()))
    }

    /// Subscribes to the events of all tenants.
    pub fn watch_all(&self) -> Watch {
        self.subscribe(Topic::All)
    }

    fn subscribe(&self, topic: Topic) -> Watch {
        let mut topics = self.lock();
        if topics.is_empty() {
            self.first.notify_one();
        }
        let receiver = topics
            .entry(topic.clone())
            .or_insert_with(|| watch::channel(()).0)
            .subscribe();
        drop(topics);
        Watch {
            topic,
            receiver: Some(receiver),
            watchers: self.clone(),
        }
    }

    /// Wakes everyone who waits for the action, for an event of its tenant, or for any event. Without
    /// subscribers this costs one look-up.
    pub fn wake(&self, id: Uuid, tenant: &TenantId) {
        let topics = self.lock();
        if topics.is_empty() {
            return;
        }
        for topic in [Topic::Action(id), Topic::Tenant(tenant.clone()), Topic::All] {
            if let Some(sender) = topics.get(&topic) {
                sender.send_replace(());
            }
        }
    }

    /// Whether nobody waits.
    #[cfg(feature = "postgres")]
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Completes once somebody waits. One task may ask for that.
    #[cfg(feature = "postgres")]
    pub(crate) async fn someone(&self) {
        while self.is_empty() {
            self.first.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Topic, watch::Sender<()>>> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Watchers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchers")
            .field("topics", &self.lock().len())
            .finish()
    }
}

/// A subscription to one action or tenant. See [`Store::watch`](super::Store::watch).
pub struct Watch {
    topic: Topic,
    receiver: Option<watch::Receiver<()>>,
    watchers: Watchers,
}

impl Watch {
    /// Waits until the action may have changed, or the tenant may have an event, since the subscription, or since this method last
    /// returned.
    pub async fn changed(&mut self) {
        if let Some(receiver) = &mut self.receiver
            && receiver.changed().await.is_ok()
        {
            return;
        }
        // Nothing can wake this subscription any more. The caller's poll covers that.
        std::future::pending().await
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.receiver = None;
        let mut topics = self.watchers.lock();
        if topics
            .get(&self.topic)
            .is_some_and(watch::Sender::is_closed)
        {
            topics.remove(&self.topic);
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("topic", &self.topic)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant() -> TenantId {
        TenantId::new("acme").unwrap()
    }

    #[tokio::test]
    async fn a_tenant_is_woken_by_its_own_events_alone() {
        let watchers = Watchers::new();
        let mut watch = watchers.watch_tenant(&tenant());
        watchers.wake(Uuid::new_v4(), &TenantId::new("other").unwrap());
        assert!(!watch.receiver.as_ref().unwrap().has_changed().unwrap());
        watchers.wake(Uuid::new_v4(), &tenant());
        watch.changed().await;
    }

    #[tokio::test]
    async fn a_change_between_subscribing_and_waiting_is_not_missed() {
        let watchers = Watchers::new();
        let id = Uuid::new_v4();
        let mut watch = watchers.watch(id);
        watchers.wake(id, &tenant());
        watch.changed().await;
    }

    #[cfg(feature = "postgres")]
    #[tokio::test]
    async fn the_first_waiter_is_noticed_whenever_they_come() {
        let watchers = Watchers::new();
        let before = watchers.watch_all();
        watchers.someone().await;
        drop(before);
        let asked = watchers.clone();
        let mut noticed = tokio::spawn(async move { asked.someone().await });
        tokio::task::yield_now().await;
        assert!(futures_util::poll!(&mut noticed).is_pending());
        let _after = watchers.watch(Uuid::new_v4());
        noticed.await.unwrap();
    }

    #[tokio::test]
    async fn every_waiter_is_woken_and_nothing_is_left_behind() {
        let watchers = Watchers::new();
        let id = Uuid::new_v4();
        let waiting: Vec<_> = (0..8)
            .map(|_| {
                let mut watch = watchers.watch(id);
                tokio::spawn(async move { watch.changed().await })
            })
            .collect();
        tokio::task::yield_now().await;
        let other = TenantId::new("other").unwrap();
        watchers.wake(Uuid::new_v4(), &other);
        watchers.wake(id, &other);
        for task in waiting {
            task.await.unwrap();
        }
        assert!(watchers.lock().is_empty());
    }
}
