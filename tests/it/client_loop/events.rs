//! The stream of events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use aegis_hitl::client::{EventCursor, Events};
use aegis_hitl::protocol::EventKind;
use aegis_hitl::testing::{Act, Peer};
use bytes::Bytes;
use futures_util::StreamExt;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::Full;
use serde_json::{Value, json};
use tower::service_fn;

use super::{approved, is_no_proof, pending, problem, service, with};
use crate::support::ends;
use crate::support::service::builder;

fn event(cursor: u64, kind: &str, action: &Value) -> String {
    let data = json!({"id": format!("e-{cursor}"), "type": format!("action.{kind}"),
                      "at": "2026-01-02T03:04:05Z", "actor": "a", "action": action});
    format!("id: {cursor}\nevent: {kind}\ndata: {data}\n\n")
}

fn stream(text: impl Into<String>) -> Act {
    let text: String = text.into();
    Act::answer(200)
        .header("content-type", "text/event-stream; charset=utf-8")
        .body(text)
}

async fn cursors(events: &mut Events, count: usize) -> Vec<String> {
    let mut cursors = Vec::new();
    for _ in 0..count {
        let event = ends(events.next()).await.unwrap().unwrap();
        cursors.push(event.cursor.unwrap().to_string());
    }
    cursors
}

#[tokio::test]
async fn events_come_with_their_cursors() {
    let text = format!(
        ":\n\n{}{}",
        event(3, "submitted", &pending()),
        event(5, "approved", &approved())
    );
    let peer = Peer::start([stream(text).body_never_ends()]).await;
    let mut events = service(&peer.url()).events().stream();
    let first = ends(events.next()).await.unwrap().unwrap();
    assert_eq!(first.event.kind, EventKind::Submitted);
    assert_eq!(first.event.id.as_str(), "e-3");
    assert_eq!(cursors(&mut events, 1).await, ["5"]);
    let seen = &peer.requests()[0];
    assert_eq!(
        (seen.method.as_str(), seen.path()),
        ("GET", "/api/v1/hitl/events")
    );
    assert_eq!(seen.header("accept"), Some("text/event-stream"));
    assert_eq!(seen.header("tenant-id"), Some("acme"));
    assert_eq!(seen.header("last-event-id"), None);
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_resumed_after_the_last_event() {
    let both = event(3, "submitted", &pending()) + &event(5, "approved", &approved());
    let script = [
        // The second event is cut in the middle, so it was not received.
        stream(&both[..both.len() - 9]).body_breaks_off(),
        Act::lose_reply(),
        Act::answer(503),
        stream(event(5, "approved", &approved())),
        // A place without an event.
        stream("id: 9\n\n"),
        stream(event(11, "claimed", &approved())).body_never_ends(),
    ];
    let peer = Peer::start(script).await;
    let after: EventCursor = "2".parse().unwrap();
    let mut events = service(&peer.url()).events().after(after).stream();
    assert_eq!(cursors(&mut events, 3).await, ["3", "5", "11"]);
    let resumed: Vec<_> = peer
        .requests()
        .iter()
        .map(|request| request.header("last-event-id").unwrap().to_owned())
        .collect();
    assert_eq!(resumed, ["2", "3", "3", "3", "5", "9"]);
}

#[tokio::test]
async fn a_stream_that_cannot_succeed_ends_after_an_error() {
    let foreign = with(&pending(), json!({"tenant_id": "x"}));
    let not_ours = [
        Act::answer(200)
            .header("content-type", "text/html")
            .body("<html>"),
        Act::answer(200).body(event(1, "submitted", &pending())),
        stream("").header("content-encoding", "gzip"),
        stream(event(1, "submitted", &foreign)),
        stream("event: submitted\ndata: {\n\n"),
        stream("event: submitted\ndata: [\"e-1\", \"action.submitted\"]\n\n"),
        stream("data: ".to_owned() + &"x".repeat(1024 * 1024 + 1)),
        Act::answer(204),
        Act::answer(302).header("location", "/"),
    ];
    for act in not_ours {
        let peer = Peer::start([act]).await;
        let mut events = service(&peer.url()).events().stream();
        let error = ends(events.next()).await.unwrap().unwrap_err();
        assert!(is_no_proof(&error), "{error:?}");
        assert!(ends(events.next()).await.is_none());
        assert_eq!(peer.count(), 1);
    }
    for (status, code) in [
        (400, "invalid-request"),
        (401, "unauthorized"),
        (404, "not-found"),
    ] {
        let peer = Peer::start([problem(status, code, Value::Null)]).await;
        let mut events = service(&peer.url()).events().stream();
        let error = ends(events.next()).await.unwrap().unwrap_err();
        assert!(error.is_refused(), "{error:?}");
        assert_eq!(error.problem().unwrap().code.as_str(), code);
        assert!(ends(events.next()).await.is_none());
        assert_eq!(peer.count(), 1);
    }
    let peer = Peer::start([stream("")]).await;
    let mut events = service(&peer.url()).events().tenant_id("a b").stream();
    assert!(ends(events.next()).await.unwrap().unwrap_err().is_request());
    assert!(ends(events.next()).await.is_none());
    assert_eq!(peer.count(), 0);
}

#[tokio::test]
async fn what_a_later_version_sends_is_passed_over_or_read_as_far_as_it_is_known() {
    let text = "event: ping\ndata: now\n\n".to_owned() + &event(2, "escalated", &pending());
    let peer = Peer::start([stream(text).body_never_ends()]).await;
    let mut events = service(&peer.url()).events().stream();
    let event = ends(events.next()).await.unwrap().unwrap();
    assert_eq!(event.event.kind, EventKind::Other);
    assert!(!format!("{event:?}").contains("run_8"));
}

/// A body of pieces, each a while after the one before, that then stays silent.
struct Pieces {
    left: VecDeque<(Duration, &'static str)>,
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some((pause, piece)) = self.left.front().copied() else {
            return Poll::Pending;
        };
        let pause = self
            .pause
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(pause)));
        std::task::ready!(pause.as_mut().poll(cx));
        self.pause = None;
        self.left.pop_front();
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(piece)))))
    }
}

#[tokio::test(start_paused = true)]
async fn forty_five_seconds_of_silence_are_the_end_of_a_connection() {
    let seconds = Duration::from_secs;
    let begun = tokio::time::Instant::now();
    let connections = Arc::new(Mutex::new(Vec::new()));
    let seen = connections.clone();
    let double = service_fn(move |request: Request<Full<Bytes>>| {
        seen.lock()
            .unwrap()
            .push((begun.elapsed(), request.headers().clone()));
        let is_first = seen.lock().unwrap().len() == 1;
        let left = match is_first {
            true => VecDeque::from([
                (seconds(40), ":\n\n"),
                (
                    seconds(40),
                    "id: 1\nevent: approved\ndata: {\"id\":\"e-1\",\"type\":\"action.approved\"}\n\n",
                ),
                (seconds(40), ":\n\n"),
            ]),
            false => VecDeque::from([(
                seconds(1),
                "id: 2\nevent: approved\ndata: {\"id\":\"e-2\",\"type\":\"action.approved\"}\n\n",
            )]),
        };
        async move {
            let response = Response::builder().header("content-type", "text/event-stream");
            response.body(Pieces { left, pause: None })
        }
    });
    let aegis = builder("http://localhost").build_with(double).unwrap();
    let mut events = aegis.events().stream();
    // `ends` has a shorter limit than these pauses.
    let first = events.next().await.unwrap().unwrap();
    assert_eq!(first.cursor.unwrap().as_str(), "1");
    assert_eq!(begun.elapsed(), seconds(80));
    let second = events.next().await.unwrap().unwrap();
    assert_eq!(second.cursor.unwrap().as_str(), "2");
    let connections = connections.lock().unwrap();
    assert_eq!(connections.len(), 2);
    let (at, headers) = &connections[1];
    assert_eq!(headers["last-event-id"], "1");
    // The last comment came after 120 seconds, and the pause takes less than a second.
    assert!((seconds(165)..seconds(166)).contains(at), "{at:?}");
}
