//! `GET /hitl/status/{request_id}`.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::Serialize;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{Api, no_such_action, uuid_of};
use crate::protocol::{Action, Closed, Decision, Execution, RequestId, Status, rfc3339};
use crate::server::http::headers;
use crate::server::http::response;
use crate::server::http::{Rejection, Response};
use crate::store::Store;

const PREFER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// The longest wait, in seconds. It is below the 60 s after which many proxies give up.
pub(crate) const MAX_WAIT: u64 = 55;

/// How long after an action's expiry a wait reads it again.
const EXPIRY_MARGIN: Duration = Duration::from_millis(10);

/// The part of an action that anyone who has its id may see.
#[derive(Serialize)]
struct PublicView<'a> {
    request_id: &'a RequestId,
    status: Status,
    decision: Option<Decision>,
    closed: Option<Closed>,
    execution: Option<Execution>,
    #[serde(with = "rfc3339")]
    created_at: Option<SystemTime>,
    #[serde(with = "rfc3339")]
    decided_at: Option<SystemTime>,
}

impl<'a> PublicView<'a> {
    fn of(action: &'a Action) -> Self {
        Self {
            request_id: &action.request_id,
            status: action.status,
            decision: action.decision,
            closed: action.closed,
            execution: action.execution,
            created_at: action.created_at,
            decided_at: action.decided_at,
        }
    }
}

impl<St: Store> Api<St> {
    pub(crate) async fn status(
        &self,
        id: &str,
        headers: &HeaderMap,
    ) -> Result<Response, Rejection> {
        let caller = self.authenticate_if_present(headers)?;
        headers::call_id(headers)?;
        let id = uuid_of(id)?;
        let wait = preferred_wait(headers);
        // No action is held while a request waits. A payload takes memory, and a wait is long.
        let (id, limit) = {
            let tenant = caller.as_ref().map(|caller| &caller.tenant_id);
            let action = self
                .await_store(self.store.find(id, tenant))
                .await?
                .filter(|action| tenant.is_none() || action.tenant_id.as_ref() == tenant)
                .ok_or_else(no_such_action)?;
            match (wait, Uuid::try_parse(action.request_id.as_str())) {
                (Some(seconds), Ok(id)) if action.status == Status::Pending => {
                    (id, Duration::from_secs(seconds))
                }
                _ => return Ok(shown(&action, caller.is_some(), wait)),
            }
        };
        let action = self.wait(id, limit).await?;
        Ok(shown(&action, caller.is_some(), wait))
    }

    /// Waits while the action is pending: until it is decided, `limit` has passed, or the server
    /// drains.
    async fn wait(&self, id: Uuid, limit: Duration) -> Result<Action, Rejection> {
        let deadline = Instant::now() + limit;
        // Subscribe, read, then wait: the subscription catches a decision made after the read.
        let mut watch = self.store.watch(id);
        tracing::trace!("a request waits for a decision");
        loop {
            let pause = {
                let left = deadline.saturating_duration_since(Instant::now());
                let now = self.await_store(self.store.find(id, None)).await?;
                let now = now.ok_or_else(no_such_action)?;
                if now.status != Status::Pending || left.is_zero() || self.drain.has_started() {
                    return Ok(now);
                }
                // A store without a thread of its own lets an action expire when it is next read.
                let until_expiry = now
                    .expires_at
                    .and_then(|end| end.duration_since(SystemTime::now()).ok());
                let pause = left.min(self.settings.poll_interval);
                until_expiry.map_or(pause, |until| pause.min(until + EXPIRY_MARGIN))
            };
            tokio::select! {
                () = watch.changed() => {}
                () = sleep(pause) => {}
                () = self.drain.started() => {}
            }
        }
    }
}

/// Shows an action, to callers without credentials in part.
fn shown(action: &Action, is_authenticated: bool, wait: Option<u64>) -> Response {
    let mut response = if is_authenticated {
        response::json(StatusCode::OK, action)
    } else {
        response::json(StatusCode::OK, &PublicView::of(action))
    };
    if let Some(seconds) = wait
        && let Ok(applied) = HeaderValue::try_from(format!("wait={seconds}"))
    {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    response
}

/// Reads `Prefer: wait=N`, in seconds (RFC 7240). A malformed wait counts as absent. The first of
/// several counts.
fn preferred_wait(headers: &HeaderMap) -> Option<u64> {
    headers
        .get_all(PREFER)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|preference| {
            // A preference may have parameters. `wait` defines none, so they are ignored.
            let preference = preference.split(';').next().unwrap_or_default();
            let (name, value) = preference.split_once('=')?;
            name.trim()
                .eq_ignore_ascii_case("wait")
                .then(|| value.trim())
        })
        .and_then(seconds)
}

fn seconds(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // A number that overflows is a very long wait.
    Some(text.parse().unwrap_or(u64::MAX).min(MAX_WAIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preferred_wait_is_read_as_rfc_7240_has_it() {
        for (values, wait) in [
            (&["wait=10"][..], Some(10)),
            (&["Wait = 10"], Some(10)),
            (&["respond-async, wait=10; x=1"], Some(10)),
            (&["respond-async", "wait=7"], Some(7)),
            (&["wait=3, wait=9"], Some(3)),
            (&["wait=0"], Some(0)),
            (&["wait=56"], Some(55)),
            (&["wait=99999999999999999999999"], Some(55)),
            (&["wait"], None),
            (&["wait="], None),
            (&["wait=-1"], None),
            (&["wait=1.5"], None),
            (&["wait=soon, wait=9"], None),
            (&["await=9"], None),
            (&[], None),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(PREFER, HeaderValue::from_static(value));
            }
            assert_eq!(preferred_wait(&headers), wait, "{values:?}");
        }
    }
}
