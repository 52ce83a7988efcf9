//! Waiting for a decision, across failures.

use std::error::Error as StdError;
use std::fmt;
use std::future::IntoFuture;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Body;
use http_body_util::Full;
use tokio::time::Instant;
use tower_service::Service;
use uuid::Uuid;

use super::answer::is_same;
use super::endpoints::MAX_WAIT;
use super::operation::checked;
use super::request::{BoxFuture, Limits, Question};
use super::{AegisService, Error};
use crate::layer::after;
use crate::protocol::{Action, InvalidValue, RequestId, Status, TenantId};

/// The pause after a server answered sooner than it was asked to wait, and the first one after a
/// failure.
const PAUSE: Duration = Duration::from_millis(500);

/// The longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// The longest `Retry-After` that is followed.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

/// A wait for a decision, begun when awaited. Made by
/// [`AegisService::wait_for_decision`].
///
/// It asks for the status, and the server answers when the action is decided, or after 55 seconds.
/// It goes on, over lost connections and unavailable servers, until the action is decided or the
/// limit is over. The id is the server's.
///
/// # Errors
///
/// If nobody decides in time ([`Error::is_timeout`]): the action stays as it is, and may be waited
/// for again. If the server did not answer at the end, the source of the error tells why.
///
/// If the server does not know the action, or refuses the request. If its answer is about another
/// action, or names no decision that this version knows ([`Error::is_protocol`]).
///
/// ```no_run
/// # async fn run(aegis: aegis_hitl::AegisService, id: aegis_hitl::RequestId)
/// # -> Result<(), aegis_hitl::Error> {
/// use std::time::Duration;
///
/// match aegis.wait_for_decision(id, Duration::from_secs(3600)).await {
///     Ok(action) => println!("decided: {:?}", action.decision),
///     Err(error) if error.is_timeout() => println!("not yet"),
///     Err(error) => return Err(error),
/// }
/// # Ok(())
/// # }
/// ```
#[must_use = "the wait begins when it is awaited"]
pub struct WaitCall<S> {
    service: AegisService<S>,
    id: Result<RequestId, Error>,
    limit: Duration,
    wait: Wait,
}

/// How to wait.
#[derive(Debug, Clone, Default)]
pub(super) struct Wait {
    pub(super) tenant: Option<TenantId>,
    /// The limits of each request. The deadline is the wait's own.
    pub(super) limits: Limits,
}

impl<S> WaitCall<S> {
    pub(super) fn new(
        service: AegisService<S>,
        id: Result<RequestId, Error>,
        limit: Duration,
    ) -> Self {
        Self {
            service,
            id,
            limit,
            wait: Wait::default(),
        }
    }

    /// Sets the tenant, in place of the service's.
    pub fn tenant_id<T>(mut self, tenant: T) -> Self
    where
        T: TryInto<TenantId, Error: Into<InvalidValue>>,
    {
        match checked(tenant) {
            Ok(tenant) => self.wait.tenant = Some(tenant),
            Err(error) => self.id = self.id.and(Err(error)),
        }
        self
    }

    /// Sets how long one attempt may take beyond the time that it asks the server to wait, in place
    /// of the service's timeout.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.wait.limits.timeout = Some(timeout);
        self
    }
}

impl<S> fmt::Debug for WaitCall<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WaitCall")
            .field("id", &self.id)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl<S, R> IntoFuture for WaitCall<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body + Send + 'static,
    R::Data: Send,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Output = Result<Action, Error>;
    type IntoFuture = BoxFuture<Action>;

    fn into_future(mut self) -> Self::IntoFuture {
        Box::pin(async move {
            let until = after(self.limit);
            self.service.decided(&self.id?, &self.wait, until).await
        })
    }
}

impl<S, R> AegisService<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    /// Waits until an action is decided.
    pub(super) async fn decided(
        &mut self,
        id: &RequestId,
        wait: &Wait,
        until: Option<Instant>,
    ) -> Result<Action, Error> {
        let mut last = Some(Error::unanswered());
        let waiting = self.decided_some_day(id, wait, until, &mut last);
        let decided = match until {
            None => Ok(waiting.await),
            Some(until) => tokio::time::timeout_at(until, waiting).await,
        };
        decided.unwrap_or_else(|_| {
            let undecided = Error::undecided();
            // What went wrong last says why nobody could be asked, if nobody could.
            Err(last.into_iter().fold(undecided, Error::with_source))
        })
    }

    async fn decided_some_day(
        &mut self,
        id: &RequestId,
        wait: &Wait,
        until: Option<Instant>,
        last: &mut Option<Error>,
    ) -> Result<Action, Error> {
        let left = || until.map(|until| until.saturating_duration_since(Instant::now()));
        let mut pauses = Pauses::default();
        loop {
            let begun = Instant::now();
            // Whole seconds, so that the last answer comes before the end. Where there is no answer
            // yet, less than a second is for one that comes at once.
            let least = if last.is_some() {
                Duration::ZERO
            } else {
                PAUSE * 2
            };
            let asked = left().map_or(MAX_WAIT, |left| left.min(MAX_WAIT).max(least));
            let asked = Duration::from_secs(asked.as_secs());
            let outlives = left().is_some_and(|left| left < asked);
            let question = Question {
                tenant: wait.tenant.clone(),
                wait: Some(asked),
                limits: Limits {
                    // The service's deadline is not for waits.
                    deadline: Some(left().unwrap_or(Duration::MAX)),
                    ..wait.limits
                },
            };
            match self.ask(id.clone(), question).await {
                Ok(action) if !is_same(&action.request_id, id) => {
                    return Err(fault("it is about another action than was asked for"));
                }
                Ok(action) if action.status != Status::Pending && action.decision.is_some() => {
                    return Ok(action);
                }
                Ok(Action {
                    status: Status::Committed | Status::Failed,
                    ..
                }) => {
                    return Err(fault("it is decided and names no decision of the protocol"));
                }
                Ok(_) => {
                    *last = None;
                    pauses = Pauses::default();
                    // Some servers do not wait, and one that shuts down does not wait either.
                    if begun.elapsed() < asked / 2 {
                        tokio::time::sleep(PAUSE).await;
                    }
                }
                // The end of the wait cuts the question off. The one before was answered.
                Err(error) if error.is_timeout() && outlives && last.is_none() => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) if error.is_transient() => {
                    let pause = pauses.next_after(&error);
                    *last = Some(error);
                    tokio::time::sleep(pause).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// The error of a status answer that contradicts itself or the question.
fn fault(what: &str) -> Error {
    let detail = format!("the answer is not of the protocol: {what}");
    Error::protocol(detail, StatusCode::OK, 1)
}

/// The pauses after failures in a row: twice as long each time, with jitter.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    failures: u32,
}

impl Pauses {
    /// Returns the pause before the next attempt.
    pub(super) fn next(&mut self) -> Duration {
        let factor = 1_u32 << self.failures.min(5);
        self.failures = self.failures.saturating_add(1);
        let pause = (PAUSE * factor).min(LONGEST_PAUSE);
        // Up to half of it on top: a restarted server does not meet all its clients at once.
        let random = (Uuid::new_v4().as_u128() & 0xff) as u32;
        pause + pause * random / 512
    }

    /// The same after an answer that may ask for a longer pause.
    pub(super) fn next_after(&mut self, error: &Error) -> Duration {
        let asked = error.retry_after().unwrap_or_default();
        self.next().max(asked.min(LONGEST_RETRY_AFTER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_15_seconds_with_up_to_half_on_top() {
        let mut drawn = Vec::new();
        for _ in 0..100 {
            let mut pauses = Pauses::default();
            for millis in [500, 1000, 2000, 4000, 8000, 15_000, 15_000] {
                let (step, pause) = (Duration::from_millis(millis), pauses.next());
                assert!((step..=step * 3 / 2).contains(&pause), "{step:?} {pause:?}");
                drawn.push(pause.as_secs_f64() / step.as_secs_f64());
            }
        }
        assert!(drawn.iter().any(|pause| *pause < 1.05));
        assert!(drawn.iter().any(|pause| *pause > 1.45));
    }
}
