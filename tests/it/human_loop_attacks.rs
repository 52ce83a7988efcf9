//! The human loop against those who want it to fail.

use std::time::{Duration, SystemTime};

use aegis_hitl::server::{Auth, Keys};
use aegis_hitl::{ApiKey, Payload, protocol::Digest};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;

use super::support::{Call, Disk, HANG, Reply, Running, start, start_with};

fn digest(json: &str) -> String {
    let payload = Payload::from_json(json).unwrap();
    Digest::of(&payload).unwrap().to_string()
}

/// A `POST` about the action with an id.
fn about(server: &Running, id: &str, verb: &str, body: impl ToString) -> Call {
    let path = format!("/api/v1/hitl/actions/{id}/{verb}");
    let call = Call::new(server.addr, "POST", path).header("Tenant-Id", "t");
    call.json(body.to_string())
}

async fn submitted(server: &Running, key: &str, body: &str) -> String {
    let reply = server.submit(key).json(body.to_owned()).send().await;
    assert_eq!(reply.status, 201, "{reply:?}");
    reply.request_id()
}

/// The token of a claim on an approved action without a payload.
async fn claimed(server: &Running, key: &str) -> (String, Value) {
    let id = submitted(server, key, "{}").await;
    assert_eq!(about(server, &id, "approve", "{}").send().await.status, 202);
    let reply = about(server, &id, "claim", "{}").send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    (id, reply.json()["claim"]["token"].clone())
}

async fn list(server: &Running, query: &str) -> Reply {
    let path = format!("/api/v1/hitl/actions?{query}");
    server.get(&path).header("Tenant-Id", "t").send().await
}

fn refused(reply: &Reply) -> (u16, String) {
    (reply.status, reply.text("code"))
}

// ---- The digest ---------------------------------------------------------------------------------

#[tokio::test]
async fn an_edited_payload_has_no_reserved_member() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k", r#"{"n":1,"aegis":{"allow_edit":true}}"#).await;
    for reserved in ["aegis", "\\u0061egis"] {
        let edit = format!(r#"{{"n":2,"{reserved}":{{"comment":"x"}}}}"#);
        let body = format!(
            r#"{{"digest":"{}","payload":{edit}}}"#,
            digest(r#"{"n":1}"#)
        );
        let reply = about(&server, &id, "approve", body).send().await;
        assert_eq!(refused(&reply), (400, "invalid-request".to_owned()));
    }
    // Only at the top is it reserved.
    let edit = r#"{"n":{"aegis":{"comment":"x"}}}"#;
    let body = format!(
        r#"{{"digest":"{}","payload":{edit}}}"#,
        digest(r#"{"n":1}"#)
    );
    let reply = about(&server, &id, "approve", body).send().await;
    assert_eq!((reply.status, reply.text("digest")), (202, digest(edit)));
    // The same payload by key is what is on record.
    assert_eq!(server.approve("k").json(edit).send().await.status, 409);
}

// ---- Results ------------------------------------------------------------------------------------

#[tokio::test]
async fn a_result_that_other_parsers_refuse_is_refused_and_the_claim_lives_on() {
    let server = start(Disk::default()).await;
    let (id, token) = claimed(&server, "k").await;
    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    for result in [&*deep, r#"{"a":1,"a":2}"#, r#""\ud800""#, "1e999"] {
        let body = format!(r#"{{"token":{token},"result":{result}}}"#);
        let reply = about(&server, &id, "complete", body).send().await;
        let shown: String = result.chars().take(20).collect();
        assert_eq!(
            refused(&reply),
            (400, "invalid-request".to_owned()),
            "{shown}"
        );
    }
    let body = json!({ "token": token, "result": { "a": [1, null, "\u{202e}"] } });
    let reply = about(&server, &id, "complete", body).send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

// ---- Lists --------------------------------------------------------------------------------------

#[tokio::test]
async fn a_parameter_without_a_value_is_no_less_unknown_or_repeated() {
    let server = start(Disk::default()).await;
    for query in [
        "stauts=",
        "stauts",
        "tenant_id=",
        "status=PENDING&status=",
        "cursor=&cursor=",
    ] {
        let reply = list(&server, query).await;
        assert_eq!(
            refused(&reply),
            (400, "invalid-request".to_owned()),
            "{query}"
        );
    }
    assert_eq!(list(&server, "status=&cursor=&limit=").await.status, 200);
}

// ---- Keys that end ------------------------------------------------------------------------------

fn keys(lines: &[(&str, &str)]) -> Keys {
    let text: String = lines
        .iter()
        .map(|(secret, scopes)| {
            let digest = Keys::digest(&ApiKey::new(*secret).unwrap());
            format!("{digest} t {secret} {scopes}\n")
        })
        .collect();
    Keys::parse(&text).unwrap()
}

/// Follows the events with a key, and returns once the stream is there.
async fn follow(server: &Running, key: &str) -> hyper::body::Incoming {
    let io = tokio::net::TcpStream::connect(server.addr).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(io);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("/api/v1/hitl/events")
        .header("host", server.addr.to_string())
        .header("authorization", format!("Bearer {key}"))
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    timeout(HANG, body.frame()).await.unwrap().unwrap().unwrap();
    body
}

/// Reads until the stream ends.
async fn rest(mut body: hyper::body::Incoming) -> String {
    let mut text = String::new();
    let read = async {
        while let Some(frame) = body.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            text.push_str(std::str::from_utf8(&data).unwrap());
        }
    };
    timeout(HANG, read).await.expect("the stream ends");
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_events_ends_with_the_key_that_opened_it() {
    let (change, watched) = watch::channel(keys(&[("board", "read"), ("agent", "submit")]));
    let auth = Auth::watched_keys(watched);
    let server = start_with(Disk::default(), |it| it.auth(auth), |it| it).await;
    let submit = |key: &str| {
        let call = server.submit(key).without("Tenant-Id");
        call.header("Authorization", "Bearer agent")
            .json("{}")
            .send()
    };
    // The key is removed, or may read no more.
    for lines in [
        &[("agent", "submit")][..],
        &[("board", "claim"), ("agent", "submit")],
    ] {
        change.send_replace(keys(&[("board", "read"), ("agent", "submit")]));
        let events = follow(&server, "board").await;
        assert_eq!(submit(&format!("k-{}", lines.len())).await.status, 201);
        change.send_replace(keys(lines));
        assert_eq!(submit(&format!("secret-{}", lines.len())).await.status, 201);
        let text = rest(events).await;
        assert!(!text.contains("secret-"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_events_ends_when_its_key_expires() {
    let end = jiff::Timestamp::try_from(SystemTime::now() + Duration::from_secs(3)).unwrap();
    let scopes = format!("read {end}");
    let auth = Auth::keys(keys(&[("board", &*scopes)]));
    let server = start_with(Disk::default(), |it| it.auth(auth), |it| it).await;
    let events = follow(&server, "board").await;
    rest(events).await;
    assert!(SystemTime::now() >= SystemTime::try_from(end).unwrap());
}

// ---- Times --------------------------------------------------------------------------------------

#[tokio::test]
#[ignore = "the last two days of the year 9999 are beyond the range of the time library"]
async fn the_last_second_that_rfc_3339_can_say_is_an_expiry() {
    let server = start(Disk::default()).await;
    // What many use for "never".
    let body = r#"{"aegis":{"expires_at":"9999-12-31T23:59:59Z"}}"#;
    submitted(&server, "k", body).await;
}
