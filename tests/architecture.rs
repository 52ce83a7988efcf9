//! The direction of imports between the rooms of the crate.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

/// Each room, and the rooms that it may import.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("protocol", &[]),
    ("layer", &["protocol"]),
    ("client", &["layer", "protocol"]),
    ("store", &["protocol"]),
    ("server", &["store", "protocol"]),
    ("adapter", &["layer", "protocol"]),
    ("testing", &[]),
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The rooms that a line of code names as `crate::room`, in braces or not. Comments do not import.
fn named(line: &str) -> Vec<&'static str> {
    let code = line.split("//").next().unwrap();
    let rooms = ALLOWED.iter().map(|(room, _)| *room);
    rooms
        .filter(|room| code.contains(&format!("crate::{room}")))
        .collect()
}

#[test]
fn every_room_imports_only_what_the_design_allows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for (room, allowed) in ALLOWED {
        for path in sources(&root.join(room)) {
            for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
                for target in named(line) {
                    seen += 1;
                    assert!(
                        target == room || allowed.contains(&target),
                        "{}:{}: {room} imports {target}",
                        path.display(),
                        number + 1
                    );
                }
                assert!(
                    !line.contains("use crate::{"),
                    "{}:{}: name the room, so that this test sees it",
                    path.display(),
                    number + 1
                );
            }
        }
    }
    assert!(seen > 20, "the test sees no imports any more");
}

#[test]
fn only_one_file_names_the_legacy_client_and_one_looks_into_transport_errors() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut naming = Vec::new();
    for path in sources(&root) {
        let text = fs::read_to_string(&path).unwrap();
        let code = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        if code.into_iter().any(|line| line.contains("client::legacy")) {
            naming.push(path.strip_prefix(&root).unwrap().display().to_string());
        }
    }
    naming.sort();
    assert_eq!(
        naming,
        ["client/connector.rs", "layer/delivery/hyper_util.rs"]
    );
}

/// What the crate depends on with these features, at any depth.
fn dependencies(features: &str) -> Vec<String> {
    let mut tree = std::process::Command::new(env!("CARGO"));
    tree.current_dir(env!("CARGO_MANIFEST_DIR"));
    tree.args(["tree", "--offline", "--locked", "--edges", "normal"]);
    tree.args(["--prefix", "none", "--no-default-features"]);
    let tree = tree.args(["--features", features]).output().unwrap();
    assert!(tree.status.success(), "{tree:?}");
    let tree = String::from_utf8(tree.stdout).unwrap();
    tree.lines().map(str::to_owned).collect()
}

#[test]
fn the_layers_alone_bring_no_procedural_macro_and_no_http_implementation() {
    let brings = |features: &str, what: &str| {
        let dependencies = dependencies(features);
        assert!(dependencies.len() > 10, "{dependencies:?}");
        dependencies.iter().any(|name| name.contains(what))
    };
    for what in [
        "(proc-macro)",
        "hyper ",
        "h2 ",
        "serde ",
        "futures-",
        "tracing ",
    ] {
        assert!(!brings("", what), "no features: {what}");
    }
    for features in ["hyper-util", "client", "tls", "reqwest"] {
        assert!(!brings(features, "tokio-macros"), "{features}");
        assert!(!brings(features, "rusqlite"), "{features}");
    }
    assert!(brings("server", "tokio-macros"));
}
