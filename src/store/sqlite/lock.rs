//! One server per database: the lock file beside the database, the lock on the database file
//! itself, and the location of both.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::StoreError;

/// The location of the database, by a path free of symbolic links.
#[derive(Debug)]
pub(super) struct Location {
    pub(super) path: PathBuf,
    /// The path as it was given, if that is another one: the next start follows its links anew.
    given: Option<PathBuf>,
    pub(super) file: Arc<DatabaseFile>,
}

/// The store's own descriptor of the database file.
///
/// POSIX drops all of a process's locks on a file when it closes any descriptor of that file. So
/// this descriptor lives at least as long as every connection: each of them holds a [`Location`].
/// For the same reason a process never has two of them for one file.
#[derive(Debug)]
pub(super) struct DatabaseFile {
    file: File,
    id: FileId,
    is_held: AtomicBool,
}

impl DatabaseFile {
    /// Reads the start of the file, without SQLite and its log. `None` if the file is shorter.
    pub(super) fn start<const LEN: usize>(&self) -> Option<[u8; LEN]> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::FileExt;
            let mut start = [0; LEN];
            self.file.read_exact_at(&mut start, 0).ok()?;
            Some(start)
        }
        #[cfg(not(unix))]
        None
    }
}

/// The identity of a file, whatever its name. Where files have no such identity (Windows), an open
/// file can be neither renamed nor removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId(#[cfg(unix)] (u64, u64));

impl FileId {
    fn of(metadata: &fs::Metadata) -> Self {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            Self((metadata.dev(), metadata.ino()))
        }
        #[cfg(not(unix))]
        {
            let _ = metadata;
            Self()
        }
    }

    /// The file that a path leads to, if there is one.
    fn at(path: &Path) -> io::Result<Option<Self>> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(Some(Self::of(&metadata))),
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// The database files that this process has open.
static OPEN: Mutex<Vec<(FileId, Weak<DatabaseFile>)>> = Mutex::new(Vec::new());

impl DatabaseFile {
    fn open(path: &Path) -> io::Result<Arc<Self>> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, file)| file.strong_count() > 0);
        if cfg!(unix)
            && let Some(id) = FileId::at(path)?
            && let Some((_, file)) = open.iter().find(|(open, _)| *open == id)
            && let Some(file) = file.upgrade()
        {
            return Ok(file);
        }
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let id = FileId::of(&file.metadata()?);
        let file = Arc::new(Self {
            file,
            id,
            is_held: AtomicBool::new(false),
        });
        open.push((id, Arc::downgrade(&file)));
        Ok(file)
    }

    /// Locks the file. Returns whether the lock was free.
    ///
    /// On Linux the lock is a `flock`, which is independent of the locks that SQLite takes.
    /// Elsewhere the two may interfere, so the lock file beside the database is the only lock
    /// there.
    fn try_hold(&self) -> io::Result<bool> {
        if self.is_held.swap(true, Ordering::SeqCst) {
            return Ok(false);
        }
        if cfg!(not(any(target_os = "linux", target_os = "android"))) {
            return Ok(true);
        }
        let held = match self.file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        };
        self.is_held.store(false, Ordering::SeqCst);
        held
    }

    fn release(&self) {
        // A child between fork and exec shares the open file, so closing alone might not release
        // the lock.
        let _ = self.file.unlock();
        self.is_held.store(false, Ordering::SeqCst);
    }

    /// Syncs the pages that checkpoints wrote.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl Location {
    /// The path of a file beside the database: the database's own path with `suffix` appended.
    pub(super) fn beside(&self, suffix: &str) -> PathBuf {
        beside(&self.path, suffix)
    }

    /// Whether the path still leads to the open file.
    pub(super) fn is_in_place(&self) -> io::Result<bool> {
        let id = Some(self.file.id);
        for path in std::iter::once(&self.path).chain(&self.given) {
            if FileId::at(path)? != id {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The log and its index (`-wal` and `-shm`), which the connections have open.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    id: Option<FileId>,
    index: (PathBuf, Option<FileId>),
    /// The bytes of one frame: a page and its header.
    frame: u64,
}

/// The bytes before the first frame of a log, and before the page of each frame
/// (<https://sqlite.org/fileformat.html#the_write_ahead_log>).
const LOG_HEADER: u64 = 32;
const FRAME_HEADER: u64 = 24;

impl Log {
    /// Identifies the log. It must be open, so that no other program removes it.
    pub(super) fn of(location: &Location, page_size: u32) -> io::Result<Self> {
        let path = location.beside("-wal");
        let id = FileId::at(&path)?;
        let index = location.beside("-shm");
        let index_id = FileId::at(&index)?;
        Ok(Self {
            path,
            id,
            index: (index, index_id),
            frame: FRAME_HEADER + u64::from(page_size),
        })
    }

    /// Whether the path still leads to the open log.
    pub(super) fn is_in_place(&self) -> io::Result<bool> {
        Ok(FileId::at(&self.path)? == self.id)
    }

    /// Whether the log and its index are as this store has left them: the index is the one that it
    /// shares with other programs, and the log holds the pages that were committed to it. Whoever
    /// empties it in place leaves it where it is.
    pub(super) fn is_whole(&self, pages: u32) -> io::Result<bool> {
        let (index, index_id) = &self.index;
        if FileId::at(index)? != *index_id {
            return Ok(false);
        }
        if pages == 0 {
            return Ok(true);
        }
        let least = LOG_HEADER + u64::from(pages) * self.frame;
        Ok(fs::metadata(&self.path)?.len() >= least)
    }
}

pub(super) fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut path = database.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Keeps every other server out of the database, and a second store in this process, too.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    /// Locked as well, so that another name for the file is no way around the lock file.
    database: Option<Arc<DatabaseFile>>,
}

/// Finds or creates the database file and locks it.
pub(super) fn acquire(path: &Path) -> Result<(Location, Lock), StoreError> {
    // Absolute, in case the process changes its folder.
    let given = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let path = canonical(path)?;
    let given = Some(given).filter(|given| *given != path);
    let mut lock = Lock::acquire(&path)?;
    let refused = |error: io::Error| {
        StoreError::incompatible(format!(
            "the database {} cannot be opened; allowed is a file that this user may read and write, and that takes locks",
            path.display()
        ))
        .with_source(error)
    };
    let file = DatabaseFile::open(&path).map_err(refused)?;
    if !file.try_hold().map_err(refused)? {
        return Err(StoreError::in_use(format!(
            "the database {} is held under another name or in another folder; one server at a time may hold it",
            path.display()
        )));
    }
    lock.database = Some(file.clone());
    Ok((Location { path, given, file }, lock))
}

fn canonical(path: &Path) -> Result<PathBuf, StoreError> {
    let refused = |fault: &str, error: io::Error| {
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
                // Another server has just created it. The lock decides between the two.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(refused("cannot be created", error)),
            }
        }
        Err(error) => return Err(refused("cannot be found", error)),
    }
    fs::canonicalize(path).map_err(|error| refused("cannot be found", error))
}

/// Makes the file private to this user, because payloads are confidential.
pub(super) fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options
}

/// Opens no symbolic link, because what the file holds is overwritten.
fn without_links(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        options,
        rustix::fs::OFlags::NOFOLLOW.bits().cast_signed(),
    );
    options
}

impl Lock {
    fn acquire(database: &Path) -> Result<Self, StoreError> {
        let path = beside(database, ".lock");
        let refused = |error: io::Error| {
            StoreError::incompatible(format!(
                "the lock file {} cannot be written; allowed is a folder that this user may write and that takes locks",
                path.display()
            ))
            .with_source(error)
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = without_links(private(&mut options))
            .open(&path)
            .map_err(refused)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(in_use(database, &mut file)),
            Err(TryLockError::Error(error)) => return Err(refused(error)),
        }
        let lock = Self {
            file,
            database: None,
        };
        lock.write_pid();
        Ok(lock)
    }

    /// Names the holder for servers that are refused. On a full disk the name is missing, which
    /// must not stop this server.
    fn write_pid(&self) {
        let mut file = &self.file;
        if file.set_len(0).is_ok() {
            let _ = writeln!(file, "{}", process::id());
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(database) = &self.database {
            database.release();
        }
        // As in `release`.
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
