//! The thread that computes the audit chain beside the writer.

use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::chain::{self, Extension};
use super::fault::{Cause, Fault};
use super::read::Readers;
use crate::store::audit::{GATHER, Pace};

/// The most events that are chained at once. The small value shows unit tests several turns.
const MOST: usize = if cfg!(test) { 8 } else { 1024 };

/// An event takes the thread 2 to 4 us, a twentieth of what its decision takes the server.
const PACE: Pace = Pace { busy: 99, idle: 9 };

/// How often the writer looks for a result while the thread works.
const LOOK: Duration = Duration::from_millis(10);

/// The thread. Dropping this ends it and joins it.
#[derive(Debug)]
pub(super) struct Chainer {
    kick: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    result: Arc<Mutex<Option<Worked>>>,
    phase: Phase,
    /// Whether events may be on record that are not chained, and that the thread has not been sent
    /// for.
    is_behind: bool,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// The thread waits, and is to be sent for events no sooner than this.
    Rests(Instant),
    Works,
    /// The thread has ended, which only a panic can do.
    Ended,
}

/// What the thread did.
#[derive(Debug)]
struct Worked {
    /// `None` if the database could not be read.
    extension: Option<Extension>,
    took: Duration,
}

impl Chainer {
    pub(super) fn spawn(readers: Arc<Readers>) -> Result<Self, Fault> {
        let (kick, kicks) = mpsc::sync_channel(1);
        let result = Arc::new(Mutex::new(None));
        let thread = thread::Builder::new()
            .name("aegis-audit".to_owned())
            .spawn({
                let result = result.clone();
                move || run(&kicks, &readers, &result)
            })
            .map_err(|error| Fault::Passing(Cause::Thread(error)))?;
        Ok(Self {
            kick: Some(kick),
            thread: Some(thread),
            result,
            phase: Phase::Rests(Instant::now()),
            // The process before may have left events.
            is_behind: true,
        })
    }

    /// Notes that an event was recorded.
    pub(super) fn note(&mut self) {
        if self.is_behind {
            return;
        }
        self.is_behind = true;
        if let Phase::Rests(until) = &mut self.phase {
            *until = (*until).max(Instant::now() + GATHER);
        }
    }

    /// Takes the next step. Returns what the thread has computed for the writer to insert.
    pub(super) fn step(&mut self, is_busy: bool) -> Option<Extension> {
        match self.phase {
            Phase::Rests(until) => {
                if self.is_behind && until <= Instant::now() {
                    self.is_behind = false;
                    let kick = self.kick.as_ref();
                    let is_sent = kick.is_some_and(|kick| kick.try_send(()).is_ok());
                    self.phase = if is_sent { Phase::Works } else { Phase::Ended };
                    self.note_end();
                }
                None
            }
            Phase::Works => {
                let Some(Worked { extension, took }) = lock(&self.result).take() else {
                    if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                        self.phase = Phase::Ended;
                        self.note_end();
                    }
                    return None;
                };
                // Only a look that finds nothing shows that everything is chained: what is found may
                // not be inserted after all.
                self.is_behind |= extension.as_ref().is_none_or(|found| !found.is_empty());
                let is_full = extension.as_ref().is_some_and(|found| found.is_full);
                self.phase = Phase::Rests(Instant::now() + PACE.rest(took, is_full, is_busy));
                extension.filter(|extension| !extension.is_empty())
            }
            Phase::Ended => None,
        }
    }

    fn note_end(&self) {
        if matches!(self.phase, Phase::Ended) {
            tracing::error!("the audit thread has failed; events are chained after the next start");
        }
    }

    /// How long the next step can wait.
    pub(super) fn pause(&self) -> Option<Duration> {
        match self.phase {
            Phase::Rests(until) if self.is_behind => {
                Some(until.saturating_duration_since(Instant::now()))
            }
            Phase::Works => Some(LOOK),
            Phase::Rests(_) | Phase::Ended => None,
        }
    }
}

impl Drop for Chainer {
    fn drop(&mut self) {
        self.kick = None;
        if let Some(thread) = self.thread.take() {
            // A panic has already ended the thread and released what it held.
            let _ = thread.join();
        }
    }
}

fn run(kicks: &Receiver<()>, readers: &Readers, result: &Mutex<Option<Worked>>) {
    for () in kicks {
        let begun = Instant::now();
        let extension = readers.run(|connection| chain::extension(connection, MOST));
        let extension = extension.map_err(|error| {
            tracing::debug!(%error, "the audit chain is not extended now");
        });
        *lock(result) = Some(Worked {
            extension: extension.ok(),
            took: begun.elapsed(),
        });
    }
}

fn lock(result: &Mutex<Option<Worked>>) -> MutexGuard<'_, Option<Worked>> {
    result.lock().unwrap_or_else(PoisonError::into_inner)
}
