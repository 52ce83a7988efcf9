//! Jobs for the writer.

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::chain::Extension;
use super::transaction::Transaction;
use super::{StoreError, unready};
use crate::store::operation::Operation;

pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// A message to the writer.
pub(super) enum Command {
    Run(Box<dyn Job>),
    /// Makes the writer look at the state.
    Wake,
}

/// Work for one transaction, with an answer once that transaction is committed.
pub(super) trait Job: Send {
    /// Does the work. If the transaction is not committed, the work may run once more in another
    /// one.
    fn run(&mut self, transaction: &mut Transaction<'_>) -> rusqlite::Result<()>;

    /// Sends the answer. The caller may be gone.
    fn answer(self: Box<Self>);

    /// Answers that the work was not done.
    fn refuse(self: Box<Self>, error: &StoreError);
}

/// An operation with its outcome, which is held back until the commit.
pub(super) struct Run<O: Operation> {
    operation: O,
    outcome: Option<O::Outcome>,
    reply: Reply<O::Outcome>,
    /// Released with the answer.
    _room: OwnedSemaphorePermit,
}

impl<O: Operation> Run<O> {
    pub(super) fn new(operation: O, room: OwnedSemaphorePermit, reply: Reply<O::Outcome>) -> Self {
        Self {
            operation,
            outcome: None,
            reply,
            _room: room,
        }
    }
}

impl<O: Operation> Job for Run<O> {
    fn run(&mut self, transaction: &mut Transaction<'_>) -> rusqlite::Result<()> {
        self.outcome = Some(self.operation.apply(transaction)?);
        Ok(())
    }

    fn answer(self: Box<Self>) {
        drop(self.reply.send(self.outcome.ok_or_else(unready)));
    }

    fn refuse(self: Box<Self>, error: &StoreError) {
        drop(self.reply.send(Err(error.clone())));
    }
}

/// A durable write that records nothing.
pub(super) struct Beat(pub(super) Reply<()>);

impl Job for Beat {
    fn run(&mut self, transaction: &mut Transaction<'_>) -> rusqlite::Result<()> {
        transaction.beat()
    }

    fn answer(self: Box<Self>) {
        drop(self.0.send(Ok(())));
    }

    fn refuse(self: Box<Self>, error: &StoreError) {
        drop(self.0.send(Err(error.clone())));
    }
}

/// Inserts links of the audit chain. Nobody waits for the answer: what is not inserted is computed
/// again.
pub(super) struct Extend(pub(super) Extension);

impl Job for Extend {
    fn run(&mut self, transaction: &mut Transaction<'_>) -> rusqlite::Result<()> {
        transaction.extend_chain(&self.0)
    }

    fn answer(self: Box<Self>) {}

    fn refuse(self: Box<Self>, error: &StoreError) {
        tracing::warn!(%error, "the audit chain is not extended now");
    }
}

/// The most records that one transaction brings up to the present.
const MAX_DUE: usize = 256;

/// The most bytes of their payloads, but for one. Other requests wait for as long as it takes to
/// write them.
const MAX_DUE_BYTES: usize = 2 * 1024 * 1024;

/// Rejects what has expired, and ends the claims whose leases are over. Nobody waits for the
/// answer.
pub(super) struct Settle;

impl Job for Settle {
    fn run(&mut self, transaction: &mut Transaction<'_>) -> rusqlite::Result<()> {
        transaction.settle_due(MAX_DUE, MAX_DUE_BYTES)
    }

    fn answer(self: Box<Self>) {}

    fn refuse(self: Box<Self>, _: &StoreError) {}
}
