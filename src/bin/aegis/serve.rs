//! The command that runs the server.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use aegis_hitl::protocol::{DEFAULT_PREFIX, Prefix};
use aegis_hitl::server::{Auth, HitlService, Server, Shutdown};
use aegis_hitl::store::Embedded;
use tokio::sync::watch;

use crate::args;
use crate::config;
use crate::failure::Failure;
use crate::key_file;
use crate::log::Log;
use crate::print::say;
use crate::reload::Reload;
use crate::signals::{Signal, Signals};

const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8000);

/// Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once. `config` was read from `file`.
pub(crate) async fn run(
    args: args::Serve,
    config: config::Serve,
    file: Option<PathBuf>,
) -> Result<(), Failure> {
    // First of all, so that no signal is lost: one that nobody listens for ends the process.
    let mut signals = Signals::new()?;
    let filter_is_given = args.log.is_some();
    let log = Log::start(args.log.or(config.log).as_deref())?;
    raise_file_limit();
    let listen = args.listen.or(config.listen).unwrap_or(LISTEN);
    let path = args
        .store
        .or(config.store)
        .unwrap_or_else(|| PathBuf::from(config::STORE));
    let prefix = args.prefix.or(config.prefix);
    let prefix = prefix.as_deref().unwrap_or(DEFAULT_PREFIX);
    // As all that the usage can get wrong: before the address is taken and the store is opened.
    let prefix =
        Prefix::new(prefix).map_err(|error| Failure::usage("the prefix").because(error))?;
    let require_submission = args.require_submission.or(config.require_submission);
    let hosts = if args.host.is_empty() {
        config.host
    } else {
        args.host
    };
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
    let reload = Reload {
        keys,
        filter: file.filter(|_| !filter_is_given).map(|file| (file, log)),
    };

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
    let address = server
        .local_addr()
        .map_err(|error| Failure::other("the listener has no address").because(error))?;
    // Before there is a database file that nobody asked for.
    server
        .check(&auth)
        .map_err(|error| match error.is_untrusted_address() {
            true => Failure::usage(error.to_string()),
            false => Failure::other(error.to_string()),
        })?;

    let store = Embedded::open(&path)
        .map_err(|error| Failure::other("cannot open the store").because(error))?;
    let service = HitlService::builder(store.clone());
    let service = hosts
        .into_iter()
        .fold(service, |service, host| service.host(host));
    let service = service
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
    let ended = loop {
        tokio::select! {
            ended = &mut serving => break ended,
            () = store.failed() => return Err(failed()),
            signal = signals.next() => match signal {
                Signal::Reload => reload.run(),
                Signal::End => {
                    say("draining");
                    let _ = stop.send(());
                    tokio::select! {
                        ended = &mut serving => break ended,
                        () = store.failed() => return Err(failed()),
                        () = signals.end() => return Err(Failure::other("ended by a second signal")),
                    }
                }
            },
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

/// Lets the process open as many files as it may: the usual limit is low for the sake of programs that call `select`.
fn raise_file_limit() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        // Where the system refuses, there are fewer connections.
        let _ = setrlimit(Resource::Nofile, raised);
    }
}
