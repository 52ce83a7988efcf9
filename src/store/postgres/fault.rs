//! What went wrong, and what that says about a transaction.

use std::error::Error as _;
use std::fmt;
use std::io;

use deadpool::managed::PoolError;
use tokio_postgres::Error;
use tokio_postgres::error::{Severity, SqlState};

use super::tls;
use crate::store::StoreError;

/// Why an attempt ended without an answer.
#[derive(Debug)]
pub(super) enum Fault {
    /// Nothing was recorded, and the next attempt may succeed.
    Again(StoreError),
    /// Nothing was recorded, and the next attempt would fail alike.
    Refused(StoreError),
    /// Whether it was recorded is not known.
    Unknown(StoreError),
}

impl Fault {
    pub(super) fn into_error(self) -> StoreError {
        match self {
            Self::Again(error) | Self::Refused(error) | Self::Unknown(error) => error,
        }
    }

    pub(super) fn error(&self) -> &StoreError {
        match self {
            Self::Again(error) | Self::Refused(error) | Self::Unknown(error) => error,
        }
    }

    pub(super) fn again(detail: &'static str) -> Self {
        Self::Again(StoreError::unavailable(detail))
    }

    /// The same, of an error.
    pub(super) fn lost(error: Error) -> Self {
        Self::Again(lost(error))
    }

    pub(super) fn unknown(detail: &'static str) -> Self {
        Self::Unknown(StoreError::unavailable(detail))
    }

    /// The same fault of a statement that a commit was sent behind. A statement that the server
    /// refused makes the commit a rollback. If no answer came, both may have been carried out.
    pub(super) fn before_commit(self) -> Self {
        match self {
            Self::Again(error) if !is_refusal(&error) => Self::Unknown(error),
            fault => fault,
        }
    }

    /// The error of a commit.
    pub(super) fn of_commit(error: Error) -> Self {
        let was_rolled_back = error.code().is_some_and(|code| {
            // Class 40 is a rollback, but for a completion that is not known.
            code.code().starts_with("40") && *code != SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN
        });
        if was_rolled_back {
            Self::lost(error)
        } else {
            Self::Unknown(
                StoreError::unavailable("whether the database committed is not known")
                    .with_source(Told(error)),
            )
        }
    }
}

/// Whether the server itself refused the statement. What ends a connection may come from a pooler,
/// which does not know what became of the statements behind.
fn is_refusal(error: &StoreError) -> bool {
    let refusal = of_database(error).and_then(Error::as_db_error);
    refusal.is_some_and(|error| error.parsed_severity() == Some(Severity::Error))
}

/// The error of the database behind one of the store.
pub(super) fn of_database(error: &StoreError) -> Option<&Error> {
    error.source()?.downcast_ref().map(|Told(error)| error)
}

/// An error of the database as logs may show it. What PostgreSQL adds in detail has values of rows:
/// names, keys and payloads. So has the message of class 22, about a value.
#[derive(Debug)]
struct Told(Error);

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(told) = self.0.as_db_error() else {
            return self.0.fmt(f);
        };
        match told.code().code() {
            code if code.starts_with("22") => write!(f, "a value is not one (SQLSTATE {code})"),
            code => write!(f, "{} (SQLSTATE {code})", told.message()),
        }
    }
}

impl std::error::Error for Told {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // That of the database is told, and has the rest.
        self.0.source().filter(|_| self.0.as_db_error().is_none())
    }
}

/// What the database lacks, if the error says that it does.
pub(super) fn lacking(error: &StoreError) -> Option<&'static str> {
    of_database(error)?.code().and_then(resource)
}

pub(super) fn is_of_full_disk(error: &StoreError) -> bool {
    of_database(error).and_then(Error::code) == Some(&SqlState::DISK_FULL)
}

/// What class 53 is about, but for connections: who has one needs no other.
fn resource(code: &SqlState) -> Option<&'static str> {
    match code.code().get(..2) {
        Some("53") if *code == SqlState::DISK_FULL => Some("the disk of the database is full"),
        Some("53") if *code == SqlState::OUT_OF_MEMORY => Some("the database is out of memory"),
        Some("53") if *code != SqlState::TOO_MANY_CONNECTIONS => {
            Some("the database is out of resources")
        }
        _ => None,
    }
}

/// The error of a statement before the commit, which records nothing.
impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        // Class 22 is a value and class 23 a constraint: it stays as it is.
        let is_final = error.code().is_some_and(|code| {
            let class = code.code().get(..2).unwrap_or_default();
            matches!(class, "22" | "23" | "42")
        });
        if is_final {
            let lacks = error.as_db_error();
            let lacks = lacks.filter(|error| *error.code() == SqlState::INSUFFICIENT_PRIVILEGE);
            // It names the table. The messages of others may have values in them.
            let detail = match lacks {
                Some(lacks) => format!("the request cannot be recorded: {}", lacks.message()),
                None => "the request cannot be recorded".to_owned(),
            };
            Self::Refused(StoreError::unavailable(detail).with_source(Told(error)))
        } else {
            Self::lost(error)
        }
    }
}

fn lost(error: Error) -> StoreError {
    let lacking = error.code().and_then(resource);
    StoreError::unavailable(lacking.unwrap_or("the database cannot answer now"))
        .with_source(Told(error))
}

impl From<PoolError<Error>> for Fault {
    fn from(error: PoolError<Error>) -> Self {
        Self::Again(match error {
            PoolError::Backend(error) => {
                StoreError::unavailable("the database cannot be reached").with_source(error)
            }
            PoolError::Timeout(_) => {
                StoreError::unavailable("no connection to the database is free")
            }
            PoolError::Closed => StoreError::unavailable("the store is closed"),
            _ => StoreError::unavailable("there is no connection to the database"),
        })
    }
}

/// A value in the database that only an edit by hand can have written.
pub(super) fn unreadable(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::unavailable("a row cannot be read").with_source(error)
}

/// The error of the first connection, in words that tell what to change. `place` is the server and
/// the database without a password.
pub(super) fn of_connect(error: Error, place: &str, user: &str) -> StoreError {
    let code = error.code().cloned();
    let is = |state: &SqlState| code.as_ref() == Some(state);
    if let Some(explained) = tls::explain(&error, place) {
        return explained.with_source(error);
    }
    let mut source = error.source();
    let mut refused = None;
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            refused = Some(io.kind());
        }
        source = cause.source();
    }
    if is(&SqlState::INVALID_PASSWORD) || is(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) {
        let tells = error.as_db_error().map(|error| error.message().to_owned());
        return StoreError::incompatible(format!(
            "PostgreSQL at {place} does not let the user {user} in ({}); allowed is what its pg_hba.conf allows, with the \
             password in the URL or in PGPASSWORD",
            tells.unwrap_or_default()
        ));
    }
    if is(&SqlState::INVALID_CATALOG_NAME) {
        return StoreError::incompatible(format!(
            "there is no database at {place}; make it with createdb"
        ))
        .with_source(error);
    }
    if is(&SqlState::TOO_MANY_CONNECTIONS) {
        return StoreError::unavailable(format!("PostgreSQL at {place} takes no more connections"))
            .with_source(error);
    }
    // The library has no predicates for these.
    let text = error.to_string();
    if text.contains("password missing") || text.contains("invalid configuration") {
        return StoreError::incompatible(format!(
            "PostgreSQL at {place} asks the user {user} for a password; give it in the URL or in PGPASSWORD"
        ))
        .with_source(error);
    }
    StoreError::unavailable(match refused {
        Some(kind) => format!("PostgreSQL at {place} cannot be reached: {kind}"),
        None => format!("PostgreSQL at {place} cannot be used"),
    })
    .with_source(error)
}
