//! What benches ask a store for.

use aegis_hitl::protocol::Payload;
use aegis_hitl::store::{Actor, Decide, Fingerprinted, Identity};
use aegis_hitl::{Decision, IdempotencyKey, RequestId};

use super::load;

/// An approval of a new action in a thread.
pub(crate) fn asked(thread: i64) -> Decide {
    let json = std::str::from_utf8(load::BODY).unwrap();
    let payload = Payload::from_json(json).unwrap();
    Decide {
        identity: Identity {
            tenant_id: "acme".parse().unwrap(),
            thread_id: format!("run-{thread:04}").parse().unwrap(),
            idempotency_key: IdempotencyKey::mint(),
        },
        decision: Decision::Approve,
        call_id: Some(RequestId::mint()),
        payload: Some(Fingerprinted::new(payload).unwrap()),
        comment: None,
        actor: Actor::new("acme"),
        require_submission: false,
        allow_self_approval: true,
    }
}
