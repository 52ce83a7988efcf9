//! Counts this thread's allocations.

/// How many allocations and reallocations `work` makes on this thread.
pub(crate) fn allocations<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let mut done = None;
    let counted = allocation_counter::measure(|| done = Some(work()));
    (counted.count_total, done.expect("the work is done"))
}
