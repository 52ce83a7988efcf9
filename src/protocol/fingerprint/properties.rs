//! What holds for every payload.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::super::body::Body;
use super::*;

const TWO_TO_THE_53: f64 = 9_007_199_254_740_992.0;
const TWO_TO_THE_64: f64 = 18_446_744_073_709_551_616.0;

/// A string with what is written in more than one way: quotes, controls, and characters beyond the first plane.
fn text() -> impl Strategy<Value = String> {
    let character = prop_oneof![
        4 => prop::char::range('a', 'e'),
        2 => prop::sample::select(vec!['"', '\\', '/', '\u{8}', '\t', '\n', '\u{c}', '\r', '\0', '\u{1f}', '\u{7f}']),
        2 => prop::sample::select(vec!['é', '€', '\u{2028}', '\u{d7ff}', '\u{e000}', '\u{ffff}', '😀', '\u{10ffff}']),
        1 => any::<char>(),
    ];
    vec(character, 0..6).prop_map(String::from_iter)
}

/// Not between 2^53 and 2^64: see `a_double_has_the_fingerprint_of_no_other_integer`.
fn float() -> impl Strategy<Value = f64> {
    let is_apart = |value: &f64| !(TWO_TO_THE_53..TWO_TO_THE_64).contains(&value.abs());
    prop_oneof![
        any::<f64>()
            .prop_filter("finite", |value| value.is_finite())
            .prop_filter("not among the integers of 64 bits", is_apart),
        (-1000..1000_i32).prop_map(|value| f64::from(value) / 8.0),
        prop::sample::select(vec![
            0.0,
            -0.0,
            1e21,
            1e-7,
            f64::MAX,
            f64::MIN_POSITIVE,
            5e-324
        ]),
    ]
}

fn scalar() -> impl Strategy<Value = Json> {
    prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::Bool),
        // As the parser has it: what is negative is signed.
        (i64::MIN..0).prop_map(Json::Signed),
        any::<u64>().prop_map(Json::Unsigned),
        (0..20_u64).prop_map(Json::Unsigned),
        float().prop_map(Json::Float),
        text().prop_map(Json::String),
    ]
}

fn members(value: impl Strategy<Value = Json>) -> impl Strategy<Value = Vec<(String, Json)>> {
    btree_map(text(), value, 1..5).prop_map(Vec::from_iter)
}

fn json() -> impl Strategy<Value = Json> {
    scalar().prop_recursive(3, 16, 4, |value| {
        prop_oneof![
            vec(value.clone(), 0..4).prop_map(Json::Array),
            members(value).prop_map(Json::Object),
        ]
    })
}

/// The members of a payload, none of which is the reserved one.
fn payload() -> impl Strategy<Value = Vec<(String, Json)>> {
    members(json())
}

/// Spells JSON in one of its many ways.
struct Speller(u64);

impl Speller {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn spell(&mut self, json: &Json) -> String {
        match json {
            Json::Null => "null".to_owned(),
            Json::Bool(value) => value.to_string(),
            Json::Signed(value) => self.integer(&value.to_string(), *value as f64),
            Json::Unsigned(value) => self.integer(&value.to_string(), *value as f64),
            Json::Float(value) => self.float(*value),
            Json::String(value) => self.string(value),
            Json::Array(items) => {
                let items: Vec<_> = items.iter().map(|item| self.spaced(item)).collect();
                format!("[{}]", items.join(","))
            }
            Json::Object(members) => self.object(members),
        }
    }

    fn object(&mut self, members: &[(String, Json)]) -> String {
        let mut members: Vec<_> = members
            .iter()
            .map(|(name, value)| {
                let name = self.string(name);
                format!(
                    "{}{name}{}:{}",
                    self.space(),
                    self.space(),
                    self.spaced(value)
                )
            })
            .collect();
        for last in (1..members.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            members.swap(last, other);
        }
        format!("{{{}{}}}", members.join(","), self.space())
    }

    fn spaced(&mut self, json: &Json) -> String {
        format!("{}{}{}", self.space(), self.spell(json), self.space())
    }

    fn space(&mut self) -> &'static str {
        ["", "", " ", "\n", "\t", "\r\n  "][self.below(6) as usize]
    }

    /// A double holds an integer below 2^53 exactly, so that it may be spelled as one.
    fn integer(&mut self, digits: &str, value: f64) -> String {
        if value.abs() < TWO_TO_THE_53 && self.below(2) == 0 {
            return self.float(value);
        }
        digits.to_owned()
    }

    fn float(&mut self, value: f64) -> String {
        let text = match self.below(4) {
            0 => format!("{value:?}"),
            1 => format!("{value:e}"),
            2 => format!("{value:E}"),
            // All digits, and a fraction so that it is no integer.
            _ if value.fract() == 0.0 => format!("{value:.2}"),
            _ => format!("{value}"),
        };
        // An integer of up to 64 bits that is spelled as such is one, and this is none.
        let is_integer = !text.contains(['.', 'e', 'E']);
        if is_integer { text + ".0" } else { text }
    }

    fn string(&mut self, value: &str) -> String {
        let mut text = String::from('"');
        for character in value.chars() {
            let short = match character {
                '"' => Some("\\\""),
                '\\' => Some("\\\\"),
                '/' => Some("\\/"),
                '\u{8}' => Some("\\b"),
                '\t' => Some("\\t"),
                '\n' => Some("\\n"),
                '\u{c}' => Some("\\f"),
                '\r' => Some("\\r"),
                _ => None,
            };
            let is_plain = character >= ' ' && !matches!(character, '"' | '\\');
            match (self.below(3), short) {
                (0, _) if is_plain => text.push(character),
                (1, Some(short)) => text.push_str(short),
                (way, _) => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        text.push_str(&match way {
                            0 | 1 => format!("\\u{unit:04x}"),
                            _ => format!("\\u{unit:04X}"),
                        });
                    }
                }
            }
        }
        text.push('"');
        text
    }
}

fn parse(text: &str) -> Json {
    serde_json::from_str(text).unwrap()
}

fn canonical(json: &Json) -> String {
    let mut text = String::new();
    json.write(&mut text);
    text
}

fn fingerprint(text: &str) -> Option<Fingerprint> {
    let body = Body::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
    body.payload.map(|(_, fingerprint)| fingerprint)
}

/// Whether two values are the same: numbers by what they are, and members in any order.
fn is_same(one: &Json, other: &Json) -> bool {
    match (one, other) {
        (Json::Array(one), Json::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(a, b)| is_same(a, b))
        }
        (Json::Object(one), Json::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, value)| {
                    let same = other.iter().find(|(other, _)| other == name);
                    same.is_some_and(|(_, other)| is_same(value, other))
                })
        }
        (Json::String(one), Json::String(other)) => one == other,
        (Json::Bool(one), Json::Bool(other)) => one == other,
        (Json::Null, Json::Null) => true,
        (Json::Float(one), Json::Float(other)) => one == other,
        _ => match (whole(one), whole(other)) {
            (Some(one), Some(other)) => one == other,
            _ => false,
        },
    }
}

/// A whole number that an `i128` holds.
fn whole(json: &Json) -> Option<i128> {
    match json {
        Json::Signed(value) => Some((*value).into()),
        Json::Unsigned(value) => Some((*value).into()),
        Json::Float(value) if value.fract() == 0.0 && value.abs() < 1e30 => Some(*value as i128),
        _ => None,
    }
}

/// Changes a value in one place.
fn changed(json: &Json, place: &mut u64) -> Json {
    match json {
        Json::Array(items) if !items.is_empty() => {
            let mut items = items.clone();
            let at = (*place % items.len() as u64) as usize;
            *place /= items.len() as u64;
            items[at] = changed(&items[at], place);
            Json::Array(items)
        }
        Json::Object(members) if !members.is_empty() => {
            let mut members = members.clone();
            let at = (*place % members.len() as u64) as usize;
            *place /= members.len() as u64;
            members[at].1 = changed(&members[at].1, place);
            Json::Object(members)
        }
        Json::String(value) => Json::String(format!("{value} ")),
        Json::Bool(value) => Json::Bool(!value),
        Json::Unsigned(value) => Json::Unsigned(value ^ 1),
        Json::Signed(value) if *value < -1 => Json::Signed(value ^ 1),
        Json::Null => Json::Array(vec![]),
        _ => Json::Null,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_spelling_changes_the_fingerprint(members in payload(), one in any::<u64>(), other in any::<u64>()) {
        let [one, other] = [one, other].map(|seed| Speller(seed).object(&members));
        prop_assert_eq!(fingerprint(&one), fingerprint(&other), "{}\n{}", one, other);
    }

    #[test]
    fn the_canonical_form_is_its_own(value in json(), seed in any::<u64>()) {
        let first = canonical(&parse(&Speller(seed).spell(&value)));
        prop_assert_eq!(canonical(&parse(&first)), first.clone());
        prop_assert!(is_same(&parse(&first), &value), "{first} {value:?}");
    }

    #[test]
    fn values_that_differ_have_fingerprints_that_differ(members in payload(), place in any::<u64>(), seed in any::<u64>()) {
        let before = Json::Object(members);
        let after = changed(&before, &mut { place });
        prop_assert!(!is_same(&before, &after));
        let mut speller = Speller(seed);
        let [before, after] = [before, after].map(|json| speller.spell(&json));
        prop_assert_ne!(fingerprint(&before), fingerprint(&after), "{}\n{}", before, after);
    }

    #[test]
    fn integers_of_64_bits_are_exact(one in any::<u64>(), other in any::<u64>(), near in 0..3_u64, negative in any::<i64>()) {
        prop_assert_eq!(canonical(&parse(&one.to_string())), one.to_string());
        prop_assert_eq!(canonical(&parse(&negative.to_string())), negative.to_string());
        let of = |value: i128| fingerprint(&format!("{{\"n\":{value}}}"));
        for other in [other, one.wrapping_add(near), one.wrapping_sub(near)] {
            prop_assert_eq!(of(one.into()) == of(other.into()), one == other);
        }
        prop_assert_eq!(of(one.into()) == of(negative.into()), i128::from(one) == i128::from(negative));
    }

    #[test]
    fn a_double_comes_back_from_its_canonical_form(value in float(), seed in any::<u64>()) {
        let text = canonical(&parse(&Speller(seed).float(value)));
        prop_assert_eq!(text.parse::<f64>().unwrap(), value);
    }

    #[test]
    fn a_double_has_the_fingerprint_of_no_other_integer(value in TWO_TO_THE_53..TWO_TO_THE_64, is_negative in any::<bool>()) {
        let value = if is_negative { (-value).max(-TWO_TO_THE_64 / 2.0) } else { value };
        let integer = value as i128;
        let of = |text: String| fingerprint(&format!("{{\"n\":{text}}}"));
        prop_assert_eq!(of(format!("{value:.1}")), of(integer.to_string()));
    }

    #[test]
    fn every_string_comes_back_from_its_canonical_form(value in text(), seed in any::<u64>()) {
        let text = canonical(&parse(&Speller(seed).string(&value)));
        prop_assert_eq!(serde_json::from_str::<String>(&text).unwrap(), value);
    }

    #[test]
    fn the_reserved_member_is_left_out_at_the_top_and_only_there(members in payload(), comment in text(), seed in any::<u64>()) {
        prop_assume!(members.iter().all(|(name, _)| name != RESERVED));
        let mut speller = Speller(seed);
        let plain = speller.object(&members);
        let note = vec![("comment".to_owned(), Json::String(comment.clone()))];
        let reserved = (RESERVED.to_owned(), Json::Object(note));
        let commented = [&members[..], std::slice::from_ref(&reserved)].concat();
        let commented = Body::parse(speller.object(&commented).as_bytes()).unwrap();
        prop_assert_eq!(commented.metadata.comment, Some(comment));
        let (kept, digest) = commented.payload.unwrap();
        prop_assert_eq!(Some(digest), fingerprint(&plain));
        // What is kept is what was digested.
        prop_assert_eq!(Fingerprint::of_payload(&kept).unwrap(), digest);

        let inner = vec![("in".to_owned(), Json::Object(members.clone()))];
        let with = [&members[..], &[reserved]].concat();
        let with = vec![("in".to_owned(), Json::Object(with))];
        prop_assert_ne!(fingerprint(&speller.object(&inner)), fingerprint(&speller.object(&with)));
    }

    #[test]
    fn what_is_kept_has_the_fingerprint_of_the_body(members in payload(), seed in any::<u64>()) {
        prop_assume!(members.iter().all(|(name, _)| name != RESERVED));
        let text = Speller(seed).object(&members);
        let (kept, digest) = Body::parse(text.as_bytes()).unwrap().payload.unwrap();
        prop_assert_eq!(kept.as_str(), text.trim());
        prop_assert_eq!(Fingerprint::of_payload(&kept).unwrap(), digest);
    }

    #[test]
    fn a_name_that_comes_twice_is_refused_however_it_is_spelled(members in payload(), seed in any::<u64>()) {
        let twice = [&members[..], &members[..1]].concat();
        let text = Speller(seed).object(&twice);
        prop_assert!(Body::parse(text.as_bytes()).is_err(), "{}", text);
    }

    #[test]
    fn no_body_panics(bytes in vec(any::<u8>(), 0..40), members in payload(), at in any::<prop::sample::Index>(), byte in any::<u8>(), seed in any::<u64>()) {
        _ = Body::parse(&bytes);
        let mut text = Speller(seed).object(&members).into_bytes();
        let at = at.index(text.len());
        _ = Body::parse(&text[..at]);
        text[at] = byte;
        _ = Body::parse(&text);
    }
}
