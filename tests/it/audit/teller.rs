//! A story with events of each kind.

use std::time::{Duration, SystemTime};

use aegis_hitl::protocol::JsonText;
use aegis_hitl::store::{
    Acquire, Acquired, Actor, AuditVerifier, Cancel, Decide, DecideById, Decided, Fingerprinted,
    Finish, Finished, Identity, Report, Store, Submission, Submit, Submitted, VerifiedChain,
};
use aegis_hitl::{Action, Decision, Payload, RequestId, TenantId};

/// A title with what is often mistaken in JSON.
pub(crate) const TITLE: &str = "\u{202e}\u{2028}\u{7f} \\u0041 \" é 😀 12345678901234567890";

/// A tenant of any store, of whose actions there is a story to tell.
pub(crate) struct Teller<S> {
    pub(crate) store: S,
    pub(crate) tenant: TenantId,
}

impl<S: Store> Teller<S> {
    fn identity(&self, key: &str) -> Identity {
        Identity {
            tenant_id: self.tenant.clone(),
            thread_id: "run-7".parse().unwrap(),
            idempotency_key: key.parse().unwrap(),
        }
    }

    async fn submit(&self, key: &str, expires_at: Option<SystemTime>) -> Action {
        self.submit_by("agent é", key, expires_at).await
    }

    pub(crate) async fn submit_by(
        &self,
        actor: &str,
        key: &str,
        expires_at: Option<SystemTime>,
    ) -> Action {
        let request = Submit {
            identity: self.identity(key),
            call_id: Some(RequestId::mint()),
            payload: payload(r#"{"n":1}"#),
            submission: Submission {
                title: Some(TITLE.to_owned()),
                expires_at,
                allow_edit: true,
            },
            only_existing: false,
            actor: Actor::new(actor),
        };
        match self.store.submit(request).await.unwrap() {
            Submitted::Recorded(action) => action,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn decide(&self, key: &str, call_id: Option<RequestId>) {
        let request = Decide {
            identity: self.identity(key),
            decision: Decision::Approve,
            call_id,
            payload: payload(r#"{"n":2}"#),
            comment: Some("fine".to_owned()),
            actor: Actor::new("reviewer"),
            require_submission: false,
            allow_self_approval: true,
        };
        let decided = self.store.decide(request).await.unwrap();
        assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
    }

    async fn decide_by_id(&self, action: &Action, edited: Option<&str>) -> Action {
        let request = DecideById {
            id: action.request_id.as_uuid().unwrap(),
            tenant_id: self.tenant.clone(),
            decision: Decision::Approve,
            call_id: Some(RequestId::mint()),
            digest: action.digest,
            edited: edited.and_then(payload),
            comment: None,
            actor: Actor::new("reviewer"),
            allow_self_approval: true,
        };
        match self.store.decide_by_id(request).await.unwrap() {
            Decided::Recorded(action) => action,
            other => panic!("{other:?}"),
        }
    }

    async fn execute(&self, action: &Action, report: Report) -> Action {
        let (id, tenant_id) = (action.request_id.as_uuid().unwrap(), self.tenant.clone());
        let acquire = Acquire {
            id,
            tenant_id: tenant_id.clone(),
            digest: action.digest,
            lease: Duration::from_secs(60),
            call_id: None,
            actor: Actor::new("worker"),
        };
        let Acquired::Claimed(_, claim) = self.store.acquire(acquire).await.unwrap() else {
            panic!("not claimed");
        };
        let finish = Finish {
            id,
            tenant_id,
            token: claim.token,
            report,
            call_id: None,
            actor: Actor::new("worker"),
        };
        match self.store.finish(finish).await.unwrap() {
            Finished::Recorded(action) => action,
            other => panic!("{other:?}"),
        }
    }

    /// Steps that make events of each kind, and change what an earlier event was about.
    pub(crate) async fn tell(&self, step: usize) {
        match step {
            0 => self.decide("bare", Some(RequestId::mint())).await,
            1 => self.decide("text", Some("call-1".parse().unwrap())).await,
            2 => {
                let action = self.submit("loop", None).await;
                let action = self.decide_by_id(&action, Some(r#"{"n":3}"#)).await;
                let failed = Report::Failed(Some("no".to_owned()));
                let action = self.execute(&action, failed).await;
                let action = self.decide_by_id(&action, Some(r#"{"n":4}"#)).await;
                let result = JsonText::from_json("{}").unwrap();
                self.execute(&action, Report::Completed(Some(result))).await;
            }
            3 => {
                let action = self.submit("cancelled", None).await;
                let cancel = Cancel {
                    id: action.request_id.as_uuid().unwrap(),
                    tenant_id: self.tenant.clone(),
                    call_id: None,
                    actor: Actor::new("agent é"),
                    may_cancel_all: false,
                };
                self.store.cancel(cancel).await.unwrap();
            }
            _ => {
                let expires_at = SystemTime::now() + Duration::from_secs(3600);
                self.submit("waits", Some(expires_at)).await;
            }
        }
    }
}

/// The number of steps, which make twelve events.
pub(crate) const STEPS: usize = 5;

fn payload(json: &str) -> Option<Fingerprinted> {
    Some(Fingerprinted::new(Payload::from_json(json).unwrap()).unwrap())
}

/// Verifies the export of one tenant.
pub(crate) fn verify(lines: &[String]) -> Result<VerifiedChain, String> {
    let mut verifier = AuditVerifier::new();
    let read = lines.iter().try_for_each(|line| verifier.line(line));
    let verified = read.and_then(|()| verifier.finish());
    let mut verified = verified.map_err(|fault| fault.to_string())?;
    assert_eq!(verified.len(), 1);
    Ok(verified.remove(0))
}
