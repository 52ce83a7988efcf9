//! `GET /live`: tells a page that something has changed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use tokio::time::{Instant, sleep_until};

use super::Visit;
use crate::protocol::TenantId;
use crate::server::api::{Api, event_stream};
use crate::server::auth::Scope;
use crate::server::http::{Rejection, Response};
use crate::store::{Store, Watch};

/// How often a comment shows that the stream is alive.
const COMMENT_EACH: Duration = Duration::from_secs(15);

/// How long changes are gathered for one message.
const GATHER: Duration = Duration::from_millis(200);

/// How long a stream lasts. Its browser then opens another, if its session is not over.
const LONGEST: Duration = Duration::from_secs(10 * 60);

impl<St: Store> Visit<'_, St> {
    /// The messages hold no data: the page asks for itself again, as whoever it is by then.
    pub(super) fn live(&self) -> Result<Response, Rejection> {
        let asked = self.asked("tenant");
        let asked = asked.and_then(|tenant| TenantId::new(tenant).ok());
        let tenant = self.viewer.tenant.clone().or(asked);
        let now = Instant::now();
        let news = News {
            api: Arc::clone(self.api),
            reader: self.viewer.tenant.clone().zip(self.viewer.key),
            watch: tenant.map(|tenant| self.api.store.watch_tenant(&tenant)),
            message_at: None,
            comment_at: now + COMMENT_EACH,
            ends_at: now + LONGEST,
        };
        Ok(event_stream(stream::unfold(news, |mut news| async move {
            let message = news.next().await?;
            Some((message, news))
        })))
    }
}

struct News<St> {
    api: Arc<Api<St>>,
    /// The tenant of who signed in by an API key, and the digest of the key.
    reader: Option<(TenantId, [u8; 32])>,
    /// `None` if there is no tenant to follow. The page then asks from time to time.
    watch: Option<Watch>,
    /// When the next message is due, if something has changed.
    message_at: Option<Instant>,
    comment_at: Instant,
    ends_at: Instant,
}

impl<St: Store> News<St> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let poll_at = Instant::now() + self.api.settings.poll_interval;
            let (watch, message_at) = (&mut self.watch, self.message_at);
            let changed = async move {
                match (message_at, watch) {
                    (Some(at), _) => sleep_until(at).await,
                    (None, Some(watch)) => watch.changed().await,
                    (None, None) => sleep_until(poll_at).await,
                }
            };
            tokio::select! {
                () = self.api.drain.started() => return None,
                () = sleep_until(self.ends_at) => return None,
                () = changed => {
                    if self.message_at.take().is_some() {
                        if !self.may_read() {
                            return None;
                        }
                        return Some(Bytes::from_static(b"data: changed\n\n"));
                    }
                    self.message_at = Some(Instant::now() + GATHER);
                }
                () = sleep_until(self.comment_at) => {
                    if !self.may_read() {
                        return None;
                    }
                    self.comment_at = Instant::now() + COMMENT_EACH;
                    return Some(Bytes::from_static(b":\n\n"));
                }
            }
        }
    }

    /// Whether the key of the session still allows to read: it may be gone, or another tenant's.
    fn may_read(&self) -> bool {
        let auth = &self.api.settings.auth;
        let reader = self.reader.as_ref();
        reader.is_none_or(|(tenant, key)| auth.still_allows(Some(*key), Scope::Read, tenant))
    }
}
