//! Forgetting a webhook endpoint that is not configured any more.

use std::time::SystemTime;

use super::{Ledger, Operation};

/// A request to remove an endpoint from the record: how far it came, its parked events, and its dead
/// letters.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Forget {
    /// The endpoint's name.
    pub endpoint: String,
}

/// The outcome of a [`Forget`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Forgotten {
    /// The endpoint is not on record any more. If it is taken again, it is new.
    Removed,
    /// A server delivers to the endpoint, and has the right to until this time. Nothing was removed.
    Held(SystemTime),
    /// There is no such endpoint on record.
    NotFound,
}

impl Operation for Forget {
    type Outcome = Forgotten;

    fn size(&self) -> usize {
        0
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Forgotten, L::Error> {
        let Some(endpoint) = ledger.endpoint(&self.endpoint)? else {
            return Ok(Forgotten::NotFound);
        };
        let now = ledger.now();
        match endpoint.held {
            Some((_, until)) if until > now => Ok(Forgotten::Held(until)),
            _ => {
                ledger.remove_endpoint(&endpoint)?;
                Ok(Forgotten::Removed)
            }
        }
    }
}
