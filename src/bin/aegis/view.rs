//! Actions and events, for people. Whatever others wrote is escaped.

use std::time::SystemTime;

use aegis_hitl::Action;
use aegis_hitl::protocol::{Closed, Escaped, Event};
use comfy_table::{Table, presets};

/// Shows all that is known of an action, a line each.
pub(crate) fn action(action: &Action) -> String {
    let text = |text: &Option<String>| text.as_ref().map(|text| format!("\"{text}\""));
    let decision = action
        .decision
        .map_or_else(|| "-".to_owned(), |decision| decision.to_string());
    let rows = [
        ("request id", Some(action.request_id.to_string())),
        ("title", text(&action.title)),
        ("status", Some(action.status.to_string())),
        ("decision", Some(decision)),
        ("closed", action.closed.map(|closed| closed.to_string())),
        (
            "execution",
            action.execution.map(|execution| execution.to_string()),
        ),
        ("tenant", action.tenant_id.as_ref().map(ToString::to_string)),
        ("thread", action.thread_id.as_ref().map(ToString::to_string)),
        (
            "key",
            action.idempotency_key.as_ref().map(ToString::to_string),
        ),
        ("created", action.created_at.map(time)),
        ("expires", action.expires_at.map(time)),
        ("decided", action.decided_at.map(time)),
        ("decided by", action.decided_by.clone()),
        ("comment", text(&action.comment)),
        (
            "payload",
            action.payload.as_ref().map(|json| json.as_str().to_owned()),
        ),
        (
            "edited payload",
            action
                .edited_payload
                .as_ref()
                .map(|json| json.as_str().to_owned()),
        ),
        (
            "may be edited",
            action
                .allow_edit
                .map(|allow| if allow { "yes" } else { "no" }.to_owned()),
        ),
        ("digest", action.digest.map(|digest| digest.to_string())),
        (
            "result",
            action.result.as_ref().map(|json| json.as_str().to_owned()),
        ),
        ("reason", text(&action.reason)),
    ];
    let row = |(name, value): (&str, Option<String>)| {
        Some(format!("{name}: {}\n", Escaped::line(&value?)))
    };
    let mut shown: String = rows.into_iter().filter_map(row).collect();
    for happened in action.history.iter().flatten() {
        shown.push_str(&format!("history: {}\n", event(happened)));
    }
    shown
}

/// Shows an event in a line.
pub(crate) fn event(event: &Event) -> String {
    let at = event.at.map_or_else(|| "-".to_owned(), time);
    let line = format!("{at} {} by {}", event.kind, event.actor);
    Escaped::line(&line).to_string()
}

/// Shows where an action stands, in a word or two.
fn standing(action: &Action) -> String {
    match (action.closed, action.execution, action.decision) {
        (Some(Closed::Expired), ..) => "expired".to_owned(),
        (Some(closed), ..) => closed.to_string(),
        (_, Some(execution), _) => execution.to_string(),
        (_, _, Some(decision)) => match decision {
            aegis_hitl::Decision::Approve => "approved, not picked up".to_owned(),
            aegis_hitl::Decision::Reject => "rejected".to_owned(),
        },
        (None, None, None) => "pending".to_owned(),
    }
}

/// Shows actions as a table.
pub(crate) fn table(actions: &[Action]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["REQUEST ID", "AGE", "STANDS", "THREAD", "KEY", "TITLE"]);
    let now = SystemTime::now();
    for action in actions {
        let text = |text: Option<String>| {
            let text = text.unwrap_or_else(|| "-".to_owned());
            Escaped::line(&text).to_string()
        };
        table.add_row([
            text(Some(action.request_id.to_string())),
            action
                .created_at
                .map_or_else(|| "-".to_owned(), |at| age(at, now)),
            standing(action),
            text(action.thread_id.as_ref().map(ToString::to_string)),
            text(action.idempotency_key.as_ref().map(ToString::to_string)),
            text(action.title.clone()),
        ]);
    }
    let lines = table.to_string();
    lines
        .lines()
        .map(|line| format!("{}\n", line.trim()))
        .collect()
}

fn age(at: SystemTime, now: SystemTime) -> String {
    let seconds = now.duration_since(at).map_or(0, |age| age.as_secs());
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

pub(crate) fn time(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "-".to_owned(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_age_is_shown_in_its_largest_unit() {
        let at = SystemTime::UNIX_EPOCH;
        for (seconds, shown) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (7200, "2h"),
            (200_000, "2d"),
        ] {
            assert_eq!(age(at, at + Duration::from_secs(seconds)), shown);
        }
        assert_eq!(age(at + Duration::from_secs(5), at), "0s");
    }
}
