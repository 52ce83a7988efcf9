//! The number of file descriptors available for connections.

/// Reserved for the store, its journals, the log and the runtime. The store must always be able to
/// open its files.
const RESERVE: u64 = 128;

/// The minimum number of connections of a useful server.
const LEAST: u64 = 16;

/// The number of files that the process must be allowed to open.
pub(crate) const NEEDED: u64 = RESERVE + LEAST;

/// Returns the number of connections that the limit of open files allows, or the limit itself as an
/// error if it is too low.
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
