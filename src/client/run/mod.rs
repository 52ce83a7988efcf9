//! Running an action once, from the submission to the report.

mod outcome;
mod steps;

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use serde::Serialize;
use tokio::time::Instant;
use tower_service::Service;

pub use self::outcome::{Approved, RunOutcome};

use self::steps::{Held, Run};
use super::Error;
use super::operation::{Claimed, OperationCall, Submit, lease_in_seconds};
use super::wait::Wait;
use crate::layer::after;
use crate::protocol::{InvalidValue, TenantId, ThreadId};

/// The default lease. It is renewed at a third of itself.
const LEASE: Duration = Duration::from_secs(300);

/// An action to be run once, when it is approved. Made by
/// [`AegisService::action`](super::AegisService::action).
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
/// [`RunOutcome::AlreadyRun`]. If the first process died while it ran, its lease ends, the
/// execution is on record as `unknown`, and a human decides again. It runs again only after another
/// approval. An action that the server removed, as its retention was over, never runs again: it is
/// `AlreadyRun` too, or [`RunOutcome::Removed`] if nobody had run it.
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
        lease_in_seconds(self.lease)?;
        let until = after(self.decide_within);
        let (service, submit, settings) = self.submit.into_parts();
        let submit = submit?;
        let mut run = Run {
            service,
            settings,
            lease: self.lease,
        };
        let own = submit.payload.clone();
        let known = run.perform(submit).await?;
        let id = known.request_id.clone();
        let wait = Wait {
            tenant: run.settings.tenant.clone(),
            limits: run.settings.limits,
        };
        let decided = match run.service.decided(&id, &wait, until).await {
            Ok(decided) => decided,
            Err(error) if error.is_unknown_action() && known.decision.is_some() => {
                // By its id it is unknown, by its key it is not: it was decided, and removed.
                return Ok(RunOutcome::settled(known.into()).unwrap_or_else(RunOutcome::Removed));
            }
            Err(error) => return Err(error),
        };
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
            claim: claim.clone(),
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
