//! The mark of a database that was moved into another one, or is being moved.

use std::path::Path;

#[cfg(feature = "postgres")]
use rusqlite::params;
use rusqlite::{Connection, OptionalExtension};
use uuid::Uuid;

use super::StoreError;
#[cfg(feature = "postgres")]
use super::rows::micros;
#[cfg(feature = "postgres")]
use crate::store::Clock;

/// Where a database is moved to, and how far that has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct Mark {
    /// The id of the move.
    pub(in crate::store) id: Uuid,
    /// The server and the database, without user and password.
    pub(in crate::store) target: String,
    pub(in crate::store) stage: Stage,
    /// In microseconds.
    begun_at: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Stage {
    /// The target cannot be in use.
    Copying,
    /// The target may be in use.
    Finishing,
    /// In microseconds.
    Finished(i64),
}

#[cfg(feature = "postgres")]
impl Mark {
    /// The mark of a move that begins now.
    pub(in crate::store) fn new(target: String) -> Self {
        Self {
            id: Uuid::new_v4(),
            target,
            stage: Stage::Copying,
            begun_at: micros(Clock::new().now()),
        }
    }

    pub(in crate::store) fn in_stage(&self, stage: Stage) -> Self {
        Self {
            stage,
            ..self.clone()
        }
    }

    pub(in crate::store) fn finished(&self) -> Self {
        self.in_stage(Stage::Finished(micros(Clock::new().now())))
    }
}

impl Mark {
    /// The error of everyone who would serve or change the database.
    pub(in crate::store) fn refusal(&self, path: &Path) -> StoreError {
        let (path, target) = (path.display(), &self.target);
        StoreError::incompatible(match self.stage {
            Stage::Finished(at) => format!(
                "the database {path} was moved to PostgreSQL at {target} ({}), and only remains to be read",
                shown(at)
            ),
            Stage::Copying | Stage::Finishing => format!(
                "the database {path} is being moved to PostgreSQL at {target} (since {}); go on with the same \
                 'aegis migrate --from … --to …', or give the move up with --abandon",
                shown(self.begun_at)
            ),
        })
    }
}

fn shown(micros: i64) -> String {
    let time = jiff::Timestamp::from_microsecond(micros).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

pub(super) fn read(connection: &Connection) -> rusqlite::Result<Option<Mark>> {
    connection
        .prepare_cached(
            "SELECT move, target, state, begun_at, finished_at FROM moved WHERE id = 1",
        )?
        .query_row([], |row| {
            Ok(Mark {
                id: Uuid::from_bytes(row.get(0)?),
                target: row.get(1)?,
                stage: match (row.get_ref(2)?.as_str()?, row.get(4)?) {
                    (_, Some(at)) => Stage::Finished(at),
                    ("copying", None) => Stage::Copying,
                    _ => Stage::Finishing,
                },
                begun_at: row.get(3)?,
            })
        })
        .optional()
}

/// Writes the mark, or removes it.
#[cfg(feature = "postgres")]
pub(super) fn write(connection: &Connection, mark: Option<&Mark>) -> rusqlite::Result<()> {
    let Some(mark) = mark else {
        connection.execute("DELETE FROM moved", [])?;
        return Ok(());
    };
    let (state, finished_at) = match mark.stage {
        Stage::Copying => ("copying", None),
        Stage::Finishing => ("finishing", None),
        Stage::Finished(at) => ("finished", Some(at)),
    };
    connection.execute(
        "INSERT OR REPLACE INTO moved (id, move, target, state, begun_at, finished_at) \
         VALUES (1, ?1, ?2, ?3, ?4, ?5)",
        params![
            mark.id.as_bytes(),
            mark.target,
            state,
            mark.begun_at,
            finished_at
        ],
    )?;
    Ok(())
}
