//! Removing actions that are over, so that a store does not grow for ever.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::{Endpoint, Ledger, Operation, Record};
use crate::protocol::{Action, Closed, Decision, Digest, Execution, Status};
use crate::store::Identity;

/// The longest time until an action that had to stay is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);

/// The events that are read at once. Most steps do not get further.
const READ: usize = 32;

/// The events that a step looks at, however long that takes, if it removes nothing.
const LEAST_LOOKS: usize = 16;

/// The most bytes of what was written with the actions that a step removes, but for one action.
const MAX_BYTES: usize = 1024 * 1024;

/// How long a step goes on while other requests wait, but for one action.
const MAX_TIME: Duration = Duration::from_millis(1);

/// How long a step goes on while nobody waits. A commit costs as much for one action as for ten, so
/// long steps remove several times as many a second.
const MAX_IDLE_TIME: Duration = Duration::from_millis(10);

/// A request to remove some of the actions that have been over for a time.
///
/// An action is over when it was rejected, expired or cancelled, when its execution is completed,
/// and when it was approved and nobody has claimed it. Pending, claimed and failed actions stay,
/// however old they are. The time counts from the action's newest event.
///
/// An action also stays while a webhook endpoint has not come to one of its events, or has one
/// parked. A stopped endpoint keeps nothing, and neither does one that no server has held for as
/// long as the retention. The newest action and the newest event always stay.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Sweep {
    /// How long actions stay that are over.
    pub retention: Duration,
    /// The most actions to remove. A store may remove fewer at a time, so as to delay no decision.
    pub limit: usize,
}

/// The outcome of a [`Sweep`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs)]
pub struct Swept {
    /// The number of actions that were removed.
    pub removed: usize,
    /// Whether more may be removed now.
    pub has_more: bool,
}

/// What stays of an action that was removed, apart from its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tombstone {
    pub(crate) request_id: Uuid,
    pub(crate) decision: Decision,
    pub(crate) execution: Option<Execution>,
    pub(crate) closed: Option<Closed>,
    /// The digest of the payload as it was submitted.
    pub(crate) submitted_digest: Option<Digest>,
    /// The digest of the payload as the reviewer edited it.
    pub(crate) edited_digest: Option<Digest>,
    pub(crate) created_at: SystemTime,
    pub(crate) decided_at: SystemTime,
}

impl Tombstone {
    /// The digest of what was to be run.
    pub(super) fn digest(&self) -> Option<&Digest> {
        self.edited_digest
            .as_ref()
            .or(self.submitted_digest.as_ref())
    }

    /// The action, as far as it is known.
    pub(super) fn action(&self, identity: &Identity) -> Action {
        let mut action = Action::new(self.request_id.into(), Status::Committed);
        action.tenant_id = Some(identity.tenant_id.clone());
        action.thread_id = Some(identity.thread_id.clone());
        action.idempotency_key = Some(identity.idempotency_key.clone());
        action.decision = Some(self.decision);
        action.execution = self.execution;
        action.closed = self.closed;
        action.digest = self.digest().copied();
        action.created_at = Some(self.created_at);
        action.decided_at = Some(self.decided_at);
        action
    }
}

/// The newest event of an action, which a sweep looks at.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Aged {
    /// Nobody else is at its action.
    Free {
        /// The row of the action.
        row: i64,
        /// The size of what was written with the action, in bytes.
        size: usize,
    },
    /// Another transaction is at its action, and may change it.
    #[cfg(feature = "postgres")]
    Busy,
}

impl Operation for Sweep {
    type Outcome = Swept;

    fn size(&self) -> usize {
        0
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Swept, L::Error> {
        let mut step = Step::begin(self, ledger)?;
        let mut has_more = step.go_on(ledger)?;
        has_more |= step.look_again(ledger)?;
        if step.position != step.start || step.removed > 0 {
            ledger.set_swept(step.position)?;
        }
        Ok(Swept {
            removed: step.removed,
            has_more,
        })
    }
}

/// One application of a [`Sweep`].
struct Step {
    now: SystemTime,
    /// Events up to this time are old enough.
    before: SystemTime,
    /// When what had to stay is looked at again.
    again: SystemTime,
    /// The endpoints that keep what they have not received.
    endpoints: Vec<Endpoint>,
    /// The position up to which earlier steps have come, and this one.
    start: u64,
    position: u64,
    /// The position of the newest event that may be removed.
    last: u64,
    /// The position of the newest event that is known to be in the audit chain.
    chained: u64,
    /// The position of the newest event.
    newest: u64,
    /// The row of the newest action, which must stay: no later one may get its number.
    newest_row: Option<i64>,
    limit: usize,
    removed: usize,
    /// The number of events that were looked at.
    looks: usize,
    bytes: usize,
    begun: Instant,
}

impl Step {
    fn begin<L: Ledger>(sweep: &Sweep, ledger: &L) -> Result<Self, L::Error> {
        let begun = Instant::now();
        let now = ledger.now();
        let before = now.checked_sub(sweep.retention).unwrap_or(UNIX_EPOCH);
        let again = before + sweep.retention.min(LOOK_AGAIN);
        let mut endpoints = ledger.endpoints()?;
        endpoints.retain(|endpoint| endpoint.keeps_events(before));
        let (newest, start) = (ledger.newest_event()?, ledger.swept()?);
        let received = endpoints.iter().map(|endpoint| endpoint.position).min();
        let last = newest.saturating_sub(1);
        Ok(Self {
            now,
            before,
            again,
            start,
            position: start,
            last: received.map_or(last, |received| received.min(last)),
            endpoints,
            chained: 0,
            newest,
            newest_row: ledger.newest_action()?,
            limit: sweep.limit.max(1),
            removed: 0,
            looks: 0,
            bytes: MAX_BYTES,
            begun,
        })
    }

    /// Whether decisions should not wait any longer. However slow the machine is, each step gets
    /// something done, or else it would not end.
    fn is_over<L: Ledger>(&self, ledger: &L) -> bool {
        if self.removed >= self.limit || self.bytes == 0 {
            return true;
        }
        if self.removed == 0 && self.looks < LEAST_LOOKS {
            return false;
        }
        let elapsed = self.begun.elapsed();
        elapsed >= MAX_IDLE_TIME || elapsed >= MAX_TIME && ledger.others_wait()
    }

    /// Looks at events in order, from where the last step stopped. Returns whether there are more to
    /// look at now.
    fn go_on<L: Ledger>(&mut self, ledger: &mut L) -> Result<bool, L::Error> {
        while self.position < self.last {
            let events = ledger.events_between(self.position, self.last, READ)?;
            if events.is_empty() {
                return Ok(false);
            }
            for (next, at) in events {
                if at > self.before {
                    // A time to come means that the clock was wrong then, or is now. If newer events
                    // have present times, the event must not keep the others until then.
                    let is_ahead = at > self.now && self.newest_is_past(ledger)?;
                    if !is_ahead {
                        return Ok(false);
                    }
                    ledger.postpone(next, at)?;
                } else if self.is_chained(next, ledger)? {
                    self.look(next, ledger)?;
                } else {
                    return Ok(true);
                }
                self.position = next;
                if self.is_over(ledger) {
                    return Ok(self.position < self.last);
                }
            }
        }
        Ok(false)
    }

    /// Looks again at what had to stay. Returns whether there is more to look at now.
    fn look_again<L: Ledger>(&mut self, ledger: &mut L) -> Result<bool, L::Error> {
        if self.is_over(ledger) {
            // The next step finds out.
            return Ok(true);
        }
        let most = self.limit.min(READ);
        let postponed = ledger.postponed(self.before, most)?;
        let mut left = postponed.len();
        let has_more = left >= most;
        for (until, position) in postponed {
            if !self.is_chained(position, ledger)? {
                return Ok(true);
            }
            left -= 1;
            ledger.remove_postponed(until, position)?;
            self.look(position, ledger)?;
            if self.is_over(ledger) {
                return Ok(has_more || left > 0);
            }
        }
        Ok(has_more)
    }

    /// Whether an event is in the audit chain, which must keep its link.
    fn is_chained<L: Ledger>(&mut self, position: u64, ledger: &mut L) -> Result<bool, L::Error> {
        if position > self.chained {
            self.chained = ledger.chain_towards(position)?;
        }
        Ok(position <= self.chained)
    }

    /// Whether the time of the newest event is not to come.
    fn newest_is_past<L: Ledger>(&self, ledger: &L) -> Result<bool, L::Error> {
        let newest = ledger.events_between(self.newest.saturating_sub(1), self.newest, 1)?;
        Ok(newest.first().is_some_and(|(_, at)| *at <= self.now))
    }

    /// Removes the action of an event that is old enough, if the event is its newest and it is over.
    fn look<L: Ledger>(&mut self, position: u64, ledger: &mut L) -> Result<(), L::Error> {
        self.looks += 1;
        let (row, size) = match ledger.aged(position)? {
            Some(Aged::Free { row, size }) => (row, size),
            #[cfg(feature = "postgres")]
            Some(Aged::Busy) => return ledger.postpone(position, self.again),
            None => return Ok(()),
        };
        let Some(record) = ledger.outline(row)?.filter(is_over) else {
            return Ok(());
        };
        if self.must_stay(position, row, ledger)? {
            return ledger.postpone(position, self.again);
        }
        ledger.remove(&record)?;
        self.removed += 1;
        self.bytes = self.bytes.saturating_sub(size);
        Ok(())
    }

    fn must_stay<L: Ledger>(&self, position: u64, row: i64, ledger: &L) -> Result<bool, L::Error> {
        if position > self.last || self.newest_row == Some(row) {
            return Ok(true);
        }
        for endpoint in &self.endpoints {
            if ledger.first_parked(endpoint, position)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether nothing more is expected to happen to an action.
fn is_over(record: &Record) -> bool {
    let action = &record.action;
    action.status == Status::Committed
        && match action.decision {
            Some(Decision::Reject) => true,
            Some(Decision::Approve) => {
                matches!(action.execution, None | Some(Execution::Completed))
            }
            None => false,
        }
}
