//! An agent that runs an action once, after a person has approved it.
//!
//! ```sh
//! aegis serve
//! cargo run --example agent
//! aegis list --tenant acme --status pending
//! aegis approve --tenant acme --id <the request id>
//! ```
//!
//! Start it again at any moment: the key names the same action, and an approval is spent once.

#![allow(clippy::print_stdout)]

use std::time::Duration;

use aegis_hitl::AegisService;
use aegis_hitl::client::RunOutcome;
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::var("AEGIS_URL").unwrap_or_else(|_| "http://localhost:8000".to_owned());
    let aegis = AegisService::builder()
        .base_url(url)
        .tenant_id("acme")
        .thread_id("run-7")
        .build()?;
    let key = std::env::args().nth(1);
    let outcome = aegis
        .action(key.as_deref().unwrap_or("charge-4711"))
        .title("Charge 12.50 to a@b.c")
        .payload(&json!({ "to": "a@b.c", "amount": 12.5 }))
        .decide_within(Duration::from_secs(3600))
        .run_once(|approved| async move {
            // What the reviewer approved, edited or not. Hand the id on, so that the other side can
            // refuse what it has seen.
            let payload: Value = approved.parse()?;
            println!("charging {payload} as {}", approved.request_id());
            Ok::<_, serde_json::Error>(json!({ "charged": payload["amount"] }))
        })
        .await?;
    match outcome {
        RunOutcome::Completed { value, .. } => println!("done: {value}"),
        RunOutcome::Rejected(action) => println!("rejected: {:?}", action.comment),
        RunOutcome::AlreadyRun(action) => println!("ran before: {:?}", action.execution),
        other => println!("not done, or not known to be: {other:?}"),
    }
    Ok(())
}
