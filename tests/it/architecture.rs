//! The direction of imports between the rooms of the crate.

use std::fs;
use std::path::{Path, PathBuf};

/// Each room, and the rooms that it may import. Rooms that are planned may be listed.
const ROOMS: [(&str, &[&str]); 8] = [
    ("protocol", &[]),
    ("layer", &["protocol"]),
    ("client", &["layer", "protocol"]),
    ("adapter", &["layer", "protocol"]),
    ("store", &["protocol"]),
    ("outbox", &["store", "layer", "protocol"]),
    ("server", &["store", "outbox", "protocol"]),
    ("testing", &[]),
];

/// The same within the server: folders and files, from the innermost outwards.
const SERVER: [(&str, &[&str]); 16] = [
    ("drain", &[]),
    ("ops/outage", &[]),
    ("reloads", &[]),
    ("ops/metrics", &["reloads"]),
    ("http", &[]),
    ("auth", &["http"]),
    ("net", &["drain", "http", "ops/outage", "ops/metrics"]),
    (
        "api",
        &[
            "drain",
            "http",
            "auth",
            "ops/outage",
            "ops/metrics",
            "reloads",
        ],
    ),
    // It describes the endpoints, so it reads their limits; the service alone serves it.
    ("ops/openapi", &["http", "auth", "api"]),
    (
        "builder",
        &["http", "auth", "api", "inbox", "reloads", "service"],
    ),
    (
        "service",
        &["http", "auth", "api", "inbox", "ops/openapi", "builder"],
    ),
    ("inbox", &["drain", "http", "auth", "api"]),
    ("ops/scrape", &["http", "api", "ops/metrics"]),
    ("ops/health", &["http", "api", "service", "ops/scrape"]),
    ("retention", &["ops/outage"]),
    (
        "serve",
        &["drain", "http", "auth", "net", "service", "ops/health"],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The source files below a folder; none if there is no such folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The lines of a file with their numbers, without comments: those do not import.
fn code(path: &Path) -> Vec<(usize, String)> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| line.split("//").next().unwrap());
    (1..).zip(lines.map(str::to_owned)).collect()
}

/// The paths in a line that begin with `prefix`, without it.
fn paths<'a>(line: &'a str, prefix: &str) -> Vec<&'a str> {
    let is_path = |letter: char| letter.is_ascii_alphanumeric() || "_:".contains(letter);
    let starts = line.match_indices(prefix).map(|(at, _)| at + prefix.len());
    starts
        .map(|start| {
            let rest = &line[start..];
            &rest[..rest.find(|letter| !is_path(letter)).unwrap_or(rest.len())]
        })
        .collect()
}

/// The room in which a path lies; its parts are separated by `separator`.
fn room<'a>(rooms: &[(&'a str, &[&str])], path: &str, separator: &str) -> Option<&'a str> {
    let path: Vec<&str> = path.split(separator).collect();
    let mut rooms = rooms.iter().map(|(room, _)| *room);
    rooms.find(|room| path.starts_with(&room.split('/').collect::<Vec<_>>()))
}

#[test]
fn every_room_imports_only_what_the_design_allows() {
    let mut seen = 0;
    for (own, allowed) in ROOMS {
        for path in sources(&root().join(own)) {
            for (number, line) in code(&path) {
                let place = format!("{}:{number}", path.display());
                for target in paths(&line, "crate::") {
                    let target = room(&ROOMS, target, "::");
                    let target = target.unwrap_or_else(|| panic!("{place}: name the room: {line}"));
                    seen += 1;
                    assert!(
                        target == own || allowed.contains(&target),
                        "{place}: {own} imports {target}"
                    );
                }
            }
        }
    }
    assert!(seen > 20, "the test sees no imports any more");
}

#[test]
fn every_folder_of_the_crate_is_a_room() {
    for entry in fs::read_dir(root()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        // The binary uses the public API alone, which the compiler holds; the manual is text.
        let is_known =
            ["lib", "bin", "manual"].contains(&name) || room(&ROOMS, name, "/").is_some();
        assert!(is_known, "{name} has no arrows in this test");
    }
}

#[test]
fn the_rooms_of_the_server_import_only_inwards() {
    let server = root().join("server");
    let mut seen = 0;
    for path in sources(&server) {
        let relative = path.strip_prefix(&server).unwrap().with_extension("");
        let relative = relative.to_str().unwrap().replace('\\', "/");
        let Some(own) = room(&SERVER, &relative, "/") else {
            assert!(relative.ends_with("mod"), "{relative} has no arrows here");
            continue;
        };
        let allowed = SERVER.iter().find(|(room, _)| *room == own).unwrap().1;
        // One level up is the server for its own files and the roots of its rooms.
        let is_shallow = !relative.contains('/') || relative.ends_with("/mod");
        for (number, line) in code(&path) {
            let place = format!("{}:{number}", path.display());
            assert!(!line.contains("super::super"), "{place}: name the room");
            let mut targets = paths(&line, "crate::server::");
            if is_shallow && !line.contains("super::*") {
                targets.extend(paths(&line, "super::"));
            }
            for target in targets {
                let target = room(&SERVER, target, "::");
                let target = target.unwrap_or_else(|| panic!("{place}: name the room: {line}"));
                seen += 1;
                assert!(
                    target == own || allowed.contains(&target),
                    "{place}: {own} imports {target}"
                );
            }
        }
    }
    assert!(seen > 20, "the test sees no imports any more");
}

#[test]
fn two_files_name_the_legacy_client_and_one_looks_into_transport_errors() {
    let root = root();
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
        [
            "client/connector.rs",
            "layer/delivery/hyper_util.rs",
            "outbox/http.rs"
        ]
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
