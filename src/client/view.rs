//! The members of an answer that conclusions rest on, read without the rest.

use std::borrow::Cow;
use std::fmt;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::protocol::{Action, RequestId, Status};

/// A member of an answer that is compared with words of the protocol.
///
/// Any JSON value is accepted, so that a type new to this version does not fail the other members.
#[derive(Default)]
pub(super) enum Word<'a> {
    #[default]
    Absent,
    Null,
    Text(Cow<'a, str>),
    /// A value that is not a string. It agrees with nothing.
    Other,
}

impl Word<'_> {
    /// Whether there is a value.
    pub(super) fn is_there(&self) -> bool {
        !matches!(self, Self::Absent | Self::Null)
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Absent | Self::Null | Self::Other => None,
        }
    }

    pub(super) fn is(&self, word: &str) -> bool {
        self.text() == Some(word)
    }

    /// Whether the value is the one that was sent, or absent.
    pub(super) fn agrees(&self, sent: &impl AsRef<str>) -> bool {
        !self.is_there() || self.is(sent.as_ref())
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Word<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;

        impl<'de> Visitor<'de> for AnyValue {
            type Value = Word<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Word::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Word::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Word::Null)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
                Ok(Word::Other)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
                Ok(Word::Other)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
                Ok(Word::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
                Ok(Word::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Word::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Word::Other)
            }
        }

        deserializer.deserialize_any(AnyValue)
    }
}

/// The members of an answer that conclusions rest on. The answer is a problem or an action.
#[derive(Default)]
pub(super) struct View<'a> {
    pub(super) request_id: Word<'a>,
    pub(super) tenant_id: Word<'a>,
    pub(super) thread_id: Word<'a>,
    pub(super) idempotency_key: Word<'a>,
    pub(super) status: Word<'a>,
    pub(super) decision: Word<'a>,
    pub(super) code: Word<'a>,
    pub(super) kind: Word<'a>,
    pub(super) digest: Word<'a>,
    pub(super) action: Option<&'a RawValue>,
    /// Whether an incomplete body ends within the value of one of these members. What it would have
    /// told is unknown, and not absent.
    pub(super) is_cut_off: bool,
}

impl<'a> View<'a> {
    /// Reads a JSON object. An empty body is an object without members.
    ///
    /// A repeated member makes the whole invalid, because readers would disagree on which one
    /// counts.
    pub(super) fn of(body: &'a [u8]) -> Option<Self> {
        let (view, read) = Self::read(body);
        read.is_ok().then_some(view)
    }

    /// Reads the complete members of a JSON object from an incomplete body.
    pub(super) fn so_far(body: &'a [u8]) -> Option<Self> {
        let (view, read) = Self::read(body);
        match read {
            Err(error) if !error.is_eof() => None,
            _ => Some(view),
        }
    }

    fn read(body: &'a [u8]) -> (Self, Result<(), serde_json::Error>) {
        let mut view = Self::default();
        // Checked as a whole, which is cheaper than string by string. In an incomplete body the
        // last character may be cut off.
        let body = body.trim_ascii();
        let (text, is_text) = match str::from_utf8(body) {
            Ok(text) => (text, true),
            Err(error) if error.error_len().is_none() => {
                let valid = &body[..error.valid_up_to()];
                (str::from_utf8(valid).unwrap_or_default(), false)
            }
            Err(error) => return (view, Err(serde::de::Error::custom(error))),
        };
        if body.is_empty() {
            return (view, Ok(()));
        }
        let mut json = serde_json::Deserializer::from_str(text);
        let read = json.deserialize_map(Members(&mut view));
        let read = read.and_then(|()| json.end());
        // Before its first character a value says nothing.
        view.is_cut_off = view.is_cut_off && !lacks_a_value(text);
        match read {
            Ok(()) if !is_text => (view, Err(serde::de::Error::custom("it is not UTF-8"))),
            read => (view, read),
        }
    }

    /// Reads the value of a member that matters.
    fn read_value<T, A>(&mut self, map: &mut A) -> Result<T, A::Error>
    where
        T: Deserialize<'a>,
        A: MapAccess<'a>,
    {
        self.is_cut_off = true;
        let value = map.next_value()?;
        self.is_cut_off = false;
        Ok(value)
    }

    /// Returns the place of a member that matters.
    fn word(&mut self, member: &str) -> Option<&mut Word<'a>> {
        Some(match member {
            "request_id" => &mut self.request_id,
            "tenant_id" => &mut self.tenant_id,
            "thread_id" => &mut self.thread_id,
            "idempotency_key" => &mut self.idempotency_key,
            "status" => &mut self.status,
            "decision" => &mut self.decision,
            "code" => &mut self.code,
            "type" => &mut self.kind,
            "digest" => &mut self.digest,
            _ => return None,
        })
    }
}

/// Fills a view member by member, so that of an incomplete body it has what came before.
/// Whether an incomplete object ends just before the value of one of its own members. A colon at the
/// end may as well be one of a nested object, or within a string.
fn lacks_a_value(object: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(&format!("{object}null}}")).is_ok()
}

struct Members<'v, 'a>(&'v mut View<'a>);

impl<'de> Visitor<'de> for Members<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let twice = || serde::de::Error::custom("a member occurs twice");
        while let Some(member) = map.next_key::<Word<'de>>()? {
            let member = member.text().unwrap_or_default();
            if member == "action" {
                if self.0.action.is_some() {
                    return Err(twice());
                }
                self.0.action = self.0.read_value(&mut map)?;
            } else if let Some(word) = self.0.word(member) {
                if !matches!(word, Word::Absent) {
                    return Err(twice());
                }
                let told = self.0.read_value(&mut map)?;
                if let Some(word) = self.0.word(member) {
                    *word = told;
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

impl<'a> View<'a> {
    /// Returns the nested action, if it is an object.
    pub(super) fn nested(&self) -> Option<Self> {
        Self::of(self.action?.get().as_bytes())
    }

    /// Returns the code, from its own member or from the problem's type.
    pub(super) fn code(&self) -> Option<&str> {
        match &self.code {
            Word::Absent | Word::Null => self.kind.text()?.strip_prefix(URN),
            Word::Text(code) => Some(code),
            // There is a code, but not one of ours.
            Word::Other => Some(""),
        }
    }

    /// Returns the id that the server sent.
    pub(super) fn request_id(&self) -> Option<RequestId> {
        RequestId::new(self.request_id.text()?).ok()
    }

    /// Returns what can be kept of an action that cannot be parsed as a whole.
    pub(super) fn salvaged(&self) -> Option<Action> {
        if !self.status.is_there() {
            return None;
        }
        let status = self.status.text().and_then(|status| status.parse().ok());
        let mut action = Action::new(self.request_id()?, status.unwrap_or(Status::Other));
        action.decision = self
            .decision
            .text()
            .and_then(|decision| decision.parse().ok());
        action.digest = self.digest.text().and_then(|digest| digest.parse().ok());
        Some(action)
    }
}

const URN: &str = "urn:aegis:problem:";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_is_no_string_agrees_with_nothing_and_fails_no_other_member() {
        for value in ["-1", "1", "1.5", "true", "[1, {}]", r#"{"a": [1]}"#] {
            let json = format!(r#"{{"tenant_id": {value}, "decision": "reject"}}"#);
            let view = View::of(json.as_bytes()).unwrap();
            assert!(view.tenant_id.is_there(), "{value}");
            assert!(!view.tenant_id.agrees(&"") && !view.tenant_id.agrees(&value));
            assert!(view.decision.is("reject"), "{value}");
        }
        let view = View::of(br#"{"tenant_id": null}"#).unwrap();
        assert!(view.tenant_id.agrees(&"acme"));
    }

    #[test]
    fn of_an_action_that_cannot_be_read_the_id_the_status_and_the_decision_are_kept() {
        let action = |json: &str| View::of(json.as_bytes()).unwrap().salvaged();
        let kept = r#"{"request_id": "r-1", "status": "COMMITTED", "decision": "reject", "created_at": 5}"#;
        let kept = action(kept).unwrap();
        assert_eq!(kept.request_id.as_str(), "r-1");
        assert_eq!(kept.status, Status::Committed);
        assert_eq!(kept.decision, Some(crate::protocol::Decision::Reject));
        let unknown = action(r#"{"request_id": "r-1", "status": 5}"#).unwrap();
        assert_eq!(unknown.status, Status::Other);
        let digest = "0".repeat(64);
        let json = format!(r#"{{"request_id": "r", "status": "x", "digest": "{digest}"}}"#);
        assert_eq!(action(&json).unwrap().digest, digest.parse().ok());
        assert!(action(r#"{"request_id": "r-1", "decision": "reject"}"#).is_none());
        assert!(action(r#"{"status": "COMMITTED"}"#).is_none());
    }

    #[test]
    fn an_answer_that_is_cut_off_in_a_character_has_the_members_before() {
        let whole = "{\"decision\": \"reject\", \"title\": \"\u{e9}".as_bytes();
        let cut_off = &whole[..whole.len() - 1];
        let view = View::so_far(cut_off).unwrap();
        assert!(view.decision.is("reject"));
        assert!(View::of(cut_off).is_none());
    }

    #[test]
    fn a_value_is_cut_off_from_its_first_character_on() {
        for (body, is_cut_off) in [
            (r#"{"decision": "reject", "title": "x"#, false),
            (r#"{"decision": "reject", "#, false),
            (r#"{"decision":"#, false),
            (r#"{"decision" : "#, false),
            (r#"{"decision": ""#, true),
            (r#"{"decision": n"#, true),
            (r#"{"tenant_id": "a:"#, true),
            (r#"{"tenant_id": "\":"#, true),
            (r#"{"action": {"decision":"#, true),
            (r#"{"action": {"decision": "reject"}"#, false),
        ] {
            let view = View::so_far(body.as_bytes()).unwrap();
            assert_eq!(view.is_cut_off, is_cut_off, "{body}");
        }
    }

    #[test]
    fn an_answer_that_is_not_utf_8_is_not_read_in_part_either() {
        for body in [
            &b"{\"decision\": \"reject\", \"title\": \"\xff"[..],
            b"{\"title\": \"\xff\", \"decision\": \"reject\"",
            b"\xff",
            b"{}\xc3",
        ] {
            assert!(View::so_far(body).is_none());
            assert!(View::of(body).is_none());
        }
    }
}
