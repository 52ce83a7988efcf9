//! The signals that a server and a hook handle.

use crate::failure::Failure;

/// A signal that a server handles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGTERM, SIGINT or Ctrl-C.
    Shutdown,
    /// SIGHUP.
    #[cfg_attr(not(unix), expect(dead_code, reason = "there is none"))]
    Reload,
}

/// Receives the signals of this process, from the moment it is created.
#[cfg(unix)]
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    pub(crate) fn new() -> Result<Self, Failure> {
        use tokio::signal::unix::{SignalKind, signal};

        let listen = |kind| {
            signal(kind).map_err(|error| Failure::other("cannot listen for signals").because(error))
        };
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    pub(crate) async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Shutdown,
            _ = self.interrupt.recv() => Signal::Shutdown,
            _ = self.hangup.recv() => Signal::Reload,
        }
    }
}

#[cfg(not(unix))]
#[derive(Debug)]
pub(crate) struct Signals;

#[cfg(not(unix))]
impl Signals {
    pub(crate) fn new() -> Result<Self, Failure> {
        Ok(Self)
    }

    pub(crate) async fn next(&mut self) -> Signal {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
        Signal::Shutdown
    }
}

impl Signals {
    /// Waits for a signal to shut down.
    pub(crate) async fn shutdown(&mut self) {
        while self.next().await != Signal::Shutdown {}
    }
}

/// Receives every signal that would end this process and can be handled, from the moment it is
/// created.
#[cfg(unix)]
#[derive(Debug)]
pub(crate) struct Endings(Vec<tokio::signal::unix::Signal>);

#[cfg(unix)]
impl Endings {
    pub(crate) fn new() -> Result<Self, Failure> {
        use rustix::process::Signal;
        use tokio::signal::unix::{SignalKind, signal};

        /// Signals that end no process, that cannot be handled, or whose handler would return to
        /// the fault. The runtime ignores SIGPIPE.
        const OTHERS: [Signal; 14] = [
            Signal::KILL,
            Signal::STOP,
            Signal::ILL,
            Signal::FPE,
            Signal::SEGV,
            Signal::BUS,
            Signal::PIPE,
            Signal::CHILD,
            Signal::CONT,
            Signal::TSTP,
            Signal::TTIN,
            Signal::TTOU,
            Signal::URG,
            Signal::WINCH,
        ];
        let is_other = |number| {
            // On the others 29 is SIGINFO, which ends no process.
            OTHERS.iter().any(|other| other.as_raw() == number)
                || (cfg!(not(target_os = "linux")) && number == 29)
        };
        let listen = |number| signal(SignalKind::from_raw(number));
        let standard = (1..32).filter(|number| !is_other(*number)).map(listen);
        let standard = standard.collect::<Result<Vec<_>, _>>();
        let mut signals =
            standard.map_err(|error| Failure::other("cannot listen for signals").because(error))?;
        // The real-time signals of Linux end a process too. The C library keeps some of them.
        if cfg!(target_os = "linux") {
            signals.extend((32..=64).map(listen).filter_map(Result::ok));
        }
        Ok(Self(signals))
    }

    /// Waits for one of them.
    pub(crate) async fn next(&mut self) {
        use std::task::Poll;

        std::future::poll_fn(|cx| {
            let mut polled = self.0.iter_mut().map(|signal| signal.poll_recv(cx));
            match polled.any(|polled| polled.is_ready()) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }
}

#[cfg(not(unix))]
#[derive(Debug)]
pub(crate) struct Endings(Signals);

#[cfg(not(unix))]
impl Endings {
    pub(crate) fn new() -> Result<Self, Failure> {
        Signals::new().map(Self)
    }

    pub(crate) async fn next(&mut self) {
        self.0.next().await;
    }
}
