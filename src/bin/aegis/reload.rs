//! What a running server can reload: the key file, the certificate, the webhooks and the log filter.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use aegis_hitl::outbox::{Endpoint, Outbox, PublicUrl};
use aegis_hitl::server::{Keys, Reloads, Tls};
use tokio::sync::watch;

use crate::config::Config;
use crate::failure::Failure;
use crate::key_file;
use crate::log::Log;
use crate::tls_files::TlsFiles;
use crate::webhook;

/// What SIGHUP reloads. Each part is independent, and an invalid one keeps its old value.
#[derive(Debug, Default)]
pub(crate) struct Reload {
    /// The key file, and the channel from which the server takes the keys.
    pub(crate) keys: Option<(PathBuf, watch::Sender<Keys>)>,
    /// The files of the certificate, and the channel from which the server takes it.
    pub(crate) tls: Option<(TlsFiles, watch::Sender<Tls>)>,
    /// The configuration file and what takes the webhooks in it.
    pub(crate) webhooks: Option<(PathBuf, Webhooks)>,
    /// The configuration file and the log, if the filter comes from that file.
    pub(crate) filter: Option<(PathBuf, Log)>,
    /// What the metrics show.
    pub(crate) reloads: Reloads,
    pub(crate) turn: Mutex<()>,
}

/// The channel from which the outbox takes its endpoints.
#[derive(Debug)]
pub(crate) struct Webhooks {
    pub(crate) sender: watch::Sender<Vec<Endpoint>>,
    pub(crate) public_url: Option<PublicUrl>,
}

impl Webhooks {
    /// Reads the endpoints again, and returns their number.
    fn reload(&self, path: &Path) -> Result<usize, Failure> {
        let endpoints = webhook::endpoints(Config::read(Some(path))?.webhook)?;
        outbox(watch::channel(endpoints.clone()).1, self.public_url.clone()).map(drop)?;
        let count = endpoints.len();
        self.sender.send_replace(endpoints);
        Ok(count)
    }
}

/// Makes the outbox that delivers to the endpoints of a channel, and checks them.
pub(crate) fn outbox(
    endpoints: watch::Receiver<Vec<Endpoint>>,
    public_url: Option<PublicUrl>,
) -> Result<Outbox, Failure> {
    let outbox = Outbox::watched(endpoints);
    let outbox = match public_url {
        Some(url) => outbox.public_url(url),
        None => outbox,
    };
    outbox
        .check()
        .map_err(|error| Failure::usage("webhooks").because(error))?;
    Ok(outbox)
}

impl Reload {
    /// Reloads on a thread of its own: a file on a disk that hangs must stop neither requests nor
    /// signals. Reloads never overlap.
    pub(crate) fn start(self: &Arc<Self>) {
        let this = Arc::clone(self);
        // Not one of the runtime's threads, which are waited for at the end.
        std::thread::spawn(move || {
            let _one = this.turn.lock().unwrap_or_else(PoisonError::into_inner);
            this.run();
        });
    }

    fn run(&self) {
        let mut all_are_in_force = true;
        let mut report = |result: Result<String, Failure>, before: &str| match result {
            Ok(message) => tracing::info!(target: crate::LOG, "{message}"),
            Err(failure) => {
                all_are_in_force = false;
                tracing::error!(target: crate::LOG, "{}; {before} in force", failure.message());
            }
        };
        if let Some((path, sender)) = &self.keys {
            let read = key_file::read(path).map(|keys| {
                let count = counted(keys.len(), "key");
                sender.send_replace(keys);
                format!("{} was read again: {count}", path.display())
            });
            report(read, "the keys read before stay");
        }
        if let Some((files, sender)) = &self.tls {
            let read = files.read().map(|tls| {
                sender.send_replace(tls);
                format!(
                    "{} were read again; new connections get this certificate",
                    files.names()
                )
            });
            report(read, "the certificate read before stays");
        }
        if let Some((path, webhooks)) = &self.webhooks {
            let read = webhooks.reload(path).map(|count| {
                let count = counted(count, "endpoint");
                format!(
                    "the webhooks were read again from {}: {count}",
                    path.display()
                )
            });
            report(read, "the webhooks read before stay");
        }
        if let Some((path, log)) = &self.filter {
            let set = Config::read(Some(path)).and_then(|config| {
                log.set_filter(config.serve.log.as_deref())
                    .map_err(|failure| {
                        Failure::usage(format!("{}: {}", path.display(), failure.message()))
                    })
            });
            let set =
                set.map(|()| format!("the log filter was read again from {}", path.display()));
            report(set, "the log filter read before stays");
        }
        if all_are_in_force {
            self.reloads.succeeded();
        } else {
            self.reloads.failed();
        }
    }
}

/// A number of things.
fn counted(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    }
}
