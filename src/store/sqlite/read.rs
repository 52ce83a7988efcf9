//! Readers: a few connections of their own, never used on an async thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;
use tokio::sync::Semaphore;
use tokio::task;

use super::lock::Location;
use super::state::State;
use super::{StoreError, connection};

/// The most reads that run at once.
const READERS: usize = 4;

#[derive(Debug)]
pub(super) struct Readers {
    location: Arc<Location>,
    state: Arc<State>,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Reader>>,
    /// The number of connections that exist, in use or idle.
    open: Arc<AtomicUsize>,
}

/// A counted connection. Its fields are dropped in this order, so the database file's own
/// descriptor goes last.
#[derive(Debug)]
struct Reader {
    connection: Connection,
    _counted: Counted,
    _location: Arc<Location>,
}

#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::SeqCst);
        Self(open.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Readers {
    pub(super) fn new(location: Arc<Location>, state: Arc<State>) -> Self {
        Self {
            location,
            state,
            permits: Arc::new(Semaphore::new(READERS)),
            idle: Mutex::default(),
            open: Arc::default(),
        }
    }

    /// Runs `read` on a connection that nobody else uses meanwhile.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.map_err(|_| self.state.closed_error())?;
        let readers = self.clone();
        // The permit moves into the task, because dropping the future does not stop the read.
        task::spawn_blocking(move || {
            let _permit = permit;
            readers.run(read)
        })
        .await
        .unwrap_or_else(|error| {
            Err(StoreError::unavailable("a read was not finished").with_source(error))
        })
    }

    fn run<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let epoch = self.state.epoch()?;
        let failed = |error: rusqlite::Error| {
            StoreError::unavailable("the database cannot be read").with_source(error)
        };
        let idle = self.idle().pop();
        let reader = match idle {
            Some(reader) => reader,
            // The previous connection met an error or a fault.
            None => self.open().map_err(failed)?,
        };
        let found = read(&reader.connection).map_err(failed)?;
        let mut idle = self.idle();
        // What a read saw between a fault and the recovery may be lost.
        if !self.state.is_in(epoch) {
            return Err(StoreError::unavailable(
                "the store had a fault while it was read",
            ));
        }
        if !self.state.is_closing() {
            idle.push(reader);
        }
        Ok(found)
    }

    fn open(&self) -> rusqlite::Result<Reader> {
        let _counted = Counted::new(&self.open);
        Ok(Reader {
            connection: connection::reader(&self.location)?,
            _counted,
            _location: self.location.clone(),
        })
    }

    /// Opens all connections, so that no later read depends on a free descriptor.
    pub(super) fn fill(&self) -> rusqlite::Result<()> {
        for _ in 0..READERS {
            let reader = self.open()?;
            self.idle().push(reader);
        }
        Ok(())
    }

    /// Closes the idle connections. In a new epoch, or when closing, those in use are closed after
    /// their read.
    pub(super) fn clear(&self) {
        let idle = std::mem::take(&mut *self.idle());
        drop(idle);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.load(Ordering::SeqCst) == 0
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Reader>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
