//! The configuration file: TOML, with the names of the flags.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use aegis_hitl::server::{Host, Rate};
use serde::{Deserialize, Deserializer};

use crate::failure::Failure;
use crate::listen::{Listen, Mode};
use crate::log::Format as LogFormat;

/// The default database file.
pub(crate) const STORE: &str = "aegis.db";

/// The contents of a configuration file. An unknown name is an error, so that a misspelled setting
/// is not ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    pub(crate) serve: Serve,
    pub(crate) client: Client,
    pub(crate) webhook: Vec<Webhook>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct Serve {
    pub(crate) listen: Option<Listen>,
    pub(crate) socket_mode: Option<Mode>,
    pub(crate) metrics_listen: Option<SocketAddr>,
    pub(crate) tls_cert: Option<PathBuf>,
    pub(crate) tls_key: Option<PathBuf>,
    pub(crate) store: Option<PathBuf>,
    pub(crate) store_direct: Option<String>,
    pub(crate) no_migrate: Option<bool>,
    pub(crate) prefix: Option<String>,
    pub(crate) keys: Option<PathBuf>,
    pub(crate) trust_tenant_header: Option<bool>,
    #[serde(deserialize_with = "hosts")]
    pub(crate) host: Vec<Host>,
    pub(crate) require_submission: Option<bool>,
    pub(crate) allow_self_approval: Option<bool>,
    pub(crate) public_url: Option<String>,
    pub(crate) trust_user_header: Option<String>,
    pub(crate) trusted_proxy: Vec<IpAddr>,
    pub(crate) retain: Option<String>,
    pub(crate) drain_timeout: Option<f64>,
    pub(crate) max_connections: Option<NonZeroUsize>,
    pub(crate) max_connections_per_peer: Option<NonZeroUsize>,
    #[serde(deserialize_with = "rate")]
    pub(crate) max_rate_per_peer: Option<Rate>,
    #[serde(deserialize_with = "rate")]
    pub(crate) max_rate_per_tenant: Option<Rate>,
    pub(crate) log: Option<String>,
    pub(crate) log_format: Option<LogFormat>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct Client {
    pub(crate) url: Option<String>,
    pub(crate) prefix: Option<String>,
    pub(crate) tenant: Option<String>,
    pub(crate) thread: Option<String>,
    pub(crate) token: Option<String>,
    pub(crate) timeout: Option<f64>,
    pub(crate) retries: Option<u32>,
    pub(crate) ca: Option<PathBuf>,
}

/// An endpoint for webhooks or notifications.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Webhook {
    pub(crate) name: String,
    pub(crate) url: String,
    #[serde(default)]
    pub(crate) format: Format,
    pub(crate) secret: Option<Secrets>,
    pub(crate) secret_file: Option<PathBuf>,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) tenants: Option<Vec<String>>,
    pub(crate) events: Option<Vec<String>>,
    #[serde(default)]
    pub(crate) from: Begin,
}

/// The secrets are not shown, and neither is the URL, which may hold a token.
impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Format {
    #[default]
    Standard,
    Slack,
    Ntfy,
}

/// Where a new endpoint begins.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Begin {
    #[default]
    Now,
    Oldest,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Secrets {
    One(String),
    Several(Vec<String>),
}

fn rate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Rate>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

fn hosts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Host>, D::Error> {
    let texts: Vec<String> = Deserialize::deserialize(deserializer)?;
    let parsed = texts.iter().map(|text| text.parse());
    parsed
        .collect::<Result<_, _>>()
        .map_err(serde::de::Error::custom)
}

impl Config {
    /// Reads a file. Without a path, nothing is set.
    pub(crate) fn read(path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::usage(format!("cannot read {}", path.display())).because(error)
        })?;
        // The parser's message quotes the line, which may hold a token.
        toml::from_str(&text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start));
            let line = 1 + before.unwrap_or_default().matches('\n').count();
            Failure::usage(format!(
                "{}, line {line}: {}",
                path.display(),
                without_value(error.message())
            ))
        })
    }
}

/// Takes the value out of a message about a value of the wrong type, which may be a token: serde
/// writes "invalid type: integer `5`, expected a string".
fn without_value(message: &str) -> Cow<'_, str> {
    let parts = || {
        let (found, expected) = message
            .strip_prefix("invalid type: ")?
            .rsplit_once(", expected ")?;
        let kind = found.split(['`', '"']).next()?.trim_end();
        Some(format!("invalid type: {kind}, expected {expected}"))
    };
    parts().map_or(Cow::Borrowed(message), Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_keeps_the_types_and_loses_the_value() {
        for (message, kept) in [
            (
                "invalid type: integer `5`, expected a string",
                "invalid type: integer, expected a string",
            ),
            (
                "invalid type: string \"a, expected b\", expected struct Client",
                "invalid type: string, expected struct Client",
            ),
            (
                "invalid type: floating point `0.5`, expected u32",
                "invalid type: floating point, expected u32",
            ),
            (
                "invalid type: map, expected a string",
                "invalid type: map, expected a string",
            ),
            ("unknown field `tenannt`", "unknown field `tenannt`"),
        ] {
            assert_eq!(without_value(message), kept);
        }
    }
}
