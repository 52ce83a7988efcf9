//! The commands of the manual.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::binary::{Served, run, serve};

/// The shell blocks of a page, one after the other.
fn commands(page: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/manual")
        .join(page);
    let text = fs::read_to_string(path).unwrap();
    let blocks = text.split("```sh\n").skip(1);
    let blocks = blocks.map(|block| block.split("```").next().unwrap());
    blocks.collect()
}

#[test]
fn the_commands_of_the_agents_page_run_as_written() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(serve(&folder.path().join("aegis.db")));
    // The server of the page would listen on a port that may be taken. All else runs as it is.
    let commands = commands("agents.md").replace("aegis serve &\n", "");
    assert!(commands.lines().count() > 12, "{commands}");
    let mut shell = Command::new("bash");
    shell.args(["-euo", "pipefail", "-c", &commands]);
    let binary = Path::new(env!("CARGO_BIN_EXE_aegis")).parent().unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{}:{path}", binary.display()));
    shell
        .env("AEGIS_URL", server.url())
        .current_dir(folder.path());
    for name in ["AEGIS_TOKEN", "AEGIS_CONFIG", "AEGIS_CLAIM"] {
        shell.env_remove(name);
    }
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
