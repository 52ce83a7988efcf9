//! The outbox: delivers events to webhooks, and notifications to chats and phones.
//!
//! An [`Endpoint`] is a receiver. Each event that a store records for it is delivered at least
//! once, under the event's own id, and in order as far as it belongs to one action. Events of
//! different actions are delivered at the same time and may overtake each other.
//!
//! What fails is parked, with the later events of the same action behind it, and is attempted again
//! while other actions go on: after 5 s, then after twice the wait each time, up to an hour, always
//! with jitter, and never before a `Retry-After` is over. An attempt takes at most 10 s. Any status
//! of 200 to 299 is a success, 410 stops the endpoint, and everything else is a failure: redirects
//! are not followed. What was parked for a day becomes a dead letter at its next failure.
//!
//! An event is marked as delivered shortly after the receiver answered. If the server ends in
//! between, the event is delivered again under the same id.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use aegis_hitl::outbox::{Endpoint, Outbox};
//! use aegis_hitl::store::Store;
//!
//! # async fn example(store: impl Store) -> Result<(), Box<dyn std::error::Error>> {
//! let secret = std::env::var("WEBHOOK_SECRET")?.parse()?;
//! let endpoint = Endpoint::standard("billing", "https://billing.example.com/hook", vec![secret])?;
//! let deliveries = Outbox::new(vec![endpoint]).start(store).await?;
//! // Until the server drains.
//! deliveries.stop(Duration::from_secs(30)).await;
//! # Ok(())
//! # }
//! ```
//!
//! The outbox logs the names of endpoints, statuses, and numbers of attempts: no payload, and no
//! URL, as those of notifications are secrets.

// The rooms:
//
//   endpoint   what a user sets of a receiver
//   message    an event as a request; sign: its signature
//   http       sends one request, and judges the answer
//   courier    one task for each endpoint: what is sent when, and what becomes of it
//   window     how far it came
//   fleet      the couriers of all endpoints, which come and go
//   tally      what was delivered, for metrics

mod courier;
mod endpoint;
mod fleet;
mod http;
mod message;
mod sign;
mod tally;
mod window;

use std::collections::{HashMap, HashSet};
use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use self::courier::Settings;
use self::fleet::Fleet;
use crate::layer::Backoff;
use crate::protocol::BoxError;
use crate::store::Store;

pub use self::endpoint::{Endpoint, InvalidEndpoint, InvalidPublicUrl, PublicUrl};
pub use self::sign::{InvalidSecret, Secret};
pub(crate) use self::tally::Counters;
pub use self::tally::Tally;
pub use crate::store::Start;

/// Delivers the events of a store to endpoints.
///
/// Several servers on one store share the endpoints: one at a time delivers to each.
#[derive(Debug)]
#[must_use]
pub struct Outbox {
    endpoints: watch::Receiver<Vec<Endpoint>>,
    settings: Settings,
    request_timeout: Duration,
    tally: Tally,
}

impl Outbox {
    /// Makes an outbox. An endpoint that a store knows and that is not among these keeps its state,
    /// and receives nothing.
    pub fn new(endpoints: Vec<Endpoint>) -> Self {
        Self::watched(watch::channel(endpoints).1)
    }

    /// Takes the endpoints from a channel, so that they can be replaced while the outbox delivers. A
    /// new one begins, one that is gone ends, and one that was changed goes on where it was with its
    /// next delivery. Requests in flight may end first.
    ///
    /// If those that were sent fail the [`check`](Self::check), an error is logged, and the ones
    /// before stay in force.
    pub fn watched(endpoints: watch::Receiver<Vec<Endpoint>>) -> Self {
        Self {
            endpoints,
            settings: Settings::default(),
            request_timeout: Duration::from_secs(10),
            tally: Tally::default(),
        }
    }

    /// Returns the numbers of what is delivered, for metrics.
    pub fn tally(&self) -> Tally {
        self.tally.clone()
    }

    /// Sets the URL under which people reach the server's pages. Notifications need one.
    pub fn public_url(mut self, url: PublicUrl) -> Self {
        self.settings.public_url = Some(url);
        self
    }

    /// Sets the waits before an event is attempted again. The default is 5 s, doubled each time,
    /// with up to a quarter on top, up to an hour.
    ///
    /// A receiver can ask for longer ones (`Retry-After`), up to an hour. What the store says is due
    /// later than the longest of all waits is attempted at once: the clock was set back.
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.settings.backoff = backoff;
        self
    }

    /// Sets how long a request may take until its answer begins. The default is 10 s, and more than
    /// 20 s count as 20.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout.min(courier::MAX_REQUEST);
        self
    }

    /// Sets how long a parked event is attempted before it becomes a dead letter. The default is a
    /// day.
    pub fn give_up_after(mut self, time: Duration) -> Self {
        self.settings.give_up_after = time;
        self
    }

    /// Sets how often the store is asked for what no wake-up announces, such as events of other
    /// servers and dead letters that were resent. The default is 5 s.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.settings.poll_interval = interval;
        self
    }

    /// Checks that the endpoints can be delivered to. [`start`](Self::start) does the same; call
    /// this first to fail before a store is opened.
    ///
    /// # Errors
    ///
    /// - If two endpoints have one name.
    /// - If there is an endpoint for notifications, and no [public URL](Self::public_url).
    pub fn check(&self) -> Result<(), OutboxError> {
        let endpoints = self.endpoints.borrow();
        check(&endpoints, self.settings.public_url.is_some())
    }

    /// Sets how many events of an endpoint may be parked while none is accepted. With more, the
    /// endpoint is taken to be down as a whole, and further events are not attempted. The default
    /// is 10,000.
    pub fn parked_limit(mut self, events: usize) -> Self {
        self.settings.parked_limit = events;
        self
    }

    /// Starts to deliver, with a task for each endpoint. An endpoint that is new begins now.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check), or if TLS cannot be set up.
    pub async fn start<St: Store>(self, store: St) -> Result<Deliveries, OutboxError> {
        let mut endpoints = self.endpoints;
        let first = endpoints.borrow_and_update().clone();
        check(&first, self.settings.public_url.is_some())?;
        let (stop, stopped) = watch::channel(None);
        let (untaken, taken) = watch::channel(first.len());
        let untaken = Arc::new(untaken);
        let mut fleet = Fleet {
            store,
            settings: Arc::new(self.settings),
            request_timeout: self.request_timeout,
            tally: self.tally,
            endpoints,
            stop: stopped,
            berths: HashMap::new(),
            couriers: JoinSet::new(),
        };
        for endpoint in first {
            fleet.launch(endpoint, Some(untaken.clone())).await?;
        }
        let mut running = JoinSet::new();
        running.spawn(fleet.run());
        Ok(Deliveries {
            stop,
            taken,
            running,
        })
    }
}

/// Checks endpoints with each other and with the public URL.
fn check(endpoints: &[Endpoint], has_public_url: bool) -> Result<(), OutboxError> {
    let mut names = HashSet::new();
    for endpoint in endpoints {
        let name = endpoint.name();
        if !names.insert(name) {
            return Err(OutboxError::of(name, "has the name of another one"));
        }
        if endpoint.has_link() && !has_public_url {
            let fault = "is for notifications, whose links need the server's public URL";
            return Err(OutboxError::of(name, fault));
        }
    }
    Ok(())
}

/// Deliveries that go on. Dropping them abandons the requests in flight, whose events are then
/// delivered again at the next start.
#[derive(Debug)]
#[must_use]
pub struct Deliveries {
    stop: watch::Sender<Option<Instant>>,
    /// The number of endpoints that were not taken yet.
    taken: watch::Receiver<usize>,
    /// One task, which runs all others.
    running: JoinSet<()>,
}

impl Deliveries {
    /// Completes once every endpoint was taken, by this server or by another one, or is stopped.
    /// From then on the store keeps for each the events that it has not received.
    pub fn taken(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut taken = self.taken.clone();
        async move {
            if taken.wait_for(|untaken| *untaken == 0).await.is_err() {
                // The couriers ended before they took all.
                std::future::pending().await
            }
        }
    }

    /// Begins no further request, and lets those in flight end within this time.
    pub async fn stop(mut self, within: Duration) {
        // The rest is for recording what became of them.
        let requests = within - (within / 4).min(Duration::from_secs(2));
        let Some(deadline) = Instant::now().checked_add(requests) else {
            return;
        };
        self.stop.send_replace(Some(deadline));
        let ended = async { while self.running.join_next().await.is_some() {} };
        if timeout(within, ended).await.is_err() {
            tracing::warn!("webhook requests in flight were abandoned, and will be sent again");
        }
    }
}

/// The error of an [`Outbox`] that cannot start.
#[derive(Debug)]
pub struct OutboxError {
    message: String,
    source: Option<BoxError>,
}

impl OutboxError {
    fn of(endpoint: &str, fault: &str) -> Self {
        Self {
            message: format!("the endpoint '{endpoint}' {fault}"),
            source: None,
        }
    }

    #[cfg(feature = "tls")]
    fn tls(error: rustls::Error) -> Self {
        Self {
            message: "TLS cannot be set up for webhooks".to_owned(),
            source: Some(error.into()),
        }
    }
}

impl fmt::Display for OutboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for OutboxError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        let source = self.source.as_ref()?;
        Some(source.as_ref())
    }
}
