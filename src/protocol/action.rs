//! The action: one thing that an agent wants to do, and what became of it.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Digest, Escaped, Event, IdempotencyKey, RequestId, TenantId, ThreadId};

/// A name outside of a closed set, such as `"aprove"` instead of `approve` or `reject`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownName {
    what: &'static str,
    name: String,
    allowed: &'static str,
}

impl UnknownName {
    pub(crate) fn new(what: &'static str, name: &str, allowed: &'static str) -> Self {
        Self {
            what,
            name: name.to_owned(),
            allowed,
        }
    }
}

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name: String = self.name.chars().take(64).collect();
        write!(
            f,
            "unknown {} '{}'; allowed are {}",
            self.what,
            Escaped::line(&name),
            self.allowed
        )
    }
}

impl std::error::Error for UnknownName {}

/// Defines an enum whose variants are words on the wire. With `other`, deserializing accepts
/// unknown words. Parsing from text, as from an option or a query, never does.
macro_rules! words {
    ($type:ident, $what:literal, $allowed:literal, { $($variant:ident => $word:literal),+ $(,)? } $(, other: $other:ident)?) => {
        impl $type {
            /// Returns the word on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                    $(Self::$other => "other",)?
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $type {
            type Err = UnknownName;

            fn from_str(name: &str) -> Result<Self, Self::Err> {
                match name {
                    $($word => Ok(Self::$variant),)+
                    _ => Err($crate::protocol::UnknownName::new($what, name, $allowed)),
                }
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                // Any JSON value: one that is not a string is an unknown word too.
                let name = Value::deserialize(deserializer)?;
                let known = name.as_str().unwrap_or_default().parse();
                $(let known = known.or(Ok::<_, UnknownName>(Self::$other));)?
                known.map_err(serde::de::Error::custom)
            }
        }
    };
}

pub(crate) use words;

/// A reviewer's decision on an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The agent may proceed: `approve`.
    Approve,
    /// The agent may not proceed: `reject`.
    Reject,
}

words!(Decision, "decision", "'approve' and 'reject'", { Approve => "approve", Reject => "reject" });

impl Decision {
    /// Returns the other decision.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Approve => Self::Reject,
            Self::Reject => Self::Approve,
        }
    }
}

/// The state of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Status {
    /// Submitted, without a decision yet: `PENDING`.
    Pending,
    /// A decision is recorded durably: `COMMITTED`.
    Committed,
    /// Approved, but the execution failed or its outcome is unknown: `FAILED`. It may be decided
    /// again.
    Failed,
    /// A word from another server that this version does not know.
    Other,
}

words!(Status, "status", "'PENDING', 'COMMITTED' and 'FAILED'", {
    Pending => "PENDING",
    Committed => "COMMITTED",
    Failed => "FAILED",
}, other: Other);

/// How far the execution of an approved action has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Execution {
    /// One claimant holds the action: `claimed`.
    Claimed,
    /// The claimant reported success: `completed`.
    Completed,
    /// The claimant reported failure: `failed`.
    Failed,
    /// The claim's lease ended with no report: `unknown`.
    Unknown,
    /// A word from another server that this version does not know.
    Other,
}

words!(Execution, "execution", "'claimed', 'completed', 'failed' and 'unknown'", {
    Claimed => "claimed",
    Completed => "completed",
    Failed => "failed",
    Unknown => "unknown",
}, other: Other);

/// Why an action was closed without a reviewer's decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Closed {
    /// Nobody decided before the action's `expires_at`: `expired`.
    Expired,
    /// Its submitter withdrew it: `cancelled`.
    Cancelled,
    /// A word from another server that this version does not know.
    Other,
}

words!(Closed, "reason for closing", "'expired' and 'cancelled'", {
    Expired => "expired",
    Cancelled => "cancelled",
}, other: Other);

/// What the action is about: a JSON object, kept as the text that was sent.
///
/// `Debug` does not show it.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct Payload(Box<RawValue>);

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::object(Box::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Payload(..)")
    }
}

impl Payload {
    /// Serializes `value` into a JSON object.
    ///
    /// # Errors
    ///
    /// If `value` cannot be serialized, or does not become an object.
    pub fn new<T: Serialize + ?Sized>(value: &T) -> Result<Self, serde_json::Error> {
        Self::object(serde_json::value::to_raw_value(value)?)
    }

    /// Returns the JSON text, without a copy.
    #[cfg(feature = "client")]
    pub(crate) fn into_bytes(self) -> bytes::Bytes {
        Box::<str>::from(self.0).into_boxed_bytes().into()
    }

    /// Parses a JSON object from text.
    ///
    /// # Errors
    ///
    /// If `text` is not JSON, or not an object.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        Self::object(serde_json::from_str(text.trim())?)
    }

    fn object(raw: Box<RawValue>) -> Result<Self, serde_json::Error> {
        if raw.get().starts_with('{') {
            Ok(Self(raw))
        } else {
            Err(serde::de::Error::custom("the payload is not a JSON object"))
        }
    }

    /// Returns the JSON text.
    pub fn as_str(&self) -> &str {
        self.0.get()
    }

    /// Deserializes the payload.
    ///
    /// # Errors
    ///
    /// If the payload does not have the shape of a `T`.
    pub fn parse<'de, T: Deserialize<'de>>(&'de self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.as_str())
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Payload {}

/// The result of an action: any JSON value, kept as the text that was sent.
///
/// `Debug` does not show it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JsonText(Box<RawValue>);

impl JsonText {
    /// Serializes `value`.
    ///
    /// # Errors
    ///
    /// If `value` cannot be serialized.
    pub fn new<T: Serialize + ?Sized>(value: &T) -> Result<Self, serde_json::Error> {
        serde_json::value::to_raw_value(value).map(Self)
    }

    /// Parses a JSON value from text.
    ///
    /// # Errors
    ///
    /// If `text` is not JSON.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text.trim()).map(Self)
    }

    /// Returns the JSON text.
    pub fn as_str(&self) -> &str {
        self.0.get()
    }

    /// Deserializes the value.
    ///
    /// # Errors
    ///
    /// If the value does not have the shape of a `T`.
    pub fn parse<'de, T: Deserialize<'de>>(&'de self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.as_str())
    }
}

impl fmt::Debug for JsonText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JsonText(..)")
    }
}

impl PartialEq for JsonText {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for JsonText {}

/// An action as the server has it on record.
///
/// Its identity is tenant, thread and idempotency key. The status shown to a caller without
/// credentials has only the id, the state and the times. Answers to decisions and lists leave out
/// the members from `title` on. `Debug` shows none of what people or agents wrote.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Action {
    /// The server's id for the action.
    pub request_id: RequestId,
    /// The tenant that the action belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<TenantId>,
    /// The conversation or agent run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<ThreadId>,
    /// The idempotency key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<IdempotencyKey>,
    /// The state.
    pub status: Status,
    /// The decision on record. An unknown word reads as `None`.
    #[serde(default, deserialize_with = "known_decision")]
    pub decision: Option<Decision>,
    /// Why nobody decided. The decision is then [`Decision::Reject`].
    #[serde(default)]
    pub closed: Option<Closed>,
    /// How far the execution has come.
    #[serde(default)]
    pub execution: Option<Execution>,
    /// The digest of what is to be run: of the payload, or of the payload as the reviewer edited
    /// it. Text that is no digest reads as `None`.
    #[serde(default, deserialize_with = "known_digest")]
    pub digest: Option<Digest>,
    /// When the server first recorded the action.
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub created_at: Option<SystemTime>,
    /// When the decision was recorded.
    #[serde(default, with = "rfc3339")]
    pub decided_at: Option<SystemTime>,
    /// The owner of the credential that decided, or `system:expiry`.
    #[serde(default)]
    pub decided_by: Option<String>,
    /// Whether this answer repeats the one recorded for the same call.
    #[serde(default)]
    pub replayed: bool,
    /// What the action is about, in a line for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// What the action is about, as it was submitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<Payload>,
    /// The payload as the reviewer edited it. This is what is to be run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edited_payload: Option<Payload>,
    /// The reviewer's comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// What the claimant reported with its success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<JsonText>,
    /// What the claimant reported with its failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When the action expires if nobody has decided.
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<SystemTime>,
    /// Whether the reviewer may edit the payload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_edit: Option<bool>,
    /// What became of the action, oldest first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<Vec<Event>>,
}

impl fmt::Debug for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Action")
            .field("request_id", &self.request_id)
            .field("tenant_id", &self.tenant_id)
            .field("thread_id", &self.thread_id)
            .field("idempotency_key", &self.idempotency_key)
            .field("status", &self.status)
            .field("decision", &self.decision)
            .field("closed", &self.closed)
            .field("execution", &self.execution)
            .field("digest", &self.digest)
            .field("created_at", &self.created_at)
            .field("decided_at", &self.decided_at)
            .field("decided_by", &self.decided_by)
            .field("replayed", &self.replayed)
            .finish_non_exhaustive()
    }
}

impl Action {
    /// Makes an action with an id and a status, and nothing else.
    pub fn new(request_id: RequestId, status: Status) -> Self {
        Self {
            request_id,
            tenant_id: None,
            thread_id: None,
            idempotency_key: None,
            status,
            decision: None,
            closed: None,
            execution: None,
            digest: None,
            created_at: None,
            decided_at: None,
            decided_by: None,
            replayed: false,
            title: None,
            payload: None,
            edited_payload: None,
            comment: None,
            result: None,
            reason: None,
            expires_at: None,
            allow_edit: None,
            history: None,
        }
    }

    /// Leaves out what only a look at one action shows. It is what can be large.
    #[cfg(feature = "server")]
    #[must_use]
    pub(crate) fn listed(mut self) -> Self {
        self.payload = None;
        self.edited_payload = None;
        self.comment = None;
        self.result = None;
        self.reason = None;
        self.history = None;
        self
    }

    /// Returns what is to be run: the payload as the reviewer edited it, or else the payload.
    pub fn effective_payload(&self) -> Option<&Payload> {
        self.edited_payload.as_ref().or(self.payload.as_ref())
    }
}

fn known_digest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Digest>, D::Error> {
    let text = Value::deserialize(deserializer)?;
    Ok(text.as_str().and_then(|text| text.parse().ok()))
}

/// Reads a decision. An unknown word becomes `None`, because no caller can rely on it.
fn known_decision<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Decision>, D::Error> {
    let word = Value::deserialize(deserializer)?;
    Ok(word.as_str().and_then(|word| word.parse().ok()))
}

/// Times as RFC 3339 text in UTC. Other servers also write times without a zone; these are read as
/// UTC. Text that is not a time becomes `None`: no conclusion depends on a time.
pub(crate) mod rfc3339 {
    use std::time::SystemTime;

    use jiff::Timestamp;
    use jiff::civil::DateTime;
    use jiff::tz::Offset;
    use serde::{Deserialize, Deserializer, Serializer, ser};
    use serde_json::Value;

    pub(crate) fn serialize<S: Serializer>(
        time: &Option<SystemTime>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => {
                let time = Timestamp::try_from(*time).map_err(ser::Error::custom)?;
                serializer.collect_str(&time)
            }
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Ok(value.as_str().and_then(|text| {
            let time = text.parse::<Timestamp>().ok().or_else(|| {
                let time = text.parse::<DateTime>().ok()?;
                Offset::UTC.to_timestamp(time).ok()
            })?;
            SystemTime::try_from(time).ok()
        }))
    }
}

/// Leaves out what only a look at one action shows, and keeps the title.
#[cfg(feature = "server")]
pub(crate) fn entry(action: Action) -> Action {
    let mut action = action.listed();
    action.replayed = false;
    action
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn an_unknown_word_is_refused_with_the_allowed_ones() {
        assert_eq!(
            "aprove".parse::<Decision>().unwrap_err().to_string(),
            "unknown decision 'aprove'; allowed are 'approve' and 'reject'"
        );
        assert!("QUEUED".parse::<Status>().is_err());
        assert!("other".parse::<Status>().is_err());
    }

    // FastAPI writes times without a zone, and enumerations gain words.
    #[test]
    fn an_answer_is_read_as_far_as_it_is_known() {
        let read = |member: &str, value: &str| -> Action {
            let json = format!(r#"{{"request_id":"r-1","status":"COMMITTED","{member}":{value}}}"#);
            serde_json::from_str(&json).unwrap()
        };
        let status = serde_json::from_str::<Action>(r#"{"request_id":"r-1","status":"QUEUED"}"#);
        assert_eq!(status.unwrap().status, Status::Other);
        assert_eq!(
            read("execution", "\"paused\"").execution,
            Some(Execution::Other)
        );
        assert_eq!(read("decision", "\"escalate\"").decision, None);
        assert_eq!(read("something", "[1]").decision, None);
        let time = Some(UNIX_EPOCH + Duration::from_micros(1_500_000));
        for text in [
            "1970-01-01T00:00:01.5",
            "1970-01-01 00:00:01.500000",
            "1970-01-01T01:00:01.5+01:00",
        ] {
            assert_eq!(
                read("created_at", &format!("\"{text}\"")).created_at,
                time,
                "{text}"
            );
        }
        assert_eq!(read("decided_at", "\"soon\"").decided_at, None);
        assert_eq!(read("created_at", "1700000000").created_at, None);
        assert_eq!(read("decision", "1").decision, None);
        assert_eq!(read("execution", "{}").execution, Some(Execution::Other));
        assert_eq!(read("execution", "null").execution, None);
    }

    #[test]
    fn an_action_has_the_shape_of_the_protocol() {
        let mut action = Action::new(RequestId::new("r-1").unwrap(), Status::Committed);
        action.tenant_id = Some(TenantId::new("t").unwrap());
        action.thread_id = Some(ThreadId::new("h").unwrap());
        action.idempotency_key = Some(IdempotencyKey::new("k").unwrap());
        action.decision = Some(Decision::Approve);
        action.created_at = Some(UNIX_EPOCH);
        action.decided_at = Some(UNIX_EPOCH + Duration::from_micros(1_500_000));
        let json = serde_json::to_string(&action).unwrap();
        assert_eq!(
            json,
            r#"{"request_id":"r-1","tenant_id":"t","thread_id":"h","idempotency_key":"k","status":"COMMITTED","decision":"approve","closed":null,"execution":null,"digest":null,"created_at":"1970-01-01T00:00:00Z","decided_at":"1970-01-01T00:00:01.5Z","decided_by":null,"replayed":false}"#
        );
        assert_eq!(serde_json::from_str::<Action>(&json).unwrap(), action);
    }

    #[test]
    fn a_payload_is_an_object_and_keeps_its_text() {
        assert!(Payload::from_json("[1]").is_err());
        assert!(Payload::new(&7).is_err());
        let payload = Payload::from_json(" {\"n\": 123456789012345678901234567890} ").unwrap();
        assert_eq!(payload.as_str(), "{\"n\": 123456789012345678901234567890}");
    }
}
