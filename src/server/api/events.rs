//! `GET /hitl/events`: the events of a tenant, as server-sent events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::{Instant, sleep, sleep_until};

use super::Api;
use super::feed::{Feed, Found, PAGE, PAUSE};
use crate::protocol::TenantId;
use crate::server::auth::Scope;
use crate::server::http::{Rejection, Response, ResponseBody, headers};
use crate::store::Store;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// How often a comment shows that the stream is alive.
const COMMENT_EACH: Duration = Duration::from_secs(15);

impl<St: Store> Api<St> {
    pub(crate) async fn events(
        self: &Arc<Self>,
        headers: &HeaderMap,
    ) -> Result<Response, Rejection> {
        let caller = self.authenticate(headers)?;
        let caller = caller.with(Scope::Read)?;
        let (tenant, key) = (caller.tenant_id, caller.key);
        headers::call_id(headers)?;
        let asked = position(headers)?;
        let newest = self.await_store(self.store.newest_event()).await?;
        let after = asked.unwrap_or(newest);
        if after > newest {
            return Err(Rejection::invalid(format!(
                "the Last-Event-ID header is {after}, and there is no such event yet"
            )));
        }
        let follower = Follower {
            feed: self.follow(&tenant, newest),
            api: self.clone(),
            key,
            tenant,
            position: after,
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
    /// The digest of the client's API key. It is checked before every event: a key may expire, or be
    /// removed.
    key: Option<[u8; 32]>,
    tenant: TenantId,
    feed: Feed,
    /// The position that the client has everything up to, once `ready` is sent.
    position: u64,
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

    /// The next bytes of the stream. `None` at its end: when the server drains, and the client
    /// resumes elsewhere, or when the credentials may not read any more.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if !self.may_read() {
                return None;
            }
            if let Some(bytes) = self.ready.pop_front() {
                return Some(bytes);
            }
            if self.api.drain.has_started() {
                return None;
            }
            let has_failed = match self.feed.find(self.position) {
                Found::Event(position, bytes) => {
                    self.position = position;
                    return Some(bytes);
                }
                Found::Nothing => false,
                Found::Behind(start) => match self.catch_up(start).await {
                    Ok(()) => continue,
                    // The outage is in the log. The stream stays, and goes on after it.
                    Err(_) => true,
                },
            };
            tokio::select! {
                is_read = self.feed.changed(), if !has_failed => if !is_read {
                    return None;
                },
                () = sleep(PAUSE), if has_failed => {}
                () = self.api.drain.started() => return None,
                () = sleep_until(self.comment_at) => {
                    self.comment_at = Instant::now() + COMMENT_EACH;
                    return Some(Bytes::from_static(b":\n\n"));
                }
            }
        }
    }

    fn may_read(&self) -> bool {
        let auth = &self.api.settings.auth;
        auth.still_allows(self.key, Scope::Read, &self.tenant)
    }

    /// Reads further events from the store, as the feed begins only behind `start`.
    async fn catch_up(&mut self, start: u64) -> Result<(), Rejection> {
        let page = self.api.page(&self.tenant, self.position).await?;
        // The window's events were on record before this read. A page with room left therefore
        // reaches at least to where the window begins.
        if page.len() < PAGE {
            self.position = self.position.max(start);
        }
        for (position, bytes) in page {
            self.position = self.position.max(position);
            self.ready.push_back(bytes);
        }
        Ok(())
    }
}
