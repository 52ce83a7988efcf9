//! The messages: an event as a signed webhook, or as a notification.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::Full;
use serde::Serialize;
use serde_json::json;

use super::endpoint::{Endpoint, Form, PublicUrl};
use super::sign::Secret;
use crate::protocol::{Action, Escaped, Event, EventKind, entry, rfc3339};

/// The most characters of a name or title in a notification.
const MAX_TEXT: usize = 200;

/// The message of an event to an endpoint, at this time.
///
/// # Errors
///
/// Says in a few words why there can be none.
pub(super) fn message(
    endpoint: &Endpoint,
    public_url: Option<&PublicUrl>,
    event: &Event,
    now: SystemTime,
) -> Result<Request<Full<Bytes>>, &'static str> {
    let mut headers = HeaderMap::new();
    let body = match &endpoint.form {
        Form::Standard(secrets) => standard(secrets, event, now, &mut headers),
        Form::Slack => slack(public_url, event, &mut headers),
        Form::Ntfy => ntfy(public_url, event, &mut headers),
    };
    let body = body.ok_or("no message can be made of the event")?;
    let agent = concat!("aegis/", env!("CARGO_PKG_VERSION"));
    headers.insert(USER_AGENT, HeaderValue::from_static(agent));
    let mut request = Request::new(Full::from(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = endpoint.url.clone();
    *request.headers_mut() = headers;
    Ok(request)
}

/// The envelope of Standard Webhooks.
#[derive(Serialize)]
struct Envelope<'a> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(with = "rfc3339")]
    timestamp: Option<SystemTime>,
    data: &'a Event,
}

fn standard(
    secrets: &[Secret],
    event: &Event,
    now: SystemTime,
    headers: &mut HeaderMap,
) -> Option<String> {
    let mut event = event.clone();
    event.action = event.action.map(|action| Box::new(entry(*action)));
    let body = serde_json::to_string(&Envelope {
        kind: format!("action.{}", event.kind),
        timestamp: event.at,
        data: &event,
    });
    let body = body.ok()?;
    let id = event.id.as_str();
    let timestamp = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let signatures: Option<Vec<_>> = secrets
        .iter()
        .map(|secret| secret.sign(id, timestamp, body.as_bytes()))
        .collect();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("webhook-id", HeaderValue::from_str(id).ok()?);
    headers.insert("webhook-timestamp", timestamp.into());
    let signatures = signatures?.join(" ");
    headers.insert("webhook-signature", signatures.parse().ok()?);
    Some(body)
}

/// A message for an incoming webhook of Slack. It holds no markup.
fn slack(public_url: Option<&PublicUrl>, event: &Event, headers: &mut HeaderMap) -> Option<String> {
    let text = format!("{}\n{}", notice(event)?, public_url?.page(event)?);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Some(json!({ "text": text, "mrkdwn": false, "unfurl_links": false }).to_string())
}

/// A message for a topic of ntfy.
fn ntfy(public_url: Option<&PublicUrl>, event: &Event, headers: &mut HeaderMap) -> Option<String> {
    let page = public_url?.page(event)?;
    let content = HeaderValue::from_static("text/plain; charset=utf-8");
    headers.insert(CONTENT_TYPE, content);
    headers.insert("title", HeaderValue::from_static(what_happened(event.kind)));
    headers.insert("click", page.parse().ok()?);
    headers.insert("markdown", HeaderValue::from_static("no"));
    notice(event)
}

fn what_happened(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Submitted => "Approval requested",
        EventKind::Approved => "Approved",
        EventKind::Rejected => "Rejected",
        EventKind::Expired => "Expired without a decision",
        EventKind::Cancelled => "Cancelled",
        EventKind::Claimed => "Being carried out",
        EventKind::Completed => "Carried out",
        EventKind::Failed => "Failed, needs a new decision",
        EventKind::ClaimLost => "Outcome unknown, needs a new decision",
        EventKind::Other => "Changed",
    }
}

/// What a notification says of an event: nothing of the payload, and no markup.
fn notice(event: &Event) -> Option<String> {
    let action: &Action = event.action.as_ref()?;
    let title = match &action.title {
        Some(title) => plain(title),
        None => "an action without a title".to_owned(),
    };
    let text = |text: Option<&str>| plain(text.unwrap_or_default());
    Some(format!(
        "{}: {title}\ntenant {}, thread {}",
        what_happened(event.kind),
        text(action.tenant_id.as_ref().map(|tenant| tenant.as_str())),
        text(action.thread_id.as_ref().map(|thread| thread.as_str())),
    ))
}

/// Text that an agent chose, on one line, of limited length, and such that no chat takes a part of
/// it for markup, a mention or a link. What could be is shown by its fullwidth form.
fn plain(text: &str) -> String {
    let is_long = text.chars().nth(MAX_TEXT).is_some();
    let text: String = text.chars().take(MAX_TEXT).collect();
    let mut shown = String::new();
    let escaped = Escaped::line(&text).to_string();
    let mut characters = escaped.chars().peekable();
    while let Some(character) = characters.next() {
        let joins = characters.peek().is_some_and(|next| !next.is_whitespace());
        let is_markup = match character {
            // In numbers and at the end of a sentence these make no link.
            '.' => characters.peek().is_some_and(|next| next.is_alphabetic()),
            ':' | '/' => joins,
            '<' | '>' | '&' | '*' | '_' | '~' | '`' | '#' | '@' | '|' | '[' | ']' | '!' | '\\'
            | '$' => true,
            _ => false,
        };
        let fullwidth = u32::from(character).checked_add(0xfee0);
        match fullwidth.and_then(char::from_u32).filter(|_| is_markup) {
            Some(fullwidth) => shown.push(fullwidth),
            None => shown.push(character),
        }
    }
    if is_long {
        shown.push('\u{2026}');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Payload, RequestId, Status};

    fn event(title: &str) -> Event {
        let id = RequestId::new("01890a5d-ac96-774b-bcce-b302099a8057").unwrap();
        let mut action = Action::new(id.clone(), Status::Pending);
        action.tenant_id = Some("acme".parse().unwrap());
        action.thread_id = Some("run_7".parse().unwrap());
        action.title = Some(title.to_owned());
        action.payload = Some(Payload::from_json(r#"{"card":"4242"}"#).unwrap());
        action.comment = Some("4242".to_owned());
        let mut event = Event::new(id, EventKind::Submitted, UNIX_EPOCH, "agent-7");
        event.action = Some(Box::new(action));
        event
    }

    async fn sent(endpoint: Endpoint, event: &Event) -> (HeaderMap, String) {
        use http_body_util::BodyExt;

        let public = PublicUrl::new("https://aegis.example.com").unwrap();
        let request = message(&endpoint, Some(&public), event, UNIX_EPOCH).unwrap();
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (parts.headers, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_notification_shows_title_and_link_and_no_payload() {
        let page = "https://aegis.example.com/actions/01890a5d-ac96-774b-bcce-b302099a8057";
        let slack = Endpoint::slack("chat", "http://h/token").unwrap();
        let (_, body) = sent(slack, &event("Pay invoice 7: 12.50 EUR.")).await;
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        let notice = "Approval requested: Pay invoice 7: 12.50 EUR.\n\
                      tenant acme, thread run\u{ff3f}7";
        assert_eq!(body["text"], format!("{notice}\n{page}"));
        let ntfy = Endpoint::ntfy("phone", "http://h/topic").unwrap();
        let (headers, body) = sent(ntfy, &event("Pay invoice 7: 12.50 EUR.")).await;
        assert_eq!(body, notice);
        assert_eq!(headers["click"], page);
        assert_eq!(headers["title"], "Approval requested");
        assert!(!format!("{headers:?}{body}").contains("4242"));
    }

    #[tokio::test]
    async fn a_title_cannot_pass_for_markup_a_link_or_another_line() {
        let title = "<!channel> <https://evil.example|Approve> *bold* @here www.evil.example \
                     [x](http://evil.example) `c` &lt; \u{202e}cod\n2nd";
        for endpoint in [
            Endpoint::slack("chat", "http://h/").unwrap(),
            Endpoint::ntfy("phone", "http://h/").unwrap(),
        ] {
            let (_, body) = sent(endpoint, &event(title)).await;
            let shown = body.split("tenant").next().unwrap();
            for forged in [
                "<", ">", "*", "@", "`", "&", "[", "://", ".evil", "evil.", "\u{202e}", "\\u",
            ] {
                assert!(!shown.contains(forged), "{forged}: {shown}");
            }
            // JSON has one escaped line break there.
            assert!(
                !shown.trim_end().trim_end_matches("\\n").contains("\\n"),
                "{shown}"
            );
            assert!(!shown.trim_end().contains('\n'), "{shown}");
        }
        let (_, body) = sent(
            Endpoint::ntfy("phone", "http://h/").unwrap(),
            &event(&"a".repeat(100_000)),
        )
        .await;
        assert!(body.len() < 1000);
    }

    #[tokio::test]
    async fn the_body_of_a_webhook_is_the_event_in_an_envelope() {
        let secret: Secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse().unwrap();
        let standard = Endpoint::standard("a", "http://h/", vec![secret]).unwrap();
        let (headers, body) = sent(standard, &event("T")).await;
        let mut data = event("T");
        data.action = data.action.map(|action| Box::new(entry(*action)));
        let data = serde_json::to_string(&data).unwrap();
        let expected = format!(
            r#"{{"type":"action.submitted","timestamp":"1970-01-01T00:00:00Z","data":{data}}}"#
        );
        assert_eq!(body, expected);
        assert!(!body.contains("4242"));
        assert_eq!(
            headers["webhook-id"],
            "01890a5d-ac96-774b-bcce-b302099a8057"
        );
        assert_eq!(headers["webhook-timestamp"], "0");
    }
}
