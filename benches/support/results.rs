//! The results of a bench, kept in the build folder for the report.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

pub(crate) fn folder() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench");
    fs::create_dir_all(&folder).unwrap();
    folder
}

pub(crate) fn save(name: &str, results: &Value) {
    let text = serde_json::to_string_pretty(results).unwrap();
    fs::write(folder().join(format!("{name}.json")), text).unwrap();
}

/// Whether the bench was requested. `cargo test` runs benches without this argument, and they do
/// nothing.
pub(crate) fn is_asked_for() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}
