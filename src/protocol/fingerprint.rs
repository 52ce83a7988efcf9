//! The fingerprint of a payload.
//!
//! It is SHA-256 over canonical JSON (RFC 8785): the order of members, white space,
//! and the spelling of numbers and strings do not matter. It is stricter in one point. The RFC
//! rounds integers to doubles; here an integer that fits 64 bits keeps all of its digits, so two
//! amounts beyond 2^53 never share a fingerprint.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use sha2::{Digest, Sha256};

use super::Payload;

/// The member of a body for metadata, which is not part of the payload.
pub(crate) const RESERVED: &str = "aegis";

/// The SHA-256 digest of a payload's canonical form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint(pub(crate) [u8; 32]);

impl Fingerprint {
    /// Computes the digest of a payload that was not parsed as a body.
    pub(crate) fn of_payload(payload: &Payload) -> Result<Self, serde_json::Error> {
        serde_json::from_str(payload.as_str()).map(|json| Self::of(&json))
    }

    /// Computes the digest of the payload in a request's body, without the reserved member. `None`
    /// if nothing else is there.
    #[cfg(feature = "client")]
    pub(crate) fn in_body(body: &[u8]) -> Result<Option<Self>, serde_json::Error> {
        let mut json: Json = serde_json::from_slice(body)?;
        if let Json::Object(members) = &mut json {
            take_reserved(members);
            if members.is_empty() {
                return Ok(None);
            }
        }
        Ok(Some(Self::of(&json)))
    }

    pub(super) fn of(json: &Json) -> Self {
        let mut text = String::new();
        json.write(&mut text);
        Self(Sha256::digest(text.as_bytes()).into())
    }
}

/// Takes the reserved member out of those of a body.
pub(super) fn take_reserved(members: &mut Vec<(String, Json)>) -> Option<Json> {
    let at = members.iter().position(|(name, _)| name == RESERVED)?;
    Some(members.remove(at).1)
}

/// Checks that every parser reads this text as the same value: it repeats no member, is nested no
/// more than 128 levels deep, and has neither half a character nor a number beyond a double.
pub(crate) fn check_json(text: &str) -> Result<(), serde_json::Error> {
    serde_json::from_str::<Json>(text).map(drop)
}

/// Returns the canonical form of a JSON text.
#[cfg(feature = "server")]
pub(crate) fn canonical_json(text: &str) -> Result<String, serde_json::Error> {
    let mut canonical = String::with_capacity(text.len());
    serde_json::from_str::<Json>(text)?.write(&mut canonical);
    Ok(canonical)
}

/// A JSON value without repeated members and without rounded 64-bit integers.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    #[cfg(feature = "server")]
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Signed(_) | Self::Unsigned(_) | Self::Float(_) => "a number",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
            Self::Object(_) => "an object",
        }
    }

    /// Writes the canonical form. The parser's limit on depth (128) bounds the recursion.
    fn write(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::Signed(value) => out.push_str(&value.to_string()),
            Self::Unsigned(value) => out.push_str(&value.to_string()),
            Self::Float(value) => write_float(*value, out),
            Self::String(value) => write_json_string(value, out),
            Self::Array(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    item.write(out);
                }
                out.push(']');
            }
            Self::Object(members) => {
                let mut members: Vec<_> = members.iter().collect();
                // RFC 8785, section 3.2.3: by UTF-16 code units.
                members.sort_by(|(a, _), (b, _)| a.encode_utf16().cmp(b.encode_utf16()));
                out.push('{');
                for (i, (name, value)) in members.into_iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    write_json_string(name, out);
                    out.push(':');
                    value.write(out);
                }
                out.push('}');
            }
        }
    }
}

/// Writes a double as RFC 8785 does, but a whole one within 64 bits with all of its digits. The
/// shortest digits that lead back to it (the RFC's) are those of another integer from 2^53 on, and
/// integers are written exactly.
fn write_float(value: f64, out: &mut String) {
    const TWO_TO_THE_63: f64 = 9_223_372_036_854_775_808.0;
    if value.fract() == 0.0 && (-TWO_TO_THE_63..2.0 * TWO_TO_THE_63).contains(&value) {
        out.push_str(&format!("{:.0}", value + 0.0));
    } else {
        out.push_str(ryu_js::Buffer::new().format(value));
    }
}

/// Writes a JSON string with the escapes of RFC 8785, section 3.2.2.2.
pub(crate) fn write_json_string(text: &str, out: &mut String) {
    out.push('"');
    // Only ASCII is escaped. What lies between two escapes is copied at once.
    let mut rest = text;
    while let Some(at) = rest.bytes().position(is_escaped) {
        out.push_str(&rest[..at]);
        match rest.as_bytes()[at] {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            8 => out.push_str("\\b"),
            b'\t' => out.push_str("\\t"),
            b'\n' => out.push_str("\\n"),
            12 => out.push_str("\\f"),
            b'\r' => out.push_str("\\r"),
            control => out.push_str(&format!("\\u{control:04x}")),
        }
        rest = &rest[at + 1..];
    }
    out.push_str(rest);
    out.push('"');
}

fn is_escaped(byte: u8) -> bool {
    byte < b' ' || matches!(byte, b'"' | b'\\')
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Signed(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Unsigned(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Json, E> {
        Ok(Json::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut members = Vec::new();
        let mut names = std::collections::HashSet::new();
        while let Some((name, value)) = map.next_entry::<String, Json>()? {
            // A reviewer and an executor must never read two different values for one member.
            if !names.insert(name.clone()) {
                return Err(de::Error::custom(
                    "an object has two members of the same name",
                ));
            }
            members.push((name, value));
        }
        Ok(Json::Object(members))
    }
}

#[cfg(test)]
#[cfg(feature = "server")]
mod properties;

#[cfg(test)]
#[cfg(feature = "server")]
mod tests {
    use super::super::Body;
    use super::*;

    fn canonical(text: &str) -> String {
        let json: Json = serde_json::from_str(text).unwrap();
        let mut out = String::new();
        json.write(&mut out);
        out
    }

    fn fingerprint(text: &str) -> Option<Fingerprint> {
        Body::parse(text.as_bytes())
            .unwrap()
            .payload
            .map(|(_, fingerprint)| fingerprint)
    }

    #[test]
    fn the_examples_of_rfc_8785_come_out_as_printed() {
        assert_eq!(
            canonical(
                r#"{"numbers":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001],"string":"\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/","literals":[null,true,false]}"#
            ),
            "{\"literals\":[null,true,false],\"numbers\":[333333333.3333333,1e+30,4.5,0.002,1e-27],\"string\":\"€$\\u000f\\nA'B\\\"\\\\\\\\\\\"/\"}"
        );
        assert_eq!(
            canonical(
                r#"{"\u20ac":1,"\r":2,"\ufb33":3,"1":4,"\ud83d\ude00":5,"\u0080":6,"\u00f6":7}"#
            ),
            "{\"\\r\":2,\"1\":4,\"\u{80}\":6,\"ö\":7,\"€\":1,\"😀\":5,\"\u{fb33}\":3}"
        );
    }

    #[test]
    fn spelling_does_not_change_the_fingerprint() {
        let one = fingerprint(r#"{"a":1,"b":[100,"é"]}"#);
        assert_eq!(
            one,
            fingerprint("{ \"b\" : [1e2, \"\\u00e9\"],\n\"a\": 1.0 }")
        );
        assert_ne!(one, fingerprint(r#"{"a":2,"b":[100,"é"]}"#));
    }

    #[test]
    fn integers_beyond_2_to_the_53_keep_their_digits() {
        assert_ne!(
            fingerprint(r#"{"n":9007199254740993}"#),
            fingerprint(r#"{"n":9007199254740992}"#)
        );
    }
}
