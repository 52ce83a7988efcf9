//! What a running server can reload: the key file, the certificate and the log filter.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use aegis_hitl::server::{Keys, Tls};
use tokio::sync::watch;

use crate::config::Config;
use crate::failure::Failure;
use crate::key_file;
use crate::log::Log;
use crate::tls_files::TlsFiles;

/// What SIGHUP reloads. Each part is independent, and an invalid one keeps its old value.
#[derive(Debug)]
pub(crate) struct Reload {
    /// The key file, and the channel from which the server takes the keys.
    keys: Option<(PathBuf, watch::Sender<Keys>)>,
    /// The files of the certificate, and the channel from which the server takes it.
    tls: Option<(TlsFiles, watch::Sender<Tls>)>,
    /// The configuration file and the log, if the filter comes from that file.
    filter: Option<(PathBuf, Log)>,
    turn: Mutex<()>,
}

impl Reload {
    pub(crate) fn new(
        keys: Option<(PathBuf, watch::Sender<Keys>)>,
        tls: Option<(TlsFiles, watch::Sender<Tls>)>,
        filter: Option<(PathBuf, Log)>,
    ) -> Arc<Self> {
        Arc::new(Self {
            keys,
            tls,
            filter,
            turn: Mutex::new(()),
        })
    }

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
        if let Some((path, sender)) = &self.keys {
            match key_file::read(path) {
                Ok(keys) => {
                    let count = match keys.len() {
                        1 => "1 key".to_owned(),
                        count => format!("{count} keys"),
                    };
                    sender.send_replace(keys);
                    tracing::info!(
                        target: crate::LOG,
                        "{} was read again: {count}",
                        path.display()
                    );
                }
                Err(failure) => tracing::error!(
                    target: crate::LOG,
                    "{}; the keys read before stay in force",
                    failure.message()
                ),
            }
        }
        if let Some((files, sender)) = &self.tls {
            match files.read() {
                Ok(tls) => {
                    sender.send_replace(tls);
                    tracing::info!(
                        target: crate::LOG,
                        "{} were read again; new connections get this certificate",
                        files.names()
                    );
                }
                Err(failure) => tracing::error!(
                    target: crate::LOG,
                    "{}; the certificate read before stays in force",
                    failure.message()
                ),
            }
        }
        if let Some((path, log)) = &self.filter {
            let set = Config::read(Some(path)).and_then(|config| {
                log.set_filter(config.serve.log.as_deref())
                    .map_err(|failure| {
                        Failure::usage(format!("{}: {}", path.display(), failure.message()))
                    })
            });
            match set {
                Ok(()) => tracing::info!(
                    target: crate::LOG,
                    "the log filter was read again from {}",
                    path.display()
                ),
                Err(failure) => tracing::error!(
                    target: crate::LOG,
                    "{}; the log filter read before stays in force",
                    failure.message()
                ),
            }
        }
    }
}
