//! The steps after the submission: claiming, renewing and reporting.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use serde::Serialize;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tower_service::Service;

use super::RunOutcome;
use crate::client::answer::is_same;
use crate::client::operation::{
    Claim, Claimed, Complete, Fail, Look, Operation, Renew, Settings, digest_of, digest_of_edit,
};
use crate::client::request::{Limits, Question};
use crate::client::wait::Pauses;
use crate::client::{AegisService, Error};
use crate::protocol::{self, Action, Digest, JsonText, Payload, RequestId, check_json};

/// The largest result that servers keep, in bytes.
const MAX_RESULT: usize = 64 * 1024;

/// The most characters of a reason that servers keep.
const MAX_REASON: usize = 4096;

/// The longest pause before a renewal that failed is tried again.
const RENEWAL_PAUSE: Duration = Duration::from_secs(5);

/// A run and the settings of its requests.
pub(super) struct Run<S> {
    pub(super) service: AegisService<S>,
    /// Without a call id: each request has one of its own.
    pub(super) settings: Settings,
    pub(super) lease: Duration,
}

/// A claim that is held.
pub(super) struct Held {
    pub(super) id: RequestId,
    pub(super) claim: protocol::Claim,
    /// When the request began that granted or renewed the claim last. The lease is counted from
    /// here, so that it never ends later on this side than on the server's.
    pub(super) begun: Instant,
}

impl<S, R> Run<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    pub(super) async fn perform<O: Operation>(&self, operation: O) -> Result<O::Output, Error> {
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
    pub(super) async fn to_be_run(
        &self,
        own: Option<Payload>,
        decided: &Action,
        id: &RequestId,
    ) -> Result<(Option<Payload>, Option<Digest>), Error> {
        let (payload, digest) = chosen(decided.edited_payload.clone(), own.clone())?;
        if decided.digest.is_none() || decided.digest == digest {
            return Ok((payload, digest));
        }
        // The status may leave out what the reviewer edited.
        let look = self.perform(Look::new(id.clone())).await?;
        chosen(look.edited_payload, own)
    }

    pub(super) async fn claim(
        &self,
        id: &RequestId,
        digest: Option<Digest>,
    ) -> Result<Claimed, Error> {
        let claim = Claim::of(id.clone(), digest, self.lease);
        // At least half of the lease is left when the closure starts.
        let settings = self.within(self.lease / 2);
        self.service.clone().perform(claim, settings).await
    }

    /// Returns what became of an action whose claim was refused, as far as that is known.
    pub(super) async fn became<T, E>(
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
    pub(super) async fn keep(&self, held: &mut Held) -> Error {
        let third = self.lease / 3;
        let mut next = held.begun + third;
        let mut last = None;
        loop {
            let end = held.begun + self.lease;
            sleep_until(next.min(end)).await;
            let begun = Instant::now();
            let renew = Renew::of(held.id.clone(), &held.claim, self.lease);
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
    pub(super) async fn report<T, E>(&self, held: &Held, outcome: Result<T, E>) -> RunOutcome<T, E>
    where
        T: Serialize,
        E: fmt::Display,
    {
        let (id, token) = (held.id.clone(), held.claim.token.clone());
        let reported = match &outcome {
            Ok(value) => {
                let mut complete = Complete::new(id, token);
                complete.result = JsonText::new(value).ok().filter(|result| {
                    result.as_str().len() <= MAX_RESULT && check_json(result.as_str()).is_ok()
                });
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

/// What is to be run, with its digest: what the reviewer edited, or else what this call submitted.
fn chosen(
    edited: Option<Payload>,
    own: Option<Payload>,
) -> Result<(Option<Payload>, Option<Digest>), Error> {
    let digest = match (&edited, &own) {
        (Some(edited), _) => Some(digest_of_edit(edited)?),
        (None, Some(own)) => digest_of(own)?,
        (None, None) => None,
    };
    Ok((edited.or(own), digest))
}
