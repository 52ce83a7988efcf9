//! The inbox: the web page on which reviewers decide.
//!
//! Pages are complete without scripts. A `GET` changes nothing, and a `POST` is answered 303, so
//! that reloading a page and going back to it are harmless. What others wrote is escaped.

mod action;
mod decide;
mod list;
mod live;
mod page;
mod press;
mod sign_in;
mod text;
mod tokens;
mod viewer;

use std::net::IpAddr;
use std::sync::Arc;

use http::request::Parts;
use http::{HeaderName, Method};
use http_body::Body;
use uuid::Uuid;

use super::api::{Api, no_such_action, uuid_of};
use super::auth::{OneTimeCode, Sessions};
use super::http::{Arrival, HostGuard, Rejection, RequestBody, Response};
use crate::store::Store;

pub(super) use self::page::rejected;
use self::press::Press;
use self::viewer::{Cookie, Viewer};

/// The settings of the inbox, the web page at `/` on which reviewers decide.
///
/// Reviewers sign in with an API key that has the scope `read`; with `decide` they also decide. A
/// server without API keys is opened by a [one-time
/// link](crate::server::HitlService::issue_sign_in_path), which sees all tenants. A session lasts at
/// most 12 hours, and ends with its key, with the process, and when the reviewer signs out.
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct Inbox {
    is_behind_tls: bool,
    proxy: Option<Proxy>,
}

/// A proxy that signs people in.
#[derive(Debug, Clone)]
struct Proxy {
    user: HeaderName,
    addresses: Vec<IpAddr>,
}

impl Inbox {
    /// Makes the default settings: sessions by API key, over plain HTTP.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether browsers reach the server by HTTPS only, such as through a proxy that has the
    /// certificate. The session cookie is then `__Host-aegis` and `Secure`, as it always is on a
    /// [`Server`](crate::server::Server) with TLS of its own. The default is `false`.
    pub fn behind_tls(mut self, is_behind_tls: bool) -> Self {
        self.is_behind_tls = is_behind_tls;
        self
    }

    /// Trusts the header `user` on connections from these addresses to name who is signed in.
    ///
    /// The proxy must set or remove the header on each request, and `Tenant-Id` too, or its clients
    /// could name anyone. The user reads and decides for the tenant that the proxy names in
    /// `Tenant-Id`, or, without that header, for all tenants. The name is on record as who decided,
    /// and may not decide on what an API key of the same name submitted. It has up to 255 visible
    /// ASCII characters, and is none of the server's own: `anonymous`, `local`, `system:…`.
    pub fn trust_user_header(
        mut self,
        user: HeaderName,
        proxies: impl IntoIterator<Item = IpAddr>,
    ) -> Self {
        self.proxy = Some(Proxy {
            user,
            addresses: proxies.into_iter().map(|ip| ip.to_canonical()).collect(),
        });
        self
    }
}

/// The inbox of a service.
#[derive(Debug)]
pub(crate) struct Desk {
    settings: Inbox,
    sessions: Sessions,
    press: Press,
    pub(crate) code: OneTimeCode,
}

impl Desk {
    pub(crate) fn new(settings: Inbox) -> Self {
        Self {
            settings,
            sessions: Sessions::default(),
            press: Press::default(),
            code: OneTimeCode::default(),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Route<'a> {
    List,
    Tenants,
    Action(&'a str),
    Decided,
    SignIn,
    SignOut,
    Live,
    Style,
    Script,
}

impl<'a> Route<'a> {
    /// The name in the log and in the metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::List => "inbox",
            Self::Tenants => "inbox-tenants",
            Self::Action(_) => "inbox-action",
            Self::Decided => "inbox-decided",
            Self::SignIn => "inbox-sign-in",
            Self::SignOut => "inbox-sign-out",
            Self::Live => "inbox-live",
            Self::Style | Self::Script => "inbox-asset",
        }
    }

    /// The page at a path, if there is one.
    pub(crate) fn of(path: &'a str) -> Option<Self> {
        Some(match path {
            "/" => Self::List,
            "/tenants" => Self::Tenants,
            "/decided" => Self::Decided,
            "/sign-in" => Self::SignIn,
            "/sign-out" => Self::SignOut,
            "/live" => Self::Live,
            "/style.css" => Self::Style,
            "/inbox.js" => Self::Script,
            _ => {
                let id = path.strip_prefix("/actions/")?;
                (!id.is_empty() && !id.contains('/')).then_some(Self::Action(id))?
            }
        })
    }
}

/// A request for a page, by somebody who may see it.
struct Visit<'a, St> {
    api: &'a Arc<Api<St>>,
    desk: &'a Desk,
    viewer: Viewer,
    query: &'a str,
}

/// Answers a request for a page.
pub(crate) async fn respond<St: Store, B: Body>(
    api: &Arc<Api<St>>,
    desk: &Desk,
    route: Route<'_>,
    parts: &Parts,
    body: &mut RequestBody<'_, B>,
    arrival: Arrival,
) -> Response {
    let answered = answer(api, desk, route, parts, body, arrival).await;
    answered.unwrap_or_else(page::rejected)
}

async fn answer<St: Store, B: Body>(
    api: &Arc<Api<St>>,
    desk: &Desk,
    route: Route<'_>,
    parts: &Parts,
    body: &mut RequestBody<'_, B>,
    arrival: Arrival,
) -> Result<Response, Rejection> {
    let is_post = parts.method == Method::POST;
    let allowed = match route {
        Route::List | Route::Action(_) | Route::SignIn => "GET, HEAD, POST",
        Route::SignOut => "POST",
        Route::Live => "GET",
        _ => "GET, HEAD",
    };
    if !allowed
        .split(", ")
        .any(|method| method == parts.method.as_str())
    {
        return Err(Rejection::method(allowed));
    }
    match route {
        Route::Style => return Ok(page::STYLE.response()),
        Route::Script => return Ok(page::SCRIPT.response()),
        _ => {}
    }
    // A cookie speaks for its browser, whatever page sends the request.
    HostGuard::new(&api.settings.hosts, arrival).admit_own_pages(parts)?;
    let is_secure = desk.settings.is_behind_tls || arrival.is_tls;
    let cookie = Cookie { is_secure };
    let query = parts.uri.query().unwrap_or_default();
    match (&route, is_post) {
        (Route::SignIn, false) => return Ok(sign_in::form(api, desk, cookie, parts)),
        (Route::SignIn, true) => {
            return sign_in::sign_in(api, desk, cookie, parts, body).await;
        }
        (Route::SignOut, _) => return Ok(sign_in::sign_out(desk, cookie, &parts.headers)),
        _ => {}
    }
    let Some(viewer) = desk.viewer(&api.settings.auth, cookie, &parts.headers, arrival.peer)?
    else {
        return Ok(sign_in::required(cookie, parts));
    };
    let visit = Visit {
        api,
        desk,
        viewer,
        query,
    };
    match (route, is_post) {
        (Route::List, false) => visit.list().await,
        (Route::List, true) => visit.decide_several(&parts.headers, body).await,
        (Route::Tenants, _) => visit.tenants().await,
        (Route::Action(id), false) => visit.action(id).await,
        (Route::Action(id), true) => visit.decide(id, &parts.headers, body).await,
        (Route::Decided, _) => visit.decided().await,
        (Route::Live, _) => visit.live(),
        _ => Err(Rejection::not_found("there is no such page")),
    }
}

impl<St: Store> Visit<'_, St> {
    /// A value of the query.
    fn asked(&self, name: &str) -> Option<String> {
        value_of(self.query, name)
    }

    /// Finds an action that the viewer may see, with its history.
    async fn find(&self, id: &str) -> Result<crate::protocol::Action, Rejection> {
        let id = uuid_of(id)?;
        self.find_by_id(id).await?.ok_or_else(no_such_action)
    }

    async fn find_by_id(&self, id: Uuid) -> Result<Option<crate::protocol::Action>, Rejection> {
        let Some(tenant) = self.tenant_of(id).await? else {
            return Ok(None);
        };
        self.api
            .await_store(self.api.store.look_up(id, &tenant))
            .await
    }

    /// The tenant whose action has this id, if the viewer may see it.
    async fn tenant_of(&self, id: Uuid) -> Result<Option<crate::protocol::TenantId>, Rejection> {
        if let Some(tenant) = &self.viewer.tenant {
            return Ok(Some(tenant.clone()));
        }
        let found = self.api.await_store(self.api.store.find(id, None)).await?;
        // An action can also be found by the id of a call.
        let found = found.filter(|action| action.request_id.as_uuid() == Some(id));
        Ok(found.and_then(|action| action.tenant_id))
    }
}

/// The first value of a name in a query that is not empty.
fn value_of(query: &str, name: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes())
        .find(|(found, value)| found == name && !value.is_empty())
        .map(|(_, value)| value.into_owned())
}
