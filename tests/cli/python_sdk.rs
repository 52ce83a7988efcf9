//! The published Python SDK works against the binary, unmodified.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::binary::{Ended, Served, aegis, run, serve};
use crate::support::process::bound;
use crate::support::rows::{counts, look_at};

const PACKAGE: &str = "aegis-idempotency==0.1.2";
const TENANT_DECISIONS: u64 = 307;
const KEYED_DECISIONS: u64 = 6;

const NO_PYTHON: &str =
    "this test needs Python 3.10 or later with venv: apt-get install python3 python3-venv";
const NO_PACKAGE: &str = "this test needs the Python package aegis-idempotency 0.1.2: allow access to PyPI, \
                          or set up pip with an index or a folder that has it";

/// Runs a step of the preparation, and says what is missing if it fails.
fn prepared(mut command: Command, missing: &str) -> Ended {
    // As if started by hand: no other environment of Python's is in the way.
    for name in ["PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"] {
        command.env_remove(name);
    }
    let found = bound(&command).output();
    let found = found.unwrap_or_else(|error| panic!("{missing} ({command:?}: {error})"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        found.status.success(),
        "{missing} ({command:?}: {}{})",
        text(&found.stdout),
        text(&found.stderr)
    );
    Ended {
        status: found.status,
        stdout: text(&found.stdout),
        stderr: text(&found.stderr),
    }
}

fn python(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

/// The virtual environment's interpreter. It is made once and kept with the build.
fn sdk() -> PathBuf {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let ready = kept.join("python-sdk-0.1.2");
    let interpreter = ready.join("bin/python");
    let import = ["-c", "import aegis_hitl"];
    let works = || python(&interpreter, &import).output();
    if works().is_ok_and(|found| found.status.success()) {
        return interpreter;
    }
    let check = "import sys, venv, ensurepip; assert sys.version_info >= (3, 10), sys.version";
    prepared(python("python3", &["-c", check]), NO_PYTHON);
    // Made beside its place and moved there whole, so that a run that is cut short leaves nothing half done.
    let made = TempDir::new_in(kept).unwrap();
    let folder = made.path().join("venv");
    prepared(
        python("python3", &["-m", "venv", folder.to_str().unwrap()]),
        NO_PYTHON,
    );
    let pip = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        PACKAGE,
    ];
    prepared(python(folder.join("bin/python"), &pip), NO_PACKAGE);
    if ready.exists() {
        fs::rename(&ready, made.path().join("broken")).unwrap();
    }
    // Another run may have been first, and its environment is as good.
    let moved = fs::rename(&folder, &ready);
    assert!(moved.is_ok() || ready.exists(), "{moved:?}");
    prepared(python(&interpreter, &import), NO_PACKAGE);
    interpreter
}

#[test]
fn the_published_sdk_works_unmodified() {
    let interpreter = sdk();
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

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/python_sdk.py");
    let mut command = python(&interpreter, &[script.to_str().unwrap()]);
    command.env("SDK_URL", trusting.url());
    command.env("SDK_KEYS_URL", keyed.url());
    command.env("SDK_API_KEY", key.json()["secret"].as_str().unwrap());
    for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
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
