//! Copying a database that is in use.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::schema::{self, Version};
use super::{Embedded, StoreError};

const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

impl Embedded {
    /// Copies the database at `path` into the new file `to`, readable by this user alone, while a server has it open or not.
    ///
    /// The copy is the database as of one moment, in one file, and durable when this returns. Whoever copies the file by other
    /// means must copy the log beside it (`-wal`) too, in the same moment: what was acknowledged last is there and nowhere else.
    ///
    /// This blocks for as long as it takes to write the file. The log of a server that runs grows meanwhile.
    ///
    /// # Errors
    ///
    /// - [Incompatible](StoreError::is_incompatible), if `path` is no database of this application, or one of a newer version,
    ///   or if `to` exists.
    /// - [Unavailable](StoreError::is_unavailable), if the disk is full or fails.
    ///
    /// Nothing is left at `to` then, unless it existed.
    pub fn backup(path: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<(), StoreError> {
        let (path, to) = (path.as_ref(), to.as_ref());
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let database = Connection::open_with_flags(path, flags)
            .map_err(|error| schema::unreadable(path, error))?;
        database
            .busy_timeout(BUSY_TIMEOUT)
            .map_err(|error| schema::unreadable(path, error))?;
        if matches!(schema::version(&database, path)?, Version::Older(0)) {
            return Err(StoreError::incompatible(format!(
                "the database {} is empty",
                path.display()
            )));
        }
        // An empty file takes the name, and gives the copy its mode.
        let mut new = OpenOptions::new();
        new.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut new, 0o600);
        let file = new.open(to).map_err(|error| {
            StoreError::incompatible(format!(
                "{} cannot be made; allowed is a new file in a folder that exists",
                to.display()
            ))
            .with_source(error)
        })?;
        copy(&database, &file, to).inspect_err(|_| {
            let _ = fs::remove_file(to);
        })
    }
}

fn copy(database: &Connection, file: &File, to: &Path) -> Result<(), StoreError> {
    let failed = || StoreError::unavailable(format!("{} cannot be written", to.display()));
    let absolute = fs::canonicalize(to).map_err(|error| failed().with_source(error))?;
    let name = absolute
        .to_str()
        .ok_or_else(|| StoreError::incompatible(format!("{} is no name in UTF-8", to.display())))?;
    database
        .execute("VACUUM INTO ?1", [name])
        .map_err(|error| failed().with_source(error))?;
    // SQLite leaves it to the system when the copy gets to the disk.
    file.sync_all()
        .map_err(|error| failed().with_source(error))?;
    #[cfg(unix)]
    if let Some(folder) = absolute.parent() {
        let folder = File::open(folder).and_then(|folder| folder.sync_all());
        folder.map_err(|error| failed().with_source(error))?;
    }
    Ok(())
}
