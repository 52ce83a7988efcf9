//! What the client concludes from answers: PROTOCOL.md, "What a client may conclude".

use aegis_hitl::testing::{Act, Peer};
use aegis_hitl::{AegisService, Error, Outcome};
use serde_json::{Value, json};

use super::{
    ID, TOKEN, approved, claim, claimed, digest, executed, is_no_proof, payload, pending, problem,
    rejected, service, with,
};
use crate::support::service::answer_with;

/// What an answer may stand for.
#[derive(Debug, PartialEq)]
enum Conclusion {
    Done,
    Unproven,
    Mismatch,
    AlreadyClaimed,
    NotApproved,
    ClaimLost,
    Closed,
    Conflict,
    Refused,
}

fn concluded<T>(result: Result<T, Error>) -> Conclusion {
    let error = match result {
        Ok(_) => return Conclusion::Done,
        Err(error) if is_no_proof(&error) => return Conclusion::Unproven,
        Err(error) => error,
    };
    assert!(!error.is_outcome_unknown(), "{error:?}");
    let named = [
        (error.is_payload_mismatch(), Conclusion::Mismatch),
        (error.is_already_claimed(), Conclusion::AlreadyClaimed),
        (error.is_not_approved(), Conclusion::NotApproved),
        (error.is_claim_lost(), Conclusion::ClaimLost),
        (error.is_closed(), Conclusion::Closed),
        (error.is_refused(), Conclusion::Refused),
        (
            error.is_conflict() && !error.is_payload_mismatch(),
            Conclusion::Conflict,
        ),
    ];
    let mut named: Vec<_> = named
        .into_iter()
        .filter_map(|(is_so, conclusion)| is_so.then_some(conclusion))
        .collect();
    assert_eq!(named.len(), 1, "{error:?}");
    named.remove(0)
}

/// Answers that prove nothing of any call, with `status` and as much of a good answer as they have.
fn foreign(status: u16, good: &Value) -> Vec<(&'static str, Act)> {
    let page = "<html><body>Welcome</body></html>";
    let cut = &good.to_string()[..40];
    vec![
        (
            "a page",
            Act::answer(status)
                .body(page)
                .header("content-type", "text/html"),
        ),
        ("a page called JSON", Act::answer(status).body(page)),
        (
            "another coding",
            answer_with(status, good).header("content-encoding", "gzip"),
        ),
        ("an array", answer_with(status, &json!([good]))),
        ("half of it", Act::answer(status).body(cut.to_owned())),
        ("another success", answer_with(204, &json!({}))),
        ("a redirect", Act::answer(303).header("location", "/")),
    ]
}

async fn check<F, Fut, T>(call: F, cases: Vec<(&'static str, Act, Conclusion)>)
where
    F: Fn(AegisService) -> Fut,
    Fut: IntoFuture<Output = Result<T, Error>>,
{
    for (name, act, conclusion) in cases {
        let peer = Peer::start([act]).await;
        let result = call(service(&peer.url())).await;
        assert_eq!(concluded(result), conclusion, "{name}");
        assert_eq!(peer.count(), 1, "{name}");
    }
}

fn none_of(status: u16, good: &Value) -> Vec<(&'static str, Act, Conclusion)> {
    let foreign = foreign(status, good).into_iter();
    foreign
        .map(|(name, act)| (name, act, Conclusion::Unproven))
        .collect()
}

#[tokio::test]
async fn a_submission_takes_an_action_that_agrees_with_what_was_sent() {
    use Conclusion::{Done, Mismatch, Refused, Unproven};
    let submit = |aegis: AegisService| aegis.submit("k-1").payload(&payload());
    let other = json!({"digest": "0".repeat(64)});
    let without_names = json!({"request_id": ID, "status": "PENDING"});
    let mut cases = vec![
        ("new", answer_with(201, &pending()), Done),
        ("on record", answer_with(200, &pending()), Done),
        ("decided", answer_with(200, &approved()), Done),
        ("without names", answer_with(201, &without_names), Done),
        (
            "edited since",
            answer_with(200, &with(&approved(), other.clone())),
            Done,
        ),
        (
            "another payload, new",
            answer_with(201, &with(&approved(), other.clone())),
            Unproven,
        ),
        (
            "another payload",
            answer_with(200, &with(&pending(), other)),
            Unproven,
        ),
        (
            "another tenant",
            answer_with(201, &with(&pending(), json!({"tenant_id": "x"}))),
            Unproven,
        ),
        (
            "another thread",
            answer_with(201, &with(&pending(), json!({"thread_id": "x"}))),
            Unproven,
        ),
        (
            "another key",
            answer_with(201, &with(&pending(), json!({"idempotency_key": "x"}))),
            Unproven,
        ),
        (
            "no id",
            answer_with(201, &json!({"status": "PENDING"})),
            Unproven,
        ),
        ("an empty 201", Act::answer(201), Unproven),
        ("a decision's 202", answer_with(202, &pending()), Unproven),
        (
            "a duplicate",
            problem(409, "duplicate", pending()),
            Unproven,
        ),
        (
            "another payload on record",
            problem(422, "payload-mismatch", pending()),
            Mismatch,
        ),
        (
            "a bad request",
            problem(400, "invalid-request", Value::Null),
            Refused,
        ),
    ];
    cases.extend(none_of(201, &pending()));
    check(submit, cases).await;
}

#[tokio::test]
async fn a_decision_by_id_takes_an_answer_about_this_action_and_payload() {
    use Conclusion::{Closed, Conflict, Done, Mismatch, Refused, Unproven};
    let approve = |aegis: AegisService| aegis.approve_action(ID).digest(digest());
    let other_id = with(
        &approved(),
        json!({"request_id": "0190a1b2-0000-7000-8000-000000000002"}),
    );
    let other_digest = with(&approved(), json!({"digest": "0".repeat(64)}));
    let upper = with(&approved(), json!({"request_id": ID.to_uppercase()}));
    let mut cases = vec![
        ("recorded", answer_with(202, &approved()), Done),
        (
            "the same id otherwise written",
            answer_with(202, &upper),
            Done,
        ),
        ("a duplicate", problem(409, "duplicate", approved()), Done),
        ("a bare duplicate", Act::answer(409), Unproven),
        (
            "a seed's duplicate",
            answer_with(409, &json!({"detail": "Duplicate"})),
            Unproven,
        ),
        (
            "a duplicate of nothing",
            problem(409, "duplicate", Value::Null),
            Unproven,
        ),
        (
            "spent",
            problem(409, "already-claimed", approved()),
            Unproven,
        ),
        ("another action", answer_with(202, &other_id), Unproven),
        (
            "another action's duplicate",
            problem(409, "duplicate", other_id),
            Unproven,
        ),
        ("another payload", answer_with(202, &other_digest), Unproven),
        (
            "another payload's duplicate",
            problem(409, "duplicate", other_digest),
            Unproven,
        ),
        (
            "another tenant",
            answer_with(202, &with(&approved(), json!({"tenant_id": "x"}))),
            Unproven,
        ),
        (
            "another payload in an action that cannot be parsed",
            problem(
                409,
                "duplicate",
                with(&approved(), json!({"digest": "0".repeat(64), "title": 5})),
            ),
            Unproven,
        ),
        (
            "a digest that is none",
            answer_with(202, &with(&approved(), json!({"digest": "0".repeat(63)}))),
            Unproven,
        ),
        (
            "a digest that is a number",
            problem(409, "duplicate", with(&approved(), json!({"digest": 5}))),
            Unproven,
        ),
        (
            "no digest",
            answer_with(202, &with(&approved(), json!({"digest": null}))),
            Done,
        ),
        (
            "another action's conflict",
            problem(
                422,
                "decision-conflict",
                with(&rejected(), json!({"request_id": "x"})),
            ),
            Unproven,
        ),
        ("pending", answer_with(202, &pending()), Unproven),
        ("the opposite", answer_with(202, &rejected()), Conflict),
        (
            "the opposite's duplicate",
            problem(409, "duplicate", rejected()),
            Conflict,
        ),
        (
            "a conflict",
            problem(422, "decision-conflict", rejected()),
            Conflict,
        ),
        (
            "another digest",
            problem(422, "payload-mismatch", approved()),
            Mismatch,
        ),
        ("closed", problem(422, "action-closed", rejected()), Closed),
        (
            "the submitter",
            problem(403, "self-approval", pending()),
            Refused,
        ),
        (
            "no edit",
            problem(403, "edit-not-allowed", pending()),
            Refused,
        ),
        ("unknown", problem(404, "not-found", Value::Null), Refused),
    ];
    cases.extend(none_of(202, &approved()));
    check(approve, cases).await;
}

#[tokio::test]
async fn a_rejection_without_a_digest_takes_an_answer_with_one() {
    let peer = Peer::start([answer_with(202, &rejected())]).await;
    let receipt = service(&peer.url()).reject_action(ID).await.unwrap();
    assert_eq!(receipt.action().unwrap().digest, Some(digest()));
}

#[tokio::test]
async fn an_edit_is_confirmed_by_the_digest_of_what_was_edited() {
    let edited = json!({"n": 1});
    let act = |payload: &Value| {
        answer_with(
            202,
            &with(&approved(), json!({"digest": super::digest_of(payload)})),
        )
    };
    let approve = |aegis: AegisService| {
        aegis
            .approve_action(ID)
            .digest(digest())
            .comment("less")
            .edited_payload(&edited)
    };
    let peer = Peer::start([act(&edited)]).await;
    let receipt = approve(service(&peer.url())).await.unwrap();
    assert_eq!(receipt.outcome(), Outcome::Accepted);
    let sent: Value = serde_json::from_slice(&peer.requests()[0].body).unwrap();
    assert_eq!(
        sent,
        json!({"digest": digest(), "comment": "less", "payload": edited})
    );
    let peer = Peer::start([act(&payload())]).await;
    let error = approve(service(&peer.url())).await.unwrap_err();
    assert!(is_no_proof(&error), "{error:?}");
}

#[tokio::test]
async fn a_cancellation_takes_an_action_that_is_cancelled() {
    use Conclusion::{Closed, Done, Refused, Unproven};
    let cancelled = with(&rejected(), json!({"closed": "cancelled"}));
    let expired = with(&rejected(), json!({"closed": "expired"}));
    let mut cases = vec![
        ("cancelled", answer_with(202, &cancelled), Done),
        (
            "cancelled before",
            problem(409, "duplicate", cancelled.clone()),
            Done,
        ),
        (
            "expired before",
            problem(409, "duplicate", expired.clone()),
            Unproven,
        ),
        ("expired", answer_with(202, &expired), Unproven),
        ("rejected", answer_with(202, &rejected()), Unproven),
        ("a bare 202", Act::answer(202), Done),
        ("a bare 409", Act::answer(409), Unproven),
        (
            "a 409 that tells the decision alone",
            answer_with(409, &json!({"code": "duplicate", "decision": "reject"})),
            Unproven,
        ),
        ("decided", problem(422, "action-closed", approved()), Closed),
        (
            "not the submitter",
            problem(403, "forbidden", Value::Null),
            Refused,
        ),
    ];
    cases.extend(none_of(202, &cancelled));
    check(|aegis: AegisService| aegis.cancel(ID), cases).await;
}

#[tokio::test]
async fn a_cancellation_that_is_cut_off_is_not_confirmed_by_its_head() {
    let expired = with(&rejected(), json!({"closed": "expired"})).to_string();
    let cut = Act::answer(202).body(expired[..expired.len() - 1].to_owned());
    let cancelled = with(&rejected(), json!({"closed": "cancelled"}));
    for act in [cut.clone().body_breaks_off(), cut.clone().body_never_ends()] {
        let peer = Peer::start([act]).await;
        let error = service(&peer.url()).cancel(ID).await.unwrap_err();
        assert!(is_no_proof(&error), "{error:?}");
    }
    let peer = Peer::start([cut.body_breaks_off(), answer_with(202, &cancelled)]).await;
    service(&peer.url()).cancel(ID).await.unwrap();
    assert_eq!(peer.count(), 2);
}

#[tokio::test]
async fn a_claim_that_is_refused_after_a_lost_reply_may_have_been_granted() {
    for act in [
        problem(409, "already-claimed", executed("claimed")),
        problem(422, "not-approved", executed("unknown")),
    ] {
        let peer = Peer::start([Act::lose_reply(), act]).await;
        let claim = service(&peer.url()).claim(ID).digest(digest());
        let error = claim.await.unwrap_err();
        assert!(error.is_already_claimed() || error.is_not_approved());
        assert!(error.is_outcome_unknown(), "{error:?}");
        assert_eq!(peer.count(), 2);
    }
}

#[tokio::test]
async fn a_claim_is_granted_for_what_is_about_to_be_run_or_not_at_all() {
    use Conclusion::{AlreadyClaimed, Done, Mismatch, NotApproved, Refused, Unproven};
    let other = json!({"digest": "0".repeat(64)});
    let changed = |members: Value| {
        let action = with(&claimed()["action"], members);
        answer_with(200, &with(&claimed(), json!({ "action": action })))
    };
    let without = |member: &str| {
        let mut claimed = claimed();
        claimed.as_object_mut().unwrap().remove(member);
        answer_with(200, &claimed)
    };
    let as_array = with(&claimed(), json!({"claim": [TOKEN, 7, null]}));
    let empty_token = with(&claimed(), json!({"claim": {"token": "", "fence": 7}}));
    let mut cases = vec![
        ("granted", answer_with(200, &claimed()), Done),
        (
            "another action",
            changed(json!({"request_id": "x"})),
            Unproven,
        ),
        (
            "another tenant",
            changed(json!({"tenant_id": "x"})),
            Unproven,
        ),
        ("another digest", changed(other), Unproven),
        ("no digest", changed(json!({"digest": null})), Unproven),
        (
            "another payload",
            changed(json!({"payload": {"n": 1}})),
            Unproven,
        ),
        (
            "another edited payload",
            changed(json!({"edited_payload": {"n": 1}})),
            Unproven,
        ),
        ("rejected", changed(json!({"decision": "reject"})), Unproven),
        (
            "cancelled",
            changed(json!({"closed": "cancelled"})),
            Unproven,
        ),
        (
            "another action is spent",
            problem(
                409,
                "already-claimed",
                with(&executed("claimed"), json!({"request_id": "x"})),
            ),
            Unproven,
        ),
        ("failed", changed(json!({"status": "FAILED"})), Unproven),
        ("not claimed", changed(json!({"execution": null})), Unproven),
        (
            "completed",
            changed(json!({"execution": "completed"})),
            Unproven,
        ),
        ("no claim", without("claim"), Unproven),
        ("no action", without("action"), Unproven),
        ("a claim in an array", answer_with(200, &as_array), Unproven),
        ("an empty token", answer_with(200, &empty_token), Unproven),
        (
            "spent",
            problem(409, "already-claimed", executed("completed")),
            AlreadyClaimed,
        ),
        (
            "a duplicate",
            problem(409, "duplicate", executed("claimed")),
            Unproven,
        ),
        ("a bare 409", Act::answer(409), Unproven),
        ("a page with 409", Act::answer(409).body("<html>"), Unproven),
        (
            "not approved",
            problem(422, "not-approved", pending()),
            NotApproved,
        ),
        (
            "another payload on record",
            problem(422, "payload-mismatch", approved()),
            Mismatch,
        ),
        ("no scope", problem(403, "forbidden", Value::Null), Refused),
    ];
    cases.extend(none_of(200, &claimed()));
    check(
        |aegis: AegisService| aegis.claim(ID).digest(digest()),
        cases,
    )
    .await;
}

#[tokio::test]
async fn a_claim_that_another_holds_tells_what_became_of_it() {
    let act = problem(409, "already-claimed", executed("completed"));
    let peer = Peer::start([act]).await;
    let error = service(&peer.url())
        .claim(ID)
        .digest(digest())
        .await
        .unwrap_err();
    let recorded = error.recorded().unwrap();
    assert_eq!(recorded.execution, Some(aegis_hitl::Execution::Completed));
    assert_eq!(
        error.to_string(),
        "another call claimed the action (409 Conflict): d"
    );
}

#[tokio::test]
async fn a_renewal_takes_the_claim_that_it_renews() {
    use Conclusion::{ClaimLost, Done, Unproven};
    let good = json!({ "claim": claim() });
    let other = json!({"claim": {"token": "token-2", "fence": 7}});
    let mut cases = vec![
        ("renewed", answer_with(200, &good), Done),
        ("another claim", answer_with(200, &other), Unproven),
        (
            "lost",
            problem(422, "claim-lost", executed("unknown")),
            ClaimLost,
        ),
        (
            "spent",
            problem(409, "already-claimed", executed("claimed")),
            Conclusion::AlreadyClaimed,
        ),
    ];
    cases.extend(none_of(200, &good));
    check(
        |aegis: AegisService| aegis.renew(ID, &TOKEN.parse().unwrap()),
        cases,
    )
    .await;
}

#[tokio::test]
async fn a_report_takes_an_action_with_this_outcome() {
    use Conclusion::{ClaimLost, Done, Refused, Unproven};
    let cases = |own: &str, other: &str| {
        let own = executed(own);
        let mut cases = vec![
            ("recorded", answer_with(200, &own), Done),
            (
                "recorded before",
                answer_with(200, &with(&own, json!({"replayed": true}))),
                Done,
            ),
            (
                "the other outcome",
                answer_with(200, &executed(other)),
                Unproven,
            ),
            ("unknown", answer_with(200, &executed("unknown")), Unproven),
            (
                "pending",
                answer_with(200, &with(&own, json!({"status": "PENDING"}))),
                Unproven,
            ),
            (
                "rejected",
                answer_with(200, &with(&own, json!({"decision": "reject"}))),
                Unproven,
            ),
            (
                "cancelled",
                answer_with(200, &with(&own, json!({"closed": "cancelled"}))),
                Unproven,
            ),
            ("nothing", answer_with(200, &approved()), Unproven),
            (
                "another action",
                answer_with(200, &with(&own, json!({"request_id": "x"}))),
                Unproven,
            ),
            (
                "a duplicate",
                problem(409, "duplicate", own.clone()),
                Unproven,
            ),
            (
                "lost",
                problem(422, "claim-lost", executed("unknown")),
                ClaimLost,
            ),
            (
                "too large",
                problem(413, "payload-too-large", Value::Null),
                Refused,
            ),
        ];
        cases.extend(none_of(200, &own));
        cases
    };
    let complete = |aegis: AegisService| aegis.complete(ID, &TOKEN.parse().unwrap());
    check(complete, cases("completed", "failed")).await;
    let fail = |aegis: AegisService| aegis.fail(ID, &TOKEN.parse().unwrap());
    check(fail, cases("failed", "completed")).await;
}

#[tokio::test]
async fn a_look_and_a_list_take_what_is_the_tenants_own() {
    use Conclusion::{Done, Refused, Unproven};
    let foreign = with(&approved(), json!({"tenant_id": "x"}));
    let mut cases = vec![
        ("own", answer_with(200, &approved()), Done),
        ("another tenant's", answer_with(200, &foreign), Unproven),
        (
            "another action",
            answer_with(200, &with(&approved(), json!({"request_id": "x"}))),
            Unproven,
        ),
        (
            "a payload and the digest of another",
            answer_with(200, &with(&approved(), json!({"payload": {"amount": 9}}))),
            Unproven,
        ),
        ("unknown", problem(404, "not-found", Value::Null), Refused),
    ];
    cases.extend(none_of(200, &approved()));
    check(|aegis: AegisService| aegis.look(ID), cases).await;
    let page = |action: &Value| json!({ "actions": [approved(), action] });
    let mut cases = vec![
        ("own", answer_with(200, &page(&approved())), Done),
        (
            "another tenant's",
            answer_with(200, &page(&foreign)),
            Unproven,
        ),
        (
            "no list",
            answer_with(200, &json!({"next_cursor": "x"})),
            Unproven,
        ),
        (
            "a bad cursor",
            problem(400, "invalid-request", Value::Null),
            Refused,
        ),
    ];
    cases.extend(none_of(200, &page(&approved())));
    check(|aegis: AegisService| aegis.list(), cases).await;
    let other = with(&approved(), json!({"thread_id": "x"}));
    let cases = vec![(
        "another thread's",
        answer_with(200, &page(&other)),
        Unproven,
    )];
    check(|aegis: AegisService| aegis.list().thread_id("run-7"), cases).await;
}

#[tokio::test]
async fn a_question_is_refused_by_an_answer_about_its_own_tenant_alone() {
    let foreign = with(&approved(), json!({"tenant_id": "x"}));
    let cases = vec![
        (
            "own",
            problem(422, "action-closed", approved()),
            Conclusion::Closed,
        ),
        (
            "another tenant's",
            problem(422, "action-closed", foreign),
            Conclusion::Unproven,
        ),
    ];
    check(
        |aegis: AegisService| async move { aegis.status(ID).await },
        cases,
    )
    .await;
}

#[tokio::test]
async fn a_body_that_breaks_off_is_asked_for_again() {
    let half = claimed().to_string()[..40].to_owned();
    let cut = Act::answer(200).body(half).body_breaks_off();
    let peer = Peer::start([cut.clone(), answer_with(200, &claimed())]).await;
    service(&peer.url())
        .claim(ID)
        .digest(digest())
        .await
        .unwrap();
    let seen = peer.requests();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0].headers, seen[1].headers);
    // And if it always does, nothing is concluded.
    let peer = Peer::start([cut]).await;
    let error = service(&peer.url())
        .claim(ID)
        .digest(digest())
        .await
        .unwrap_err();
    assert!(is_no_proof(&error), "{error:?}");
    assert_eq!(peer.count(), 4);
}
