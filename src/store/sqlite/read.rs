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

    /// Runs `read` on this thread. One thread at a time may do so beside the [reads](Self::read).
    pub(super) fn run<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let failed = |error: rusqlite::Error| {
            StoreError::unavailable("the database cannot be read").with_source(error)
        };
        let (epoch, reader) = {
            let mut idle = self.idle();
            // A fault that comes later finds this reader counted, because it first takes the lock.
            let epoch = self.state.epoch()?;
            (epoch, idle.pop().ok_or_else(|| Counted::new(&self.open)))
        };
        let reader = match reader {
            Ok(reader) => reader,
            // The previous connection met an error or a fault.
            Err(counted) => self.open(counted).map_err(failed)?,
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

    fn open(&self, counted: Counted) -> rusqlite::Result<Reader> {
        Ok(Reader {
            connection: connection::reader(&self.location)?,
            _counted: counted,
            _location: self.location.clone(),
        })
    }

    /// Opens all connections, so that no later read depends on a free descriptor: one for each
    /// permit, and one more for the thread that needs none.
    pub(super) fn fill(&self) -> rusqlite::Result<()> {
        for _ in 0..=READERS {
            let reader = self.open(Counted::new(&self.open))?;
            self.idle().push(reader);
        }
        Ok(())
    }

    /// Closes the idle connections. After this, [`is_empty`](Self::is_empty) stays true until the
    /// next epoch, once it is. In a new epoch, or when closing, those in use are closed after
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::store::sqlite::lock;

    #[test]
    fn a_read_that_comes_with_a_fault_opens_nothing() {
        let folder = tempfile::TempDir::new().unwrap();
        let (location, _lock) = lock::acquire(&folder.path().join("aegis.db")).unwrap();
        let readers = Readers::new(Arc::new(location), Arc::new(State::new()));
        let ran = AtomicBool::new(false);
        thread::scope(|scope| {
            let idle = readers.idle();
            let read = scope.spawn(|| {
                readers.run(|_| {
                    ran.store(true, Ordering::SeqCst);
                    Ok(())
                })
            });
            // Nothing tells when it waits for the idle readers.
            thread::sleep(Duration::from_millis(100));
            readers.state.set_unready();
            assert!(readers.is_empty());
            // From here on the writer relies on that.
            drop(idle);
            assert!(read.join().unwrap().is_err());
        });
        assert!(!ran.load(Ordering::SeqCst));
    }
}
