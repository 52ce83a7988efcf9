//! Claiming an approved action, and renewing the claim.

use std::time::Duration;

use http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::{Operation, OperationCall, Sent, Wire, digest_shown, path};
use crate::client::Error;
use crate::client::answer::{Answer, Object, object};
use crate::client::endpoints::Endpoints;
use crate::protocol::{self, Action, ClaimToken, Decision, Digest, Execution, RequestId, Status};

/// The longest lease, in seconds: a day.
const MAX_LEASE: u64 = 86_400;

/// A claim on an approved action; see [`AegisService::claim`](crate::AegisService::claim).
#[derive(Debug, Clone)]
pub struct Claim {
    id: RequestId,
    digest: Option<Digest>,
    lease: Option<Duration>,
}

impl Claim {
    pub(in crate::client) fn new(id: RequestId) -> Self {
        Self {
            id,
            digest: None,
            lease: None,
        }
    }

    pub(in crate::client) fn of(id: RequestId, digest: Option<Digest>, lease: Duration) -> Self {
        Self {
            id,
            digest,
            lease: Some(lease),
        }
    }
}

/// A claim that was granted, and the action that it allows to run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Claimed {
    /// The action, with what is to be run.
    #[serde(deserialize_with = "an_object")]
    pub action: Action,
    /// The claim.
    #[serde(deserialize_with = "an_object")]
    pub claim: protocol::Claim,
}

/// The parts of a claim.
impl<S> OperationCall<S, Claim> {
    /// Sets the digest of what is about to be run. It is required where the action has a payload.
    /// Another one than was approved is a [payload mismatch](Error::is_payload_mismatch).
    ///
    /// Compute it from the payload that will be run, with [`Digest::of`], not from what the server
    /// sent: that is what keeps what is run and what was approved the same.
    pub fn digest(self, digest: impl Into<Option<Digest>>) -> Self {
        self.with(Ok(digest.into()), |claim, digest| claim.digest = digest)
    }

    /// Sets how long the claim lasts unless it is renewed: 1 second to a day, rounded up to whole
    /// seconds. The default is 5 minutes.
    pub fn lease(self, lease: Duration) -> Self {
        self.with(Ok(lease), |claim, lease| claim.lease = Some(lease))
    }
}

/// Returns a lease in the unit of the wire.
pub(in crate::client) fn seconds(lease: Duration) -> Result<u64, Error> {
    let seconds = lease
        .as_secs()
        .saturating_add(u64::from(lease.subsec_nanos() > 0));
    if (1..=MAX_LEASE).contains(&seconds) {
        return Ok(seconds);
    }
    Err(Error::request(format!(
        "the lease is {seconds} seconds; allowed are 1 to {MAX_LEASE}"
    )))
}

/// Reads a member that is a JSON object. An array would be read as the members in their order.
fn an_object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    let raw = Box::<RawValue>::deserialize(deserializer)?;
    if !raw.get().starts_with('{') {
        return Err(serde::de::Error::custom("a member is not a JSON object"));
    }
    serde_json::from_str(raw.get()).map_err(serde::de::Error::custom)
}

#[derive(Serialize)]
struct ClaimBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<Digest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<u64>,
}

impl Operation for Claim {
    type Output = Claimed;

    fn wire(&mut self, _: &Endpoints) -> Result<Wire, Error> {
        let body = ClaimBody {
            digest: self.digest,
            lease: self.lease.map(seconds).transpose()?,
        };
        Wire::post(path(&self.id, "claim"), &body)
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<Claimed, Error> {
        let subject = sent.about(&self.id);
        let Object(claimed, head) = object::<Claimed>(answer, &[StatusCode::OK], &subject)?;
        let action = &claimed.action;
        if !subject.is_of(action) {
            return Err(head.fault("it is about another action or tenant"));
        }
        let is_approved = action.decision == Some(Decision::Approve)
            && action.status == Status::Committed
            && action.closed.is_none()
            && action.execution == Some(Execution::Claimed);
        if !is_approved {
            return Err(head.fault("its action is not approved and claimed"));
        }
        let shown = digest_shown(action);
        let shown = shown.map_err(|_| head.fault("its payload has no digest"))?;
        if action.digest != self.digest || shown.is_some_and(|shown| shown != self.digest) {
            return Err(head.fault("its action has another payload than is about to be run"));
        }
        Ok(claimed)
    }
}

/// The renewal of a claim; see [`AegisService::renew`](crate::AegisService::renew).
#[derive(Debug, Clone)]
pub struct Renew {
    id: RequestId,
    token: ClaimToken,
    lease: Option<Duration>,
    /// What the answer has to be about, if the caller knows it.
    fence: Option<u64>,
}

impl Renew {
    pub(in crate::client) fn new(id: RequestId, token: ClaimToken) -> Self {
        Self {
            id,
            token,
            lease: None,
            fence: None,
        }
    }

    /// The renewal of a claim that was granted for `lease`.
    pub(in crate::client) fn of(id: RequestId, claim: &protocol::Claim, lease: Duration) -> Self {
        Self {
            lease: Some(lease),
            fence: Some(claim.fence),
            ..Self::new(id, claim.token.clone())
        }
    }
}

/// The parts of a renewal.
impl<S> OperationCall<S, Renew> {
    /// Sets how long the claim lasts from now on: 1 second to a day, rounded up to whole seconds.
    /// The default is 5 minutes.
    pub fn lease(self, lease: Duration) -> Self {
        self.with(Ok(lease), |renew, lease| renew.lease = Some(lease))
    }
}

#[derive(Serialize)]
struct RenewBody<'a> {
    token: &'a ClaimToken,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<u64>,
}

#[derive(Deserialize)]
struct Renewed {
    #[serde(deserialize_with = "an_object")]
    claim: protocol::Claim,
}

impl Operation for Renew {
    type Output = protocol::Claim;

    fn wire(&mut self, _: &Endpoints) -> Result<Wire, Error> {
        let body = RenewBody {
            token: &self.token,
            lease: self.lease.map(seconds).transpose()?,
        };
        Wire::post(path(&self.id, "renew"), &body)
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<protocol::Claim, Error> {
        let subject = sent.about(&self.id);
        let Object(Renewed { claim }, head) = object(answer, &[StatusCode::OK], &subject)?;
        let is_same_claim = self.fence.is_none_or(|fence| fence == claim.fence);
        if claim.token != self.token || !is_same_claim {
            return Err(head.fault("it is about another claim"));
        }
        Ok(claim)
    }
}
