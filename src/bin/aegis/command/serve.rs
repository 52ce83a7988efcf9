//! `aegis serve`.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aegis_hitl::outbox::{Outbox, PublicUrl};
use aegis_hitl::protocol::{DEFAULT_PREFIX, Escaped, Prefix};
use aegis_hitl::server::{Auth, HitlService, Host, Inbox, Rate, Retention, Server, Shutdown};
use clap::Args;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Context;
use crate::args::seconds;
use crate::config;
use crate::failure::Failure;
use crate::key_file;
use crate::listen::{Bound, Listen, Mode};
use crate::log::{Format, Log};
use crate::print::say;
use crate::reload::{self, Reload, Webhooks};
use crate::signals::{Signal, Signals};
use crate::store::{self, Kept, Place};
use crate::tls_files::TlsFiles;
use crate::webhook;

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The address to listen on, or unix: with the path of a socket [default: 127.0.0.1:8000].
    ///
    /// A socket that a dead server left is replaced. The clients of a socket are local ones.
    #[arg(long, env = "AEGIS_LISTEN", value_name = "ADDRESS")]
    pub(crate) listen: Option<Listen>,

    /// The permissions of the Unix socket, in octal [default: 0600].
    ///
    /// To connect takes the permission to write: 0660 lets the group of the server connect.
    #[arg(long, env = "AEGIS_SOCKET_MODE", value_name = "MODE")]
    pub(crate) socket_mode: Option<Mode>,

    /// An address of its own for /metrics and /livez, such as 127.0.0.1:9464 [default: none].
    ///
    /// Whoever reaches it can read the metrics. It speaks plain HTTP, also with --tls-cert. Without API keys, the server's own address serves
    /// them too.
    #[arg(long, env = "AEGIS_METRICS_LISTEN", value_name = "ADDRESS")]
    pub(crate) metrics_listen: Option<SocketAddr>,

    /// Speaks TLS with the certificate chain in this PEM file, the server's own certificate first;
    /// with --tls-key. SIGHUP reloads both.
    #[arg(long, env = "AEGIS_TLS_CERT", value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// The PEM file of the certificate's private key, which is not encrypted.
    ///
    /// A file that others may read or write, that its group may write, or that belongs to another
    /// user, is refused.
    #[arg(long, env = "AEGIS_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,

    /// The database: a file, created if it does not exist, or postgres://user@host:5432/database
    /// [default: aegis.db].
    ///
    /// Any number of servers may share a PostgreSQL database. Its password can be in PGPASSWORD.
    #[arg(
        long,
        env = "AEGIS_STORE",
        value_name = "FILE|URL",
        hide_env_values = true
    )]
    pub(crate) store: Option<PathBuf>,

    /// The URL of the PostgreSQL database without the pooler (pgbouncer) of --store, for migrations and
    /// for news of other servers [default: --store].
    #[arg(
        long,
        env = "AEGIS_STORE_DIRECT",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(crate) store_direct: Option<String>,

    /// Refuses to start if the schema of the PostgreSQL database is not that of this release, instead
    /// of making it.
    #[arg(
        long,
        env = "AEGIS_NO_MIGRATE",
        num_args = 0..=1,
        default_missing_value = "true",
        require_equals = true
    )]
    pub(crate) no_migrate: Option<bool>,

    /// The path before /hitl/… [default: /api/v1].
    #[arg(long, env = "AEGIS_PREFIX", value_name = "PATH")]
    pub(crate) prefix: Option<String>,

    /// Takes tenants from the API keys in this file; see `aegis keys new`. SIGHUP reloads it.
    ///
    /// A file that its group or others may write, or that belongs to another user, is refused; one
    /// that others may read is reported.
    #[arg(long, env = "AEGIS_KEYS", value_name = "FILE")]
    pub(crate) keys: Option<PathBuf>,

    /// Trusts the Tenant-Id header on an address that is not loopback.
    #[arg(
        long,
        env = "AEGIS_TRUST_TENANT_HEADER",
        num_args = 0..=1,
        default_missing_value = "true",
        require_equals = true
    )]
    pub(crate) trust_tenant_header: Option<bool>,

    /// A host name or address that browsers and clients use for the server; repeatable, and
    /// comma-separated in the environment.
    ///
    /// Requests for other hosts are answered 421, and web pages of other origins may change
    /// nothing. Without API keys this always applies, and loopback names and the listening address
    /// are allowed too. With API keys it applies once a host is given.
    #[arg(long, env = "AEGIS_HOST", value_name = "NAME", value_delimiter = ',')]
    pub(crate) host: Vec<Host>,

    /// Decides only actions that were submitted before.
    #[arg(
        long,
        env = "AEGIS_REQUIRE_SUBMISSION",
        num_args = 0..=1,
        default_missing_value = "true",
        require_equals = true
    )]
    pub(crate) require_submission: Option<bool>,

    /// Lets the owner of the API key that submitted an action decide on it.
    #[arg(
        long,
        env = "AEGIS_ALLOW_SELF_APPROVAL",
        num_args = 0..=1,
        default_missing_value = "true",
        require_equals = true
    )]
    pub(crate) allow_self_approval: Option<bool>,

    /// The URL by which reviewers reach the server, such as `https://aegis.example.com`: for the
    /// links in notifications, and the one-time link to the inbox.
    ///
    /// With https, browsers send the session cookie of the inbox by https only.
    #[arg(long, env = "AEGIS_PUBLIC_URL", value_name = "URL")]
    pub(crate) public_url: Option<String>,

    /// Takes the name of a reviewer from this header of a proxy that signs people in; see
    /// --trusted-proxy.
    ///
    /// The proxy must set or remove the header on each request. With a Tenant-Id header of the
    /// proxy, the reviewer sees that tenant; without, all of them.
    #[arg(long, env = "AEGIS_TRUST_USER_HEADER", value_name = "NAME")]
    pub(crate) trust_user_header: Option<String>,

    /// An address that the proxy of --trust-user-header connects from; repeatable, and
    /// comma-separated in the environment.
    #[arg(
        long,
        env = "AEGIS_TRUSTED_PROXY",
        value_name = "ADDRESS",
        value_delimiter = ','
    )]
    pub(crate) trusted_proxy: Vec<IpAddr>,

    /// How long actions stay that are over, such as 30d or 12h, at least 1h [default: for ever].
    ///
    /// An action is over when it was rejected, expired, cancelled or completed, or approved and not
    /// claimed. Then it is removed, with its events. Its key stays decided.
    #[arg(long, env = "AEGIS_RETAIN", value_name = "TIME")]
    pub(crate) retain: Option<String>,

    /// How long requests in flight may take to end after SIGTERM, in seconds [default: 30].
    #[arg(long, env = "AEGIS_DRAIN_TIMEOUT", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) drain_timeout: Option<Duration>,

    /// The maximum number of connections [default: 4096, or what the limit of open files allows].
    #[arg(long, env = "AEGIS_MAX_CONNECTIONS", value_name = "NUMBER")]
    pub(crate) max_connections: Option<NonZeroUsize>,

    /// The maximum number of connections from one IPv4 address or one IPv6 /64 network [default: a
    /// quarter of the maximum number of connections; no limit for loopback].
    ///
    /// Behind a proxy on another machine, set it to the maximum number of connections.
    #[arg(long, env = "AEGIS_MAX_CONNECTIONS_PER_PEER", value_name = "NUMBER")]
    pub(crate) max_connections_per_peer: Option<NonZeroUsize>,

    /// The maximum rate of requests from one IPv4 address or one IPv6 /64 network, such as 100/s or
    /// 600/m [default: no limit].
    ///
    /// As many may come at once. Requests beyond it are answered 429. Behind a proxy, all come from
    /// its address: limit them there.
    #[arg(long, env = "AEGIS_MAX_RATE_PER_PEER", value_name = "RATE")]
    pub(crate) max_rate_per_peer: Option<Rate>,

    /// The maximum rate of requests of one tenant, such as 100/s or 600/m [default: no limit].
    ///
    /// The pages of the inbox do not count.
    #[arg(long, env = "AEGIS_MAX_RATE_PER_TENANT", value_name = "RATE")]
    pub(crate) max_rate_per_tenant: Option<Rate>,

    /// What to log to stderr, such as `warn` or `aegis_hitl=debug` [default: info,h2=error].
    /// SIGHUP reloads it from the configuration file, unless it is set here or in the environment.
    #[arg(long, env = "AEGIS_LOG", value_name = "FILTER")]
    pub(crate) log: Option<String>,

    /// The format of the log [default: text].
    #[arg(long, env = "AEGIS_LOG_FORMAT", value_name = "FORMAT")]
    pub(crate) log_format: Option<Format>,
}

const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves until SIGTERM or SIGINT, and then drains. A second signal ends the server at once.
pub(crate) async fn run(args: Serve, context: Context) -> Result<(), Failure> {
    let Context { config, file } = context;
    let (config, webhooks) = (config.serve, config.webhook);
    // This comes first: until then, a signal ends the process.
    let signals = Signals::new()?;
    let filter_is_given = args.log.is_some();
    let format = args.log_format.or(config.log_format).unwrap_or_default();
    let log = Log::start(args.log.or(config.log).as_deref(), format)?;
    raise_file_limit();
    let listen = args.listen.or(config.listen).unwrap_or_default();
    let path = args
        .store
        .or(config.store)
        .unwrap_or_else(|| PathBuf::from(config::STORE));
    let prefix = args.prefix.or(config.prefix);
    let prefix = prefix.as_deref().unwrap_or(DEFAULT_PREFIX);
    // Errors of usage are reported before the address is bound and the store is opened.
    let prefix =
        Prefix::new(prefix).map_err(|error| Failure::usage("the prefix").because(error))?;
    let require_submission = args.require_submission.or(config.require_submission);
    let allow_self_approval = args.allow_self_approval.or(config.allow_self_approval);
    let hosts = if args.host.is_empty() {
        config.host
    } else {
        args.host
    };
    let retention = args.retain.or(config.retain);
    let retention = retention.as_deref().map(retention_of).transpose()?;
    let public_url = args.public_url.or(config.public_url);
    let public_url = public_url.map(|url| url.parse()).transpose();
    let public_url: Option<PublicUrl> =
        public_url.map_err(|error| Failure::usage("public-url").because(error))?;
    let proxies = if args.trusted_proxy.is_empty() {
        config.trusted_proxy
    } else {
        args.trusted_proxy
    };
    let user_header = args.trust_user_header.or(config.trust_user_header);
    let tls = TlsFiles::of(
        args.tls_cert.or(config.tls_cert),
        args.tls_key.or(config.tls_key),
    )?;
    let tls = match tls {
        #[cfg(unix)]
        Some(_) if matches!(listen, Listen::Unix(_)) => {
            return Err(Failure::usage(
                "there is a certificate (--tls-cert), and --listen is a Unix socket, which speaks \
                 plain HTTP; allowed is one of the two",
            ));
        }
        Some(files) => Some((files.read()?, files)),
        None => None,
    };
    if tls.is_some() && public_url.as_ref().is_some_and(|url| !url.is_https()) {
        // Browsers keep no secure cookie of such pages, so nobody could sign in.
        return Err(Failure::usage(
            "the public URL is http (--public-url), and the server speaks TLS (--tls-cert); \
             allowed is https",
        ));
    }
    let inbox = inbox(public_url.as_ref(), user_header, proxies)?;
    let (sender, endpoints) = watch::channel(webhook::endpoints(webhooks)?);
    let outbox = reload::outbox(endpoints, public_url.clone())?;
    let trust = args.trust_tenant_header.or(config.trust_tenant_header);
    let configured = config
        .drain_timeout
        .map(Duration::try_from_secs_f64)
        .transpose();
    let configured = configured.map_err(|error| {
        Failure::usage("the drain timeout of the configuration file").because(error)
    })?;
    let keys = match args.keys.or(config.keys) {
        Some(path) => Some((key_file::read(&path)?, path)),
        None => None,
    };
    let (auth, keys) = match keys {
        Some((keys, path)) => {
            let (sender, keys) = watch::channel(keys);
            (Auth::watched_keys(keys), Some((path, sender)))
        }
        None => (Auth::tenant_header(), None),
    };
    let webhooks = file.clone().map(|file| {
        let public_url = public_url.clone();
        (file, Webhooks { sender, public_url })
    });
    let filter = file.filter(|_| !filter_is_given).map(|file| (file, log));
    let (tls, certificate) = match tls {
        Some((tls, files)) => {
            let (sender, tls) = watch::channel(tls);
            (Some(tls), Some((files, sender)))
        }
        None => (None, None),
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let reload = Arc::new(Reload {
        keys,
        tls: certificate,
        webhooks,
        filter,
        ..Reload::default()
    });

    let place = Place::new(
        path,
        args.store_direct.or(config.store_direct),
        args.no_migrate.or(config.no_migrate).unwrap_or(false),
    )?;
    let mode = args.socket_mode.or(config.socket_mode);
    let (server, bound) = listen.bind(mode).await?;
    let server = server.trust_tenant_header(trust.unwrap_or(false));
    let drain_timeout = args.drain_timeout.or(configured).unwrap_or(DRAIN_TIMEOUT);
    let server = server.drain_timeout(drain_timeout);
    let server = match tls {
        Some(tls) => server.watched_tls(tls),
        None => server,
    };
    let server = match args.max_connections.or(config.max_connections) {
        Some(connections) => server.max_connections(connections.get()),
        None => server,
    };
    let per_peer = args
        .max_connections_per_peer
        .or(config.max_connections_per_peer);
    let server = match per_peer {
        Some(connections) => server.max_connections_per_peer(connections.get()),
        None => server,
    };
    let (server, metrics) = match args.metrics_listen.or(config.metrics_listen) {
        Some(listen) => {
            let listener = TcpListener::bind(listen).await;
            let listener = listener.map_err(|error| {
                Failure::other(format!("cannot listen on {listen} for metrics")).because(error)
            })?;
            let address = listener.local_addr();
            let address = address
                .map_err(|error| Failure::other("the listener has no address").because(error))?;
            (server.metrics_listener(listener), Some(address))
        }
        None => (server, None),
    };
    let (shown, url) = match &bound {
        Bound::Tcp(address) => {
            let url = format!("{scheme}://{address}");
            (url.clone(), url)
        }
        // For a client on the socket. Browsers take another way.
        #[cfg(unix)]
        Bound::Unix(socket) => {
            let shown = format!("unix:{}", socket.path().display());
            (shown, "http://localhost".to_owned())
        }
    };
    // A server that may not run must not create a database file.
    server
        .check(&auth)
        .map_err(|error| match error.is_untrusted_address() {
            true => Failure::usage(error.to_string()),
            false => Failure::other(error.to_string()),
        })?;

    let prepared = Prepared {
        server,
        bound,
        shown,
        url,
        metrics,
        hosts,
        prefix,
        auth,
        require_submission: require_submission.unwrap_or(false),
        allow_self_approval: allow_self_approval.unwrap_or(false),
        inbox,
        max_rate_per_peer: args.max_rate_per_peer.or(config.max_rate_per_peer),
        max_rate_per_tenant: args.max_rate_per_tenant.or(config.max_rate_per_tenant),
        retention,
        outbox,
        public_url,
        drain_timeout,
        reload,
        signals,
    };
    match place {
        Place::File(path) => {
            let store = store::open(&path)?;
            prepared.serve(store, path.display().to_string()).await
        }
        Place::Postgres(builder) => {
            // Connecting may take long, and a signal ends the process meanwhile.
            let mut prepared = prepared;
            let store = tokio::select! {
                store = store::connect(builder) => store?,
                () = prepared.signals.shutdown() => return Ok(()),
            };
            let place = format!("postgres://{}", store.place());
            prepared.serve(store, place).await
        }
    }
}

/// All of a server but its store.
struct Prepared {
    server: Server,
    bound: Bound,
    /// The address, for people.
    shown: String,
    /// The beginning of the links to the inbox, if there is no public URL.
    url: String,
    metrics: Option<SocketAddr>,
    hosts: Vec<Host>,
    prefix: Prefix,
    auth: Auth,
    require_submission: bool,
    allow_self_approval: bool,
    inbox: Inbox,
    max_rate_per_peer: Option<Rate>,
    max_rate_per_tenant: Option<Rate>,
    retention: Option<Retention>,
    outbox: Outbox,
    public_url: Option<PublicUrl>,
    drain_timeout: Duration,
    reload: Arc<Reload>,
    signals: Signals,
}

impl Prepared {
    /// Serves on a store, which is shown as this place, until a signal.
    async fn serve<S: Kept>(self, store: S, place: String) -> Result<(), Failure> {
        let Self {
            server,
            bound,
            shown,
            url,
            metrics,
            hosts,
            prefix,
            auth,
            require_submission,
            allow_self_approval,
            inbox,
            max_rate_per_peer,
            max_rate_per_tenant,
            retention,
            outbox,
            public_url,
            drain_timeout,
            reload,
            mut signals,
        } = self;
        let service = HitlService::builder(store.clone());
        let service = hosts
            .into_iter()
            .fold(service, |service, host| service.host(host));
        let service = service
            .prefix(prefix.as_str())
            .auth(auth)
            .require_submission(require_submission)
            .allow_self_approval(allow_self_approval)
            .inbox(inbox)
            .webhooks(outbox.tally())
            .reloads(reload.reloads.clone());
        let service = match max_rate_per_peer {
            Some(rate) => service.max_rate_per_peer(rate),
            None => service,
        };
        let service = match max_rate_per_tenant {
            Some(rate) => service.max_rate_per_tenant(rate),
            None => service,
        };
        let service = service
            .build()
            .map_err(|error| Failure::usage("the prefix").because(error))?;
        let sign_in = {
            let service = service.clone();
            let url = public_url.map_or(url, |url| url.to_string());
            move || {
                if let Some(path) = service.issue_sign_in_path() {
                    say(&format!("inbox: {url}{path} (works once)"));
                }
            }
        };
        let deliveries = outbox
            .start(store.clone())
            .await
            .map_err(|error| Failure::other("webhooks").because(error))?;
        // With the server, it ends.
        let mut sweeping = JoinSet::new();
        if let Some(retention) = retention {
            let (taken, store) = (deliveries.taken(), store.clone());
            sweeping.spawn(async move {
                taken.await;
                retention.run(store).await
            });
        }
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let serving = server.serve(service, async {
            // An error means that the sender is gone, which is a reason to stop as well.
            let _ = stopped.await;
        });
        let mut serving = std::pin::pin!(serving);
        say(&format!("listening on {shown}, store {place}"));
        if let Some(address) = metrics {
            say(&format!("metrics on http://{address}/metrics"));
        }
        sign_in();
        tell_manager(State::Ready);
        let failed =
            || Failure::other("the store's writer has failed; the server must be started again");
        let ended = loop {
            tokio::select! {
                ended = &mut serving => break ended,
                () = store.failed() => return Err(failed()),
                signal = signals.next() => match signal {
                    Signal::Reload => {
                        reload.start();
                        sign_in();
                    }
                    Signal::Shutdown => {
                        say("draining");
                        sweeping.abort_all();
                        tell_manager(State::Stopping);
                        // While the server listens, so that the socket is still its own.
                        drop(bound);
                        let _ = stop.send(());
                        let draining = async {
                            tokio::join!(&mut serving, deliveries.stop(drain_timeout)).0
                        };
                        tokio::select! {
                            ended = draining => break ended,
                            () = store.failed() => return Err(failed()),
                            () = signals.shutdown() => {
                                return Err(Failure::other("ended by a second signal"));
                            }
                        }
                    }
                },
            }
        };
        let ended = ended.map_err(|error| Failure::other("the server failed").because(error))?;
        // Pending writes become durable, and the lock is released, before the process ends.
        // A disk that hangs must not keep a second signal from ending it.
        tokio::select! {
            () = store.close() => {}
            () = signals.shutdown() => return Err(Failure::other("ended by a second signal")),
        }
        match ended {
            Shutdown::Drained => Ok(()),
            _ => Err(Failure::other(
                "requests were still in flight when the drain timeout was over",
            )),
        }
    }
}

/// Reads a retention: a number of days or hours.
fn retention_of(text: &str) -> Result<Retention, Failure> {
    let refused = || {
        Failure::usage(format!(
            "the retention '{}' is not allowed; allowed is a whole number of days or hours, such as \
             30d or 12h, at least 1h",
            Escaped::line(text)
        ))
    };
    let (number, seconds) = match (text.strip_suffix('d'), text.strip_suffix('h')) {
        (Some(days), _) => (days, 24 * 3600),
        (None, Some(hours)) => (hours, 3600),
        (None, None) => return Err(refused()),
    };
    let number = number.parse::<u32>().ok().filter(|number| *number > 0);
    let number = number.filter(|_| text.starts_with(|digit: char| digit.is_ascii_digit()));
    let number = number.ok_or_else(refused)?;
    let retention = Duration::from_secs(u64::from(number) * seconds);
    Retention::new(retention).map_err(|error| Failure::usage("retain").because(error))
}

/// What a service manager such as systemd is told.
#[derive(Debug, Clone, Copy)]
enum State {
    Ready,
    Stopping,
}

/// Tells the service manager, if there is one (`sd_notify`), that the server takes requests or
/// drains. A manager that cannot be reached changes nothing for the server.
fn tell_manager(state: State) {
    #[cfg(unix)]
    {
        let state = match state {
            State::Ready => sd_notify::NotifyState::Ready,
            State::Stopping => sd_notify::NotifyState::Stopping,
        };
        if let Err(error) = sd_notify::notify(&[state]) {
            tracing::debug!(target: crate::LOG, "cannot tell the service manager: {error}");
        }
    }
    #[cfg(not(unix))]
    let _ = state;
}

/// The settings of the inbox.
fn inbox(
    public_url: Option<&PublicUrl>,
    user_header: Option<String>,
    proxies: Vec<IpAddr>,
) -> Result<Inbox, Failure> {
    let inbox = Inbox::new().behind_tls(public_url.is_some_and(PublicUrl::is_https));
    match user_header {
        None if proxies.is_empty() => Ok(inbox),
        Some(_) if proxies.is_empty() => Err(Failure::usage(
            "the header of a user is to be trusted, and no proxy (--trusted-proxy) that may send it",
        )),
        None => Err(Failure::usage(
            "a proxy is to be trusted, and no header (--trust-user-header) that it names a user in",
        )),
        Some(name) => {
            let name = name.parse::<http::HeaderName>().map_err(|error| {
                Failure::usage("the name of the header that names a user").because(error)
            })?;
            Ok(inbox.trust_user_header(name, proxies))
        }
    }
}

/// Raises the soft limit of open files to the hard limit. The soft limit is usually low for the
/// sake of programs that call `select`.
fn raise_file_limit() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        // If the system refuses, the server takes fewer connections.
        let _ = setrlimit(Resource::Nofile, raised);
    }
}
