//! Authentication: who the caller is, and for which tenant.

mod keys;
mod sessions;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use tokio::sync::watch;

pub use self::keys::{Keys, KeysError, Scope};
use self::keys::{Owner, Scopes};
pub(crate) use self::sessions::{Holder, LIFETIME, OneTimeCode, Sessions};
use crate::protocol::{ApiKey, Code, TenantId};
use crate::server::http::Rejection;
use crate::server::http::headers;
use crate::store::Actor;

/// How a server authenticates its callers.
///
/// Without API keys the server trusts the `Tenant-Id` header. Use this on a loopback address, or on
/// a network where a proxy sets that header. The hosts and web pages that are answered are then
/// [limited](crate::server::HitlServiceBuilder::host). With API keys the tenant is that of the key,
/// and a header that names another tenant is rejected.
#[derive(Debug, Clone, Default)]
pub struct Auth(Option<watch::Receiver<Keys>>);

impl Auth {
    /// Trusts the `Tenant-Id` header. The default.
    pub fn tenant_header() -> Self {
        Self(None)
    }

    /// Takes the tenant and the actor from an API key, sent as `Authorization: Bearer …`.
    pub fn keys(keys: Keys) -> Self {
        Self::watched_keys(watch::channel(keys).1)
    }

    /// Takes API keys from a channel, so that they can be replaced while the server runs. Each
    /// request is checked against the keys sent last.
    ///
    /// A request that was already accepted, such as one that waits for a decision, completes with
    /// the old keys. A stream of events has no end of its own, so it ends with its key.
    pub fn watched_keys(keys: watch::Receiver<Keys>) -> Self {
        Self(Some(keys))
    }

    /// Returns whether any caller may name any tenant.
    pub fn trusts_tenant_header(&self) -> bool {
        self.0.is_none()
    }

    /// Returns the caller.
    pub(crate) fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, Rejection> {
        match &self.0 {
            Some(keys) => by_key(&keys.borrow(), headers)?.ok_or_else(|| {
                unauthorized("this server needs an API key; send 'Authorization: Bearer …'")
            }),
            None => by_header(headers)?
                .ok_or_else(|| Rejection::invalid(headers::missing(&headers::TENANT))),
        }
    }

    /// Returns the holder of a session, and who signs in with this key. `None` if there is no such
    /// key, or not any more.
    pub(crate) fn sign_in(&self, key: &ApiKey) -> Option<(Holder, Caller)> {
        let holder = Holder::Key(keys::digest(key));
        Some((holder, self.holder(holder)?))
    }

    /// Returns who the holder of a session is now. `None` if their key is gone.
    pub(crate) fn holder(&self, holder: Holder) -> Option<Caller> {
        let Holder::Key(digest) = holder else {
            return None;
        };
        let keys = self.0.as_ref()?.borrow();
        let owner = keys.owner(&digest)?;
        (!owner.has_expired()).then(|| Caller::new(owner, digest))
    }

    /// Returns whether a caller whose request outlives its check still has a scope for a tenant.
    /// `key` is the digest of their API key.
    pub(crate) fn still_allows(
        &self,
        key: Option<[u8; 32]>,
        scope: Scope,
        tenant: &TenantId,
    ) -> bool {
        key.is_none_or(|key| {
            self.holder(Holder::Key(key))
                .is_some_and(|caller| caller.may(scope) && caller.tenant_id == *tenant)
        })
    }

    /// Returns the caller, or `None` for an anonymous request. Credentials must be valid where they
    /// are present.
    pub(crate) fn authenticate_if_present(
        &self,
        headers: &HeaderMap,
    ) -> Result<Option<Caller>, Rejection> {
        match &self.0 {
            Some(keys) => by_key(&keys.borrow(), headers),
            None => by_header(headers),
        }
    }
}

/// The names that no key and no proxy gives to anybody.
pub(crate) const RESERVED: &str = "'anonymous', 'local' and what begins with 'system:'";

/// Whether a name stands in the audit trail for the server itself, or for callers that are not told
/// apart.
pub(crate) fn is_reserved(name: &str) -> bool {
    name.starts_with("system:") || ["anonymous", "local"].contains(&name)
}

/// An authenticated caller.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) tenant_id: TenantId,
    pub(crate) actor: Actor,
    scopes: Scopes,
    /// The digest of the caller's API key. A server without keys tells nobody apart.
    pub(crate) key: Option<[u8; 32]>,
}

impl Caller {
    fn new(owner: &Owner, key: [u8; 32]) -> Self {
        Self {
            tenant_id: owner.tenant_id.clone(),
            actor: owner.actor.clone(),
            scopes: owner.scopes,
            key: Some(key),
        }
    }

    /// Whether the actor is told from others.
    pub(crate) fn is_known(&self) -> bool {
        self.key.is_some()
    }

    /// Rejects a caller who lacks a scope.
    pub(crate) fn with(self, scope: Scope) -> Result<Self, Rejection> {
        if self.may(scope) {
            return Ok(self);
        }
        let words = self.scopes.words();
        Err(Rejection::new(
            Code::Forbidden,
            format!("this API key has the scopes '{words}'; '{scope}' is needed"),
        ))
    }

    pub(crate) fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(scope)
    }
}

fn by_header(headers: &HeaderMap) -> Result<Option<Caller>, Rejection> {
    if headers.contains_key(AUTHORIZATION) {
        // Ignoring it would accept any key.
        return Err(unauthorized(
            "this server has no API keys configured; send 'Tenant-Id' and no 'Authorization'",
        ));
    }
    let tenant_id = headers::identifier(headers, &headers::TENANT, TenantId::new)?;
    Ok(tenant_id.map(|tenant_id| Caller {
        tenant_id,
        actor: Actor::new("anonymous"),
        scopes: Scopes::ALL,
        key: None,
    }))
}

fn by_key(keys: &Keys, headers: &HeaderMap) -> Result<Option<Caller>, Rejection> {
    let Some(value) = headers.get(AUTHORIZATION) else {
        return Ok(None);
    };
    let key = bearer(value.as_bytes())
        .ok_or_else(|| unauthorized("the Authorization header is not 'Bearer' and an API key"))?;
    let digest = keys::digest(&key);
    let owner = keys
        .owner(&digest)
        .ok_or_else(|| unauthorized("the API key is unknown"))?;
    if owner.has_expired() {
        return Err(unauthorized("the API key has expired"));
    }
    let named = headers::identifier(headers, &headers::TENANT, TenantId::new)?;
    if named.is_some_and(|named| named != owner.tenant_id) {
        return Err(Rejection::new(
            Code::Forbidden,
            "the API key is another tenant's than the one that the Tenant-Id header names",
        ));
    }
    Ok(Some(Caller::new(owner, digest)))
}

/// Reads the scheme `Bearer`, in any case, followed by one token (RFC 6750, section 2.1).
fn bearer(value: &[u8]) -> Option<ApiKey> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, token) = value.split_at_checked(SCHEME.len())?;
    if !scheme.eq_ignore_ascii_case(SCHEME) {
        return None;
    }
    let token = std::str::from_utf8(token).ok()?;
    ApiKey::new(token.trim_matches(' ')).ok()
}

fn unauthorized(detail: &'static str) -> Rejection {
    Rejection::new(Code::Unauthorized, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_token_is_read_whatever_the_case_of_its_scheme() {
        for value in ["Bearer k", "bearer k", "BEARER   k"] {
            assert_eq!(bearer(value.as_bytes()).unwrap().as_str(), "k", "{value}");
        }
        for value in [
            "",
            "k",
            "Bearer",
            "Bearer ",
            "Bearerk",
            "Basic k",
            "Bearer a b",
            "Bearer é",
        ] {
            assert!(bearer(value.as_bytes()).is_none(), "{value}");
        }
    }
}
