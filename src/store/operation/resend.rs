//! What an operator does about dead letters and stopped endpoints.

use uuid::Uuid;

use super::mark_deliveries::park;
use super::{Ledger, Operation};

/// A request to deliver dead letters after all.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Resend {
    /// The endpoint's name.
    pub endpoint: String,
    /// The ids of the events, or `None` for all.
    pub events: Option<Vec<Uuid>>,
}

/// The outcome of a [`Resend`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Resent {
    /// This number of dead letters is parked again, and due at once.
    Parked(usize),
    /// There is no such endpoint on record.
    NotFound,
}

impl Operation for Resend {
    type Outcome = Resent;

    fn size(&self) -> usize {
        self.events.as_ref().map_or(0, |events| 16 * events.len())
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Resent, L::Error> {
        let now = ledger.now();
        let Some(endpoint) = ledger.endpoint(&self.endpoint)? else {
            return Ok(Resent::NotFound);
        };
        let dead = ledger.dead(&endpoint)?;
        let is_asked_for =
            |event: &Uuid| (self.events.as_ref()).is_none_or(|events| events.contains(event));
        let mut resent = 0;
        for (position, _) in dead.into_iter().filter(|(_, event)| is_asked_for(event)) {
            park(&endpoint, position, now, ledger)?;
            resent += 1;
        }
        Ok(Resent::Parked(resent))
    }
}

/// A request to deliver to a stopped endpoint again.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Resume {
    /// The endpoint's name.
    pub endpoint: String,
}

/// The outcome of a [`Resume`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Resumed {
    /// Deliveries go on where they stopped.
    Resumed,
    /// The endpoint was not stopped.
    NotStopped,
    /// There is no such endpoint on record.
    NotFound,
}

impl Operation for Resume {
    type Outcome = Resumed;

    fn size(&self) -> usize {
        0
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Resumed, L::Error> {
        let Some(mut endpoint) = ledger.endpoint(&self.endpoint)? else {
            return Ok(Resumed::NotFound);
        };
        if endpoint.stopped_at.take().is_none() {
            return Ok(Resumed::NotStopped);
        }
        // It has as long as any other to be taken before its events may go.
        endpoint.left_at = Some(ledger.now());
        ledger.update_endpoint(&endpoint)?;
        Ok(Resumed::Resumed)
    }
}
