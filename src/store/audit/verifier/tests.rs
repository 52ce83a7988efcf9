//! What a verifier finds.

use super::super::{entry::tests::entry, leaf, line, link, origin};
use super::*;

/// The lines of a tenant's export with three events, of which the second was removed.
fn export(tenant: &str) -> Vec<String> {
    let mut hash = origin(tenant);
    let mut lines = vec![line::from(tenant, 0, &hash)];
    for seq in 1..=3 {
        let mut entry = entry(seq, "T\u{202e}\u{2028}é\\u0041");
        entry.tenant_id = tenant.into();
        let mut text = String::new();
        entry.write(&mut text);
        let leaf = leaf(&text);
        hash = link(&hash, &leaf);
        lines.push(match seq {
            2 => line::removed(seq, &leaf, &hash),
            _ => line::event(&text, &hash),
        });
    }
    lines.push(AuditHead::new(tenant, 3, hash, 0).line());
    lines
}

fn head(lines: &[String]) -> Hash {
    let head: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    unhex(head["head"].as_str().unwrap()).unwrap()
}

fn verify_noted(lines: &[String], noted: &[Hash]) -> Result<Vec<VerifiedChain>, String> {
    let mut verifier = noted
        .iter()
        .fold(AuditVerifier::new(), |verifier, hash| verifier.noted(*hash));
    let read = lines.iter().try_for_each(|line| verifier.line(line));
    let verified = read.and_then(|()| verifier.finish());
    verified.map_err(|fault| fault.to_string())
}

fn verify(lines: &[String]) -> Result<Vec<VerifiedChain>, String> {
    verify_noted(lines, &[])
}

/// Asserts that the lines are refused, with these words.
fn refused(lines: &[String], words: &str) {
    let fault = verify(lines).unwrap_err();
    assert!(fault.contains(words), "'{words}' is not in: {fault}");
}

#[test]
fn what_was_exported_is_verified() {
    let (one, other) = (export("acme"), export("b"));
    let both = [one.clone(), other.clone()].concat();
    let verified = verify(&both).unwrap();
    let shown: Vec<_> = verified
        .iter()
        .map(|chain| {
            (
                &*chain.head.tenant_id,
                chain.head.seq,
                chain.after,
                chain.removed,
            )
        })
        .collect();
    assert_eq!(shown, [("acme", 3, 0, 1), ("b", 3, 0, 1)]);
    assert_eq!(verified[0].head.hash, head(&one));
    assert_ne!(head(&one), head(&other));
}

#[test]
fn any_changed_byte_of_any_line_is_found() {
    let lines = export("acme");
    for at in 0..lines.len() {
        for place in 0..lines[at].len() {
            for byte in [b'0', b'1', b'"', b' ', b'}'] {
                let mut bytes = lines[at].clone().into_bytes();
                if std::mem::replace(&mut bytes[place], byte) == byte {
                    continue;
                }
                let mut verifier = AuditVerifier::new();
                let mut changed = lines.iter().map(|line| line.clone().into_bytes());
                let is_sound = changed.by_ref().enumerate().all(|(number, line)| {
                    let line = if number == at { &bytes } else { &line };
                    verifier.line(line).is_ok()
                });
                let is_sound = is_sound && verifier.finish().is_ok();
                let text = String::from_utf8_lossy(&bytes).into_owned();
                // How many events wait to be chained is told, and not proved.
                let is_count = text.contains("\"head\"") && text.contains("\"unchained\":1}");
                assert_eq!(is_sound, is_count, "line {at}: {text}");
            }
        }
    }
}

#[test]
fn a_line_that_is_missing_repeated_or_moved_is_found() {
    let lines = export("acme");
    let without = |at: usize| {
        let mut lines = lines.clone();
        lines.remove(at);
        lines
    };
    refused(&without(0), "line 1: it belongs to no chain");
    refused(
        &without(1),
        "line 2, seq 1 of tenant acme: the line of seq 1 is missing",
    );
    refused(&without(2), "the line of seq 2 is missing");
    refused(&without(3), "the head is that of seq 3: lines are missing");
    refused(
        &without(4),
        "the export is cut off behind seq 3 of tenant acme",
    );
    refused(&lines[..2], "cut off behind seq 1");
    refused(&[], "empty");
    let mut moved = lines.clone();
    moved.swap(1, 2);
    refused(
        &moved,
        "line 2, seq 1 of tenant acme: the line of seq 1 is missing",
    );
    let mut repeated = lines.clone();
    repeated.insert(2, lines[1].clone());
    refused(
        &repeated,
        "line 3, seq 2 of tenant acme: seq 1 comes a second time",
    );
    let twice = [lines.clone(), lines.clone()].concat();
    refused(&twice, "a chain of the same tenant came before");
}

#[test]
fn lines_of_two_tenants_do_not_mix() {
    let (one, other) = (export("acme"), export("b"));
    for at in 1..=4 {
        let mut mixed = one.clone();
        mixed[at] = other[at].clone();
        assert!(verify(&mixed).is_err(), "{at}");
    }
    let mut mixed = one.clone();
    mixed[3] = other[3].clone();
    refused(
        &mixed,
        "line 4, seq 3 of tenant acme: it is an event of another tenant",
    );
    // The whole of another tenant's chain, under the name of this one.
    let renamed: Vec<_> = other
        .iter()
        .map(|line| line.replace("\"tenant_id\":\"b\"", "\"tenant_id\":\"acme\""))
        .collect();
    refused(
        &renamed,
        "line 1: the chain does not begin as its tenant's must",
    );
    let mut nested = one.clone();
    nested.insert(2, other[0].clone());
    refused(
        &nested,
        "another chain begins before the line of this one's head",
    );
}

#[test]
fn a_noted_head_finds_what_was_cut_off_or_written_anew() {
    let lines = export("acme");
    let noted = head(&lines);
    assert!(verify_noted(&lines, &[noted, origin("acme")]).is_ok());
    // A chain of two events is sound by itself.
    let mut short = lines[..3].to_vec();
    let hash: Value = serde_json::from_str(&lines[2]).unwrap();
    let hash = unhex(hash["hash"].as_str().unwrap()).unwrap();
    short.push(AuditHead::new("acme", 2, hash, 0).line());
    assert!(verify_noted(&short, &[hash]).is_ok());
    let fault = verify_noted(&short, &[noted]).unwrap_err();
    assert!(fault.contains("cut off or written anew"), "{fault}");
    assert!(verify_noted(&lines, &[noted, [7; 32]]).is_err());
}

#[test]
fn an_export_that_begins_later_follows_on_a_noted_head() {
    let lines = export("acme");
    let before: Value = serde_json::from_str(&lines[2]).unwrap();
    let before = unhex(before["hash"].as_str().unwrap()).unwrap();
    let mut part = lines[2..].to_vec();
    part[0] = line::from("acme", 2, &before);
    let verified = verify_noted(&part, &[before]).unwrap();
    assert_eq!((verified[0].after, verified[0].head.seq), (2, 3));
    part[0] = line::from("acme", 2, &[0; 32]);
    refused(
        &part,
        "its hash is not that of its event behind the hash before it",
    );
}

#[test]
fn what_is_no_line_of_an_export_is_refused() {
    let lines = export("acme");
    for (strange, words) in [
        ("", "it is not a line of JSON"),
        ("[]", "it is not an object"),
        ("{}", "it has not the members of a line"),
        (r#"{"event":1,"hash":"00"}"#, "it"),
        (r#"{"event":{},"hash":"00"}"#, "it"),
        (r#"{"a":1,"a":1}"#, "two members of the same name"),
        (r#"{"a":"\u0041"}"#, "it is not spelled as it was exported"),
        (r#"{"b":1,"a":1}"#, "it is not spelled as it was exported"),
    ] {
        let mut lines = lines.clone();
        lines.insert(2, strange.to_owned());
        refused(&lines, words);
    }
    let mut verifier = AuditVerifier::new();
    let fault = verifier.line(b"\xff").unwrap_err().to_string();
    assert_eq!(fault, "line 1: it is not UTF-8");
    let huge = line::from("acme", u64::MAX, &[0; 32]);
    assert!(AuditVerifier::new().line(huge).is_err());
}

#[test]
fn a_hash_in_capitals_is_refused() {
    let lines = export("acme");
    for (at, name) in [(0, "from"), (1, "hash"), (lines.len() - 1, "head")] {
        let line: Value = serde_json::from_str(&lines[at]).unwrap();
        let hash = line[name].as_str().unwrap();
        let mut lines = lines.clone();
        lines[at] = lines[at].replace(hash, &hash.to_uppercase());
        refused(&lines, &format!("its '{name}' is not a hash"));
    }
}
