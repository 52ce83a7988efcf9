//! Measures what a call through the layers costs over a service that answers at once, and compares
//! it with other crates.
//!
//! The subjects take turns, round after round, so a machine that slows down slows all of them. A
//! subject's figure is the median over all rounds.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "support/counting.rs"]
mod counting;
#[path = "support/results.rs"]
mod results;
#[path = "support/stacks.rs"]
mod stacks;

use std::cell::RefCell;
use std::future::poll_fn;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use serde_json::json;
use tokio::runtime::Runtime;

use counting::allocations;
use stacks::{Floor, Peer, Stack, Template, with_reqwest};

const ROUNDS: u32 = 9;

/// Runs the given number of calls, each of which first fails `failures` times, and returns the
/// time.
type Run = Box<dyn Fn(&Runtime, u64, u32) -> Duration>;

struct Subject {
    name: &'static str,
    /// Whether the subject can send a request again.
    retries: bool,
    run: Run,
    samples: RefCell<[Vec<f64>; 4]>,
}

impl Subject {
    fn new(name: &'static str, retries: bool, run: Run) -> Self {
        Self {
            name,
            retries,
            run,
            samples: RefCell::default(),
        }
    }
}

fn tower<S: Stack + 'static>(stack: impl Fn(Peer) -> S, template: Template) -> Run {
    let peer = Peer::new();
    let service = RefCell::new(stack(peer));
    Box::new(move |runtime, calls, failures| {
        let service = &mut *service.borrow_mut();
        runtime.block_on(async {
            let begun = Instant::now();
            for _ in 0..calls {
                peer.fail(failures);
                poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
                let response = service.call(template.request()).await.unwrap();
                assert_eq!(response.status(), 200);
            }
            begun.elapsed()
        })
    })
}

fn reqwest_client(client: impl Fn(Peer) -> reqwest_middleware::ClientWithMiddleware) -> Run {
    let peer = Peer::new();
    let client = client(peer);
    let url: reqwest::Url = "http://localhost:8000/api/v1/hitl/approve".parse().unwrap();
    Box::new(move |runtime, calls, failures| {
        runtime.block_on(async {
            let begun = Instant::now();
            for _ in 0..calls {
                peer.fail(failures);
                let response = client.execute(with_reqwest::request(&url)).await.unwrap();
                assert_eq!(response.status(), 200);
            }
            begun.elapsed()
        })
    })
}

fn subjects() -> Vec<Subject> {
    let plain = Template::new;
    let keyed = Template::keyed;
    vec![
        Subject::new("bare", false, tower(|peer| peer, plain())),
        Subject::new("floor: four headers", false, tower(Floor::new, plain())),
        Subject::new("AegisLayer", true, tower(stacks::aegis, plain())),
        Subject::new("SetTenantLayer", false, tower(stacks::set_tenant, plain())),
        Subject::new("SetThreadLayer", false, tower(stacks::set_thread, plain())),
        Subject::new(
            "SetIdempotencyKeyLayer",
            false,
            tower(stacks::set_key, plain()),
        ),
        Subject::new(
            "SetRequestIdLayer",
            false,
            tower(stacks::set_request_id, plain()),
        ),
        Subject::new(
            "ConfirmDuplicateLayer",
            false,
            tower(stacks::confirm, keyed()),
        ),
        Subject::new("RetryLayer", true, tower(stacks::retry, keyed())),
        Subject::new("tower::retry", true, tower(stacks::tower_retry, keyed())),
        Subject::new(
            "tower-http headers + tower::retry",
            true,
            tower(stacks::tower_http, plain()),
        ),
        Subject::new(
            "tower-resilience-retry",
            true,
            tower(stacks::tower_resilience, keyed()),
        ),
        Subject::new(
            "reqwest-middleware, bare",
            false,
            reqwest_client(with_reqwest::bare),
        ),
        Subject::new(
            "reqwest-middleware + headers + reqwest-retry",
            true,
            reqwest_client(with_reqwest::with_retries),
        ),
    ]
}

fn main() {
    if !results::is_asked_for() {
        return;
    }
    // Some subjects sleep for a tick of the timer even when the wait is zero. A paused clock,
    // which jumps when everything waits, leaves only the work of that.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let mut criterion = Criterion::default()
        .sample_size(10)
        .nresamples(1000)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(150))
        .without_plots()
        .configure_from_args();
    let subjects = subjects();
    for round in 0..ROUNDS {
        for failures in [0, 1, 3] {
            let mut group = criterion.benchmark_group(format!("overhead/{failures}/{round}"));
            // Each round starts with another subject, so that no two always follow each other.
            let (front, back) = subjects.split_at(round as usize % subjects.len());
            for subject in back.iter().chain(front) {
                if failures > 0 && !subject.retries {
                    continue;
                }
                group.bench_function(BenchmarkId::from_parameter(subject.name), |bencher| {
                    bencher.iter_custom(|calls| {
                        let took = (subject.run)(&runtime, calls, failures);
                        if calls >= 100 {
                            let each = took.as_nanos() as f64 / calls as f64;
                            subject.samples.borrow_mut()[failures as usize].push(each);
                        }
                        took
                    });
                });
            }
        }
    }
    criterion.final_summary();
    report(&runtime, &subjects);
}

fn report(runtime: &Runtime, subjects: &[Subject]) {
    println!("\n| stack | first try, ns | one retry, ns | three, ns | allocations |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    let mut rows = Vec::new();
    for subject in subjects {
        let mut samples = subject.samples.borrow_mut();
        let mut cell = |failures: usize| -> Option<f64> {
            let samples = &mut samples[failures];
            (!samples.is_empty()).then(|| results::median(samples))
        };
        let times = [cell(0), cell(1), cell(3)];
        if times[0].is_none() {
            continue;
        }
        let count = |failures: u32| {
            const CALLS: u64 = 100;
            (subject.run)(runtime, 1, failures);
            // The runtime itself allocates when it is entered.
            let (idle, _) = allocations(|| (subject.run)(runtime, 0, failures));
            let (all, _) = allocations(|| (subject.run)(runtime, CALLS, failures));
            (all - idle) as f64 / CALLS as f64
        };
        let allocations = [
            Some(count(0)),
            times[1].map(|_| count(1)),
            times[2].map(|_| count(3)),
        ];
        let text =
            |value: Option<f64>| value.map_or(String::from("-"), |value| format!("{value:.0}"));
        let [first, one, three] = times.map(text);
        let counts = text(allocations[0]);
        println!(
            "| {} | {first} | {one} | {three} | {counts} |",
            subject.name
        );
        rows.push(json!({
            "name": subject.name,
            "nanoseconds": times,
            "allocations": allocations,
        }));
    }
    results::save("overhead", &json!(rows));
}
