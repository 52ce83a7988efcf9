//! What is sent of a body, a payload and a comment.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use aegis_hitl::layer::{Backoff, ReplayBodyLayer, RetryLayer};
use aegis_hitl::protocol::Payload;
use aegis_hitl::testing::{Act, Peer};
use aegis_hitl::{Decision, DecisionRequest, IdempotencyKey};
use bytes::Bytes;
use http::Request;
use http_body::{Body, Frame, SizeHint};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::io::AsyncWriteExt;
use tower::{ServiceBuilder, ServiceExt};

use super::builder;
use crate::support::ends;
use crate::support::raw::{Raw, read_request};

#[tokio::test]
async fn a_payload_is_an_object_also_when_it_is_deserialized() {
    for text in ["[1]", "\"pay 5\"", "7", "null"] {
        assert!(serde_json::from_str::<Payload>(text).is_err(), "{text}");
    }
}

#[tokio::test]
async fn a_comment_does_not_take_the_place_of_a_payload() {
    let Ok(payload) = serde_json::from_str::<Payload>("[\"pay 5\"]") else {
        return;
    };
    let peer = Peer::start([Act::answer(202)]).await;
    let request = DecisionRequest::new(Decision::Approve, IdempotencyKey::new("k-1").unwrap())
        .payload(payload)
        .comment("fine");
    let sent = builder(&peer.url()).build().unwrap().oneshot(request).await;
    let bodies: Vec<_> = peer
        .requests()
        .iter()
        .map(|seen| seen.body.clone())
        .collect();
    let whole = bodies
        .iter()
        .all(|body| String::from_utf8_lossy(body).contains("pay 5"));
    assert!(sent.is_err() || whole, "{bodies:?}");
}

#[tokio::test]
async fn the_reserved_member_is_found_beside_any_other() {
    let payload = Payload::from_json(r#"{"\ud800":1,"aegis":{"comment":"mine"}}"#);
    let Ok(payload) = payload else { return };
    let peer = Peer::start([Act::answer(202)]).await;
    let request = DecisionRequest::new(Decision::Approve, IdempotencyKey::new("k-1").unwrap())
        .payload(payload)
        .comment("other");
    let sent = builder(&peer.url()).build().unwrap().oneshot(request).await;
    assert!(
        sent.is_err_and(|error| error.is_request()),
        "{:?}",
        peer.requests()
    );
}

/// A body that says how long it is, and is not.
struct Lying {
    frames: std::collections::VecDeque<Bytes>,
    said: u64,
}

impl Lying {
    fn new(frames: &[&'static str], said: u64) -> Self {
        let frames = frames
            .iter()
            .map(|frame| Bytes::from_static(frame.as_bytes()));
        Self {
            frames: frames.collect(),
            said,
        }
    }
}

impl Body for Lying {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = self.frames.pop_front();
        if let Some(frame) = &frame {
            self.said = self.said.saturating_sub(frame.len() as u64);
        }
        Poll::Ready(frame.map(|frame| Ok(Frame::data(frame))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.said)
    }
}

/// The bodies that a peer takes for whole requests, of a keyed POST that is answered 503 each time.
async fn whole_bodies(body: Lying) -> Vec<String> {
    let whole = Arc::new(Mutex::new(Vec::new()));
    let taken = whole.clone();
    let peer = Raw::start(move |_, mut stream| {
        let taken = taken.clone();
        async move {
            while let Some((_, body)) = read_request(&mut stream).await {
                taken.lock().unwrap().push(String::from_utf8(body).unwrap());
                let answer = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n";
                let _ = stream.write_all(answer).await;
            }
        }
    })
    .await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let service = ServiceBuilder::new()
        .layer(ReplayBodyLayer::new())
        .layer(RetryLayer::new().backoff(Backoff::none()).max_retries(2))
        .service(client);
    let request = Request::post(peer.url()).header("idempotency-key", "k-1");
    let _ = ends(service.oneshot(request.body(body).unwrap())).await;
    let whole = whole.lock().unwrap();
    whole.clone()
}

#[tokio::test]
async fn a_body_that_ends_before_its_length_is_never_sent_as_whole() {
    assert_eq!(whole_bodies(Lying::new(&["12345"], 10)).await, [""; 0]);
}

#[tokio::test]
async fn a_body_that_goes_beyond_its_length_is_not_longer_in_a_later_attempt() {
    let bodies = whole_bodies(Lying::new(&["1234567890"], 5)).await;
    assert!(bodies.iter().all(|body| body == &bodies[0]), "{bodies:?}");
}

/// A source of frames, some of which come late.
struct Script(std::collections::VecDeque<Option<Result<Frame<Bytes>, &'static str>>>);

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        match self.0.pop_front() {
            None => Poll::Ready(None),
            Some(None) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Some(frame)) => Poll::Ready(Some(frame)),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }
}

// Copies made and read in any order: each is the whole body or an error, and says nothing else of itself before.
#[test]
fn every_copy_of_a_body_is_the_whole_of_it_or_an_error() {
    use aegis_hitl::layer::{Replay, ReplayBody};

    let mut seed = 7_u64;
    let mut next = move |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for round in 0..20_000 {
        let mut whole = Vec::new();
        let mut frames = std::collections::VecDeque::new();
        let mut failed = false;
        for _ in 0..next(6) {
            match next(8) {
                0 => frames.push_back(None),
                1 => frames.push_back(Some(Ok(Frame::data(Bytes::new())))),
                2 if next(4) == 0 => {
                    failed = true;
                    frames.push_back(Some(Err("broken")));
                    break;
                }
                _ => {
                    let byte = u8::try_from(next(26)).unwrap() + b'a';
                    let data = vec![byte; usize::try_from(next(5)).unwrap()];
                    whole.extend_from_slice(&data);
                    frames.push_back(Some(Ok(Frame::data(data.into()))));
                }
            }
        }
        let has_trailers = !failed && next(3) == 0;
        if has_trailers {
            let mut trailers = http::HeaderMap::new();
            trailers.insert("x", http::HeaderValue::from_static("y"));
            frames.push_back(Some(Ok(Frame::trailers(trailers))));
        }
        let cap = usize::try_from(next(12)).unwrap();
        let mut copies = vec![(
            ReplayBody::new(Script(frames), cap),
            Vec::new(),
            false,
            false,
        )];
        let mut cx = Context::from_waker(std::task::Waker::noop());
        for _ in 0..40 {
            let at = usize::try_from(next(copies.len() as u64 + 1)).unwrap();
            let Some((body, read, trailed, ended)) = copies.get_mut(at) else {
                let from = usize::try_from(next(copies.len() as u64)).unwrap();
                if let Some(copy) = copies[from].0.replay() {
                    copies.push((copy, Vec::new(), false, false));
                }
                continue;
            };
            if *ended {
                continue;
            }
            let left = (whole.len() - read.len()) as u64;
            if !failed && body.is_end_stream() {
                assert_eq!((left, *trailed), (0, has_trailers), "round {round}");
            }
            assert!(
                !failed || !body.is_end_stream() || left == 0,
                "round {round}"
            );
            let hint = body.size_hint();
            if !failed && hint.lower() > 0 {
                assert!(hint.lower() <= left, "round {round}: {hint:?} of {left}");
            }
            match Pin::new(body).poll_frame(&mut cx) {
                Poll::Pending => {}
                Poll::Ready(None) => {
                    assert!(!failed, "round {round}: a failed body ended as whole");
                    assert_eq!((&*read, *trailed), (&whole, has_trailers), "round {round}");
                    *ended = true;
                }
                Poll::Ready(Some(Err(_))) => *ended = true,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        assert!(!*trailed || data.is_empty());
                        read.extend_from_slice(&data);
                        assert!(whole.starts_with(read), "round {round}");
                    }
                    Err(_) => *trailed = true,
                },
            }
        }
    }
}
