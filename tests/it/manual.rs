//! The manual and the READMEs name tests that exist and link to files that exist.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|other| other == extension) {
            found.push(path);
        }
    }
    found
}

/// The pages, each with its text.
fn pages() -> Vec<(PathBuf, String)> {
    let mut pages = files(&root().join("src/manual"), "md");
    pages.push(root().join("README.md"));
    pages.push(root().join("benches/README.md"));
    pages
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path, text)
        })
        .collect()
}

/// The text outside of code blocks.
fn prose(text: &str) -> String {
    let mut is_code = false;
    let lines = text.lines().filter(|line| {
        let is_fence = line.starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What stands in code font, alone or behind a path.
fn code_spans(prose: &str) -> impl Iterator<Item = &str> {
    prose.split('`').skip(1).step_by(2)
}

/// Names of tests are sentences: of at least three words.
fn looks_like_a_test(span: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let is_metric = span.starts_with("aegis_");
    !is_metric && span.bytes().all(word) && span.matches('_').count() >= 3
}

/// The functions marked as tests, and the cases of the conformance suite.
fn tests() -> HashSet<String> {
    let mut sources = files(&root().join("src"), "rs");
    sources.extend(files(&root().join("tests"), "rs"));
    let mut tests = HashSet::new();
    for path in sources {
        let is_suite = path.parent().unwrap().ends_with("store/conformance");
        let mut is_marked = false;
        for line in fs::read_to_string(&path).unwrap().lines() {
            let line = line.trim_start();
            if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                is_marked = true;
            }
            let rest = line.strip_prefix("pub(super) ").unwrap_or(line);
            let rest = rest.strip_prefix("async ").unwrap_or(rest);
            if let Some(rest) = rest.strip_prefix("fn ") {
                let name = rest.split(['(', '<']).next().unwrap();
                if std::mem::take(&mut is_marked) || is_suite {
                    tests.insert(name.to_owned());
                }
            }
        }
    }
    tests
}

#[test]
fn every_test_that_a_page_names_exists() {
    let tests = tests();
    let mut named = 0;
    for (path, text) in pages() {
        for span in code_spans(&prose(&text)).filter(|span| looks_like_a_test(span)) {
            named += 1;
            assert!(tests.contains(span), "{}: {span}", path.display());
        }
    }
    assert!(named > 40, "only {named} tests are named");
}

/// The targets of links: inline ones and definitions.
fn links(prose: &str) -> Vec<&str> {
    let inline = prose.split("](").skip(1);
    let inline = inline.filter_map(|rest| rest.split(')').next());
    let definitions = prose.lines().filter(|line| line.starts_with('['));
    let definitions = definitions.filter_map(|line| line.split_once("]: "));
    inline
        .chain(definitions.map(|(_, target)| target))
        .map(str::trim)
        .collect()
}

#[test]
fn every_relative_link_of_a_page_resolves() {
    let mut followed = 0;
    for (path, text) in pages() {
        for target in links(&prose(&text)) {
            if target.contains("://") {
                continue;
            }
            followed += 1;
            let file = target.split('#').next().unwrap();
            let file = path.parent().unwrap().join(file);
            assert!(file.exists(), "{}: {target}", path.display());
        }
    }
    assert!(followed > 15, "only {followed} links are followed");
}

/// In the documentation a link leads to the module only if `manual/mod.rs` defines it.
#[test]
fn every_page_that_a_page_links_to_is_a_module_of_the_manual() {
    let folder = root().join("src/manual");
    let module = fs::read_to_string(folder.join("mod.rs")).unwrap();
    for path in files(&folder, "md") {
        for line in fs::read_to_string(&path).unwrap().lines() {
            let Some((name, target)) = line.strip_prefix('[').and_then(|it| it.split_once("]: "))
            else {
                continue;
            };
            assert_eq!(name, target, "{}", path.display());
            let page = name.strip_suffix(".md").unwrap();
            assert!(
                module.contains(&format!("[{name}]: crate::manual::{page}")),
                "{}: {name}",
                path.display()
            );
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(
            module.contains(&format!("include_str!(\"{name}\")")),
            "{name}"
        );
    }
}

/// A list of paths in a page is a map of the repository.
#[test]
fn every_file_that_a_page_names_exists() {
    for (path, text) in pages() {
        for span in code_spans(&prose(&text)) {
            let is_path = ["tests/", "src/", "benches/", "examples/"]
                .iter()
                .any(|folder| span.starts_with(folder));
            if is_path && !span.contains(['*', ' ']) {
                assert!(root().join(span).exists(), "{}: {span}", path.display());
            }
        }
    }
}
