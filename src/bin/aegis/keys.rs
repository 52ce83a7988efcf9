//! The commands that make API keys.

use aegis_hitl::ApiKey;
use aegis_hitl::server::Keys;
use serde_json::json;
use uuid::Uuid;

use crate::args::{self, Scope};
use crate::failure::Failure;
use crate::print::{print, print_json};

/// Makes a key and prints both of its halves. Only the digest is for the server; the secret is shown this once.
pub(crate) fn new(args: &args::NewKey) -> Result<(), Failure> {
    // Two UUIDv4s: 244 bits from the cryptographically secure generator.
    let secret = format!(
        "sk_live_{}{}",
        Uuid::new_v4().simple(),
        Uuid::new_v4().simple()
    );
    let key = ApiKey::new(secret.as_str())
        .map_err(|error| Failure::other("cannot make a key").because(error))?;
    let scope = match args.scope {
        Scope::Decide => "decide",
        Scope::Read => "read",
    };
    let line = format!(
        "{} {} {} {scope}",
        Keys::digest(&key),
        args.tenant,
        args.name
    );
    if args.json {
        return print_json(&json!({ "secret": secret, "line": line }));
    }
    print(&format!(
        "# for the client, as AEGIS_TOKEN; it is not shown again\n{secret}\n# for the server's key file\n{line}\n"
    ))
}
