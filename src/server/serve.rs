//! The server: an address, its settings, and the rule on whom it may trust.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, ToSocketAddrs};

use super::auth::Auth;
use super::drain::Shutdown;
use super::net::{ConnectionLimits, Places, Timeouts, accept, descriptors};
use super::ops::WithHealth;
use super::service::HitlService;
use crate::store::Store;

/// Serves a [`HitlService`] over HTTP/1.1 and HTTP/2 (with prior knowledge), with `GET /livez` and `GET /readyz` beside it.
///
/// Connections without a request in flight for the [`header_timeout`](Self::header_timeout) are closed, and the number of
/// connections, the size and number of headers and the number of streams are limited. When there are as many connections as
/// there may be, a new one takes the place of the one that has been idle longest.
#[derive(Debug)]
#[must_use]
pub struct Server {
    listener: TcpListener,
    timeouts: Timeouts,
    limits: ConnectionLimits,
    drain_timeout: Duration,
    trust_tenant_header: bool,
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

    /// Serves on a listener that is bound already.
    pub fn from_listener(listener: TcpListener) -> Self {
        Self {
            listener,
            timeouts: Timeouts {
                idle: Duration::from_secs(8),
                write: Duration::from_secs(30),
            },
            limits: ConnectionLimits::default(),
            drain_timeout: Duration::from_secs(30),
            trust_tenant_header: false,
        }
    }

    /// Returns the address that is bound.
    ///
    /// # Errors
    ///
    /// If the operating system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Sets how long a connection may have no request in flight, and how long a client may take to send a request's headers.
    /// The default is 8 s.
    ///
    /// An HTTP/2 client is then told to go (`GOAWAY`) and cut off 2 s later; pings keep no connection open.
    pub fn header_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.idle = timeout;
        self
    }

    /// Sets how long an answer may make no progress, as the client does not read or gives it no window of HTTP/2. The default
    /// is 30 s, and 2 s at most while the server drains.
    ///
    /// The connection then takes no further requests, and is cut off after 2 s without progress.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.write = timeout;
        self
    }

    /// Sets how long requests in flight may take to end once the server shuts down. The default is 30 s.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_timeout = timeout;
        self
    }

    /// Sets the most connections at a time, at least 1. The default is 4096, or what the limit of open files leaves beside a
    /// reserve of 128 for the store, whichever is less; more than that there are never.
    ///
    /// A further client takes the place of the connection that has been idle longest, or waits until one is idle.
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.limits.connections = Some(connections);
        self
    }

    /// Sets the most connections at a time of one address, at least 1; of IPv6, of one `/64` network. The default is a
    /// quarter of the most connections, and none for loopback, as a proxy on this machine speaks for many clients.
    ///
    /// Behind a proxy on another machine, set it to as many as [`max_connections`](Self::max_connections): all connections
    /// come from the proxy. What is set here is valid for loopback too. A further client of the address takes the place of
    /// its own connection that has been idle longest, and is turned away if none is.
    pub fn max_connections_per_peer(mut self, connections: usize) -> Self {
        self.limits.per_peer = Some(connections);
        self
    }

    /// Sets whether a service that trusts the `Tenant-Id` header may be served on an address that is not loopback. The
    /// default is `false`.
    pub fn trust_tenant_header(mut self, trust: bool) -> Self {
        self.trust_tenant_header = trust;
        self
    }

    /// Checks that a service with this `auth` may be served here, as [`serve`](Self::serve) does, before a store is opened.
    ///
    /// # Errors
    ///
    /// If it trusts the `Tenant-Id` header, the address is not loopback, and
    /// [`trust_tenant_header`](Self::trust_tenant_header) is not set, or if the process may open fewer than 144 files.
    pub fn check(&self, auth: &Auth) -> Result<(), ServeError> {
        let address = self.local_addr().map_err(ServeError::io)?;
        let loopback = address.ip().to_canonical().is_loopback();
        if auth.trusts_tenant_header() && !loopback && !self.trust_tenant_header {
            return Err(ServeError(Kind::Untrusted(address)));
        }
        Self::room().map(|_| ())
    }

    fn room() -> Result<usize, ServeError> {
        descriptors::for_connections().map_err(|limit| ServeError(Kind::Descriptors(limit)))
    }

    /// Serves until `shutdown` completes, and then until the requests in flight have ended or the drain timeout is over.
    ///
    /// From the moment of the shutdown on no connection is accepted, waits for a decision end with the present state, new
    /// requests on kept connections are answered 503, and connections are closed behind their last answer. A client that
    /// has not sent the rest of a request after 2 s, or takes nothing of its answer for 2 s, is not waited for. What is then
    /// still open at the deadline is cut.
    ///
    /// # Errors
    ///
    /// If the service trusts the `Tenant-Id` header, the address is not loopback, and
    /// [`trust_tenant_header`](Self::trust_tenant_header) is not set: anyone who can reach the server could then speak for
    /// every tenant. If the process may open fewer than 144 files. Errors of single connections, or of accepting one, do not end the server.
    pub async fn serve<St: Store>(
        self,
        service: HitlService<St>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<Shutdown, ServeError> {
        self.check(service.auth())?;
        let address = self.local_addr().map_err(ServeError::io)?;
        let drain = service.api().drain.clone();
        let service = WithHealth::new(service, address.ip());
        let places = Places::new(self.limits, Self::room()?);
        let timeouts = self.timeouts;
        let left = accept::run(self.listener, places, timeouts, service, drain, shutdown).await;
        Ok(left.drain(self.drain_timeout).await)
    }
}

/// Why a server does not serve.
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

    /// Whether the tenant header would have been trusted on an address that is not loopback.
    pub fn is_untrusted_address(&self) -> bool {
        matches!(self.0, Kind::Untrusted(_))
    }

    /// Whether the process may open too few files.
    pub fn is_too_few_descriptors(&self) -> bool {
        matches!(self.0, Kind::Descriptors(_))
    }
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Untrusted(address) => write!(
                f,
                "{address} is not a loopback address, and without API keys anyone who reaches it could act for every \
                 tenant; configure API keys, or trust the Tenant-Id header explicitly (--trust-tenant-header)"
            ),
            Kind::Descriptors(limit) => write!(
                f,
                "the limit of open files is {limit}, and a server needs at least {}; raise it (ulimit -n, LimitNOFILE=)",
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
