//! Histories that are right, and histories that are wrong.

use aegis_hitl::protocol::{Closed, EventKind};
use aegis_hitl::{Decision, Execution, Status};

use super::super::history::{Asked, Attempt, State, Time, Told, ToldClaim};
use super::{SLOT, check};
use crate::support::reference::{Request, Target, Token};

const SECOND: Time = 1_000_000;
const LEASE: Time = 300 * SECOND;

const TO: Target = Target {
    slot: SLOT,
    foreign: false,
};

const PENDING: State = State {
    status: Status::Pending,
    decision: None,
    closed: None,
    execution: None,
};
const APPROVED: State = State {
    status: Status::Committed,
    decision: Some(Decision::Approve),
    ..PENDING
};
const REJECTED: State = State {
    decision: Some(Decision::Reject),
    ..APPROVED
};
const EXPIRED: State = State {
    closed: Some(Closed::Expired),
    ..REJECTED
};
const CLAIMED: State = State {
    execution: Some(Execution::Claimed),
    ..APPROVED
};
const COMPLETED: State = State {
    execution: Some(Execution::Completed),
    ..APPROVED
};
const FAILED: State = State {
    status: Status::Failed,
    execution: Some(Execution::Failed),
    ..APPROVED
};
const LAPSED: State = State {
    execution: Some(Execution::Unknown),
    ..FAILED
};

fn decide(decision: Decision, call: usize) -> Asked {
    Asked::Request(Request::Decide {
        slot: SLOT,
        decision,
        call: Some(call),
        payload: None,
        comment: None,
        actor: 0,
        strict: false,
        self_approval: true,
    })
}

fn approve(call: usize) -> Asked {
    decide(Decision::Approve, call)
}

fn reject(call: usize) -> Asked {
    decide(Decision::Reject, call)
}

fn submit(expires: Option<Time>) -> Asked {
    Asked::Request(Request::Submit {
        slot: SLOT,
        call: None,
        payload: None,
        title: None,
        expires,
        allow_edit: false,
        actor: 0,
        only_existing: false,
    })
}

fn claim(call: usize, lease: Time) -> Asked {
    Asked::Request(Request::Acquire {
        to: TO,
        digest: None,
        lease,
        call: Some(call),
        actor: 0,
    })
}

fn renew(fence: u64, lease: Time) -> Asked {
    Asked::Request(Request::Renew {
        to: TO,
        token: Token::Fence(fence),
        lease,
    })
}

fn finish(fence: u64, succeeds: bool) -> Asked {
    Asked::Request(Request::Finish {
        to: TO,
        token: Token::Fence(fence),
        report: if succeeds { Ok(None) } else { Err(None) },
        call: None,
        actor: 0,
    })
}

fn complete(fence: u64) -> Asked {
    finish(fence, true)
}

fn fail(fence: u64) -> Asked {
    finish(fence, false)
}

/// An attempt that is sent and answered at these seconds.
fn from(sent: Time, at: Time, asked: Asked, told: Told) -> Attempt {
    Attempt {
        client: 0,
        sent: sent * SECOND,
        asked,
        told: Some((at * SECOND, told)),
    }
}

/// An attempt that takes less than a second.
fn at(sent: Time, asked: Asked, word: &'static str, state: State) -> Attempt {
    let mut attempt = from(sent, sent, asked, Told::new(word, state));
    attempt.told.as_mut().unwrap().0 += SECOND / 2;
    attempt
}

fn unknown(sent: Time, asked: Asked) -> Attempt {
    Attempt {
        client: 0,
        sent: sent * SECOND,
        asked,
        told: None,
    }
}

fn granted(sent: Time, asked: Asked, word: &'static str, fence: u64, until: Time) -> Attempt {
    let mut attempt = at(sent, asked, word, CLAIMED);
    let (_, told) = attempt.told.as_mut().unwrap();
    let until = until * SECOND;
    told.claim = Some(ToldClaim { fence, until });
    if word == "extended" {
        told.state = None;
    }
    attempt
}

fn history(sent: Time, state: State, kinds: &[EventKind]) -> Attempt {
    let mut attempt = at(sent, Asked::History, "shown", state);
    attempt.told.as_mut().unwrap().1.kinds = Some(kinds.to_vec());
    attempt
}

fn status(sent: Time, state: State) -> Attempt {
    at(sent, Asked::Status, "shown", state)
}

#[track_caller]
fn right(attempts: &[Attempt]) {
    if let Err(report) = check(attempts) {
        panic!("not explained:\n{report}");
    }
}

#[track_caller]
fn wrong(attempts: &[Attempt]) {
    if check(attempts).is_ok() {
        panic!("explained: {attempts:?}");
    }
}

/// An approved action with a claim of five minutes.
fn claimed() -> Vec<Attempt> {
    vec![
        at(1, approve(1), "recorded", APPROVED),
        granted(2, claim(2, LEASE), "claimed", 1, 302),
    ]
}

fn claimed_and(more: impl IntoIterator<Item = Attempt>) -> Vec<Attempt> {
    claimed().into_iter().chain(more).collect()
}

#[test]
fn a_history_one_after_the_other_is_explained() {
    use EventKind::{Approved, Claimed, Completed, Failed, Submitted};
    right(&[
        at(1, submit(None), "recorded", PENDING),
        at(2, submit(None), "existing", PENDING),
        at(3, approve(1), "recorded", APPROVED),
        at(4, approve(2), "duplicate", APPROVED),
        at(5, reject(3), "conflict", APPROVED),
        granted(6, claim(4, LEASE), "claimed", 1, 306),
        at(7, claim(5, LEASE), "already claimed", CLAIMED),
        at(8, fail(1), "recorded", FAILED),
        at(9, claim(6, LEASE), "not approved", FAILED),
        at(10, approve(1), "replayed", FAILED),
        at(11, approve(7), "recorded", APPROVED),
        granted(12, claim(8, LEASE), "claimed", 2, 312),
        granted(13, renew(2, LEASE), "extended", 2, 313),
        at(14, complete(1), "lost", CLAIMED),
        at(15, complete(2), "recorded", COMPLETED),
        at(16, complete(2), "replayed", COMPLETED),
        status(17, COMPLETED),
        history(
            18,
            COMPLETED,
            &[
                Submitted, Approved, Claimed, Failed, Approved, Claimed, Completed,
            ],
        ),
    ]);
}

#[test]
fn attempts_at_one_time_may_take_effect_in_either_order() {
    let two = |first: &'static str, second: &'static str| {
        let told = |word| Told::new(word, APPROVED);
        [
            from(1, 5, approve(1), told(first)),
            from(2, 4, approve(2), told(second)),
        ]
    };
    right(&two("recorded", "duplicate"));
    right(&two("duplicate", "recorded"));
    wrong(&two("duplicate", "duplicate"));
    wrong(&two("recorded", "recorded"));
}

#[test]
fn two_acknowledged_decisions_are_found() {
    wrong(&[
        at(1, approve(1), "recorded", APPROVED),
        at(2, reject(2), "recorded", REJECTED),
    ]);
    wrong(&[
        from(1, 5, approve(1), Told::new("recorded", APPROVED)),
        from(1, 5, reject(2), Told::new("recorded", REJECTED)),
    ]);
    // The second would have needed a failure.
    wrong(&claimed_and([at(3, approve(3), "recorded", APPROVED)]));
}

#[test]
fn an_acknowledged_decision_that_is_lost_is_found() {
    let approved = || at(1, approve(1), "recorded", APPROVED);
    wrong(&[approved(), at(2, Asked::Status, "shown", PENDING)]);
    wrong(&[approved(), at(2, reject(2), "recorded", REJECTED)]);
    wrong(&[approved(), at(2, submit(None), "recorded", PENDING)]);
    let mut missing = status(2, PENDING);
    missing.told.as_mut().unwrap().1.state = None;
    wrong(&[approved(), missing]);
}

#[test]
fn an_unknown_decision_takes_effect_later_or_never() {
    let first = || unknown(1, approve(1));
    right(&[first(), at(2, reject(2), "recorded", REJECTED)]);
    right(&[first(), at(2, reject(2), "conflict", APPROVED)]);
    right(&[first(), at(2, approve(1), "replayed", APPROVED)]);
    right(&[
        at(1, submit(None), "recorded", PENDING),
        unknown(2, approve(1)),
        status(3, PENDING),
        status(4, APPROVED),
    ]);
    // Not before it was sent, and not after another decision.
    wrong(&[
        at(1, reject(2), "conflict", APPROVED),
        unknown(2, approve(1)),
    ]);
    wrong(&[
        first(),
        at(2, reject(2), "recorded", REJECTED),
        status(3, APPROVED),
    ]);
    wrong(&[
        first(),
        status(2, APPROVED),
        at(3, reject(2), "recorded", REJECTED),
    ]);
}

#[test]
fn a_conflict_before_anybody_decided_is_found() {
    wrong(&[
        at(1, reject(1), "conflict", APPROVED),
        at(2, approve(2), "recorded", APPROVED),
    ]);
    wrong(&[
        at(1, submit(None), "recorded", PENDING),
        at(2, approve(1), "duplicate", APPROVED),
    ]);
}

#[test]
fn two_live_claims_are_found() {
    wrong(&claimed_and([granted(
        3,
        claim(3, LEASE),
        "claimed",
        2,
        303,
    )]));
    wrong(&claimed_and([granted(
        3,
        claim(3, LEASE),
        "claimed",
        1,
        303,
    )]));
    wrong(&claimed_and([granted(
        3,
        claim(3, LEASE),
        "replayed",
        1,
        302,
    )]));
    right(&claimed_and([granted(
        3,
        claim(2, LEASE),
        "replayed",
        1,
        302,
    )]));
}

#[test]
fn a_claim_of_what_is_not_approved_is_found() {
    wrong(&[
        at(1, reject(1), "recorded", REJECTED),
        granted(2, claim(2, LEASE), "claimed", 1, 302),
    ]);
    wrong(&claimed_and([
        at(3, fail(1), "recorded", FAILED),
        granted(4, claim(3, LEASE), "claimed", 2, 304),
    ]));
}

#[test]
fn a_stale_token_that_is_accepted_is_found() {
    let second = || {
        claimed_and([
            at(3, fail(1), "recorded", FAILED),
            at(4, approve(3), "recorded", APPROVED),
            granted(5, claim(4, LEASE), "claimed", 2, 305),
        ])
    };
    let with = |attempt| second().into_iter().chain([attempt]).collect::<Vec<_>>();
    right(&with(at(6, complete(1), "lost", CLAIMED)));
    wrong(&with(at(6, complete(1), "recorded", COMPLETED)));
    wrong(&with(granted(6, renew(1, LEASE), "extended", 2, 306)));
    wrong(&with(at(6, complete(2), "lost", CLAIMED)));
}

#[test]
fn a_read_that_goes_back_in_time_is_found() {
    wrong(&claimed_and([status(3, APPROVED)]));
    wrong(&[
        from(1, 9, approve(1), Told::new("recorded", APPROVED)),
        status(2, APPROVED),
        at(3, Asked::Status, "shown", PENDING),
    ]);
    use EventKind::{Approved, Claimed};
    wrong(&claimed_and([history(3, CLAIMED, &[Approved])]));
    wrong(&claimed_and([history(
        3,
        CLAIMED,
        &[Approved, Claimed, Claimed],
    )]));
}

#[test]
fn a_replayed_answer_to_a_call_that_was_refused_is_found() {
    let refused = [
        at(1, approve(1), "recorded", APPROVED),
        at(2, reject(2), "conflict", APPROVED),
    ];
    let with = |attempt| {
        refused
            .clone()
            .into_iter()
            .chain([attempt])
            .collect::<Vec<_>>()
    };
    wrong(&with(at(3, reject(2), "replayed", REJECTED)));
    wrong(&with(at(3, reject(2), "replayed", APPROVED)));
    wrong(&with(at(3, approve(3), "replayed", APPROVED)));
    right(&with(at(3, approve(1), "replayed", APPROVED)));
    right(&with(at(3, reject(2), "conflict", APPROVED)));
}

/// An approved action with a claim of five seconds, which ends at 7.
fn leased() -> Vec<Attempt> {
    vec![
        at(1, approve(1), "recorded", APPROVED),
        granted(2, claim(2, 5 * SECOND), "claimed", 1, 7),
    ]
}

fn leased_and(more: impl IntoIterator<Item = Attempt>) -> Vec<Attempt> {
    leased().into_iter().chain(more).collect()
}

#[test]
fn a_lease_ends_at_its_time_and_not_before() {
    right(&leased_and([status(8, CLAIMED), status(9, LAPSED)]));
    right(&leased_and([at(8, complete(1), "lost", LAPSED)]));
    right(&leased_and([at(8, approve(3), "recorded", APPROVED)]));
    right(&leased_and([at(
        8,
        claim(2, LEASE),
        "not approved",
        LAPSED,
    )]));
    wrong(&leased_and([status(6, LAPSED)]));
    wrong(&leased_and([at(5, complete(1), "lost", LAPSED)]));
    wrong(&leased_and([at(5, approve(3), "recorded", APPROVED)]));
    // A request that comes after it finds it ended.
    wrong(&leased_and([at(8, complete(1), "recorded", COMPLETED)]));
    wrong(&leased_and([granted(
        8,
        renew(1, LEASE),
        "extended",
        1,
        308,
    )]));
    wrong(&leased_and([at(
        8,
        claim(3, LEASE),
        "already claimed",
        CLAIMED,
    )]));
    // One that is under way at its end may be first or not.
    for (word, state) in [("recorded", COMPLETED), ("lost", LAPSED)] {
        right(&leased_and([from(
            6,
            8,
            complete(1),
            Told::new(word, state),
        )]));
    }
}

#[test]
fn a_lease_lasts_as_long_as_it_was_renewed() {
    let renewed = || leased_and([granted(4, renew(1, 5 * SECOND), "extended", 1, 9)]);
    let with = |attempt| renewed().into_iter().chain([attempt]).collect::<Vec<_>>();
    right(&with(at(8, complete(1), "recorded", COMPLETED)));
    wrong(&with(at(8, complete(1), "lost", LAPSED)));
    wrong(&with(at(10, complete(1), "recorded", COMPLETED)));
    // The answer was lost, and the claimant goes on.
    let lost = leased_and([unknown(4, renew(1, 5 * SECOND))]);
    for (word, state) in [("recorded", COMPLETED), ("lost", LAPSED)] {
        let mut attempts = lost.clone();
        attempts.push(at(8, complete(1), word, state));
        right(&attempts);
    }
    // An end that the claim cannot have.
    wrong(&[
        at(1, approve(1), "recorded", APPROVED),
        granted(2, claim(2, 5 * SECOND), "claimed", 1, 9),
    ]);
}

#[test]
fn an_unknown_claim_may_be_live_and_its_retry_has_the_same_token() {
    let lost = || {
        vec![
            at(1, approve(1), "recorded", APPROVED),
            unknown(2, claim(2, 5 * SECOND)),
        ]
    };
    let with = |attempt| lost().into_iter().chain([attempt]).collect::<Vec<_>>();
    right(&with(at(3, claim(3, LEASE), "already claimed", CLAIMED)));
    right(&with(granted(3, claim(3, LEASE), "claimed", 1, 303)));
    right(&with(granted(4, claim(2, 5 * SECOND), "replayed", 1, 7)));
    right(&with(granted(4, claim(2, 5 * SECOND), "claimed", 1, 9)));
    right(&with(status(9, LAPSED)));
    wrong(&with(status(3, LAPSED)));
    wrong(&with(granted(3, claim(3, LEASE), "replayed", 1, 303)));
}

#[test]
fn an_action_expires_at_its_time_and_is_not_decided_again() {
    let until = || at(1, submit(Some(5 * SECOND)), "recorded", PENDING);
    right(&[until(), status(6, PENDING), status(7, EXPIRED)]);
    right(&[until(), at(6, approve(1), "closed", EXPIRED)]);
    right(&[until(), at(6, reject(1), "duplicate", EXPIRED)]);
    right(&[
        until(),
        from(4, 6, approve(1), Told::new("recorded", APPROVED)),
    ]);
    wrong(&[until(), status(4, EXPIRED)]);
    wrong(&[until(), at(6, approve(1), "recorded", APPROVED)]);
    wrong(&[
        until(),
        at(2, approve(1), "recorded", APPROVED),
        status(6, EXPIRED),
    ]);
}

#[test]
fn many_attempts_that_nobody_knows_of_are_searched_in_time() {
    let mut attempts = claimed();
    for call in 10..40 {
        attempts.push(unknown(3, approve(call)));
        attempts.push(unknown(3, claim(call + 100, LEASE)));
        attempts.push(unknown(3, renew(1, LEASE)));
    }
    attempts.push(at(4, fail(1), "recorded", FAILED));
    let mut known = attempts.clone();
    known.push(status(5, CLAIMED));
    right(&known);
    attempts.push(at(5, complete(2), "recorded", COMPLETED));
    attempts.push(status(6, FAILED));
    wrong(&attempts);
}
