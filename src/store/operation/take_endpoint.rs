//! Taking a webhook endpoint, so that one server at a time delivers to it.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::{Lease, Ledger, Operation};

/// Where a new endpoint begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Start {
    /// Behind the newest event.
    #[default]
    Now,
    /// At the oldest event on record.
    Oldest,
}

/// A request for the right to deliver to an endpoint, which is put on record if it is new.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct TakeEndpoint {
    /// The endpoint's name, which is its identity.
    pub endpoint: String,
    /// Where the endpoint begins if it is new.
    pub start: Start,
    /// Who delivers. A holder may take again what it holds.
    pub holder: Uuid,
    /// How long the right lasts, unless it is extended.
    pub lease: Duration,
}

/// The outcome of a [`TakeEndpoint`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum EndpointTaken {
    /// The caller alone may deliver until the lease ends.
    Taken {
        /// The position up to which events are delivered, parked, or not the endpoint's.
        position: u64,
        /// The positions of the parked events, in order, each with the id of its action.
        parked: Vec<(u64, Uuid)>,
    },
    /// Another holder's lease lasts.
    Held,
    /// The endpoint was stopped. It takes nothing until it is resumed.
    Stopped,
}

/// An endpoint as it is on record.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    /// The number of the endpoint's row.
    pub(crate) row: i64,
    /// The position up to which events are delivered, parked, or not the endpoint's.
    pub(crate) position: u64,
    /// Who delivers, and until when.
    pub(crate) held: Option<(Uuid, SystemTime)>,
    pub(crate) stopped_at: Option<SystemTime>,
    /// When it was given up by the last one that delivered. `None` while one does, or if that is
    /// unknown.
    pub(crate) left_at: Option<SystemTime>,
}

impl Endpoint {
    /// Whether this holder may record deliveries.
    pub(super) fn is_held_by(&self, holder: Uuid) -> bool {
        self.held.is_some_and(|(held, _)| held == holder)
    }

    /// Lets the holder keep the endpoint for `lease` from now on; zero releases it.
    pub(super) fn hold(&mut self, holder: Uuid, now: SystemTime, lease: Duration) {
        self.held = (!lease.is_zero()).then(|| (holder, Lease::end(now, lease)));
        self.left_at = lease.is_zero().then_some(now);
    }

    /// Whether a sweep keeps the events that the endpoint has not received. One that was stopped, or
    /// that no server has held since `before`, is given up.
    pub(super) fn keeps_events(&self, before: SystemTime) -> bool {
        let left_at = self.held.map(|(_, until)| until).or(self.left_at);
        self.stopped_at.is_none() && left_at.is_none_or(|left_at| left_at > before)
    }
}

impl Operation for TakeEndpoint {
    type Outcome = EndpointTaken;

    fn size(&self) -> usize {
        0
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<EndpointTaken, L::Error> {
        let now = ledger.now();
        let mut endpoint = match ledger.endpoint(&self.endpoint)? {
            Some(endpoint) => endpoint,
            None => {
                let position = match self.start {
                    Start::Now => ledger.newest_event()?,
                    Start::Oldest => 0,
                };
                ledger.insert_endpoint(&self.endpoint, position)?
            }
        };
        if endpoint.stopped_at.is_some() {
            return Ok(EndpointTaken::Stopped);
        }
        let is_others = |(holder, until): (Uuid, SystemTime)| holder != self.holder && until > now;
        if endpoint.held.is_some_and(is_others) {
            return Ok(EndpointTaken::Held);
        }
        endpoint.hold(self.holder, now, self.lease);
        ledger.update_endpoint(&endpoint)?;
        Ok(EndpointTaken::Taken {
            position: endpoint.position,
            parked: ledger.parked(&endpoint)?,
        })
    }
}
