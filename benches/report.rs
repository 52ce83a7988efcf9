//! Writes the figures of the other benches into benches/README.md as tables, and beside it as a
//! plot.
//!
//! Without `--write` the tables are only printed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "support/plot.rs"]
mod plot;
#[path = "support/results.rs"]
#[allow(dead_code)]
mod results;

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const BEGIN: &str = "<!-- benches: begin -->";
const END: &str = "<!-- benches: end -->";

fn main() {
    if !results::is_asked_for() {
        return;
    }
    let overhead = load("overhead");
    let loopback = load("loopback");
    let server = load("server");
    let mut text = String::new();
    writeln!(text, "{}\n", machine()).unwrap();
    calls(&mut text, &overhead);
    end_to_end(&mut text, &loopback);
    decisions(&mut text, &server);
    println!("{text}");
    if !std::env::args().any(|argument| argument == "--write") {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = root.join("benches/README.md");
    let before = fs::read_to_string(&readme).unwrap();
    let (head, rest) = before
        .split_once(BEGIN)
        .expect("benches/README.md has no markers");
    let (_, tail) = rest
        .split_once(END)
        .expect("benches/README.md has no end marker");
    let plot = "![What a call costs beyond the bare one](plot.svg)";
    let after = format!("{head}{BEGIN}\n{text}\n{plot}\n{END}{tail}");
    fs::write(readme, after).unwrap();
    fs::write(root.join("benches/plot.svg"), plot::of(&bars(&overhead))).unwrap();
}

/// Loads the results of a bench. The list is empty if the bench was not run.
fn load(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(results::folder().join(format!("{name}.json")));
    text.map_or_else(|_| Vec::new(), |text| serde_json::from_str(&text).unwrap())
}

fn row<'a>(rows: &'a [Value], name: &str) -> Option<&'a Value> {
    rows.iter().find(|row| row["name"] == name)
}

/// The median time of a stack's calls, in nanoseconds. Columns 0, 1 and 2 are calls that first fail
/// zero, one and three times.
fn nanoseconds(rows: &[Value], name: &str, column: usize) -> Option<f64> {
    row(rows, name)?["nanoseconds"][column].as_f64()
}

/// The call that a stack is compared with.
fn bare_of(name: &str) -> &'static str {
    if name.starts_with("reqwest") {
        "reqwest-middleware, bare"
    } else {
        "bare"
    }
}

/// What a stack adds to the bare call, in nanoseconds and allocations.
fn beyond(rows: &[Value], name: &str) -> Option<(f64, f64)> {
    let bare = bare_of(name);
    let time = nanoseconds(rows, name, 0)? - nanoseconds(rows, bare, 0)?;
    let count = |name| row(rows, name)?["allocations"][0].as_f64();
    Some((time, count(name)? - count(bare)?))
}

/// What a stack adds to the instructions of the bare call, if it was counted.
fn instructions_beyond(name: &str) -> Option<f64> {
    Some(instructions(name)? - instructions("bare")?)
}

fn instructions(name: &str) -> Option<f64> {
    let id = match name {
        "bare" => "bare",
        FLOOR => "floor",
        "AegisLayer" => "aegis_layer",
        "RetryLayer" => "retry_layer",
        "tower::retry" => "tower_retry",
        "tower-http headers + tower::retry" => "tower_http_and_tower_retry",
        _ => return None,
    };
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?;
    let summary = target
        .join("gungraun/aegis-hitl/instructions/counted/calls")
        .join(format!("first_try.{id}"))
        .join("summary.json");
    let summary: Value = serde_json::from_str(&fs::read_to_string(summary).ok()?).ok()?;
    summary["profiles"][0]["data"]["parts"][0]["metrics"]["Ir"]["values"]["new"].as_f64()
}

const FLOOR: &str = "floor: four headers";

fn bars(rows: &[Value]) -> Vec<plot::Bar> {
    let names = rows.iter().filter_map(|row| row["name"].as_str());
    names
        .filter(|name| *name != bare_of(name))
        .filter_map(|name| {
            let (time, allocations) = beyond(rows, name)?;
            Some(plot::Bar {
                label: name.to_owned(),
                value: time,
                note: format!("{time:.0} ns, {allocations:.0} allocations"),
                ours: name.ends_with("Layer"),
            })
        })
        .collect()
}

fn calls(text: &mut String, rows: &[Value]) {
    let Some((floor, _)) = beyond(rows, FLOOR) else {
        return;
    };
    writeln!(
        text,
        "**Per call**, beyond the same call without layers, over a service that answers at once:\n"
    )
    .unwrap();
    writeln!(
        text,
        "| stack | ns | of the floor | instructions | allocations | one retry adds, ns | in first calls | three add, ns |"
    )
    .unwrap();
    writeln!(
        text,
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    .unwrap();
    for name in rows.iter().filter_map(|row| row["name"].as_str()) {
        if name == bare_of(name) {
            continue;
        }
        let Some((time, allocations)) = beyond(rows, name) else {
            continue;
        };
        // Retries are compared with a whole call, including the bare one, because they repeat that,
        // too.
        let first = nanoseconds(rows, name, 0).unwrap_or(f64::NAN);
        let added = |column| nanoseconds(rows, name, column).map(|all| all - first);
        let cell = |value: Option<f64>, digits: usize| {
            value.map_or(String::from("–"), |value| format!("{value:.digits$}"))
        };
        writeln!(
            text,
            "| {name} | {time:.0} | {:.2} | {} | {allocations:.0} | {} | {} | {} |",
            time / floor,
            cell(instructions_beyond(name), 0),
            cell(added(1), 0),
            cell(added(1).map(|added| added / first), 2),
            cell(added(2), 0),
        )
        .unwrap();
    }
    writeln!(text).unwrap();
}

/// Writes one row per measured load, with its share of a base rate.
fn rates(
    text: &mut String,
    rows: &[Value],
    label: impl Fn(&Value) -> String,
    base: impl Fn(&Value) -> Option<f64>,
    more: impl Fn(&Value) -> String,
) {
    for row in rows {
        let summary = &row["summary"];
        let figure = |name: &str| summary[name].as_f64().unwrap_or(f64::NAN);
        let share = base(row).map_or(String::from("–"), |base| {
            format!("{:.0} %", 100.0 * figure("rate") / base)
        });
        writeln!(
            text,
            "| {} | {:.0} | {share} | {:.0} | {:.0} |{}",
            label(row),
            figure("rate"),
            figure("p50"),
            figure("p99"),
            more(row)
        )
        .unwrap();
    }
    writeln!(text).unwrap();
}

fn end_to_end(text: &mut String, rows: &[Value]) {
    if rows.is_empty() {
        return;
    }
    writeln!(
        text,
        "**End to end**, over kept connections on loopback, client and server on one core each:\n"
    )
    .unwrap();
    writeln!(text, "| client | calls/s | share | p50, µs | p99, µs |").unwrap();
    writeln!(text, "| --- | ---: | ---: | ---: | ---: |").unwrap();
    let rate_of = |name: &str, concurrency: &Value| {
        let same = |row: &&Value| row["name"] == name && row["concurrency"] == *concurrency;
        rows.iter().find(same)?["summary"]["rate"].as_f64()
    };
    rates(
        text,
        rows,
        |row| {
            format!(
                "{}, {} at once",
                row["name"].as_str().unwrap(),
                row["concurrency"]
            )
        },
        |row| rate_of("hyper-util, constant headers", &row["concurrency"]),
        |_| String::new(),
    );
}

fn decisions(text: &mut String, rows: &[Value]) {
    if rows.is_empty() {
        return;
    }
    writeln!(
        text,
        "**The server**, with a load generator of one thread beside it on the same machine:\n"
    )
    .unwrap();
    writeln!(text, "| store and load | decisions/s | share | p50, µs | p99, µs | memory, MiB | disk, bytes an action |").unwrap();
    writeln!(text, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |").unwrap();
    let limit = |row: &Value| {
        let same = |other: &&Value| {
            other["name"] == "in-memory store"
                && other["connections"] == row["connections"]
                && other["repeated"] == row["repeated"]
        };
        rows.iter().find(same)?["summary"]["rate"].as_f64()
    };
    let label = |row: &Value| {
        let keys = if row["repeated"] == true {
            ", duplicates only"
        } else {
            ""
        };
        format!(
            "{}, {} connections{keys}",
            row["name"].as_str().unwrap(),
            row["connections"]
        )
    };
    let more = |row: &Value| {
        let cell = |name: &str, unit: f64| {
            row[name]
                .as_f64()
                .map_or(String::from("–"), |value| format!("{:.0}", value / unit))
        };
        format!(
            " {} | {} |",
            cell("resident", 1024.0 * 1024.0),
            cell("disk", 1.0)
        )
    };
    rates(text, rows, label, limit, more);
}

/// The machine, the toolchain and the date of the figures.
fn machine() -> String {
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok();
        output.map_or(String::from("unknown"), |output| {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        })
    };
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown CPU", |rest| {
        rest.trim_start_matches([' ', '\t', ':'])
    });
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{model}, {cores} cores, Linux {}, {}, {}. Medians over interleaved rounds; `bash benches/run` makes this table.",
        run("uname", &["-r"]),
        run("rustc", &["--version"]),
        run("date", &["-u", "+%Y-%m-%d"]),
    )
}
