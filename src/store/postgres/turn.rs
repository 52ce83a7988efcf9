//! Requests for the same action take turns before they take a connection.
//!
//! The database would let them wait for the row, each on a connection of its own. A key that many
//! ask for at once, or that somebody else has locked, would then keep all connections, and with them
//! what everybody else asks for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

use super::load::Subject;
use crate::store::StoreError;

/// How long a request waits for its turn.
const PATIENCE: Duration = Duration::from_secs(10);

/// What requests take turns for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Topic {
    /// The digest of tenant, thread and key.
    Identity([u8; 16]),
    Action(Uuid),
}

impl Topic {
    pub(super) fn of(subject: Subject<'_>) -> Option<Self> {
        match subject {
            Subject::Identity(identity) => Some(Self::Identity(identity.digest())),
            Subject::Action(_, id) => Some(Self::Action(id)),
            // The server that delivers to it is alone with it.
            Subject::Endpoint(..) => None,
        }
    }
}

/// Who is at work on what.
#[derive(Debug, Clone, Default)]
pub(super) struct Turns {
    locks: Arc<Mutex<HashMap<Topic, Arc<tokio::sync::Mutex<()>>>>>,
}

/// A place in the line, until it is dropped.
#[derive(Debug)]
struct Place {
    turns: Turns,
    topic: Topic,
    lock: Arc<tokio::sync::Mutex<()>>,
}

/// The turn of a request, which ends when it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    /// Whether somebody else was at work on the same before.
    pub(super) has_waited: bool,
    // The fields are dropped in this order.
    _guard: OwnedMutexGuard<()>,
    _place: Place,
}

impl Turns {
    /// Waits for the turn of a request, in the order in which they came.
    pub(super) async fn take(&self, topic: Topic) -> Result<Turn, StoreError> {
        let lock = self.locks().entry(topic).or_default().clone();
        // Made before the wait, which may be cut off.
        let place = Place {
            turns: self.clone(),
            topic,
            lock,
        };
        if let Ok(guard) = place.lock.clone().try_lock_owned() {
            return Ok(Turn {
                has_waited: false,
                _guard: guard,
                _place: place,
            });
        }
        let guard = tokio::time::timeout(PATIENCE, place.lock.clone().lock_owned()).await;
        let guard = guard.map_err(|_| {
            StoreError::unavailable("other requests for the same action are not finished")
        })?;
        Ok(Turn {
            has_waited: true,
            _guard: guard,
            _place: place,
        })
    }

    fn locks(&self) -> MutexGuard<'_, HashMap<Topic, Arc<tokio::sync::Mutex<()>>>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut locks = self.turns.locks();
        // The map has one, and this place: nobody else is in the line.
        if Arc::strong_count(&self.lock) == 2 {
            locks.remove(&self.topic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOPIC: Topic = Topic::Action(Uuid::nil());

    #[tokio::test(start_paused = true)]
    async fn requests_for_one_action_take_turns_and_others_do_not_wait() {
        let turns = Turns::default();
        let first = turns.take(TOPIC).await.unwrap();
        assert!(!first.has_waited);
        assert!(
            !turns
                .take(Topic::Action(Uuid::max()))
                .await
                .unwrap()
                .has_waited
        );
        let mut second = Box::pin(turns.take(TOPIC));
        let mut third = Box::pin(turns.take(TOPIC));
        assert!(futures_util::poll!(&mut second).is_pending());
        assert!(futures_util::poll!(&mut third).is_pending());
        drop(first);
        let second = second.await.unwrap();
        assert!(second.has_waited);
        assert!(futures_util::poll!(&mut third).is_pending());
        drop(second);
        assert!(third.await.unwrap().has_waited);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_left_of_turns_that_ended_or_were_given_up() {
        let turns = Turns::default();
        let first = turns.take(TOPIC).await.unwrap();
        let mut given_up = Box::pin(turns.take(TOPIC));
        assert!(futures_util::poll!(&mut given_up).is_pending());
        drop(first);
        // It has its turn, and does not know yet.
        drop(given_up);
        assert!(turns.locks().is_empty());
        let held = turns.take(TOPIC).await.unwrap();
        let refused = turns.take(TOPIC).await.unwrap_err();
        assert!(refused.is_unavailable());
        drop(held);
        assert!(turns.locks().is_empty());
    }
}
