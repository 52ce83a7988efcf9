//! Measures the PostgreSQL store: how many actions it records a second, against what the database
//! does with bare inserts, and against itself without shared transactions; one server against two;
//! and an empty database against a full one (`--millions 10`). `--only store`, `--only servers` or
//! `--only full` makes one of the tables.
//!
//! It starts a PostgreSQL of the system in a temporary folder, with fsync. All contenders of one
//! table take turns.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "support/asked.rs"]
mod asked;
#[path = "support/child.rs"]
mod child;
#[path = "support/latency.rs"]
#[allow(dead_code, reason = "only rates are compared")]
mod latency;
#[path = "support/load.rs"]
#[allow(dead_code, reason = "here every key is new")]
mod load;
#[path = "../tests/support/postgres.rs"]
#[allow(dead_code, unreachable_pub, reason = "the tests use more of it")]
mod postgres;
#[path = "support/results.rs"]
mod results;

use std::time::{Duration, Instant, SystemTime};

use aegis_hitl::server::{HitlService, Server};
use aegis_hitl::store::{Decided, PostgresStore, Store};
use serde_json::json;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use asked::asked;
use child::Peer;
use latency::Sample;
use load::Keys;
use postgres::Postgres;

const ROUNDS: usize = 7;
const EACH: Duration = Duration::from_secs(4);
const WARM_UP: Duration = Duration::from_millis(500);
const SUBMITTERS: usize = 64;

/// The transactions that the store has open at once for new actions, and as many for the bare
/// inserts: each has half of the submitters' actions.
const LANES: usize = 2;

/// Settings of a server that somebody runs on purpose. Without them checkpoints are what is measured.
const SETTINGS: [&str; 3] = [
    "shared_buffers = 1GB",
    "max_wal_size = 8GB",
    "checkpoint_timeout = 30min",
];

/// Decisions a second of 64 tasks, each on new actions, one after the other.
async fn decide(store: &PostgresStore, time: Duration) -> f64 {
    let begun = Instant::now();
    let tasks: Vec<_> = (0..SUBMITTERS as i64)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut count = 0_usize;
                while begun.elapsed() < time {
                    let decided = store.decide(asked(task)).await.unwrap();
                    assert!(matches!(decided, Decided::Recorded(_)));
                    count += 1;
                }
                count
            })
        })
        .collect();
    let mut count = 0;
    for task in tasks {
        count += task.await.unwrap();
    }
    count as f64 / begun.elapsed().as_secs_f64()
}

/// Rows a second of bare inserts by `unnest` into the store's own tables: as many at once as the store
/// would send, one row for the action and one for its event, and a commit. Nothing is checked.
async fn insert(url: &str, time: Duration) -> f64 {
    let begun = Instant::now();
    let lanes: Vec<_> = (0..LANES)
        .map(|_| {
            let url = url.to_owned();
            tokio::spawn(async move {
                let client = postgres::connect(&url).await;
                let action = client
                    .prepare_typed(
                        "INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, \
                         digest, payload, decided_by, call_id, created_at, decided_at, events) \
                         SELECT 'acme', id, thread, key, 'COMMITTED', 'approve', $4, $5, 'acme', call, $6, $6, 1 \
                         FROM unnest($1::uuid[], $2::text[], $3::text[], $7::text[]) AS n (id, thread, key, call)",
                        &[
                            Type::UUID_ARRAY,
                            Type::TEXT_ARRAY,
                            Type::TEXT_ARRAY,
                            Type::BYTEA,
                            Type::TEXT,
                            Type::TIMESTAMPTZ,
                            Type::TEXT_ARRAY,
                        ],
                    )
                    .await
                    .unwrap();
                let event = client
                    .prepare_typed(
                        "INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, \
                         decision, call_id, epoch) \
                         SELECT 'acme', id, 1, $3, event, 'acme', 'approved', 'COMMITTED', 'approve', call, 1 \
                         FROM unnest($1::uuid[], $2::uuid[], $4::text[]) AS n (id, event, call)",
                        &[
                            Type::UUID_ARRAY,
                            Type::UUID_ARRAY,
                            Type::TIMESTAMPTZ,
                            Type::TEXT_ARRAY,
                        ],
                    )
                    .await
                    .unwrap();
                let body = std::str::from_utf8(load::BODY).unwrap();
                let digest = vec![7_u8; 32];
                let mut count = 0_usize;
                while begun.elapsed() < time {
                    let rows = SUBMITTERS / LANES;
                    let ids: Vec<_> = (0..rows).map(|_| Uuid::now_v7()).collect();
                    let events: Vec<_> = (0..rows).map(|_| Uuid::now_v7()).collect();
                    let threads: Vec<_> = (0..rows).map(|row| format!("run-{row:04}")).collect();
                    let keys: Vec<_> = (0..rows).map(|_| Uuid::new_v4().to_string()).collect();
                    let calls: Vec<_> = (0..rows).map(|_| Uuid::now_v7().to_string()).collect();
                    let now = SystemTime::now();
                    let acted: &[&(dyn ToSql + Sync)] =
                        &[&ids, &threads, &keys, &digest, &body, &now, &calls];
                    let said: &[&(dyn ToSql + Sync)] = &[&ids, &events, &now, &calls];
                    // Sent together, as the store sends them.
                    let (begun, actions, appended, committed) = tokio::join!(
                        biased;
                        client.batch_execute("BEGIN"),
                        client.execute(&action, acted),
                        client.execute(&event, said),
                        client.batch_execute("COMMIT"),
                    );
                    begun.unwrap();
                    assert_eq!(actions.unwrap(), rows as u64);
                    assert_eq!(appended.unwrap(), rows as u64);
                    committed.unwrap();
                    count += rows;
                }
                count
            })
        })
        .collect();
    let mut count = 0;
    for lane in lanes {
        count += lane.await.unwrap();
    }
    count as f64 / begun.elapsed().as_secs_f64()
}

async fn store(url: &str, batching: bool) -> PostgresStore {
    let builder = PostgresStore::builder(url).batching(batching);
    builder.connect().await.unwrap()
}

/// The store against bare inserts, and against itself without batches.
async fn store_alone(postgres: &Postgres) -> serde_json::Value {
    let urls = [
        postgres.database().await,
        postgres.database().await,
        postgres.database().await,
    ];
    let batched = store(&urls[0], true).await;
    let single = store(&urls[1], false).await;
    // It makes the tables.
    store(&urls[2], true).await.close().await;
    let mut rates = [Vec::new(), Vec::new(), Vec::new()];
    decide(&batched, WARM_UP).await;
    decide(&single, WARM_UP).await;
    insert(&urls[2], WARM_UP).await;
    for _ in 0..ROUNDS {
        rates[0].push(insert(&urls[2], EACH).await);
        rates[1].push(decide(&batched, EACH).await);
        rates[2].push(decide(&single, EACH).await);
    }
    batched.close().await;
    single.close().await;
    let [bare, batched, single] = rates.map(|mut rates| results::median(&mut rates));
    println!("| store, 64 submitters | actions/s | of bare inserts |");
    println!("| --- | ---: | ---: |");
    for (name, rate) in [
        ("bare `unnest` inserts", bare),
        ("the store", batched),
        ("the store without batches", single),
    ] {
        println!("| {name} | {rate:.0} | {:.2} |", rate / bare);
    }
    println!("With batches {:.2} times as many.\n", batched / single);
    json!({ "bare": bare, "batched": batched, "single": single })
}

fn run_server(url: &str) {
    // As many threads as in the `aegis` binary.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = store(url, true).await;
        let server = Server::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let service = HitlService::new(store.clone());
        let ended = server
            .serve(service, child::announce(address))
            .await
            .unwrap();
        assert!(ended.is_drained());
        store.close().await;
    });
}

async fn load_all(peers: &[Peer], time: Duration) -> f64 {
    let loads: Vec<_> = peers
        .iter()
        .map(|peer| {
            let (address, connections) = (peer.address, SUBMITTERS / peers.len());
            tokio::spawn(load::run(address, connections, Keys::New, time))
        })
        .collect();
    let mut rate = 0.0;
    for load in loads {
        let sample: Sample = load.await.unwrap();
        rate += sample.rate;
    }
    rate
}

/// One server with 64 connections against two with 32 each, over HTTP.
async fn one_and_two(postgres: &Postgres) -> serde_json::Value {
    let urls = [postgres.database().await, postgres.database().await];
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        let mut turn = [0, 1];
        turn.rotate_left(round % 2);
        for which in turn {
            let peers: Vec<_> = (0..=which).map(|_| Peer::spawn(&[&urls[which]])).collect();
            load_all(&peers, WARM_UP).await;
            rates[which].push(load_all(&peers, EACH).await);
            peers.into_iter().for_each(Peer::stop);
        }
    }
    let [one, two] = rates.map(|mut rates| results::median(&mut rates));
    println!("| servers on one database, 64 connections | decisions/s |");
    println!("| --- | ---: |");
    println!("| one | {one:.0} |");
    println!("| two | {two:.0} |");
    println!("Two decide {:.2} of one.\n", two / one);
    json!({ "one": one, "two": two })
}

/// Writes actions that were decided, with their events, as the store would have.
async fn fill(url: &str, millions: i64) {
    let client = postgres::connect(url).await;
    for million in 0..millions {
        let statement = format!(
            "SET synchronous_commit = off; \
             WITH made AS (SELECT n, \
               (lpad(to_hex(1700000000000 + n), 12, '0') || '7' || substr(md5('i' || n), 1, 3) || '8' \
                || substr(md5('i' || n), 4, 15))::uuid AS id \
               FROM generate_series({} + 1, {}) AS n), \
             acted AS (INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, digest, \
               payload, decided_by, call_id, created_at, decided_at, events) \
               SELECT 'acme', id, 'run-' || lpad((n % 1024)::text, 4, '0'), md5('k' || n)::uuid::text, 'COMMITTED', \
               'approve', sha256(n::text::bytea), '{}', 'acme', md5('c' || n)::uuid::text, now(), now(), 1 FROM made) \
             INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, decision, call_id, \
               epoch) \
               SELECT 'acme', id, 1, now(), md5('e' || n)::uuid, 'acme', 'approved', 'COMMITTED', 'approve', \
               md5('c' || n)::uuid::text, 1 FROM made",
            million * 1_000_000,
            (million + 1) * 1_000_000,
            std::str::from_utf8(load::BODY).unwrap(),
        );
        client.batch_execute(&statement).await.unwrap();
    }
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        client.batch_execute(statement).await.unwrap();
    }
}

/// An empty database against one that holds many actions.
async fn empty_and_full(postgres: &Postgres, millions: i64) -> serde_json::Value {
    let urls = [postgres.database().await, postgres.database().await];
    store(&urls[1], true).await.close().await;
    println!("filling up to {millions} million actions");
    fill(&urls[1], millions).await;
    // The first of them publishes what was filled in.
    let stores = [store(&urls[0], true).await, store(&urls[1], true).await];
    stores[1].newest_event().await.unwrap();
    let mut rates = [Vec::new(), Vec::new()];
    for store in &stores {
        decide(store, WARM_UP).await;
    }
    for round in 0..ROUNDS {
        let mut turn = [0, 1];
        turn.rotate_left(round % 2);
        for which in turn {
            rates[which].push(decide(&stores[which], EACH).await);
        }
    }
    for store in &stores {
        store.close().await;
    }
    let [empty, full] = rates.map(|mut rates| results::median(&mut rates));
    println!("| database, 64 submitters | actions/s |");
    println!("| --- | ---: |");
    println!("| empty | {empty:.0} |");
    println!("| {millions} million actions | {full:.0} |");
    println!("The full one takes {:.2} of the empty one.\n", full / empty);
    json!({ "millions": millions, "empty": empty, "full": full })
}

/// How unevenly a million tenants load a hundred databases, if each tenant is on the one that a hash
/// of its name says: the load of the busiest database, and of the tenant that is the busiest of all,
/// in shares of the mean of the databases. This is arithmetic and measures nothing.
fn shards() -> serde_json::Value {
    const TENANTS: u64 = 1_000_000;
    const SHARDS: u64 = 100;
    println!("| a million tenants on 100 databases | busiest database | busiest tenant |");
    println!("| --- | ---: | ---: |");
    let mut rows = Vec::new();
    for (name, exponent) in [
        ("all alike", 0.0),
        ("Zipf, exponent 0.8", 0.8),
        ("Zipf, exponent 1", 1.0),
    ] {
        let mut loads = vec![0.0; SHARDS as usize];
        let mut first: f64 = 0.0;
        for tenant in 1..=TENANTS {
            let load = (tenant as f64).powf(-exponent);
            loads[(mixed(tenant) % SHARDS) as usize] += load;
            first = first.max(load);
        }
        let mean = loads.iter().sum::<f64>() / SHARDS as f64;
        let busiest = loads.iter().copied().fold(0.0, f64::max);
        println!("| {name} | {:.2} | {:.2} |", busiest / mean, first / mean);
        rows.push(json!({ "name": name, "busiest": busiest / mean, "tenant": first / mean }));
    }
    println!();
    json!(rows)
}

/// SplitMix64, as a hash.
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The value of an option.
fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

/// Whether a table was asked for. Without `--only` and one of their names, all are.
fn is_wanted(table: &str) -> bool {
    option("--only").is_none_or(|only| only == table)
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if let Some(at) = arguments
        .iter()
        .position(|argument| argument == child::SERVE)
    {
        return run_server(&arguments[at + 1]);
    }
    if !results::is_asked_for() {
        return;
    }
    let mut all = json!({});
    if is_wanted("shards") {
        all["shards"] = shards();
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let postgres = Postgres::start(&SETTINGS);
        if is_wanted("store") {
            all["store"] = store_alone(&postgres).await;
        }
        if is_wanted("servers") {
            all["servers"] = one_and_two(&postgres).await;
        }
        if let Some(millions) = option("--millions").filter(|_| is_wanted("full")) {
            all["full"] = empty_and_full(&postgres, millions.parse().unwrap()).await;
        }
        results::save("postgres", &all);
    });
}
