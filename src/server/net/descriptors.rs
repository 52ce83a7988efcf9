//! How many file descriptors there are for connections.

/// Kept for the store, its journals, the log and the runtime: without one, the next open of the store fails.
const RESERVE: u64 = 128;

/// Fewer connections than this are no server.
const LEAST: u64 = 16;

/// The number of open files that a process must be allowed.
pub(crate) const NEEDED: u64 = RESERVE + LEAST;

/// Returns how many connections the limit of open files has room for, or the limit, if it is too low.
pub(crate) fn for_connections() -> Result<usize, u64> {
    match limit() {
        Some(limit) if limit < NEEDED => Err(limit),
        Some(limit) => Ok(usize::try_from(limit - RESERVE).unwrap_or(usize::MAX)),
        None => Ok(usize::MAX),
    }
}

#[cfg(unix)]
fn limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
}

#[cfg(not(unix))]
fn limit() -> Option<u64> {
    None
}
