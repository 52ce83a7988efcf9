//! `GET /hitl/status/{request_id}`.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::Serialize;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use super::answer::{self, Answer, Refusal};
use super::request;
use super::service::Shared;
use crate::protocol::{Action, Decision, Execution, RequestId, Status, rfc3339};
use crate::store::Store;

const PREFER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// The longest wait in seconds: below the 60 s after which many proxies give up on an answer.
const MAX_WAIT: u64 = 55;

/// What anyone who has the id may see.
#[derive(Serialize)]
struct PublicView<'a> {
    request_id: &'a RequestId,
    status: Status,
    decision: Option<Decision>,
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
            execution: action.execution,
            created_at: action.created_at,
            decided_at: action.decided_at,
        }
    }
}

impl<St: Store> Shared<St> {
    pub(super) async fn status(&self, id: &str, headers: &HeaderMap) -> Result<Answer, Refusal> {
        let caller = self.settings.auth.caller_if_any(headers)?;
        request::call_id(headers)?;
        // One answer for unknown, malformed and another tenant's: it tells nothing about what exists.
        let nothing = || Refusal::not_found("there is no such action");
        let id = RequestId::new(id).ok().and_then(|id| id.as_uuid());
        let id = id.ok_or_else(nothing)?;
        let tenant = caller.as_ref().map(|caller| &caller.tenant_id);
        let found = self.ask(self.store.find(id, tenant)).await?;
        let action = found.ok_or_else(nothing)?;
        if let Some(caller) = &caller
            && action.tenant_id.as_ref() != Some(&caller.tenant_id)
        {
            return Err(nothing());
        }
        let wait = preferred_wait(headers);
        let action = match wait {
            Some(seconds) => self.wait(action, Duration::from_secs(seconds)).await?,
            None => action,
        };
        let mut answer = match caller {
            Some(_) => answer::success(StatusCode::OK, &action),
            None => answer::success(StatusCode::OK, &PublicView::of(&action)),
        };
        if let Some(seconds) = wait
            && let Ok(applied) = HeaderValue::try_from(format!("wait={seconds}"))
        {
            answer.headers_mut().insert(PREFERENCE_APPLIED, applied);
        }
        Ok(answer)
    }

    /// Waits while the action is pending: until a decision, until `limit`, or until the server is to end.
    async fn wait(&self, action: Action, limit: Duration) -> Result<Action, Refusal> {
        let ours = Uuid::try_parse(action.request_id.as_str());
        let (Status::Pending, Ok(id)) = (action.status, ours) else {
            return Ok(action);
        };
        let deadline = Instant::now() + limit;
        // Subscribe, then read, then wait: a decision between the reads wakes this one.
        let mut watch = self.store.watch(id);
        loop {
            let Some(now) = self.ask(self.store.find(id, None)).await? else {
                return Ok(action);
            };
            if now.status != Status::Pending || self.drain.has_started() {
                return Ok(now);
            }
            tokio::select! {
                () = watch.changed() => {}
                () = sleep(self.settings.poll_interval) => {}
                () = sleep_until(deadline) => return Ok(now),
                () = self.drain.started() => return Ok(now),
            }
        }
    }
}

/// Reads `Prefer: wait=N` in seconds (RFC 7240). What is malformed counts as absent, and of several the first counts.
fn preferred_wait(headers: &HeaderMap) -> Option<u64> {
    headers
        .get_all(PREFER)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|preference| {
            // A preference may have parameters of its own; `wait` has none that mean anything.
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
    // More digits than fit are a very long wait.
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
