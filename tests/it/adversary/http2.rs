//! HTTP/2 by hand: floods, resets, and connections that fall silent.

use std::sync::Arc;
use std::time::Duration;

use aegis_hitl::AegisService;
use aegis_hitl::layer::Delivery;
use aegis_hitl::testing::{Act, Peer};
use bytes::Bytes;
use http::Response;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::builder;
use crate::support::again::own_process;
use crate::support::ends;
use crate::support::h2::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, RST_STREAM,
    SETTINGS, frame, status,
};
use crate::support::raw::Raw;

#[tokio::test]
async fn a_connection_that_falls_silent_in_the_body_is_not_used_for_the_next_attempt() {
    // On the first connection every answer stops after its head.
    let peer = Raw::start(|connection, stream| async move {
        let mut io = h2::server::handshake(stream).await.unwrap();
        let mut kept = Vec::new();
        while let Some(Ok((_, mut respond))) = io.accept().await {
            let head = Response::builder().status(409).body(()).unwrap();
            let mut body = respond.send_response(head, false).unwrap();
            if connection == 0 {
                kept.push(body);
            } else {
                body.send_data(Bytes::from_static(b"{}"), true).unwrap();
            }
        }
    })
    .await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let receipt = ends(service.approve("k-1").into_future()).await;
    assert!(
        receipt.is_ok(),
        "{receipt:?}, connections: {}",
        peer.count()
    );
    assert_eq!((receipt.unwrap().attempts(), peer.count()), (2, 2));
}

#[tokio::test]
async fn a_refused_stream_was_never_sent_like_a_failed_connect() {
    let peer = Peer::start([Act::refuse_stream()]).await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .max_retries(0)
        .build()
        .unwrap();
    let error = ends(service.approve("k-1").into_future())
        .await
        .unwrap_err();
    assert_eq!(error.delivery(), Delivery::NeverSent, "{error:?}");
    assert!(
        error.is_connect() && !error.is_outcome_unknown(),
        "{error:?}"
    );
    assert_eq!(error.to_string(), "the request could not be sent");
}

/// Greets as an HTTP/2 server and reads until the first request is there, or the end.
async fn greet(stream: &mut TcpStream) {
    let _ = stream.write_all(&frame(SETTINGS, 0, 0, &[])).await;
    let _ = stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await;
    let mut preface = [0; 24];
    let mut read = stream.read_exact(&mut preface).await.is_ok();
    while read {
        let Some(frame) = Frame::read(stream).await else {
            return;
        };
        read = frame.kind != HEADERS;
    }
}

/// Plays these bytes on each connection again and again, or once, and then keeps it open.
async fn h2_peer(bytes: Vec<u8>, repeat: bool) -> Raw {
    let bytes: Arc<[u8]> = bytes.into();
    Raw::start(move |_, mut stream| {
        let bytes = bytes.clone();
        async move {
            greet(&mut stream).await;
            let (mut reader, mut writer) = stream.into_split();
            let reading = async move {
                let mut buffer = [0; 4096];
                while let Ok(1..) = reader.read(&mut buffer).await {}
            };
            let writing = async move {
                while writer.write_all(&bytes).await.is_ok() && repeat {}
                std::future::pending::<()>().await;
            };
            tokio::select! { () = reading => {}, () = writing => {} }
        }
    })
    .await
}

fn h2_service(peer: &Raw) -> AegisService {
    builder(&peer.url())
        .http2_prior_knowledge()
        .timeout(Duration::from_millis(700))
        .max_retries(1)
        .build()
        .unwrap()
}

/// How much memory the process has, where the system tells it.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0_usize) * 4096
}

#[tokio::test]
async fn a_flood_of_frames_of_any_kind_is_bounded_in_time_and_memory() {
    // Others would share the memory.
    if !own_process(a_flood_of_frames_of_any_kind_is_bounded_in_time_and_memory).await {
        return;
    }
    let early = frame(HEADERS, END_HEADERS, 1, &status("103"));
    for (name, bytes) in [
        ("ping", frame(PING, 0, 0, &[7; 8])),
        ("settings", frame(SETTINGS, 0, 0, &[])),
        ("interim answers", early),
        ("empty data", frame(DATA, 0, 1, &[])),
        ("unknown frames", frame(200, 0, 0, &[0; 100])),
        ("resets", frame(RST_STREAM, 0, 1, &[0, 0, 0, 8])),
    ] {
        let mut flood = bytes.repeat(500);
        if name == "empty data" {
            flood.splice(0..0, frame(HEADERS, END_HEADERS, 1, &status("409")));
        }
        let peer = h2_peer(flood, name != "empty data").await;
        let before = resident();
        let result = ends(h2_service(&peer).approve("k-1").into_future()).await;
        assert!(result.is_err(), "{name}: {result:?}");
        let grown = resident().saturating_sub(before);
        assert!(grown < 200 << 20, "{name}: {grown} bytes");
    }
}

#[tokio::test]
async fn an_answer_on_http_2_ends_as_its_frames_say() {
    let ok = frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("202"));
    let duplicate = |rest: Vec<u8>| {
        let mut bytes = frame(HEADERS, END_HEADERS, 1, &status("409"));
        bytes.extend(rest);
        bytes
    };
    let whole = frame(DATA, END_STREAM, 1, b"{}");
    let half = frame(DATA, 0, 1, b"{}");
    let reset = |code: u8| frame(RST_STREAM, 0, 1, &[0, 0, 0, code]);
    let away = |code: u8| frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, code]);
    for (name, bytes, is_receipt) in [
        (
            "reset without error after a whole answer",
            [duplicate(whole.clone()), reset(0)].concat(),
            true,
        ),
        (
            "reset after a whole answer",
            [ok.clone(), reset(8)].concat(),
            true,
        ),
        (
            "goaway with a whole answer",
            [away(0), duplicate(whole.clone())].concat(),
            true,
        ),
        (
            "reset in the body",
            duplicate([half.clone(), reset(7)].concat()),
            false,
        ),
        (
            "goaway in the body",
            duplicate([half.clone(), away(11)].concat()),
            false,
        ),
        ("reset without error and no answer", reset(0), false),
        (
            "a stream that is refused behind the head of a 202",
            [frame(HEADERS, END_HEADERS, 1, &status("202")), reset(7)].concat(),
            false,
        ),
        (
            "trailers",
            duplicate(
                [
                    half.clone(),
                    frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0, 1, b'x', 1, b'y']),
                ]
                .concat(),
            ),
            true,
        ),
        (
            "a status of no digits",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("2x2")),
            false,
        ),
        (
            "a 101",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("101")),
            false,
        ),
        (
            "a 100 that ends the stream",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("100")),
            false,
        ),
        (
            "a head without a status",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0, 1, b'x', 1, b'y']),
            false,
        ),
        (
            "another stream",
            frame(HEADERS, END_HEADERS | END_STREAM, 3, &status("202")),
            false,
        ),
        (
            "a pushed stream",
            frame(HEADERS, END_HEADERS | END_STREAM, 2, &status("202")),
            false,
        ),
        (
            "broken compression",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff; 20]),
            false,
        ),
        (
            "a frame too large",
            frame(DATA, 0, 1, &vec![0; 20_000]),
            false,
        ),
    ] {
        let peer = h2_peer(bytes, false).await;
        let result = ends(h2_service(&peer).approve("k-1").into_future()).await;
        assert_eq!(result.is_ok(), is_receipt, "{name}: {result:?}");
    }
}

#[tokio::test]
async fn an_answer_that_is_reset_before_its_end_confirms_nothing() {
    // Of the opposite decision, say; nobody will know, as the body never comes.
    let bare = status("409");
    let mut with_length = bare.clone();
    with_length.extend([0x0f, 28 - 15, 3, b'2', b'0', b'0']);
    let reset = |code| frame(RST_STREAM, 0, 1, &[0, 0, 0, code]);
    let away = |last| frame(GOAWAY, 0, 0, &[0, 0, 0, last, 0, 0, 0, 0]);
    let mut wrong = Vec::new();
    for (name, end) in [
        ("CANCEL", reset(8)),
        ("NO_ERROR", reset(0)),
        ("GOAWAY of this stream, NO_ERROR", away(0)),
    ] {
        for (head, sent) in [
            (&with_length, ""),
            (&with_length, "{}"),
            (&bare, ""),
            (&bare, "{}"),
        ] {
            let mut bytes = frame(HEADERS, END_HEADERS, 1, head);
            if !sent.is_empty() {
                bytes.extend(frame(DATA, 0, 1, sent.as_bytes()));
            }
            bytes.extend_from_slice(&end);
            let peer = h2_peer(bytes, false).await;
            if let Ok(receipt) = ends(h2_service(&peer).approve("k-1").into_future()).await {
                wrong.push(format!("{name} after '{sent}': {receipt:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn an_answer_that_is_reset_confirms_nothing_over_reqwest_either() {
    use aegis_hitl::adapter::ReqwestClient;

    let mut head = status("409");
    head.extend([0x0f, 28 - 15, 3, b'2', b'0', b'0']);
    let mut bytes = frame(HEADERS, END_HEADERS, 1, &head);
    bytes.extend(frame(RST_STREAM, 0, 1, &[0; 4]));
    let peer = h2_peer(bytes, false).await;
    let set = reqwest::Client::builder().http2_prior_knowledge();
    let service = builder(&peer.url())
        .timeout(Duration::from_millis(700))
        .max_retries(0)
        .build_with(ReqwestClient::from_builder(set).unwrap())
        .unwrap();
    let result = ends(service.approve("k-1").into_future()).await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn a_length_that_data_on_http_2_does_not_have_breaks_the_answer() {
    // content-length: 20
    let mut block = status("409");
    block.extend([0x0f, 28 - 15, 2, b'2', b'0']);
    let mut bytes = frame(HEADERS, END_HEADERS, 1, &block);
    bytes.extend(frame(DATA, END_STREAM, 1, b"{}"));
    let peer = h2_peer(bytes, false).await;
    let result = ends(h2_service(&peer).approve("k-1").into_future()).await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn a_flood_of_continuations_is_bounded() {
    // Others would share the memory.
    if !own_process(a_flood_of_continuations_is_bounded).await {
        return;
    }
    let peer = Raw::start(|_, mut stream| async move {
        greet(&mut stream).await;
        let mut bytes = frame(HEADERS, 0, 1, &status("409"));
        let more = frame(
            CONTINUATION,
            0,
            1,
            &[&[0, 1, b'x', 100][..], &[b'y'; 100]].concat(),
        )
        .repeat(100);
        bytes.extend_from_slice(&more);
        while stream.write_all(&bytes).await.is_ok() {
            bytes.clone_from(&more);
        }
    })
    .await;
    let before = resident();
    let result = ends(h2_service(&peer).approve("k-1").into_future()).await;
    assert!(result.is_err(), "{result:?}");
    assert!(resident().saturating_sub(before) < 200 << 20);
}

#[tokio::test]
async fn a_connection_that_takes_no_streams_or_no_data_is_not_used_for_the_next_attempt() {
    // SETTINGS_MAX_CONCURRENT_STREAMS and SETTINGS_INITIAL_WINDOW_SIZE, both 0.
    for setting in [3, 4] {
        let peer = Raw::start(move |connection, mut stream| async move {
            if connection == 0 {
                let none = [0, setting, 0, 0, 0, 0];
                let _ = stream.write_all(&frame(SETTINGS, 0, 0, &none)).await;
                let mut buffer = [0; 4096];
                while let Ok(1..) = stream.read(&mut buffer).await {}
            } else {
                greet(&mut stream).await;
                let ok = frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("202"));
                let _ = stream.write_all(&ok).await;
                std::future::pending::<()>().await;
            }
        })
        .await;
        let receipt = ends(h2_service(&peer).approve("k-1").into_future()).await;
        assert!(receipt.is_ok(), "{setting}: {receipt:?}");
        assert_eq!(receipt.unwrap().attempts(), 2, "{setting}");
    }
}
