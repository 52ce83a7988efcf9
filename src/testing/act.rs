//! What a peer does with one request.

use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// What a [`Peer`](super::Peer) does with one request.
#[derive(Debug, Clone)]
pub struct Act {
    pub(super) kind: Kind,
    pub(super) delay: Duration,
    pub(super) early: bool,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Answer(Box<Answer>),
    LoseReply,
    Hang,
    ResetStream {
        code: u32,
    },
    GoAway {
        /// Whether the announced last stream id covers this stream.
        covers: bool,
        code: u32,
    },
}

#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) trailers: HeaderMap,
    pub(super) ending: Ending,
    /// Whether the connection takes no more requests after this one.
    pub(super) last: bool,
}

/// How the body of an answer ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    AtOnce,
    /// All of the body comes this long after the head.
    Late(Duration),
    /// The body arrives with the head, and its end never.
    Never,
    /// The body arrives with the head, then the exchange breaks off.
    BreaksOff,
}

/// RFC 9113, section 7.
const NO_ERROR: u32 = 0;
const REFUSED_STREAM: u32 = 7;

impl Act {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            delay: Duration::ZERO,
            early: false,
        }
    }

    /// Answers with a status, no headers and an empty body, unless these are added.
    ///
    /// # Panics
    ///
    /// If `status` is not between 200 and 999.
    pub fn answer(status: u16) -> Self {
        let status = StatusCode::from_u16(status).expect("a status is between 100 and 999");
        assert!(
            !status.is_informational(),
            "an answer is final, which {status} is not"
        );
        Self::new(Kind::Answer(Box::new(Answer {
            status,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            trailers: HeaderMap::new(),
            ending: Ending::AtOnce,
            last: false,
        })))
    }

    /// Reads the request and closes the connection without an answer: the reply is lost, whatever
    /// was done.
    ///
    /// On HTTP/2 this ends every stream of the connection.
    pub fn lose_reply() -> Self {
        Self::new(Kind::LoseReply)
    }

    /// Reads the request and never answers.
    pub fn hang() -> Self {
        Self::new(Kind::Hang)
    }

    /// Refuses the stream with `REFUSED_STREAM` before reading the body: the peer has not processed
    /// the request (RFC 9113, section 8.7). HTTP/2 only.
    pub fn refuse_stream() -> Self {
        Self::reset_stream(REFUSED_STREAM).early()
    }

    /// Reads the request and resets the stream with an error code (RFC 9113, section 7). HTTP/2
    /// only.
    pub fn reset_stream(code: u32) -> Self {
        Self::new(Kind::ResetStream { code })
    }

    /// Sends `GOAWAY` with a last stream id below this stream, which therefore was not and will not
    /// be processed (RFC 9113, section 6.8). Older streams go on. HTTP/2 only.
    pub fn go_away_before() -> Self {
        Self::new(Kind::GoAway {
            covers: false,
            code: NO_ERROR,
        })
    }

    /// Sends `GOAWAY` with this stream as the last one, then closes the connection without an
    /// answer: the peer may have processed the request. HTTP/2 only.
    pub fn go_away_after() -> Self {
        Self::new(Kind::GoAway {
            covers: true,
            code: NO_ERROR,
        })
    }

    /// Sets the error code of a `GOAWAY`. The default is `NO_ERROR`. Other acts are unaffected.
    #[must_use]
    pub fn code(mut self, error: u32) -> Self {
        if let Kind::GoAway { code, .. } = &mut self.kind {
            *code = error;
        }
        self
    }

    /// Adds a header to an answer. Other acts are unaffected.
    ///
    /// # Panics
    ///
    /// If the name or the value is malformed.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        if let Kind::Answer(answer) = &mut self.kind {
            append(&mut answer.headers, name, value);
        }
        self
    }

    /// Adds a trailer to an answer whose body ends, such as gRPC's status. Other acts are
    /// unaffected. HTTP/2 only.
    ///
    /// # Panics
    ///
    /// If the name or the value is malformed.
    #[must_use]
    pub fn trailer(mut self, name: &str, value: &str) -> Self {
        if let Kind::Answer(answer) = &mut self.kind {
            append(&mut answer.trailers, name, value);
        }
        self
    }

    /// Sets the body of an answer. Other acts are unaffected.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        if let Kind::Answer(answer) = &mut self.kind {
            answer.body = body.into();
        }
        self
    }

    /// Delays the act by this long after the request arrived.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Acts on the request's head, before reading its body.
    #[must_use]
    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// Closes the connection gracefully after an answer. On HTTP/1.1 it sends `Connection: close`.
    /// On HTTP/2 it sends a `GOAWAY` that covers all streams and, a round trip later, one that
    /// covers those that have arrived by then.
    #[must_use]
    pub fn then_go_away(mut self) -> Self {
        if let Kind::Answer(answer) = &mut self.kind {
            answer.last = true;
        }
        self
    }

    /// Sends the head of an answer at once and its body after this delay.
    #[must_use]
    pub fn body_after(self, delay: Duration) -> Self {
        self.ending(Ending::Late(delay))
    }

    /// Sends the head and body of an answer, but never ends the body.
    #[must_use]
    pub fn body_never_ends(self) -> Self {
        self.ending(Ending::Never)
    }

    /// Announces one byte more than the body has, and breaks off after the body. On HTTP/1.1 it
    /// closes the connection, on HTTP/2 it resets the stream.
    #[must_use]
    pub fn body_breaks_off(mut self) -> Self {
        if let Kind::Answer(answer) = &mut self.kind {
            let announced = HeaderValue::from(answer.body.len() + 1);
            answer.headers.insert(CONTENT_LENGTH, announced);
        }
        self.ending(Ending::BreaksOff)
    }

    fn ending(mut self, ending: Ending) -> Self {
        if let Kind::Answer(answer) = &mut self.kind {
            answer.ending = ending;
        }
        self
    }
}

fn append(headers: &mut HeaderMap, name: &str, value: &str) {
    let name: HeaderName = name.parse().expect("the header name is malformed");
    let value: HeaderValue = value.parse().expect("the header value is malformed");
    headers.append(name, value);
}
