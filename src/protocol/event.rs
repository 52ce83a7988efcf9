//! Events: the transitions of actions.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::action::{rfc3339, words};
use super::{Action, Decision, RequestId, UnknownName};

/// The kind of a transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// The action was submitted: `submitted`.
    Submitted,
    /// It was approved: `approved`.
    Approved,
    /// It was rejected: `rejected`.
    Rejected,
    /// Nobody decided in time: `expired`.
    Expired,
    /// Its submitter withdrew it: `cancelled`.
    Cancelled,
    /// An executor claimed it: `claimed`.
    Claimed,
    /// The claimant reported success: `completed`.
    Completed,
    /// The claimant reported failure: `failed`.
    Failed,
    /// The claim's lease ended with no report: `claim-lost`.
    ClaimLost,
    /// A word from another server that this version does not know.
    Other,
}

words!(EventKind, "event",
    "'submitted', 'approved', 'rejected', 'expired', 'cancelled', 'claimed', 'completed', 'failed' and \
     'claim-lost'", {
    Submitted => "submitted",
    Approved => "approved",
    Rejected => "rejected",
    Expired => "expired",
    Cancelled => "cancelled",
    Claimed => "claimed",
    Completed => "completed",
    Failed => "failed",
    ClaimLost => "claim-lost",
}, other: Other);

impl From<Decision> for EventKind {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Approve => Self::Approved,
            Decision::Reject => Self::Rejected,
        }
    }
}

/// A transition of an action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Event {
    /// The event's own id, the same at each delivery.
    pub id: RequestId,
    /// What happened. On the wire it follows `action.`.
    #[serde(rename = "type", with = "dotted")]
    pub kind: EventKind,
    /// When it happened.
    #[serde(default, with = "rfc3339")]
    pub at: Option<SystemTime>,
    /// The owner of the credential that caused it, or `system:` and what did.
    #[serde(default)]
    pub actor: String,
    /// The action, with the state that the event left it in. In a
    /// [history](Action::history) it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<Box<Action>>,
}

impl Event {
    /// Makes an event without an action.
    pub fn new(id: RequestId, kind: EventKind, at: SystemTime, actor: impl Into<String>) -> Self {
        Self {
            id,
            kind,
            at: Some(at),
            actor: actor.into(),
            action: None,
        }
    }
}

/// The kind of an event behind `action.`.
mod dotted {
    use super::*;

    pub(super) fn serialize<S: Serializer>(
        kind: &EventKind,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("action.{kind}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<EventKind, D::Error> {
        let text = Value::deserialize(deserializer)?;
        let word = text.as_str().and_then(|text| text.strip_prefix("action."));
        let known = word.and_then(|word| word.parse().ok());
        Ok(known.unwrap_or(EventKind::Other))
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn an_event_has_the_shape_of_the_protocol() {
        let id = RequestId::new("e-1").unwrap();
        let event = Event::new(id, EventKind::ClaimLost, UNIX_EPOCH, "system:lease");
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(
            json,
            r#"{"id":"e-1","type":"action.claim-lost","at":"1970-01-01T00:00:00Z","actor":"system:lease"}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event);
    }

    #[test]
    fn an_unknown_event_is_read_as_far_as_it_is_known() {
        for kind in ["\"action.escalated\"", "\"approved\"", "7", "null"] {
            let json = format!(r#"{{"id":"e-1","type":{kind}}}"#);
            let event: Event = serde_json::from_str(&json).unwrap();
            assert_eq!((event.kind, event.at), (EventKind::Other, None), "{kind}");
        }
    }
}
