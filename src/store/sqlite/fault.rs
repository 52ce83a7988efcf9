//! Faults: what an error of the database means for the store.

use std::error::Error;
use std::{fmt, io};

use rusqlite::ErrorCode;

/// The reason why a transaction failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// Another program holds a lock, or the process has no descriptor left. The open files are
    /// sound, and the caller can try again.
    Passing(Cause),
    /// The disk is full. Nothing can be written, but nothing that was fsynced is in doubt.
    Full(rusqlite::Error),
    /// The contents of the disk are in doubt: a write or an fsync failed, or the file is damaged.
    Broken(Cause),
    /// The path no longer leads to the open files. The next start would not find what is written
    /// there.
    Uprooted {
        how: &'static str,
        /// Whether the open log still has what was committed to it, wherever it is. One that
        /// others have written to is not copied anywhere.
        log_is_whole: bool,
    },
}

impl Fault {
    /// Sorts an error of `BEGIN`, `COMMIT` or a checkpoint. None of these errors is a request's
    /// own.
    pub(super) fn of(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(
                ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::FileLockingProtocolFailed
                // Opening a file writes nothing, so nothing is in doubt.
                | ErrorCode::CannotOpen,
            ) => Self::Passing(Cause::Database(error)),
            Some(ErrorCode::DiskFull) => Self::Full(error),
            _ => Self::Broken(Cause::Database(error)),
        }
    }

    pub(super) fn cause(self) -> Cause {
        match self {
            Self::Full(error) => Cause::Database(error),
            Self::Passing(cause) | Self::Broken(cause) => cause,
            Self::Uprooted { how, .. } => Cause::Uprooted(how),
        }
    }
}

/// The cause of a fault.
#[derive(Debug)]
pub(super) enum Cause {
    Database(rusqlite::Error),
    Sync(io::Error),
    /// The wal-index could not be erased.
    Index(io::Error),
    /// A read that began before the fault is still running.
    Reader,
    /// A thread cannot be started, or has panicked.
    Thread(io::Error),
    /// The location of the files cannot be checked.
    Place(io::Error),
    Uprooted(&'static str),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Database(error) => error.fmt(f),
            Self::Sync(error) => write!(f, "the database cannot be synced: {error}"),
            Self::Index(error) => write!(f, "the wal-index cannot be written: {error}"),
            Self::Reader => f.write_str("a read is not finished"),
            Self::Thread(error) => write!(f, "a thread does not run: {error}"),
            Self::Place(error) => write!(f, "the database cannot be found: {error}"),
            Self::Uprooted(how) => f.write_str(how),
        }
    }
}

impl Error for Cause {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Database(error) => error.source(),
            Self::Sync(error) | Self::Index(error) | Self::Thread(error) | Self::Place(error) => {
                error.source()
            }
            Self::Reader | Self::Uprooted(_) => None,
        }
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::of(error)
    }
}

/// Whether an error of one request's statements ends the whole transaction, not only that request.
pub(super) fn is_fatal(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(
            ErrorCode::DiskFull
                | ErrorCode::SystemIoFailure
                | ErrorCode::DatabaseCorrupt
                | ErrorCode::NotADatabase
                | ErrorCode::CannotOpen
                | ErrorCode::ReadOnly
                | ErrorCode::OutOfMemory
                | ErrorCode::PermissionDenied
                | ErrorCode::InternalMalfunction
                | ErrorCode::ApiMisuse
        )
    )
}

pub(super) fn is_not_a_database(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::NotADatabase)
}
