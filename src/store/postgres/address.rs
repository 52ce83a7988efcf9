//! The address of a database: a URL, and what it says about TLS.

use std::fmt;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::Host;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls::{self, Tls};
use crate::store::StoreError;

/// How long a connection may take to be made, unless the URL says `connect_timeout`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long sent data may stay unacknowledged before a connection counts as lost.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may be idle before the network is asked whether its other end is there,
/// unless the URL says `keepalives_idle`. The last connections of a pool may be idle for days.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// The same as the library has it.
const LONG_KEEPALIVE: Duration = Duration::from_secs(2 * 60 * 60);

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
        let (url, tls) = with_tls(url)?;
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
        if config.get_keepalives_idle() == LONG_KEEPALIVE {
            config.keepalives_idle(KEEPALIVE);
        }
        if config.get_application_name().is_none() {
            config.application_name("aegis");
        }
        Ok(Self {
            config,
            tls: MakeRustlsConnect::new(tls.config()?),
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

/// Takes what is about certificates out of a URL, and replaces the modes that the library does not
/// know.
fn with_tls(url: &str) -> Result<(String, Tls), StoreError> {
    let refused = |detail: &str| {
        Err(StoreError::incompatible(format!(
            "the store's URL has {detail}"
        )))
    };
    // The library takes all before the first '@' for user and password.
    let host = url.find('@').map_or(0, |at| at + 1);
    let Some(query) = url[host..].find('?').map(|at| host + at) else {
        return Ok((url.to_owned(), Tls::default()));
    };
    let mut tls = Tls::default();
    let mut mode = None;
    let (mut certificate, mut key) = (None, None);
    let mut rest = Vec::new();
    for parameter in url[query + 1..].split('&') {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let value = decoded(value);
        match &*decoded(name) {
            "sslmode" => mode = Some(value),
            tls::ROOTS if value == "system" => tls.roots = None,
            tls::ROOTS => tls.roots = Some(value.into()),
            tls::CERTIFICATE => certificate = Some(value.into()),
            tls::KEY => key = Some(value.into()),
            _ => rest.push(parameter.to_owned()),
        }
    }
    if let Some(mode) = mode {
        let mode = match &*mode {
            "disable" => "disable",
            "allow" | "prefer" => "prefer",
            "require" | "verify-ca" | "verify-full" => {
                tls.verifies = true;
                "require"
            }
            other => {
                return refused(&format!(
                    "sslmode={other}; allowed are disable, prefer, require and verify-full"
                ));
            }
        };
        rest.push(format!("sslmode={mode}"));
    }
    if tls.roots.is_some() && !tls.verifies {
        return refused(
            "sslrootcert without verifying the certificate; allowed with it are sslmode=require and verify-full",
        );
    }
    tls.identity = match (certificate, key) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (Some(_), None) => return refused("sslcert without sslkey; allowed are both or neither"),
        (None, Some(_)) => return refused("sslkey without sslcert; allowed are both or neither"),
    };
    Ok((format!("{}?{}", &url[..query], rest.join("&")), tls))
}

/// Reads `%20` and the like. A '+' is itself.
fn decoded(text: &str) -> String {
    let text = text.replace('+', "%2B");
    let text = text.replace('=', "%3D");
    let parsed = form_urlencoded::parse(text.as_bytes()).next();
    parsed.map_or_else(String::new, |(text, _)| text.into_owned())
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
            ("?sslmod%65=verify%2Dfull", SslMode::Require, true),
            // The last one counts.
            ("?sslmode=disable&sslmode=require", SslMode::Require, true),
            (
                "?sslmode=require&sslrootcert=system",
                SslMode::Require,
                true,
            ),
        ] {
            let url = format!("postgres://user@host/database{mode}");
            assert_eq!(with_tls(&url).unwrap().1.verifies, verifies, "{url}");
            let address = Address::parse(&url).unwrap();
            assert_eq!(address.config.get_ssl_mode(), expected, "{url}");
        }
    }

    #[test]
    fn an_idle_connection_is_probed_unless_the_url_says_when() {
        for (query, expected) in [
            ("", KEEPALIVE),
            ("?keepalives_idle=5", Duration::from_secs(5)),
            ("?keepalives_idle=600", Duration::from_secs(600)),
        ] {
            let address = Address::parse(&format!("postgres://user@host/database{query}")).unwrap();
            assert_eq!(address.config.get_keepalives_idle(), expected, "{query}");
        }
    }

    #[test]
    fn what_looks_like_parameters_in_a_password_is_none() {
        let url = "postgres://user:a?sslmode=disable&b@host/database?sslmode=require&sslrootcert=/a%20b+c.pem";
        let (rest, tls) = with_tls(url).unwrap();
        assert!(tls.verifies);
        assert_eq!(tls.roots.unwrap().to_str(), Some("/a b+c.pem"));
        let config: Config = rest.parse().unwrap();
        assert_eq!(config.get_password().unwrap(), b"a?sslmode=disable&b");
        assert_eq!(config.get_ssl_mode(), SslMode::Require);
    }

    #[test]
    fn a_wrong_url_is_refused_without_its_password() {
        for url in [
            "mysql://user:secret@host/database",
            "postgres://user:secret@host:port/database",
            "postgres://user:secret@host/database?sslmode=sometimes",
            "postgres://user:secret@host/database?colour=red",
            "postgres:///database",
            "postgres://user:secret@host/database?sslrootcert=/roots.pem",
            "postgres://user:secret@host/database?sslmode=prefer&sslrootcert=/roots.pem",
            "postgres://user:secret@host/database?sslmode=require&sslrootcert=/none/roots.pem",
            "postgres://user:secret@host/database?sslcert=/cert.pem",
            "postgres://user:secret@host/database?sslkey=/key.pem",
            "postgres://user:secret@host/database?sslcert=/none/cert.pem&sslkey=/none/key.pem",
        ] {
            let error = Address::parse(url).unwrap_err();
            assert!(error.is_incompatible(), "{url}");
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("secret"), "{shown}");
        }
    }
}
