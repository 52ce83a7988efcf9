//! Listing the actions of a tenant.

use http::StatusCode;
use serde::Deserialize;

use super::{Operation, OperationCall, Sent, Wire, checked};
use crate::client::Error;
use crate::client::answer::{Answer, Object, Subject, object};
use crate::client::endpoints::{Endpoints, percent_encoded};
use crate::protocol::{Action, Decision, Execution, InvalidValue, Status, ThreadId};

/// A list of actions; see [`AegisService::list`](crate::AegisService::list).
#[derive(Debug, Clone, Default)]
pub struct List {
    status: Option<Status>,
    decision: Option<Decision>,
    execution: Option<Execution>,
    thread: Option<ThreadId>,
    cursor: Option<String>,
    limit: Option<u32>,
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct ActionPage {
    /// The actions. They leave out payload, comment, result and history.
    pub actions: Vec<Action>,
    /// What [`cursor`](OperationCall::cursor) takes for the next page of the same list. `None` at
    /// its end.
    #[serde(default)]
    pub next_cursor: Option<String>,
}

/// The filters of a list. By default there are none.
impl<S> OperationCall<S, List> {
    /// Lists actions in this state. Pending ones come oldest first, all others newest first.
    pub fn status(self, status: Status) -> Self {
        self.with(Ok(status), |list, status| list.status = Some(status))
    }

    /// Lists actions with this decision.
    pub fn decision(self, decision: Decision) -> Self {
        self.with(Ok(decision), |list, decision| {
            list.decision = Some(decision)
        })
    }

    /// Lists actions whose execution has come this far.
    pub fn execution(self, execution: Execution) -> Self {
        self.with(Ok(execution), |list, execution| {
            list.execution = Some(execution);
        })
    }

    /// Lists actions of this thread. The service's own thread is no filter.
    pub fn thread_id<T>(self, thread: T) -> Self
    where
        T: TryInto<ThreadId, Error: Into<InvalidValue>>,
    {
        self.with(checked(thread), |list, thread| list.thread = Some(thread))
    }

    /// Continues the same list where a page ended.
    pub fn cursor(self, cursor: impl Into<String>) -> Self {
        self.with(Ok(cursor.into()), |list, cursor| list.cursor = Some(cursor))
    }

    /// Sets the most actions of a page: 1 to 200. The default is 50.
    pub fn limit(self, actions: u32) -> Self {
        self.with(Ok(actions), |list, limit| list.limit = Some(limit))
    }
}

impl Operation for List {
    type Output = ActionPage;

    fn wire(&mut self, _: &Endpoints) -> Result<Wire, Error> {
        let limit = self.limit.map(|limit| limit.to_string());
        let mut query = String::new();
        for (name, value) in [
            ("status", self.status.map(Status::as_str)),
            ("decision", self.decision.map(Decision::as_str)),
            ("execution", self.execution.map(Execution::as_str)),
            ("thread_id", self.thread.as_ref().map(ThreadId::as_str)),
            ("cursor", self.cursor.as_deref()),
            ("limit", limit.as_deref()),
        ] {
            if let Some(value) = value {
                query.push(if query.is_empty() { '?' } else { '&' });
                query.push_str(name);
                query.push('=');
                query.push_str(&percent_encoded(value));
            }
        }
        Ok(Wire::get(query))
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<ActionPage, Error> {
        let Object(page, head) =
            object::<ActionPage>(answer, &[StatusCode::OK], &Subject::default())?;
        let subject = Subject {
            tenant: sent.tenant.as_ref(),
            thread: self.thread.as_ref(),
            ..Subject::default()
        };
        if !page.actions.iter().all(|action| subject.is_of(action)) {
            return Err(head.fault("it has an action of another tenant or thread"));
        }
        Ok(page)
    }
}
