//! The task of one endpoint: what is sent when, and what becomes of it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use super::endpoint::{Endpoint, PublicUrl};
use super::http::{Answer, HttpClient};
use super::message::message;
use super::tally::Counters;
use super::window::Window;
use crate::layer::{Backoff, Random};
use crate::protocol::{Event, entry};
use crate::store::{
    DeliveryResult, EndpointTaken, MarkDeliveries, Marked, Store, StoreError, TakeEndpoint, Watch,
};

/// The longest request.
pub(super) const MAX_REQUEST: Duration = Duration::from_secs(20);

/// How long an endpoint is held without a sign of life. No request is begun that could outlast it.
const LEASE: Duration = Duration::from_secs(60);
const RENEW_EACH: Duration = Duration::from_secs(20);
const SEND_FOR: Duration = Duration::from_secs(35);

/// The most requests at once: of events that come in order, and of parked ones beside them.
const FRESH: usize = 16;
const RETRIES: usize = 8;

/// The most events that are read ahead of the first that is not done, and at once.
const WINDOW: usize = 512;
const BATCH: usize = 64;

/// How many times the limit of parked events an endpoint may have that accepts others.
const WHILE_UP: usize = 10;

/// How long a request may hold others up.
const SLOW: Duration = Duration::from_secs(1);

/// How often deliveries are marked, at most. Each mark is a durable write.
const MARK_EACH: Duration = Duration::from_millis(250);

/// How often new events are read, at most. This bounds what an endpoint takes of the machine from
/// those who decide: some 3,000 events a second.
const READ_EACH: Duration = Duration::from_millis(20);

/// The pause after the store failed.
const PAUSE: Duration = Duration::from_secs(1);

/// How long nothing may fail before an endpoint counts as well again.
const QUIET: Duration = Duration::from_secs(10);

/// With the jitter, the longest wait by default is an hour.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
const LONGEST_STEP: Duration = Duration::from_secs(48 * 60);

/// How far the clocks of those who share a store may be apart.
const SKEW: Duration = Duration::from_secs(60);

/// What all endpoints share.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) public_url: Option<PublicUrl>,
    pub(super) backoff: Backoff,
    pub(super) give_up_after: Duration,
    pub(super) poll_interval: Duration,
    pub(super) parked_limit: usize,
    pub(super) random: Random,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            public_url: None,
            backoff: Backoff::exponential(Duration::from_secs(5), LONGEST_STEP).jitter_above(0.25),
            give_up_after: Duration::from_secs(24 * 3600),
            poll_interval: Duration::from_secs(5),
            parked_limit: 10_000,
            random: Random::new(),
        }
    }
}

impl Settings {
    /// The longest wait until an attempt, whatever a receiver asks for. What would wait for longer
    /// is due: the clock was set back.
    fn longest_wait(&self) -> Duration {
        self.backoff.longest().max(LONGEST_WAIT)
    }
}

/// When requests in flight must have ended. `None` until the outbox stops.
pub(super) type Stop = watch::Receiver<Option<Instant>>;

/// Delivers to one endpoint.
#[derive(Debug)]
pub(super) struct Courier<St> {
    pub(super) store: St,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) client: HttpClient,
    pub(super) settings: Arc<Settings>,
    /// Who holds the endpoint.
    pub(super) holder: Uuid,
    pub(super) stop: Stop,
    /// Counts the endpoints that were not taken yet, until this one was.
    pub(super) untaken: Untaken,
    pub(super) counters: Arc<Counters>,
}

/// The number of endpoints that were not taken yet, for one that was not.
pub(super) type Untaken = Option<Arc<watch::Sender<usize>>>;

impl<St: Store> Courier<St> {
    /// Delivers until it is told to stop. `taken` is the outcome of taking the endpoint. Returns the
    /// count of those that were not taken if the endpoint still is one of them.
    pub(super) async fn run(mut self, taken: Result<EndpointTaken, StoreError>) -> Untaken {
        let mut stop = self.stop.clone();
        let mut was_stopped = false;
        let (mut begun, mut taken) = (Instant::now(), taken);
        loop {
            if taken.is_ok()
                && let Some(untaken) = self.untaken.take()
            {
                untaken.send_modify(|untaken| *untaken -= 1);
            }
            let name = self.endpoint.name();
            match taken {
                Ok(EndpointTaken::Taken { position, parked }) => {
                    was_stopped = false;
                    Round::new(&self, begun, position, parked).run().await;
                }
                Ok(EndpointTaken::Held) => {
                    tracing::debug!(endpoint = name, "another server delivers");
                }
                Ok(EndpointTaken::Stopped) => {
                    if !was_stopped {
                        tracing::warn!(endpoint = name, "the endpoint is stopped until resumed");
                    }
                    was_stopped = true;
                }
                Err(error) => tracing::debug!(endpoint = name, %error, "not taken"),
            }
            tokio::select! {
                () = sleep(self.settings.poll_interval) => {}
                _ = stop.wait_for(Option::is_some) => return self.untaken,
            }
            begun = Instant::now();
            taken = self.take().await;
        }
    }

    /// Takes the endpoint for this courier alone.
    pub(super) async fn take(&self) -> Result<EndpointTaken, StoreError> {
        let request = TakeEndpoint {
            endpoint: self.endpoint.name().to_owned(),
            start: self.endpoint.start,
            holder: self.holder,
            lease: LEASE,
        };
        self.store.take_endpoint(request).await
    }
}

/// An event on its way to the receiver.
#[derive(Debug)]
struct Delivery {
    position: u64,
    action: Uuid,
    event: Event,
    /// The number of attempts so far.
    attempts: u32,
}

/// A request in flight.
#[derive(Debug)]
struct Flight {
    action: Uuid,
    attempts: u32,
    since: Instant,
    /// Whether the event is parked, and holds nothing up.
    is_parked: bool,
    /// Whether it was parked when the request was begun.
    is_retry: bool,
}

/// The events of one action that are not done.
#[derive(Debug, Default)]
struct Line {
    /// Whether one of them is in flight, or about to be.
    is_busy: bool,
    /// The number of parked ones. Later ones are parked behind them.
    parked: usize,
    /// Those that wait for the one in flight.
    waiting: VecDeque<Delivery>,
}

/// The time in which a courier holds its endpoint.
struct Round<'a, St> {
    courier: &'a Courier<St>,
    watch: Watch,
    window: Window,
    lines: HashMap<Uuid, Line>,
    /// The actions of the parked events.
    parked: HashMap<u64, Uuid>,
    /// What is to be sent, one of each line.
    ready: VecDeque<Delivery>,
    retries: VecDeque<Delivery>,
    flights: HashMap<u64, Flight>,
    requests: JoinSet<(u64, Answer)>,
    /// The number of requests that may hold others up.
    fresh: usize,
    /// The number of requests for what was parked before. Slow ones that were parked on their way do
    /// not count: they would keep what failed from being attempted again.
    retrying: usize,
    /// What is to be recorded.
    results: Vec<(u64, DeliveryResult)>,
    /// The position on record.
    marked: u64,
    /// When the endpoint was last taken or the lease extended.
    held_at: Instant,
    /// When the next mark may be made.
    mark_at: Instant,
    /// Whether the last mark failed. Until one is made, nothing is sent that would be sent again.
    has_failed: bool,
    read_at: Instant,
    due_at: Instant,
    /// When requests in flight must have ended, because the receiver is gone.
    gone: Option<Instant>,
    /// Whether the last request was accepted, or none has ended yet.
    is_up: bool,
    failed_at: Option<Instant>,
    store_failed_at: Option<Instant>,
}

/// The endpoint is not this courier's any more, or what became of it is unknown.
struct Lost;

impl<'a, St: Store> Round<'a, St> {
    fn new(
        courier: &'a Courier<St>,
        held_at: Instant,
        position: u64,
        parked: Vec<(u64, Uuid)>,
    ) -> Self {
        let mut lines: HashMap<Uuid, Line> = HashMap::new();
        for (_, action) in &parked {
            lines.entry(*action).or_default().parked += 1;
        }
        Self {
            courier,
            // Subscribe, read, then wait: the subscription catches an event after the read.
            watch: courier.store.watch_all(),
            window: Window::new(position),
            lines,
            parked: parked.into_iter().collect(),
            ready: VecDeque::new(),
            retries: VecDeque::new(),
            flights: HashMap::new(),
            requests: JoinSet::new(),
            fresh: 0,
            retrying: 0,
            results: Vec::new(),
            marked: position,
            held_at,
            mark_at: held_at,
            has_failed: false,
            read_at: held_at,
            due_at: held_at,
            gone: None,
            is_up: true,
            failed_at: None,
            store_failed_at: None,
        }
    }

    /// Delivers until the outbox stops, the receiver is gone, or another server took over.
    async fn run(mut self) {
        let mut stop = self.courier.stop.clone();
        loop {
            let now = Instant::now();
            if self.next_mark() <= now && self.mark(LEASE, false).await.is_err() {
                return;
            }
            let may_send = !self.has_failed && now < self.held_at + SEND_FOR;
            let deadline = match (*stop.borrow(), self.gone) {
                (Some(stop), Some(gone)) => Some(stop.min(gone)),
                (stop, gone) => stop.or(gone),
            };
            if let Some(deadline) = deadline {
                if self.requests.is_empty() || deadline <= now {
                    // What is in flight is abandoned, and sent again at the next start.
                    let _ = self.mark(Duration::ZERO, self.gone.is_some()).await;
                    return;
                }
            } else if may_send {
                self.park_slow(now);
                if self.read_at <= now && self.has_room() {
                    self.read().await;
                }
                if self.due_at <= now && self.retries.is_empty() {
                    self.read_due().await;
                }
                self.start();
            }
            let next = match deadline {
                Some(deadline) => deadline.min(self.next_mark()),
                None if may_send => self.next(),
                None => self.next_mark(),
            };
            tokio::select! {
                Some(ended) = self.requests.join_next() => {
                    let mut ended = Some(ended);
                    while let Some(one) = ended {
                        // A task that panicked has not said which one it was.
                        let Ok((position, answer)) = one else { return };
                        self.settle(position, answer);
                        ended = self.requests.try_join_next();
                    }
                }
                () = self.watch.changed(), if deadline.is_none() => {
                    self.read_at = self.read_at.min(Instant::now() + READ_EACH);
                }
                () = sleep_until(next) => {}
                _ = stop.changed(), if deadline.is_none() => {}
            }
        }
    }

    /// When something is to be done besides what ends by itself.
    fn next(&self) -> Instant {
        let mut next = self.next_mark();
        if self.has_room() {
            next = next.min(self.read_at);
        }
        if self.retries.is_empty() {
            next = next.min(self.due_at);
        }
        if self.is_held_up() {
            let fresh = self.flights.values().filter(|flight| !flight.is_parked);
            next = fresh.fold(next, |next, flight| next.min(flight.since + SLOW));
        }
        next
    }

    fn next_mark(&self) -> Instant {
        let is_open = !self.results.is_empty() || self.window.position() != self.marked;
        let renewal = self.held_at + RENEW_EACH;
        // After a failure, nothing comes before the pause.
        let is_open = is_open || self.has_failed;
        let due = if is_open { self.mark_at } else { renewal };
        due.min(renewal).max(self.mark_at)
    }

    fn has_room(&self) -> bool {
        let limit = self.courier.settings.parked_limit;
        let limit = limit.saturating_mul(if self.is_up { WHILE_UP } else { 1 });
        self.window.len() < WINDOW && self.parked.len() < limit
    }

    /// Whether slow requests keep others from being sent.
    fn is_held_up(&self) -> bool {
        self.fresh >= FRESH || self.window.len() > WINDOW / 2
    }

    /// Parks what is slow and holds others up. It stays in flight.
    fn park_slow(&mut self, now: Instant) {
        if !self.is_held_up() {
            return;
        }
        let slow: Vec<_> = (self.flights.iter())
            .filter(|(_, flight)| !flight.is_parked && flight.since + SLOW <= now)
            .map(|(position, flight)| (*position, flight.action))
            .collect();
        for (position, action) in slow {
            if let Some(flight) = self.flights.get_mut(&position) {
                flight.is_parked = true;
            }
            self.fresh -= 1;
            self.park(position, action, DeliveryResult::Behind);
        }
    }

    /// Parks an event, and behind it those that wait for it.
    fn park(&mut self, position: u64, action: Uuid, result: DeliveryResult) {
        let line = self.lines.entry(action).or_default();
        let waiting = std::mem::take(&mut line.waiting);
        let behind = waiting.into_iter().map(|delivery| delivery.position);
        let behind: Vec<_> = behind.map(|at| (at, DeliveryResult::Behind)).collect();
        for (position, result) in std::iter::once((position, result)).chain(behind) {
            line.parked += 1;
            self.parked.insert(position, action);
            self.results.push((position, result));
            self.window.done(position);
        }
    }

    /// Notes that an event is not parked any more.
    fn unpark(&mut self, position: u64) {
        if let Some(action) = self.parked.remove(&position)
            && let Some(line) = self.lines.get_mut(&action)
        {
            line.parked = line.parked.saturating_sub(1);
            self.advance(action);
        }
    }

    /// Lets the next event of an action be sent, unless one is parked or on its way.
    fn advance(&mut self, action: Uuid) {
        let Some(line) = self.lines.get_mut(&action).filter(|line| !line.is_busy) else {
            return;
        };
        let next = line.waiting.pop_front();
        let is_parked = line.parked > 0;
        match next {
            // An operator had an earlier one sent again.
            Some(next) if is_parked => self.park(next.position, action, DeliveryResult::Behind),
            Some(next) => {
                line.is_busy = true;
                self.ready.push_back(next);
            }
            None if is_parked => {}
            None => {
                self.lines.remove(&action);
            }
        }
    }

    /// Reads further events.
    async fn read(&mut self) {
        let read = self.courier.store.all_events(self.window.read(), BATCH);
        let events = match read.await {
            Ok(events) => events,
            Err(error) => {
                self.store_failed(&error);
                self.read_at = Instant::now() + PAUSE;
                return;
            }
        };
        let pause = match events.len() {
            BATCH => READ_EACH,
            _ => self.courier.settings.poll_interval,
        };
        self.read_at = Instant::now() + pause;
        for (position, event) in events {
            self.window.add(position);
            if self.courier.endpoint.takes(&event) {
                self.admit(Delivery {
                    position,
                    action: action_of(&event),
                    event: small(event),
                    attempts: 0,
                });
            } else {
                self.window.done(position);
            }
        }
    }

    /// Takes a new event into the line of its action.
    fn admit(&mut self, delivery: Delivery) {
        let line = self.lines.entry(delivery.action).or_default();
        if line.parked > 0 {
            self.park(delivery.position, delivery.action, DeliveryResult::Behind);
        } else if line.is_busy {
            line.waiting.push_back(delivery);
        } else {
            line.is_busy = true;
            self.ready.push_back(delivery);
        }
    }

    /// Reads which parked events are to be attempted.
    async fn read_due(&mut self) {
        let endpoint = &self.courier.endpoint;
        let longest = self.courier.settings.longest_wait().saturating_add(SKEW);
        let store = &self.courier.store;
        let due = match store.due_deliveries(endpoint.name(), BATCH, longest).await {
            Ok(due) => due,
            Err(error) => {
                self.store_failed(&error);
                self.due_at = Instant::now() + PAUSE;
                return;
            }
        };
        let open: HashSet<u64> = self.results.iter().map(|result| result.0).collect();
        for due in due.deliveries {
            let action = action_of(&due.event);
            if open.contains(&due.position) || self.flights.contains_key(&due.position) {
                continue;
            }
            let line = self.lines.entry(action).or_default();
            // Another server, or an operator, may have parked it.
            if self.parked.insert(due.position, action).is_none() {
                line.parked += 1;
            }
            if line.is_busy {
                continue;
            }
            if !endpoint.takes(&due.event) {
                // It was, when it was parked.
                self.results.push((due.position, DeliveryResult::Delivered));
                self.unpark(due.position);
                continue;
            }
            line.is_busy = true;
            self.retries.push_back(Delivery {
                position: due.position,
                action,
                event: small(due.event),
                attempts: due.attempts,
            });
        }
        let pause = match self.retries.is_empty() {
            // It is read again once these are sent.
            false => Duration::ZERO,
            true => {
                let poll = self.courier.settings.poll_interval;
                due.next.unwrap_or(poll).clamp(MARK_EACH.min(poll), poll)
            }
        };
        self.due_at = Instant::now() + pause;
    }

    /// Sends what may be sent.
    fn start(&mut self) {
        while self.fresh < FRESH
            && let Some(delivery) = self.ready.pop_front()
        {
            self.fresh += 1;
            self.send(delivery, false);
        }
        while self.retrying < RETRIES
            && let Some(delivery) = self.retries.pop_front()
        {
            self.retrying += 1;
            self.send(delivery, true);
        }
    }

    fn send(&mut self, delivery: Delivery, is_retry: bool) {
        let Delivery {
            position,
            action,
            event,
            attempts,
        } = delivery;
        let flight = Flight {
            action,
            attempts,
            since: Instant::now(),
            is_parked: is_retry,
            is_retry,
        };
        self.flights.insert(position, flight);
        let (endpoint, client) = (self.courier.endpoint.clone(), self.courier.client.clone());
        let settings = self.courier.settings.clone();
        self.requests.spawn(async move {
            let public_url = settings.public_url.as_ref();
            let answer = match message(&endpoint, public_url, &event, SystemTime::now()) {
                Ok(message) => client.send(message).await,
                Err(fault) => Answer::failed(fault),
            };
            (position, answer)
        });
    }

    /// Takes the end of a request.
    fn settle(&mut self, position: u64, answer: Answer) {
        let Some(flight) = self.flights.remove(&position) else {
            return;
        };
        if !flight.is_parked {
            self.fresh -= 1;
        }
        if flight.is_retry {
            self.retrying -= 1;
        }
        let attempts = flight.attempts.saturating_add(1);
        self.is_up = matches!(answer, Answer::Accepted(_));
        self.courier.counters.attempted(self.is_up);
        self.log(&answer, attempts);
        let line = self.lines.entry(flight.action).or_default();
        line.is_busy = false;
        match answer {
            Answer::Accepted(_) => {
                if flight.is_parked {
                    self.results.push((position, DeliveryResult::Delivered));
                    self.unpark(position);
                } else {
                    self.window.done(position);
                }
                self.advance(flight.action);
            }
            Answer::Failed {
                failure,
                retry_after,
            } => {
                let result = DeliveryResult::Failed {
                    attempts,
                    wait: self.wait(attempts, retry_after),
                    failure,
                };
                if flight.is_parked {
                    self.results.push((position, result));
                } else {
                    self.park(position, flight.action, result);
                }
            }
            // The event stays where it is.
            Answer::Gone => {
                self.gone.get_or_insert(Instant::now() + MAX_REQUEST);
            }
        }
    }

    /// The time until the next attempt.
    fn wait(&self, attempts: u32, retry_after: Option<Duration>) -> Duration {
        let settings = &self.courier.settings;
        let random = &settings.random;
        let wait = settings.backoff.wait(attempts - 1, Duration::ZERO, random);
        match retry_after {
            // A receiver that asks for ever must not keep the event from being given up. The limit
            // leaves room for the spread, which keeps events from returning together.
            Some(floor) => random.at_least(floor.min(LONGEST_STEP), wait, Duration::MAX),
            None => wait,
        }
        .min(settings.longest_wait())
    }

    /// Records what happened, and holds the endpoint for another `lease`.
    async fn mark(&mut self, lease: Duration, stop: bool) -> Result<(), Lost> {
        let begun = Instant::now();
        let courier = self.courier;
        let position = self.window.position();
        let results = std::mem::take(&mut self.results);
        let request = MarkDeliveries {
            endpoint: courier.endpoint.name().to_owned(),
            holder: courier.holder,
            lease,
            position,
            results: results.clone(),
            give_up_after: courier.settings.give_up_after,
            stop,
        };
        let marked = courier.store.mark_deliveries(request).await;
        let now = Instant::now();
        match marked {
            Ok(Marked::Recorded { dead }) => {
                self.has_failed = false;
                self.marked = position;
                self.held_at = begun;
                self.mark_at = now + MARK_EACH;
                for (_, result) in &results {
                    let wait = match result {
                        DeliveryResult::Failed { wait, .. } => *wait,
                        // One behind it may be due.
                        DeliveryResult::Delivered | DeliveryResult::Behind => Duration::ZERO,
                    };
                    // What is due later than a timer can tell is found by polling.
                    let due = now.checked_add(wait);
                    self.due_at = due.map_or(self.due_at, |due| self.due_at.min(due));
                }
                for position in dead {
                    self.due_at = now;
                    courier.counters.gave_up();
                    self.unpark(position);
                    tracing::warn!(
                        endpoint = courier.endpoint.name(),
                        position,
                        "an event was given up; 'aegis webhooks resend' sends it again"
                    );
                }
                Ok(())
            }
            Ok(Marked::Lost) => Err(Lost),
            Err(error) => {
                self.store_failed(&error);
                // Recording the same again changes nothing more.
                self.results = results;
                self.has_failed = true;
                self.mark_at = now + PAUSE;
                Ok(())
            }
        }
    }

    /// Logs an attempt. The first failure after a quiet time stands out, and so does its end.
    fn log(&mut self, answer: &Answer, attempt: u32) {
        let endpoint = self.courier.endpoint.name();
        let was_quiet = self.failed_at.is_none_or(|at| at.elapsed() >= QUIET);
        match answer {
            Answer::Accepted(status) => {
                let status = status.as_u16();
                tracing::debug!(endpoint, status, attempt, "delivered");
                if was_quiet && self.failed_at.take().is_some() {
                    tracing::info!(endpoint, "webhooks are delivered again");
                }
            }
            Answer::Gone => {
                let status = 410;
                tracing::error!(
                    endpoint,
                    status,
                    attempt,
                    "the receiver is gone; the endpoint is stopped until 'aegis webhooks resume'"
                );
            }
            Answer::Failed { failure, .. } => {
                self.failed_at = Some(Instant::now());
                if was_quiet {
                    tracing::warn!(endpoint, failure, attempt, "a webhook was not delivered");
                } else {
                    tracing::debug!(endpoint, failure, attempt, "a webhook was not delivered");
                }
            }
        }
    }

    fn store_failed(&mut self, error: &StoreError) {
        let endpoint = self.courier.endpoint.name();
        let was_quiet = (self.store_failed_at).is_none_or(|at| at.elapsed() >= QUIET);
        self.store_failed_at = Some(Instant::now());
        if was_quiet {
            tracing::warn!(endpoint, %error, "the store does not answer; webhooks wait");
        } else {
            tracing::debug!(endpoint, %error, "the store does not answer; webhooks wait");
        }
    }
}

/// Leaves out what is not sent, so that what waits takes little memory.
fn small(mut event: Event) -> Event {
    event.action = event.action.map(|action| Box::new(entry(*action)));
    event
}

/// The action that an event belongs to.
fn action_of(event: &Event) -> Uuid {
    let action = event.action.as_ref();
    let id = action.and_then(|action| action.request_id.as_uuid());
    id.or(event.id.as_uuid()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_come_after_5_s_then_ever_later_up_to_an_hour() {
        let settings = Settings::default();
        for _ in 0..200 {
            let mut least = Duration::from_secs(5);
            for retry in 0..40 {
                let wait = settings
                    .backoff
                    .wait(retry, Duration::ZERO, &settings.random);
                assert!(
                    wait >= least && wait <= least.mul_f64(1.25),
                    "{retry}: {wait:?}"
                );
                assert!(wait <= Duration::from_secs(3600), "{retry}: {wait:?}");
                least = (least * 2).min(Duration::from_secs(48 * 60));
            }
        }
    }
}
