//! The calls of the human loop: submitting, waiting, deciding by id, claiming and reporting.

use std::time::Duration;

use super::operation::{
    self, Cancel, Claim, Complete, DecideById, Fail, List, Look, OperationCall, Renew, Submit,
};
use super::{AegisService, EventsCall, RunCall, WaitCall};
use crate::protocol::{ClaimToken, Decision, IdempotencyKey, InvalidValue, RequestId};

/// The human loop: an agent submits an action, a reviewer decides on it, and one executor claims
/// and runs it. [`action`](Self::action) does the agent's part as a whole.
impl<S: Clone> AegisService<S> {
    /// Runs the action named by `key` once, when it is approved: submits it, waits for the
    /// decision, claims it, runs a closure, and reports the outcome. See [`RunCall`].
    ///
    /// ```no_run
    /// use aegis_hitl::AegisService;
    /// use aegis_hitl::client::RunOutcome;
    /// use serde_json::json;
    ///
    /// # async fn charge(payload: &aegis_hitl::Payload) -> Result<String, std::io::Error> {
    /// #     Ok(payload.as_str().to_owned())
    /// # }
    /// # async fn run(aegis: AegisService) -> Result<(), Box<dyn std::error::Error>> {
    /// let outcome = aegis
    ///     .action("charge-4711")
    ///     .payload(&json!({"customer": "c-1", "amount": 12.50}))
    ///     .title("Charge 12.50 to c-1")
    ///     .run_once(|approved| async move {
    ///         // What the reviewer approved, edited or not. Never what the closure captured.
    ///         let payload = approved.payload().ok_or(std::io::ErrorKind::InvalidData)?;
    ///         charge(payload).await
    ///     })
    ///     .await?;
    /// match outcome {
    ///     RunOutcome::Completed { value, .. } => println!("charged: {value}"),
    ///     RunOutcome::AlreadyRun(action) => println!("ran before: {:?}", action.execution),
    ///     RunOutcome::Rejected(action) => println!("rejected: {:?}", action.comment),
    ///     other => println!("not charged, or not known to be: {other:?}"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn action<K>(&self, key: K) -> RunCall<S>
    where
        K: TryInto<IdempotencyKey, Error: Into<InvalidValue>>,
    {
        RunCall::new(self.submit(key))
    }

    /// Submits an action under `key`, for a decision. Returns the action on record.
    ///
    /// It may be sent again at any time: the same key and payload return the action, whatever
    /// became of it. Another payload is a [payload mismatch](super::Error::is_payload_mismatch).
    ///
    /// ```no_run
    /// # async fn run(aegis: aegis_hitl::AegisService) -> Result<(), aegis_hitl::Error> {
    /// let action = aegis
    ///     .submit("charge-4711")
    ///     .payload(&serde_json::json!({"amount": 12.50}))
    ///     .title("Charge 12.50")
    ///     .allow_edit(true)
    ///     .await?;
    /// println!("waiting for a decision on {}", action.request_id);
    /// # Ok(())
    /// # }
    /// ```
    pub fn submit<K>(&self, key: K) -> OperationCall<S, Submit>
    where
        K: TryInto<IdempotencyKey, Error: Into<InvalidValue>>,
    {
        let submit = operation::checked(key).map(Submit::new);
        OperationCall::new(self.clone(), submit)
    }

    /// Lists the tenant's actions, a page at a time.
    ///
    /// ```no_run
    /// # async fn run(aegis: aegis_hitl::AegisService) -> Result<(), aegis_hitl::Error> {
    /// use aegis_hitl::Status;
    ///
    /// let mut page = aegis.list().status(Status::Pending).await?;
    /// loop {
    ///     for action in &page.actions {
    ///         println!("{}: {:?}", action.request_id, action.title);
    ///     }
    ///     let Some(cursor) = page.next_cursor else { break };
    ///     page = aegis.list().status(Status::Pending).cursor(cursor).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn list(&self) -> OperationCall<S, List> {
        OperationCall::new(self.clone(), Ok(List::default()))
    }

    /// Looks at an action with all that is on record: payload, comment, result and history. `id` is
    /// the server's.
    pub fn look<T>(&self, id: T) -> OperationCall<S, Look>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        OperationCall::about(self.clone(), id, Look::new)
    }

    /// Waits until an action is decided, for `limit` at the most. `id` is the server's. See
    /// [`WaitCall`].
    pub fn wait_for_decision<T>(&self, id: T, limit: Duration) -> WaitCall<S>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        WaitCall::new(self.clone(), operation::checked(id), limit)
    }

    /// Approves an action by the server's id, as its reviewer.
    ///
    /// ```no_run
    /// # async fn run(aegis: aegis_hitl::AegisService, id: aegis_hitl::RequestId)
    /// # -> Result<(), aegis_hitl::Error> {
    /// let action = aegis.look(id.clone()).await?;
    /// // Show the payload to a person, and then:
    /// aegis
    ///     .approve_action(id)
    ///     .digest(action.digest)
    ///     .comment("fine")
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn approve_action<T>(&self, id: T) -> OperationCall<S, DecideById>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        self.decide_action(Decision::Approve, id)
    }

    /// Rejects an action by the server's id, as its reviewer.
    pub fn reject_action<T>(&self, id: T) -> OperationCall<S, DecideById>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        self.decide_action(Decision::Reject, id)
    }

    /// Approves or rejects an action by the server's id, as its reviewer.
    pub fn decide_action<T>(&self, decision: Decision, id: T) -> OperationCall<S, DecideById>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        OperationCall::about(self.clone(), id, |id| DecideById::new(id, decision))
    }

    /// Withdraws an action that nobody has decided. If it is decided,
    /// [`is_closed`](super::Error::is_closed).
    pub fn cancel<T>(&self, id: T) -> OperationCall<S, Cancel>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        OperationCall::about(self.clone(), id, Cancel::new)
    }

    /// Claims an approved action: spends the approval, so that nobody else runs it.
    ///
    /// If another call has spent it, the call fails with
    /// [`is_already_claimed`](super::Error::is_already_claimed). Whoever holds a claim renews it
    /// before its lease ends, and reports the outcome with [`complete`](Self::complete) or
    /// [`fail`](Self::fail). [`action`](Self::action) does all that.
    ///
    /// ```no_run
    /// # async fn run(aegis: aegis_hitl::AegisService, id: aegis_hitl::RequestId)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// use aegis_hitl::protocol::Digest;
    ///
    /// let action = aegis.look(id.clone()).await?;
    /// let payload = action.effective_payload().ok_or("nothing to run")?;
    /// let digest = Digest::of(payload)?;
    /// let claimed = aegis.claim(id.clone()).digest(digest).await?;
    /// let token = claimed.claim.token;
    /// // Run it, and then:
    /// aegis.complete(id, &token).result("done").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn claim<T>(&self, id: T) -> OperationCall<S, Claim>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        OperationCall::about(self.clone(), id, Claim::new)
    }

    /// Extends a claim, from now on. If it is lost,
    /// [`is_claim_lost`](super::Error::is_claim_lost).
    pub fn renew<T>(&self, id: T, token: &ClaimToken) -> OperationCall<S, Renew>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        OperationCall::about(self.clone(), id, |id| Renew::new(id, token.clone()))
    }

    /// Reports that a claimed action was carried out. The same report with the same token may be
    /// sent again.
    pub fn complete<T>(&self, id: T, token: &ClaimToken) -> OperationCall<S, Complete>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        OperationCall::about(self.clone(), id, |id| Complete::new(id, token.clone()))
    }

    /// Reports that a claimed action could not be carried out. A human then decides again. The same
    /// report with the same token may be sent again.
    pub fn fail<T>(&self, id: T, token: &ClaimToken) -> OperationCall<S, Fail>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        OperationCall::about(self.clone(), id, |id| Fail::new(id, token.clone()))
    }

    /// Follows the tenant's events. See [`EventsCall`].
    pub fn events(&self) -> EventsCall<S> {
        EventsCall::new(self.clone())
    }
}
