//! The `aegis` binary as a process, and the embedded store in processes that are killed.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used
)]

#[cfg(unix)]
mod adversary;
mod audit;
mod binary;
#[path = "../support/mod.rs"]
mod support;

mod commands;
mod crash;
mod crash_loop;
#[cfg(unix)]
mod full_disk;
mod hook;
#[cfg(unix)]
mod hook_attacks;
mod human_loop;
#[cfg(unix)]
mod least_role;
#[cfg(unix)]
mod limits;
#[cfg(unix)]
mod manual;
mod metrics;
#[cfg(unix)]
mod migrate;
mod openapi;
#[cfg(unix)]
mod operating;
#[cfg(unix)]
mod postgres;
mod python;
mod python_loop;
mod python_sdk;
#[cfg(unix)]
mod reload;
mod retention;
#[cfg(unix)]
mod several_servers;
#[cfg(target_os = "linux")]
mod store_process;
#[cfg(unix)]
mod tls;
#[cfg(unix)]
mod unix_socket;
#[cfg(unix)]
mod webhooks;
