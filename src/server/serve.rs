//! The server: an address, its settings, and the rule on whom it may trust.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

#[cfg(unix)]
use tokio::net::UnixListener;
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio::sync::oneshot;
#[cfg(feature = "tls")]
use tokio::sync::watch;

use super::auth::Auth;
use super::drain::Shutdown;
use super::http::Arrival;
#[cfg(feature = "tls")]
use super::net::Tls;
use super::net::{Acceptor, ConnectionLimits, Listener, Places, Timeouts, accept, descriptors};
use super::ops::health::WithHealth;
use super::service::HitlService;
use crate::store::Store;

/// The most connections to the listener for metrics.
const METRICS_CONNECTIONS: usize = 8;

/// Serves a [`HitlService`] over HTTP/1.1 and HTTP/2 (with prior knowledge, or as TLS settles it), together with `GET
/// /livez`, `GET /readyz` and, if it has no API keys, `GET /metrics`.
///
/// A connection is closed when it has had no request in flight for the
/// [`header_timeout`](Self::header_timeout). The number of connections, the size and number of
/// headers and the number of streams are limited. When all connections are in use, a new one takes
/// the place of the one that has been idle longest.
#[derive(Debug)]
#[must_use]
pub struct Server {
    listener: Listener,
    tls: Option<Acceptor>,
    timeouts: Timeouts,
    limits: ConnectionLimits,
    drain_timeout: Duration,
    trust_tenant_header: bool,
    metrics: Option<TcpListener>,
}

impl Server {
    /// Binds an address.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub async fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        Ok(Self::from_listener(TcpListener::bind(address).await?))
    }

    /// Serves on a listener that is already bound.
    pub fn from_listener(listener: TcpListener) -> Self {
        Self::on(Listener::Tcp(listener))
    }

    /// Serves on a Unix socket that is already bound.
    ///
    /// Its clients are taken for local ones: a service that trusts the `Tenant-Id` header may be
    /// served on it, and answers for the loopback names. Who may connect is up to the permissions
    /// of the socket. [`max_connections_per_peer`](Self::max_connections_per_peer) does not apply,
    /// and no client is a [trusted proxy](super::Inbox::trust_user_header). The caller removes the
    /// socket at the end.
    #[cfg(unix)]
    pub fn from_unix_listener(listener: UnixListener) -> Self {
        Self::on(Listener::Unix(listener))
    }

    fn on(listener: Listener) -> Self {
        Self {
            listener,
            tls: None,
            timeouts: Timeouts {
                idle: Duration::from_secs(8),
                write: Duration::from_secs(30),
            },
            limits: ConnectionLimits::default(),
            drain_timeout: Duration::from_secs(30),
            trust_tenant_header: false,
            metrics: None,
        }
    }

    /// Returns the bound address.
    ///
    /// # Errors
    ///
    /// If the operating system does not report it, and for a Unix socket, which has none.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()?.ok_or_else(|| {
            io::Error::new(io::ErrorKind::Unsupported, "a Unix socket has no address")
        })
    }

    /// Speaks TLS 1.2 and 1.3, and offers HTTP/2 and HTTP/1.1 (ALPN). The default is plain HTTP.
    ///
    /// The session cookie of the [inbox](super::Inbox) is then `Secure`, and web pages of the
    /// server's own origin are https pages. A client that speaks plain HTTP gets a 400. The
    /// [metrics listener](Self::metrics_listener) stays plain.
    #[cfg(feature = "tls")]
    pub fn tls(self, tls: Tls) -> Self {
        self.watched_tls(watch::channel(tls).1)
    }

    /// Takes the certificate from a channel, so that it can be replaced while the server runs. Each
    /// connection has the one that was sent last before it began, and keeps it.
    #[cfg(feature = "tls")]
    pub fn watched_tls(mut self, tls: watch::Receiver<Tls>) -> Self {
        self.tls = Some(Acceptor::new(tls));
        self
    }

    /// Sets how long a connection may have no request in flight, and how long a client may take to
    /// send the headers of a request. The default is 8 s. Over TLS, the handshake and the headers of
    /// the first request have this time together.
    ///
    /// An idle HTTP/2 client receives a `GOAWAY` and is cut off 2 s later. Pings do not keep a
    /// connection open.
    pub fn header_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.idle = timeout;
        self
    }

    /// Sets how long a response may make no progress because the client does not read or grants no
    /// HTTP/2 window. The default is 30 s. While the server drains, the limit is at most 2 s. A whole
    /// response may take four times as long, and another second for each KiB.
    ///
    /// After that the connection takes no further requests, and is cut off after another 2 s
    /// without progress.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.write = timeout;
        self
    }

    /// Sets how long requests in flight may take to end after the server begins to shut down. The
    /// default is 30 s.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_timeout = timeout;
        self
    }

    /// Sets the maximum number of connections, at least 1. The default is 4096.
    ///
    /// The limit of open files, less a reserve of 128 for the store, is an upper bound on any
    /// value.
    ///
    /// When all connections are in use, a new client takes the place of the connection that has
    /// been idle longest. If none is idle, the client waits until one is.
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.limits.connections = Some(connections);
        self
    }

    /// Sets the maximum number of connections from one IPv4 address or one IPv6 `/64` network, at
    /// least 1. The default is a quarter of [`max_connections`](Self::max_connections), with no
    /// limit for loopback, because a local proxy speaks for many clients.
    ///
    /// A value set here applies to loopback too. Behind a proxy on another machine, set it to the
    /// same value as `max_connections`: every connection then comes from the proxy.
    ///
    /// At the limit, a new client takes the place of the connection of the same peer that has been
    /// idle longest. If none is idle, the client is turned away.
    pub fn max_connections_per_peer(mut self, connections: usize) -> Self {
        self.limits.per_peer = Some(connections);
        self
    }

    /// Sets whether a service that trusts the `Tenant-Id` header may be served on an address that
    /// is not loopback. The default is `false`.
    pub fn trust_tenant_header(mut self, trust: bool) -> Self {
        self.trust_tenant_header = trust;
        self
    }

    /// Serves `GET /metrics` and `GET /livez` on another listener, which at most 8 connections at a
    /// time may use. The default is to serve metrics only with the service, and only if that has no
    /// API keys.
    ///
    /// Whoever reaches this listener can read the metrics. They hold no tenant, key or id. It speaks
    /// plain HTTP, also where the server has TLS, and is closed when the server drains.
    pub fn metrics_listener(mut self, listener: TcpListener) -> Self {
        self.metrics = Some(listener);
        self
    }

    /// Checks that a service with this `auth` may be served here. [`serve`](Self::serve) does the
    /// same; call this first to fail before a store is opened.
    ///
    /// # Errors
    ///
    /// - If `auth` trusts the `Tenant-Id` header, the address is not loopback, and
    ///   [`trust_tenant_header`](Self::trust_tenant_header) is not set.
    /// - If the process may open fewer than 144 files.
    pub fn check(&self, auth: &Auth) -> Result<(), ServeError> {
        let address = self.listener.local_addr().map_err(ServeError::io)?;
        let remote = address.filter(|address| !address.ip().to_canonical().is_loopback());
        if let Some(address) = remote
            && auth.trusts_tenant_header()
            && !self.trust_tenant_header
        {
            return Err(ServeError(Kind::Untrusted(address)));
        }
        Self::room().map(|_| ())
    }

    fn room() -> Result<usize, ServeError> {
        descriptors::for_connections().map_err(|limit| ServeError(Kind::Descriptors(limit)))
    }

    /// Serves until `shutdown` completes, and then until the requests in flight have ended or the
    /// drain timeout expires.
    ///
    /// Once `shutdown` completes, no connection is accepted. Waits for a decision end with the
    /// present state, new requests on open connections are answered 503, and connections close
    /// after their last response. The server does not wait for a client that has not sent the rest
    /// of a request after 2 s, or that reads nothing of its response for 2 s. Connections still
    /// open at the deadline are cut.
    ///
    /// Errors of single connections, and errors of accepting one, do not end the server.
    ///
    /// # Errors
    ///
    /// - If the service trusts the `Tenant-Id` header, the address is not loopback, and
    ///   [`trust_tenant_header`](Self::trust_tenant_header) is not set. Anyone who can reach the
    ///   server could then act for every tenant.
    /// - If the process may open fewer than 144 files.
    pub async fn serve<St: Store>(
        self,
        service: HitlService<St>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<Shutdown, ServeError> {
        self.check(service.auth())?;
        let address = self.listener.local_addr().map_err(ServeError::io)?;
        let drain = service.api().drain.clone();
        let metrics = Arc::clone(&service.api().metrics);
        let service = WithHealth::new(
            service,
            Arrival {
                listening: address.map(|address| address.ip()),
                peer: None,
                connection: None,
                is_tls: self.tls.is_some(),
            },
        );
        let (timeouts, drain_timeout) = (self.timeouts, self.drain_timeout);
        let room = Self::room()?;
        let aside = self.metrics.as_ref().map_or(0, |_| METRICS_CONNECTIONS);
        let count = Arc::clone(&metrics.connections);
        let places = Places::new(self.limits, room.saturating_sub(aside), count);
        let (stop, stopped) = oneshot::channel::<()>();
        let watching = {
            let tls = self.tls.clone();
            async {
                match tls {
                    Some(tls) => tls.watch_expiry(metrics).await,
                    None => std::future::pending().await,
                }
            }
        };
        let serving = async {
            let service_for = |peer| service.for_peer(peer);
            let left = accept::run(
                self.listener,
                self.tls,
                places,
                timeouts,
                service_for,
                drain.clone(),
                shutdown,
            )
            .await;
            drop(stop);
            left.drain(drain_timeout).await
        };
        let serving = async {
            tokio::select! {
                // First, so that no scrape comes before the end of the certificate is known.
                biased;
                never = watching => match never {},
                shutdown = serving => shutdown,
            }
        };
        let Some(listener) = self.metrics else {
            return Ok(serving.await);
        };
        let listener = Listener::Tcp(listener);
        let limits = ConnectionLimits {
            connections: Some(METRICS_CONNECTIONS),
            per_peer: Some(METRICS_CONNECTIONS),
        };
        let places = Places::new(limits, METRICS_CONNECTIONS, Arc::default());
        let serving_metrics = async {
            let service = service.for_metrics();
            let service_for = |peer| service.for_peer(peer);
            let stopped = async { _ = stopped.await };
            let drain = drain.clone();
            let left = accept::run(
                listener,
                None,
                places,
                timeouts,
                service_for,
                drain,
                stopped,
            )
            .await;
            left.drain(drain_timeout).await
        };
        // Whoever is cut off while reading metrics has lost nothing.
        Ok(tokio::join!(serving, serving_metrics).0)
    }
}

/// An error that prevents a server from serving.
#[derive(Debug)]
pub struct ServeError(Kind);

#[derive(Debug)]
enum Kind {
    Untrusted(SocketAddr),
    Descriptors(u64),
    Io(io::Error),
}

impl ServeError {
    fn io(error: io::Error) -> Self {
        Self(Kind::Io(error))
    }

    /// Returns whether the service would have trusted the tenant header on an address that is not
    /// loopback.
    pub fn is_untrusted_address(&self) -> bool {
        matches!(self.0, Kind::Untrusted(_))
    }

    /// Returns whether the process may open too few files.
    pub fn is_too_few_descriptors(&self) -> bool {
        matches!(self.0, Kind::Descriptors(_))
    }
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Untrusted(address) => write!(
                f,
                "{address} is not a loopback address, and without API keys anyone who reaches it \
                 could act for every tenant; configure API keys, or trust the Tenant-Id header \
                 explicitly (--trust-tenant-header)"
            ),
            Kind::Descriptors(limit) => write!(
                f,
                "the limit of open files is {limit}, and a server needs at least {}; raise it \
                 (ulimit -n, LimitNOFILE=)",
                descriptors::NEEDED
            ),
            Kind::Io(_) => f.write_str("the listener has no address"),
        }
    }
}

impl StdError for ServeError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0 {
            Kind::Untrusted(_) | Kind::Descriptors(_) => None,
            Kind::Io(error) => Some(error),
        }
    }
}
