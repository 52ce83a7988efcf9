//! Moving an embedded database into a PostgreSQL database.
//!
//! A move has one order, in which no moment has two databases that servers may use. The embedded
//! database is marked first, so that no server opens it. Then the target is closed to its servers,
//! filled and compared. Before the target is opened, the mark says that it may be; after that, that
//! it is. Whatever ends the process, the next one finds in both how far it was.

pub(super) mod line;
pub(super) mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use self::table::{TABLES, Table};
use super::postgres::import::{Import, Target};
use super::sqlite::moving::{Mark, Moving, Stage};
use super::{PostgresBuilder, StoreError};
use crate::protocol::Digest;

/// A move of an embedded database into a PostgreSQL database: all that is on record, so that what was
/// decided once stays decided.
///
/// No server may have the embedded database open, and none opens it from the beginning of a move on.
/// The target must be empty, and its servers record nothing while the move lasts. A move that was cut
/// off goes on where it was when it is [run](Self::run) again.
#[derive(Debug)]
pub struct Migration {
    database: PathBuf,
    target: PostgresBuilder,
}

/// What a move did.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Migrated {
    /// The server and the database that was moved into, without user and password.
    pub place: String,
    /// The tables. Each has the same rows on both sides.
    pub tables: Vec<MigratedTable>,
}

/// A table that was moved.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigratedTable {
    /// The name of the table in PostgreSQL.
    pub name: &'static str,
    /// The number of its rows.
    pub rows: u64,
    /// The SHA-256 of its rows in the order of their keys, as `COPY … TO STDOUT` writes them.
    pub digest: Digest,
}

/// How far a move has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrationProgress {
    /// What is being done.
    pub step: MigrationStep,
    /// The table.
    pub table: &'static str,
    /// The rows of the table that are done.
    pub rows: u64,
    /// All rows of the table.
    pub of: u64,
}

/// A step of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MigrationStep {
    /// The embedded database is checked.
    Checking,
    /// Rows are written.
    Copying,
    /// Rows are read again on both sides, and compared.
    Comparing,
}

impl Migration {
    /// Prepares a move of the embedded database at `database`.
    pub fn new(database: impl Into<PathBuf>, target: PostgresBuilder) -> Self {
        Self {
            database: database.into(),
            target,
        }
    }

    /// Moves what is not there yet, and compares all of it. `progress` learns how far it has come.
    ///
    /// # Errors
    ///
    /// - [In use](StoreError::is_in_use), if a server has the embedded database open.
    /// - [Incompatible](StoreError::is_incompatible), if one of the databases is not one of this
    ///   release, the embedded one was moved before or is being moved elsewhere, or the other one has
    ///   anything on record.
    /// - [Unavailable](StoreError::is_unavailable), if a database cannot be read or written, is not
    ///   sound, or the two differ.
    pub async fn run(
        self,
        mut progress: impl FnMut(MigrationProgress) + Send,
    ) -> Result<Migrated, StoreError> {
        let source = open(self.database).await?;
        let mark = source.read(Moving::mark).await?;
        if let Some(mark) = mark.as_ref()
            && matches!(mark.stage, Stage::Finished(_))
        {
            return Err(mark.refusal(source.path()));
        }
        let target = Target::connect(self.target).await?;
        let (mark, mut import) = source.begin(&target, mark, &mut progress).await?;
        if !import.is_finished {
            source.copy(&target, &mut import, &mut progress).await?;
        }
        let mut tables = Vec::with_capacity(TABLES.len());
        for table in TABLES {
            let there = match import.is_finished {
                // It was compared before it was finished, and servers may have changed it since.
                true => None,
                false => Some(&target),
            };
            tables.push(source.compare(there, table, &mut progress).await?);
        }
        if !import.is_finished {
            source
                .set_mark(Some(mark.in_stage(Stage::Finishing)))
                .await?;
            let swept = source.read(|source| source.number(table::SWEPT)).await?;
            target.finish(&import, swept).await?;
        }
        source.set_mark(Some(mark.finished())).await?;
        source.close().await?;
        Ok(Migrated {
            place: target.place().to_owned(),
            tables,
        })
    }

    /// Gives up a move that is not finished. The target is empty then, and servers may open the
    /// embedded database again.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run); [incompatible](StoreError::is_incompatible) also if there is no move, or
    /// if the target may be in use.
    pub async fn abandon(self) -> Result<(), StoreError> {
        let source = open(self.database).await?;
        let mark = source.unfinished().await?;
        let target = Target::connect(self.target).await?;
        let locked = target.lock().await?;
        match &locked.import {
            Some(import) if import.id == mark.id && import.is_finished => {
                locked.release().await;
                source.set_mark(Some(mark.finished())).await?;
                return Err(StoreError::incompatible(format!(
                    "the move to PostgreSQL at {} is finished, and may be in use; it cannot be given up",
                    target.place()
                )));
            }
            Some(import) if import.id == mark.id => {
                // The target cannot be finished while its row is locked, nor once it is removed.
                source.set_mark(Some(mark.in_stage(Stage::Copying))).await?;
                locked.remove().await?;
            }
            _ => {
                locked.release().await;
                if mark.stage != Stage::Copying {
                    return Err(unknown_end(&mark, &target));
                }
                // Another database knows nothing of the one that the move has closed.
                if mark.target != target.place() {
                    return Err(StoreError::incompatible(format!(
                        "the database {} is being moved to PostgreSQL at {}, and the database at {} has nothing of that; \
                         allowed is the database that the move was begun with, or no --to if that is gone",
                        source.path().display(),
                        mark.target,
                        target.place()
                    )));
                }
            }
        }
        source.set_mark(None).await?;
        source.close().await
    }

    /// Gives up a move whose target is gone. Servers may open the embedded database again.
    ///
    /// # Errors
    ///
    /// As [`abandon`](Self::abandon).
    pub async fn abandon_without_target(database: impl Into<PathBuf>) -> Result<(), StoreError> {
        let source = open(database.into()).await?;
        let mark = source.unfinished().await?;
        if mark.stage != Stage::Copying {
            return Err(StoreError::incompatible(format!(
                "the move to PostgreSQL at {} may be finished, which only that database knows; name it with --to",
                mark.target
            )));
        }
        source.set_mark(None).await?;
        source.close().await
    }
}

fn unknown_end(mark: &Mark, target: &Target) -> StoreError {
    StoreError::incompatible(format!(
        "the move to PostgreSQL at {} may be finished, and the database at {} does not have it; allowed is the \
         database that the move was begun with",
        mark.target,
        target.place()
    ))
}

async fn open(database: PathBuf) -> Result<Source, StoreError> {
    let opened = blocking(move || Moving::open(&database)).await?;
    Ok(Source(Arc::new(opened)))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        Err(StoreError::unavailable("the database cannot be read").with_source(error))
    })
}

/// The embedded database, used from blocking threads.
struct Source(Arc<Moving>);

impl Source {
    fn path(&self) -> &Path {
        self.0.path()
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Moving) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let source = self.0.clone();
        blocking(move || read(&source)).await
    }

    async fn set_mark(&self, mark: Option<Mark>) -> Result<(), StoreError> {
        self.read(move |source| source.set_mark(mark.as_ref()))
            .await
    }

    /// The mark of a move that can be given up.
    async fn unfinished(&self) -> Result<Mark, StoreError> {
        match self.read(Moving::mark).await? {
            Some(mark) if matches!(mark.stage, Stage::Finished(_)) => {
                Err(mark.refusal(self.path()))
            }
            Some(mark) => Ok(mark),
            None => Err(StoreError::incompatible(format!(
                "the database {} is not being moved",
                self.path().display()
            ))),
        }
    }

    /// Finds or begins the move on both sides.
    async fn begin(
        &self,
        target: &Target,
        mark: Option<Mark>,
        progress: &mut (impl FnMut(MigrationProgress) + Send),
    ) -> Result<(Mark, Import), StoreError> {
        let locked = target.lock().await?;
        let import = locked.import.clone();
        locked.release().await;
        let mark = match (mark, import) {
            (Some(mark), Some(import)) if mark.id == import.id => return Ok((mark, import)),
            (_, Some(import)) => {
                let state = match import.is_finished {
                    true => "has the records of",
                    false => "is being filled with the records of",
                };
                return Err(StoreError::incompatible(format!(
                    "the database at {} {state} {}, by another move; allowed is an empty database",
                    target.place(),
                    import.source
                )));
            }
            (Some(mark), None) if mark.target != target.place() => {
                return Err(mark.refusal(self.path()));
            }
            (Some(mark), None) if mark.stage != Stage::Copying => {
                return Err(unknown_end(&mark, target));
            }
            // The process was killed behind the mark.
            (Some(mark), None) => mark,
            (None, None) => {
                // Nothing is marked for a target that cannot be moved into.
                target.check_empty().await?;
                progress(MigrationProgress {
                    step: MigrationStep::Checking,
                    table: "",
                    rows: 0,
                    of: 0,
                });
                self.read(Moving::verify).await?;
                self.read(Moving::name_all_swept).await?;
                let mark = Mark::new(target.place().to_owned());
                self.set_mark(Some(mark.clone())).await?;
                mark
            }
        };
        let months = self.read(|source| source.texts(table::MONTHS)).await?;
        let path = self.path().display().to_string();
        let begun = target.begin_import(mark.id, &path, &months).await;
        begun.map_err(|error| match error.is_incompatible() {
            // Trying again does not help, and no server opens the file as it is.
            true => StoreError::incompatible(format!(
                "{error}; {path} is marked as being moved there: the same command with --abandon gives that up, and lets \
                 servers open the file again"
            )),
            false => error,
        })?;
        let import = Import {
            id: mark.id,
            source: path,
            stage: 0,
            copied: 0,
            is_finished: false,
        };
        Ok((mark, import))
    }

    /// Writes the rows that are not there yet.
    async fn copy(
        &self,
        target: &Target,
        import: &mut Import,
        progress: &mut (impl FnMut(MigrationProgress) + Send),
    ) -> Result<(), StoreError> {
        while let Some(table) = TABLES.get(import.stage) {
            let of = self.read(|source| source.count(table)).await?;
            let mut tell = |rows| {
                progress(MigrationProgress {
                    step: MigrationStep::Copying,
                    table: table.name,
                    rows,
                    of,
                });
            };
            tell(import.copied);
            let mut found = self.0.rows(table, import.copied)?;
            while let Some(rows) = found.recv().await {
                let rows = rows?;
                target.append(import, table, rows.lines, rows.count).await?;
                import.copied += rows.count;
                tell(import.copied);
            }
            target.begin_next(import).await?;
            (import.stage, import.copied) = (import.stage + 1, 0);
        }
        Ok(())
    }

    /// Reads a table again on both sides. Every row must be the same.
    async fn compare(
        &self,
        target: Option<&Target>,
        table: &'static Table,
        progress: &mut (impl FnMut(MigrationProgress) + Send),
    ) -> Result<MigratedTable, StoreError> {
        let of = self.read(|source| source.count(table)).await?;
        let mut there = match target {
            Some(target) => Some(target.lines(table).await?),
            None => None,
        };
        let differs = |line: &[u8], how: &str| {
            StoreError::unavailable(format!(
                "the row {} {} {how} in PostgreSQL, compared with {}; the move is not finished",
                table.name,
                table.key_of(line),
                self.path().display()
            ))
        };
        let mut digest = Sha256::new();
        let mut count = 0;
        let mut found = self.0.rows(table, 0)?;
        while let Some(rows) = found.recv().await {
            let rows = rows?;
            for line in rows.lines.split_inclusive(|byte| *byte == b'\n') {
                let Some(there) = there.as_mut() else {
                    continue;
                };
                match there.next().await? {
                    Some(other) if other == line => {}
                    Some(other) if table.key_of(&other) == table.key_of(line) => {
                        return Err(differs(line, "is another one"));
                    }
                    Some(_) => return Err(differs(line, "stands elsewhere")),
                    None => return Err(differs(line, "is missing")),
                }
            }
            digest.update(&rows.lines);
            count += rows.count;
            progress(MigrationProgress {
                step: MigrationStep::Comparing,
                table: table.name,
                rows: count,
                of,
            });
        }
        if let Some(there) = there.as_mut()
            && let Some(line) = there.next().await?
        {
            return Err(differs(&line, "is one too many"));
        }
        if count != of {
            return Err(StoreError::unavailable(format!(
                "{} of the {of} rows of {} in {} belong to nothing; see 'aegis check'",
                of.abs_diff(count),
                table.name,
                self.path().display()
            )));
        }
        Ok(MigratedTable {
            name: table.name,
            rows: count,
            digest: Digest::from(<[u8; 32]>::from(digest.finalize())),
        })
    }

    /// Leaves one file.
    async fn close(self) -> Result<(), StoreError> {
        match Arc::into_inner(self.0) {
            Some(source) => blocking(move || source.close()).await,
            None => Ok(()),
        }
    }
}
