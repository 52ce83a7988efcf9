//! The rate and latencies of one measurement, and their medians over several.

use std::time::Duration;

use super::results::median;

/// One measurement: requests per second, and microseconds.
pub(crate) struct Sample {
    pub(crate) rate: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Sample {
    /// Makes a sample from the latency of each answer, in nanoseconds.
    pub(crate) fn of(mut nanoseconds: Vec<u32>, took: Duration) -> Self {
        nanoseconds.sort_unstable();
        let at = |share: f64| {
            let last = nanoseconds.len().saturating_sub(1);
            let index = (last as f64 * share) as usize;
            f64::from(nanoseconds.get(index).copied().unwrap_or(0)) / 1000.0
        };
        Self {
            rate: nanoseconds.len() as f64 / took.as_secs_f64(),
            p50: at(0.5),
            p99: at(0.99),
        }
    }
}

/// Medians over all rounds: requests per second, and microseconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Summary {
    pub(crate) rate: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Summary {
    pub(crate) fn of(samples: &[Sample]) -> Self {
        let over = |figure: fn(&Sample) -> f64| {
            median(&mut samples.iter().map(figure).collect::<Vec<_>>())
        };
        Self {
            rate: over(|sample| sample.rate),
            p50: over(|sample| sample.p50),
            p99: over(|sample| sample.p99),
        }
    }
}
