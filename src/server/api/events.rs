//! `GET /hitl/events`: the events of a tenant, as server-sent events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::{Instant, sleep, sleep_until};

use super::{Api, entry};
use crate::protocol::{Event, TenantId};
use crate::server::auth::Scope;
use crate::server::http::{Rejection, Response, ResponseBody, headers};
use crate::store::{Store, Watch};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// How often a comment shows that the stream is alive.
const COMMENT_EACH: Duration = Duration::from_secs(15);

/// The most events of one read.
const MOST: usize = 64;

/// The pause after a read that failed.
const PAUSE: Duration = Duration::from_secs(1);

impl<St: Store> Api<St> {
    pub(crate) async fn events(
        self: &Arc<Self>,
        headers: &HeaderMap,
    ) -> Result<Response, Rejection> {
        let caller = self.settings.auth.authenticate(headers)?;
        let tenant = caller.with(Scope::Read)?.tenant_id;
        headers::call_id(headers)?;
        let asked = position(headers)?;
        // Subscribe, read, then wait: the subscription catches an event after the read.
        let watch = self.store.watch_tenant(&tenant);
        let newest = self.await_store(self.store.newest_event()).await?;
        let after = asked.unwrap_or(newest);
        if after > newest {
            return Err(Rejection::invalid(format!(
                "the Last-Event-ID header is {after}, and there is no such event yet"
            )));
        }
        let follower = Follower {
            api: self.clone(),
            tenant,
            watch,
            after,
            // Without data this is no event, but it tells the client where to resume.
            ready: VecDeque::from([format!("id: {after}\n\n").into()]),
            comment_at: Instant::now() + COMMENT_EACH,
        };
        Ok(event_stream(follower.stream()))
    }
}

/// Returns a response that is a stream of server-sent events.
pub(crate) fn event_stream(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let mut response = Response::new(ResponseBody::streamed(events));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // Proxies that buffer answers would hold events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Reads `Last-Event-ID`.
fn position(headers: &HeaderMap) -> Result<Option<u64>, Rejection> {
    let mut values = headers.get_all(LAST_EVENT_ID).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let digits = value.to_str().unwrap_or_default();
    let is_number = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    match digits.parse() {
        Ok(position) if is_number && values.next().is_none() => Ok(Some(position)),
        _ => Err(Rejection::invalid(
            "the Last-Event-ID header is not the id of an event; allowed is the 'id' of one that \
             was received, or 0 for the oldest",
        )),
    }
}

/// A client that follows the events of its tenant.
struct Follower<St> {
    api: Arc<Api<St>>,
    tenant: TenantId,
    watch: Watch,
    /// The position of the last event that was read.
    after: u64,
    ready: VecDeque<Bytes>,
    /// When the next comment is due.
    comment_at: Instant,
}

impl<St: Store> Follower<St> {
    fn stream(self) -> impl Stream<Item = Bytes> + Send {
        stream::unfold(self, |mut follower| async move {
            let bytes = follower.next().await?;
            Some((bytes, follower))
        })
    }

    /// The next bytes of the stream. `None` at its end, when the server drains: the client resumes
    /// elsewhere.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Some(bytes);
            }
            if self.api.drain.has_started() {
                return None;
            }
            let pause = match self.read().await {
                Ok(true) => continue,
                Ok(false) => self.api.settings.poll_interval,
                // The outage is in the log. The stream stays, and goes on after it.
                Err(_) => PAUSE,
            };
            tokio::select! {
                () = self.watch.changed() => {}
                () = sleep(pause) => {}
                () = self.api.drain.started() => return None,
                () = sleep_until(self.comment_at) => {
                    self.comment_at = Instant::now() + COMMENT_EACH;
                    return Some(Bytes::from_static(b":\n\n"));
                }
            }
        }
    }

    /// Reads further events. Returns whether there were any.
    async fn read(&mut self) -> Result<bool, Rejection> {
        let events = self.api.store.events(&self.tenant, self.after, MOST);
        let events = self.api.await_store(events).await?;
        for (position, event) in events {
            self.ready.push_back(written(position, event));
            self.after = position;
        }
        Ok(!self.ready.is_empty())
    }
}

/// Writes an event. JSON has no line breaks of its own.
fn written(position: u64, mut event: Event) -> Bytes {
    event.action = event.action.map(|action| Box::new(entry(*action)));
    let data = serde_json::to_string(&event).unwrap_or_default();
    format!("id: {position}\nevent: {}\ndata: {data}\n\n", event.kind).into()
}
