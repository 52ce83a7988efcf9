//! The endpoints by path and method.

use http::Method;

use crate::protocol::Decision;
use crate::server::http::Rejection;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Route<'a> {
    Decide(Decision),
    Submit,
    Status(&'a str),
    List,
    LookUp(&'a str),
    DecideById(Decision, &'a str),
    Cancel(&'a str),
    Claim(&'a str),
    Renew(&'a str),
    Complete(&'a str),
    Fail(&'a str),
    Events,
}

impl<'a> Route<'a> {
    /// The name in the log and in the metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Decide(Decision::Approve) => "approve",
            Self::Decide(Decision::Reject) => "reject",
            Self::Submit => "submit",
            Self::Status(_) => "status",
            Self::List => "list",
            Self::LookUp(_) => "look-up",
            Self::DecideById(Decision::Approve, _) => "approve-by-id",
            Self::DecideById(Decision::Reject, _) => "reject-by-id",
            Self::Cancel(_) => "cancel",
            Self::Claim(_) => "claim",
            Self::Renew(_) => "renew",
            Self::Complete(_) => "complete",
            Self::Fail(_) => "fail",
            Self::Events => "events",
        }
    }

    /// Matches byte for byte. Nothing is decoded, folded or collapsed, so a path has one spelling,
    /// apart from an optional slash at its end.
    pub(crate) fn of(prefix: &str, method: &Method, path: &'a str) -> Result<Self, Rejection> {
        let nothing = || Rejection::not_found("there is no such path");
        let rest = path
            .strip_prefix(prefix)
            .and_then(|path| path.strip_prefix("/hitl/"))
            .ok_or_else(nothing)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let post = *method == Method::POST;
        let get = *method == Method::GET || *method == Method::HEAD;
        match rest.split_once('/') {
            None if rest.is_empty() => Err(nothing()),
            None if rest == "actions" => match (post, get) {
                (true, _) => Ok(Self::Submit),
                (_, true) => Ok(Self::List),
                _ => Err(Rejection::method("GET, HEAD, POST")),
            },
            None if rest == "events" => {
                // The answer to a HEAD would never end, or say nothing of the one to a GET.
                if *method == Method::GET {
                    Ok(Self::Events)
                } else {
                    Err(Rejection::method("GET"))
                }
            }
            None => match rest.parse::<Decision>() {
                Ok(decision) if post => Ok(Self::Decide(decision)),
                Ok(_) => Err(Rejection::method("POST")),
                Err(unknown) if post => Err(Rejection::not_found(unknown.to_string())),
                Err(_) => Err(nothing()),
            },
            Some(("status", id)) if !id.is_empty() && !id.contains('/') => {
                if get {
                    Ok(Self::Status(id))
                } else {
                    Err(Rejection::method("GET, HEAD"))
                }
            }
            Some(("actions", rest)) => {
                let (id, verb) = match rest.split_once('/') {
                    Some((id, verb)) => (id, Some(verb)),
                    None => (rest, None),
                };
                let route = match verb {
                    _ if id.is_empty() => return Err(nothing()),
                    None if get => return Ok(Self::LookUp(id)),
                    None => return Err(Rejection::method("GET, HEAD")),
                    Some("approve") => Self::DecideById(Decision::Approve, id),
                    Some("reject") => Self::DecideById(Decision::Reject, id),
                    Some("cancel") => Self::Cancel(id),
                    Some("claim") => Self::Claim(id),
                    Some("renew") => Self::Renew(id),
                    Some("complete") => Self::Complete(id),
                    Some("fail") => Self::Fail(id),
                    Some(_) => return Err(nothing()),
                };
                if post {
                    Ok(route)
                } else {
                    Err(Rejection::method("POST"))
                }
            }
            Some(_) => Err(nothing()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: Method, path: &str) -> Result<Route<'_>, u16> {
        Route::of("/api/v1", &method, path)
            .map_err(|rejection| rejection.into_response().status().as_u16())
    }

    #[test]
    fn both_slash_forms_serve() {
        for path in ["/api/v1/hitl/approve", "/api/v1/hitl/approve/"] {
            assert_eq!(
                status(Method::POST, path),
                Ok(Route::Decide(Decision::Approve))
            );
        }
        for path in ["/api/v1/hitl/status/x", "/api/v1/hitl/status/x/"] {
            assert_eq!(status(Method::HEAD, path), Ok(Route::Status("x")));
        }
        assert_eq!(
            status(Method::POST, "/api/v1/hitl/actions/"),
            Ok(Route::Submit)
        );
    }

    #[test]
    fn a_path_has_no_other_spelling() {
        for path in [
            "",
            "*",
            "/",
            "/api/v1",
            "/api/v1/hitl",
            "/api/v1/hitl/",
            "/api/v1/hitl//",
            "/api/v1/hitl//approve",
            "/api/v1//hitl/approve",
            "/api/v1/hitl/approve//",
            "/api/v1/hitl/./approve",
            "/api/v1/hitl/status/../approve",
            "/api/v1/hitl/%61pprove",
            "/api/v1/hitl/approve%2f",
            "/api/v1/hitl/Approve",
            "/api/v1/hitl/approve/x",
            "/api/v1/hitl/status",
            "/api/v1/hitl/status/",
            "/hitl/approve",
        ] {
            assert_eq!(status(Method::POST, path), Err(404), "{path}");
        }
    }

    #[test]
    fn a_wrong_method_is_told_from_a_wrong_path() {
        assert_eq!(status(Method::GET, "/api/v1/hitl/approve"), Err(405));
        assert_eq!(status(Method::PUT, "/api/v1/hitl/actions"), Err(405));
        assert_eq!(status(Method::POST, "/api/v1/hitl/status/x"), Err(405));
        assert_eq!(status(Method::GET, "/api/v1/hitl/aprove"), Err(404));
    }
}
