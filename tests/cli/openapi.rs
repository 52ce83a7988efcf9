//! `/openapi.json` says what the server does: a validator, real answers, and requests made from it.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::binary::{Served, aegis, run, serve};
use crate::python::{environment, python, script};
use crate::support::process::bound;

/// How long requests are made from the document of each server, in seconds: single ones, and then
/// ones that follow its links from answer to answer.
const FUZZED: &str = "12";
const FOLLOWED: &str = "8";

fn interpreter() -> PathBuf {
    environment(
        "openapi-schemathesis-4.32.5",
        &[
            "schemathesis==4.32.5",
            "openapi-spec-validator==0.9.0",
            "jsonschema==4.26.0",
        ],
        "import schemathesis, openapi_spec_validator, jsonschema",
    )
}

/// A server without keys, one with keys, and the key.
fn servers(folder: &TempDir) -> (Served, Served, String) {
    let key = run(aegis(&[
        "keys", "new", "--tenant", "acme", "--name", "all", "--scope", "admin", "--json",
    ]))
    .expect(0)
    .json();
    let keys = folder.path().join("keys");
    fs::write(&keys, key["line"].as_str().unwrap()).unwrap();
    let mut keyed = serve(&folder.path().join("keyed.db"));
    keyed.arg("--keys").arg(&keys);
    let keyless = Served::start(serve(&folder.path().join("keyless.db")));
    let secret = key["secret"].as_str().unwrap().to_owned();
    (keyless, Served::start(keyed), secret)
}

#[test]
fn the_document_is_valid_and_real_answers_are_as_it_says() {
    let interpreter = interpreter();
    let folder = TempDir::new().unwrap();
    let (keyless, keyed, key) = servers(&folder);
    for (server, key) in [(&keyless, ""), (&keyed, key.as_str())] {
        let mut command = python(&interpreter, &[&script("tests/cli/openapi.py")]);
        command.env("AEGIS_TEST_URL", server.url());
        command.env("AEGIS_TEST_KEY", key);
        let ended = run(command).expect(0);
        assert!(ended.stdout.ends_with("all is well\n"), "{ended:?}");
    }
    keyless.stop().expect(0);
    keyed.stop().expect(0);
}

/// Makes requests from the document of a server, and holds the answers to it.
fn fuzz(server: &Served, folder: &TempDir, phases: &str, seconds: &str, header: Option<&str>) {
    let interpreter = interpreter();
    let url = format!("{}/openapi.json", server.url());
    let mut args = vec!["-m", "schemathesis.cli", "run", &url];
    // A stream of events does not end. A wait may take 55 s.
    args.extend([
        "--exclude-path-regex",
        "/events$",
        "--request-timeout",
        "70",
    ]);
    args.extend([
        "--phases",
        phases,
        "--max-time",
        seconds,
        "--no-color",
        "--generation-database=none",
    ]);
    args.extend([
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,\
         response_headers_conformance,response_schema_conformance,unsupported_method,\
         missing_required_header,allow_header_conformance,ignored_auth",
    ]);
    if let Some(header) = header {
        args.extend(["--header", header]);
    }
    let mut command = python(&interpreter, &args);
    command.current_dir(folder.path());
    let ended = bound(&command).output().unwrap();
    let text = String::from_utf8_lossy(&ended.stdout);
    println!("{text}{}", String::from_utf8_lossy(&ended.stderr));
    let phase = if phases == "stateful" {
        "Stateful (in"
    } else {
        "Fuzzing (in"
    };
    assert!(ended.status.success() && text.contains(phase));
}

#[test]
fn requests_made_from_the_document_are_answered_as_it_says() {
    let folder = TempDir::new().unwrap();
    let (keyless, keyed, key) = servers(&folder);
    let seconds = std::env::var("AEGIS_FUZZ_SECONDS").ok();
    let fuzzed = seconds.as_deref().unwrap_or(FUZZED);
    let followed = seconds.as_deref().unwrap_or(FOLLOWED);
    let authorization = format!("Authorization: Bearer {key}");
    let single = "examples,coverage,fuzzing";
    fuzz(&keyless, &folder, single, fuzzed, None);
    fuzz(&keyed, &folder, single, fuzzed, Some(&authorization));
    // Of one tenant, as what is another's is not found.
    let tenant = Some("Tenant-Id: acme");
    fuzz(&keyless, &folder, "stateful", followed, tenant);
    fuzz(&keyed, &folder, "stateful", followed, Some(&authorization));
    keyless.stop().expect(0);
    keyed.stop().expect(0);
}
