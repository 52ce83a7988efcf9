//! What a hostile answer confirms.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aegis_hitl::client::OnDuplicate;
use aegis_hitl::layer::{AegisLayer, SetIdempotencyKeyLayer};
use aegis_hitl::testing::{Act, Peer};
use aegis_hitl::{AegisService, Error, Receipt};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tower::{Layer, ServiceExt, service_fn};

use super::{approve, builder, said};
use crate::support::raw::{Raw, head, read_request, sized};
use crate::support::service::{action, answer_with};
use crate::support::{HANG, ends};

#[tokio::test]
async fn an_answer_beyond_the_bound_is_judged_by_what_was_read_of_it() {
    let pad = "x".repeat(2 * 1024 * 1024);
    let opposite = format!(r#"{{"decision":"reject","status":"COMMITTED","pad":"{pad}"}}"#);
    let peer = Peer::start([Act::answer(202).body(opposite)]).await;
    let receipt = approve(&peer.url()).await;
    assert!(receipt.is_err(), "an opposite decision: {receipt:?}");
}

#[tokio::test]
async fn a_long_answer_within_the_bound_is_read_whole() {
    let mut json = action("approve");
    json["pad"] = json!("x".repeat(1_000_000));
    for status in [202, 409] {
        let peer = Peer::start([answer_with(status, &json)]).await;
        let receipt = approve(&peer.url()).await.unwrap();
        assert_eq!(receipt.is_duplicate(), status == 409);
        let action = receipt.action().unwrap();
        assert_eq!(receipt.request_id(), Some(&action.request_id));
    }
}

#[tokio::test]
async fn a_page_is_no_receipt_however_long_or_slow_it_is() {
    let page = "<html><body>Accepted for scanning</body></html>";
    let long = page.repeat(40_000);
    for act in [
        Act::answer(202).body(page),
        Act::answer(202).body(long),
        Act::answer(202).body(page).body_never_ends(),
        Act::answer(202).body(page).body_breaks_off(),
    ] {
        let shown = format!("{act:.200?}").len();
        let peer = Peer::start([act]).await;
        let receipt = approve(&peer.url()).await;
        assert!(receipt.is_err(), "{shown}: {receipt:?}");
    }
}

async fn verified(script: Vec<Act>) -> (Result<Receipt, Error>, Peer) {
    let peer = Peer::start(script).await;
    let service = builder(&peer.url())
        .on_duplicate(OnDuplicate::Verify)
        .build()
        .unwrap();
    (ends(service.approve("k-1").into_future()).await, peer)
}

#[tokio::test]
async fn the_status_of_another_id_verifies_nothing() {
    // What a caller without credentials is told names no tenant, no thread and no key: the id is all there is.
    let duplicate = answer_with(409, &json!({"request_id": "r-1"}));
    let other = json!({"request_id": "r-2", "status": "COMMITTED", "decision": "approve"});
    let (receipt, _) = verified(vec![duplicate, answer_with(200, &other)]).await;
    assert!(receipt.is_err(), "{receipt:?}");
}

#[tokio::test]
async fn a_status_that_is_an_array_verifies_nothing() {
    let members = json!([
        "r-1",
        "acme",
        "run-7",
        "k-1",
        "COMMITTED",
        "approve",
        null,
        null,
        null,
        false,
        null,
        null
    ]);
    let (receipt, peer) = verified(vec![Act::answer(409), answer_with(200, &members)]).await;
    assert!(receipt.is_err(), "{receipt:?}");
    let status = builder(&peer.url()).build().unwrap().status("r-1").await;
    assert!(status.is_err(), "{status:?}");
}

#[tokio::test]
async fn a_status_page_or_a_coded_status_verifies_nothing() {
    let json = action("approve");
    for (name, value) in [("content-type", "text/html"), ("content-encoding", "gzip")] {
        let status = answer_with(200, &json).header(name, value);
        let (receipt, _) = verified(vec![Act::answer(409), status]).await;
        assert!(receipt.is_err(), "{name}: {receipt:?}");
    }
}

#[tokio::test]
async fn a_recorded_action_without_a_decision_does_not_agree() {
    // "The action in the body, where there is one, is of this identity and this decision."
    for status in [202, 409] {
        for word in ["COMMITTED", "FAILED", "QUEUED", "pending"] {
            let body = json!({
                "request_id": "r-1", "tenant_id": "acme", "thread_id": "run-7",
                "idempotency_key": "k-1", "status": word, "decision": null,
            });
            let peer = Peer::start([answer_with(status, &body)]).await;
            let receipt = approve(&peer.url()).await;
            assert!(receipt.is_err(), "{status} {word}: {receipt:?}");
        }
    }
}

#[tokio::test]
async fn a_key_that_was_minted_by_a_layer_above_the_stack_is_a_minted_one_to_the_stack() {
    let taken = service_fn(|_: Request<Full<Bytes>>| async {
        Ok::<_, Infallible>(
            Response::builder()
                .status(409)
                .body(Full::<Bytes>::default())
                .unwrap(),
        )
    });
    // "Nobody can have used the key before, so that a 409 to the first attempt is a plain conflict."
    let above = SetIdempotencyKeyLayer::mint().layer(AegisLayer::new().layer(taken));
    let response = above
        .oneshot(Request::post("/").body(Full::default()).unwrap())
        .await
        .unwrap();
    assert_eq!(response.status(), 409, "below SetIdempotencyKeyLayer");
}

#[tokio::test]
async fn no_malformed_answer_is_a_receipt() {
    let ok = br#"{"code":"duplicate"}"#;
    let utf16: Vec<u8> = "{\"a\":1}"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_action = format!(r#"{{"action":{deep}}}"#);
    let deep_decision = format!(r#"{{"decision":{deep}}}"#);
    let many_headers = format!(
        "409 C\r\n{}Content-Length: 0\r\n\r\n",
        "x: y\r\n".repeat(20_000)
    );
    let long_header = format!(
        "409 C\r\nx: {}\r\nContent-Length: 0\r\n\r\n",
        "y".repeat(2_000_000)
    );
    let long_reason = format!("409 {}\r\nContent-Length: 0\r\n\r\n", "y".repeat(2_000_000));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("noise", vec![0xff; 1000]),
        ("a TLS alert", b"\x15\x03\x03\x00\x02\x02\x28".to_vec()),
        ("an HTTP/2 preface", b"\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("HTTP/0.9", b"{\"code\":\"duplicate\"}".to_vec()),
        ("ICY", b"ICY 202 OK\r\n\r\n".to_vec()),
        (
            "HTTP/2.0",
            b"HTTP/2.0 202 OK\r\nContent-Length: 0\r\n\r\n".to_vec(),
        ),
        (
            "HTTP/1.2",
            b"HTTP/1.2 202 OK\r\nContent-Length: 0\r\n\r\n".to_vec(),
        ),
        (
            "a status of 000",
            head("000 X\r\nContent-Length: 0\r\n\r\n"),
        ),
        ("a status of 99", head("99 X\r\nContent-Length: 0\r\n\r\n")),
        (
            "a status of 2020",
            head("2020 X\r\nContent-Length: 0\r\n\r\n"),
        ),
        ("a status of 999", sized("999 X", ok)),
        ("200", sized("200 OK", ok)),
        ("201", sized("201 OK", ok)),
        ("203", sized("203 OK", ok)),
        ("204", head("204 X\r\n\r\n")),
        ("205", sized("205 X", b"")),
        ("206", sized("206 X", ok)),
        ("304", head("304 X\r\n\r\n")),
        ("300", sized("300 X", ok)),
        (
            "101",
            head("101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
        ),
        (
            "a negative length",
            head("409 C\r\nContent-Length: -1\r\n\r\n{}"),
        ),
        (
            "a signed length",
            head("409 C\r\nContent-Length: +2\r\n\r\n{}"),
        ),
        (
            "two lengths",
            head("409 C\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x"),
        ),
        (
            "a length too large",
            head("409 C\r\nContent-Length: 20000\r\n\r\n{}"),
        ),
        (
            "a length that overflows",
            head("409 C\r\nContent-Length: 18446744073709551616\r\n\r\n{}"),
        ),
        (
            "a length too small",
            head("409 C\r\nContent-Length: 5\r\n\r\n{\"code\":\"duplicate\"}"),
        ),
        (
            "a chunk that is cut",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n14\r\n{\"code\""),
        ),
        (
            "a chunk without an end",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"),
        ),
        (
            "a chunk that overflows",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}"),
        ),
        (
            "a chunk of no number",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
        ),
        ("endless chunk extensions", {
            let mut answer = head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n2;");
            answer.extend(vec![b'x'; 2_000_000]);
            answer
        }),
        ("endless trailers", {
            let mut answer = head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n");
            answer.extend(b"x: y\r\n".repeat(300_000));
            answer
        }),
        (
            "another coding last",
            head("409 C\r\nTransfer-Encoding: chunked, gzip\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        ),
        ("many headers", head(&many_headers)),
        ("a long header", head(&long_header)),
        ("a long reason", head(&long_reason)),
        (
            "NUL in a header",
            head("409 C\r\nx: a\0b\r\nContent-Length: 0\r\n\r\n"),
        ),
        (
            "a header without a name",
            head("409 C\r\n: b\r\nContent-Length: 0\r\n\r\n"),
        ),
        (
            "BOM",
            sized("409 C", b"\xef\xbb\xbf{\"code\":\"duplicate\"}"),
        ),
        ("UTF-16", sized("409 C", &utf16)),
        ("NUL", sized("409 C", b"\0")),
        ("NUL at the end", sized("409 C", b"{}\0")),
        ("no UTF-8", sized("409 C", b"{\"code\":\"dupl\xffcate\"}")),
        ("two objects", sized("409 C", b"{}{}")),
        ("a comment", sized("409 C", b"{} // yes")),
        (
            "two codes",
            sized("409 C", br#"{"code":"x","code":"duplicate"}"#),
        ),
        (
            "two codes, escaped",
            sized("409 C", br#"{"code":"x","c\u006fde":"duplicate"}"#),
        ),
        (
            "two actions",
            sized(
                "409 C",
                br#"{"action":{"decision":"reject"},"action":{"decision":"approve"}}"#,
            ),
        ),
        (
            "two decisions in an action",
            sized(
                "409 C",
                br#"{"action":{"decision":"reject","decision":"approve"}}"#,
            ),
        ),
        (
            "a code and another type",
            sized(
                "409 C",
                br#"{"code":"payload-mismatch","type":"urn:aegis:problem:duplicate"}"#,
            ),
        ),
        (
            "the opposite, escaped",
            sized("409 C", br#"{"code":"duplicate","decision":"rej\u0065ct"}"#),
        ),
        (
            "the opposite in capitals",
            sized("409 C", br#"{"code":"duplicate","decision":"REJECT"}"#),
        ),
        (
            "a decision with a space",
            sized("409 C", br#"{"code":"duplicate","decision":"approve "}"#),
        ),
        (
            "a decision in a list",
            sized("409 C", br#"{"code":"duplicate","decision":["approve"]}"#),
        ),
        (
            "a decision that is true",
            sized("409 C", br#"{"code":"duplicate","decision":true}"#),
        ),
        (
            "a lone surrogate",
            sized("409 C", br#"{"code":"duplicate\ud800"}"#),
        ),
        ("deep nesting", sized("409 C", deep_action.as_bytes())),
        ("deep nesting", sized("202 A", deep_decision.as_bytes())),
        (
            "a 202 of another thread",
            sized("202 A", br#"{"thread_id":"run-8"}"#),
        ),
        (
            "a 202 in gzip",
            head("202 A\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n"),
        ),
        (
            "a 202 in two codings",
            head(
                "202 A\r\nContent-Encoding: identity\r\nContent-Encoding: br\r\nContent-Length: 0\r\n\r\n",
            ),
        ),
        (
            "a 202 of two types",
            head(
                "202 A\r\nContent-Type: application/json\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\n{}",
            ),
        ),
        (
            "in flight",
            head("409 C\r\nRetry-After: 99999\r\nContent-Length: 2\r\n\r\n{}"),
        ),
        (
            "in flight till yesterday",
            head(
                "409 C\r\nRetry-After: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 2\r\n\r\n{}",
            ),
        ),
        (
            "in flight, blank",
            head("409 C\r\nRetry-After:\r\nContent-Length: 2\r\n\r\n{}"),
        ),
    ];
    let mut wrong = Vec::new();
    for (name, bytes) in cases {
        let peer = Raw::says(bytes).await;
        let service = builder(&peer.url())
            .timeout(HANG)
            .max_retries(1)
            .build()
            .unwrap();
        match ends(service.approve("k-1").into_future()).await {
            Ok(receipt) => wrong.push(format!("{name}: {receipt:?}")),
            Err(error) => {
                let said = said(&error);
                if !error.is_outcome_unknown() && !error.is_conflict() && !error.is_refused() {
                    wrong.push(format!("{name}: {said}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn what_is_odd_but_whole_is_a_receipt() {
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    let deep = format!(
        r#"{{"code":"duplicate","action":{{"request_id":"r-1","status":"COMMITTED","decision":"approve","payload":{deep},"created_at":{deep},"execution":1e999}}}}"#
    );
    let interim = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n".repeat(100_000);
    let mut hinted = interim.into_bytes();
    hinted.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
    hinted.extend_from_slice(&sized("202 A", b""));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        (
            "HTTP/1.0 to its end",
            b"HTTP/1.0 409 C\r\n\r\n{\"code\":\"duplicate\"}".to_vec(),
        ),
        ("HTTP/1.0 202", b"HTTP/1.0 202 A\r\n\r\n".to_vec()),
        ("100,000 interim answers", hinted),
        (
            "trailers",
            head(
                "409 C\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n2\r\n{}\r\n0\r\nx: y\r\ncontent-type: text/html\r\n\r\n",
            ),
        ),
        (
            "chunks of one byte",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"),
        ),
        ("deep nesting", sized("409 C", deep.as_bytes())),
        (
            "a location elsewhere",
            head(
                "202 A\r\nLocation: http://evil.invalid/hitl/status/r-9\r\nContent-Length: 0\r\n\r\n",
            ),
        ),
        ("white space", sized("409 C", b" \r\n\t {} \n")),
    ];
    let mut wrong = Vec::new();
    for (name, bytes) in cases {
        let peer = Raw::says(bytes).await;
        // What is whole is a matter of content, and 100,000 answers take their time.
        let service = builder(&peer.url()).timeout(HANG).build().unwrap();
        match ends(service.approve("k-1").into_future()).await {
            Err(error) => wrong.push(format!("{name}: {error:?}")),
            Ok(receipt) => {
                let _ = receipt.action();
                if receipt.request_id().is_some_and(|id| id.as_str() != "r-1") {
                    wrong.push(format!("{name}: {receipt:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn an_answer_before_its_request_is_no_answer_to_it() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    // Two answers to one request, and never another one.
    let peer = Raw::start(move |_, mut stream| {
        let counter = counter.clone();
        async move {
            if read_request(&mut stream).await.is_none() {
                return;
            }
            counter.fetch_add(1, Ordering::SeqCst);
            let mut both = sized("503 Busy", b"");
            both.extend(sized("202 Accepted", b""));
            let _ = stream.write_all(&both).await;
            std::future::pending::<()>().await;
        }
    })
    .await;
    let service = builder(&peer.url())
        .timeout(Duration::from_millis(500))
        .build()
        .unwrap();
    let receipt = ends(service.approve("k-1").into_future()).await;
    assert!(receipt.is_err(), "{receipt:?} after {asked:?} requests");
    assert_eq!(asked.load(Ordering::SeqCst), peer.count());
}

#[tokio::test]
async fn a_body_that_is_no_utf_8_is_no_json() {
    let peer = Raw::says(sized("409 C", b"{\"code\":\"duplicate\",\"x\":\"\xff\"}")).await;
    let result = approve(&peer.url()).await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn an_empty_body_that_says_it_is_a_problem_confirms_nothing() {
    // Nothing tells it from one that was cut off behind the head.
    let peer = Raw::says(head(
        "409 C\r\nContent-Type: application/problem+json\r\n\r\n",
    ))
    .await;
    let result = approve(&peer.url()).await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn a_body_shorter_than_its_length_is_cut_off_whatever_the_client() {
    let client = service_fn(|_: Request<Full<Bytes>>| async {
        let head = Response::builder()
            .status(409)
            .header("content-length", "200");
        Ok::<_, Infallible>(head.body(Full::<Bytes>::default()).unwrap())
    });
    let service = AegisService::builder()
        .tenant_id("acme")
        .thread_id("run-7")
        .max_retries(0)
        .build_with(client)
        .unwrap();
    let result = service.approve("k-1").await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn the_status_of_another_tenants_action_is_no_answer() {
    let mut json = action("approve");
    json["tenant_id"] = json!("other");
    let peer = Peer::start([answer_with(200, &json)]).await;
    let status = builder(&peer.url()).build().unwrap().status("r-1").await;
    assert!(status.is_err(), "{status:?}");
}

#[tokio::test]
async fn a_call_without_retries_asks_for_a_status_once() {
    let peer = Peer::start([Act::answer(409), Act::answer(503)]).await;
    let service = builder(&peer.url())
        .on_duplicate(OnDuplicate::Verify)
        .build()
        .unwrap();
    let call = service.approve("k-1").max_retries(0);
    assert!(ends(call.into_future()).await.is_err());
    assert_eq!(peer.count(), 2);
}

// Whatever is changed in an answer: no panic, and no receipt that the answer itself contradicts.
#[tokio::test]
async fn no_changed_answer_panics_or_confirms_what_it_contradicts() {
    let whole = [
        action("approve").to_string(),
        action("reject").to_string(),
        json!({"type": "urn:aegis:problem:duplicate", "status": 409, "code": "duplicate",
               "action": action("approve")})
        .to_string(),
        json!({"type": "urn:aegis:problem:decision-conflict", "status": 422, "code": "decision-conflict",
               "detail": "d", "action": action("reject")})
        .to_string(),
        json!({"action": action("reject"), "request_id": "r-2", "decision": null}).to_string(),
    ];
    let words = [
        "null",
        "1e999",
        "-0",
        "\"reject\"",
        "\"approve\"",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\u0000",
        "\\ud800",
        "\"decision\":",
        "\"action\":{",
        "\u{feff}",
        "\u{2028}",
        "99999999999999999999",
        "true",
        "PENDING",
    ];
    let mut seed = 11_u64;
    let mut next = move |below: usize| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below
    };
    for _ in 0..20_000 {
        let mut body = whole[next(whole.len())].clone().into_bytes();
        for _ in 0..=next(3) {
            let at = next(body.len() + 1);
            let to = (at + next(12)).min(body.len());
            match next(4) {
                0 => drop(body.splice(at..to, words[next(words.len())].bytes())),
                1 => drop(body.splice(at..at, words[next(words.len())].bytes())),
                2 => drop(body.drain(at..to)),
                _ if at < body.len() => body[at] = u8::try_from(next(256)).unwrap(),
                _ => body.truncate(at),
            }
        }
        let status = [200, 202, 409, 409, 422, 503, 404][next(7)];
        let sent = Bytes::from(body);
        let answer = sent.clone();
        let client = service_fn(move |_: Request<Full<Bytes>>| {
            let response = Response::builder()
                .status(status)
                .body(Full::<Bytes>::from(answer.clone()));
            async move { Ok::<_, Infallible>(response.unwrap()) }
        });
        let service = AegisService::builder()
            .tenant_id("acme")
            .thread_id("run-7")
            .max_retries(0)
            .build_with(client)
            .unwrap();
        let receipt = service.approve("k-1").await;
        let _ = service.status("r-1").await;
        if let Err(error) = &receipt {
            let _ = (said(error), error.recorded(), error.is_outcome_unknown());
            continue;
        }
        let receipt = receipt.unwrap();
        let _ = (format!("{receipt:?}"), receipt.action());
        let shown = String::from_utf8_lossy(&sent);
        assert!(matches!(status, 202 | 409), "{status} {shown}");
        let Ok(told) = serde_json::from_slice::<Value>(&sent) else {
            // Of what serde skips it knows less; see the test of UTF-8.
            assert!(
                sent.is_empty() || sent.trim_ascii().starts_with(b"{"),
                "{shown}"
            );
            continue;
        };
        for told in [&told, &told["action"]] {
            for (member, expected) in [
                ("decision", "approve"),
                ("tenant_id", "acme"),
                ("thread_id", "run-7"),
                ("idempotency_key", "k-1"),
            ] {
                let agrees = told[member].is_null() || told[member] == expected;
                assert!(agrees, "{status} {shown}");
            }
            assert_ne!(told["status"], "PENDING", "{shown}");
        }
    }
}
