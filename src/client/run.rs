//! Running an action once, from the submission to the report.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Body;
use http_body_util::Full;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tower_service::Service;

use super::answer::is_same;
use super::operation::{
    Claim, Claimed, Complete, Fail, Look, Operation, OperationCall, Renew, Settings, Submit,
    digest_of,
};
use super::request::{Limits, Question};
use super::wait::{Pauses, Wait};
use super::{AegisService, Error};
use crate::layer::after;
use crate::protocol::{
    self, Action, Closed, Decision, Digest, InvalidValue, JsonText, Payload, RequestId, TenantId,
    ThreadId,
};

/// The default lease. It is renewed at a third of itself.
const LEASE: Duration = Duration::from_secs(300);

/// The largest result that servers keep, in bytes.
const MAX_RESULT: usize = 64 * 1024;

/// The most characters of a reason that servers keep.
const MAX_REASON: usize = 4096;

/// The longest pause before a renewal that failed is tried again.
const RENEWAL_PAUSE: Duration = Duration::from_secs(5);

/// An action to be run once, when it is approved. Made by [`AegisService::action`].
///
/// [`run_once`](Self::run_once) submits the action and waits for the decision. Then it claims the
/// action with the digest that it computes over the very payload that it is about to run, which
/// spends the approval. It runs the closure, renews the claim meanwhile, and reports the outcome.
///
/// # How often the closure runs
///
/// Once for an approval at the most, in all processes together, wherever this one is dropped or
/// killed. A process that restarts makes the same call with the same key: the submission finds the
/// action on record, the claim finds the approval spent, and the outcome is
/// [`RunOutcome::AlreadyRun`]. If the first process died while it ran, its lease ends, the execution
/// is on record as `unknown`, and a human decides again. Only after another approval it runs again.
///
/// If the claim is lost while the closure runs, the closure is dropped
/// ([`RunOutcome::Interrupted`]). A machine that was suspended notices that late, at the next
/// renewal.
///
/// What the closure does outside takes effect exactly once only if the system that it calls
/// deduplicates by the action's [id](Approved::request_id) or refuses an older
/// [fence](Approved::fence).
#[must_use = "nothing is sent before `run_once`"]
pub struct RunCall<S> {
    submit: OperationCall<S, Submit>,
    decide_within: Duration,
    lease: Duration,
}

impl<S> RunCall<S> {
    pub(super) fn new(submit: OperationCall<S, Submit>) -> Self {
        Self {
            submit,
            decide_within: Duration::MAX,
            lease: LEASE,
        }
    }

    fn map(self, set: impl FnOnce(OperationCall<S, Submit>) -> OperationCall<S, Submit>) -> Self {
        Self {
            submit: set(self.submit),
            ..self
        }
    }

    /// Sets the tenant, in place of the service's.
    pub fn tenant_id<T>(self, tenant: T) -> Self
    where
        T: TryInto<TenantId, Error: Into<InvalidValue>>,
    {
        self.map(|submit| submit.tenant_id(tenant))
    }

    /// Sets the thread, in place of the service's.
    pub fn thread_id<T>(self, thread: T) -> Self
    where
        T: TryInto<ThreadId, Error: Into<InvalidValue>>,
    {
        self.map(|submit| submit.thread_id(thread))
    }

    /// Sets what the action is about: anything that serializes to a JSON object. Its member
    /// `aegis` is reserved.
    pub fn payload<T: Serialize + ?Sized>(self, payload: &T) -> Self {
        self.map(|submit| submit.payload(payload))
    }

    /// Sets what the action is about in a line for people: 1 to 256 characters.
    pub fn title(self, title: impl Into<String>) -> Self {
        self.map(|submit| submit.title(title))
    }

    /// Sets when the action is rejected as expired, if nobody has decided by then.
    pub fn expires_at(self, end: SystemTime) -> Self {
        self.map(|submit| submit.expires_at(end))
    }

    /// Sets whether the reviewer may edit the payload. The closure then receives the edited one.
    /// The default is no.
    pub fn allow_edit(self, allow: bool) -> Self {
        self.map(|submit| submit.allow_edit(allow))
    }

    /// Sets how long to wait for the decision. By default for as long as it takes.
    pub fn decide_within(mut self, limit: Duration) -> Self {
        self.decide_within = limit;
        self
    }

    /// Sets how long the claim outlives this process: 1 second to a day. The default is 5 minutes.
    ///
    /// While the closure runs, the claim is renewed at a third of the lease. So a short lease
    /// notices a dead process soon, and a long one endures a longer outage of the server.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Sets the time limit for each request as a whole, in place of the service's deadline. It does
    /// not bound the wait for the decision, nor the closure.
    pub fn deadline(self, deadline: Duration) -> Self {
        self.map(|submit| submit.deadline(deadline))
    }

    /// Sets the maximum number of retries of each request, in place of the service's.
    pub fn max_retries(self, retries: u32) -> Self {
        self.map(|submit| submit.max_retries(retries))
    }

    /// Sets the time limit for one attempt of each request, in place of the service's timeout.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.map(|submit| submit.timeout(timeout))
    }
}

impl<S> fmt::Debug for RunCall<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunCall")
            .field("decide_within", &self.decide_within)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}

/// What a closure may run: an action that was approved, and that this call has claimed.
#[derive(Debug)]
pub struct Approved {
    payload: Option<Payload>,
    action: Action,
    claim: protocol::Claim,
}

impl Approved {
    /// Returns what to run: the payload as it was submitted, or as the reviewer edited it.
    pub fn payload(&self) -> Option<&Payload> {
        self.payload.as_ref()
    }

    /// Deserializes what to run. Without a payload it is `{}`.
    ///
    /// # Errors
    ///
    /// If the payload does not have the shape of a `T`.
    pub fn parse<'de, T: Deserialize<'de>>(&'de self) -> Result<T, serde_json::Error> {
        match &self.payload {
            Some(payload) => payload.parse(),
            None => serde_json::from_str("{}"),
        }
    }

    /// Returns the server's id for the action. Systems that deduplicate should do so by it.
    pub fn request_id(&self) -> &RequestId {
        &self.action.request_id
    }

    /// Returns a number that grows with every claim of the action, for systems that refuse an older
    /// one.
    pub fn fence(&self) -> u64 {
        self.claim.fence
    }

    /// Returns the claim, as it was granted.
    pub fn claim(&self) -> &protocol::Claim {
        &self.claim
    }

    /// Returns the action, as it was claimed.
    pub fn action(&self) -> &Action {
        &self.action
    }
}

/// What became of an action that was to be run once.
#[derive(Debug)]
#[non_exhaustive]
pub enum RunOutcome<T, E> {
    /// The closure succeeded, and that is on record.
    Completed {
        /// What the closure returned.
        value: T,
        /// The action on record. If `value` does not serialize to JSON of up to 64 KiB, it has no
        /// result.
        action: Box<Action>,
    },
    /// The closure failed, and that is on record. A human decides again.
    Failed {
        /// What the closure returned.
        error: E,
        /// The action on record.
        action: Box<Action>,
    },
    /// The closure ended, but the server did not confirm the report of its outcome. It may be on
    /// record, or the execution may be on record as unknown.
    Unreported {
        /// What the closure returned.
        outcome: Result<T, E>,
        /// Why the report is not confirmed.
        error: Error,
    },
    /// The claim was lost while the closure ran: it could not be renewed before its lease ended. The
    /// closure was dropped in the middle, because a human may now decide that somebody else runs
    /// the action. What it did until then is unknown, and on record as unknown.
    Interrupted {
        /// The action, as it was claimed.
        action: Box<Action>,
        /// Why the claim could not be renewed.
        error: Error,
    },
    /// A reviewer rejected the action. Nothing was run.
    Rejected(Box<Action>),
    /// Nobody decided before the action expired. Nothing was run.
    Expired(Box<Action>),
    /// The action was cancelled. Nothing was run.
    Cancelled(Box<Action>),
    /// Another call spent the approval. Nothing was run by this one.
    ///
    /// The action's [`execution`](Action::execution) tells how it stands: it may still run, or have
    /// completed with a [`result`](Action::result), or failed, or its outcome may be unknown. In
    /// the latter two cases a human decides again.
    AlreadyRun(Box<Action>),
}

impl<T, E> RunOutcome<T, E> {
    /// Returns the outcome of an action that is not to be run any more, or else the action.
    fn settled(action: Box<Action>) -> Result<Self, Box<Action>> {
        if action.execution.is_some() {
            return Ok(Self::AlreadyRun(action));
        }
        match (action.decision, action.closed) {
            (Some(Decision::Reject), Some(Closed::Expired)) => Ok(Self::Expired(action)),
            (Some(Decision::Reject), Some(Closed::Cancelled)) => Ok(Self::Cancelled(action)),
            (Some(Decision::Reject), _) => Ok(Self::Rejected(action)),
            _ => Err(action),
        }
    }
}

impl<S, R> RunCall<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    /// Runs `work` once, if the action is approved; see [`RunCall`].
    ///
    /// A closure that blocks its thread keeps the claim from being renewed. Such work belongs into
    /// `spawn_blocking`. Note that work in another task goes on if the closure is dropped.
    ///
    /// # Errors
    ///
    /// If the closure was not run and may still be: the submission failed, nobody decided in time
    /// ([`Error::is_timeout`]), the payload on record is another one
    /// ([`Error::is_payload_mismatch`]), or the claim could not be confirmed. If the claim was
    /// granted without this call's knowledge ([`Error::is_outcome_unknown`]), its lease ends with
    /// nothing run, the execution is on record as unknown, and a human decides again.
    pub async fn run_once<F, Fut, T, E>(self, work: F) -> Result<RunOutcome<T, E>, Error>
    where
        F: FnOnce(Approved) -> Fut,
        Fut: Future<Output = Result<T, E>>,
        T: Serialize,
        E: fmt::Display,
    {
        super::operation::lease_in_seconds(self.lease)?;
        let until = after(self.decide_within);
        let (service, submit, settings) = self.submit.into_parts();
        let submit = submit?;
        let mut run = Run {
            service,
            // Each request has an id of its own.
            settings: Settings {
                call_id: None,
                ..settings
            },
            lease: self.lease,
        };
        let own = submit.payload.clone();
        let submitted = run.perform(submit).await?;
        let id = submitted.request_id;
        let wait = Wait {
            tenant: run.settings.tenant.clone(),
            limits: run.settings.limits,
        };
        let decided = run.service.decided(&id, &wait, until).await?;
        if !is_same(&decided.request_id, &id) {
            let fault = "the status answer is about another action";
            return Err(Error::protocol(fault, StatusCode::OK, 1));
        }
        let decided = match RunOutcome::settled(decided.into()) {
            Ok(outcome) => return Ok(outcome),
            Err(decided) => decided,
        };
        let (payload, digest) = run.to_be_run(own, &decided, &id).await?;
        let begun = Instant::now();
        let Claimed { action, claim } = match run.claim(&id, digest).await {
            Ok(claimed) => claimed,
            Err(error) if error.is_already_claimed() || error.is_not_approved() => {
                return run.became(&id, error).await;
            }
            Err(error) => return Err(error),
        };
        let mut held = Held {
            id,
            token: claim.token.clone(),
            begun,
        };
        let approved = Approved {
            payload,
            action: action.clone(),
            claim,
        };
        let ended = {
            let mut keeping = pin!(run.keep(&mut held));
            let mut working = pin!(work(approved));
            std::future::poll_fn(|cx| {
                if let Poll::Ready(outcome) = working.as_mut().poll(cx) {
                    return Poll::Ready(Ok(outcome));
                }
                keeping.as_mut().poll(cx).map(Err)
            })
            .await
        };
        match ended {
            Ok(outcome) => Ok(run.report(&held, outcome).await),
            Err(error) => Ok(RunOutcome::Interrupted {
                action: action.into(),
                error,
            }),
        }
    }
}

/// A run and the settings of its requests.
struct Run<S> {
    service: AegisService<S>,
    settings: Settings,
    lease: Duration,
}

/// A claim that is held.
struct Held {
    id: RequestId,
    token: protocol::ClaimToken,
    /// When the request began that granted or renewed the claim last. The lease is counted from
    /// here, so that it never ends later on this side than on the server's.
    begun: Instant,
}

impl<S, R> Run<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    async fn perform<O: Operation>(&self, operation: O) -> Result<O::Output, Error> {
        let service = self.service.clone();
        service.perform(operation, self.settings.clone()).await
    }

    /// The settings of a request that has to end within `left`.
    fn within(&self, left: Duration) -> Settings {
        let limits = self.settings.limits;
        Settings {
            limits: Limits {
                deadline: Some(limits.deadline.unwrap_or(left).min(left)),
                ..limits
            },
            ..self.settings.clone()
        }
    }

    /// Returns what is to be run, with the digest computed here: what the reviewer edited, or else
    /// what this call submitted.
    async fn to_be_run(
        &self,
        own: Option<Payload>,
        decided: &Action,
        id: &RequestId,
    ) -> Result<(Option<Payload>, Option<Digest>), Error> {
        let edited = decided.edited_payload.clone();
        let payload = edited.or_else(|| own.clone());
        let digest = payload.as_ref().map(digest_of).transpose()?.flatten();
        if decided.digest.is_none() || decided.digest == digest {
            return Ok((payload, digest));
        }
        // The status may leave out what the reviewer edited.
        let look = self.perform(Look::new(id.clone())).await?;
        let payload = look.edited_payload.or(own);
        let digest = payload.as_ref().map(digest_of).transpose()?.flatten();
        Ok((payload, digest))
    }

    async fn claim(&self, id: &RequestId, digest: Option<Digest>) -> Result<Claimed, Error> {
        let claim = Claim::of(id.clone(), digest, self.lease);
        // At least half of the lease is left when the closure starts.
        let settings = self.within(self.lease / 2);
        self.service.clone().perform(claim, settings).await
    }

    /// Returns what became of an action whose claim was refused, as far as that is known.
    async fn became<T, E>(
        &self,
        id: &RequestId,
        refused: Error,
    ) -> Result<RunOutcome<T, E>, Error> {
        let question = Question {
            tenant: self.settings.tenant.clone(),
            wait: None,
            limits: self.settings.limits,
        };
        // The status has the result too. The refusal has the state alone.
        let asked = self.service.clone().ask(id.clone(), question).await.ok();
        let known = [asked.as_ref(), refused.recorded()];
        let settled = known
            .into_iter()
            .flatten()
            .filter(|action| is_same(&action.request_id, id))
            .find_map(|action| RunOutcome::settled(action.clone().into()).ok());
        // It may be approved again by now. Then the caller may try again too.
        settled.ok_or(refused)
    }

    /// Renews a claim until it is lost. Returns why.
    async fn keep(&self, held: &mut Held) -> Error {
        let third = self.lease / 3;
        let mut next = held.begun + third;
        let mut last = None;
        loop {
            let end = held.begun + self.lease;
            sleep_until(next.min(end)).await;
            let begun = Instant::now();
            let renew = Renew::new(held.id.clone(), held.token.clone()).with_lease(self.lease);
            let mut settings = self.within(end.saturating_duration_since(begun));
            // A lost answer leaves time for another attempt.
            let limit = settings.limits.timeout.unwrap_or(third).min(third);
            settings.limits.timeout = Some(limit);
            let renewed = self.service.clone().perform(renew, settings);
            match timeout_at(end, renewed).await {
                Ok(Ok(_)) => {
                    held.begun = begun;
                    next = begun + third;
                }
                Ok(Err(error)) if error.is_claim_lost() => return error,
                Ok(Err(error)) if Instant::now() < end => {
                    next = Instant::now() + RENEWAL_PAUSE.min(self.lease / 10);
                    last = Some(error);
                }
                Ok(Err(error)) => return Error::lease_ended().with_source(error),
                Err(_) => {
                    let ended = Error::lease_ended();
                    return last.into_iter().fold(ended, Error::with_source);
                }
            }
        }
    }

    /// Reports what the closure returned.
    async fn report<T, E>(&self, held: &Held, outcome: Result<T, E>) -> RunOutcome<T, E>
    where
        T: Serialize,
        E: fmt::Display,
    {
        let (id, token) = (held.id.clone(), held.token.clone());
        let reported = match &outcome {
            Ok(value) => {
                let mut complete = Complete::new(id, token);
                complete.result = JsonText::new(value)
                    .ok()
                    .filter(|result| result.as_str().len() <= MAX_RESULT);
                self.insist(held, complete).await
            }
            Err(error) => {
                let mut fail = Fail::new(id, token);
                fail.reason = Some(error.to_string().chars().take(MAX_REASON).collect());
                self.insist(held, fail).await
            }
        };
        match (reported, outcome) {
            (Err(error), outcome) => RunOutcome::Unreported { outcome, error },
            (Ok(action), Ok(value)) => RunOutcome::Completed {
                value,
                action: action.into(),
            },
            (Ok(action), Err(error)) => RunOutcome::Failed {
                error,
                action: action.into(),
            },
        }
    }

    /// Sends a report until it is confirmed or refused, or the lease has ended.
    async fn insist<O>(&self, held: &Held, report: O) -> Result<Action, Error>
    where
        O: Operation<Output = Action> + Clone,
    {
        let settings = Settings {
            call_id: Some(RequestId::mint()),
            ..self.settings.clone()
        };
        let end = held.begun + self.lease;
        let mut pauses = Pauses::default();
        loop {
            let service = self.service.clone();
            match service.perform(report.clone(), settings.clone()).await {
                Err(error) if error.is_transient() => {
                    let pause = pauses.next_after(&error);
                    if Instant::now() + pause >= end {
                        return Err(error);
                    }
                    sleep(pause).await;
                }
                reported => return reported,
            }
        }
    }
}
