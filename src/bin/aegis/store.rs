//! The stores that a server can keep its records in.

use std::path::{Path, PathBuf};

use aegis_hitl::store::{
    DeadLetter, EndpointState, Forget, Forgotten, PostgresBuilder, PostgresStore, Resend, Resent,
    Resume, Resumed, SqliteStore, Store, StoreError,
};

use crate::failure::Failure;

/// Where the records are.
#[derive(Debug)]
pub(crate) enum Place {
    File(PathBuf),
    Postgres(PostgresBuilder),
}

impl Place {
    /// Tells a URL from the path of a file.
    pub(crate) fn new(
        path: PathBuf,
        direct: Option<String>,
        no_migrate: bool,
    ) -> Result<Self, Failure> {
        let url = path.to_str().filter(|path| path.contains("://"));
        let Some(url) = url else {
            return Ok(Self::File(path));
        };
        match url.split("://").next() {
            Some("postgres" | "postgresql") => {
                let builder = PostgresStore::builder(url).migrate(!no_migrate);
                let builder = match direct {
                    Some(direct) => builder.direct(direct),
                    None => builder,
                };
                let checked = builder.check();
                checked.map_err(|error| Failure::usage("the store").because(error))?;
                Ok(Self::Postgres(builder))
            }
            // The rest of a URL may hold a password.
            scheme => Err(Failure::usage(format!(
                "the store is a URL ({}://…); allowed are the path of a database file and \
                 postgres://user@host:5432/database",
                scheme.unwrap_or_default()
            ))),
        }
    }
}

/// The database file of a command that is for files alone. The URL of a database, which may hold a
/// password, is refused and not shown.
pub(crate) fn file(path: PathBuf) -> Result<PathBuf, Failure> {
    if path.to_string_lossy().contains("://") {
        return Err(Failure::usage(
            "the store is a URL, and this command is for database files alone",
        ));
    }
    Ok(path)
}

pub(crate) fn open(path: &Path) -> Result<SqliteStore, Failure> {
    let opened = SqliteStore::open(path);
    opened.map_err(|error| Failure::other("cannot open the store").because(error))
}

pub(crate) async fn connect(builder: PostgresBuilder) -> Result<PostgresStore, Failure> {
    let connected = builder.connect().await;
    connected.map_err(|error| Failure::other("cannot open the store").because(error))
}

/// The records of a store beside the servers that use it.
#[derive(Debug)]
pub(crate) enum Records {
    File(PathBuf),
    Postgres(PostgresStore),
}

impl Records {
    /// Opens the records that are there. Nothing is made or migrated.
    pub(crate) async fn open(path: PathBuf) -> Result<Self, Failure> {
        Ok(match Place::new(path, None, true)? {
            Place::File(path) => Self::File(path),
            Place::Postgres(builder) => Self::Postgres(connect(builder.connections(2)).await?),
        })
    }

    pub(crate) async fn endpoints(&self) -> Result<Vec<EndpointState>, Failure> {
        let endpoints = match self {
            Self::File(path) => SqliteStore::read_endpoints(path),
            Self::Postgres(store) => store.endpoints().await,
        };
        endpoints.map_err(unusable)
    }

    pub(crate) async fn dead_letters(
        &self,
        endpoint: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Failure> {
        let letters = match self {
            Self::File(path) => SqliteStore::read_dead_letters(path, endpoint, limit),
            Self::Postgres(store) => store.dead_letters(endpoint, limit).await,
        };
        letters.map_err(unusable)
    }

    pub(crate) async fn resend(&self, request: Resend) -> Result<Resent, Failure> {
        let resent = match self {
            Self::File(path) => SqliteStore::resend_beside(path, &request),
            Self::Postgres(store) => store.resend(request).await,
        };
        resent.map_err(unusable)
    }

    pub(crate) async fn resume(&self, request: Resume) -> Result<Resumed, Failure> {
        let resumed = match self {
            Self::File(path) => SqliteStore::resume_beside(path, &request),
            Self::Postgres(store) => store.resume(request).await,
        };
        resumed.map_err(unusable)
    }

    pub(crate) async fn forget(&self, request: Forget) -> Result<Forgotten, Failure> {
        let forgotten = match self {
            Self::File(path) => SqliteStore::forget_beside(path, &request),
            Self::Postgres(store) => store.forget_endpoint(request).await,
        };
        forgotten.map_err(unusable)
    }
}

fn unusable(error: StoreError) -> Failure {
    Failure::other("cannot use the store").because(error)
}

/// A store that a process opens, and closes before it ends.
pub(crate) trait Kept: Store {
    /// Completes if the store can never answer again.
    fn failed(&self) -> impl Future<Output = ()> + Send;

    /// Returns when every request sent before is durable.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

impl Kept for SqliteStore {
    fn failed(&self) -> impl Future<Output = ()> + Send {
        self.failed()
    }

    fn close(&self) -> impl Future<Output = ()> + Send {
        self.close()
    }
}

impl Kept for PostgresStore {
    /// A database that is gone may come back.
    fn failed(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    fn close(&self) -> impl Future<Output = ()> + Send {
        self.close()
    }
}
