//! Python for the tests: an interpreter in an environment that is made once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::binary::Ended;
use crate::support::process::bound;

const NO_PYTHON: &str =
    "this test needs Python 3.10 or later with venv: apt-get install python3 python3-venv";

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

pub fn python(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command
}

/// The interpreter of the machine, for programs that need its standard library alone.
pub fn interpreter() -> PathBuf {
    let check = "import sys, venv, ensurepip; assert sys.version_info >= (3, 10), sys.version";
    prepared(python("python3", &["-c", check]), NO_PYTHON);
    "python3".into()
}

/// The interpreter of a virtual environment with packages. It is made once and kept with the build.
pub fn environment(name: &str, packages: &[&str], import: &str) -> PathBuf {
    let missing = format!(
        "this test needs the Python packages {}: allow access to PyPI, or set up pip with an index \
         or a folder that has them",
        packages.join(", ")
    );
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let ready = kept.join(name);
    let own = ready.join("bin/python");
    let import = ["-c", import];
    let works = || python(&own, &import).output();
    if works().is_ok_and(|found| found.status.success()) {
        return own;
    }
    interpreter();
    // Made beside its place and moved there whole, so that a run that is cut short leaves nothing half done.
    let made = TempDir::new_in(kept).unwrap();
    let folder = made.path().join("venv");
    prepared(
        python("python3", &["-m", "venv", folder.to_str().unwrap()]),
        NO_PYTHON,
    );
    let mut pip = vec![
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ];
    pip.extend(packages);
    prepared(python(folder.join("bin/python"), &pip), &missing);
    if ready.exists() {
        fs::rename(&ready, made.path().join("broken")).unwrap();
    }
    // Another run may have been first, and its environment is as good.
    let moved = fs::rename(&folder, &ready);
    assert!(moved.is_ok() || ready.exists(), "{moved:?}");
    prepared(python(&own, &import), &missing);
    own
}

/// A file of this repository.
pub fn script(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    path.to_str().unwrap().to_owned()
}
