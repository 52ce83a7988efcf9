//! Clients, layers and server together, under every fault that a network has, again and again the same.
//!
//! One seed is one simulation: some clients with the crate's layers ask a server on the in-memory store for decisions, over a
//! network that delays, partitions and cuts, while the server crashes, drains and starts again. Time is simulated, one thread
//! runs everything, and all randomness comes from the seed, so that a seed that fails fails again in every byte.
//!
//! ```text
//! cargo test --features full --test it simulation                         1000 seeds
//! AEGIS_SIM_SEEDS=100000 cargo test --features full --test it simulation  more
//! AEGIS_SIM_SEED=17 cargo test --features full --test it simulation       one, with its trace
//! ```
//!
//! [`human_loop`] has the same for submissions, claims and reports, on the same network.
//!
//! The network is our own, and not turmoil's: turmoil 0.7 advances each host by ticks of some 20 µs of work, which at a
//! millisecond a tick is hours for 1000 seeds, where here time jumps from one event to the next. A partition there drops what it
//! meets for good, where TCP sends it again, and no connection is cut in the middle of a write. The server's accept loop takes sockets of
//! the operating system only, so that its connections are served here, with the same settings.

mod client;
mod far_end;
mod human_loop;
mod network;
mod site;
mod world;

use std::env;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use aegis_hitl::Decision;
use aegis_hitl::layer::Delivery;
use aegis_hitl::store::Store;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use self::client::{Client, Flavour, Limits, Settings};
use self::far_end::SimulatedStore;
use self::network::{Host, Network};
use self::site::Site;
use self::world::{Asked, Counts, Told, World};
use crate::support::alone_blocking;
use crate::support::random::Random;

/// The longest that a call may take, with the longest waits that a server asks for.
const HANG: Duration = Duration::from_secs(600);

/// What is broken on purpose, to show that it is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sabotage {
    None,
    /// The store loses everything when the server starts again.
    Forget,
    /// Something below the layers sends again what failed.
    Resend,
    /// A conflict is answered as a duplicate.
    Lie,
}

/// What came of a seed.
struct Outcomes {
    trace: String,
    violations: Vec<String>,
    counts: Counts,
}

fn simulate(seed: u64, sabotage: Sabotage) -> Outcomes {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let (trace, violations, counts) = runtime.block_on(async {
        let world = World::new();
        Simulation::new(seed, sabotage, &world).run().await;
        world.end()
    });
    Outcomes {
        trace,
        violations,
        counts,
    }
}

struct Simulation {
    world: World,
    site: Site<SimulatedStore>,
    clients: Vec<Client>,
    keys: Vec<Key>,
    random: Random,
}

/// An action that is asked about.
struct Key {
    name: String,
    usual: Decision,
    payload: Option<String>,
}

impl Simulation {
    fn new(seed: u64, sabotage: Sabotage, world: &World) -> Self {
        let mut random = Random::new(seed, 3);
        let clients = 3 + random.below(3) as usize;
        let network = Network::new(seed, clients + 1, world.clone());
        let clients: Vec<_> = (0..clients)
            .map(|host| {
                let settings = settings(&mut random, host, sabotage);
                world.note(format_args!("client {host}: {settings:?}"));
                Client::new(&network, host, settings)
            })
            .collect();
        let keys = (0..3 + random.below(4))
            .map(|number| Key {
                name: format!("key-{number}"),
                usual: random.pick(&[Decision::Approve, Decision::Reject]),
                payload: match random.below(4) {
                    0 | 1 => None,
                    2 => Some("small".to_owned()),
                    _ => Some("large".repeat(random.below(6000) as usize)),
                },
            })
            .collect();
        let trouble = random.pick(&[500, 3000, 20_000]);
        let site = Site {
            world: world.clone(),
            network,
            store: SimulatedStore::new(seed, world.clone()),
            proxy: Arc::default(),
            front: Arc::new(Mutex::new(Random::new(seed, 4))),
            faults: Random::new(seed, 5),
            clients: clients.len(),
            lasts: Duration::from_millis(trouble),
            repeats: false,
            forgets: sabotage == Sabotage::Forget,
            lies: sabotage == Sabotage::Lie,
        };
        Self {
            world: world.clone(),
            site,
            clients,
            keys,
            random,
        }
    }

    async fn run(mut self) {
        let mut calls = self.calls();
        let server = self.site.trouble().await;
        self.site.heal();
        let all = async {
            while let Some(call) = calls.join_next().await {
                if let Err(error) = call {
                    self.world.violation(format_args!("a call ended: {error}"));
                }
            }
        };
        if timeout(HANG, all).await.is_err() {
            self.world.violation(format_args!("a call hangs"));
            calls.abort_all();
        }
        self.settle().await;
        // What is still under way arrives, if it is to.
        sleep(Duration::from_secs(60)).await;
        self.audit().await;
        server.kill(&self.site.network, Host::Refuses);
    }

    /// Starts the calls, each at its time.
    fn calls(&mut self) -> JoinSet<()> {
        let number = 12 + self.random.below(12);
        let mut calls: Vec<Call> = Vec::new();
        for number in 0..number {
            let mut call = self.call(format!("call-{number}"));
            if self.random.percent(15)
                && let What::Decide { asked, .. } = &mut call.what
            {
                // The same call is made again, by whom it may be.
                let earlier = calls
                    .iter_mut()
                    .find_map(|earlier| match &mut earlier.what {
                        What::Decide { asked: earlier, .. }
                            if earlier.key == asked.key && earlier.decision == asked.decision =>
                        {
                            Some(earlier)
                        }
                        _ => None,
                    });
                if let Some(earlier) = earlier {
                    earlier.is_shared = true;
                    asked.is_shared = true;
                    asked.call.clone_from(&earlier.call);
                }
            }
            calls.push(call);
        }
        let mut tasks = JoinSet::new();
        for call in calls {
            tasks.spawn(call.run(self.world.clone()));
        }
        tasks
    }

    fn call(&mut self, name: String) -> Call {
        let random = &mut self.random;
        let start = random.millis(1, self.site.lasts.as_millis() as u64);
        let host = random.below(self.clients.len() as u64) as usize;
        let client = self.clients[host].clone();
        let deadline = match random.below(10) {
            0..=2 => None,
            3 => Some(random.millis(1, 300)),
            _ => Some(random.millis(500, 30_000)),
        };
        let what = if client.settings().flavour != Flavour::Service && random.percent(40) {
            What::Charge { name }
        } else {
            let key = &self.keys[random.below(self.keys.len() as u64) as usize];
            let decision = if random.percent(80) {
                key.usual
            } else {
                key.usual.opposite()
            };
            let payload = match random.below(10) {
                0 => None,
                1 => Some("other".to_owned()),
                _ => key.payload.clone(),
            };
            let asked = Asked {
                client: host,
                key: key.name.clone(),
                decision,
                call: name,
                is_shared: false,
            };
            What::Decide { asked, payload }
        };
        Call {
            start,
            client,
            limits: Limits { deadline },
            patience: random.percent(8).then(|| random.millis(1, 3000)),
            what,
        }
    }

    /// Asks once more for every action: with the trouble over, each call is told what is on record.
    async fn settle(&self) {
        let host = self.clients.len();
        let settings = Settings {
            flavour: Flavour::Service,
            http2: false,
            timeout: Duration::from_secs(10),
            retries: 3,
            backoff: vec![Duration::from_millis(100)],
            seed: 0,
            resends: false,
        };
        let client = Client::new(&self.site.network, host, settings);
        for (number, key) in self.keys.iter().enumerate() {
            let asked = Asked {
                client: host,
                key: key.name.clone(),
                decision: key.usual,
                call: format!("settle-{number}"),
                is_shared: false,
            };
            let limits = Limits { deadline: None };
            let told = client.decide(&asked, None, limits).await;
            self.world.told(&asked, &told);
            let is_settled = match &told {
                Told::OnRecord { .. } => true,
                Told::Refused { recorded, .. } => recorded.is_some(),
            };
            if !is_settled {
                let what = format_args!("{} is not settled: {told:?}", asked.key);
                self.world.violation(what);
            }
        }
    }

    /// Compares the store with the model.
    async fn audit(&self) {
        let records = self.world.records();
        let totals = self.site.store.totals().await.unwrap();
        if (totals.decisions, totals.events) != (records.len() as u64, records.len() as u64) {
            self.world.violation(format_args!(
                "the store has {totals:?} and the model {}",
                records.len()
            ));
        }
        for (key, record) in records {
            let action = self
                .site
                .store
                .find(record.id.parse().unwrap(), None)
                .await
                .unwrap();
            if action.and_then(|action| action.decision) != Some(record.decision) {
                self.world
                    .violation(format_args!("the store has another decision for {key}"));
            }
        }
    }
}

fn settings(random: &mut Random, host: usize, sabotage: Sabotage) -> Settings {
    let flavour = match host {
        0 => Flavour::Service,
        1 => Flavour::Layer,
        2 => Flavour::Retry,
        _ => random.pick(&[Flavour::Service, Flavour::Service, Flavour::Layer]),
    };
    Settings {
        flavour,
        http2: random.percent(40),
        timeout: random.millis(200, 5000),
        retries: random.below(5) as u32,
        backoff: (0..1 + random.below(3))
            .map(|_| random.millis(0, 1500))
            .collect(),
        seed: random.next(),
        resends: sabotage == Sabotage::Resend,
    }
}

/// A call that is made.
struct Call {
    start: Duration,
    client: Client,
    limits: Limits,
    /// When the caller itself ends, in the middle of the call.
    patience: Option<Duration>,
    what: What,
}

enum What {
    Decide {
        asked: Asked,
        payload: Option<String>,
    },
    Charge {
        name: String,
    },
}

impl Call {
    async fn run(self, world: World) {
        sleep(self.start).await;
        let limits = self.limits;
        match &self.what {
            What::Decide { asked, payload } => {
                let Asked {
                    client: host,
                    key,
                    decision,
                    call: name,
                    ..
                } = asked;
                world.note(format_args!(
                    "client {host}: {decision} of {key} by {name}, {limits:?}"
                ));
                let told = self.client.decide(asked, payload.as_deref(), limits);
                if let Some(told) = self.timed(&world, name, told).await {
                    world.told(asked, &told);
                }
            }
            What::Charge { name } => {
                world.must_not_repeat(name);
                world.note(format_args!("charge by {name}, {limits:?}"));
                let told = self.client.charge(name, limits);
                if let Some(told) = self.timed(&world, name, told).await {
                    world.note(format_args!("charge by {name}: {told:?}"));
                    if told == Err(Delivery::NeverSent) {
                        world.told_never_sent(name);
                    }
                }
            }
        }
    }

    /// Waits for the end of the call, unless its caller ends before.
    async fn timed<T>(
        &self,
        world: &World,
        name: &str,
        call: impl Future<Output = T>,
    ) -> Option<T> {
        let started = Instant::now();
        let told = timeout(self.patience.unwrap_or(HANG), call).await;
        // Timers count in milliseconds and round up.
        let bound = self.client.settings().bound(self.limits) + Duration::from_millis(2);
        let took = started.elapsed();
        if took > bound && self.patience.is_none() {
            world.violation(format_args!("{name} took {took:?}, allowed are {bound:?}"));
        }
        if told.is_err() {
            world.note(format_args!("{name}: its caller has ended"));
        }
        told.ok()
    }
}

/// Runs seeds on all processors until one fails, and adds up what came about.
fn run_all(seeds: u64) -> Counts {
    let next = AtomicU64::new(0);
    let total = Mutex::new(Counts::default());
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
                    total.lock().unwrap().add(&outcomes.counts);
                    if !outcomes.violations.is_empty() {
                        // The other threads end with their seeds.
                        next.store(seeds, Ordering::Relaxed);
                        let mut failed = failed.lock().unwrap();
                        if failed.as_ref().is_none_or(|(first, _)| seed < *first) {
                            *failed = Some((seed, outcomes));
                        }
                    }
                }
            });
        }
    });
    if let Some((seed, outcomes)) = failed.into_inner().unwrap() {
        fail(seed, &outcomes);
    }
    total.into_inner().unwrap()
}

fn fail(seed: u64, outcomes: &Outcomes) -> ! {
    panic!(
        "seed {seed} breaks a promise:\n  {}\n\nto replay it: AEGIS_SIM_SEED={seed} cargo test --features full --test it simulation",
        outcomes.violations.join("\n  ")
    );
}

/// Reads a number from the environment.
fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is no number")),
    )
}

#[test]
fn every_seed_keeps_every_promise() {
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
    let seeds = number("AEGIS_SIM_SEEDS").unwrap_or(1000);
    let counts = run_all(seeds);
    println!("{seeds} seeds: {counts:?}");
    // A simulation in which none of this comes about shows nothing.
    let Counts {
        accepted,
        duplicates,
        conflicts,
        retried,
        replays,
        never_sent,
        unknown,
        timeouts,
        unkeyed_arrivals,
        restarts,
    } = counts;
    let all = [
        accepted,
        duplicates,
        conflicts,
        retried,
        replays,
        never_sent,
        unknown,
        timeouts,
        unkeyed_arrivals,
        restarts,
    ];
    assert!(
        seeds < 100 || all.iter().all(|count| *count >= seeds / 10),
        "{counts:?}"
    );
}

#[test]
fn a_seed_replays_byte_for_byte() {
    for seed in 0..50 {
        let first = simulate(seed, Sabotage::None);
        let second = thread::scope(|scope| {
            let other = scope.spawn(|| simulate(seed, Sabotage::None));
            other.join().unwrap()
        });
        assert!(
            first.trace == second.trace,
            "seed {seed}:\n{}\n\n{}",
            first.trace,
            second.trace
        );
        assert!(first.trace.contains("the bytes of all connections"));
    }
    assert_ne!(
        simulate(1, Sabotage::None).trace,
        simulate(2, Sabotage::None).trace
    );
}

/// Whether one of a few seeds finds what is broken on purpose.
fn is_found(sabotage: Sabotage, violation: &str) -> bool {
    let mut violations = (0..200).flat_map(|seed| simulate(seed, sabotage).violations);
    violations.any(|found| found.contains(violation))
}

#[test]
fn a_store_that_forgets_on_restart_is_found() {
    assert!(is_found(
        Sabotage::Forget,
        "has a second decision on record"
    ));
}

#[test]
fn a_client_that_sends_what_is_unsafe_again_is_found() {
    assert!(is_found(
        Sabotage::Resend,
        "is not safe to repeat and came twice"
    ));
}

#[test]
fn a_server_that_takes_a_conflict_for_a_duplicate_is_found() {
    assert!(is_found(Sabotage::Lie, "has a receipt for"));
}
