//! The published Python SDK works against the binary, unmodified.

use std::fs;

use tempfile::TempDir;

use crate::binary::{Served, aegis, run, serve};
use crate::python::{environment, python, script};
use crate::support::rows::{counts, look_at};

const PACKAGE: &str = "aegis-idempotency==0.1.2";
const TENANT_DECISIONS: u64 = 307;
const KEYED_DECISIONS: u64 = 6;

#[test]
fn the_published_sdk_works_unmodified() {
    let interpreter = environment("python-sdk-0.1.2", &[PACKAGE], "import aegis_hitl");
    let folder = TempDir::new().unwrap();
    let key = run(aegis(&[
        "keys", "new", "--tenant", "keyed", "--name", "sdk", "--scope", "decide", "--json",
    ]))
    .expect(0);
    let keys = folder.path().join("keys");
    fs::write(&keys, key.json()["line"].as_str().unwrap()).unwrap();

    let [trusting_store, keyed_store] =
        ["trusting.db", "keyed.db"].map(|name| folder.path().join(name));
    let trusting = Served::start(serve(&trusting_store));
    let mut command = serve(&keyed_store);
    command.arg("--keys").arg(&keys);
    let keyed = Served::start(command);

    let mut command = python(&interpreter, &[&script("tests/cli/python_sdk.py")]);
    command.env("SDK_URL", trusting.url());
    command.env("SDK_KEYS_URL", keyed.url());
    command.env("SDK_API_KEY", key.json()["secret"].as_str().unwrap());
    let ended = run(command);
    println!("{}{}", ended.stdout, ended.stderr);
    let ended = ended.expect(0);
    assert!(ended.stdout.ends_with("all is well\n"));

    for (store, decisions) in [
        (trusting_store, TENANT_DECISIONS),
        (keyed_store, KEYED_DECISIONS),
    ] {
        assert_eq!(counts(&look_at(&store)), [decisions; 2]);
    }
    trusting.stop().expect(0);
    keyed.stop().expect(0);
}
