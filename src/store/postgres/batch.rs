//! Recording new actions, many in one transaction.
//!
//! Most actions are new. Those that come in while a transaction is committed share the next one. A
//! transaction costs the database as much as some 16 actions do, however few it has, so it pays to wait
//! a little for others:
//!
//! - Callers who were just answered come back one by one. The first of them waits for the others, but
//!   no longer than their transaction took.
//! - A second transaction begins beside the first one once it has as many actions, and is worth its
//!   cost: at once for a [`FEW`] callers, and from [`SECOND`] actions on for many.
//!
//! Nobody waits for that longer than [`GATHERING`], and whoever comes alone waits for nobody.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use uuid::Uuid;

use super::Inner;
use super::fault::Fault;
use super::load::Located;
use super::loaded::Loaded;
use super::session::Session;
use super::transact::{Doubt, Proof};
use super::wall::Scope;
use super::write;
use crate::store::StoreError;

/// The most actions in one transaction.
const MAX_ACTIONS: usize = 256;

/// The most bytes of their payloads, but for one action.
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// How long a transaction may take before its actions are looked up one by one.
const PATIENCE: Duration = Duration::from_secs(6);

/// How many transactions are open at once: while one waits for the disk, another is sent.
const LANES: usize = 2;

/// The longest time that an action waits for others.
const GATHERING: Duration = Duration::from_millis(5);

/// The fewest actions of a second transaction, unless they have waited that long. With 32 callers, one
/// transaction after the other records as many as two at once, for three quarters of the processor
/// time.
const SECOND: usize = 32;

/// So few callers do not use the processors up, and none of them waits for another.
const FEW: usize = 4;

/// The new actions that wait for a transaction.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<Waiting<Newcomer>>,
    arrived: Notify,
    caution: Caution,
}

/// Whether the actions of a transaction are looked up before they are inserted.
///
/// It takes a tenth of the time of an insert. Without it, one action that is on record makes the
/// database insert all others of its transaction twice, and leaves as many dead rows. So they are
/// looked up for a while after one was met.
///
/// Without it the transaction also takes a second number of PostgreSQL's, as the insert that may fail
/// is a transaction within. Numbers come to their end, so a few actions are looked up always.
#[derive(Debug, Default)]
struct Caution(AtomicU32);

/// For how many transactions.
const CAREFUL: u32 = 64;

/// How many actions are looked up always.
const SMALL: usize = 8;

impl Caution {
    fn is_careful(&self, actions: usize) -> bool {
        actions <= SMALL || self.0.load(Ordering::Relaxed) > 0
    }

    /// Notes whether all actions of a transaction were new.
    fn learn(&self, all_new: bool) {
        if all_new {
            let one_less = |left: u32| left.checked_sub(1);
            let _ = (self.0).fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        } else {
            self.0.store(CAREFUL, Ordering::Relaxed);
        }
    }
}

/// What waits, and what is under way.
#[derive(Debug)]
struct Waiting<T> {
    newcomers: Vec<T>,
    /// When the first of them came.
    since: Option<Instant>,
    /// The open transaction of each lane.
    open: [Option<Open>; LANES],
    last: Option<Ended>,
}

/// A transaction that is under way.
#[derive(Debug, Clone, Copy)]
struct Open {
    actions: usize,
    begun: Instant,
}

/// The transaction that ended last.
#[derive(Debug, Clone, Copy)]
struct Ended {
    /// The number of actions that the next one waits for.
    awaited: usize,
    /// Until when.
    returning: Instant,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self {
            newcomers: Vec::new(),
            since: None,
            open: [None; LANES],
            last: None,
        }
    }
}

/// Whether a transaction may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ready {
    Now,
    /// At the latest then.
    At(Instant),
    /// Nobody waits.
    Idle,
}

impl<T> Waiting<T> {
    fn add(&mut self, newcomer: T, now: Instant) {
        self.newcomers.push(newcomer);
        self.since.get_or_insert(now);
    }

    fn begin(&mut self, lane: usize, actions: usize, now: Instant) {
        if let Some(open) = self.open.get_mut(lane) {
            *open = Some(Open {
                actions,
                begun: now,
            });
        }
    }

    /// Notes that the transaction of a lane has ended, if there was one.
    fn end(&mut self, lane: usize, now: Instant) {
        if let Some(Open { actions, begun }) = self.open.get_mut(lane).and_then(Option::take) {
            // All who call make one transaction, if they are few. If they are many, those who wait now
            // are on their way to the other lane.
            let all = actions + self.newcomers.len();
            self.last = Some(Ended {
                awaited: actions.max(all.min(SECOND)),
                returning: now + (now - begun).min(GATHERING),
            });
        }
    }

    fn is_ready(&self, now: Instant) -> Ready {
        let Some(since) = self.since else {
            return Ready::Idle;
        };
        let largest = self.open.iter().flatten().map(|open| open.actions).max();
        let awaited = self.last.map_or(0, |last| last.awaited);
        let are_many = largest.unwrap_or(0).max(awaited) > FEW;
        let (enough, until) = match (largest, self.last) {
            (Some(actions), _) if are_many => {
                (actions.clamp(SECOND, MAX_ACTIONS), since + GATHERING)
            }
            (None, Some(last)) if are_many => (awaited, last.returning.min(since + GATHERING)),
            (open, _) => (open.unwrap_or(0), since + GATHERING),
        };
        if self.newcomers.len() >= enough || now >= until {
            Ready::Now
        } else {
            Ready::At(until)
        }
    }
}

/// A new action with its event, and whoever waits for it.
#[derive(Debug)]
struct Newcomer {
    loaded: Box<Loaded>,
    reply: oneshot::Sender<Verdict>,
}

/// What became of a new action.
#[derive(Debug)]
enum Verdict {
    Recorded,
    /// Its identity is on record, or the transaction failed without recording anything.
    NotRecorded,
    Unknown,
}

impl Newcomer {
    /// The tenant, thread and key: the order of the unique index, in which all transactions insert,
    /// so that no two wait for each other.
    fn identity(&self) -> [Option<&str>; 3] {
        let action = self
            .loaded
            .actions
            .first()
            .map(|loading| &loading.record.action);
        [
            action
                .and_then(|action| action.tenant_id.as_ref())
                .map(|tenant| tenant.as_str()),
            action
                .and_then(|action| action.thread_id.as_ref())
                .map(|thread| thread.as_str()),
            action
                .and_then(|action| action.idempotency_key.as_ref())
                .map(|key| key.as_str()),
        ]
    }

    fn size(&self) -> usize {
        self.loaded
            .actions
            .iter()
            .map(|action| action.record.size())
            .sum()
    }

    fn id(&self) -> Option<Uuid> {
        self.loaded.actions.first().map(|action| action.key.1)
    }
}

impl Queue {
    /// Wakes a task, so that it sees that the store is gone.
    pub(super) fn stop(&self) {
        self.arrived.notify_one();
    }

    fn push(&self, newcomer: Newcomer) {
        let mut state = self.state();
        let now = Instant::now();
        let is_first = state.since.is_none();
        state.add(newcomer, now);
        // Whoever waits for the first learns until when to wait for the others.
        let is_news = is_first || state.is_ready(now) == Ready::Now;
        drop(state);
        if is_news {
            self.arrived.notify_one();
        }
    }

    /// Takes the newcomers of the next transaction of a lane, once it may begin. No identity is among
    /// them twice.
    async fn next(&self, lane: usize) -> Option<Vec<Newcomer>> {
        let ready = {
            let mut state = self.state();
            let now = Instant::now();
            state.end(lane, now);
            state.is_ready(now)
        };
        match ready {
            Ready::Now => {}
            Ready::At(moment) => {
                // Either way the state is looked at anew.
                let _ = tokio::time::timeout_at(moment, self.arrived.notified()).await;
                return None;
            }
            Ready::Idle => {
                self.arrived.notified().await;
                return None;
            }
        }
        let taken = self.take(lane);
        (!taken.is_empty()).then_some(taken)
    }

    fn take(&self, lane: usize) -> Vec<Newcomer> {
        let mut state = self.state();
        let mut bytes = 0;
        let all = state.newcomers.iter().take(MAX_ACTIONS);
        let fitting = all.take_while(|newcomer| {
            let fits = bytes == 0 || bytes + newcomer.size() <= MAX_BYTES;
            bytes += newcomer.size().max(1);
            fits
        });
        let fitting = fitting.count();
        let mut taken: Vec<_> = state.newcomers.drain(..fitting).collect();
        state.begin(lane, taken.len(), Instant::now());
        if state.newcomers.is_empty() {
            state.since = None;
        } else {
            self.arrived.notify_one();
        }
        drop(state);
        taken.sort_by(|one, other| one.identity().cmp(&other.identity()));
        taken
    }

    fn state(&self) -> MutexGuard<'_, Waiting<Newcomer>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Runs an operation that may record a new action. On the way it is taken for new, which costs
    /// nothing if it is not: then it runs on what is on record.
    pub(super) async fn record<O: Located>(&self, operation: &O) -> Result<O::Outcome, StoreError> {
        let Some(queue) = &self.queue else {
            return self.transact(operation, Vec::new()).await;
        };
        let mut loaded = Loaded::at(self.state.now());
        let outcome = match operation.apply(&mut loaded) {
            Ok(outcome) if !loaded.events.is_empty() => outcome,
            _ => return self.transact(operation, Vec::new()).await,
        };
        let proof = Proof::of(&loaded.events);
        let (reply, verdict) = oneshot::channel();
        // It is moved and sorted with others.
        let loaded = Box::new(loaded);
        queue.push(Newcomer { loaded, reply });
        match (verdict.await, proof) {
            (Ok(Verdict::Recorded), _) => Ok(outcome),
            (Ok(Verdict::NotRecorded), _) | (_, None) => self.transact(operation, Vec::new()).await,
            (Ok(Verdict::Unknown) | Err(_), Some(proof)) => {
                self.transact(operation, vec![Doubt { proof, outcome }])
                    .await
            }
        }
    }

    /// Starts the tasks that record new actions. They end with the store.
    pub(super) fn start_lanes(self: &Arc<Self>) {
        let Some(queue) = &self.queue else {
            return;
        };
        for lane in 0..LANES {
            let (queue, store) = (queue.clone(), Arc::downgrade(self));
            tokio::spawn(async move {
                // The store is not held while nobody waits.
                while Weak::strong_count(&store) > 0 {
                    let Some(batch) = queue.next(lane).await else {
                        continue;
                    };
                    let Some(store) = Weak::upgrade(&store) else {
                        break;
                    };
                    store.record_all(batch, &queue.caution).await;
                }
                // One wakes the next.
                queue.stop();
            });
        }
    }

    async fn record_all(&self, batch: Vec<Newcomer>, caution: &Caution) {
        let recorded = tokio::time::timeout(PATIENCE, self.try_record(&batch, caution)).await;
        // The connection is closed with the attempt, and its transaction ends by itself.
        let recorded =
            recorded.unwrap_or_else(|_| Err(Fault::unknown("the database did not answer in time")));
        if let Err(Fault::Unknown(_)) = recorded {
            self.state.set_unsure();
        }
        for newcomer in batch {
            let verdict = match &recorded {
                Ok(ids) if newcomer.id().is_some_and(|id| ids.contains(&id)) => Verdict::Recorded,
                Ok(_) | Err(Fault::Again(_) | Fault::Refused(_)) => Verdict::NotRecorded,
                Err(Fault::Unknown(_)) => Verdict::Unknown,
            };
            // Announced before it is answered, so that whoever is answered has caused no wake-up still
            // to come.
            match verdict {
                Verdict::Recorded => self.recorded(&newcomer.loaded.events),
                Verdict::Unknown => self.wake(&newcomer.loaded.events),
                Verdict::NotRecorded => {}
            }
            // The caller may be gone.
            let _ = newcomer.reply.send(verdict);
        }
    }

    /// Records a batch in one transaction, all of whose statements are sent together. Returns the ids
    /// of the actions that were new.
    async fn try_record(
        &self,
        batch: &[Newcomer],
        caution: &Caution,
    ) -> Result<HashSet<Uuid>, Fault> {
        let new: Vec<_> = batch
            .iter()
            .flat_map(|newcomer| newcomer.loaded.new_actions())
            .collect();
        self.follower.expect(new.iter().map(|(_, event)| *event));
        let mut tenants: Vec<_> = new.iter().map(|(action, _)| &action.key.0).collect();
        // The actions are in the order of their identities.
        tenants.dedup();
        let session = Session::open(&self.pool, Scope::Only(&tenants)).await?;
        let (unsure, begun) = (self.state.doubts(), std::time::Instant::now());
        let (started, inserted, committed) = tokio::join!(
            biased;
            session.begin_batch(),
            write::insert(&session, &new, caution.is_careful(new.len())),
            session.commit(),
        );
        // Outside of a transaction, the others would have been carried out one by one.
        started.map_err(|fault| Fault::Unknown(fault.into_error()))?;
        let inserted = inserted.map_err(Fault::before_commit)?;
        caution.learn(inserted.len() == new.len());
        committed?;
        write::finish(session)?;
        // A transaction that inserted nothing had nothing to make durable.
        if !inserted.is_empty() {
            self.state.set_written(unsure, begun);
        }
        self.state.commits.add(begun.elapsed());
        Ok(inserted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: fn() -> Instant = Instant::now;

    fn waiting(newcomers: usize, open: [usize; LANES]) -> Waiting<()> {
        let mut waiting = Waiting::default();
        for _ in 0..newcomers {
            waiting.add((), NOW());
        }
        for (lane, actions) in open
            .into_iter()
            .enumerate()
            .filter(|(_, actions)| *actions > 0)
        {
            waiting.begin(lane, actions, NOW());
        }
        waiting
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_where_no_transaction_is_open() {
        assert_eq!(waiting(0, [0, 0]).is_ready(NOW()), Ready::Idle);
        assert_eq!(waiting(1, [0, 0]).is_ready(NOW()), Ready::Now);
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_transaction_begins_with_as_many_as_the_first_one_has() {
        let soon = Ready::At(NOW() + GATHERING);
        assert_eq!(waiting(39, [40, 0]).is_ready(NOW()), soon);
        assert_eq!(waiting(40, [40, 0]).is_ready(NOW()), Ready::Now);
        assert_eq!(
            waiting(MAX_ACTIONS, [0, 10 * MAX_ACTIONS]).is_ready(NOW()),
            Ready::Now
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_transaction_is_not_begun_for_a_part_of_many() {
        let soon = Ready::At(NOW() + GATHERING);
        assert_eq!(waiting(SECOND - 1, [FEW + 1, 0]).is_ready(NOW()), soon);
        assert_eq!(waiting(SECOND, [FEW + 1, 0]).is_ready(NOW()), Ready::Now);
        // The rest of many is open.
        let mut waiting = waiting(1, [0, 1]);
        waiting.last = Some(Ended {
            awaited: SECOND,
            returning: NOW(),
        });
        assert_eq!(waiting.is_ready(NOW()), soon);
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_callers_do_not_wait_for_each_other() {
        assert_eq!(waiting(1, [1, 0]).is_ready(NOW()), Ready::Now);
        assert_eq!(waiting(FEW, [FEW, 0]).is_ready(NOW()), Ready::Now);
        let mut waiting = waiting(0, [FEW, 0]);
        waiting.end(0, NOW());
        waiting.add((), NOW());
        assert_eq!(waiting.is_ready(NOW()), Ready::Now);
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_were_answered_are_awaited_as_long_as_their_transaction_took() {
        let took = Duration::from_millis(3);
        let mut waiting = waiting(0, [8, 0]);
        tokio::time::advance(took).await;
        waiting.end(0, NOW());
        let ended = NOW();
        tokio::time::advance(took / 3).await;
        for _ in 0..7 {
            waiting.add((), NOW());
        }
        assert_eq!(waiting.is_ready(NOW()), Ready::At(ended + took));
        waiting.add((), NOW());
        assert_eq!(waiting.is_ready(NOW()), Ready::Now);
        waiting.newcomers.truncate(1);
        tokio::time::advance(took).await;
        assert_eq!(waiting.is_ready(NOW()), Ready::Now);
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_callers_share_one_transaction_and_many_do_not() {
        for (waiting_meanwhile, open, awaited) in
            [(12, 20, 32), (4, 8, 12), (20, 20, 32), (32, 40, 40)]
        {
            let mut waiting = waiting(waiting_meanwhile, [open, 0]);
            tokio::time::advance(Duration::from_millis(3)).await;
            waiting.end(0, NOW());
            let last = waiting.last.map(|last| last.awaited);
            assert_eq!(last, Some(awaited), "{open}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_awaited_for_long_after_a_transaction_that_hung() {
        let mut waiting = waiting(0, [8, 0]);
        tokio::time::advance(PATIENCE).await;
        waiting.end(0, NOW());
        waiting.add((), NOW());
        assert_eq!(waiting.is_ready(NOW()), Ready::At(NOW() + GATHERING));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waited_beside_a_transaction_waits_no_longer_after_it() {
        let mut waiting = waiting(1, [8, 0]);
        let since = NOW();
        tokio::time::advance(GATHERING - Duration::from_millis(1)).await;
        waiting.end(0, NOW());
        assert_eq!(waiting.is_ready(NOW()), Ready::At(since + GATHERING));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_comes_alone_again_and_again_never_waits() {
        let mut waiting = waiting(0, [1, 0]);
        tokio::time::advance(Duration::from_millis(3)).await;
        waiting.end(0, NOW());
        waiting.add((), NOW());
        assert_eq!(waiting.is_ready(NOW()), Ready::Now);
    }

    #[test]
    fn actions_are_looked_up_for_a_while_after_one_was_on_record() {
        let caution = Caution::default();
        assert!(!caution.is_careful(SMALL + 1));
        assert!(caution.is_careful(SMALL));
        caution.learn(false);
        for _ in 0..CAREFUL - 1 {
            caution.learn(true);
        }
        assert!(caution.is_careful(SMALL + 1));
        caution.learn(true);
        assert!(!caution.is_careful(SMALL + 1));
        caution.learn(true);
        assert!(!caution.is_careful(SMALL + 1));
    }

    #[tokio::test(start_paused = true)]
    async fn an_action_waits_for_others_no_longer_than_a_bound() {
        let waiting = waiting(1, [32, 0]);
        tokio::time::advance(GATHERING - Duration::from_millis(1)).await;
        assert_ne!(waiting.is_ready(NOW()), Ready::Now);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(waiting.is_ready(NOW()), Ready::Now);
    }
}
