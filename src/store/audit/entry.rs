//! What a link covers of an event.

use std::borrow::Cow;
use std::fmt::Write;

use jiff::Timestamp;
use uuid::Uuid;

use crate::protocol::{hex, write_json_string};

/// What an event says that never changes later. What is missing is left out.
///
/// It must be the same whenever it is read, so it has nothing of the action but what identifies it,
/// and, in the event of the submission, what the submission says.
#[derive(Debug, Clone)]
pub(crate) struct Entry<'a> {
    /// The number of the link in the tenant's chain.
    pub(crate) seq: u64,
    pub(crate) tenant_id: Cow<'a, str>,
    pub(crate) id: Cow<'a, [u8]>,
    pub(crate) kind: Cow<'a, str>,
    /// Times are microseconds since 1970, UTC.
    pub(crate) at: i64,
    pub(crate) actor: Cow<'a, str>,
    pub(crate) call_id: Option<Cow<'a, str>>,
    pub(crate) from_status: Option<Cow<'a, str>>,
    pub(crate) to_status: Cow<'a, str>,
    pub(crate) decision: Option<Cow<'a, str>>,
    pub(crate) execution: Option<Cow<'a, str>>,
    pub(crate) digest: Option<Cow<'a, [u8]>>,
    pub(crate) request_id: Option<Cow<'a, [u8]>>,
    pub(crate) thread_id: Option<Cow<'a, str>>,
    pub(crate) idempotency_key: Option<Cow<'a, str>>,
    pub(crate) title: Option<Cow<'a, str>>,
    pub(crate) expires_at: Option<i64>,
    pub(crate) allow_edit: Option<bool>,
}

impl Entry<'_> {
    /// Writes the entry as canonical JSON.
    pub(crate) fn write(&self, out: &mut String) {
        let start = out.len();
        let mut object = Object(out);
        // In the order of the names.
        object.text("actor", Some(&self.actor));
        object.bare("allow_edit", self.allow_edit);
        object.time("at", Some(self.at));
        object.text("call_id", self.call_id.as_deref());
        object.text("decision", self.decision.as_deref());
        object.text("digest", self.digest.as_deref().map(hex).as_deref());
        object.text("execution", self.execution.as_deref());
        object.time("expires_at", self.expires_at);
        object.text("from_status", self.from_status.as_deref());
        object.id("id", Some(&self.id));
        object.text("idempotency_key", self.idempotency_key.as_deref());
        object.id("request_id", self.request_id.as_deref());
        object.bare("seq", Some(self.seq));
        object.text("tenant_id", Some(&self.tenant_id));
        object.text("thread_id", self.thread_id.as_deref());
        object.text("title", self.title.as_deref());
        object.text("to_status", Some(&self.to_status));
        let kind = format!("action.{}", self.kind);
        object.text("type", Some(&kind));
        out.replace_range(start..=start, "{");
        out.push('}');
    }
}

/// Writes members, each behind a comma.
struct Object<'a>(&'a mut String);

impl Object<'_> {
    fn name(&mut self, name: &str) {
        self.0.push_str(",\"");
        self.0.push_str(name);
        self.0.push_str("\":");
    }

    fn text(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.name(name);
            write_json_string(value, self.0);
        }
    }

    fn bare(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.name(name);
            // Writing to a string does not fail.
            let _ = write!(self.0, "{value}");
        }
    }

    /// A time as RFC 3339, always with six digits behind the point. One that only an edit by hand
    /// can have written may be beyond that, and stays a number.
    fn time(&mut self, name: &str, value: Option<i64>) {
        match value.map(Timestamp::from_microsecond) {
            Some(Ok(time)) => {
                self.name(name);
                let _ = write!(self.0, "\"{time:.6}\"");
            }
            _ => self.bare(name, value),
        }
    }

    fn id(&mut self, name: &str, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.name(name);
            let _ = match Uuid::from_slice(value) {
                Ok(id) => write!(self.0, "\"{id}\""),
                Err(_) => write!(self.0, "\"{}\"", hex(value)),
            };
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::protocol::canonical_json;

    pub(in crate::store::audit) fn entry(seq: u64, title: &str) -> Entry<'_> {
        Entry {
            seq,
            tenant_id: "acme".into(),
            id: vec![1; 16].into(),
            kind: "submitted".into(),
            at: 1_700_000_000_000_000,
            actor: "agent-7".into(),
            call_id: Some("call-1".into()),
            from_status: None,
            to_status: "PENDING".into(),
            decision: Some("approve".into()),
            execution: Some("claimed".into()),
            digest: Some(vec![0xab; 32].into()),
            request_id: Some(vec![2; 16].into()),
            thread_id: Some("run-7".into()),
            idempotency_key: Some("k-1".into()),
            title: Some(title.into()),
            expires_at: Some(1_700_000_000_000_001),
            allow_edit: Some(true),
        }
    }

    fn text(entry: &Entry<'_>) -> String {
        let mut text = String::from("before");
        entry.write(&mut text);
        text.strip_prefix("before").unwrap().to_owned()
    }

    #[test]
    fn an_entry_is_canonical_json_with_all_of_its_members() {
        let entry = entry(7, "T");
        let written = text(&entry);
        assert_eq!(
            written,
            "{\"actor\":\"agent-7\",\"allow_edit\":true,\"at\":\"2023-11-14T22:13:20.000000Z\",\
             \"call_id\":\"call-1\",\"decision\":\"approve\",\"digest\":\"abababababababababababab\
             abababababababababababababababababababab\",\"execution\":\"claimed\",\
             \"expires_at\":\"2023-11-14T22:13:20.000001Z\",\
             \"id\":\"01010101-0101-0101-0101-010101010101\",\"idempotency_key\":\"k-1\",\
             \"request_id\":\"02020202-0202-0202-0202-020202020202\",\"seq\":7,\
             \"tenant_id\":\"acme\",\"thread_id\":\"run-7\",\"title\":\"T\",\
             \"to_status\":\"PENDING\",\"type\":\"action.submitted\"}"
        );
        assert_eq!(canonical_json(&written).unwrap(), written);
    }

    #[test]
    fn strange_values_are_written_as_canonical_json_too() {
        let titles = [
            "\u{2028}\u{2029}\u{feff}\u{202e}\u{7f}\u{0}\u{1f}\u{8}\t\n\u{c}\r\"\\/",
            "\\u0041 \\ud83d",
            "😀é",
            "",
        ];
        for title in titles {
            for at in [i64::MIN, -1, 0, 1, i64::MAX] {
                let mut strange = entry(u64::MAX, title);
                strange.at = at;
                strange.id = vec![9; 3].into();
                strange.actor = title.into();
                let written = text(&strange);
                assert_eq!(canonical_json(&written).unwrap(), written);
                let parsed: serde_json::Value = serde_json::from_str(&written).unwrap();
                assert_eq!(parsed["title"], title);
                assert_eq!(parsed["seq"], u64::MAX);
            }
        }
    }
}
