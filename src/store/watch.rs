//! Wake-ups for those who wait for an action to change.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

/// The subscriptions to actions. A store has one set, and reports every commit to it.
#[derive(Clone, Default)]
pub struct Watchers {
    actions: Arc<Mutex<HashMap<Uuid, watch::Sender<()>>>>,
}

impl Watchers {
    /// Makes an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Subscribes to an action.
    pub fn watch(&self, id: Uuid) -> Watch {
        let receiver = self
            .lock()
            .entry(id)
            .or_insert_with(|| watch::channel(()).0)
            .subscribe();
        Watch {
            id,
            receiver: Some(receiver),
            watchers: self.clone(),
        }
    }

    /// Wakes everyone who waits for the action. Without subscribers this costs one look-up.
    pub fn wake(&self, id: Uuid) {
        if let Some(sender) = self.lock().get(&id) {
            sender.send_replace(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, watch::Sender<()>>> {
        self.actions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Watchers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchers")
            .field("actions", &self.lock().len())
            .finish()
    }
}

/// A subscription to one action. See [`Store::watch`](super::Store::watch).
pub struct Watch {
    id: Uuid,
    receiver: Option<watch::Receiver<()>>,
    watchers: Watchers,
}

impl Watch {
    /// Waits until the action may have changed since the subscription, or since this method last
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
        let mut actions = self.watchers.lock();
        if actions.get(&self.id).is_some_and(watch::Sender::is_closed) {
            actions.remove(&self.id);
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_between_subscribing_and_waiting_is_not_missed() {
        let watchers = Watchers::new();
        let id = Uuid::new_v4();
        let mut watch = watchers.watch(id);
        watchers.wake(id);
        watch.changed().await;
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
        watchers.wake(Uuid::new_v4());
        watchers.wake(id);
        for task in waiting {
            task.await.unwrap();
        }
        assert!(watchers.lock().is_empty());
    }
}
