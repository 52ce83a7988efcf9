//! A request body: its payload, the payload's fingerprint, and its metadata.

use std::fmt;
use std::time::SystemTime;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::fingerprint::{Fingerprint, Json, RESERVED, take_reserved, write_json_string};
use super::{Escaped, Payload};

/// The most characters that a comment may have.
pub(crate) const MAX_COMMENT_LEN: usize = 4096;

/// The most characters that a title may have.
pub(crate) const MAX_TITLE_LEN: usize = 256;

/// A request body, parsed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Body {
    /// The payload with its fingerprint; `None` for `{}` and for no body.
    pub(crate) payload: Option<(Payload, Fingerprint)>,
    pub(crate) metadata: Metadata,
}

/// What the reserved member says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// The reviewer's comment, on a decision.
    pub(crate) comment: Option<String>,
    /// A line for people, on a submission.
    pub(crate) title: Option<String>,
    /// When the action expires, on a submission.
    pub(crate) expires_at: Option<SystemTime>,
    /// Whether the reviewer may edit the payload, on a submission.
    pub(crate) allow_edit: Option<bool>,
}

impl Body {
    /// Parses a body: empty, or one JSON object without repeated members.
    ///
    /// # Errors
    ///
    /// Returns a sentence that says what is wrong with the body.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let bytes = bytes.trim_ascii();
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let json: Json = serde_json::from_slice(bytes)
            .map_err(|error| format!("the body is not valid JSON: {error}"))?;
        let Json::Object(mut members) = json else {
            return Err(format!(
                "the body is {}; allowed is a JSON object",
                json.kind()
            ));
        };
        let reserved = take_reserved(&mut members);
        let metadata = match &reserved {
            Some(reserved) => Metadata::parse(reserved)?,
            None => Metadata::default(),
        };
        if members.is_empty() {
            return Ok(Self {
                payload: None,
                metadata,
            });
        }
        let fingerprint = Fingerprint::of(&Json::Object(members));
        let payload = text_without_reserved(bytes, reserved.is_some())
            .map_err(|error| format!("the body is not valid JSON: {error}"))?;
        Ok(Self {
            payload: Some((payload, fingerprint)),
            metadata,
        })
    }
}

/// Computes the fingerprint of a payload that a reviewer edited.
///
/// # Errors
///
/// Returns a sentence that says what is wrong with the payload. The reserved member is refused: the
/// same payload by key would lose it, and be another one.
pub(crate) fn edited(payload: Payload) -> Result<(Payload, Fingerprint), String> {
    let json: Json = serde_json::from_str(payload.as_str()).map_err(|error| error.to_string())?;
    if let Json::Object(members) = &json
        && members.iter().any(|(name, _)| name == RESERVED)
    {
        return Err(format!("it has the reserved member '{RESERVED}'"));
    }
    let fingerprint = Fingerprint::of(&json);
    Ok((payload, fingerprint))
}

impl Metadata {
    fn parse(reserved: &Json) -> Result<Self, String> {
        let fault = |what: &str| format!("the reserved member '{RESERVED}' {what}");
        let Json::Object(members) = reserved else {
            let kind = format!("is {}; allowed is an object", reserved.kind());
            return Err(fault(&kind));
        };
        let mut metadata = Self::default();
        for (name, value) in members {
            match (name.as_str(), value) {
                ("comment", value) => {
                    metadata.comment = Some(comment(value).map_err(|what| fault(&what))?);
                }
                ("title", Json::String(text))
                    if (1..=MAX_TITLE_LEN).contains(&text.chars().count()) =>
                {
                    metadata.title = Some(text.clone());
                }
                ("title", _) => {
                    return Err(fault(&format!(
                        "has a title that is not a string of 1 to {MAX_TITLE_LEN} characters"
                    )));
                }
                ("expires_at", value) => {
                    let time = time(value).ok_or_else(|| {
                        fault("has an 'expires_at' that is not an RFC 3339 time with a zone")
                    })?;
                    metadata.expires_at = Some(time);
                }
                ("allow_edit", Json::Bool(allow)) => metadata.allow_edit = Some(*allow),
                ("allow_edit", _) => {
                    return Err(fault("has an 'allow_edit' that is not true or false"));
                }
                (name, _) => {
                    let name: String = name.chars().take(64).collect();
                    return Err(fault(&format!(
                        "has the unknown member '{}'; allowed are 'comment' on a decision, and \
                         'title', 'expires_at' and 'allow_edit' on a submission",
                        Escaped::line(&name)
                    )));
                }
            }
        }
        Ok(metadata)
    }

    /// Whether this is what only a submission may say.
    pub(crate) fn is_of_a_submission(&self) -> bool {
        self.title.is_some() || self.expires_at.is_some() || self.allow_edit.is_some()
    }
}

fn comment(value: &Json) -> Result<String, String> {
    match value {
        Json::String(text) => limited_comment(text).map(str::to_owned),
        _ => Err("has a comment that is not a string".to_owned()),
    }
}

/// Refuses a comment that is too long.
pub(crate) fn limited_comment(text: &str) -> Result<&str, String> {
    if text.chars().count() <= MAX_COMMENT_LEN {
        Ok(text)
    } else {
        Err(format!(
            "has a comment of more than {MAX_COMMENT_LEN} characters"
        ))
    }
}

fn time(value: &Json) -> Option<SystemTime> {
    let Json::String(text) = value else {
        return None;
    };
    text.parse::<jiff::Timestamp>().ok()?.try_into().ok()
}

/// Returns the payload as it was sent, without the reserved member, so that what a person approves
/// is kept digit for digit.
fn text_without_reserved(bytes: &[u8], has_reserved: bool) -> Result<Payload, serde_json::Error> {
    let raw: &RawValue = serde_json::from_slice(bytes)?;
    if !has_reserved {
        return Payload::from_json(raw.get());
    }
    let Members(members) = serde_json::from_str(raw.get())?;
    let mut text = String::with_capacity(bytes.len());
    for (name, value) in members.iter().filter(|(name, _)| name != RESERVED) {
        text.push(if text.is_empty() { '{' } else { ',' });
        write_json_string(name, &mut text);
        text.push(':');
        text.push_str(value.get());
    }
    text.push('}');
    Payload::from_json(&text)
}

/// An object's members, in the order and spelling that was sent.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;

        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(MembersVisitor).map(Members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_object_and_no_body_are_no_payload() {
        for text in [
            "",
            "  \r\n",
            "{}",
            " { } ",
            r#"{"aegis":{}}"#,
            r#"{"aegis":{"comment":"ok"}}"#,
        ] {
            assert_eq!(
                Body::parse(text.as_bytes()).unwrap().payload,
                None,
                "{text}"
            );
        }
    }

    #[test]
    fn the_comment_is_no_part_of_the_payload() {
        let plain = Body::parse(br#"{"to": "a@b.c", "n": 1.50}"#).unwrap();
        let commented =
            Body::parse(br#"{"to": "a@b.c", "aegis": {"comment": "fine"}, "n": 1.50}"#).unwrap();
        assert_eq!(commented.metadata.comment.as_deref(), Some("fine"));
        assert_eq!(
            plain.payload.unwrap().1,
            commented.payload.clone().unwrap().1
        );
        assert_eq!(
            commented.payload.unwrap().0.as_str(),
            r#"{"to":"a@b.c","n":1.50}"#
        );
    }

    #[test]
    fn what_is_not_one_unambiguous_object_is_refused_by_name() {
        let deep = "[".repeat(200) + &"]".repeat(200);
        let cases = [
            ("{", "the body is not valid JSON: EOF"),
            ("[1]", "the body is an array; allowed is a JSON object"),
            ("7", "the body is a number; allowed is a JSON object"),
            (
                r#"{"a":1,"a":2}"#,
                "the body is not valid JSON: an object has two members of the same name",
            ),
            (
                r#"{"a":{"b":1,"b":2}}"#,
                "the body is not valid JSON: an object has two members",
            ),
            (r#"{"a":"\ud800"}"#, "the body is not valid JSON"),
            (
                r#"{"a":1e999}"#,
                "the body is not valid JSON: number out of range",
            ),
            (
                &format!(r#"{{"a":{deep}}}"#),
                "the body is not valid JSON: recursion limit exceeded",
            ),
            (r#"{"aegis":1}"#, "the reserved member 'aegis' is a number"),
            (
                r#"{"aegis":{"comment":1}}"#,
                "the reserved member 'aegis' has a comment that is not a string",
            ),
            (
                r#"{"aegis":{"who":"me"}}"#,
                "the reserved member 'aegis' has the unknown member 'who'; allowed are 'comment'",
            ),
        ];
        for (text, message) in cases {
            let error = Body::parse(text.as_bytes()).unwrap_err();
            assert!(error.starts_with(message), "{text}: {error}");
        }
        assert!(Body::parse(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn the_metadata_of_a_submission_is_read() {
        let body = Body::parse(
            br#"{"n":1,"aegis":{"title":"Pay","expires_at":"2030-01-02T03:04:05Z","allow_edit":true}}"#,
        )
        .unwrap();
        let metadata = body.metadata;
        assert!(metadata.is_of_a_submission());
        assert_eq!(metadata.title.as_deref(), Some("Pay"));
        assert_eq!(metadata.allow_edit, Some(true));
        let unix = std::time::Duration::from_secs(1_893_553_445);
        assert_eq!(metadata.expires_at, Some(std::time::UNIX_EPOCH + unix));
        for (member, message) in [
            (r#""title":"""#, "a title that is not a string of 1 to 256"),
            (r#""title":7"#, "a title that is not a string of 1 to 256"),
            (r#""expires_at":"soon""#, "not an RFC 3339 time"),
            (r#""expires_at":"2030-01-02T03:04:05""#, "with a zone"),
            (r#""expires_at":1893553445"#, "not an RFC 3339 time"),
            (r#""allow_edit":"yes""#, "not true or false"),
        ] {
            let text = format!(r#"{{"aegis":{{{member}}}}}"#);
            let error = Body::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
