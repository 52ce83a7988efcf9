//! Who looks at a page.

use std::net::IpAddr;

use http::HeaderMap;
use http::header::COOKIE;

use super::Desk;
use crate::protocol::{MAX_LEN, TenantId};
use crate::server::auth::{Auth, Caller, Holder, RESERVED, Scope, is_reserved};
use crate::server::http::{Rejection, headers};
use crate::store::Actor;

/// Somebody who may read.
#[derive(Debug)]
pub(super) struct Viewer {
    /// The tenant whose actions they see. `None` for all.
    pub(super) tenant: Option<TenantId>,
    pub(super) actor: Actor,
    pub(super) may_decide: bool,
    /// Whether the actor is told from others.
    pub(super) is_known: bool,
    /// Whether they signed in here, and can sign out.
    pub(super) has_session: bool,
    /// The digest of the API key that they signed in by.
    pub(super) key: Option<[u8; 32]>,
}

impl Viewer {
    /// `None` if the key does not allow to read.
    pub(super) fn by_key(caller: Caller) -> Option<Self> {
        caller.may(Scope::Read).then(|| Self {
            may_decide: caller.may(Scope::Decide),
            is_known: caller.is_known(),
            key: caller.key,
            tenant: Some(caller.tenant_id),
            actor: caller.actor,
            has_session: true,
        })
    }

    /// Tells viewers apart.
    pub(super) fn name(&self) -> String {
        let tenant = self.tenant.as_ref().map_or("", |tenant| tenant.as_str());
        // Neither has a line feed.
        format!("{tenant}\n{}", self.actor.as_str())
    }

    pub(super) fn local() -> Self {
        Self {
            tenant: None,
            actor: Actor::new("local"),
            may_decide: true,
            is_known: false,
            has_session: true,
            key: None,
        }
    }
}

impl Desk {
    /// Returns who sends a request. `None` if they are not signed in.
    pub(super) fn viewer(
        &self,
        auth: &Auth,
        cookie: Cookie,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Option<Viewer>, Rejection> {
        if let Some(viewer) = self.by_proxy(headers, peer)? {
            return Ok(Some(viewer));
        }
        let token = cookie.token(headers);
        let holder = token.and_then(|token| self.sessions.holder(token));
        Ok(match holder {
            Some(Holder::Local) => auth.trusts_tenant_header().then(Viewer::local),
            Some(holder) => auth.holder(holder).and_then(Viewer::by_key),
            None => None,
        })
    }

    /// What is the matter with the cookie of a browser. `None` if it has none, or is signed in.
    pub(super) fn stray(&self, cookie: Cookie, headers: &HeaderMap) -> Option<Stray> {
        let token = cookie.token(headers);
        let holder = token.and_then(|token| self.sessions.holder(token));
        cookie.stray(headers).filter(|_| holder.is_none())
    }

    fn by_proxy(
        &self,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Option<Viewer>, Rejection> {
        let Some(proxy) = &self.settings.proxy else {
            return Ok(None);
        };
        let is_proxy = peer.is_some_and(|peer| proxy.addresses.contains(&peer.to_canonical()));
        let mut names = headers.get_all(&proxy.user).iter();
        let (true, Some(name)) = (is_proxy, names.next()) else {
            return Ok(None);
        };
        let name = name.to_str().unwrap_or_default().trim();
        let is_name = (1..=MAX_LEN).contains(&name.len()) && !name.contains('\t');
        if names.next().is_some() || !is_name {
            return Err(Rejection::invalid(format!(
                "the {} header does not name one user in 1 to {MAX_LEN} visible ASCII characters",
                proxy.user
            )));
        }
        if is_reserved(name) {
            return Err(Rejection::invalid(format!(
                "the {} header has a name that stands for nobody; {RESERVED} are reserved",
                proxy.user
            )));
        }
        // A proxy that adds its header to one of its client's leaves the choice to the client.
        headers::reject_repeated(headers)?;
        Ok(Some(Viewer {
            tenant: headers::identifier(headers, &headers::TENANT, TenantId::new)?,
            actor: Actor::new(name),
            may_decide: true,
            is_known: true,
            has_session: false,
            key: None,
        }))
    }
}

/// The session cookie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cookie {
    /// Whether browsers reach the server by HTTPS only.
    pub(super) is_secure: bool,
}

impl Cookie {
    /// The name. Browsers take one with this prefix only by HTTPS, for the whole host and from no
    /// other.
    pub(super) fn name(self) -> &'static str {
        if self.is_secure {
            "__Host-aegis"
        } else {
            "aegis"
        }
    }

    pub(super) fn attributes(self) -> &'static str {
        if self.is_secure {
            "Path=/; HttpOnly; SameSite=Strict; Secure"
        } else {
            "Path=/; HttpOnly; SameSite=Strict"
        }
    }

    /// The session token that a browser sent. `None` if it sent several: a page on another port or
    /// below the same domain can add a cookie, and so have somebody act in a session of its own.
    pub(super) fn token(self, headers: &HeaderMap) -> Option<&str> {
        let mut tokens = self.tokens(headers);
        let token = tokens.next()?;
        tokens.all(|other| other == token).then_some(token)
    }

    fn tokens(self, headers: &HeaderMap) -> impl Iterator<Item = &str> {
        headers
            .get_all(COOKIE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .filter(move |(found, _)| *found == self.name())
            .map(|(_, token)| token)
    }

    /// What is the matter with the cookie of a browser that is not signed in. `None` if it has none.
    pub(super) fn stray(self, headers: &HeaderMap) -> Option<Stray> {
        match self.token(headers) {
            Some("") => None,
            Some(_) => Some(Stray::Over),
            None => self.tokens(headers).next().map(|_| Stray::Several),
        }
    }
}

/// A session cookie that signs nobody in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stray {
    /// It is of no session: of none any more, or of another server's.
    Over,
    /// There are several, so it is not known whose it is.
    Several,
}

impl Stray {
    const EACH: [Self; 2] = [Self::Over, Self::Several];

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Over => "over",
            Self::Several => "several",
        }
    }

    pub(super) fn of(word: &str) -> Option<Self> {
        Self::EACH.into_iter().find(|stray| stray.word() == word)
    }

    pub(super) fn says(self) -> &'static str {
        match self {
            Self::Over => {
                "Your session is over: it ends after 12 hours, with its key, and when the server \
                 stops. Another AEGIS server on this host, on whatever port, ends it too, as it \
                 takes the place of the cookie. Sign in again."
            }
            Self::Several => {
                "Your browser sent several session cookies, and it cannot be told which one is \
                 yours, so none counts. Another page on this host or of this domain has set one. \
                 They were removed as far as that is possible. Sign in again, and if that brings \
                 you back here, delete the cookies of this site in your browser."
            }
        }
    }
}
