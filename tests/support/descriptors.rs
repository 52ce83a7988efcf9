//! The file descriptors that a test of many connections needs.

/// Raises this process's limit of open files to `needed` as far as it may, and returns the limit.
#[cfg(unix)]
pub fn raise_to(needed: u64) -> u64 {
    use rustix::process::{Resource, getrlimit, setrlimit};

    let mut limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    if current >= needed {
        return current;
    }
    let allowed = needed.min(limit.maximum.unwrap_or(u64::MAX));
    limit.current = Some(allowed);
    match setrlimit(Resource::Nofile, limit) {
        Ok(()) => allowed,
        Err(_) => current,
    }
}

#[cfg(not(unix))]
pub fn raise_to(needed: u64) -> u64 {
    needed
}
