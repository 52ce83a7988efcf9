//! An `AegisService`, and what a scripted server answers it.

use aegis_hitl::AegisService;
use aegis_hitl::client::Builder;
use aegis_hitl::layer::Backoff;
use aegis_hitl::testing::Act;
use serde_json::{Value, json};

/// A service of the tenant `acme` and the thread `run-7` that does not wait between attempts.
pub fn builder(url: &str) -> Builder {
    AegisService::builder()
        .base_url(url)
        .tenant_id("acme")
        .thread_id("run-7")
        .backoff(Backoff::none())
}

/// The action of the key `k-1` that is decided so.
pub fn action(decision: &str) -> Value {
    json!({
        "request_id": "r-1", "tenant_id": "acme", "thread_id": "run-7",
        "idempotency_key": "k-1", "status": "COMMITTED", "decision": decision, "execution": null,
        "created_at": "2026-01-02T03:04:05Z", "decided_at": "2026-01-02T03:04:05Z", "replayed": false,
    })
}

pub fn answer(status: u16) -> Act {
    Act::answer(status)
}

pub fn answer_after(status: u16, retry_after: &str) -> Act {
    Act::answer(status).header("retry-after", retry_after)
}

pub fn answer_with(status: u16, body: &Value) -> Act {
    Act::answer(status).body(body.to_string())
}
