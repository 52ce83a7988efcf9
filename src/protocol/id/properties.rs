//! What holds for every `Idempotency-Key` header.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A byte of a header value, quotes and backslashes more often than not.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![
        3 => Just(b'"'),
        3 => Just(b'\\'),
        6 => 0x21..=0x7e_u8,
        1 => Just(b' '),
        1 => Just(b'\t'),
        1 => 0x80..=0xff_u8,
    ]
}

/// The text of a valid key.
fn key_text() -> impl Strategy<Value = String> {
    let byte = prop_oneof![Just(b'"'), Just(b'\\'), 0x21..=0x7e_u8];
    let length = prop_oneof![4 => 1..20_usize, 1 => 1..=MAX_LEN, 1 => Just(MAX_LEN)];
    length
        .prop_flat_map(move |length| vec(byte.clone(), length))
        .prop_map(|bytes| String::from_utf8(bytes).unwrap())
}

fn parse(bytes: &[u8]) -> Option<String> {
    let value = HeaderValue::from_bytes(bytes).unwrap();
    let key = IdempotencyKey::from_header(&value).ok()?;
    Some(key.as_str().to_owned())
}

/// The grammar, once more and in another way: what a quoted string holds is found from its end.
fn parse_by_grammar(bytes: &[u8]) -> Option<String> {
    let mut text = bytes.to_vec();
    if bytes.first() == Some(&b'"') {
        let inner = bytes.get(1..bytes.len().checked_sub(1)?)?;
        if bytes.last() != Some(&b'"') {
            return None;
        }
        text.clear();
        let mut at = 0;
        while at < inner.len() {
            let escaped = inner[at] == b'\\';
            at += usize::from(escaped);
            let byte = *inner.get(at)?;
            if escaped != matches!(byte, b'"' | b'\\') {
                return None;
            }
            text.push(byte);
            at += 1;
        }
    }
    let is_key = (1..=MAX_LEN).contains(&text.len()) && text.iter().all(u8::is_ascii_graphic);
    is_key.then(|| String::from_utf8(text).unwrap())
}

/// The quoted form, by the grammar.
fn quote(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{escaped}\"")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_header_is_read_as_the_grammar_has_it(bytes in vec(byte(), 0..12)) {
        prop_assert_eq!(parse(&bytes), parse_by_grammar(&bytes));
        let quoted = [b"\"", &bytes[..], b"\""].concat();
        prop_assert_eq!(parse(&quoted), parse_by_grammar(&quoted));
    }

    #[test]
    fn every_key_comes_back_from_both_forms(text in key_text()) {
        let key = IdempotencyKey::new(text.as_str()).unwrap();
        for value in [key.header_value(), key.quoted_header_value()] {
            prop_assert!(value.is_sensitive());
            let read = IdempotencyKey::from_header(&value).unwrap();
            prop_assert_eq!(read.as_str(), &text);
            // What was read is sent again as it was.
            prop_assert_eq!(read.header_value(), key.header_value());
        }
        let quoted = key.quoted_header_value();
        prop_assert_eq!(quoted.to_str().unwrap(), quote(&text));
        // Bare, but where the bare form would be read as a quoted one.
        let is_bare = key.header_value().as_bytes() == text.as_bytes();
        prop_assert_eq!(is_bare, !text.starts_with('"'));
    }

    #[test]
    fn a_key_is_as_long_as_what_is_quoted(length in MAX_LEN - 2..MAX_LEN + 3, byte in 0x21..=0x7e_u8) {
        let text = String::from(char::from(byte)).repeat(length);
        let expected = (length <= MAX_LEN).then_some(text.clone());
        prop_assert_eq!(parse(quote(&text).as_bytes()), expected.clone());
        if byte != b'"' {
            prop_assert_eq!(parse(text.as_bytes()), expected);
        }
    }

    #[test]
    fn a_quoted_key_that_is_damaged_is_refused(text in key_text(), rest in vec(byte(), 1..4), other in 0x23..=0x5b_u8) {
        let quoted = quote(&text).into_bytes();
        // Without its end.
        prop_assert_eq!(parse(&quoted[..quoted.len() - 1]), None);
        // With more behind it, parameters included.
        prop_assert_eq!(parse(&[&quoted[..], b";p=1"].concat()), None);
        if !rest.iter().all(u8::is_ascii_whitespace) {
            prop_assert_eq!(parse(&[&quoted[..], &rest].concat()), parse_by_grammar(&[&quoted[..], &rest].concat()));
        }
        // With an escape that there is not.
        let escape = [b"\"\\", &[other][..], &quoted[1..]].concat();
        prop_assert_eq!(parse(&escape), None);
        // With a byte that no key has.
        for byte in [b' ', b'\t', 0x80, 0xff] {
            let spoilt = [b"\"", &[byte][..], &quoted[1..]].concat();
            prop_assert_eq!(parse(&spoilt), None);
        }
    }

    #[test]
    fn lists_of_parts_that_differ_derive_keys_that_differ(
        one in vec(vec(any::<u8>(), 0..4), 0..4),
        other in vec(vec(any::<u8>(), 0..4), 0..4),
    ) {
        let is_same = IdempotencyKey::derive(&one) == IdempotencyKey::derive(&other);
        prop_assert_eq!(is_same, one == other);
    }
}
