//! The crate from outside, in this process. What runs the `aegis` binary is in `tests/cli`.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used
)]

#[path = "../support/mod.rs"]
mod support;

#[cfg(all(
    feature = "client",
    feature = "tls",
    feature = "reqwest",
    feature = "test-util"
))]
mod adversary;
mod architecture;
#[cfg(all(feature = "server", feature = "test-util"))]
mod audit;
#[cfg(all(feature = "client", feature = "server"))]
mod bad_input;
#[cfg(all(feature = "server", unix))]
mod browser;
#[cfg(all(feature = "server", feature = "test-util"))]
mod capacity;
#[cfg(all(feature = "client", feature = "test-util"))]
mod client;
#[cfg(all(feature = "client", feature = "test-util"))]
mod client_loop;
#[cfg(all(feature = "client", feature = "reqwest", feature = "test-util"))]
mod clients;
#[cfg(all(feature = "client", feature = "server"))]
mod concurrency;
#[cfg(all(feature = "client", feature = "test-util"))]
mod connections;
#[cfg(all(feature = "client", feature = "server"))]
mod decision_table;
#[cfg(all(feature = "client", feature = "test-util", feature = "tracing"))]
mod events;
#[cfg(all(feature = "server", feature = "test-util"))]
mod followers;
#[cfg(all(feature = "client", feature = "server"))]
mod hosts;
#[cfg(all(feature = "tls", feature = "test-util"))]
mod https;
#[cfg(all(feature = "client", feature = "server"))]
mod human_loop;
#[cfg(all(feature = "client", feature = "server"))]
mod human_loop_attacks;
#[cfg(feature = "server")]
mod inbox;
#[cfg(feature = "server")]
mod inbox_forms;
#[cfg(all(feature = "server", feature = "test-util"))]
mod inbox_pages;
#[cfg(all(feature = "client", feature = "test-util"))]
mod layers;
mod manual;
#[cfg(all(feature = "server", feature = "test-util"))]
mod metrics;
#[cfg(all(feature = "server", feature = "test-util"))]
mod model;
#[cfg(all(feature = "client", feature = "test-util"))]
mod never_sent;
#[cfg(all(feature = "server", feature = "test-util"))]
mod outbox;
#[cfg(all(feature = "postgres", feature = "test-util", unix))]
mod postgres;
#[cfg(feature = "server")]
mod rates;
#[cfg(all(feature = "client", feature = "server", feature = "test-util"))]
mod retention;
#[cfg(feature = "server")]
mod shutdown;
#[cfg(all(feature = "client", feature = "server", feature = "test-util"))]
mod simulation;
mod stacks;
#[cfg(all(feature = "client", feature = "server"))]
mod status;
#[cfg(all(feature = "server", feature = "test-util"))]
mod store;
#[cfg(all(feature = "server", feature = "tls", feature = "test-util"))]
mod tls;
#[cfg(all(feature = "client", feature = "test-util"))]
mod verify;
#[cfg(all(feature = "client", feature = "server", feature = "test-util"))]
mod waiting;
