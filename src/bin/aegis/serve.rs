//! The command that runs the server.

use std::fs;
use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use aegis_hitl::protocol::{DEFAULT_PREFIX, Prefix};
use aegis_hitl::server::{Auth, HitlService, Keys, Server, Shutdown};
use aegis_hitl::store::Embedded;
use tracing_subscriber::EnvFilter;

use crate::args;
use crate::config;
use crate::failure::Failure;
use crate::print::say;

const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8000);

/// Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once.
pub(crate) async fn run(args: args::Serve, config: config::Serve) -> Result<(), Failure> {
    log_to_stderr(args.log.or(config.log).as_deref())?;
    let listen = args.listen.or(config.listen).unwrap_or(LISTEN);
    let path = args
        .store
        .or(config.store)
        .unwrap_or_else(|| PathBuf::from("aegis.db"));
    let prefix = args.prefix.or(config.prefix);
    let prefix = prefix.as_deref().unwrap_or(DEFAULT_PREFIX);
    // As all that the usage can get wrong: before the address is taken and the store is opened.
    let prefix =
        Prefix::new(prefix).map_err(|error| Failure::usage("the prefix").because(error))?;
    let require_submission = args.require_submission.or(config.require_submission);
    let trust = args.trust_tenant_header.or(config.trust_tenant_header);
    let configured = config
        .drain_timeout
        .map(Duration::try_from_secs_f64)
        .transpose();
    let configured = configured.map_err(|error| {
        Failure::usage("the drain timeout of the configuration file").because(error)
    })?;
    let auth = match args.keys.or(config.keys) {
        Some(file) => keys(&file)?,
        None => Auth::tenant_header(),
    };
    // Before the store is opened and the address is taken, so that signals are not lost.
    let mut signals = Signals::new()?;

    if let Some(path) = path.to_str().filter(|path| path.contains("://")) {
        return Err(Failure::usage(format!(
            "the store is a URL ({}://…); allowed is the path of a database file",
            path.split("://").next().unwrap_or_default()
        )));
    }
    let server = Server::bind(listen)
        .await
        .map_err(|error| Failure::other(format!("cannot listen on {listen}")).because(error))?
        .trust_tenant_header(trust.unwrap_or(false));
    let server = match args.drain_timeout.or(configured) {
        Some(timeout) => server.drain_timeout(timeout),
        None => server,
    };
    let address = server
        .local_addr()
        .map_err(|error| Failure::other("the listener has no address").because(error))?;
    // Before there is a database file that nobody asked for.
    server
        .check(&auth)
        .map_err(|error| Failure::usage(error.to_string()))?;

    let store = Embedded::open(&path)
        .map_err(|error| Failure::other("cannot open the store").because(error))?;
    let service = HitlService::builder(store.clone())
        .prefix(prefix.as_str())
        .auth(auth)
        .require_submission(require_submission.unwrap_or(false))
        .build()
        .map_err(|error| Failure::usage("the prefix").because(error))?;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let serving = server.serve(service, async {
        // An error means that the sender is gone, and that too is a reason to stop.
        let _ = stopped.await;
    });
    let mut serving = std::pin::pin!(serving);
    say(&format!(
        "listening on http://{address}, store {}",
        path.display()
    ));
    let failed =
        || Failure::other("the store's writer has failed; the server must be started again");
    let ended = tokio::select! {
        ended = &mut serving => ended,
        () = store.failed() => return Err(failed()),
        () = signals.next() => {
            say("draining");
            let _ = stop.send(());
            tokio::select! {
                ended = &mut serving => ended,
                () = store.failed() => return Err(failed()),
                () = signals.next() => return Err(Failure::other("ended by a second signal")),
            }
        }
    };
    let ended = ended.map_err(|error| Failure::other("the server failed").because(error))?;
    // What was asked for is made durable, and the lock released, before the process ends.
    store.close().await;
    match ended {
        Shutdown::Drained => Ok(()),
        _ => Err(Failure::other(
            "requests were still in flight when the drain timeout was over",
        )),
    }
}

fn keys(file: &PathBuf) -> Result<Auth, Failure> {
    let text = fs::read_to_string(file).map_err(|error| {
        Failure::usage(format!("cannot read {}", file.display())).because(error)
    })?;
    let keys = Keys::parse(&text)
        .map_err(|error| Failure::usage(format!("{}", file.display())).because(error))?;
    if keys.is_empty() {
        return Err(Failure::usage(format!(
            "{} holds no keys; make one with 'aegis keys new'",
            file.display()
        )));
    }
    Ok(Auth::keys(keys))
}

fn log_to_stderr(filter: Option<&str>) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(filter.unwrap_or("info"))
        .map_err(|error| Failure::usage("the log filter").because(error))?;
    let color = std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(color)
        // They would be told on stderr by `eprintln!`, which panics where stderr is what failed.
        .log_internal_errors(false)
        .init();
    Ok(())
}

/// What ends the server: SIGTERM and SIGINT.
#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> Result<Self, Failure> {
        use tokio::signal::unix::{SignalKind, signal};

        let listen = |kind| {
            signal(kind).map_err(|error| Failure::other("cannot listen for signals").because(error))
        };
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What ends the server: Ctrl-C.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> Result<Self, Failure> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    }
}
