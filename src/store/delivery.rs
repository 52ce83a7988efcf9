//! What is on record of deliveries to webhook endpoints, as it is read.

use std::time::{Duration, SystemTime};

use crate::protocol::Event;

/// Parked events that are to be attempted now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs)]
pub struct DueDeliveries {
    /// The events.
    pub deliveries: Vec<DueDelivery>,
    /// The time until another one is due, if there is one.
    pub next: Option<Duration>,
}

/// A parked event that is to be attempted.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs)]
pub struct DueDelivery {
    /// The event's position.
    pub position: u64,
    /// The event with its action, as [`Store::events`](super::Store::events) shows it.
    pub event: Event,
    /// The number of attempts so far.
    pub attempts: u32,
}

/// The most parked events, and dead letters, that are counted. Whoever asks how an endpoint stands
/// must not wait until all of them are.
pub(crate) const COUNTED: usize = 10_000;

/// The state of a webhook endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EndpointState {
    /// The endpoint's name.
    pub name: String,
    /// The position up to which events are delivered, parked, or not the endpoint's.
    pub position: u64,
    /// The number of events of all tenants behind that position, whether the endpoint wants them or
    /// not. Where nobody delivers to the endpoint, those that were removed since count as well.
    pub behind: u64,
    /// The time of the oldest event behind that position, if there is one.
    pub behind_since: Option<SystemTime>,
    /// The number of parked events. No more than 10,000 are counted.
    pub parked: u64,
    /// The number of dead letters. No more than 10,000 are counted.
    pub dead: u64,
    /// When the endpoint was stopped, if it is.
    pub stopped_at: Option<SystemTime>,
    /// When the right of the server that delivers to it ends.
    pub held_until: Option<SystemTime>,
}

/// An event that was given up for an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The event's position.
    pub position: u64,
    /// The event with its action, as [`Store::events`](super::Store::events) shows it.
    pub event: Event,
    /// The number of attempts.
    pub attempts: u32,
    /// When it was parked.
    pub parked_at: SystemTime,
    /// When it was given up.
    pub given_up_at: SystemTime,
    /// The last failure, in a few words.
    pub failure: String,
}
