//! A test of this binary once more, in a process of its own: with another environment, or with memory of its own.

use std::any::type_name;
use std::process::{Command, Stdio};

use super::ends;
use super::process::bound;

/// Set in the process that [`own_process`] starts.
const OWN: &str = "AEGIS_TEST_OWN_PROCESS";

/// The path of a test as the harness has it: `module::test`, without the crate.
fn path<T: Fn()>(_: T) -> &'static str {
    let name = type_name::<T>();
    name.split_once("::").map_or(name, |(_, path)| path)
}

/// The command that runs this one test, whether it is ignored or not.
pub fn again<T: Fn()>(test: T) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", path(test), "--include-ignored", "--nocapture"]);
    bound(&command)
}

/// Runs a test that [`again`] names, which must pass, and returns what it printed.
pub async fn passes(mut command: Command) -> String {
    command.stdin(Stdio::null());
    let mut command = tokio::process::Command::from(command);
    let output = ends(command.kill_on_drop(true).output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let passed = output.status.success() && said.contains(" 1 passed;");
    assert!(passed, "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// Whether this is a process that runs nothing but this test. If it is not, the test has passed in one once this returns.
pub async fn own_process<T: Fn()>(test: T) -> bool {
    if std::env::var_os(OWN).is_some() {
        return true;
    }
    let mut command = again(test);
    command.env(OWN, "1");
    passes(command).await;
    false
}
