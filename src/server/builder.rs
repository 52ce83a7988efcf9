//! What can be set on a [`HitlService`], checked once when it is built.

use std::time::Duration;

use super::api::Settings;
use super::auth::Auth;
use super::http::Host;
use super::service::HitlService;
use crate::protocol::{InvalidPrefix, Prefix};
use crate::store::Store;

/// Builds a [`HitlService`]; see [`HitlService::builder`].
#[derive(Debug, Clone)]
#[must_use]
pub struct HitlServiceBuilder<St> {
    store: St,
    /// What the prefix was set to, if that can be no path.
    invalid_prefix: Option<InvalidPrefix>,
    settings: Settings,
}

impl<St: Store> HitlServiceBuilder<St> {
    pub(crate) fn new(store: St) -> Self {
        Self {
            store,
            invalid_prefix: None,
            settings: Settings::default(),
        }
    }

    /// Sets the path before `/hitl/…`: empty, or one that starts with a slash. The default is
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

    /// Sets how the server knows who asks. The default is [`Auth::tenant_header`].
    pub fn auth(mut self, auth: Auth) -> Self {
        self.settings.auth = auth;
        self
    }

    /// Adds a host that the service answers for, beside the loopback names and, in a [`Server`](super::Server), the address
    /// that it listens on.
    ///
    /// A request that names another host is answered 421, and one that would change something 403 if a web page of another
    /// origin sent it. An origin is the service's own if it is the one that the request was sent to, or of a host added here.
    /// Without API keys this is always checked: the name of a page can be made to resolve to a loopback address, and the page
    /// would then act for every tenant. With API keys it is checked once a host was added: a page has no key to send, so
    /// there is nothing to gain by such a name.
    pub fn host(mut self, host: Host) -> Self {
        self.settings.hosts.push(host);
        self
    }

    /// Sets whether only an action that was submitted before may be decided. The default is `false`.
    pub fn require_submission(mut self, required: bool) -> Self {
        self.settings.require_submission = required;
        self
    }

    /// Sets the largest request body in bytes. The default is 262 144 (256 KiB).
    pub fn body_limit(mut self, bytes: usize) -> Self {
        self.settings.body_limit = bytes;
        self
    }

    /// Sets how long a request body may take to arrive before the answer is 408. The default is 10 s.
    pub fn body_timeout(mut self, timeout: Duration) -> Self {
        self.settings.body_timeout = timeout;
        self
    }

    /// Sets how long the store may take before the answer is 503. The default is 2 s.
    ///
    /// What the store was asked to do is not taken back: the client asks again with the same key, which settles it.
    pub fn store_timeout(mut self, timeout: Duration) -> Self {
        self.settings.store_timeout = timeout;
        self
    }

    /// Sets how often a request that waits for a decision looks by itself, in case a wake-up was lost. The default is 3 s.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.settings.poll_interval = interval;
        self
    }

    /// Builds the service.
    ///
    /// # Errors
    ///
    /// If the prefix can be no path.
    pub fn build(self) -> Result<HitlService<St>, InvalidPrefix> {
        if let Some(invalid) = self.invalid_prefix {
            return Err(invalid);
        }
        Ok(HitlService::with_settings(self.store, self.settings))
    }
}
