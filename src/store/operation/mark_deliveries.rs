//! Recording what became of deliveries to a webhook endpoint.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::take_endpoint::Endpoint;
use super::{Ledger, Operation};
use crate::store::clock::whole_micros;

/// A request to record what became of deliveries. Sending it again changes nothing more.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct MarkDeliveries {
    /// The endpoint's name.
    pub endpoint: String,
    /// Who delivered.
    pub holder: Uuid,
    /// How long the right to deliver lasts from now on. Zero gives it up.
    pub lease: Duration,
    /// The position up to which events are now delivered, parked, or not the endpoint's. It never
    /// moves back.
    pub position: u64,
    /// What became of single events, in the order in which it happened. An event that was delivered
    /// without being parked needs no entry.
    pub results: Vec<(u64, DeliveryResult)>,
    /// How long a parked event is retried before it becomes a dead letter.
    pub give_up_after: Duration,
    /// Whether the endpoint takes nothing any more.
    pub stop: bool,
}

/// What became of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum DeliveryResult {
    /// A parked event was delivered, or is not the endpoint's any more.
    Delivered,
    /// An attempt failed. The event is parked.
    Failed {
        /// The number of attempts, with this one.
        attempts: u32,
        /// The time until the next attempt.
        wait: Duration,
        /// The failure in a few words, without anything confidential.
        failure: String,
    },
    /// The event was not attempted, because an earlier one of its action is parked. It is parked
    /// behind that one.
    Behind,
}

/// The outcome of a [`MarkDeliveries`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Marked {
    /// Everything is recorded.
    Recorded {
        /// The positions of the events that became dead letters.
        dead: Vec<u64>,
    },
    /// Another holder took the endpoint, or it was stopped. Nothing was recorded.
    Lost,
}

/// An event that an endpoint has not received.
#[derive(Debug, Clone)]
pub(crate) struct Undelivered {
    /// The position of the event.
    pub(crate) position: u64,
    /// When it was parked.
    pub(crate) since: SystemTime,
    pub(crate) attempts: u32,
    pub(crate) standing: Standing,
    /// The last failure.
    pub(crate) failure: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is attempted at this time.
    Due(SystemTime),
    /// It waits behind an earlier one of its action.
    Behind,
    /// It became a dead letter at this time.
    Dead(SystemTime),
}

impl Operation for MarkDeliveries {
    type Outcome = Marked;

    fn size(&self) -> usize {
        let failure = |(_, result): &(u64, DeliveryResult)| match result {
            DeliveryResult::Failed { failure, .. } => failure.len(),
            _ => 0,
        };
        self.results.iter().map(|result| 64 + failure(result)).sum()
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Marked, L::Error> {
        let now = ledger.now();
        let endpoint = ledger.endpoint(&self.endpoint)?;
        let held =
            |endpoint: &Endpoint| endpoint.is_held_by(self.holder) && endpoint.stopped_at.is_none();
        let Some(mut endpoint) = endpoint.filter(held) else {
            return Ok(Marked::Lost);
        };
        let mut dead = Vec::new();
        for (position, result) in &self.results {
            if self.settle(&endpoint, *position, result, now, ledger)? {
                dead.push(*position);
            }
        }
        endpoint.position = endpoint.position.max(self.position);
        endpoint.hold(self.holder, now, self.lease);
        if self.stop {
            endpoint.stopped_at = Some(now);
            endpoint.held = None;
            endpoint.left_at = Some(now);
        }
        ledger.update_endpoint(&endpoint)?;
        Ok(Marked::Recorded { dead })
    }
}

impl MarkDeliveries {
    /// Records one result. Returns whether the event became a dead letter.
    fn settle<L: Ledger>(
        &self,
        endpoint: &Endpoint,
        position: u64,
        result: &DeliveryResult,
        now: SystemTime,
        ledger: &mut L,
    ) -> Result<bool, L::Error> {
        let parked = ledger.undelivered(endpoint, position)?;
        let is_dead_letter = |parked: &Undelivered| matches!(parked.standing, Standing::Dead(_));
        if parked.as_ref().is_some_and(is_dead_letter) {
            // It stays one until it is resent.
            return Ok(false);
        }
        match (result, parked) {
            (DeliveryResult::Delivered, Some(_)) => {
                ledger.remove_undelivered(endpoint, position)?;
                advance(endpoint, position, now, ledger)?;
            }
            // It was delivered by then, as this result came before.
            (DeliveryResult::Failed { attempts: 2.., .. }, None) => {}
            (
                DeliveryResult::Failed {
                    attempts,
                    wait,
                    failure,
                },
                parked,
            ) => {
                let since = parked.as_ref().map_or(now, |parked| parked.since);
                let age = now.duration_since(since).unwrap_or_default();
                let is_dead = parked.is_some() && age >= self.give_up_after;
                let undelivered = Undelivered {
                    position,
                    since,
                    attempts: *attempts,
                    standing: if is_dead {
                        Standing::Dead(now)
                    } else {
                        Standing::Due(now.checked_add(*wait).map_or(now, whole_micros))
                    },
                    failure: Some(failure.clone()),
                };
                ledger.set_undelivered(endpoint, &undelivered)?;
                if is_dead {
                    advance(endpoint, position, now, ledger)?;
                }
                return Ok(is_dead);
            }
            (DeliveryResult::Behind, None) => park(endpoint, position, now, ledger)?,
            (DeliveryResult::Delivered, None) | (DeliveryResult::Behind, Some(_)) => {}
        }
        Ok(false)
    }
}

/// Parks an event that was not attempted: behind what is parked of its action, if anything still is.
pub(super) fn park<L: Ledger>(
    endpoint: &Endpoint,
    position: u64,
    now: SystemTime,
    ledger: &mut L,
) -> Result<(), L::Error> {
    let undelivered = Undelivered {
        position,
        since: now,
        attempts: 0,
        standing: match ledger.first_parked(endpoint, position)? {
            Some(_) => Standing::Behind,
            None => Standing::Due(now),
        },
        failure: None,
    };
    ledger.set_undelivered(endpoint, &undelivered)
}

/// Lets the first parked event of the same action be attempted, now that the one at `position` is
/// out of its way.
fn advance<L: Ledger>(
    endpoint: &Endpoint,
    position: u64,
    now: SystemTime,
    ledger: &mut L,
) -> Result<(), L::Error> {
    let first = ledger.first_parked(endpoint, position)?;
    if let Some(mut next) = first.filter(|next| next.standing == Standing::Behind) {
        next.standing = Standing::Due(now);
        ledger.set_undelivered(endpoint, &next)?;
    }
    Ok(())
}
