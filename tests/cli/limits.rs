//! The limits of open files and of connections under which `aegis serve` runs.

use std::process::Command;
use std::time::Duration;

use tokio::time::timeout;

use crate::binary::{self, Served};
use crate::support::h2::H2;
use crate::support::{Call, HANG, alone};

/// `aegis serve` under these limits of open files: `-n` is both, `-S -n` the soft one.
fn limited(limit: &str, store: &std::path::Path) -> Command {
    let serve = binary::serve(store);
    let mut limited = Command::new("sh");
    limited.args(["-c", &format!("ulimit {limit}; exec \"$0\" \"$@\"")]);
    limited.arg(serve.get_program()).args(serve.get_args());
    for (name, _) in serve.get_envs() {
        limited.env_remove(name);
    }
    limited
}

#[tokio::test]
async fn the_number_of_connections_is_set_by_flag_environment_and_file() {
    let folder = tempfile::TempDir::new().unwrap();
    let config = folder.path().join("aegis.toml");
    let settings = "[serve]\nmax-connections = 9\nmax-connections-per-peer = 1\n";
    std::fs::write(&config, settings).unwrap();
    let store = folder.path().join("aegis.db");
    for arguments in [&["--max-connections", "1"][..], &[]] {
        let mut serve = binary::serve(&store);
        serve.args(arguments);
        if arguments.is_empty() {
            serve.env("AEGIS_CONFIG", &config);
        }
        let served = Served::start(serve);
        let mut first = H2::kept(served.addr).await;
        H2::kept(served.addr).await;
        first.until_closed(HANG).await;
    }
    let mut serve = binary::serve(&store);
    serve.env("AEGIS_MAX_CONNECTIONS", "0");
    let ended = binary::run(serve).expect(2);
    assert!(ended.stderr.contains("--max-connections"));
}

#[tokio::test]
async fn rates_are_set_by_flag_environment_and_file() {
    let folder = tempfile::TempDir::new().unwrap();
    let config = folder.path().join("aegis.toml");
    let settings = "[serve]\nmax-rate-per-tenant = \"1/h\"\n";
    std::fs::write(&config, settings).unwrap();
    let store = folder.path().join("aegis.db");
    for set in [
        (Some("--max-rate-per-peer"), "AEGIS_LOG", "info"),
        (None, "AEGIS_MAX_RATE_PER_TENANT", "1/h"),
        (None, "AEGIS_CONFIG", config.to_str().unwrap()),
    ] {
        let (flag, variable, value) = set;
        let mut serve = binary::serve(&store);
        if let Some(flag) = flag {
            serve.args([flag, "1/h"]);
        }
        let served = Served::start({
            serve.env(variable, value);
            serve
        });
        let call = || Call::post(served.addr, "reject", "k").send();
        assert!([202, 409].contains(&call().await.status));
        assert_eq!(call().await.status, 429, "{set:?}");
    }
    for bad in ["0/s", "ten", "5/d"] {
        let mut serve = binary::serve(&store);
        serve.args(["--max-rate-per-peer", bad]);
        let ended = binary::run(serve).expect(2);
        assert!(ended.stderr.contains("such as 100/s"), "{}", ended.stderr);
    }
    std::fs::write(&config, "[serve]\nmax-rate-per-peer = \"5/d\"\n").unwrap();
    let mut serve = binary::serve(&store);
    serve.env("AEGIS_CONFIG", &config);
    let ended = binary::run(serve).expect(2);
    assert!(ended.stderr.contains("line 2") && ended.stderr.contains("such as 100/s"));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn idle_connections_leave_the_store_its_descriptors() {
    let folder = tempfile::TempDir::new().unwrap();
    let _alone = alone().await;
    let served = Served::start(limited("-n 200", &folder.path().join("aegis.db")));
    let mut clients = Vec::new();
    for _ in 0..250 {
        clients.push(H2::kept(served.addr).await);
    }
    let call = Call::post(served.addr, "approve", "k");
    assert_eq!(call.send().await.status, 202);
    let ready = Call::new(served.addr, "GET", "/readyz").send().await;
    assert_eq!(ready.status, 200);
    let log = served.stderr();
    assert!(!log.contains("cannot accept"), "{log}");
    // However many had to go: one line.
    let lines = log.lines().filter(|line| line.contains("WARN"));
    assert_eq!(lines.count(), 1, "{log}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_limit_of_open_files_is_raised_as_far_as_it_may() {
    let folder = tempfile::TempDir::new().unwrap();
    let limit = "-n 2000; ulimit -S -n 200";
    let served = Served::start(limited(limit, &folder.path().join("aegis.db")));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", served.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let numbers: Vec<_> = line.unwrap().split_whitespace().skip(3).collect();
    assert_eq!(numbers, ["2000", "2000", "files"]);
}

#[test]
fn a_limit_of_open_files_that_is_too_low_is_named_at_the_start() {
    let folder = tempfile::TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    let Err(ended) = Served::try_start(limited("-n 100", &store)) else {
        panic!("it serves");
    };
    let ended = ended.expect(1);
    for what in ["100", "144", "ulimit -n"] {
        assert!(ended.stderr.contains(what), "{}", ended.stderr);
    }
    assert!(!store.exists());
}

/// Changes the soft limit of open files of a process that runs.
#[cfg(target_os = "linux")]
fn set_limit(pid: u32, limit: u32) {
    let arguments = [format!("--pid={pid}"), format!("--nofile={limit}:")];
    assert!(
        Command::new("prlimit")
            .args(arguments)
            .status()
            .unwrap()
            .success()
    );
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_server_without_descriptors_says_so_once_and_goes_on() {
    let folder = tempfile::TempDir::new().unwrap();
    let served = Served::start(limited("-n 400", &folder.path().join("aegis.db")));
    // It says that it listens just before it looks at the limit for the last time.
    let call = Call::new(served.addr, "GET", "/livez").send();
    assert_eq!(timeout(HANG, call).await.unwrap().status, 200);
    set_limit(served.pid(), 5);
    let call = tokio::spawn(Call::new(served.addr, "GET", "/livez").send());
    let (served, line) = tokio::task::spawn_blocking(move || {
        let line = served.line("cannot accept connections");
        (served, line)
    })
    .await
    .unwrap();
    assert!(line.is_some_and(|line| line.contains("WARN")));
    // Time for many further failures.
    tokio::time::sleep(Duration::from_secs(1)).await;
    set_limit(served.pid(), 400);
    assert_eq!(timeout(HANG, call).await.unwrap().unwrap().status, 200);
    let log = served.stderr();
    assert_eq!(log.matches("cannot accept").count(), 1, "{log}");
}
