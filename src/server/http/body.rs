//! Reads request bodies within limits of size and time, and discards unwanted ones.

use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf, BufMut};
use http::HeaderMap;
use http::header::EXPECT;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::timeout;

use super::response::Rejection;
use super::room::{FREE, HeldBytes, Holder, Room};
use crate::protocol::Code;

/// The number of bytes of an unwanted body to read and discard. A client that is still sending
/// would otherwise see a reset instead of the response.
const DISCARD_BYTES: usize = 16 * 1024 * 1024;

/// How long to read an unwanted body.
const DISCARD_TIME: Duration = Duration::from_secs(2);

/// A request body that is being received.
pub(crate) struct RequestBody<'a, B> {
    body: Pin<&'a mut B>,
    /// Whether the client waits for `100 Continue` and has not been sent it yet.
    withheld: bool,
    state: BodyState,
    holder: Holder,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BodyState {
    Open,
    Ended,
    Broken,
}

impl<'a, B: Body> RequestBody<'a, B> {
    pub(crate) fn new(body: Pin<&'a mut B>, headers: &HeaderMap, holder: Holder) -> Self {
        let ended = body.is_end_stream();
        Self {
            body,
            withheld: headers.contains_key(EXPECT),
            state: if ended {
                BodyState::Ended
            } else {
                BodyState::Open
            },
            holder,
        }
    }

    /// Reads the whole body into the room for bodies.
    pub(crate) async fn read(
        &mut self,
        limit: usize,
        within: Duration,
        room: &Room,
    ) -> Result<HeldBytes, Rejection> {
        let too_large = || {
            Rejection::new(
                Code::PayloadTooLarge,
                format!("the body has more than {limit} bytes; allowed are {limit}"),
            )
        };
        let announced = usize::try_from(self.body.size_hint().lower()).unwrap_or(usize::MAX);
        if announced > limit {
            return Err(too_large());
        }
        let late = || {
            Rejection::new(
                Code::RequestTimeout,
                format!("the body did not arrive within {within:?}"),
            )
        };
        let no_room = || {
            Rejection::unavailable("too many large bodies are on their way; send the request again")
        };
        let most = if announced > 0 { announced } else { limit };
        // A declared length may be false, so memory is reserved for what has arrived.
        let mut bytes = Vec::with_capacity(announced.min(FREE));
        let mut share = room.share(self.holder);
        let read = async {
            while let Some(frame) = self.next_data().await? {
                let Some(data) = frame else { continue };
                if data.remaining() > limit - bytes.len() {
                    return Err(too_large());
                }
                let needed = bytes.len() + data.remaining();
                if needed > FREE && needed > bytes.capacity() {
                    let capacity = (2 * needed).min(most).max(needed);
                    if !share.grow_to(capacity) {
                        return Err(no_room());
                    }
                    bytes.reserve_exact(capacity - bytes.len());
                }
                bytes.put(data);
            }
            Ok(())
        };
        timeout(within, read).await.map_err(|_| late())??;
        Ok(share.hold(bytes))
    }

    /// Reads and discards the rest. Returns whether the body reached its end.
    pub(crate) async fn discard(&mut self) -> bool {
        // A client that still waits for `100 Continue` is not sending the body.
        if self.withheld || self.state != BodyState::Open {
            return self.state == BodyState::Ended;
        }
        let read = async {
            let mut len = 0;
            while let Ok(Some(frame)) = self.next_data().await {
                len += frame.map_or(0, |data| data.remaining());
                if len > DISCARD_BYTES {
                    break;
                }
            }
        };
        _ = timeout(DISCARD_TIME, read).await;
        self.state == BodyState::Ended
    }

    /// Returns the next piece of data, `Some(None)` for a frame without data, and `None` at the
    /// end.
    async fn next_data(&mut self) -> Result<Option<Option<B::Data>>, Rejection> {
        if self.state != BodyState::Open {
            return Ok(None);
        }
        self.withheld = false;
        match self.body.frame().await {
            Some(Ok(frame)) => Ok(Some(frame.into_data().ok())),
            Some(Err(_)) => {
                self.state = BodyState::Broken;
                Err(Rejection::invalid("the body broke off or is badly framed"))
            }
            None => {
                self.state = BodyState::Ended;
                Ok(None)
            }
        }
    }
}
