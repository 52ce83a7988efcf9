//! The human loop under every fault: agents, executors and reviewers, whose processes end at any await.
//!
//! The history of a run is written by the store, by the side effects and by the clients, and checked as a whole. The store runs on
//! simulated time. What the service's own waits add at random is the one thing that a seed does not repeat.

mod history;
mod people;
mod store;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::history::{Conclusion, Fact};
use self::people::{Person, Plan};
use self::store::{History, LoopStore};
use super::client::{Client, Flavour, Settings};
use super::network::{Host, Network};
use super::site::Site;
use super::world::World;
use super::{HANG, number};
use crate::support::alone_blocking;
use crate::support::random::Random;

/// What is broken on purpose, to show that it is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sabotage {
    None,
    /// The store loses everything when the server starts again.
    Forget,
    /// The store's clock stands still, so that no lease ends and nothing expires.
    Stand,
    /// An agent does its side effect twice.
    Twice,
}

struct Outcomes {
    trace: String,
    violations: Vec<String>,
    /// How often each fact came about.
    counts: BTreeMap<String, u64>,
}

fn simulate(seed: u64, sabotage: Sabotage) -> Outcomes {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let world = World::new();
        let history = History::new(world.clone());
        run(seed, sabotage, &world, &history).await;
        let mut counts = BTreeMap::new();
        for entry in history.entries() {
            *counts.entry(name(&entry.fact)).or_default() += 1;
        }
        let broken = history.check();
        let (trace, mut violations, _) = world.end();
        violations.extend(broken);
        Outcomes {
            trace,
            violations,
            counts,
        }
    })
}

/// What kind of a fact it is, as far as the counts tell kinds apart.
fn name(fact: &Fact) -> String {
    match fact {
        Fact::Event { kind, .. } => kind.to_string(),
        Fact::Concluded(Conclusion::Ran { ended, .. }) => format!("run {ended:?}"),
        Fact::Concluded(Conclusion::Receipt { is_own, .. }) => format!("receipt, own: {is_own}"),
        other => {
            let text = format!("{other:?}");
            let words = text.split([' ', '{', '(']).next().unwrap_or_default();
            words.to_owned()
        }
    }
}

async fn run(seed: u64, sabotage: Sabotage, world: &World, history: &History) {
    let mut random = Random::new(seed, 13);
    let hosts = 3 + random.below(2) as usize;
    let network = Network::new(seed, hosts, world.clone());
    let clients: Vec<_> = (0..hosts)
        .map(|host| {
            let settings = Settings {
                flavour: Flavour::Service,
                http2: random.percent(40),
                timeout: random.millis(200, 5000),
                retries: random.below(4) as u32,
                backoff: vec![random.millis(0, 1500)],
                seed: 0,
                resends: false,
            };
            world.note(format_args!("client {host}: {settings:?}"));
            Client::new(&network, host, settings)
        })
        .collect();
    let lasts = Duration::from_millis(random.pick(&[3000, 20_000, 60_000]));
    let plans: Vec<_> = (0..2 + random.below(3))
        .map(|number| Plan {
            key: format!("key-{number}"),
            payload: random.percent(75).then(|| random.below(100)),
            expires: random.percent(40).then(|| random.millis(1000, 60_000)),
            allow_edit: random.percent(40),
        })
        .collect();
    let store = LoopStore::new(seed, history.clone(), sabotage == Sabotage::Stand);
    let mut site = Site {
        world: world.clone(),
        network,
        store: store.clone(),
        proxy: Arc::default(),
        front: Arc::new(Mutex::new(Random::new(seed, 14))),
        faults: Random::new(seed, 15),
        clients: hosts,
        lasts,
        repeats: true,
        forgets: sabotage == Sabotage::Forget,
        lies: false,
    };
    let settling = tokio::spawn({
        let store = store.clone();
        async move {
            loop {
                sleep(Duration::from_secs(1)).await;
                store.settle().await;
            }
        }
    });
    let mut tasks = JoinSet::new();
    for number in 0..4 + random.below(5) {
        let client = clients[random.below(hosts as u64) as usize].clone();
        let person = Person {
            name: format!("person-{number}"),
            aegis: client.aegis().clone(),
            history: history.clone(),
            random: Random::new(seed, 100 + number),
            calls: 0,
            sabotage: sabotage == Sabotage::Twice,
        };
        let plan = plans[random.below(plans.len() as u64) as usize].clone();
        let starts = random.millis(1, lasts.as_millis() as u64);
        let kind = if number < 2 { number } else { random.below(4) };
        let all = plans.clone();
        tasks.spawn(async move {
            sleep(starts / 4).await;
            match kind {
                0 => person.review(all, 20).await,
                1 | 2 => person.run(plan).await,
                _ => person.execute(plan).await,
            }
        });
    }
    let server = site.trouble().await;
    site.heal();
    let all = async {
        while let Some(part) = tasks.join_next().await {
            if let Err(error) = part {
                world.violation(format_args!("a part ended: {error}"));
            }
        }
    };
    if timeout(HANG * 2, all).await.is_err() {
        world.violation(format_args!("someone hangs"));
    }
    // What is still under way arrives, and every lease ends.
    sleep(Duration::from_secs(90)).await;
    settling.abort();
    store.audit().await;
    server.kill(&site.network, Host::Refuses);
}

fn fail(seed: u64, outcomes: &Outcomes) -> ! {
    panic!(
        "seed {seed} breaks a promise:\n  {}\n\n{}",
        outcomes.violations.join("\n  "),
        outcomes.trace
    );
}

#[test]
fn the_human_loop_keeps_every_promise_under_every_seed() {
    if let Some(seed) = number("AEGIS_SIM_SEED") {
        let outcomes = simulate(seed, Sabotage::None);
        println!("{}", outcomes.trace);
        if !outcomes.violations.is_empty() {
            fail(seed, &outcomes);
        }
        return;
    }
    // It takes all processors.
    let _alone = alone_blocking();
    let seeds = number("AEGIS_SIM_SEEDS").unwrap_or(100);
    let next = AtomicU64::new(0);
    let counts = Mutex::new(BTreeMap::<String, u64>::new());
    let failed = Mutex::new(None);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let outcomes = simulate(seed, Sabotage::None);
                    for (name, count) in &outcomes.counts {
                        *counts.lock().unwrap().entry(name.clone()).or_default() += count;
                    }
                    if !outcomes.violations.is_empty() {
                        // The other threads end with their seeds.
                        next.store(seeds, Ordering::Relaxed);
                        failed.lock().unwrap().get_or_insert((seed, outcomes));
                    }
                }
            });
        }
    });
    if let Some((seed, outcomes)) = failed.into_inner().unwrap() {
        fail(seed, &outcomes);
    }
    let counts = counts.into_inner().unwrap();
    println!("{seeds} seeds: {counts:#?}");
    // A simulation in which none of this comes about shows nothing.
    for name in [
        "submitted",
        "approved",
        "rejected",
        "expired",
        "cancelled",
        "claimed",
        "completed",
        "failed",
        "claim-lost",
        "Began",
        "receipt, own: true",
        "receipt, own: false",
        "run Reported(Completed)",
        "run Reported(Failed)",
        "run AlreadyRun(Some(Completed))",
        "run Settled(Rejected)",
    ] {
        assert!(counts.contains_key(name), "no {name}: {counts:#?}");
    }
}

/// Whether one of a few seeds finds what is broken on purpose.
fn is_found(sabotage: Sabotage, violation: &str) -> bool {
    let mut violations = (0..100).flat_map(|seed| simulate(seed, sabotage).violations);
    violations.any(|found| found.contains(violation))
}

#[test]
fn a_human_loop_whose_store_forgets_on_restart_is_found() {
    assert!(is_found(Sabotage::Forget, "on record and had"));
}

#[test]
fn a_lease_that_never_ends_is_found() {
    assert!(is_found(
        Sabotage::Stand,
        "is claimed after its lease ended"
    ));
}

#[test]
fn an_expiry_that_never_comes_is_found() {
    assert!(is_found(Sabotage::Stand, "has not expired in time"));
}

#[test]
fn a_side_effect_that_happens_twice_is_found() {
    assert!(is_found(Sabotage::Twice, "was run twice in round"));
}
