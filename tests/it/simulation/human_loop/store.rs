//! The store of the human loop: the in-memory store on simulated time, which writes the history.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use aegis_hitl::protocol::{Claim, Event, EventKind};
use aegis_hitl::store::{
    Acquire, Acquired, Cancel, Cancelled, Clock, Decide, DecideById, Decided, Finish, Finished,
    List, MemoryStore, Page, Renew, Renewed, Store, StoreError, Submit, Submitted, Totals, Watch,
};
use aegis_hitl::{Action, Decision, Execution, RequestId, TenantId};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::super::far_end::StoreFaults;
use super::super::site::Disturbed;
use super::super::world::World;
use super::history::{Conclusion, Entry, Fact, Time, check};
use crate::simulation::client::TENANT;
use crate::support::forward_deliveries;
use crate::support::random::Random;

/// What happened. Clones share it.
#[derive(Clone)]
pub struct History(Arc<Mutex<Inner>>);

struct Inner {
    world: World,
    began: Instant,
    entries: Vec<Entry>,
    actions: HashMap<RequestId, usize>,
    /// Tokens by number: the trace has to repeat itself.
    tokens: HashMap<String, String>,
    runs: usize,
}

impl History {
    pub fn new(world: World) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            world,
            began: Instant::now(),
            entries: Vec::new(),
            actions: HashMap::new(),
            tokens: HashMap::new(),
            runs: 0,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    pub fn now(&self) -> Time {
        self.inner().began.elapsed().as_micros() as Time
    }

    pub fn add(&self, action: &RequestId, fact: Fact) {
        let at = self.now();
        let mut inner = self.inner();
        let next = inner.actions.len();
        let action = *inner.actions.entry(action.clone()).or_insert(next);
        if let Fact::Event { kind, .. } = &fact {
            let note = format_args!("action {action}: {kind}");
            inner.world.note(note);
        } else {
            inner.world.note(format_args!("action {action}: {fact:?}"));
        }
        inner.entries.push(Entry { at, action, fact });
    }

    pub fn conclude(&self, action: &RequestId, conclusion: Conclusion) {
        self.add(action, Fact::Concluded(conclusion));
    }

    /// The name of a token.
    pub fn token(&self, token: &str) -> String {
        let mut inner = self.inner();
        let name = format!("token-{}", inner.tokens.len());
        inner.tokens.entry(token.to_owned()).or_insert(name).clone()
    }

    pub fn next_run(&self) -> usize {
        let mut inner = self.inner();
        inner.runs += 1;
        inner.runs
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.inner().entries.clone()
    }

    pub fn check(&self) -> Vec<String> {
        check(&self.inner().entries)
    }
}

#[derive(Clone)]
pub struct LoopStore {
    shared: Arc<Shared>,
}

struct Shared {
    memory: Mutex<MemoryStore>,
    clock: Clock,
    /// How far the clock was set.
    shown: Mutex<Duration>,
    began: Instant,
    random: Mutex<Random>,
    faults: Mutex<StoreFaults>,
    /// How many events the history has.
    seen: Mutex<u64>,
    history: History,
    /// The clock stands still, as no clock may.
    stands: bool,
}

/// A time in a century in which no clock of a machine is.
pub fn epoch() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(4_102_444_800)
}

fn time(at: SystemTime) -> Time {
    at.duration_since(epoch()).unwrap_or_default().as_micros() as Time
}

impl LoopStore {
    pub fn new(seed: u64, history: History, stands: bool) -> Self {
        let clock = Clock::standing_at(epoch());
        Self {
            shared: Arc::new(Shared {
                memory: Mutex::new(MemoryStore::with_clock(clock.clone())),
                clock,
                shown: Mutex::default(),
                began: Instant::now(),
                random: Mutex::new(Random::new(seed, 12)),
                faults: Mutex::default(),
                seen: Mutex::default(),
                history,
                stands,
            }),
        }
    }

    /// The store, on the time of the simulation.
    fn memory(&self) -> MemoryStore {
        let elapsed = self.shared.began.elapsed();
        let mut shown = self.shared.shown.lock().unwrap();
        if !self.shared.stands {
            self.shared.clock.advance(elapsed - *shown);
            *shown = elapsed;
        }
        self.shared.memory.lock().unwrap().clone()
    }

    /// Draws how long the store takes before and after it does its work, and whether it fails then.
    fn draw(&self) -> [(Duration, bool); 2] {
        let faults = *self.shared.faults.lock().unwrap();
        let mut random = self.shared.random.lock().unwrap();
        [(); 2].map(|()| {
            let slowness = random.millis(0, faults.slowness + 1);
            (slowness, random.percent(faults.errors))
        })
    }

    /// Carries out a request, and writes down what happened, in the order of the store.
    async fn perform<T, F>(
        &self,
        act: impl FnOnce(MemoryStore) -> F + Send + 'static,
        record: impl FnOnce(&History, &T) + Send + 'static,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        let [(before, is_lost), (after, is_unknown)] = self.draw();
        sleep(before).await;
        if is_lost {
            return Err(StoreError::unavailable("the store is out of reach"));
        }
        // A task of its own: what the store was asked to do is not taken back when the server ends.
        let (sender, receiver) = oneshot::channel();
        let this = self.clone();
        tokio::spawn(async move {
            let outcome = act(this.memory()).await;
            this.follow().await;
            if let Ok(outcome) = &outcome {
                record(&this.shared.history, outcome);
            }
            sleep(after).await;
            // A server that has ended reads no answer.
            _ = sender.send(outcome);
        });
        let outcome = receiver.await;
        if is_unknown {
            return Err(StoreError::unavailable("what became of the commit is open"));
        }
        outcome.map_err(|_| StoreError::unavailable("the store has ended"))?
    }

    async fn feed(&self, after: u64) -> Vec<(u64, Event)> {
        let tenant = TenantId::new(TENANT).unwrap();
        self.memory()
            .events(&tenant, after, usize::MAX)
            .await
            .unwrap()
    }

    /// Takes the store's new events into the history.
    async fn follow(&self) {
        let after = *self.shared.seen.lock().unwrap();
        for (position, event) in self.feed(after).await {
            *self.shared.seen.lock().unwrap() = position;
            let action = event.action.as_deref().unwrap();
            let id = event.id.to_string();
            let kind = event.kind;
            let history = &self.shared.history;
            history.add(&action.request_id, Fact::Event { id, kind });
            if let (EventKind::Submitted, Some(end)) = (kind, action.expires_at) {
                history.add(&action.request_id, Fact::Expires(time(end)));
            }
        }
    }

    /// Looks for what is due, as the stores on disk do by themselves.
    pub async fn settle(&self) {
        self.memory().check().await.unwrap();
        self.follow().await;
    }

    /// Writes down what is on record in the end.
    pub async fn audit(&self) {
        self.settle().await;
        let history = &self.shared.history;
        let mut kinds: HashMap<RequestId, Vec<EventKind>> = HashMap::new();
        let mut ids = Vec::new();
        let feed = self.feed(0).await;
        for (_, event) in &feed {
            let id = &event.action.as_ref().unwrap().request_id;
            ids.extend((!kinds.contains_key(id)).then(|| id.clone()));
            kinds.entry(id.clone()).or_default().push(event.kind);
        }
        let tenant = TenantId::new(TENANT).unwrap();
        let totals = self.memory().totals().await.unwrap();
        let world = history.inner().world.clone();
        if totals.events != feed.len() as u64 || totals.actions != ids.len() as u64 {
            world.violation(format_args!("the feed and {totals:?} differ"));
        }
        for id in ids {
            let uuid = id.as_str().parse().unwrap();
            let action = self.memory().look_up(uuid, &tenant).await.unwrap().unwrap();
            let events = action.history.clone().unwrap_or_default();
            let of_action: Vec<_> = events.iter().map(|event| event.kind).collect();
            if kinds[&id] != of_action || !is_left_by(&action, &of_action) {
                world.violation(format_args!("{action:?} has {of_action:?}"));
            }
            history.add(&id, Fact::OnRecord(of_action));
        }
        // What was on record once has to be there: a store that forgets has nothing to show.
        let known: Vec<_> = history.inner().actions.keys().cloned().collect();
        for id in known {
            if !kinds.contains_key(&id) {
                history.add(&id, Fact::OnRecord(Vec::new()));
            }
        }
    }
}

/// Whether an action is as its last event left it.
fn is_left_by(action: &Action, events: &[EventKind]) -> bool {
    use EventKind::*;
    let is = (action.decision, action.execution);
    match events.last() {
        Some(Submitted) => is == (None, None),
        Some(Approved) => is == (Some(Decision::Approve), None),
        Some(Rejected | Expired | Cancelled) => is == (Some(Decision::Reject), None),
        Some(Claimed) => is.1 == Some(Execution::Claimed),
        Some(Completed) => is.1 == Some(Execution::Completed),
        Some(Failed) => is.1 == Some(Execution::Failed),
        Some(ClaimLost) => is.1 == Some(Execution::Unknown),
        _ => false,
    }
}

fn decided(history: &History, decision: Decision, call: Option<RequestId>, decided: &Decided) {
    if let (Decided::Recorded(action), Some(call)) = (decided, call) {
        let call = call.as_str().to_owned();
        history.add(&action.request_id, Fact::Decided { decision, call });
    }
}

fn granted(history: &History, action: &RequestId, claim: &Claim) {
    let fact = Fact::Granted {
        token: history.token(claim.token.as_str()),
        fence: claim.fence,
        until: time(claim.expires_at.unwrap()),
    };
    history.add(action, fact);
}

impl Disturbed for LoopStore {
    fn set_faults(&self, faults: StoreFaults) {
        *self.shared.faults.lock().unwrap() = faults;
    }

    fn forget(&self) {
        let clock = self.shared.clock.clone();
        *self.shared.memory.lock().unwrap() = MemoryStore::with_clock(clock);
        *self.shared.seen.lock().unwrap() = 0;
    }
}

impl Store for LoopStore {
    forward_deliveries!(self, self.memory(), {});

    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        let (decision, call) = (request.decision, request.call_id.clone());
        self.perform(
            move |memory| async move { memory.decide(request).await },
            move |history, outcome| decided(history, decision, call, outcome),
        )
        .await
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        self.perform(
            move |memory| async move { memory.submit(request).await },
            |_, _| {},
        )
        .await
    }

    async fn decide_by_id(&self, request: DecideById) -> Result<Decided, StoreError> {
        let (decision, call) = (request.decision, request.call_id.clone());
        self.perform(
            move |memory| async move { memory.decide_by_id(request).await },
            move |history, outcome| decided(history, decision, call, outcome),
        )
        .await
    }

    async fn cancel(&self, request: Cancel) -> Result<Cancelled, StoreError> {
        let call = request.call_id.clone();
        self.perform(
            move |memory| async move { memory.cancel(request).await },
            move |history, outcome| {
                if let (Cancelled::Recorded(action), Some(call)) = (outcome, call) {
                    let (decision, call) = (Decision::Reject, call.as_str().to_owned());
                    history.add(&action.request_id, Fact::Decided { decision, call });
                }
            },
        )
        .await
    }

    async fn acquire(&self, request: Acquire) -> Result<Acquired, StoreError> {
        self.perform(
            move |memory| async move { memory.acquire(request).await },
            |history, outcome| {
                if let Acquired::Claimed(action, claim) | Acquired::Replayed(action, claim) =
                    outcome
                {
                    granted(history, &action.request_id, claim);
                }
            },
        )
        .await
    }

    async fn renew(&self, request: Renew) -> Result<Renewed, StoreError> {
        let id = RequestId::from(request.id);
        self.perform(
            move |memory| async move { memory.renew(request).await },
            move |history, outcome| {
                if let Renewed::Extended(claim) = outcome {
                    granted(history, &id, claim);
                }
            },
        )
        .await
    }

    async fn finish(&self, request: Finish) -> Result<Finished, StoreError> {
        let token = self.shared.history.token(request.token.as_str());
        self.perform(
            move |memory| async move { memory.finish(request).await },
            move |history, outcome| {
                if let Finished::Recorded(action) | Finished::Replayed(action) = outcome {
                    let execution = action.execution.unwrap();
                    history.add(&action.request_id, Fact::Reported { token, execution });
                }
            },
        )
        .await
    }

    async fn list(&self, request: List) -> Result<Page, StoreError> {
        self.perform(
            move |memory| async move { memory.list(request).await },
            |_, _| {},
        )
        .await
    }

    async fn tenants(
        &self,
        after: Option<&TenantId>,
        limit: usize,
    ) -> Result<Vec<TenantId>, StoreError> {
        let after = after.cloned();
        self.perform(
            move |memory| async move { memory.tenants(after.as_ref(), limit).await },
            |_, _| {},
        )
        .await
    }

    async fn look_up(&self, id: Uuid, tenant: &TenantId) -> Result<Option<Action>, StoreError> {
        let tenant = tenant.clone();
        self.perform(
            move |memory| async move { memory.look_up(id, &tenant).await },
            |_, _| {},
        )
        .await
    }

    async fn events(
        &self,
        tenant: &TenantId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Event)>, StoreError> {
        self.memory().events(tenant, after, limit).await
    }

    async fn newest_event(&self) -> Result<u64, StoreError> {
        self.memory().newest_event().await
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        let tenant = tenant.cloned();
        self.perform(
            move |memory| async move { memory.find(id, tenant.as_ref()).await },
            |_, _| {},
        )
        .await
    }

    fn watch(&self, id: Uuid) -> Watch {
        self.memory().watch(id)
    }

    fn watch_tenant(&self, tenant: &TenantId) -> Watch {
        self.memory().watch_tenant(tenant)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.memory().check().await
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        self.memory().totals().await
    }
}
