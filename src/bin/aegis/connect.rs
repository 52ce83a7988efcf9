//! The options of a command that calls a server: where it is, and who calls.

use std::convert::Infallible;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use aegis_hitl::client::Builder;
use aegis_hitl::{AegisService, TenantId};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches};

use crate::args::seconds;
use crate::config;
use crate::failure::Failure;

/// The server, the caller and the limits of a call.
#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// The server, or unix: with the path of its socket [default: http://localhost:8000].
    #[arg(long, env = "AEGIS_URL", value_name = "URL")]
    pub(crate) url: Option<String>,

    /// The path before /hitl/… [default: /api/v1].
    #[arg(long, env = "AEGIS_PREFIX", value_name = "PATH")]
    pub(crate) prefix: Option<String>,

    #[command(flatten)]
    pub(crate) credential: Credential,

    /// How long one attempt may take, in seconds [default: 10].
    #[arg(long, env = "AEGIS_TIMEOUT", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,

    /// How many retries one call may take [default: 3].
    #[arg(long, env = "AEGIS_RETRIES", value_name = "NUMBER")]
    pub(crate) retries: Option<u32>,

    /// Trusts the PEM certificates in this file, in addition to the platform's.
    #[arg(long, env = "AEGIS_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Connect {
    /// Starts to build a client from these options, and from the configuration file for the rest.
    pub(crate) fn builder(self, config: &config::Client) -> Result<Builder, Failure> {
        let mut builder = AegisService::builder();
        if let Some(url) = self.url.or_else(|| config.url.clone()) {
            builder = match url.strip_prefix("unix:") {
                #[cfg(unix)]
                Some("") => {
                    return Err(Failure::usage(
                        "the URL has no path of a Unix socket; allowed is one such as \
                         unix:/run/aegis/aegis.sock",
                    ));
                }
                #[cfg(unix)]
                Some(path) => builder.base_url("http://localhost").unix_socket(path),
                _ => builder.base_url(url),
            };
        }
        if let Some(prefix) = self.prefix.or_else(|| config.prefix.clone()) {
            builder = builder.api_prefix(prefix);
        }
        // A credential of either kind on the command line or in the environment replaces both in
        // the file.
        match (
            self.credential.0.tenant,
            self.credential.0.token,
            &config.tenant,
            &config.token,
        ) {
            (None, None, tenant, token) => {
                if let Some(tenant) = tenant {
                    builder = builder.tenant_id(tenant.as_str());
                }
                if let Some(token) = token {
                    builder = builder.api_key(token.as_str());
                }
            }
            (tenant, token, _, _) => {
                if let Some(tenant) = tenant {
                    builder = builder.tenant_id(tenant);
                }
                if let Some(token) = token {
                    builder = builder.api_key(token.as_str());
                }
            }
        }
        let configured = config.timeout.map(Duration::try_from_secs_f64).transpose();
        let configured = configured.map_err(|error| {
            Failure::usage("the timeout of the configuration file").because(error)
        })?;
        if let Some(timeout) = self.timeout.or(configured) {
            builder = builder.timeout(timeout);
        }
        if let Some(retries) = self.retries.or(config.retries) {
            builder = builder.max_retries(retries);
        }
        if let Some(path) = self.ca.or_else(|| config.ca.clone()) {
            let pem = fs::read(&path).map_err(|error| {
                Failure::usage(format!("cannot read {}", path.display())).because(error)
            })?;
            builder = builder.root_certificate_pem(pem);
        }
        Ok(builder)
    }
}

impl Connect {
    /// Starts to build a client for a command that needs to know who calls.
    pub(crate) fn builder_for_caller(self, config: &config::Client) -> Result<Builder, Failure> {
        if !self.credential.is_some() && config.tenant.is_none() && config.token.is_none() {
            return Err(Failure::usage(
                "nobody asks; set --tenant or AEGIS_TENANT, or --token or AEGIS_TOKEN, or either \
                 in the configuration file",
            ));
        }
        self.builder(config)
    }

    /// Builds a client for a command that needs to know who calls.
    pub(crate) fn service(self, config: &config::Client) -> Result<AegisService, Failure> {
        Ok(self.builder_for_caller(config)?.build()?)
    }
}

/// A tenant or an API key. If one is a flag and the other is from the environment, the flag wins.
#[derive(Debug)]
pub(crate) struct Credential(Given);

#[derive(Debug, Args)]
struct Given {
    /// The tenant. Not with an API key, which implies it.
    #[arg(long, env = "AEGIS_TENANT", value_name = "TENANT")]
    tenant: Option<TenantId>,

    /// The API key. The environment variable keeps it out of the process list.
    #[arg(
        long,
        env = "AEGIS_TOKEN",
        value_name = "API KEY",
        hide_env_values = true
    )]
    token: Option<Secret>,
}

impl Credential {
    pub(crate) fn is_some(&self) -> bool {
        self.0.tenant.is_some() || self.0.token.is_some()
    }
}

impl Args for Credential {
    fn augment_args(command: clap::Command) -> clap::Command {
        Given::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Given::augment_args_for_update(command)
    }
}

impl FromArgMatches for Credential {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Given::from_arg_matches(matches)?;
        let source = |id| matches.value_source(id);
        match (source("tenant"), source("token")) {
            (Some(ValueSource::CommandLine), Some(ValueSource::EnvVariable)) => given.token = None,
            (Some(ValueSource::EnvVariable), Some(ValueSource::CommandLine)) => given.tenant = None,
            _ => {}
        }
        Ok(Self(given))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A text that no message may quote. It is parsed without checks, as clap quotes what a parser
/// rejects.
#[derive(Clone)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Secret {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}
