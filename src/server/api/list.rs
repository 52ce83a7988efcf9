//! `GET /hitl/actions`.

use http::{HeaderMap, StatusCode};
use serde::Serialize;

use super::{Api, entry};
use crate::protocol::{Action, Escaped, Status, ThreadId};
use crate::server::auth::Scope;
use crate::server::http::{Rejection, Response, headers, response};
use crate::store::{Cursor, List, Store};

/// The actions of a page, unless the request says otherwise.
pub(crate) const LIMIT: usize = 50;

/// The most actions of a page.
pub(crate) const MAX_LIMIT: usize = 200;

const PARAMETERS: [&str; 6] = [
    "status",
    "decision",
    "execution",
    "thread_id",
    "limit",
    "cursor",
];

#[derive(Serialize)]
struct Actions {
    actions: Vec<Action>,
    next_cursor: Option<String>,
}

impl<St: Store> Api<St> {
    pub(crate) async fn list(
        &self,
        query: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<Response, Rejection> {
        let caller = self.authenticate(headers)?;
        let caller = caller.with(Scope::Read)?;
        headers::call_id(headers)?;
        let list = parse(query.unwrap_or_default(), caller.tenant_id)?;
        let prefix = cursor_prefix(&list);
        let page = self.await_store(self.store.list(list)).await?;
        let actions = Actions {
            actions: page.actions.into_iter().map(entry).collect(),
            next_cursor: page
                .next
                .map(|cursor| format!("{prefix}{}", cursor.to_text())),
        };
        Ok(response::json(StatusCode::OK, &actions))
    }
}

/// The first character of a cursor: the direction of its list. A position means nothing in the
/// other direction.
fn cursor_prefix(list: &List) -> char {
    match list.status {
        Some(Status::Pending) => 'o',
        _ => 'n',
    }
}

fn parse(query: &str, tenant_id: crate::protocol::TenantId) -> Result<List, Rejection> {
    let mut list = List {
        tenant_id,
        status: None,
        decision: None,
        execution: None,
        not_picked_up: false,
        thread_id: None,
        after: None,
        limit: LIMIT,
    };
    let mut cursor = None;
    let mut seen = Vec::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if seen.contains(&name) {
            return Err(invalid(&name, "it is repeated; allowed is one"));
        }
        if !PARAMETERS.contains(&&*name) {
            return Err(invalid(
                &name,
                "it is unknown; allowed are 'status', 'decision', 'execution', 'thread_id', \
                 'cursor' and 'limit'",
            ));
        }
        let refused = |error: &dyn std::fmt::Display| invalid(&name, &error.to_string());
        match &*name {
            // An empty filter filters nothing.
            _ if value.is_empty() => {}
            "status" => list.status = Some(value.parse().map_err(|error| refused(&error))?),
            "decision" => list.decision = Some(value.parse().map_err(|error| refused(&error))?),
            "execution" => list.execution = Some(value.parse().map_err(|error| refused(&error))?),
            "thread_id" => {
                let thread = ThreadId::new(&*value).map_err(|error| refused(&error))?;
                list.thread_id = Some(thread);
            }
            "limit" => {
                list.limit = value
                    .parse()
                    .ok()
                    .filter(|limit| (1..=MAX_LIMIT).contains(limit))
                    .ok_or_else(|| invalid(&name, &format!("allowed are 1 to {MAX_LIMIT}")))?;
            }
            _ => cursor = Some(value.into_owned()),
        }
        seen.push(name);
    }
    if let Some(text) = cursor {
        let position = text.strip_prefix(cursor_prefix(&list));
        let after = position.and_then(Cursor::of_text);
        let wrong = || invalid("cursor", "allowed is the 'next_cursor' of the same list");
        list.after = Some(after.ok_or_else(wrong)?);
    }
    Ok(list)
}

fn invalid(name: &str, reason: &str) -> Rejection {
    let name: String = name.chars().take(64).collect();
    Rejection::invalid(format!(
        "the query parameter '{}': {reason}",
        Escaped::line(&name)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Decision, Execution, TenantId};

    fn read(query: &str) -> Result<List, Rejection> {
        parse(query, TenantId::new("acme").unwrap())
    }

    #[test]
    fn a_query_is_read_as_filters() {
        let list = read("status=COMMITTED&decision=approve&execution=claimed&thread_id=a%2Fb&limit=200&cursor=n1f").unwrap();
        assert_eq!(list.status, Some(Status::Committed));
        assert_eq!(list.decision, Some(Decision::Approve));
        assert_eq!(list.execution, Some(Execution::Claimed));
        assert_eq!(list.thread_id.unwrap().as_str(), "a/b");
        assert_eq!((list.limit, list.after), (200, Some(Cursor::new(31))));
        let list = read("status=&cursor=").unwrap();
        assert_eq!((list.status, list.after, list.limit), (None, None, 50));
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for query in [
            "status=pending",
            "status=other",
            "decision=maybe",
            "execution=null",
            "thread_id=%20",
            "thread_id=%C3%A9",
            "limit=0",
            "limit=201",
            "limit=-1",
            "limit=x",
            "cursor=1f",
            "cursor=n",
            "cursor=n%2B1",
            "cursor=o1f",
            "status=PENDING&cursor=n1f",
            "cursor=nfffffffffffffffffffffffffffffffff",
            "stauts=PENDING",
            "status=PENDING&status=FAILED",
        ] {
            assert!(read(query).is_err(), "{query}");
        }
    }
}
