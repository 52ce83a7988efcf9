//! The command line.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use aegis_hitl::server::Host;
use aegis_hitl::{IdempotencyKey, RequestId, TenantId, ThreadId};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

/// Approvals of AI-agent actions, each decided exactly once.
///
/// Every option can also be set by its environment variable or in a configuration file; a flag wins over the environment,
/// the environment over the file, the file over the default.
///
/// Exit codes: 0 on record (or done); 1 other failure; 2 usage; 3 refused, as another decision or payload is on record or
/// the action is closed; 4 the outcome is unknown, ask again with the same key.
#[derive(Debug, Parser)]
#[command(name = "aegis", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Reads settings from this TOML file.
    #[arg(long, env = "AEGIS_CONFIG", value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// Reads the command line and the environment, and ends the process where they are wrong.
    pub(crate) fn read() -> Self {
        let matches = Self::command().get_matches();
        let mut cli = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        let connect = match &mut cli.command {
            Command::Approve(args) | Command::Reject(args) => Some(&mut args.connect),
            Command::Status(args) => Some(&mut args.connect),
            Command::Serve(_) | Command::Keys(_) | Command::Backup(_) | Command::Check(_) => None,
        };
        if let (Some(connect), Some((_, matches))) = (connect, matches.subcommand()) {
            connect.keep_the_closer_credential(matches);
        }
        cli
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs the server.
    Serve(Serve),
    /// Approves an action.
    Approve(Decide),
    /// Rejects an action.
    Reject(Decide),
    /// Shows where an action stands.
    Status(Status),
    /// Makes API keys for the server's key file.
    #[command(subcommand)]
    Keys(Keys),
    /// Copies a database to a new file, while a server runs on it or not.
    Backup(Backup),
    /// Looks at all of a database file, and says whether it is sound (exit code 0) or not (1).
    Check(Check),
}

#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The database file [default: aegis.db].
    #[arg(long, env = "AEGIS_STORE", value_name = "FILE")]
    pub(crate) store: Option<PathBuf>,

    /// The copy, a file that does not exist yet. It gets this name when it is whole, verified and synced.
    #[arg(value_name = "TO")]
    pub(crate) to: PathBuf,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// The database file; a server may run on it.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The address to listen on [default: 127.0.0.1:8000].
    #[arg(long, env = "AEGIS_LISTEN", value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,

    /// The database file; it is made if there is none [default: aegis.db].
    #[arg(long, env = "AEGIS_STORE", value_name = "FILE")]
    pub(crate) store: Option<PathBuf>,

    /// The path before /hitl/… [default: /api/v1].
    #[arg(long, env = "AEGIS_PREFIX", value_name = "PATH")]
    pub(crate) prefix: Option<String>,

    /// Takes tenants from the API keys in this file; see `aegis keys new`. SIGHUP reads it again.
    ///
    /// A file that its group or others may write is refused; one that they may read is warned of.
    #[arg(long, env = "AEGIS_KEYS", value_name = "FILE")]
    pub(crate) keys: Option<PathBuf>,

    /// Trusts the Tenant-Id header on an address that is not loopback.
    #[arg(long, env = "AEGIS_TRUST_TENANT_HEADER", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) trust_tenant_header: Option<bool>,

    /// A host name or address that browsers and clients use for the server; repeatable, and comma-separated in the environment.
    ///
    /// Requests for other hosts are answered 421, and web pages of other origins may change nothing. Without API keys that is
    /// always so, and loopback names and the address listened on are allowed beside these. With API keys it is so if a host
    /// is given.
    #[arg(long, env = "AEGIS_HOST", value_name = "NAME", value_delimiter = ',')]
    pub(crate) host: Vec<Host>,

    /// Decides only actions that were submitted before.
    #[arg(long, env = "AEGIS_REQUIRE_SUBMISSION", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) require_submission: Option<bool>,

    /// How long requests in flight may take to end after SIGTERM, in seconds [default: 30].
    #[arg(long, env = "AEGIS_DRAIN_TIMEOUT", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) drain_timeout: Option<Duration>,

    /// The most connections at a time [default: 4096, or what the limit of open files allows].
    #[arg(long, env = "AEGIS_MAX_CONNECTIONS", value_name = "NUMBER")]
    pub(crate) max_connections: Option<NonZeroUsize>,

    /// The most connections at a time of one address, or of one /64 network of IPv6 [default: a quarter of the most
    /// connections, and no limit for this machine itself].
    ///
    /// Behind a proxy on another machine, set it to as many as there may be connections.
    #[arg(long, env = "AEGIS_MAX_CONNECTIONS_PER_PEER", value_name = "NUMBER")]
    pub(crate) max_connections_per_peer: Option<NonZeroUsize>,

    /// What to log to stderr, such as `warn` or `aegis_hitl=debug` [default: info]. SIGHUP reads it again from the
    /// configuration file, unless it is set here or in the environment.
    #[arg(long, env = "AEGIS_LOG", value_name = "FILTER")]
    pub(crate) log: Option<String>,
}

/// Which server, and who asks.
#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// The server [default: http://localhost:8000].
    #[arg(long, env = "AEGIS_URL", value_name = "URL")]
    pub(crate) url: Option<String>,

    /// The path before /hitl/… [default: /api/v1].
    #[arg(long, env = "AEGIS_PREFIX", value_name = "PATH")]
    pub(crate) prefix: Option<String>,

    /// The tenant; not with an API key, which names it.
    #[arg(long, env = "AEGIS_TENANT", value_name = "TENANT")]
    pub(crate) tenant: Option<TenantId>,

    /// The API key. The environment variable keeps it out of the process list.
    #[arg(
        long,
        env = "AEGIS_TOKEN",
        value_name = "API KEY",
        hide_env_values = true
    )]
    pub(crate) token: Option<Secret>,

    /// How long one attempt may take, in seconds [default: 10].
    #[arg(long, env = "AEGIS_TIMEOUT", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,

    /// How many retries one call may take [default: 3].
    #[arg(long, env = "AEGIS_RETRIES", value_name = "NUMBER")]
    pub(crate) retries: Option<u32>,

    /// Trusts the PEM certificates in this file too.
    #[arg(long, env = "AEGIS_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Connect {
    /// A tenant and an API key exclude each other; of one that is a flag and one from the environment the flag stands.
    fn keep_the_closer_credential(&mut self, matches: &ArgMatches) {
        let source = |id| matches.value_source(id);
        match (source("tenant"), source("token")) {
            (Some(ValueSource::CommandLine), Some(ValueSource::EnvVariable)) => self.token = None,
            (Some(ValueSource::EnvVariable), Some(ValueSource::CommandLine)) => self.tenant = None,
            _ => {}
        }
    }
}

/// What no message may repeat. It is taken as it is: the parser's messages would quote what it refuses.
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

#[derive(Debug, Args)]
pub(crate) struct Decide {
    /// The idempotency key.
    pub(crate) key: IdempotencyKey,

    /// The thread.
    #[arg(long, env = "AEGIS_THREAD", value_name = "THREAD")]
    pub(crate) thread: Option<ThreadId>,

    /// What the action is about: a JSON object, @FILE, or - for standard input.
    #[arg(long, value_name = "JSON|@FILE|-")]
    pub(crate) payload: Option<String>,

    /// A comment on the decision.
    #[arg(long)]
    pub(crate) comment: Option<String>,

    /// The X-Request-Id of the call, to repeat a call of which the outcome is unknown [default: a new one].
    #[arg(long, value_name = "ID")]
    pub(crate) call_id: Option<RequestId>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// The server's id of the action, or the X-Request-Id of the call that decided it.
    pub(crate) id: RequestId,

    /// Waits this long for a decision, in seconds, 55 at most.
    #[arg(long, value_name = "SECONDS", value_parser = wait)]
    pub(crate) wait: Option<Duration>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Keys {
    /// Makes a key: prints the secret for the client, and the line for the server's key file.
    New(NewKey),
}

#[derive(Debug, Args)]
pub(crate) struct NewKey {
    /// The tenant that the key speaks for.
    #[arg(long, env = "AEGIS_TENANT", value_name = "TENANT")]
    pub(crate) tenant: TenantId,

    /// Who holds the key, for the audit trail; without spaces.
    #[arg(long, value_parser = name)]
    pub(crate) name: String,

    /// What the key may do.
    #[arg(long, value_enum, default_value = "decide")]
    pub(crate) scope: Scope,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Scope {
    /// Submit and decide.
    Decide,
    /// Only read.
    Read,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let allowed = "allowed are seconds, more than 0 and up to 86400, such as 10 or 0.5";
    let seconds: f64 = text.parse().map_err(|_| allowed.to_owned())?;
    if seconds > 0.0 && seconds <= 86_400.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(allowed.to_owned())
    }
}

fn wait(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 0..=55) => Ok(Duration::from_secs(seconds)),
        _ => Err("allowed are whole seconds from 0 to 55".to_owned()),
    }
}

fn name(text: &str) -> Result<String, String> {
    if !text.is_empty() && text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("allowed are 1 to 255 visible ASCII characters without spaces".to_owned())
    }
}
