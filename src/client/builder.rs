//! The settings of an `AegisService`, checked once.

use std::fmt;
#[cfg(unix)]
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Uri};
use tower_layer::Layer;

use super::connector::{ClientSettings, KeepAlive};
use super::endpoints::Endpoints;
use super::proxy::ProxySetting;
use super::read::ReadAnswers;
use super::{AegisService, Error, HttpClient, OnDuplicate, url};
use crate::layer::{
    AegisLayer, AttemptEvent, Backoff, Budget, ConfirmDuplicateLayer, RetryLayer, SetRequestIdLayer,
};
use crate::protocol::{
    ApiKey, DEFAULT_BASE_URL, DEFAULT_PREFIX, InvalidValue, Prefix, TenantId, ThreadId,
};

type Observer = Arc<dyn Fn(&AttemptEvent<'_>) + Send + Sync>;

/// Builds an [`AegisService`].
///
/// The defaults are the Python SDK's: `http://localhost:8000`, `/api/v1`, 10 seconds for each
/// attempt, and 3 retries after 0.5, 1 and 2 seconds (here with up to a quarter of jitter on top).
#[derive(Clone)]
pub struct Builder {
    base_url: String,
    prefix: String,
    tenant: Option<Result<TenantId, InvalidValue>>,
    thread: Option<Result<ThreadId, InvalidValue>>,
    api_key: Option<Result<ApiKey, InvalidValue>>,
    timeout: Duration,
    max_retries: u32,
    backoff: Backoff,
    deadline: Option<Duration>,
    budget: Option<Option<Budget>>,
    observer: Option<Observer>,
    on_duplicate: OnDuplicate,
    root_certificates: Vec<Vec<u8>>,
    client_identity: Option<Vec<u8>>,
    #[cfg(feature = "tls")]
    tls_config: Option<rustls::ClientConfig>,
    http2_prior_knowledge: bool,
    http2_keep_alive: KeepAlive,
    user_agent: String,
    proxy: ProxySetting,
    #[cfg(unix)]
    unix_socket: Option<Arc<Path>>,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            base_url: DEFAULT_BASE_URL.to_owned(),
            prefix: DEFAULT_PREFIX.to_owned(),
            tenant: None,
            thread: None,
            api_key: None,
            timeout: Duration::from_secs(10),
            max_retries: 3,
            backoff: Backoff::default(),
            deadline: None,
            budget: None,
            observer: None,
            on_duplicate: OnDuplicate::Confirm,
            root_certificates: Vec::new(),
            client_identity: None,
            #[cfg(feature = "tls")]
            tls_config: None,
            http2_prior_knowledge: false,
            http2_keep_alive: KeepAlive::default(),
            user_agent: concat!("aegis-hitl/", env!("CARGO_PKG_VERSION")).to_owned(),
            proxy: ProxySetting::Environment,
            #[cfg(unix)]
            unix_socket: None,
        }
    }

    /// Sets the server: scheme `http` or `https`, host, and optionally port and path. The default
    /// is `http://localhost:8000`.
    #[must_use]
    pub fn base_url(mut self, url: impl Into<String>) -> Self {
        self.base_url = url.into();
        self
    }

    /// Connects to a Unix socket, and through no proxy. The [`base_url`](Self::base_url) then says
    /// what the requests name as their host, and whether they go by TLS.
    #[cfg(unix)]
    #[must_use]
    pub fn unix_socket(mut self, path: impl AsRef<Path>) -> Self {
        self.unix_socket = Some(path.as_ref().into());
        self
    }

    /// Sets the path before `/hitl/…`. The default is `/api/v1`.
    #[must_use]
    pub fn api_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets the tenant for calls that name none. A server with API keys takes the tenant from the
    /// key instead.
    #[must_use]
    pub fn tenant_id<T>(mut self, tenant: T) -> Self
    where
        T: TryInto<TenantId, Error: Into<InvalidValue>>,
    {
        self.tenant = Some(tenant.try_into().map_err(Into::into));
        self
    }

    /// Sets the thread for calls that name none.
    #[must_use]
    pub fn thread_id<T>(mut self, thread: T) -> Self
    where
        T: TryInto<ThreadId, Error: Into<InvalidValue>>,
    {
        self.thread = Some(thread.try_into().map_err(Into::into));
        self
    }

    /// Sets the credential, sent as `Authorization: Bearer …`. It replaces `Tenant-Id`.
    #[must_use]
    pub fn api_key<K>(mut self, key: K) -> Self
    where
        K: TryInto<ApiKey, Error: Into<InvalidValue>>,
    {
        self.api_key = Some(key.try_into().map_err(Into::into));
        self
    }

    /// Sets the time limit for one attempt. The default is 10 seconds. Connecting, including TLS,
    /// may take half of it.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the maximum number of retries per call; 0 means none. The default is 3.
    #[must_use]
    pub fn max_retries(mut self, retries: u32) -> Self {
        self.max_retries = retries;
        self
    }

    /// Sets the waits before retries.
    #[must_use]
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// Sets the time limit for a call as a whole, including waits. By default there is none.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Limits the retries of all calls together. `None` removes the limit. By default each service
    /// has its own [`Budget::default`], shared by its clones.
    #[must_use]
    pub fn budget(mut self, budget: impl Into<Option<Budget>>) -> Self {
        self.budget = Some(budget.into());
        self
    }

    /// Calls `observer` at the end of every attempt; see [`RetryLayer::observe`].
    #[must_use]
    pub fn observe<F>(mut self, observer: F) -> Self
    where
        F: Fn(&AttemptEvent<'_>) + Send + Sync + 'static,
    {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Sets how to treat a 409 that does not say which decision is on record. The default is
    /// [`OnDuplicate::Confirm`].
    ///
    /// A server of this crate always says it, and this setting has no effect: the opposite decision
    /// is a conflict.
    #[must_use]
    pub fn on_duplicate(mut self, on_duplicate: OnDuplicate) -> Self {
        self.on_duplicate = on_duplicate;
        self
    }

    /// Speaks HTTP/2 from the first byte, without negotiation.
    ///
    /// For `http` servers that support it, where HTTP/1.1 is the default. An `https` server
    /// negotiates the version, and this setting only removes HTTP/1.1 from the offer. It configures
    /// the built-in HTTP client, and has no effect on [`build_with`](Self::build_with).
    #[must_use]
    pub fn http2_prior_knowledge(mut self) -> Self {
        self.http2_prior_knowledge = true;
        self
    }

    /// Sets the keep-alive of HTTP/2 connections that have answers pending: how long without a
    /// frame until a ping, and how long its reply may take before the connection is closed. The
    /// defaults are 10 and 5 seconds. Both must be more than zero.
    ///
    /// Without it, only the attempt's timeout detects a server that disappeared silently. It
    /// configures the built-in HTTP client, and has no effect on [`build_with`](Self::build_with).
    #[must_use]
    pub fn http2_keep_alive(mut self, interval: Duration, timeout: Duration) -> Self {
        self.http2_keep_alive = KeepAlive { interval, timeout };
        self
    }

    /// Uses this HTTP proxy and ignores the environment. The URL has the scheme `http`, a host and
    /// a port, and optionally user and password.
    ///
    /// By default `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` name the proxy, as for
    /// curl, except for servers on `localhost` and loopback addresses. The lower-case form of a
    /// variable comes first, an empty one counts as not set, and one that cannot be used is an
    /// error. To an `https` server the
    /// proxy opens a tunnel (`CONNECT`); requests to an `http` server it reads. This configures the
    /// built-in HTTP client, and has no effect on [`build_with`](Self::build_with).
    #[must_use]
    pub fn proxy(mut self, url: impl Into<String>) -> Self {
        self.proxy = ProxySetting::Url(url.into());
        self
    }

    /// Uses no proxy and ignores the environment.
    #[must_use]
    pub fn no_proxy(mut self) -> Self {
        self.proxy = ProxySetting::Never;
        self
    }

    /// Sets the `User-Agent` of every request. The default is `aegis-hitl/` and the version.
    #[must_use]
    pub fn user_agent(mut self, user_agent: impl Into<String>) -> Self {
        self.user_agent = user_agent.into();
        self
    }

    /// Trusts these PEM certificates, in addition to the platform's roots.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn root_certificate_pem(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.root_certificates.push(pem.into());
        self
    }

    /// Authenticates with this client certificate if the server requests one. The PEM contains the
    /// chain, own certificate first, and the private key.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_identity_pem(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.client_identity = Some(pem.into());
        self
    }

    /// Uses this rustls (0.23) configuration for TLS. It replaces the platform's roots and the
    /// other certificate settings. Its ALPN protocols are replaced by those that the client speaks.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls_config(mut self, config: rustls::ClientConfig) -> Self {
        self.tls_config = Some(config);
        self
    }

    /// Checks the settings and makes the service with the built-in HTTP client.
    ///
    /// # Errors
    ///
    /// If a setting is wrong ([`Error::is_config`]); the message names it. If the server is `https`
    /// and no TLS roots are available.
    pub fn build(mut self) -> Result<AegisService, Error> {
        let base = url::parse_base(&self.base_url)?;
        let roots = std::mem::take(&mut self.root_certificates);
        // Checked before the client is made, so that a wrong setting is reported before a missing
        // certificate store.
        let connect_timeout = self.checked_timeout()? / 2;
        let settings = ClientSettings {
            connect_timeout,
            root_certificates: roots,
            client_identity: self.client_identity.take(),
            #[cfg(feature = "tls")]
            tls_config: self.tls_config.take(),
            http2_prior_knowledge: self.http2_prior_knowledge,
            http2_keep_alive: self.checked_keep_alive()?,
            #[cfg(unix)]
            proxy: match self.unix_socket {
                Some(_) => None,
                None => self.proxy.proxy_for(&base)?,
            },
            #[cfg(not(unix))]
            proxy: self.proxy.proxy_for(&base)?,
            #[cfg(unix)]
            unix_socket: self.unix_socket.take(),
        };
        let client = HttpClient::new(&base, settings)?;
        self.build_with(client)
    }

    /// Checks the settings and makes the service on any HTTP service.
    ///
    /// The service must not follow redirects or retry: redirects would send keys to another origin,
    /// and its retries would multiply with these.
    ///
    /// # Errors
    ///
    /// If a setting is wrong ([`Error::is_config`]); the message names it.
    pub fn build_with<S>(self, service: S) -> Result<AegisService<S>, Error> {
        let base = url::parse_base(&self.base_url)?;
        let timeout = self.checked_timeout()?;
        let prefix = Prefix::new(&self.prefix)
            .map_err(|error| Error::config(format!("the API prefix is malformed: {error}")))?;
        if self.deadline.is_some_and(|deadline| deadline.is_zero()) {
            return Err(Error::config(
                "the deadline is zero; allowed is more than zero",
            ));
        }
        let invalid = |value| Error::config_caused("a setting has an invalid value", value);
        let tenant = self.tenant.transpose().map_err(invalid)?;
        let thread = self.thread.transpose().map_err(invalid)?;
        let api_key = self.api_key.transpose().map_err(invalid)?;
        if tenant.is_some() && api_key.is_some() {
            return Err(Error::config(
                "both a tenant id and an API key are set; allowed is one, as the key names the tenant",
            ));
        }
        let user_agent = HeaderValue::try_from(&self.user_agent)
            .ok()
            .filter(|value| value.to_str().is_ok_and(|text| !text.trim().is_empty()))
            .ok_or_else(|| {
                Error::config(
                    "the user agent is malformed; allowed are visible ASCII characters and spaces",
                )
            })?;
        let mut retry = RetryLayer::new()
            .attempt_timeout(timeout)
            .max_retries(self.max_retries)
            .backoff(self.backoff)
            .deadline(self.deadline);
        if let Some(budget) = self.budget {
            retry = retry.budget(budget);
        }
        if let Some(observer) = self.observer {
            retry = retry.observe(move |event| observer(event));
        }
        let root = format!("{}{prefix}/hitl/", base.to_string().trim_end_matches('/'));
        let uri = |name: &str| {
            format!("{root}{name}")
                .parse::<Uri>()
                .map_err(|error| Error::config_caused("the base URL cannot be extended", error))
        };
        let endpoints = Arc::new(Endpoints {
            approve: uri("approve")?,
            reject: uri("reject")?,
            status: format!("{root}status/"),
            actions: format!("{root}actions"),
            events: uri("events")?,
            tenant,
            thread,
            authorization: api_key.map(|key| key.header_value()),
            user_agent,
            timeout,
            deadline: self.deadline,
        });
        let layer = AegisLayer::new()
            .set_request_id(SetRequestIdLayer::mint())
            // The body says more than the status: which decision is on record.
            .confirm(ConfirmDuplicateLayer::new().annotate_only())
            .retry(retry);
        let stack = layer.layer(ReadAnswers::new(service, endpoints.clone()));
        Ok(AegisService::new(stack, endpoints, self.on_duplicate))
    }

    fn checked_timeout(&self) -> Result<Duration, Error> {
        if self.timeout.is_zero() {
            return Err(Error::config(
                "the timeout is zero; allowed is more than zero",
            ));
        }
        Ok(self.timeout)
    }

    fn checked_keep_alive(&self) -> Result<KeepAlive, Error> {
        let KeepAlive { interval, timeout } = self.http2_keep_alive;
        if interval.is_zero() || timeout.is_zero() {
            return Err(Error::config(
                "the HTTP/2 keep-alive interval or timeout is zero; allowed is more than zero",
            ));
        }
        Ok(self.http2_keep_alive)
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("base_url", &url::shown(&self.base_url))
            .field("prefix", &self.prefix)
            .field("timeout", &self.timeout)
            .field("max_retries", &self.max_retries)
            .field("backoff", &self.backoff)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}
