//! The commands of the manual.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::binary::{Served, aegis, run, serve};
use crate::support::manual::text;

/// The shell blocks of a page, one after the other.
pub(crate) fn commands(page: &str) -> String {
    blocks(&text(page))
}

/// The shell blocks of a section of a page.
pub(crate) fn commands_of(page: &str, section: &str) -> String {
    let text = text(page);
    let (_, rest) = text.split_once(&format!("\n## {section}\n")).unwrap();
    blocks(rest.split("\n## ").next().unwrap())
}

fn blocks(text: &str) -> String {
    let blocks = text.split("```sh\n").skip(1);
    let blocks = blocks.map(|block| block.split("```").next().unwrap());
    blocks.collect()
}

/// A shell that runs commands in a folder, and ends with the first one that fails.
pub(crate) fn shell(commands: &str, folder: &Path) -> Command {
    let mut shell = Command::new("bash");
    shell.args(["-euo", "pipefail", "-c", commands]);
    let binary = Path::new(env!("CARGO_BIN_EXE_aegis")).parent().unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{}:{path}", binary.display()));
    shell.current_dir(folder);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("AEGIS_") {
            shell.env_remove(name);
        }
    }
    shell
}

#[test]
fn the_commands_of_the_audit_page_run_as_written() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(serve(&folder.path().join("aegis.db")));
    for key in ["one", "two"] {
        let mut approve = aegis(&["approve", key, "--tenant", "acme", "--thread", "run-7"]);
        approve.env("AEGIS_URL", server.url());
        run(approve).expect(0);
    }
    // A server that ends chains what is left.
    server.stop().expect(0);
    let commands = commands("audit.md");
    assert!(commands.lines().count() > 7, "{commands}");
    let ended = run(shell(&commands, folder.path())).expect(0);
    let heads = ended.stdout.matches(" at seq 2\n").count();
    assert_eq!(heads, 5, "{ended:?}");
    assert!(
        ended.stdout.contains("not in this export: seq 1 to 1"),
        "{ended:?}"
    );
}

#[test]
fn the_commands_of_the_agents_page_run_as_written() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(serve(&folder.path().join("aegis.db")));
    // The server of the page would listen on a port that may be taken. All else runs as it is.
    let commands = commands("agents.md").replace("aegis serve &\n", "");
    assert!(commands.lines().count() > 12, "{commands}");
    let mut shell = shell(&commands, folder.path());
    shell.env("AEGIS_URL", server.url());
    let ended = run(shell).expect(0);
    for shown in [
        "Charge 12.50",
        "execution: completed",
        "claimed by anonymous",
        "sk_live_",
    ] {
        assert!(ended.stdout.contains(shown), "{shown}: {ended:?}");
    }
    server.stop().expect(0);
}

/// Commands that start a server in the background, which then ends.
fn with_its_end(commands: &str) -> String {
    format!("trap 'kill $! && wait $!' EXIT\n{commands}")
}

#[test]
fn the_commands_on_a_unix_socket_run_as_written() {
    let folder = TempDir::new().unwrap();
    let commands = with_its_end(&commands_of("operating.md", "A Unix socket"));
    let ended = run(shell(&commands, folder.path())).expect(0);
    for shown in ["\"ok\"", "on record"] {
        assert!(ended.stdout.contains(shown), "{shown}: {ended:?}");
    }
    assert!(!folder.path().join("aegis.sock").exists());
}

#[test]
fn the_commands_on_tls_run_as_written() {
    let folder = TempDir::new().unwrap();
    // A port that was free a moment ago, in place of one that may be taken.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    drop(listener);
    let commands = commands_of("operating.md", "TLS");
    assert!(commands.matches("8443").count() >= 3, "{commands}");
    let commands = with_its_end(&commands.replace("8443", &port));
    let ended = run(shell(&commands, folder.path())).expect(0);
    assert!(ended.stdout.contains("\"ok\""), "{ended:?}");
    assert!(ended.stderr.contains("listening on https://"), "{ended:?}");
}
