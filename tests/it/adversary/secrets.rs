//! What errors and debug forms show.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use aegis_hitl::layer::{AttemptEvent, RetryLayer};
use aegis_hitl::protocol::Payload;
use aegis_hitl::testing::{Act, Peer};
use aegis_hitl::{AegisService, Decision, DecisionRequest, IdempotencyKey};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use serde_json::json;
use tower::{Layer, ServiceExt, service_fn};

use super::{approve, builder, said};
use crate::support::ends;
use crate::support::service::{action, answer_with};

#[tokio::test]
async fn no_debug_form_of_an_action_shows_its_payload() {
    let mut json = action("approve");
    json["payload"] = json!({"card": "secret-4111"});
    json["comment"] = json!("secret-comment");
    let problem = json!({"code": "decision-conflict", "action": json});
    let peer = Peer::start([answer_with(202, &json), answer_with(422, &problem)]).await;
    let receipt = approve(&peer.url()).await.unwrap();
    let error = approve(&peer.url()).await.unwrap_err();
    let payload = Payload::new(&json!({"card": "secret-4111"})).unwrap();
    let request = DecisionRequest::new(Decision::Approve, IdempotencyKey::new("secret").unwrap())
        .payload(payload.clone())
        .comment("secret");
    for (what, shown) in [
        ("receipt", format!("{receipt:?}")),
        ("request", format!("{request:?}")),
        ("error", said(&error)),
        ("payload", format!("{payload:?}")),
        ("action", format!("{:?}", receipt.action())),
        ("problem", format!("{:?}", error.problem())),
    ] {
        assert!(!shown.contains("secret"), "{what}: {shown}");
    }
}

#[tokio::test]
async fn no_error_repeats_what_a_foreign_answer_holds() {
    for body in [
        r#""secret-token""#,
        r#"{"request_id":"r-1","status":"COMMITTED","replayed":"secret-token"}"#,
        r#"{"request_id":"r-1","status":"COMMITTED","comment":{"secret-token":1},"tenant_id":{}}"#,
    ] {
        let peer = Peer::start([Act::answer(200).body(body)]).await;
        let status = builder(&peer.url()).build().unwrap().status("r-1").await;
        if let Err(error) = status {
            let said = said(&error);
            assert!(!said.contains("secret"), "{said}");
        }
    }
}

#[test]
fn no_debug_form_of_the_builder_shows_what_a_url_hides() {
    for url in [
        "http://user:secret@host",
        "http://host/?token=secret",
        "http://host/#secret",
        "http://user:secret%40host",
    ] {
        let builder = AegisService::builder().base_url(url);
        assert!(!format!("{builder:?}").contains("secret"), "{builder:?}");
        let error = builder.build().map(|_| ()).unwrap_err();
        assert!(error.is_config() && !said(&error).contains("secret"));
    }
    let builder = AegisService::builder()
        .proxy("http://user:secret@host:1")
        .api_key("secret")
        .tenant_id("secret");
    assert!(!format!("{builder:?} {builder:#?}").contains("secret"));
}

#[tokio::test]
async fn no_debug_form_of_an_event_shows_what_a_url_hides() {
    let shown = Arc::new(Mutex::new(String::new()));
    let log = shown.clone();
    let layer = RetryLayer::new()
        .max_retries(0)
        .observe(move |event: &AttemptEvent<'_>| {
            log.lock().unwrap().push_str(&format!("{event:?}"));
        });
    let client = service_fn(|_: Request<Full<Bytes>>| async {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    let request = Request::get("http://user:secret@host/?token=secret");
    let request = request.body(Full::default()).unwrap();
    layer.layer(client).oneshot(request).await.unwrap();
    let shown = shown.lock().unwrap();
    assert!(!shown.contains("secret"), "{shown}");
}

#[tokio::test]
async fn no_error_of_the_reqwest_adapter_shows_what_a_url_hides() {
    use aegis_hitl::adapter::ReqwestClient;
    use aegis_hitl::testing::ClosedPort;

    let closed = ClosedPort::new();
    let client = ReqwestClient::from_builder(reqwest::Client::builder()).unwrap();
    let mut wrong = Vec::new();
    for url in [
        format!("http://user:secret@{}/", closed.address()),
        format!("http://{}/?token=secret", closed.address()),
        "ftp://user:secret@host/".to_owned(),
    ] {
        let request = Request::post(&url).body(Full::<Bytes>::default()).unwrap();
        let service = RetryLayer::new().max_retries(0).layer(client.clone());
        let error = ends(service.oneshot(request)).await.unwrap_err();
        let said = said(&error);
        if said.contains("secret") {
            wrong.push(format!("{url}: {said:.300}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
