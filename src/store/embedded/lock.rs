//! One server to a database: the lock file beside it, and where both are.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process;

use super::StoreError;

/// Where the database is, by a path that no symbolic link can vary.
#[derive(Debug)]
pub(super) struct Location {
    pub(super) path: PathBuf,
    /// Syncs what checkpoints wrote. POSIX drops all of a process's locks on a file when any descriptor of it is closed, so
    /// this one lives at least as long as every connection: each of them holds this `Location`.
    pub(super) file: File,
}

impl Location {
    /// The path of a file that belongs to the database, by what is put behind the database's own.
    pub(super) fn beside(&self, suffix: &str) -> PathBuf {
        beside(&self.path, suffix)
    }
}

fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut path = database.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Holds the database against every other server, and against a second one in this process.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

/// Finds or creates the database file and locks it.
pub(super) fn acquire(path: &Path) -> Result<(Location, Lock), StoreError> {
    let path = canonical(path)?;
    let lock = Lock::acquire(&path)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| {
            StoreError::incompatible(format!(
                "the database {} cannot be opened; allowed is a file that this user may read and write",
                path.display()
            ))
            .with_source(error)
        })?;
    Ok((Location { path, file }, lock))
}

fn canonical(path: &Path) -> Result<PathBuf, StoreError> {
    let refused = |fault: &str, error: std::io::Error| {
        StoreError::incompatible(format!(
            "the database {} {fault}; allowed is a file in a folder that exists and that this user may write",
            path.display()
        ))
        .with_source(error)
    };
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => {
            let fault = ErrorKind::IsADirectory;
            return Err(refused("is no regular file", fault.into()));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let mut options = OpenOptions::new();
            options.write(true).create_new(true);
            match private(&mut options).open(path) {
                Ok(_) => {}
                // Another server created it just now; the lock tells the two apart.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(refused("cannot be created", error)),
            }
        }
        Err(error) => return Err(refused("cannot be found", error)),
    }
    fs::canonicalize(path).map_err(|error| refused("cannot be found", error))
}

/// Payloads are nobody else's business.
fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

impl Lock {
    fn acquire(database: &Path) -> Result<Self, StoreError> {
        let path = beside(database, ".lock");
        let refused = |error: std::io::Error| {
            StoreError::incompatible(format!(
                "the lock file {} cannot be written; allowed is a folder that this user may write and that takes locks",
                path.display()
            ))
            .with_source(error)
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = private(&mut options).open(&path).map_err(refused)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(in_use(database, &mut file)),
            Err(TryLockError::Error(error)) => return Err(refused(error)),
        }
        let lock = Self { file };
        lock.write_pid();
        Ok(lock)
    }

    /// Names the holder for whoever is refused. On a full disk that name is missing, which must not stop a server.
    fn write_pid(&self) {
        let mut file = &self.file;
        if file.set_len(0).is_ok() {
            let _ = writeln!(file, "{}", process::id());
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A child that is between fork and exec shares the open file, so closing alone might not release the lock.
        let _ = self.file.unlock();
    }
}

fn in_use(database: &Path, lock: &mut File) -> StoreError {
    let mut pid = String::new();
    let pid = match lock.take(16).read_to_string(&mut pid) {
        Ok(_) => pid.trim().parse::<u32>().ok(),
        Err(_) => None,
    };
    let holder = match pid {
        Some(pid) if pid == process::id() => "this process".to_owned(),
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    };
    StoreError::in_use(format!(
        "the database {} is held by {holder}; one server at a time may hold it",
        database.display()
    ))
}
