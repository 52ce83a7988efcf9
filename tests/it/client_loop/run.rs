//! Running an action once, against a double that plays the server by a script, with paused time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_hitl::client::{Approved, RunOutcome};
use aegis_hitl::{AegisService, Error, Execution};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tokio::time::Instant;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, service_fn};

use super::{
    ID, TOKEN, approved, claim, claimed, digest, digest_of, executed, payload, pending, problem_of,
    rejected, with,
};
use crate::support::service::builder;

type Double = BoxCloneSyncService<Request<Full<Bytes>>, Response<Full<Bytes>>, BoxError>;
type Answers = HashMap<&'static str, Vec<(u16, Value)>>;

/// Answers each endpoint with its script, the last answer for ever. The status 0 hangs.
#[derive(Clone)]
struct FarEnd {
    answers: Arc<Mutex<Answers>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    begun: Instant,
}

#[derive(Debug, Clone)]
struct Seen {
    /// The last part of the path.
    what: String,
    at: Duration,
    call_id: String,
    body: Value,
}

impl FarEnd {
    /// A server where everything goes well.
    fn new() -> Self {
        let answers = HashMap::from([
            ("actions", vec![(201, pending())]),
            (ID, vec![(200, approved())]),
            ("claim", vec![(200, claimed())]),
            ("renew", vec![(200, json!({ "claim": claim() }))]),
            ("complete", vec![(200, executed("completed"))]),
            (
                "fail",
                vec![(200, with(&executed("failed"), json!({"status": "FAILED"})))],
            ),
        ]);
        Self {
            answers: Arc::new(Mutex::new(answers)),
            seen: Arc::default(),
            begun: Instant::now(),
        }
    }

    fn answering(self, what: &'static str, script: impl Into<Vec<(u16, Value)>>) -> Self {
        self.answers.lock().unwrap().insert(what, script.into());
        self
    }

    fn aegis(&self) -> AegisService<Double> {
        let this = self.clone();
        let double = service_fn(move |request| this.clone().answer(request));
        builder("http://localhost")
            .build_with(BoxCloneSyncService::new(double))
            .unwrap()
    }

    async fn answer(
        self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Full<Bytes>>, BoxError> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let what = head.uri.path().rsplit('/').next().unwrap().to_owned();
        let (status, answer) = {
            let mut answers = self.answers.lock().unwrap();
            let script = answers.get_mut(&*what).unwrap_or_else(|| panic!("{what}"));
            if script.len() > 1 {
                script.remove(0)
            } else {
                script[0].clone()
            }
        };
        self.seen.lock().unwrap().push(Seen {
            what,
            at: self.begun.elapsed(),
            call_id: head.headers["x-request-id"].to_str()?.to_owned(),
            body: serde_json::from_slice(&body).unwrap_or_default(),
        });
        if status == 0 {
            std::future::pending::<()>().await;
        }
        Ok(Response::builder()
            .status(status)
            .body(answer.to_string().into())?)
    }

    fn seen(&self, what: &str) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|seen| seen.what == what)
            .cloned()
            .collect()
    }

    fn count(&self, what: &str) -> usize {
        self.seen(what).len()
    }

    /// Runs the action with a closure that takes this long.
    async fn run(&self, takes: Duration) -> Result<RunOutcome<&'static str, String>, Error> {
        self.run_with(takes, Ok("done")).await.0
    }

    /// Returns the outcome and how often the closure began.
    async fn run_with(
        &self,
        takes: Duration,
        result: Result<&'static str, String>,
    ) -> (Result<RunOutcome<&'static str, String>, Error>, usize) {
        let mut began = 0;
        let call = self.aegis().action("k-1").payload(&payload()).lease(LEASE);
        let outcome = call
            .run_once(|approved| {
                began += 1;
                assert_eq!(approved.fence(), 7);
                assert_eq!(approved.request_id().as_str(), ID);
                assert_eq!(approved.parse::<Value>().unwrap(), payload());
                let text = approved.payload().unwrap().as_str();
                assert_eq!(serde_json::from_str::<Value>(text).unwrap(), payload());
                async move {
                    tokio::time::sleep(takes).await;
                    result
                }
            })
            .await;
        (outcome, began)
    }
}

const LEASE: Duration = Duration::from_secs(30);

/// Less than the first renewal takes.
const SOON: Duration = Duration::from_secs(5);

fn down() -> (u16, Value) {
    (503, json!({}))
}

#[tokio::test(start_paused = true)]
async fn an_approved_action_is_claimed_run_and_completed() {
    let far = FarEnd::new().answering(ID, [(200, pending()), (200, pending()), (200, approved())]);
    let outcome = far.run(SOON).await.unwrap();
    let RunOutcome::Completed { value, action } = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(
        (value, action.execution),
        ("done", Some(Execution::Completed))
    );
    let order: Vec<_> = far
        .seen
        .lock()
        .unwrap()
        .iter()
        .map(|seen| seen.what.clone())
        .collect();
    assert_eq!(order, ["actions", ID, ID, ID, "claim", "complete"]);
    let claim = &far.seen("claim")[0].body;
    assert_eq!(claim, &json!({"digest": digest(), "lease": 30}));
    let report = &far.seen("complete")[0].body;
    assert_eq!(report, &json!({"token": TOKEN, "result": "done"}));
}

#[tokio::test(start_paused = true)]
async fn a_closure_that_fails_is_reported_as_failed() {
    let far = FarEnd::new();
    let reason = "x".repeat(5000);
    let (outcome, began) = far.run_with(SOON, Err(reason.clone())).await;
    let RunOutcome::Failed { error, action } = outcome.unwrap() else {
        panic!("no failure");
    };
    assert_eq!(
        (error, action.execution, began),
        (reason, Some(Execution::Failed), 1)
    );
    let sent = &far.seen("fail")[0].body;
    assert_eq!(sent, &json!({"token": TOKEN, "reason": "x".repeat(4096)}));
    assert_eq!(far.count("complete"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_was_not_approved_is_not_run() {
    let closed = |why| with(&rejected(), json!({ "closed": why }));
    for (action, expected) in [
        (rejected(), "rejected"),
        (closed("escalated"), "rejected"),
        (closed("expired"), "expired"),
        (closed("cancelled"), "cancelled"),
    ] {
        let far = FarEnd::new().answering(ID, [(200, action)]);
        let (outcome, began) = far.run_with(SOON, Ok("")).await;
        let named = match outcome.unwrap() {
            RunOutcome::Rejected(_) => "rejected",
            RunOutcome::Expired(_) => "expired",
            RunOutcome::Cancelled(_) => "cancelled",
            other => panic!("{other:?}"),
        };
        assert_eq!((named, began, far.count("claim")), (expected, 0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn what_another_call_spent_is_not_run_again() {
    let failed = |execution| with(&executed(execution), json!({"status": "FAILED"}));
    let completed = with(&executed("completed"), json!({"result": [1]}));
    for action in [
        executed("claimed"),
        completed,
        failed("failed"),
        failed("unknown"),
        executed("paused"),
    ] {
        // It may be seen before the claim, or by the claim alone.
        let before = FarEnd::new()
            .answering("actions", [(200, action.clone())])
            .answering(ID, [(200, action.clone())]);
        let spent = problem_of(409, "already-claimed", action.clone());
        let by_claim = FarEnd::new()
            .answering(ID, [(200, approved()), (200, action.clone())])
            .answering("claim", [(409, spent)]);
        let not_approved = problem_of(422, "not-approved", action.clone());
        let after_failure = FarEnd::new()
            .answering(ID, [(200, approved()), (200, action.clone())])
            .answering("claim", [(422, not_approved)]);
        for (far, claims) in [(before, 0), (by_claim, 1), (after_failure, 1)] {
            let (outcome, began) = far.run_with(SOON, Ok("")).await;
            let RunOutcome::AlreadyRun(seen) = outcome.unwrap() else {
                panic!("{action}");
            };
            assert_eq!(serde_json::to_value(seen.result).unwrap(), action["result"]);
            assert_eq!((began, far.count("claim")), (0, claims));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_another_call_spent_is_known_from_the_refusal_alone() {
    let spent = problem_of(409, "already-claimed", executed("claimed"));
    let far = FarEnd::new()
        .answering(ID, [(200, approved()), down()])
        .answering("claim", [(409, spent)]);
    let (outcome, began) = far.run_with(SOON, Ok("")).await;
    assert!(matches!(outcome.unwrap(), RunOutcome::AlreadyRun(_)));
    assert_eq!(began, 0);
    // A refusal that tells nothing is no outcome.
    let spent = problem_of(409, "already-claimed", Value::Null);
    let far = FarEnd::new().answering("claim", [(409, spent)]);
    let (outcome, began) = far.run_with(SOON, Ok("")).await;
    assert!(outcome.unwrap_err().is_already_claimed());
    assert_eq!(began, 0);
}

#[tokio::test(start_paused = true)]
async fn the_decision_on_another_action_is_none() {
    for decided in [rejected(), approved()] {
        let other = with(&decided, json!({"request_id": "other"}));
        let far = FarEnd::new().answering(ID, [(200, other)]);
        let (outcome, began) = far.run_with(SOON, Ok("")).await;
        assert!(outcome.unwrap_err().is_protocol());
        assert_eq!((began, far.count("claim")), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_reviewer_edited_is_what_is_run() {
    let edited = json!({"n": 1});
    let digest = digest_of(&edited);
    let full = with(
        &approved(),
        json!({"digest": digest, "payload": payload(), "edited_payload": edited}),
    );
    // The status may show the edit, or only its digest.
    let brief = with(&approved(), json!({"digest": digest}));
    for script in [
        vec![(200, full.clone())],
        vec![(200, brief), (200, full.clone())],
    ] {
        let granted =
            json!({"action": with(&full, json!({"execution": "claimed"})), "claim": claim()});
        let far = FarEnd::new()
            .answering(ID, script)
            .answering("claim", [(200, granted)]);
        let call = far
            .aegis()
            .action("k-1")
            .payload(&payload())
            .allow_edit(true);
        let work = |approved: Approved| async move { approved.parse::<Value>() };
        let outcome = call.run_once(work).await.unwrap();
        let RunOutcome::Completed { value, .. } = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(value, edited);
        assert_eq!(far.seen("claim")[0].body["digest"], json!(digest));
    }
}

#[tokio::test(start_paused = true)]
async fn another_payload_on_record_is_never_run() {
    // The server names another digest, and has no edit that it belongs to.
    let other = with(&approved(), json!({"digest": "0".repeat(64)}));
    let mismatch = problem_of(422, "payload-mismatch", other.clone());
    let far = FarEnd::new()
        .answering(ID, [(200, other)])
        .answering("claim", [(422, mismatch)]);
    let (outcome, began) = far.run_with(SOON, Ok("")).await;
    assert!(outcome.unwrap_err().is_payload_mismatch());
    assert_eq!(began, 0);
    // What is claimed is what is here, whatever the server says is approved.
    assert_eq!(far.seen("claim")[0].body["digest"], json!(digest()));
    // A grant for something else is none.
    let other = with(&claimed()["action"], json!({"digest": "0".repeat(64)}));
    let granted = json!({"action": other, "claim": claim()});
    let far = FarEnd::new().answering("claim", [(200, granted)]);
    let (outcome, began) = far.run_with(SOON, Ok("")).await;
    assert!(outcome.unwrap_err().is_protocol());
    assert_eq!(began, 0);
}

#[tokio::test(start_paused = true)]
async fn without_a_decision_in_time_nothing_is_run() {
    let far = FarEnd::new().answering(ID, [(200, pending())]);
    let call = far
        .aegis()
        .action("k-1")
        .decide_within(Duration::from_secs(100));
    let outcome = call.run_once(|_| async { Ok::<_, Error>(()) }).await;
    assert!(outcome.unwrap_err().is_timeout());
    assert_eq!(far.begun.elapsed(), Duration::from_secs(100));
    assert_eq!(far.count("claim"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_is_not_confirmed_runs_nothing() {
    for script in [
        vec![down()],
        vec![(0, json!({}))],
        vec![(409, json!({"code": "duplicate"}))],
    ] {
        // What the status would say then may be this very claim.
        let far = FarEnd::new()
            .answering(ID, [(200, approved()), (200, executed("claimed"))])
            .answering("claim", script);
        let (outcome, began) = far.run_with(SOON, Ok("")).await;
        let error = outcome.unwrap_err();
        assert!(error.is_outcome_unknown(), "{error:?}");
        assert_eq!(began, 0);
        // All attempts were the same call, so that the server grants one claim.
        let claims = far.seen("claim");
        assert!(
            claims
                .iter()
                .all(|claim| claim.call_id == claims[0].call_id)
        );
        // Half of the lease is for the closure.
        assert!(far.begun.elapsed() <= LEASE / 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_answer_was_lost_is_asked_for_again() {
    let far = FarEnd::new().answering("claim", [down(), (0, json!({})), (200, claimed())]);
    let (outcome, began) = far.run_with(SOON, Ok("")).await;
    assert!(matches!(outcome.unwrap(), RunOutcome::Completed { .. }));
    let claims = far.seen("claim");
    assert_eq!((began, claims.len()), (1, 3));
    assert!(
        claims
            .iter()
            .all(|claim| claim.call_id == claims[0].call_id)
    );
}

#[tokio::test(start_paused = true)]
async fn the_claim_is_renewed_at_a_third_of_the_lease_while_the_closure_runs() {
    let far = FarEnd::new();
    let outcome = far.run(Duration::from_secs(65)).await.unwrap();
    assert!(
        matches!(outcome, RunOutcome::Completed { .. }),
        "{outcome:?}"
    );
    let renewals = far.seen("renew");
    let at: Vec<_> = renewals
        .iter()
        .map(|renewal| renewal.at.as_secs())
        .collect();
    assert_eq!(at, [10, 20, 30, 40, 50, 60]);
    assert_eq!(renewals[0].body, json!({"token": TOKEN, "lease": 30}));
    assert_ne!(renewals[0].call_id, renewals[1].call_id);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_is_tried_again_until_the_lease_ends() {
    let lasting = (200, json!({ "claim": claim() }));
    // An answer of no meaning, an outage and a hang, and then it goes on.
    let script = [(200, json!({})), down(), down(), (0, json!({})), lasting];
    let far = FarEnd::new().answering("renew", script);
    let outcome = far.run(Duration::from_secs(50)).await.unwrap();
    assert!(
        matches!(outcome, RunOutcome::Completed { .. }),
        "{outcome:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_is_tried_again_after_a_tenth_of_the_lease() {
    // All attempts of the first renewal fail, and then all of the second.
    let mut script = vec![down(); 8];
    script.push((200, json!({ "claim": claim() })));
    let far = FarEnd::new().answering("renew", script);
    far.run(Duration::from_secs(18)).await.unwrap();
    let mut at: Vec<_> = far.seen("renew").iter().map(|seen| seen.at).collect();
    at.dedup_by_key(|at| at.as_secs());
    let seconds: Vec<_> = at.iter().map(Duration::as_secs).collect();
    assert_eq!(seconds, [10, 13, 16]);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_of_another_claim_is_none() {
    let mut other = claim();
    other["fence"] = json!(8);
    let script = [
        (200, json!({ "claim": other })),
        (200, json!({ "claim": claim() })),
    ];
    let far = FarEnd::new().answering("renew", script);
    far.run(Duration::from_secs(18)).await.unwrap();
    let at: Vec<_> = far.seen("renew").iter().map(|it| it.at.as_secs()).collect();
    assert_eq!(at, [10, 13]);
}

#[tokio::test(start_paused = true)]
async fn a_closure_is_dropped_when_its_lease_ends() {
    for script in [vec![down()], vec![(0, json!({}))], vec![(404, json!({}))]] {
        let far = FarEnd::new().answering("renew", script);
        let (outcome, began) = far.run_with(Duration::from_secs(3600), Ok("")).await;
        let RunOutcome::Interrupted { action, error } = outcome.unwrap() else {
            panic!("not interrupted");
        };
        assert!(
            error.is_timeout() && error.is_outcome_unknown(),
            "{error:?}"
        );
        assert_eq!((action.request_id.as_str(), began), (ID, 1));
        assert_eq!(far.begun.elapsed(), LEASE);
        // Its outcome is unknown, so none is reported.
        assert_eq!((far.count("complete"), far.count("fail")), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_is_dropped_when_its_claim_is_lost() {
    struct Dropped(Arc<Mutex<bool>>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            *self.0.lock().unwrap() = true;
        }
    }
    let lost = problem_of(422, "claim-lost", executed("unknown"));
    let far = FarEnd::new().answering("renew", [(422, lost)]);
    let dropped = Arc::new(Mutex::new(false));
    let guard = Dropped(dropped.clone());
    let call = far.aegis().action("k-1").payload(&payload()).lease(LEASE);
    let outcome = call
        .run_once(|_| async move {
            let _guard = guard;
            std::future::pending::<Result<(), String>>().await
        })
        .await
        .unwrap();
    assert!(*dropped.lock().unwrap());
    let RunOutcome::Interrupted { error, .. } = outcome else {
        panic!("{outcome:?}");
    };
    assert!(error.is_claim_lost());
    assert_eq!((far.begun.elapsed(), far.count("renew")), (LEASE / 3, 1));
}

#[tokio::test(start_paused = true)]
async fn a_report_is_repeated_as_the_same_call_until_it_is_confirmed() {
    let mut script = vec![down(); 9];
    script.push((200, executed("completed")));
    let far = FarEnd::new().answering("complete", script);
    let outcome = far.run(SOON).await.unwrap();
    assert!(
        matches!(outcome, RunOutcome::Completed { .. }),
        "{outcome:?}"
    );
    let reports = far.seen("complete");
    assert_eq!(reports.len(), 10);
    assert!(
        reports
            .iter()
            .all(|report| report.call_id == reports[0].call_id)
    );
}

#[tokio::test(start_paused = true)]
async fn a_report_that_is_not_confirmed_is_never_a_success() {
    let lost = problem_of(422, "claim-lost", executed("unknown"));
    for (answer, is_lost) in [
        ((422, lost), true),
        (down(), false),
        ((200, executed("failed")), false),
    ] {
        let far = FarEnd::new().answering("complete", [answer]);
        let (outcome, began) = far.run_with(SOON, Ok("done")).await;
        let RunOutcome::Unreported { outcome, error } = outcome.unwrap() else {
            panic!("reported");
        };
        assert_eq!((outcome, began), (Ok("done"), 1));
        assert_eq!(error.is_claim_lost(), is_lost);
        assert!(far.begun.elapsed() <= LEASE);
        if !error.is_unavailable() {
            // It would be refused again.
            assert_eq!(far.count("complete"), 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_result_that_no_server_keeps_is_left_out_of_the_report() {
    // As JSON it has two bytes more.
    for (length, is_kept) in [(64 * 1024 - 2, true), (64 * 1024 - 1, false)] {
        let far = FarEnd::new();
        let result = "x".repeat(length);
        let returned = result.clone();
        let call = far.aegis().action("k-1").payload(&payload());
        let outcome = call
            .run_once(|_| async { Ok::<_, String>(returned) })
            .await
            .unwrap();
        let RunOutcome::Completed { value, .. } = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(value.len(), length);
        let expected = match is_kept {
            true => json!({"token": TOKEN, "result": result}),
            false => json!({"token": TOKEN}),
        };
        assert!(far.seen("complete")[0].body == expected, "{length}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_submission_that_is_refused_runs_nothing() {
    let mismatch = problem_of(422, "payload-mismatch", pending());
    let far = FarEnd::new().answering("actions", [(422, mismatch)]);
    let (outcome, began) = far.run_with(SOON, Ok("")).await;
    assert!(outcome.unwrap_err().is_payload_mismatch());
    assert_eq!((began, far.count(ID)), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_action_without_a_payload_is_claimed_without_a_digest() {
    let bare = |action: Value| with(&action, json!({"digest": null}));
    let granted = json!({"action": bare(executed("claimed")), "claim": claim()});
    for payload in [None, Some(json!({}))] {
        let far = FarEnd::new()
            .answering("actions", [(201, bare(pending()))])
            .answering(ID, [(200, bare(approved()))])
            .answering("claim", [(200, granted.clone())]);
        let call = far.aegis().action("k-1");
        let call = match &payload {
            Some(payload) => call.payload(payload),
            None => call,
        };
        let outcome = call
            .run_once(|_| async { Ok::<_, String>(()) })
            .await
            .unwrap();
        assert!(
            matches!(outcome, RunOutcome::Completed { .. }),
            "{outcome:?}"
        );
        assert_eq!(far.seen("claim")[0].body, json!({"lease": 300}));
    }
}
