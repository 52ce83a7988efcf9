//! Signing in and out.

use askama::Template;
use http::header::SET_COOKIE;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body::Body;

use super::page::{Frame, html_response, link, page, see_other};
use super::viewer::{Cookie, Viewer};
use super::{Desk, value_of};
use crate::protocol::ApiKey;
use crate::server::api::Api;
use crate::server::auth::{Holder, LIFETIME};
use crate::server::http::{Rejection, RequestBody, Response};
use crate::store::Store;

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
pub(super) fn form<St: Store>(api: &Api<St>, query: &str) -> Response {
    let template = SignIn {
        frame: Frame::bare(),
        error: None,
        takes_keys: !api.settings.auth.trusts_tenant_header(),
        code: value_of(query, "code"),
        next: next(value_of(query, "next")),
    };
    page(StatusCode::OK, &template)
}

/// Signs in by an API key, or by the code of the one-time link.
pub(super) async fn sign_in<St: Store, B: Body>(
    api: &Api<St>,
    desk: &Desk,
    cookie: Cookie,
    headers: &HeaderMap,
    body: &mut RequestBody<'_, B>,
) -> Result<Response, Rejection> {
    let form = api.read_form(headers, body).await?;
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
            // A session that this browser had is not of use any more.
            if let Some(token) = cookie.token(headers) {
                desk.sessions.close(token);
            }
            let token = desk.sessions.open(holder);
            let mut response = see_other(&next);
            set_cookie(cookie, &mut response, token.as_str(), LIFETIME.as_secs());
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
pub(super) fn required(parts: &Parts) -> Response {
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
    see_other(&link("/sign-in", &[("next", next)]))
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
    let cookie = format!("{name}={token}; Max-Age={max_age}; {attributes}");
    if let Ok(mut cookie) = HeaderValue::try_from(cookie) {
        cookie.set_sensitive(true);
        response.headers_mut().insert(SET_COOKIE, cookie);
    }
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
}
