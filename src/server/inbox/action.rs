//! `GET /actions/{id}`: one action, and the form to decide on it.

use askama::Template;
use http::StatusCode;

use super::Visit;
use super::decide::{Answer, Draft, new_call};
use super::page::{Frame, Standing, When, link, name, page, plain};
use super::text::{self, Html};
use crate::protocol::{Action, Closed, Decision, EventKind, MAX_COMMENT_LEN, Status};
use crate::server::http::{Rejection, Response};
use crate::store::Store;

/// The most events of a history that are shown: the newest.
const EVENTS: usize = 200;

struct Notice {
    text: String,
    class: &'static str,
}

/// The decision on record.
struct Verdict {
    what: &'static str,
    by: Html,
    at: Option<When>,
    next: Option<&'static str>,
}

struct Form {
    target: String,
    digest: String,
    call: String,
    comment: String,
    comment_len: usize,
    editable: Option<String>,
    /// Whether the payload could be edited if it were not so large.
    is_too_large: bool,
    error: Option<String>,
}

/// How the payload was edited.
struct Diff {
    html: Html,
    is_whole: bool,
}

struct Fact {
    name: &'static str,
    value: Html,
    is_code: bool,
}

struct Happened {
    at: When,
    kind: String,
    actor: Html,
}

#[derive(Template)]
#[template(path = "action.html", config = "src/server/inbox/askama.toml")]
struct ActionPage {
    frame: Frame,
    list: String,
    /// For the title of the page.
    plain: String,
    title: Html,
    notice: Option<Notice>,
    standing: Standing,
    verdict: Option<Verdict>,
    comment: Option<Html>,
    payload: Option<Html>,
    diff: Option<Diff>,
    form: Option<Form>,
    why_not: Option<&'static str>,
    result: Option<Html>,
    reason: Option<Html>,
    facts: Vec<Fact>,
    history: Vec<Happened>,
    hidden_events: usize,
}

impl<St: Store> Visit<'_, St> {
    pub(super) async fn action(&self, id: &str) -> Result<Response, Rejection> {
        let action = self.find(id).await?;
        let answer = self.asked("answer").and_then(|word| Answer::of(&word));
        let asked = self.asked("asked").and_then(|word| word.parse().ok());
        let notice = answer.zip(asked).and_then(|(answer, asked)| {
            let (text, class) = answer.notice(asked, &action)?;
            Some(Notice { text, class })
        });
        self.show(action, notice, Draft::default(), StatusCode::OK)
            .await
    }

    /// Shows the form again, with what was typed and why it was not taken.
    pub(super) async fn show_draft(
        &self,
        action: Action,
        draft: Draft,
    ) -> Result<Response, Rejection> {
        self.show(action, None, draft, StatusCode::UNPROCESSABLE_ENTITY)
            .await
    }

    async fn show(
        &self,
        action: Action,
        notice: Option<Notice>,
        draft: Draft,
        status: StatusCode,
    ) -> Result<Response, Rejection> {
        let can_be_decided = matches!(action.status, Status::Pending | Status::Failed);
        let why_not = match () {
            () if !can_be_decided => None,
            () if !self.viewer.may_decide => Some("Your key does not allow to decide."),
            () if self.is_own(&action) => Some("You submitted this, so somebody else decides."),
            () => None,
        };
        let has_form = can_be_decided && why_not.is_none();
        let tenant = action.tenant_id.as_ref();
        let scope = match self.viewer.tenant {
            Some(_) => "",
            None => tenant.map_or("", |tenant| tenant.as_str()),
        };
        let version = format!(
            "{:?} {:?} {:?} {} {}",
            action.status,
            action.execution,
            action.decided_at,
            action.history.as_deref().map_or(0, <[_]>::len),
            has_form
        );
        let view = View {
            frame: Frame::of(&self.viewer, tenant).with_version(version),
            list: link("/", &[("tenant", scope)]),
            notice,
            has_form,
            why_not,
            draft,
            form_limit: 3 * self.api.settings.body_limit,
            action,
        };
        let press = &self.desk.press;
        press
            .render(&self.viewer, view.len(), move || view.page(status))
            .await
    }

    /// Whether the viewer submitted the action, and so may not decide on it. The store has the last
    /// word.
    fn is_own(&self, action: &Action) -> bool {
        let mut history = action.history.iter().flatten();
        let submitted = history.find(|event| event.kind == EventKind::Submitted);
        self.viewer.is_known
            && !self.api.settings.allow_self_approval
            && submitted.is_some_and(|event| event.actor == self.viewer.actor.as_str())
    }
}

/// What a page shows, before it is rendered.
struct View {
    frame: Frame,
    list: String,
    notice: Option<Notice>,
    has_form: bool,
    why_not: Option<&'static str>,
    draft: Draft,
    /// The most bytes of a payload in a form. A form that is too large to be sent could not even be
    /// rejected.
    form_limit: usize,
    action: Action,
}

impl View {
    /// The length of all that may be long.
    fn len(&self) -> usize {
        let Self { action, draft, .. } = self;
        let payloads = [&action.payload, &action.edited_payload];
        let payloads = payloads.into_iter().flatten().map(|it| it.as_str());
        let texts = [&action.comment, &action.reason, &draft.payload];
        let texts = texts.into_iter().flatten().map(String::as_str);
        let result = action.result.iter().map(|result| result.as_str());
        let texts = payloads.chain(texts).chain(result);
        let len: usize = texts.map(str::len).sum();
        len + draft.comment.len()
    }

    fn page(self, status: StatusCode) -> Response {
        let Self { action, draft, .. } = self;
        let edited = action.edited_payload.as_ref();
        let payload = edited.or(action.payload.as_ref());
        let diff = action.payload.as_ref().zip(edited);
        let history = action.history.as_deref().unwrap_or_default();
        let hidden_events = history.len().saturating_sub(EVENTS);
        let editable = payload.filter(|_| action.allow_edit == Some(true));
        let form = self.has_form.then(|| {
            let text = editable.map(|payload| match draft.payload {
                Some(text) => text::fits_form(&text, self.form_limit).then_some(text),
                None => text::editable(payload.as_str(), self.form_limit),
            });
            Form {
                target: format!("/actions/{}", action.request_id),
                digest: action
                    .digest
                    .map_or_else(String::new, |digest| digest.to_string()),
                call: new_call(),
                comment: draft.comment,
                comment_len: MAX_COMMENT_LEN,
                is_too_large: matches!(text, Some(None)),
                editable: text.flatten(),
                error: draft.error,
            }
        });
        let template = ActionPage {
            frame: self.frame,
            list: self.list,
            plain: plain(name(&action)),
            title: Html::line(name(&action)),
            notice: self.notice,
            standing: Standing::of(&action),
            verdict: verdict(&action),
            comment: action.comment.as_deref().map(Html::lines),
            payload: payload.map(|payload| Html::json(payload.as_str())),
            diff: diff.map(|(old, new)| {
                let (html, is_whole) = Html::diff(old.as_str(), new.as_str());
                Diff { html, is_whole }
            }),
            form,
            why_not: self.why_not,
            result: action
                .result
                .as_ref()
                .map(|result| Html::json(result.as_str())),
            reason: action.reason.as_deref().map(Html::lines),
            facts: facts(&action),
            history: history.iter().skip(hidden_events).map(happened).collect(),
            hidden_events,
        };
        page(status, &template)
    }
}

fn verdict(action: &Action) -> Option<Verdict> {
    let by = action.decided_by.as_deref()?;
    let what = match (action.closed, action.decision?) {
        (Some(Closed::Expired), _) => "Nobody decided in time. Rejected",
        (Some(Closed::Cancelled), _) => "Cancelled",
        (Some(_), _) => "Closed",
        (None, Decision::Approve) => "Approved",
        (None, Decision::Reject) => "Rejected",
    };
    let next = match Standing::of(action).label {
        "Approved, not picked up" => Some("No agent has picked it up yet."),
        "Outcome unknown" => Some(
            "The agent that ran it never reported back, so it may have happened or not. Find out, \
             and decide again.",
        ),
        "Failed" => Some("The agent reported a failure. Decide again if it is to be tried again."),
        _ => None,
    };
    Some(Verdict {
        what,
        by: Html::line(by),
        at: action.decided_at.map(When::past),
        next,
    })
}

fn facts(action: &Action) -> Vec<Fact> {
    let mut facts = Vec::new();
    let mut fact = |name, is_code, value: Option<String>| {
        if let Some(value) = value {
            let value = Html::line(&value);
            facts.push(Fact {
                name,
                value,
                is_code,
            });
        }
    };
    let time = |at: Option<std::time::SystemTime>| at.map(|at| When::past(at).exact);
    let submitted = action.history.iter().flatten();
    let submitted = submitted
        .clone()
        .find(|event| event.kind == EventKind::Submitted);
    fact(
        "Submitted by",
        false,
        submitted.map(|event| event.actor.clone()),
    );
    fact("Submitted", false, time(action.created_at));
    fact("Expires", false, time(action.expires_at));
    fact(
        "Tenant",
        false,
        action.tenant_id.as_ref().map(ToString::to_string),
    );
    fact(
        "Thread",
        true,
        action.thread_id.as_ref().map(ToString::to_string),
    );
    fact(
        "Key",
        true,
        action.idempotency_key.as_ref().map(ToString::to_string),
    );
    fact("Id", true, Some(action.request_id.to_string()));
    fact(
        "Digest",
        true,
        action.digest.map(|digest| digest.to_string()),
    );
    facts
}

fn happened(event: &crate::protocol::Event) -> Happened {
    Happened {
        at: When::past(event.at.unwrap_or(std::time::UNIX_EPOCH)),
        kind: event.kind.to_string(),
        actor: Html::line(&event.actor),
    }
}
