//! Backups of a database that a server may have open.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::StoreError;
use super::lock::{beside, private};
use super::verify::{self, Verified};

/// The end of a draft's name.
const SUFFIX: &str = ".tmp";

/// Copies a database as it is at one moment. The copy gets its name once it is verified and synced.
pub(super) fn back_up(database: &Path, to: &Path) -> Result<Verified, StoreError> {
    for suffix in ["-wal", "-shm", "-journal", ".lock"] {
        // SQLite would take the copy for a part of the database, and delete it.
        if to.file_name() == beside(database, suffix).file_name() {
            return Err(StoreError::incompatible(format!(
                "{} is the name of a file that belongs to the database; allowed is another name",
                to.display()
            )));
        }
    }
    for taken in [to.to_owned(), beside(to, "-wal"), beside(to, "-journal")] {
        if fs::symlink_metadata(&taken).is_ok() {
            return Err(StoreError::incompatible(format!(
                "{} is there already; allowed is a name that is free",
                taken.display()
            )));
        }
    }
    let source = verify::open(database)?;
    let draft = Draft::create(to).map_err(|error| failed(database, error))?;
    let path = draft.path.to_str().ok_or_else(|| {
        StoreError::incompatible(format!(
            "{} cannot be the name of a copy; allowed is a path in UTF-8",
            to.display()
        ))
    })?;
    source
        .execute("VACUUM main INTO ?1", [path])
        .map_err(|error| failed(database, error))?;
    // A copy of what is left of a damaged log would look whole.
    let log = verify::log_fault(database)?;
    drop(source);
    if let Some(fault) = log {
        return Err(StoreError::unavailable(format!(
            "{} is not sound: {fault}",
            database.display()
        )));
    }
    let verified = verify::verify(&draft.path)?;
    if let Some(fault) = verified.faults.first() {
        return Err(StoreError::unavailable(format!(
            "the copy of {} is not sound: {fault}",
            database.display()
        )));
    }
    draft.keep(to).map_err(|error| failed(database, error))?;
    Ok(verified)
}

fn failed(database: &Path, error: impl Error + Send + Sync + 'static) -> StoreError {
    StoreError::unavailable(format!("{} cannot be backed up", database.display()))
        .with_source(error)
}

/// An unfinished copy. Dropping it removes the file.
struct Draft {
    path: PathBuf,
    folder: PathBuf,
    /// Locked for as long as the copy is being made.
    _file: File,
}

impl Draft {
    fn create(to: &Path) -> std::io::Result<Self> {
        let folder = match to.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        // SQLite could take a relative path for a URI.
        let folder = fs::canonicalize(folder)?;
        let mut start = OsString::from(".");
        start.push(to.file_name().unwrap_or_default());
        start.push(".");
        sweep(&folder, &start);
        loop {
            let mut name = start.clone();
            name.push(format!("{}{SUFFIX}", Uuid::new_v4().simple()));
            let path = folder.join(name);
            let mut options = File::options();
            let file = private(options.write(true).create_new(true)).open(&path)?;
            // Elsewhere the lock would keep SQLite out, too. Some file systems have no locks.
            let is_swept = cfg!(unix) && matches!(file.try_lock(), Err(TryLockError::WouldBlock));
            let draft = Self {
                path,
                folder: folder.clone(),
                _file: file,
            };
            // Another backup may have taken the file for one that was left behind.
            if !is_swept && draft.path.exists() {
                return Ok(draft);
            }
        }
    }

    fn keep(self, to: &Path) -> std::io::Result<()> {
        File::options()
            .read(true)
            .write(true)
            .open(&self.path)?
            .sync_all()?;
        // Unlike a rename, a link never replaces what got the name meanwhile. Dropping the draft
        // removes its own name.
        match fs::hard_link(&self.path, to) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Err(error),
            // Some file systems have no links.
            Err(_) => fs::rename(&self.path, to)?,
            Ok(()) => fs::remove_file(&self.path)?,
        }
        // The new name must be durable, too. Only Unix lets a folder be opened.
        if cfg!(unix) {
            File::open(&self.folder)?.sync_all()?;
        }
        Ok(())
    }
}

/// Removes the drafts that backups to the same name left when they were killed. Those of backups
/// that run are locked.
fn sweep(folder: &Path, start: &OsStr) {
    let is_draft = |name: &OsStr| {
        let id = name
            .as_encoded_bytes()
            .strip_prefix(start.as_encoded_bytes())
            .and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes()));
        id.is_some_and(|id| id.len() == 32 && id.iter().all(u8::is_ascii_hexdigit))
    };
    if !cfg!(unix) {
        return;
    }
    // A draft that cannot be removed is in nobody's way.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // Opening a FIFO would wait for somebody.
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_file || !is_draft(&entry.file_name()) {
            continue;
        }
        let path = entry.path();
        if File::open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = fs::remove_file(beside(&path, "-journal"));
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        for path in [self.path.clone(), beside(&self.path, "-journal")] {
            let _ = fs::remove_file(path);
        }
    }
}
