//! `GET /`: the actions of a tenant; and `GET /tenants`, for who sees them all.

use askama::Template;
use http::StatusCode;

use super::page::{Frame, Standing, When, link, name, page, see_other};
use super::text::{self, Html};
use super::{Visit, decide};
use crate::protocol::{Action, Execution, RequestId, Status, TenantId};
use crate::server::http::{Rejection, Response};
use crate::store::{Cursor, List, Page, Store};

/// The actions of a page, and the most that are decided at once.
const LIMIT: usize = 50;

/// The tenants of a page.
const TENANTS: usize = 50;

/// The most waiting actions that are counted for a tenant.
const COUNTED: usize = 20;

/// What a page lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum View {
    Waiting,
    NotPickedUp,
    Running,
    Failed,
    Done,
    Rejected,
    All,
}

impl View {
    const EACH: [Self; 7] = [
        Self::Waiting,
        Self::NotPickedUp,
        Self::Running,
        Self::Failed,
        Self::Done,
        Self::Rejected,
        Self::All,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Waiting => "",
            Self::NotPickedUp => "not-picked-up",
            Self::Running => "running",
            Self::Failed => "failed",
            Self::Done => "done",
            Self::Rejected => "rejected",
            Self::All => "all",
        }
    }

    fn of(word: Option<String>) -> Self {
        let word = word.unwrap_or_default();
        let known = Self::EACH.into_iter().find(|view| view.word() == word);
        known.unwrap_or(Self::Waiting)
    }

    fn label(self) -> &'static str {
        match self {
            Self::Waiting => "Waiting",
            Self::NotPickedUp => "Not picked up",
            Self::Running => "Running",
            Self::Failed => "Failed or unknown",
            Self::Done => "Done",
            Self::Rejected => "Rejected",
            Self::All => "All",
        }
    }

    fn heading(self) -> &'static str {
        match self {
            Self::Waiting => "Waiting for a decision",
            Self::NotPickedUp => "Approved, not picked up",
            Self::Running => "Running now",
            Self::Failed => "Failed, or with an unknown outcome",
            Self::Done => "Done",
            Self::Rejected => "Rejected, expired or cancelled",
            Self::All => "All actions",
        }
    }

    fn empty(self) -> &'static str {
        match self {
            Self::Waiting => "Nothing waits for a decision.",
            Self::NotPickedUp => "Every approved action was picked up by an agent.",
            Self::Running => "No agent is running an action.",
            Self::Failed => "No action has failed.",
            Self::Done => "No action is done yet.",
            Self::Rejected => "No action was rejected.",
            Self::All => "There are no actions yet.",
        }
    }

    fn is_waiting(self) -> bool {
        self == Self::Waiting
    }

    /// Whether what is on this list waits for somebody.
    fn needs_care(self) -> bool {
        matches!(self, Self::NotPickedUp | Self::Failed)
    }

    fn list(self, tenant_id: TenantId, limit: usize) -> List {
        use crate::protocol::Decision::{Approve, Reject};

        let mut list = List {
            tenant_id,
            status: None,
            decision: None,
            execution: None,
            not_picked_up: false,
            thread_id: None,
            after: None,
            limit,
        };
        match self {
            Self::Waiting => list.status = Some(Status::Pending),
            Self::NotPickedUp => list.not_picked_up = true,
            Self::Running => list.execution = Some(Execution::Claimed),
            Self::Failed => list.status = Some(Status::Failed),
            Self::Done => {
                list.decision = Some(Approve);
                list.execution = Some(Execution::Completed);
            }
            Self::Rejected => list.decision = Some(Reject),
            Self::All => {}
        }
        list
    }
}

struct Tab {
    href: String,
    label: &'static str,
    is_open: bool,
    needs_care: bool,
}

struct Row {
    id: RequestId,
    digest: String,
    href: String,
    title: Html,
    standing: Standing,
    preview: Html,
    thread: Html,
    created: When,
    expires: Option<When>,
    decided_by: Option<Html>,
    /// Whether all of the payload is shown. What is not is not approved here.
    is_whole: bool,
}

impl Row {
    fn of(action: &Action) -> Self {
        let text = |text: Option<&str>| Html::line(text.unwrap_or("-"));
        let payload = action.payload.as_ref();
        let (preview, is_whole) = match payload {
            Some(json) => text::beginning(json.as_str()),
            None => (Html::default(), true),
        };
        let is_pending = action.status == Status::Pending;
        Self {
            href: format!("/actions/{}", action.request_id),
            id: action.request_id.clone(),
            digest: action
                .digest
                .map_or_else(String::new, |digest| digest.to_string()),
            title: Html::line(name(action)),
            standing: Standing::of(action),
            preview,
            thread: text(action.thread_id.as_ref().map(|thread| thread.as_str())),
            created: When::past(action.created_at.unwrap_or(std::time::UNIX_EPOCH)),
            expires: action.expires_at.filter(|_| is_pending).map(When::future),
            decided_by: action.decided_by.as_deref().map(Html::line),
            is_whole,
        }
    }
}

#[derive(Template)]
#[template(path = "list.html", config = "src/server/inbox/askama.toml")]
struct ListPage {
    frame: Frame,
    view: View,
    tabs: Vec<Tab>,
    rows: Vec<Row>,
    /// Whether actions can be picked here, to approve them together.
    can_pick: bool,
    call: String,
    next: Option<String>,
}

struct TenantRow {
    href: String,
    name: Html,
    waiting: Option<String>,
    oldest: Option<When>,
}

#[derive(Template)]
#[template(path = "tenants.html", config = "src/server/inbox/askama.toml")]
struct TenantsPage {
    frame: Frame,
    rows: Vec<TenantRow>,
    next: Option<String>,
}

impl<St: Store> Visit<'_, St> {
    pub(super) async fn list(&self) -> Result<Response, Rejection> {
        let Some(tenant) = self.tenant_to_list().await? else {
            return Ok(see_other("/tenants"));
        };
        // Whoever sees one tenant needs no tenant in their links.
        let scope = match self.viewer.tenant {
            Some(_) => "",
            None => tenant.as_str(),
        };
        let view = View::of(self.asked("view"));
        let mut list = view.list(tenant.clone(), LIMIT);
        // What is no position begins the list.
        list.after = self.asked("cursor").as_deref().and_then(Cursor::of_text);
        let Page { actions, next } = self.page(list).await?;
        let mut tabs = Vec::with_capacity(View::EACH.len());
        for each in View::EACH {
            let needs_care = each.needs_care() && {
                let page = self.page(each.list(tenant.clone(), 1)).await?;
                !page.actions.is_empty()
            };
            tabs.push(Tab {
                href: link("/", &[("tenant", scope), ("view", each.word())]),
                label: each.label(),
                is_open: each == view,
                needs_care,
            });
        }
        let next = next.map(|cursor| {
            let cursor = cursor.to_text();
            link(
                "/",
                &[
                    ("tenant", scope),
                    ("view", view.word()),
                    ("cursor", &cursor),
                ],
            )
        });
        let can_pick = view.is_waiting() && self.viewer.may_decide;
        let mut rows = Vec::with_capacity(actions.len());
        for mut action in actions {
            // What can be approved here is shown here. A page of the store leaves payloads out.
            if view.is_waiting()
                && let Some(id) = action.request_id.as_uuid()
            {
                let whole = self.api.store.find(id, Some(&tenant));
                let whole = self.api.await_store(whole).await?;
                action.payload = whole.and_then(|whole| whole.payload);
            }
            rows.push(Row::of(&action));
        }
        let mut version = String::new();
        for row in &rows {
            version += &format!("{}{}", row.id, row.standing.label);
        }
        for tab in &tabs {
            version += if tab.needs_care { "!" } else { "." };
        }
        let template = ListPage {
            frame: Frame::of(&self.viewer, Some(&tenant)).with_version(version),
            view,
            tabs,
            rows,
            can_pick,
            call: decide::new_call(),
            next,
        };
        Ok(page(StatusCode::OK, &template))
    }

    async fn page(&self, list: List) -> Result<Page, Rejection> {
        self.api.await_store(self.api.store.list(list)).await
    }

    /// The tenant whose actions are shown: the viewer's, the one that was asked for, or the only
    /// one there is.
    async fn tenant_to_list(&self) -> Result<Option<TenantId>, Rejection> {
        if let Some(tenant) = &self.viewer.tenant {
            return Ok(Some(tenant.clone()));
        }
        if let Some(asked) = self.asked("tenant") {
            let tenant = TenantId::new(asked);
            return tenant.map(Some).map_err(|error| {
                Rejection::invalid(format!("the query parameter 'tenant': {error}"))
            });
        }
        let tenants = self.api.store.tenants(None, 2);
        let mut tenants = self.api.await_store(tenants).await?;
        let is_only = tenants.len() == 1;
        Ok(tenants.pop().filter(|_| is_only))
    }

    pub(super) async fn tenants(&self) -> Result<Response, Rejection> {
        if self.viewer.tenant.is_some() {
            return Ok(see_other("/"));
        }
        let after = self
            .asked("after")
            .and_then(|after| TenantId::new(after).ok());
        let tenants = self.api.store.tenants(after.as_ref(), TENANTS);
        let tenants = self.api.await_store(tenants).await?;
        let mut rows = Vec::with_capacity(tenants.len());
        let mut version = String::new();
        for tenant in &tenants {
            let waiting = View::Waiting.list(tenant.clone(), COUNTED);
            let Page { actions, next } = self.page(waiting).await?;
            let oldest = actions.first().and_then(|action| action.created_at);
            let more = if next.is_some() { " or more" } else { "" };
            let waiting = format!("{}{more}", actions.len());
            version += &format!("{tenant} {waiting} ");
            rows.push(TenantRow {
                href: link("/", &[("tenant", tenant.as_str())]),
                name: Html::line(tenant.as_str()),
                waiting: oldest.map(|_| waiting),
                oldest: oldest.map(When::past),
            });
        }
        let last = tenants.last().filter(|_| tenants.len() == TENANTS);
        let template = TenantsPage {
            frame: Frame::of(&self.viewer, None).with_version(version),
            next: last.map(|last| link("/tenants", &[("after", last.as_str())])),
            rows,
        };
        Ok(page(StatusCode::OK, &template))
    }
}
