//! The couriers of all endpoints, which come and go as endpoints do.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use super::courier::{Courier, MAX_REQUEST, Settings, Stop, Untaken};
use super::http::HttpClient;
use super::tally::Tally;
use super::{Endpoint, OutboxError, check};
use crate::store::Store;

/// The couriers of an outbox.
#[derive(Debug)]
pub(super) struct Fleet<St> {
    pub(super) store: St,
    pub(super) settings: Arc<Settings>,
    pub(super) request_timeout: Duration,
    pub(super) tally: Tally,
    pub(super) endpoints: watch::Receiver<Vec<Endpoint>>,
    /// When requests in flight must have ended, once the outbox stops.
    pub(super) stop: Stop,
    /// One for each endpoint, by its name.
    pub(super) berths: HashMap<String, Berth>,
    /// Each ends with the name of its endpoint.
    pub(super) couriers: JoinSet<(String, Untaken)>,
}

/// The place of an endpoint's courier. One leaves before the next one comes, so that events of one
/// action stay in order.
#[derive(Debug)]
pub(super) struct Berth {
    endpoint: Arc<Endpoint>,
    stop: watch::Sender<Option<Instant>>,
    /// Whether the courier was told to leave.
    is_leaving: bool,
    /// The endpoint of the courier that comes next.
    next: Option<(Endpoint, HttpClient)>,
}

impl<St: Store> Fleet<St> {
    /// Starts to deliver to an endpoint. The first courier takes it before this returns, so that no
    /// event of the caller's comes before the endpoint's beginning.
    pub(super) async fn launch(
        &mut self,
        endpoint: Endpoint,
        untaken: Untaken,
    ) -> Result<(), OutboxError> {
        let client = HttpClient::new(&endpoint, self.request_timeout)?;
        let courier = self.moor(endpoint, client, untaken);
        let taken = courier.take().await;
        self.couriers.spawn(async move {
            let name = courier.endpoint.name().to_owned();
            (name, courier.run(taken).await)
        });
        Ok(())
    }

    /// Makes the courier of an endpoint that has none.
    fn moor(&mut self, endpoint: Endpoint, client: HttpClient, untaken: Untaken) -> Courier<St> {
        let (stop, stopped) = watch::channel(None);
        let endpoint = Arc::new(endpoint);
        let name = endpoint.name().to_owned();
        let berth = Berth {
            endpoint: Arc::clone(&endpoint),
            stop,
            is_leaving: false,
            next: None,
        };
        let counters = self.tally.add(&name);
        self.berths.insert(name, berth);
        Courier {
            store: self.store.clone(),
            client,
            endpoint,
            settings: self.settings.clone(),
            holder: Uuid::new_v4(),
            stop: stopped,
            untaken,
            counters,
        }
    }

    fn send_out(&mut self, endpoint: Endpoint, client: HttpClient, untaken: Untaken) {
        let courier = self.moor(endpoint, client, untaken);
        self.couriers.spawn(async move {
            let name = courier.endpoint.name().to_owned();
            let taken = courier.take().await;
            (name, courier.run(taken).await)
        });
    }

    /// Delivers until the outbox stops.
    pub(super) async fn run(mut self) {
        let mut stop = self.stop.clone();
        let mut may_change = true;
        let deadline = loop {
            tokio::select! {
                stopped = stop.wait_for(Option::is_some) => {
                    break stopped.ok().and_then(|deadline| *deadline);
                }
                changed = self.endpoints.changed(), if may_change => {
                    may_change = changed.is_ok();
                    if may_change {
                        let endpoints = self.endpoints.borrow_and_update().clone();
                        self.change(endpoints);
                    }
                }
                Some(ended) = self.couriers.join_next() => {
                    match ended {
                        Ok((name, untaken)) => self.replace(&name, untaken),
                        // A task that panicked has not said which one it was.
                        Err(_) => self.replace_lost(),
                    }
                }
            }
        };
        let deadline = deadline.unwrap_or_else(Instant::now);
        for berth in self.berths.values() {
            berth.stop.send_replace(Some(deadline));
        }
        while self.couriers.join_next().await.is_some() {}
    }

    /// Takes other endpoints, all or none.
    fn change(&mut self, endpoints: Vec<Endpoint>) {
        if let Err(error) = self.try_change(endpoints) {
            tracing::error!(%error, "the webhooks before stay in force");
        }
    }

    fn try_change(&mut self, endpoints: Vec<Endpoint>) -> Result<(), OutboxError> {
        check(&endpoints, self.settings.public_url.is_some())?;
        let mut same = HashSet::new();
        let mut new = HashMap::new();
        for endpoint in endpoints {
            let name = endpoint.name().to_owned();
            let berth = self.berths.get(&name);
            if berth.is_some_and(|berth| !berth.is_leaving && *berth.endpoint == endpoint) {
                same.insert(name);
            } else {
                let client = HttpClient::new(&endpoint, self.request_timeout)?;
                new.insert(name, (endpoint, client));
            }
        }
        for (name, berth) in &mut self.berths {
            if same.contains(name) {
                continue;
            }
            let next = new.remove(name);
            if next.is_none() {
                self.tally.remove(name);
            }
            berth.next = next;
            if !berth.is_leaving {
                berth.is_leaving = true;
                berth.stop.send_replace(Some(Instant::now() + MAX_REQUEST));
            }
        }
        for (endpoint, client) in new.into_values() {
            self.send_out(endpoint, client, None);
        }
        Ok(())
    }

    /// Lets the next couriers follow those that are gone without a word. Where there is no next one,
    /// the endpoint waits for a change or a restart.
    fn replace_lost(&mut self) {
        let lost = self
            .berths
            .iter()
            .filter(|(_, berth)| berth.stop.is_closed());
        let lost: Vec<_> = lost.map(|(name, _)| name.clone()).collect();
        for name in lost {
            self.replace(&name, None);
        }
    }

    /// Lets the next courier of an endpoint follow one that left.
    fn replace(&mut self, name: &str, untaken: Untaken) {
        let Some(berth) = self.berths.remove(name) else {
            return;
        };
        match berth.next {
            Some((endpoint, client)) => self.send_out(endpoint, client, untaken),
            // Nobody will take it.
            None => {
                if let Some(untaken) = untaken {
                    untaken.send_modify(|untaken| *untaken -= 1);
                }
            }
        }
    }
}
