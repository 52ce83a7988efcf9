//! The settings of a webhook endpoint.

use std::error::Error as StdError;
use std::fmt;

use http::Uri;
#[cfg(feature = "tls")]
use rustls::RootCertStore;
#[cfg(feature = "tls")]
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::sign::Secret;
use crate::protocol::{Event, EventKind, TenantId, check_host_and_port, split_scheme};
use crate::store::Start;

/// The most characters of a name.
const MAX_NAME: usize = 64;

/// Where events are delivered, which ones, and in which form.
///
/// The name is the identity of an endpoint: with it goes what was delivered so far.
#[derive(Clone, PartialEq)]
pub struct Endpoint {
    name: String,
    pub(super) url: Uri,
    pub(super) form: Form,
    tenants: Option<Vec<TenantId>>,
    /// `None` is all.
    events: Option<Vec<EventKind>>,
    pub(super) start: Start,
    /// The roots to trust besides those of the platform.
    #[cfg(feature = "tls")]
    pub(super) roots: Vec<CertificateDer<'static>>,
}

/// The form of what is delivered.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Form {
    /// Standard Webhooks, signed with each of the secrets.
    Standard(Vec<Secret>),
    Slack,
    Ntfy,
}

impl Endpoint {
    /// Makes an endpoint for signed events in the form of [Standard Webhooks]. It takes all events.
    ///
    /// Each message is signed with every secret, so that a receiver can change from one to the
    /// next.
    ///
    /// [Standard Webhooks]: https://www.standardwebhooks.com
    ///
    /// # Errors
    ///
    /// If the name or the URL is malformed, or there is no secret.
    pub fn standard(name: &str, url: &str, secrets: Vec<Secret>) -> Result<Self, InvalidEndpoint> {
        if secrets.is_empty() {
            return Err(InvalidEndpoint(
                "has no secret; messages in the format 'standard' are signed",
            ));
        }
        Self::new(name, url, Form::Standard(secrets))
    }

    /// Makes an endpoint for notifications by an incoming webhook of Slack, or of a service that
    /// takes the same messages. It takes the events after which a decision is due: submitted,
    /// failed and claim-lost.
    ///
    /// # Errors
    ///
    /// If the name or the URL is malformed.
    pub fn slack(name: &str, url: &str) -> Result<Self, InvalidEndpoint> {
        Self::new(name, url, Form::Slack)
    }

    /// Makes an endpoint for notifications by a topic of ntfy, with the same events as
    /// [`slack`](Self::slack).
    ///
    /// # Errors
    ///
    /// If the name or the URL is malformed.
    pub fn ntfy(name: &str, url: &str) -> Result<Self, InvalidEndpoint> {
        Self::new(name, url, Form::Ntfy)
    }

    fn new(name: &str, url: &str, form: Form) -> Result<Self, InvalidEndpoint> {
        let is_name = (1..=MAX_NAME).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !is_name {
            return Err(InvalidEndpoint(
                "has a malformed name; allowed are 1 to 64 letters, digits, and - _ .",
            ));
        }
        let url = parse_url(url)?;
        if url.scheme_str() == Some("https") && cfg!(not(feature = "tls")) {
            return Err(InvalidEndpoint(
                "has an https URL, which needs the crate feature 'tls'",
            ));
        }
        let events = match form {
            Form::Standard(_) => None,
            Form::Slack | Form::Ntfy => Some(vec![
                EventKind::Submitted,
                EventKind::Failed,
                EventKind::ClaimLost,
            ]),
        };
        Ok(Self {
            name: name.to_owned(),
            url,
            form,
            tenants: None,
            events,
            start: Start::Now,
            #[cfg(feature = "tls")]
            roots: Vec::new(),
        })
    }

    /// Sets the tenants whose events are delivered. Without this, those of all tenants are.
    #[must_use]
    pub fn tenants(mut self, tenants: Vec<TenantId>) -> Self {
        self.tenants = Some(tenants);
        self
    }

    /// Sets the kinds of events that are delivered.
    #[must_use]
    pub fn events(mut self, events: Vec<EventKind>) -> Self {
        self.events = Some(events);
        self
    }

    /// Sets where the endpoint begins when it is new. The default is [`Start::Now`].
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Trusts the certificates in this PEM, and those that they issued, in addition to what the
    /// platform trusts: for a receiver with a private CA.
    ///
    /// # Errors
    ///
    /// If there is no certificate, one is malformed, or the URL is not https.
    #[cfg(feature = "tls")]
    pub fn root_certificates_pem(mut self, pem: &[u8]) -> Result<Self, InvalidEndpoint> {
        if self.url.scheme_str() != Some("https") {
            return Err(InvalidEndpoint(
                "has roots to trust, and a URL without TLS; allowed is https://",
            ));
        }
        // What cannot be a root is found here, and not at the first delivery.
        let mut checked = RootCertStore::empty();
        let mut roots = Vec::new();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate
                .map_err(|_| InvalidEndpoint("has roots to trust that are not valid PEM"))?;
            checked.add(certificate.clone()).map_err(|_| {
                InvalidEndpoint("has a root to trust that is no valid certificate (X.509)")
            })?;
            roots.push(certificate);
        }
        if roots.is_empty() {
            return Err(InvalidEndpoint(
                "has no certificate among its roots to trust; allowed is PEM with at least one",
            ));
        }
        self.roots = roots;
        Ok(self)
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the form links to a page.
    pub(super) fn has_link(&self) -> bool {
        !matches!(self.form, Form::Standard(_))
    }

    /// Whether the endpoint takes an event.
    pub(super) fn takes(&self, event: &Event) -> bool {
        let tenant = (event.action.as_ref()).and_then(|action| action.tenant_id.as_ref());
        let is_of_tenants = (self.tenants.as_ref())
            .is_none_or(|tenants| tenant.is_some_and(|tenant| tenants.contains(tenant)));
        let is_of_events = (self.events.as_ref()).is_none_or(|events| events.contains(&event.kind));
        is_of_tenants && is_of_events
    }
}

/// Parses the URL of an endpoint. Errors repeat nothing of it, because it may hold a token.
fn parse_url(url: &str) -> Result<Uri, InvalidEndpoint> {
    let (scheme, rest) = split_scheme(url, &["http", "https"]).ok_or(InvalidEndpoint(
        "has a URL without a scheme; allowed are http:// and https://",
    ))?;
    if rest.contains('#') {
        return Err(InvalidEndpoint("has a URL with a fragment"));
    }
    let authority = &rest[..rest.find(['/', '?']).unwrap_or(rest.len())];
    if authority.contains('@') {
        return Err(InvalidEndpoint("has a URL with a user or a password"));
    }
    if check_host_and_port(authority).is_err() {
        return Err(InvalidEndpoint("has a URL with a malformed host or port"));
    }
    format!("{scheme}://{rest}")
        .parse()
        .map_err(|_| InvalidEndpoint("has a malformed URL"))
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL of a notification is a secret.
        f.debug_struct("Endpoint")
            .field("name", &self.name)
            .field("form", &self.form)
            .field("tenants", &self.tenants)
            .field("events", &self.events)
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

/// The error of an [`Endpoint`] that cannot be. It repeats neither the URL nor a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidEndpoint(pub(super) &'static str);

impl fmt::Display for InvalidEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the endpoint {}", self.0)
    }
}

impl StdError for InvalidEndpoint {}

/// The URL under which people reach the server's pages, such as `https://aegis.example.com`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl(String);

impl PublicUrl {
    /// Parses an http or https URL with a host, and if need be a port. A path is not allowed, as the
    /// pages are at the root of their host.
    ///
    /// # Errors
    ///
    /// If it is anything else.
    pub fn new(url: &str) -> Result<Self, InvalidPublicUrl> {
        let (scheme, rest) = split_scheme(url, &["http", "https"]).ok_or(InvalidPublicUrl)?;
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]_".contains(&byte);
        let is_valid = authority.bytes().all(is_host) && check_host_and_port(authority).is_ok();
        match is_valid {
            true => Ok(Self(format!("{scheme}://{authority}"))),
            false => Err(InvalidPublicUrl),
        }
    }

    /// Returns whether browsers reach the server by https.
    pub fn is_https(&self) -> bool {
        self.0.starts_with("https://")
    }

    /// The page of an action.
    pub(super) fn page(&self, event: &Event) -> Option<String> {
        // The id is the store's own, a UUID.
        let id = event.action.as_ref()?.request_id.as_uuid()?;
        Some(format!("{}/actions/{id}", self.0))
    }
}

impl std::str::FromStr for PublicUrl {
    type Err = InvalidPublicUrl;

    fn from_str(url: &str) -> Result<Self, InvalidPublicUrl> {
        Self::new(url)
    }
}

impl fmt::Display for PublicUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The error of a text that is no [`PublicUrl`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct InvalidPublicUrl;

impl fmt::Display for InvalidPublicUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the public URL is malformed; allowed is http:// or https:// with a host, and if need \
             be a port, and no path",
        )
    }
}

impl StdError for InvalidPublicUrl {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_would_lead_elsewhere_is_refused_without_being_shown() {
        for url in [
            "",
            "hooks.example.com/token",
            "ftp://h/token",
            "http:///token",
            "http://h:99999/token",
            "http://h:/token x",
            "http://user:token@h/",
            "http://h/token#token",
            "http://[::1/token",
            "http://h\u{e9}/token",
        ] {
            let error = Endpoint::slack("chat", url).unwrap_err().to_string();
            assert!(!error.contains("token"), "{url}: {error}");
        }
        for url in ["http://10.0.0.7:8080/a?b=c", "HTTP://[::1]?x"] {
            Endpoint::slack("chat", url).unwrap();
        }
        let shown = format!("{:?}", Endpoint::slack("chat", "http://h/token").unwrap());
        assert!(!shown.contains("token"), "{shown}");
    }

    #[test]
    fn a_name_is_one_that_can_be_typed() {
        for name in ["", "a b", "a/b", "\u{e9}", &"a".repeat(65)] {
            assert!(Endpoint::ntfy(name, "http://h/").is_err(), "{name}");
        }
        Endpoint::ntfy("On-call_2.a", "http://h/").unwrap();
    }

    #[test]
    fn an_https_url_needs_tls() {
        let made = Endpoint::slack("chat", "https://h/token");
        assert_eq!(made.is_ok(), cfg!(feature = "tls"), "{made:?}");
    }

    #[test]
    fn what_is_signed_has_a_secret() {
        let error = Endpoint::standard("a", "http://h/", vec![]).unwrap_err();
        assert!(error.to_string().contains("no secret"), "{error}");
    }

    #[test]
    fn a_public_url_has_nothing_that_a_message_would_take_for_markup() {
        for url in [
            "",
            "aegis.example.com",
            "https://h/?q",
            "https://h/#f",
            "https://u@h/",
            "https://h/a|b",
            "https://h<b>/",
            "https://h:0/",
            "https://h/a",
            "https://h//",
        ] {
            assert_eq!(PublicUrl::new(url), Err(InvalidPublicUrl), "{url}");
        }
        for url in ["https://h", "https://h/", "HTTPS://h/"] {
            assert_eq!(PublicUrl::new(url).unwrap().0, "https://h");
        }
        assert_eq!(PublicUrl::new("http://h:81/").unwrap().0, "http://h:81");
    }
}
