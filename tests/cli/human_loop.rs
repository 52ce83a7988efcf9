//! The human loop on the command line.

use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::binary::{Ended, Served, aegis, run, serve};

/// A server, and commands for it.
pub struct Place {
    pub server: Served,
    _folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        Self {
            server: Served::start(serve(&folder.path().join("aegis.db"))),
            _folder: folder,
        }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = aegis(args);
        command.env("AEGIS_URL", self.server.url());
        command
            .env("AEGIS_TENANT", "acme")
            .env("AEGIS_THREAD", "run-7");
        command
    }

    pub fn run(&self, args: &[&str]) -> Ended {
        run(self.command(args))
    }

    pub fn json(&self, args: &[&str]) -> Value {
        self.run(&[args, &["--json"]].concat()).expect(0).json()
    }

    fn submitted(&self, key: &str) -> (String, String) {
        let payload = r#"{"to":"a@b.c","amount":12.5}"#;
        let action = self.json(&["submit", key, "--payload", payload, "--title", "Pay a"]);
        let text = |name: &str| action[name].as_str().unwrap().to_owned();
        (text("request_id"), text("digest"))
    }
}

#[test]
fn an_action_goes_the_whole_way_by_commands() {
    let place = Place::new();
    let (id, digest) = place.submitted("k-1");
    let list = place.run(&["list", "--status", "pending"]).expect(0).stdout;
    assert!(
        list.contains(&id) && list.contains("Pay a") && list.contains("pending"),
        "{list}"
    );
    let shown = place.run(&["show", &id]).expect(0).stdout;
    assert!(shown.contains(&format!("digest: {digest}")), "{shown}");
    assert!(
        shown.contains("history: ") && shown.contains("submitted by anonymous"),
        "{shown}"
    );

    // Not on a terminal, so nothing can be confirmed.
    let blind = place.run(&["approve", "--id", &id]).expect(2);
    assert!(blind.stderr.contains("--digest"), "{blind:?}");
    let wrong = "0".repeat(64);
    place
        .run(&["approve", "--id", &id, "--digest", &wrong])
        .expect(3);
    let receipt = place.json(&[
        "approve",
        "--id",
        &id,
        "--digest",
        &digest,
        "--comment",
        "ok",
    ]);
    assert_eq!(receipt["outcome"], "accepted");
    let again = place.json(&["approve", "--id", &id, "--digest", &digest]);
    assert_eq!(again["outcome"], "duplicate");
    place
        .run(&["reject", "--id", &id, "--digest", &digest])
        .expect(3);
    let list = place
        .run(&["list", "--decision", "approve"])
        .expect(0)
        .stdout;
    assert!(list.contains("approved, not picked up"), "{list}");

    let waited = place.json(&["wait", &id]);
    assert_eq!(waited["decision"], "approve");
    place.run(&["claim", &id, "--digest", &wrong]).expect(3);
    let payload = r#"{ "amount": 12.50, "to": "a@b.c" }"#;
    let claimed = place.json(&["claim", &id, "--payload", payload, "--lease", "60"]);
    let token = claimed["claim"]["token"].as_str().unwrap();
    place.run(&["claim", &id, "--digest", &digest]).expect(3);
    let renewed = place.json(&["renew", &id, "--claim", token, "--lease", "90"]);
    assert_eq!(renewed["claim"]["fence"], 1);
    let mut complete = place.command(&["complete", &id, "--result", "[1]", "--json"]);
    complete.env("AEGIS_CLAIM", token);
    assert_eq!(run(complete).expect(0).json()["execution"], "completed");
    place
        .run(&["fail", &id, "--claim", token, "--reason", "no"])
        .expect(3);
    place.run(&["renew", &id, "--claim", "nonsense"]).expect(3);

    let events = place
        .run(&["events", "--after", "0", "--count", "4"])
        .expect(0)
        .stdout;
    let kinds: Vec<_> = events
        .lines()
        .map(|line| line.split(' ').nth(2).unwrap())
        .collect();
    assert_eq!(kinds, ["submitted", "approved", "claimed", "completed"]);
    let (id, _) = place.submitted("k-2");
    place.run(&["cancel", &id]).expect(0);
    let cancelled = place.json(&["show", &id]);
    assert_eq!(cancelled["closed"], "cancelled");
    let late = place
        .run(&["wait", &place.submitted("k-3").0, "--for", "1"])
        .expect(1);
    assert!(late.stderr.contains("nobody has decided"), "{late:?}");
    let short = place.json(&["submit", "k-4", "--expires", "1s"]);
    let expired = place.json(&["wait", short["request_id"].as_str().unwrap()]);
    assert_eq!(expired["closed"], "expired");
}

#[test]
fn deceptive_characters_are_shown_as_what_they_are() {
    let place = Place::new();
    let title = "pay \u{202e}0001\u{202c} \u{1b}[31m\u{200b}";
    place.run(&["submit", "k", "--title", title]).expect(0);
    for shown in [
        place.run(&["list"]).expect(0).stdout,
        place
            .run(&["events", "--after", "0", "--count", "1"])
            .expect(0)
            .stdout,
    ] {
        for character in ['\u{202e}', '\u{202c}', '\u{1b}', '\u{200b}'] {
            assert!(!shown.contains(character), "{shown:?}");
        }
        assert!(shown.contains("202E"), "{shown:?}");
    }
}

#[test]
fn completions_and_pages_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let text = run(aegis(&["completions", shell])).expect(0).stdout;
        assert!(
            text.contains("approve") && text.contains("aegis"),
            "{shell}"
        );
    }
    let page = run(aegis(&["man"])).expect(0).stdout;
    assert!(
        page.contains(".TH aegis") && page.contains("Exit codes"),
        "{page}"
    );
    let page = run(aegis(&["man", "serve"])).expect(0).stdout;
    assert!(page.contains("aegis") && page.contains("listen"), "{page}");
    run(aegis(&["man", "nonsense"])).expect(2);
}
