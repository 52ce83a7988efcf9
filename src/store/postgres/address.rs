//! The address of a database: a URL, and what its `sslmode` means.

use std::fmt;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::Host;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls;
use crate::store::StoreError;

/// How long a connection may take to be made, unless the URL says `connect_timeout`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long sent data may stay unacknowledged before a connection counts as lost.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a database is, and how to get there.
#[derive(Clone)]
pub(super) struct Address {
    pub(super) config: Config,
    pub(super) tls: MakeRustlsConnect,
}

impl Address {
    /// Reads a URL: `postgres://user@host:5432/database?sslmode=verify-full`.
    pub(super) fn parse(url: &str) -> Result<Self, StoreError> {
        if !["postgres://", "postgresql://"]
            .iter()
            .any(|scheme| url.starts_with(scheme))
        {
            return Err(StoreError::incompatible(
                "the store's URL begins with another scheme; allowed is postgres://user@host:5432/database",
            ));
        }
        let (url, verifies) = with_mode(url)?;
        let mut config: Config = url.parse().map_err(|error| {
            StoreError::incompatible(
                "the store's URL; allowed is postgres://user@host:5432/database",
            )
            .with_source(error)
        })?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(StoreError::incompatible(
                "the store's URL names no host; allowed is postgres://user@host:5432/database",
            ));
        }
        if config.get_password().is_none()
            && let Some(password) = std::env::var_os("PGPASSWORD")
        {
            config.password(password.as_encoded_bytes());
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(SEND_TIMEOUT);
        }
        if config.get_application_name().is_none() {
            config.application_name("aegis");
        }
        Ok(Self {
            config,
            tls: MakeRustlsConnect::new(tls::config(verifies)?),
        })
    }

    /// The server and the database, without user and password.
    pub(super) fn place(&self) -> String {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            #[cfg(unix)]
            Some(Host::Unix(path)) => path.display().to_string(),
            None => {
                (self.config.get_hostaddrs().first()).map_or_else(String::new, ToString::to_string)
            }
        };
        let port = self.config.get_ports().first().copied().unwrap_or(5432);
        let database = self.config.get_dbname().or(self.config.get_user());
        format!("{host}:{port}/{}", database.unwrap_or_default())
    }

    pub(super) fn user(&self) -> &str {
        self.config.get_user().unwrap_or("(the system's)")
    }
}

/// The password is not shown.
impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Address").field(&self.place()).finish()
    }
}

/// Replaces the modes that the library does not know: it verifies whenever there is TLS. Returns
/// also whether the certificate is verified.
fn with_mode(url: &str) -> Result<(String, bool), StoreError> {
    const NAME: &str = "sslmode=";
    let query = url.find('?').map_or(url.len(), |at| at + 1);
    let Some(at) = url[query..].find(NAME).map(|at| query + at + NAME.len()) else {
        return Ok((url.to_owned(), false));
    };
    let end = url[at..].find('&').map_or(url.len(), |end| at + end);
    let (mode, verifies) = match &url[at..end] {
        "disable" => ("disable", false),
        "allow" | "prefer" => ("prefer", false),
        "require" | "verify-ca" | "verify-full" => ("require", true),
        other => {
            return Err(StoreError::incompatible(format!(
                "the store's URL has sslmode={other}; allowed are disable, prefer, require and verify-full"
            )));
        }
    };
    Ok((format!("{}{mode}{}", &url[..at], &url[end..]), verifies))
}

#[cfg(test)]
mod tests {
    use tokio_postgres::config::SslMode;

    use super::*;

    #[test]
    fn a_mode_of_tls_says_whether_a_certificate_is_verified() {
        for (mode, expected, verifies) in [
            ("", SslMode::Prefer, false),
            ("?sslmode=disable", SslMode::Disable, false),
            ("?sslmode=prefer&connect_timeout=3", SslMode::Prefer, false),
            ("?connect_timeout=3&sslmode=require", SslMode::Require, true),
            (
                "?sslmode=verify-full&connect_timeout=3",
                SslMode::Require,
                true,
            ),
        ] {
            let url = format!("postgres://user@host/database{mode}");
            assert_eq!(with_mode(&url).unwrap().1, verifies, "{url}");
            let address = Address::parse(&url).unwrap();
            assert_eq!(address.config.get_ssl_mode(), expected, "{url}");
        }
    }

    #[test]
    fn a_wrong_url_is_refused_without_its_password() {
        for url in [
            "mysql://user:secret@host/database",
            "postgres://user:secret@host:port/database",
            "postgres://user:secret@host/database?sslmode=sometimes",
            "postgres://user:secret@host/database?colour=red",
            "postgres:///database",
        ] {
            let error = Address::parse(url).unwrap_err();
            assert!(error.is_incompatible(), "{url}");
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("secret"), "{shown}");
        }
    }
}
