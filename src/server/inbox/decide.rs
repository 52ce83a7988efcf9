//! `POST /actions/{id}`: a decision; and `POST /`: several approvals at once.

use std::collections::HashSet;

use askama::Template;
use futures_util::stream::{self, StreamExt};
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body::Body;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::page::{Frame, link, name, page, see_other};
use super::text::{self, Html};
use super::{Visit, value_of};
use crate::protocol::{
    Action, Decision, Digest, Escaped, Execution, MAX_COMMENT_LEN, Payload, RequestId, Status,
    limited_comment,
};
use crate::server::api::{no_such_action, uuid_of};
use crate::server::http::{Rejection, RequestBody, Response};
use crate::store::{DecideById, Decided, Fingerprinted, Store};

/// The most actions that are approved at once.
const MOST: usize = 100;

/// How many of them the store is given at a time. One reviewer does not take all of its connections
/// for long.
const TOGETHER: usize = 16;

/// The most characters of a comment that is too long that are shown again, to be shortened.
const COMMENT_SHOWN: usize = 4 * MAX_COMMENT_LEN;

/// The fields of the form for one decision. Each is there once.
const FIELDS: [&str; 5] = ["decision", "digest", "call", "comment", "payload"];

/// Mints the call id of a form. The form that is sent twice is one call.
pub(super) fn new_call() -> String {
    RequestId::mint().to_string()
}

/// What became of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Recorded,
    Duplicate,
    Conflict,
    Mismatch,
    Closed,
    SelfApproval,
    NotEditable,
    Gone,
    Unknown,
}

impl Answer {
    const ALL: [(Self, &'static str); 9] = [
        (Self::Recorded, "recorded"),
        (Self::Duplicate, "duplicate"),
        (Self::Conflict, "conflict"),
        (Self::Mismatch, "mismatch"),
        (Self::Closed, "closed"),
        (Self::SelfApproval, "own"),
        (Self::NotEditable, "not-editable"),
        (Self::Gone, "gone"),
        (Self::Unknown, "unknown"),
    ];

    fn word(self) -> &'static str {
        let found = Self::ALL.into_iter().find(|(answer, _)| *answer == self);
        found.map_or("", |(_, word)| word)
    }

    pub(super) fn of(word: &str) -> Option<Self> {
        let found = Self::ALL.into_iter().find(|(_, known)| *known == word);
        found.map(|(answer, _)| answer)
    }

    fn from_store(decided: &Decided) -> Self {
        match decided {
            Decided::Recorded(_) | Decided::Replayed(_) => Self::Recorded,
            Decided::Duplicate(_) => Self::Duplicate,
            Decided::Conflict(_) => Self::Conflict,
            Decided::PayloadMismatch(_) | Decided::DigestMissing(_) => Self::Mismatch,
            Decided::Closed(_) => Self::Closed,
            Decided::SelfApproval(_) => Self::SelfApproval,
            Decided::EditNotAllowed(_) => Self::NotEditable,
            Decided::NotFound => Self::Gone,
        }
    }

    /// What to say of it beside what is on record, and how. A link can name any answer, so nothing
    /// is said that the record does not bear out.
    pub(super) fn notice(self, asked: Decision, action: &Action) -> Option<(String, &'static str)> {
        let is_on_record = action.decision == Some(asked);
        let past = match asked {
            Decision::Approve => "approval",
            Decision::Reject => "rejection",
        };
        let (text, class) = match self {
            Self::Recorded | Self::Duplicate if is_on_record && action.status == Status::Failed => {
                let since = match action.execution {
                    Some(Execution::Unknown) => "the outcome became unknown",
                    _ => "it failed",
                };
                let text = format!(
                    "Your {past} is on record from before {since}. It was not decided again."
                );
                (text, "care")
            }
            Self::Recorded if is_on_record => (format!("Your {past} is on record."), "good"),
            Self::Duplicate if is_on_record => (
                "This decision was on record before. There was nothing to do.".to_owned(),
                "",
            ),
            Self::Recorded | Self::Duplicate => return None,
            Self::Conflict if is_on_record || action.decision.is_none() => return None,
            Self::Conflict => (
                format!("Your {past} was not recorded: somebody else had decided before."),
                "bad",
            ),
            Self::Mismatch => (
                format!("Your {past} was not recorded: it was for another payload than this one."),
                "bad",
            ),
            Self::Closed if action.closed.is_none() => return None,
            Self::Closed => (
                format!("Your {past} was not recorded: the action is closed."),
                "bad",
            ),
            Self::SelfApproval => (
                format!("Your {past} was not recorded: you submitted this."),
                "bad",
            ),
            Self::NotEditable => (
                format!("Your {past} was not recorded: this payload may not be edited."),
                "bad",
            ),
            Self::Gone => return None,
            Self::Unknown => (
                "It is not known whether this was recorded.".to_owned(),
                "care",
            ),
        };
        Some((text, class))
    }

    fn says(self) -> &'static str {
        match self {
            Self::Recorded => "Approved",
            Self::Duplicate => "Approved before",
            Self::Conflict => "Not recorded: rejected before",
            Self::Mismatch => "Not recorded: another payload",
            Self::Closed => "Not recorded: closed",
            Self::SelfApproval => "Not recorded: you submitted it",
            Self::NotEditable => "Not recorded",
            Self::Gone => "Not recorded: there is no such action",
            Self::Unknown => "Not known: look at it again",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Recorded | Self::Duplicate => "good",
            Self::Unknown => "care",
            _ => "bad",
        }
    }
}

/// What somebody typed, and why it was not taken.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) comment: String,
    pub(super) payload: Option<String>,
    pub(super) error: Option<String>,
}

#[derive(Template)]
#[template(path = "again.html", config = "src/server/inbox/askama.toml")]
struct Again {
    frame: Frame,
    title: &'static str,
    detail: String,
    target: String,
    fields: Vec<(String, String)>,
}

struct DecidedRow {
    href: String,
    title: Html,
    says: &'static str,
    class: &'static str,
    on_record: Html,
}

#[derive(Template)]
#[template(path = "decided.html", config = "src/server/inbox/askama.toml")]
struct DecidedPage {
    frame: Frame,
    list: String,
    recorded: usize,
    rows: Vec<DecidedRow>,
}

/// A decision to be recorded.
struct Wanted {
    decision: Decision,
    digest: Option<Digest>,
    comment: Option<String>,
    edited: Option<Fingerprinted>,
    call_id: RequestId,
}

impl<St: Store> Visit<'_, St> {
    pub(super) async fn decide<B: Body>(
        &self,
        id: &str,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        self.must_decide()?;
        let form = self.api.read_form(headers, body).await?;
        match self.decide_by_form(id, &form).await {
            Err(rejection) if rejection.status() == StatusCode::SERVICE_UNAVAILABLE => {
                let title = "It is not known whether your decision was recorded";
                self.again(id, &form, title, &rejection).await
            }
            answered => answered,
        }
    }

    /// Gives back what was sent, to be sent once more.
    async fn again(
        &self,
        id: &str,
        form: &str,
        title: &'static str,
        rejection: &Rejection,
    ) -> Result<Response, Rejection> {
        let fields = form_urlencoded::parse(form.as_bytes()).into_owned();
        let fields = fields.filter(|(name, _)| FIELDS.contains(&&**name));
        let template = Again {
            // It does not follow the action: what was typed would go with the page.
            frame: Frame::of(&self.viewer, None).without_live(),
            title,
            detail: rejection.words().1.to_owned(),
            target: format!("/actions/{}", uuid_of(id)?),
            fields: fields.collect(),
        };
        let render = move || {
            let mut response = page(StatusCode::SERVICE_UNAVAILABLE, &template);
            let headers = response.headers_mut();
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            response
        };
        self.desk.press.give_back(form.len(), render).await
    }

    async fn decide_by_form(&self, id: &str, form: &str) -> Result<Response, Rejection> {
        reject_repeated(form, &FIELDS)?;
        let field = |name: &str| value_of(form, name);
        let action = self.find(id).await?;
        let decision: Decision = field("decision")
            .unwrap_or_default()
            .parse()
            .map_err(|error| Rejection::invalid(format!("the field 'decision': {error}")))?;
        let mut comment = field("comment").unwrap_or_default().replace("\r\n", "\n");
        // A payload that was emptied is no payload to run, and not the one from before either.
        let typed = form_urlencoded::parse(form.as_bytes())
            .find(|(name, _)| name == "payload")
            .map(|(_, text)| text.into_owned());
        let text = typed.clone().filter(|_| decision == Decision::Approve);
        let refuse = async |action, comment: String, error: String| {
            let draft = Draft {
                comment,
                payload: typed.clone(),
                error: Some(error),
            };
            match self.show_draft(action, draft).await {
                Err(full) => {
                    let title = "Your decision was not recorded";
                    self.again(id, form, title, &full).await
                }
                shown => shown,
            }
        };
        if limited_comment(&comment).is_err() {
            let mut error = format!("The comment has more than {MAX_COMMENT_LEN} characters.");
            if let Some((end, _)) = comment.char_indices().nth(COMMENT_SHOWN) {
                comment.truncate(end);
                error += &format!(" What is beyond {COMMENT_SHOWN} was cut.");
            }
            return refuse(action, comment, error).await;
        }
        let seen = digest(field("digest").unwrap_or_default().as_str())?;
        let limit = self.api.settings.body_limit;
        let edited = match text.map(|text| edited(&text, seen, limit)).transpose() {
            Ok(edited) => edited.flatten(),
            Err(error) => {
                let error = format!(
                    "The edited payload cannot be taken, so nothing was recorded: {}",
                    Escaped::line(&error)
                );
                return refuse(action, comment, error).await;
            }
        };
        let wanted = Wanted {
            decision,
            digest: seen,
            comment: Some(comment).filter(|comment| !comment.trim().is_empty()),
            edited,
            call_id: call(field("call"))?,
        };
        let target = format!("/actions/{}", action.request_id);
        match self.record(uuid_of(id)?, wanted).await? {
            Answer::Gone => Err(no_such_action()),
            answer => Ok(see_other(&link(
                &target,
                &[("asked", decision.as_str()), ("answer", answer.word())],
            ))),
        }
    }

    pub(super) async fn decide_several<B: Body>(
        &self,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        self.must_decide()?;
        let form = self.api.read_form(headers, body).await?;
        reject_repeated(&form, &["decision", "call"])?;
        if value_of(&form, "decision").is_some_and(|word| word != Decision::Approve.as_str()) {
            return Err(Rejection::invalid(
                "the field 'decision' is not 'approve'; actions are rejected one by one",
            ));
        }
        let call_id = call(value_of(&form, "call"))?;
        let mut seen = HashSet::new();
        let mut picked = Vec::new();
        for (name, value) in form_urlencoded::parse(form.as_bytes()) {
            if name != "action" {
                continue;
            }
            let (id, seen_digest) = value.split_once(':').ok_or_else(|| {
                Rejection::invalid("a field 'action' is not an id, a colon and a digest")
            })?;
            let id = uuid_of(id)?;
            if seen.insert(id) {
                picked.push((id, digest(seen_digest)?));
            }
        }
        if picked.is_empty() {
            return Ok(see_other("/"));
        }
        if picked.len() > MOST {
            return Err(Rejection::invalid(format!(
                "{} actions were selected; allowed are {MOST} at once",
                picked.len()
            )));
        }
        // The store makes durable together what it is given together.
        let decisions = picked.into_iter().map(|(id, digest)| {
            let wanted = Wanted {
                decision: Decision::Approve,
                digest,
                comment: None,
                edited: None,
                call_id: call_id.clone(),
            };
            async move {
                // What fails for one does not keep the others from their answers.
                let answer = self.record(id, wanted).await.unwrap_or(Answer::Unknown);
                format!("{id}.{}", answer.word())
            }
        });
        let answers: Vec<_> = stream::iter(decisions).buffered(TOGETHER).collect().await;
        let query: Vec<_> = answers
            .iter()
            .map(|answer| ("a", answer.as_str()))
            .collect();
        Ok(see_other(&link("/decided", &query)))
    }

    /// Shows the answers to several approvals, each beside what is on record.
    pub(super) async fn decided(&self) -> Result<Response, Rejection> {
        let mut rows = Vec::new();
        let mut seen = HashSet::new();
        let mut tenant = None;
        for (name, value) in form_urlencoded::parse(self.query.as_bytes()) {
            let answer = value.split_once('.').filter(|_| name == "a");
            let Some((id, answer)) =
                answer.and_then(|(id, word)| Some((Uuid::try_parse(id).ok()?, Answer::of(word)?)))
            else {
                continue;
            };
            if seen.len() == MOST {
                break;
            }
            if !seen.insert(id) {
                continue;
            }
            if let Some(action) = self.find_by_id(id).await? {
                rows.push(row(&action, answer));
                tenant = tenant.or(action.tenant_id);
            }
        }
        let scope = tenant.as_ref().filter(|_| self.viewer.tenant.is_none());
        let recorded = rows.iter().filter(|row| row.class == "good").count();
        let template = DecidedPage {
            frame: Frame::of(&self.viewer, tenant.as_ref()),
            list: link(
                "/",
                &[("tenant", scope.map_or("", |tenant| tenant.as_str()))],
            ),
            recorded,
            rows,
        };
        Ok(page(StatusCode::OK, &template))
    }

    fn must_decide(&self) -> Result<(), Rejection> {
        if self.viewer.may_decide {
            return Ok(());
        }
        Err(Rejection::new(
            crate::protocol::Code::Forbidden,
            "your API key does not have the scope 'decide'",
        ))
    }

    async fn record(&self, id: Uuid, wanted: Wanted) -> Result<Answer, Rejection> {
        let Some(tenant_id) = self.tenant_of(id).await? else {
            return Ok(Answer::Gone);
        };
        let decide = DecideById {
            id,
            tenant_id,
            decision: wanted.decision,
            call_id: Some(wanted.call_id),
            digest: wanted.digest,
            edited: wanted.edited,
            comment: wanted.comment,
            actor: self.viewer.actor.clone(),
            allow_self_approval: self.api.settings.allow_self_approval || !self.viewer.is_known,
        };
        let decided = self.api.store.decide_by_id(decide);
        let decided = self.api.await_store(decided).await?;
        Ok(Answer::from_store(&decided))
    }
}

fn row(action: &Action, answer: Answer) -> DecidedRow {
    // A link can name any answer. Only the record says that something is approved.
    let is_approved = action.decision == Some(Decision::Approve) && action.status != Status::Failed;
    let answer = match answer {
        Answer::Recorded | Answer::Duplicate if !is_approved => Answer::Unknown,
        Answer::Conflict if action.decision != Some(Decision::Reject) => Answer::Unknown,
        Answer::Closed if action.closed.is_none() => Answer::Unknown,
        answer => answer,
    };
    let on_record = match (action.decision, action.decided_by.as_deref()) {
        (Some(decision), Some(by)) => format!("on record: {decision}, by {by}"),
        (Some(decision), None) => format!("on record: {decision}"),
        (None, _) => "nobody has decided".to_owned(),
    };
    DecidedRow {
        href: format!("/actions/{}", action.request_id),
        title: Html::line(name(action)),
        says: answer.says(),
        class: answer.class(),
        on_record: Html::line(&on_record),
    }
}

/// Rejects a form with two values of one name. Two readers could each take a different one.
fn reject_repeated(form: &str, names: &[&str]) -> Result<(), Rejection> {
    let mut seen = HashSet::new();
    for (found, _) in form_urlencoded::parse(form.as_bytes()) {
        let name = names.iter().find(|name| **name == found);
        if let Some(name) = name.filter(|name| !seen.insert(**name)) {
            return Err(Rejection::invalid(format!(
                "the field '{name}' is repeated; allowed is one"
            )));
        }
    }
    Ok(())
}

/// Reads an edited payload of up to `limit` bytes. `None` if it is what was seen.
fn edited(text: &str, seen: Option<Digest>, limit: usize) -> Result<Option<Fingerprinted>, String> {
    serde_json::from_str::<&RawValue>(text).map_err(|error| error.to_string())?;
    // Without the space that was only there to edit it.
    let compact = text::compact(text);
    if compact.len() > limit {
        return Err(format!("it has more than {limit} bytes"));
    }
    let payload = serde_json::from_str::<Payload>(&compact).map_err(|error| error.to_string())?;
    let edited = Fingerprinted::from(crate::protocol::edited(payload)?);
    let is_same = seen == Some(Digest::from(*edited.digest()));
    Ok((!is_same).then_some(edited))
}

fn digest(text: &str) -> Result<Option<Digest>, Rejection> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|error| Rejection::invalid(format!("the field 'digest': {error}")))
}

/// The call id of a form.
fn call(text: Option<String>) -> Result<RequestId, Rejection> {
    RequestId::new(text.unwrap_or_default())
        .map_err(|error| Rejection::invalid(format!("the field 'call': {error}")))
}
