//! The live events of a tenant, read once for all who follow them.
//!
//! A task reads a tenant's events while anyone follows them, and publishes the newest ones in a
//! [`Window`]. A follower takes what is behind its own position. One that is further back than the
//! window reads the store for itself, so a slow follower costs the others nothing.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::{Api, entry};
use crate::protocol::{Event, TenantId};
use crate::server::http::Rejection;
use crate::store::Store;

/// The most events of one read.
pub(super) const PAGE: usize = 64;

/// The most events that a window holds.
const WINDOW: usize = 1024;

/// How long an event stays in the window. Whoever follows at the pace of the events takes it at
/// once.
const STAY: Duration = Duration::from_secs(1);

/// The pause after a read that failed.
pub(super) const PAUSE: Duration = Duration::from_secs(1);

/// The tenants whose events someone follows.
///
/// A follower subscribes under the lock, and the last one of a tenant drops its receiver and removes
/// the entry under the lock. A reader without receivers can therefore gain none, and ends.
#[derive(Default)]
pub(crate) struct Feeds(Mutex<HashMap<TenantId, Weak<watch::Sender<Window>>>>);

impl Feeds {
    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, Weak<watch::Sender<Window>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All of the tenant's events behind the position `after`, up to the last one that was read.
struct Window {
    after: u64,
    events: VecDeque<Published>,
}

struct Published {
    position: u64,
    bytes: Bytes,
    at: Instant,
}

/// What a follower finds in a window.
pub(super) enum Found {
    Event(u64, Bytes),
    /// There is no further event yet.
    Nothing,
    /// The window begins behind this position, which the follower has not reached.
    Behind(u64),
}

impl Window {
    fn from(after: u64) -> Self {
        Self {
            after,
            events: VecDeque::new(),
        }
    }

    /// The position of the last event that was read.
    fn end(&self) -> u64 {
        self.events.back().map_or(self.after, |last| last.position)
    }

    fn find(&self, position: u64) -> Found {
        if position < self.after {
            return Found::Behind(self.after);
        }
        let next = self
            .events
            .partition_point(|event| event.position <= position);
        self.events.get(next).map_or(Found::Nothing, |event| {
            Found::Event(event.position, event.bytes.clone())
        })
    }

    fn push(&mut self, events: Vec<(u64, Bytes)>) {
        let at = Instant::now();
        let events = events.into_iter();
        self.events
            .extend(events.map(|(position, bytes)| Published {
                position,
                bytes,
                at,
            }));
        let is_over = |event: &Published| at.duration_since(event.at) > STAY;
        while let Some(first) = self.events.front()
            && (self.events.len() > WINDOW || is_over(first))
        {
            self.after = first.position;
            self.events.pop_front();
        }
        if self.events.is_empty() {
            // A quiet tenant takes no memory for events.
            self.events = VecDeque::new();
        }
    }
}

/// A follower's part in the events of its tenant.
pub(super) struct Feed {
    tenant: TenantId,
    /// `None` once it is dropped.
    receiver: Option<watch::Receiver<Window>>,
    feeds: Arc<Feeds>,
}

impl Feed {
    /// Returns the next event behind a position.
    pub(super) fn find(&mut self, position: u64) -> Found {
        match &mut self.receiver {
            Some(receiver) => receiver.borrow_and_update().find(position),
            None => Found::Nothing,
        }
    }

    /// Waits until there may be more to find than at the last call of `find`. Returns `false` if
    /// the reader has ended: a panic of the store ended it.
    pub(super) async fn changed(&mut self) -> bool {
        match &mut self.receiver {
            Some(receiver) => receiver.changed().await.is_ok(),
            None => false,
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let mut feeds = self.feeds.lock();
        self.receiver = None;
        let is_followed = |feed: &Weak<watch::Sender<Window>>| {
            feed.upgrade()
                .is_some_and(|window| window.receiver_count() > 0)
        };
        if feeds
            .get(&self.tenant)
            .is_some_and(|feed| !is_followed(feed))
        {
            feeds.remove(&self.tenant);
        }
    }
}

impl<St: Store> Api<St> {
    /// Follows a tenant's events. `newest` is the position of an event that is on record; a window
    /// that does not exist yet begins there.
    pub(super) fn follow(self: &Arc<Self>, tenant: &TenantId, newest: u64) -> Feed {
        let mut feeds = self.feeds.lock();
        let followed = feeds.get(tenant).and_then(Weak::upgrade);
        let receiver = match followed {
            Some(window) => window.subscribe(),
            None => {
                // Its receiver is there before its reader, which ends without one.
                let (window, receiver) = watch::channel(Window::from(newest));
                let window = Arc::new(window);
                feeds.insert(tenant.clone(), Arc::downgrade(&window));
                tokio::spawn(self.clone().publish(tenant.clone(), window));
                receiver
            }
        };
        Feed {
            tenant: tenant.clone(),
            receiver: Some(receiver),
            feeds: self.feeds.clone(),
        }
    }

    /// Publishes a tenant's events while anyone follows them.
    async fn publish(self: Arc<Self>, tenant: TenantId, window: Arc<watch::Sender<Window>>) {
        tokio::select! {
            () = window.closed() => {}
            () = self.read_on(&tenant, &window) => {}
        }
    }

    async fn read_on(&self, tenant: &TenantId, window: &watch::Sender<Window>) {
        // Subscribe, read, then wait: the subscription catches an event after the read.
        let mut watch = self.store.watch_tenant(tenant);
        loop {
            let end = window.borrow().end();
            let pause = match self.page(tenant, end).await {
                Ok(events) => {
                    let count = events.len();
                    window.send_if_modified(|window| {
                        window.push(events);
                        count > 0
                    });
                    if count == PAGE {
                        continue;
                    }
                    self.settings.poll_interval
                }
                // The outage is in the log. The followers stay, and go on after it.
                Err(_) => PAUSE,
            };
            tokio::select! {
                () = watch.changed() => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// Reads a page of events behind a position.
    pub(super) async fn page(
        &self,
        tenant: &TenantId,
        after: u64,
    ) -> Result<Vec<(u64, Bytes)>, Rejection> {
        let events = self.store.events(tenant, after, PAGE);
        let events = self.await_store(events).await?.into_iter();
        Ok(events
            .map(|(position, event)| (position, written(position, event)))
            .collect())
    }
}

/// Writes an event. JSON has no line breaks of its own.
fn written(position: u64, mut event: Event) -> Bytes {
    event.action = event.action.map(|action| Box::new(entry(*action)));
    let data = serde_json::to_string(&event).unwrap_or_default();
    format!("id: {position}\nevent: {}\ndata: {data}\n\n", event.kind).into()
}

#[cfg(all(test, feature = "test-util"))]
mod tests {
    use super::*;
    use crate::server::api::Settings;
    use crate::store::MemoryStore;

    #[tokio::test]
    async fn a_tenant_without_followers_leaves_nothing_behind() {
        let api = Arc::new(Api::new(MemoryStore::new(), Settings::default()));
        let tenant = |number: u64| TenantId::new(format!("t-{}", number % 5)).unwrap();
        let mut followed: Vec<_> = (0..20)
            .map(|number| api.follow(&tenant(number), 0))
            .collect();
        assert_eq!(api.feeds.lock().len(), 5);
        // One of each tenant's is left.
        followed.truncate(5);
        tokio::task::yield_now().await;
        assert_eq!(api.feeds.lock().len(), 5);
        assert!(followed.iter_mut().all(|feed| {
            let receiver = feed.receiver.as_ref().unwrap();
            receiver.has_changed().is_ok()
        }));
        drop(followed);
        assert!(api.feeds.lock().is_empty());
        // Each reader held the service.
        while Arc::strong_count(&api) > 1 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_holds_no_more_than_it_must() {
        let mut window = Window::from(7);
        assert!(matches!(window.find(6), Found::Behind(7)));
        assert!(matches!(window.find(7), Found::Nothing));
        let events = |from: u64, count: u64| {
            let events = (from..).take(count as usize);
            events.map(|position| (position, Bytes::new())).collect()
        };
        window.push(events(10, WINDOW as u64));
        assert!(matches!(window.find(7), Found::Event(10, _)));
        window.push(events(2000, 1));
        assert_eq!((window.events.len(), window.end()), (WINDOW, 2000));
        assert!(matches!(window.find(9), Found::Behind(10)));
        assert!(matches!(window.find(10), Found::Event(11, _)));
        tokio::time::advance(STAY * 2).await;
        window.push(events(3000, 1));
        assert!(matches!(window.find(1999), Found::Behind(2000)));
        assert!(matches!(window.find(2500), Found::Event(3000, _)));
        tokio::time::advance(STAY * 2).await;
        window.push(Vec::new());
        assert_eq!((window.end(), window.events.capacity()), (3000, 0));
    }
}
