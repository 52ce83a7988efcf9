//! Random requests, clock steps and restarts, on all stores, against a reference that is written
//! from the protocol alone.
//!
//! ```sh
//! cargo test --features full --test it model                         200 cases, another seed each time
//! AEGIS_MODEL_CASES=20000 cargo test --features full --test it model  more
//! AEGIS_MODEL_SEED=17 cargo test --features full --test it model      the same cases again
//! ```

#[cfg(all(feature = "postgres", unix))]
mod postgres;
#[cfg(not(all(feature = "postgres", unix)))]
#[path = "without_postgres.rs"]
mod postgres;
mod side;

use aegis_hitl::Decision;
use aegis_hitl::store::{Clock, MemoryStore, SqliteStore};
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use tempfile::TempDir;

use self::postgres::Postgres;
use self::side::{CALLS, PAYLOADS, STEP, Side};
use crate::support::reference::{Reference, Request, SLOTS, Target, Token};

const THREADS: u32 = 8;

/// A step of a case. What it is about is chosen by what is on record then.
#[derive(Debug, Clone)]
enum Step {
    Submit(usize, Call, Option<usize>, Option<i64>, bool, usize, bool),
    Decide(
        usize,
        Decision,
        Call,
        Option<usize>,
        bool,
        usize,
        bool,
        bool,
    ),
    DecideById(Aim, Decision, Call, Seen, Option<usize>, usize, bool),
    Cancel(Aim, Call, usize, bool),
    Acquire(Aim, Seen, i64, Call, usize),
    Renew(Aim, Held, i64),
    Finish(Aim, Held, bool, bool, Call, usize),
    /// The last request again, with the same call id.
    Again,
    Forward(i64),
    Back(i64),
    /// Removes whatever is over.
    Sweep,
    Restart,
}

type Call = Option<usize>;

/// An action, mostly one that is on record, and whether another tenant asks for it.
type Aim = (Pick, bool);

#[derive(Debug, Clone)]
enum Pick {
    /// One that is on record, by its age.
    Known(usize),
    Slot(usize),
}

/// The digest in a request.
#[derive(Debug, Clone)]
enum Seen {
    Present,
    Nothing,
    Payload(usize),
}

/// The token in a request.
#[derive(Debug, Clone)]
enum Held {
    Newest,
    Older,
    Unknown,
}

fn step() -> impl Strategy<Value = Step> {
    // Most requests are about two of the actions, so that these get far.
    let slot = || prop_oneof![0..2_usize, 0..SLOTS];
    let pick = || {
        prop_oneof![
            12 => (0..2_usize).prop_map(Pick::Known),
            4 => (0..SLOTS).prop_map(Pick::Known),
            1 => (0..SLOTS).prop_map(Pick::Slot),
        ]
    };
    let aim = || (pick(), prop::bool::weighted(0.03));
    let call = || option::weighted(0.7, 0..CALLS.len());
    let actor = || 0..2_usize;
    let payload = || option::weighted(0.6, prop_oneof![3 => Just(0), 1 => 1..PAYLOADS.len()]);
    let seen = || {
        prop_oneof![
            8 => Just(Seen::Present),
            1 => Just(Seen::Nothing),
            1 => (0..PAYLOADS.len()).prop_map(Seen::Payload),
        ]
    };
    let held = || {
        prop_oneof![
            6 => Just(Held::Newest),
            2 => Just(Held::Older),
            1 => Just(Held::Unknown),
        ]
    };
    let decision = || {
        prop_oneof![
            3 => Just(Decision::Approve),
            1 => Just(Decision::Reject),
        ]
    };
    let seldom = || prop::bool::weighted(0.2);
    let edited = option::weighted(0.3, 0..PAYLOADS.len());
    let expires = option::weighted(0.4, 1..4_i64);
    prop_oneof![
        6 => (slot(), call(), payload(), expires, any::<bool>(), actor(), seldom())
            .prop_map(|(a, b, c, d, e, f, g)| Step::Submit(a, b, c, d, e, f, g)),
        3 => (slot(), decision(), call(), payload(), any::<bool>(), actor(), seldom(), any::<bool>())
            .prop_map(|(a, b, c, d, e, f, g, h)| Step::Decide(a, b, c, d, e, f, g, h)),
        6 => (aim(), decision(), call(), seen(), edited, actor(), any::<bool>())
            .prop_map(|(a, b, c, d, e, f, g)| Step::DecideById(a, b, c, d, e, f, g)),
        1 => (aim(), call(), actor(), seldom()).prop_map(|(a, b, c, d)| Step::Cancel(a, b, c, d)),
        6 => (aim(), seen(), 1..4_i64, call(), actor())
            .prop_map(|(a, b, c, d, e)| Step::Acquire(a, b, c, d, e)),
        2 => (aim(), held(), 1..4_i64).prop_map(|(a, b, c)| Step::Renew(a, b, c)),
        4 => (aim(), held(), any::<bool>(), any::<bool>(), call(), actor())
            .prop_map(|(a, b, c, d, e, f)| Step::Finish(a, b, c, d, e, f)),
        3 => Just(Step::Again),
        3 => (1..4_i64).prop_map(Step::Forward),
        1 => (1..4_i64).prop_map(Step::Back),
        2 => Just(Step::Sweep),
        1 => Just(Step::Restart),
    ]
}

/// Turns a step into a request, by what is on record.
fn request(step: &Step, reference: &Reference, number: usize) -> Option<Request> {
    let slot = |aim: &Aim| match (&aim.0, reference.slots()) {
        (Pick::Slot(slot) | Pick::Known(slot), []) | (Pick::Slot(slot), _) => *slot,
        (Pick::Known(age), known) => known[age % known.len()],
    };
    let target = |aim: &Aim| Target {
        slot: slot(aim),
        foreign: aim.1,
    };
    let digest = |aim: &Aim, seen: &Seen| match seen {
        Seen::Present => reference.content(slot(aim)),
        Seen::Nothing => None,
        Seen::Payload(payload) => Some(*payload),
    };
    let token = |aim: &Aim, held: &Held| match (held, reference.fence(slot(aim))) {
        (Held::Newest, fence @ 1..) => Token::Fence(fence),
        (Held::Older, fence @ 2..) => Token::Fence(fence - 1),
        _ => Token::Unknown,
    };
    let text = |has: bool| has.then(|| format!("text {number}"));
    Some(match step {
        Step::Submit(slot, call, payload, expires, allow_edit, actor, only_existing) => {
            Request::Submit {
                slot: *slot,
                call: *call,
                payload: *payload,
                title: text(*allow_edit),
                expires: expires.map(|steps| reference.now + steps),
                allow_edit: *allow_edit,
                actor: *actor,
                only_existing: *only_existing,
            }
        }
        Step::Decide(slot, decision, call, payload, comment, actor, strict, self_approval) => {
            Request::Decide {
                slot: *slot,
                decision: *decision,
                call: *call,
                payload: *payload,
                comment: text(*comment),
                actor: *actor,
                strict: *strict,
                self_approval: *self_approval,
            }
        }
        Step::DecideById(aim, decision, call, seen, edited, actor, self_approval) => {
            Request::DecideById {
                to: target(aim),
                decision: *decision,
                call: *call,
                digest: digest(aim, seen),
                // Only an approval has an edited payload.
                edited: edited.filter(|_| *decision == Decision::Approve),
                comment: text(*self_approval),
                actor: *actor,
                self_approval: *self_approval,
            }
        }
        Step::Cancel(aim, call, actor, may_cancel_all) => Request::Cancel {
            to: target(aim),
            call: *call,
            actor: *actor,
            may_cancel_all: *may_cancel_all,
        },
        Step::Acquire(aim, seen, lease, call, actor) => Request::Acquire {
            to: target(aim),
            digest: digest(aim, seen),
            lease: *lease,
            call: *call,
            actor: *actor,
        },
        Step::Renew(aim, held, lease) => Request::Renew {
            to: target(aim),
            token: token(aim, held),
            lease: *lease,
        },
        Step::Finish(aim, held, succeeds, says, call, actor) => Request::Finish {
            to: target(aim),
            token: token(aim, held),
            report: if *succeeds {
                Ok(says.then(|| number.to_string()))
            } else {
                Err(text(*says))
            },
            call: *call,
            actor: *actor,
        },
        Step::Again | Step::Forward(_) | Step::Back(_) | Step::Sweep | Step::Restart => {
            return None;
        }
    })
}

/// Runs a case on the memory store and the embedded store, and on the PostgreSQL store if it has
/// a database, which is emptied.
async fn run(steps: &[Step], database: Option<&str>) -> Result<(), TestCaseError> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let clock = Clock::new();
    let mut reference = Reference::default();
    let mut memory = Side::new("memory", MemoryStore::with_clock(clock.clone()), &clock);
    let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
    let mut sqlite = Side::new("sqlite", store, &clock);
    let mut postgres = Postgres::open(database, &clock).await;
    let mut last = None;
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Forward(by) => {
                clock.advance(STEP * u32::try_from(*by).unwrap());
                for slot in reference.step(*by) {
                    memory.touch(slot).await;
                    sqlite.touch(slot).await;
                    memory.compare(&reference, slot).await?;
                    sqlite.compare(&reference, slot).await?;
                    postgres.touch(slot).await;
                    postgres.compare(&reference, slot).await?;
                }
            }
            Step::Back(by) => {
                clock.set_back(STEP * u32::try_from(*by).unwrap());
                let due = reference.step(-by);
                prop_assert!(due.is_empty());
            }
            Step::Sweep => {
                let expected = reference.sweep();
                prop_assert_eq!(memory.sweep().await, expected, "memory");
                prop_assert_eq!(sqlite.sweep().await, expected, "sqlite");
                postgres.sweep(expected).await?;
                for slot in 0..SLOTS {
                    memory.compare(&reference, slot).await?;
                    sqlite.compare(&reference, slot).await?;
                    postgres.compare(&reference, slot).await?;
                }
            }
            Step::Restart => {
                sqlite.store.close().await;
                sqlite.store = SqliteStore::open_with(&path, clock.clone()).unwrap();
                postgres.reopen(&clock).await;
                reference.restart();
            }
            _ => {
                let new = request(step, &reference, number);
                let Some(request) = new.or_else(|| last.take()) else {
                    continue;
                };
                let expected = reference.apply(&request);
                for (side, answer) in [
                    ("memory", memory.apply(&request).await?),
                    ("sqlite", sqlite.apply(&request).await?),
                ] {
                    prop_assert_eq!(&answer, &expected, "{} on {:?}", side, request);
                }
                postgres.apply(&request, &expected).await?;
                for slot in 0..SLOTS {
                    memory.compare(&reference, slot).await?;
                }
                let slot = side::slot(&request);
                sqlite.compare(&reference, slot).await?;
                postgres.compare(&reference, slot).await?;
                last = Some(request);
            }
        }
    }
    memory.compare_all(&reference, false).await?;
    sqlite.compare_all(&reference, true).await?;
    postgres.compare_all(&reference).await?;
    sqlite.store.close().await;
    let verified = SqliteStore::verify(&path).unwrap();
    prop_assert_eq!(verified.faults, Vec::<String>::new());
    Ok(())
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect(name))
}

/// Runs cases until one fails, and returns that one, made as small as possible.
fn run_all(seed: u64, cases: u32, on_postgres: bool) -> Result<(), TestError<Vec<Step>>> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let steps = prop::collection::vec(step(), 1..70);
    let database = on_postgres.then(|| runtime.block_on(postgres::database()));
    TestRunner::new_with_rng(config, rng).run(&steps, |steps| {
        runtime.block_on(Box::pin(run(&steps, database.as_deref())))
    })
}

/// Runs this number of cases, or as many as the environment says, `share` times fewer.
fn run_on_threads(cases: u32, share: u32, on_postgres: bool) {
    let seed = number("AEGIS_MODEL_SEED").unwrap_or_else(|| u64::from(rand_seed()));
    let cases = number("AEGIS_MODEL_CASES").map_or(cases, |cases| u32::try_from(cases).unwrap());
    let each = cases.div_ceil(THREADS * share);
    // Mostly they wait for the disk, so they run beside each other.
    let run = |thread| run_all(seed.wrapping_add(thread), each, on_postgres);
    let failed = std::thread::scope(|scope| {
        let running = (0..u64::from(THREADS)).map(|thread| scope.spawn(move || run(thread)));
        let running: Vec<_> = running.collect();
        let ended = running.into_iter().map(|thread| thread.join().unwrap());
        ended.filter_map(Result::err).collect::<Vec<_>>()
    });
    if let Some(error) = failed.first() {
        panic!("AEGIS_MODEL_SEED={seed} AEGIS_MODEL_CASES={cases} fails again: {error}");
    }
}

#[test]
fn both_stores_answer_as_the_protocol_says_whatever_comes() {
    run_on_threads(200, 1, false);
}

#[cfg(all(feature = "postgres", unix))]
#[test]
fn the_postgres_store_answers_as_the_others_whatever_comes() {
    run_on_threads(200, 5, true);
}

/// Another number at each run.
fn rand_seed() -> u32 {
    uuid::Uuid::new_v4().as_fields().0
}
