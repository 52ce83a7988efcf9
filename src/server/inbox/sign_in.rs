//! Signing in and out.

use std::net::IpAddr;

use askama::Template;
use http::header::{HOST, SET_COOKIE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body::Body;

use super::page::{Frame, html_response, link, page, see_other};
use super::viewer::{Cookie, Stray, Viewer};
use super::{Desk, value_of};
use crate::protocol::ApiKey;
use crate::server::api::Api;
use crate::server::auth::{Holder, LIFETIME};
use crate::server::http::{Rejection, RequestBody, Response};
use crate::store::Store;

/// The most bytes of the form. A key or a code and a path need far less, and strangers send it.
const MOST_BYTES: usize = 8 * 1024;

/// The most domains of a host whose cookies are expired.
const MOST_DOMAINS: usize = 5;

#[derive(Template)]
#[template(path = "sign_in.html", config = "src/server/inbox/askama.toml")]
struct SignIn {
    frame: Frame,
    error: Option<&'static str>,
    takes_keys: bool,
    code: Option<String>,
    next: String,
}

/// The page to sign in. Opening it uses up nothing: programs that look at links open it too.
pub(super) fn form<St: Store>(
    api: &Api<St>,
    desk: &Desk,
    cookie: Cookie,
    parts: &Parts,
) -> Response {
    let query = parts.uri.query().unwrap_or_default();
    let stray = desk.stray(cookie, &parts.headers);
    // Who was led here may have lost the cookie on the way.
    let why = value_of(query, "why").and_then(|word| Stray::of(&word));
    let template = SignIn {
        frame: Frame::bare(),
        error: stray.or(why).map(Stray::says),
        takes_keys: !api.settings.auth.trusts_tenant_header(),
        code: value_of(query, "code"),
        next: next(value_of(query, "next")),
    };
    let mut response = page(StatusCode::OK, &template);
    if stray == Some(Stray::Several) {
        set_cookie(cookie, &mut response, "", 0);
        expire_others(cookie, parts, &mut response);
    }
    response
}

/// Signs in by an API key, or by the code of the one-time link.
pub(super) async fn sign_in<St: Store, B: Body>(
    api: &Api<St>,
    desk: &Desk,
    cookie: Cookie,
    parts: &Parts,
    body: &mut RequestBody<'_, B>,
) -> Result<Response, Rejection> {
    let headers = &parts.headers;
    let form = api.read_form_up_to(MOST_BYTES, headers, body).await?;
    let field = |name: &str| value_of(&form, name);
    let takes_keys = !api.settings.auth.trusts_tenant_header();
    let next = next(field("next"));
    let holder = if takes_keys {
        let key = field("key").and_then(|key| ApiKey::new(key.trim()).ok());
        match key.and_then(|key| api.settings.auth.sign_in(&key)) {
            Some((holder, caller)) => Viewer::by_key(caller)
                .map(|_| holder)
                .ok_or("This key may not read. Ask for one with the scopes read and decide."),
            None => Err("This key is not known here, or it has expired."),
        }
    } else if field("code").is_some_and(|code| desk.code.spend(&code)) {
        Ok(Holder::Local)
    } else {
        Err("This link was used before, or a newer one was printed.")
    };
    match holder {
        Ok(holder) => {
            let mut response = see_other(&next);
            let is_stray = desk.stray(cookie, headers).is_some();
            // A session that this browser had is not of use any more.
            if let Some(token) = cookie.token(headers) {
                desk.sessions.close(token);
            }
            let token = desk.sessions.open(holder);
            set_cookie(cookie, &mut response, token.as_str(), LIFETIME.as_secs());
            if is_stray {
                // It may be of another path or domain, and would stand beside the new one.
                expire_others(cookie, parts, &mut response);
            }
            Ok(response)
        }
        Err(error) => {
            let template = SignIn {
                frame: Frame::bare(),
                error: Some(error),
                takes_keys,
                code: None,
                next,
            };
            Ok(page(StatusCode::FORBIDDEN, &template))
        }
    }
}

/// Ends the session.
pub(super) fn sign_out(desk: &Desk, cookie: Cookie, headers: &HeaderMap) -> Response {
    if let Some(token) = cookie.token(headers) {
        desk.sessions.close(token);
    }
    let mut response = see_other("/sign-in");
    set_cookie(cookie, &mut response, "", 0);
    response
}

/// Leads who is not signed in to where they can.
pub(super) fn required(cookie: Cookie, parts: &Parts) -> Response {
    let is_read = parts.method != Method::POST;
    let is_from_elsewhere = parts
        .headers
        .get("sec-fetch-site")
        .is_some_and(|site| site == "cross-site" || site == "same-site");
    if is_read && is_from_elsewhere {
        // A browser that follows a link from another site leaves a strict cookie out. From a page
        // of ours it sends it.
        return html_response(
            StatusCode::OK,
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" \
             content=\"0\"><title>AEGIS</title><p>One moment."
                .to_owned(),
        );
    }
    let here = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let next = if is_read { here } else { parts.uri.path() };
    let stray = cookie.stray(&parts.headers);
    let why = stray.map_or("", Stray::word);
    let mut response = see_other(&link("/sign-in", &[("next", next), ("why", why)]));
    if stray == Some(Stray::Several) {
        set_cookie(cookie, &mut response, "", 0);
        expire_others(cookie, parts, &mut response);
    }
    response
}

/// A page of this server to go to. A whole URL, or what a browser would take for one, is none.
fn next(asked: Option<String>) -> String {
    asked
        .filter(|path| {
            path.starts_with('/')
                && !path.starts_with("//")
                && path.bytes().all(|byte| byte.is_ascii_graphic())
                && !path.contains('\\')
        })
        .unwrap_or_else(|| "/".to_owned())
}

fn set_cookie(cookie: Cookie, response: &mut Response, token: &str, max_age: u64) {
    let (name, attributes) = (cookie.name(), cookie.attributes());
    add_cookie(
        response,
        &format!("{name}={token}; Max-Age={max_age}; {attributes}"),
    );
}

fn add_cookie(response: &mut Response, cookie: &str) {
    if let Ok(mut cookie) = HeaderValue::try_from(cookie) {
        cookie.set_sensitive(true);
        response.headers_mut().append(SET_COOKIE, cookie);
    }
}

/// Expires each cookie of the name, other than those set here, that a browser may have sent with a
/// request. It tells its cookies apart by domain and path, and sends neither back, so each that is
/// possible is named.
fn expire_others(cookie: Cookie, parts: &Parts, response: &mut Response) {
    if cookie.is_secure {
        // The prefix of the name allows no other.
        return;
    }
    let name = cookie.name();
    let host = parts.uri.host().or_else(|| {
        let host = parts.headers.get(HOST)?.to_str().ok()?;
        Some(host.rsplit_once(':').map_or(host, |(name, _)| name))
    });
    let paths = paths(parts.uri.path());
    for domain in domains(host.unwrap_or_default()) {
        for path in std::iter::once("/").chain(paths.iter().copied()) {
            if domain.is_none() && path == "/" {
                continue;
            }
            let domain = domain.map(|domain| format!("; Domain={domain}"));
            let domain = domain.unwrap_or_default();
            add_cookie(
                response,
                &format!("{name}=; Max-Age=0; Path={path}{domain}"),
            );
        }
    }
}

/// The paths of cookies that are sent to a path, but for the root.
fn paths(path: &str) -> Vec<&str> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_/".contains(&byte);
    if path.len() <= 1 || !path.bytes().all(is_plain) {
        return Vec::new();
    }
    let inner = path.match_indices('/').skip(1);
    let inner = inner.flat_map(|(at, _)| [&path[..at], &path[..=at]]);
    inner.chain([path]).collect()
}

/// The domains of cookies that are sent to a host: its own alone, and each that it is part of.
fn domains(host: &str) -> Vec<Option<&str>> {
    let is_name = host
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte));
    let is_address = host.parse::<IpAddr>().is_ok();
    let parents = std::iter::successors(Some(host), |name| Some(name.split_once('.')?.1))
        .filter(|_| is_name && !is_address)
        .filter(|name| name.contains('.'))
        .take(MOST_DOMAINS);
    std::iter::once(None).chain(parents.map(Some)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_one_of_this_server() {
        for own in ["/", "/actions/7?a=b", "/?view=failed"] {
            assert_eq!(next(Some(own.to_owned())), own);
        }
        for foreign in [
            "",
            "https://evil.example/",
            "//evil.example",
            "/\\evil.example",
            "/\t/evil.example",
            "evil",
            "javascript:alert(1)",
            "/a\r\nSet-Cookie: x=y",
        ] {
            assert_eq!(next(Some(foreign.to_owned())), "/", "{foreign}");
        }
    }
    #[test]
    fn each_cookie_that_a_browser_may_send_is_named() {
        assert_eq!(domains("127.0.0.1"), [None]);
        assert_eq!(domains("[::1]"), [None]);
        assert_eq!(domains("localhost"), [None]);
        let all = [None, Some("a.b.example"), Some("b.example")];
        assert_eq!(domains("a.b.example"), all);
        assert_eq!(domains(&"a.".repeat(99)).len(), 1 + MOST_DOMAINS);
        assert_eq!(paths("/"), [""; 0]);
        assert_eq!(paths("/sign-in"), ["/sign-in"]);
        assert_eq!(
            paths("/actions/7-a"),
            ["/actions", "/actions/", "/actions/7-a"]
        );
        assert_eq!(paths("/actions/7;Domain=b.example"), [""; 0]);
    }
}
