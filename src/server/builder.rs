//! The settings of a [`HitlService`], checked once when it is built.

use std::time::Duration;

use super::api::Settings;
use super::auth::Auth;
use super::http::{Host, Rate};
use super::inbox::Inbox;
use super::reloads::Reloads;
use super::service::HitlService;
use crate::outbox::Tally;
use crate::protocol::{InvalidPrefix, Prefix};
use crate::store::Store;

/// Builds a [`HitlService`]; see [`HitlService::builder`].
#[derive(Debug, Clone)]
#[must_use]
pub struct HitlServiceBuilder<St> {
    store: St,
    /// The error of the last call of `prefix`, if it was not a valid path.
    invalid_prefix: Option<InvalidPrefix>,
    settings: Settings,
    inbox: Option<Inbox>,
}

impl<St: Store> HitlServiceBuilder<St> {
    pub(crate) fn new(store: St) -> Self {
        Self {
            store,
            invalid_prefix: None,
            settings: Settings::default(),
            inbox: None,
        }
    }

    /// Sets the path before `/hitl/…`: empty, or a path that starts with a slash. The default is
    /// [`DEFAULT_PREFIX`](crate::protocol::DEFAULT_PREFIX); see [`Prefix`].
    pub fn prefix(mut self, prefix: impl AsRef<str>) -> Self {
        match Prefix::new(prefix.as_ref()) {
            Ok(prefix) => {
                self.settings.prefix = prefix;
                self.invalid_prefix = None;
            }
            Err(invalid) => self.invalid_prefix = Some(invalid),
        }
        self
    }

    /// Sets how the server authenticates its callers. The default is [`Auth::tenant_header`].
    pub fn auth(mut self, auth: Auth) -> Self {
        self.settings.auth = auth;
        self
    }

    /// Adds a host that the service answers for, in addition to the loopback names and, in a
    /// [`Server`](super::Server), the address it listens on.
    ///
    /// A request for another host is answered 421. A request that would change something is
    /// answered 403 if a web page of a foreign origin sent it. The service's own origins are the
    /// one that the request was sent to, and those of the hosts added here.
    ///
    /// Without API keys these checks always apply. A web page can make its own name resolve to a
    /// loopback address (DNS rebinding) and would then act for every tenant. With API keys they
    /// apply once a host has been added: a web page has no key to send, so rebinding gains it
    /// nothing.
    pub fn host(mut self, host: Host) -> Self {
        self.settings.hosts.push(host);
        self
    }

    /// Sets whether only an action that was submitted before can be decided. The default is
    /// `false`.
    pub fn require_submission(mut self, required: bool) -> Self {
        self.settings.require_submission = required;
        self
    }

    /// Sets whether the owner of the API key that submitted an action may decide on it. The default
    /// is `false`. Without API keys callers are not told apart, and anyone may.
    pub fn allow_self_approval(mut self, allowed: bool) -> Self {
        self.settings.allow_self_approval = allowed;
        self
    }

    /// Serves the inbox, the web page on which reviewers decide, at `/`. The default is to serve
    /// none.
    pub fn inbox(mut self, inbox: Inbox) -> Self {
        self.inbox = Some(inbox);
        self
    }

    /// Shows the endpoints of an [outbox](crate::outbox::Outbox) in the metrics. The default is to
    /// show none.
    pub fn webhooks(mut self, tally: Tally) -> Self {
        self.settings.webhooks = Some(tally);
        self
    }

    /// Shows in the metrics what became of reloads. The default is not to.
    pub fn reloads(mut self, reloads: Reloads) -> Self {
        self.settings.reloads = Some(reloads);
        self
    }

    /// Sets the largest request body, in bytes. The default is 262 144 (256 KiB).
    pub fn body_limit(mut self, bytes: usize) -> Self {
        self.settings.body_limit = bytes;
        self
    }

    /// Limits the rate of requests from one IPv4 address or one IPv6 `/64` network. Requests beyond
    /// it are answered 429 with `Retry-After`. The default is no limit.
    ///
    /// It applies only where the peer's address is known, which is in a
    /// [`Server`](super::Server). Behind a proxy, that address is the proxy's.
    pub fn max_rate_per_peer(mut self, rate: Rate) -> Self {
        self.settings.max_rate_per_peer = Some(rate);
        self
    }

    /// Limits the rate of requests of one tenant, apart from the pages of the inbox and from
    /// statuses that are asked for without credentials. Requests beyond it are answered 429 with
    /// `Retry-After`. The default is no limit.
    ///
    /// The inbox is left out so that a reviewer can still stop an agent that runs wild.
    pub fn max_rate_per_tenant(mut self, rate: Rate) -> Self {
        self.settings.max_rate_per_tenant = Some(rate);
        self
    }

    /// Sets how long a request body may take to arrive before the response is 408. The default is
    /// 10 s.
    pub fn body_timeout(mut self, timeout: Duration) -> Self {
        self.settings.body_timeout = timeout;
        self
    }

    /// Sets how long the store may take before the response is 503. The default is 2 s.
    ///
    /// The timeout does not cancel the operation in the store. The client sends the request again
    /// with the same key, which settles the outcome.
    pub fn store_timeout(mut self, timeout: Duration) -> Self {
        self.settings.store_timeout = timeout;
        self
    }

    /// Sets how often a request that waits for a decision polls the store, in case a wake-up was
    /// lost. The default is 3 s.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.settings.poll_interval = interval;
        self
    }

    /// Builds the service.
    ///
    /// # Errors
    ///
    /// If the prefix is not a valid path.
    pub fn build(self) -> Result<HitlService<St>, InvalidPrefix> {
        if let Some(invalid) = self.invalid_prefix {
            return Err(invalid);
        }
        Ok(HitlService::with_settings(
            self.store,
            self.settings,
            self.inbox,
        ))
    }
}
