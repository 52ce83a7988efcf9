//! The client's part of the human loop, against scripted peers, doubles and the server.

mod calls;
mod conclusions;
mod events;
mod run;
#[cfg(feature = "server")]
mod server;
mod wait;

use aegis_hitl::protocol::Digest;
use aegis_hitl::testing::Act;
use aegis_hitl::{AegisService, Error, Payload};
use serde_json::{Value, json};

use crate::support::service::{action, answer_with, builder};

const ID: &str = "0190a1b2-0000-7000-8000-000000000001";
const TOKEN: &str = "token-1";
const PAYLOAD: &str = r#"{"to":"a@b.c","amount":12.5}"#;

fn service(url: &str) -> AegisService {
    builder(url).build().unwrap()
}

fn payload() -> Value {
    serde_json::from_str(PAYLOAD).unwrap()
}

fn digest_of(payload: &Value) -> Digest {
    Digest::of(&Payload::new(payload).unwrap()).unwrap()
}

fn digest() -> Digest {
    digest_of(&payload())
}

/// The action with [`PAYLOAD`], pending.
fn pending() -> Value {
    with(
        &action("approve"),
        json!({"request_id": ID, "status": "PENDING", "decision": null, "decided_at": null,
               "digest": digest()}),
    )
}

fn approved() -> Value {
    with(
        &pending(),
        json!({"status": "COMMITTED", "decision": "approve"}),
    )
}

fn rejected() -> Value {
    with(
        &pending(),
        json!({"status": "COMMITTED", "decision": "reject"}),
    )
}

fn executed(execution: &str) -> Value {
    with(&approved(), json!({ "execution": execution }))
}

fn claimed() -> Value {
    json!({
        "action": with(&executed("claimed"), json!({"payload": payload()})),
        "claim": claim(),
    })
}

fn claim() -> Value {
    json!({"token": TOKEN, "fence": 7, "expires_at": "2030-01-02T03:04:05Z"})
}

/// A JSON object with other members.
fn with(object: &Value, members: Value) -> Value {
    let mut object = object.clone();
    for (name, value) in members.as_object().unwrap() {
        object[name] = value.clone();
    }
    object
}

fn problem_of(status: u16, code: &str, action: Value) -> Value {
    json!({"type": format!("urn:aegis:problem:{code}"), "title": "t", "status": status,
           "detail": "d", "code": code, "action": action})
}

fn problem(status: u16, code: &str, action: Value) -> Act {
    answer_with(status, &problem_of(status, code, action))
        .header("content-type", "application/problem+json")
}

/// An answer that is none of the protocol's, so that it proves nothing.
fn is_no_proof(error: &Error) -> bool {
    error.is_protocol() && error.is_outcome_unknown()
}
