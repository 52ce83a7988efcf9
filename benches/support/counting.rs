//! Counts this thread's allocations.

/// Runs `work`, and returns how many allocations and reallocations it makes on this thread.
pub(crate) fn allocations<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let mut done = None;
    let counted = allocation_counter::measure(|| done = Some(work()));
    (counted.count_total, done.expect("the work is done"))
}
