//! What tests share: peers that serve, clients that ask, stores, processes, and the log.

// Each binary, and each set of features, takes what it needs.
#![allow(dead_code, unused_imports)]

pub mod again;
mod call;
pub mod descriptors;
#[cfg(feature = "server")]
mod disk;
#[cfg(feature = "server")]
mod faulty;
#[cfg(feature = "server")]
mod forward;
pub mod h2;
mod log;
pub mod manual;
#[cfg(all(feature = "postgres", unix))]
pub mod postgres;
pub mod process;
pub mod random;
pub mod raw;
#[cfg(feature = "server")]
pub mod receiver;
#[cfg(feature = "server")]
pub mod reference;
pub mod rows;
#[cfg(feature = "server")]
mod server;
#[cfg(all(feature = "client", feature = "test-util"))]
pub mod service;
pub mod tls;

use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};

pub use self::call::{Call, Reply, raw, raw_until_closed, read_until};
#[cfg(feature = "server")]
pub use self::disk::Disk;
#[cfg(feature = "server")]
pub use self::faulty::{Faulty, Mood};
#[cfg(feature = "server")]
pub(crate) use self::forward::{forward_deliveries, forward_the_human_loop};
pub use self::log::Log;
#[cfg(feature = "server")]
pub use self::server::{Running, start, start_with};

/// Far beyond what any step takes; only a hang gets here.
pub const HANG: Duration = Duration::from_secs(60);

/// A wait that ends what would never end by itself. Nothing here is asserted to be faster.
pub const SHORT: Duration = Duration::from_millis(200);

static ALONE: Mutex<()> = Mutex::const_new(());

/// Keeps tests apart that load the machine, or that measure time by its clock.
pub async fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().await
}

/// [`alone`] outside of a runtime.
pub fn alone_blocking() -> MutexGuard<'static, ()> {
    ALONE.blocking_lock()
}

/// Waits for what must end.
pub async fn ends<F: Future>(what: F) -> F::Output {
    let ended = tokio::time::timeout(HANG, what).await;
    ended.expect("it hangs")
}
