//! `aegis audit`, and the program of the manual that verifies an export without it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use aegis_hitl::protocol::Digest;
#[cfg(unix)]
use aegis_hitl::store::PostgresStore;
use aegis_hitl::store::{Actor, AuditTrail, Decide, Decided, Identity, SqliteStore, Store};
use rusqlite::Connection;
use serde_json::{Value, json};
use sha2::Digest as _;
use tempfile::TempDir;

use crate::binary::{Ended, Served, aegis, run, run_with_bytes, run_with_input, serve};
use crate::python::{interpreter, python};
#[cfg(unix)]
use crate::support::postgres::{Postgres, connect};
use crate::support::{Call, alone};

/// A title with what programs often take for something else.
const TITLE: &str = "\u{202e}\u{2028}\u{7f}\u{1b}[1m \\u0041 \" é 😀 12345678901234567890 1e400";

fn audit(store: &Path, args: &[&str]) -> Command {
    let mut command = aegis(&["audit"]);
    command.args(args).arg("--store").arg(store);
    command
}

fn export(store: &Path, args: &[&str]) -> String {
    let args = [&["export"], args].concat();
    run(audit(store, &args)).expect(0).stdout
}

/// Verifies an export without the database.
fn verify(export: &str, args: &[&str]) -> Ended {
    run_with_input(aegis(&[&["audit", "verify", "-"], args].concat()), export)
}

/// The program of the manual.
fn program() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/manual/audit.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, program) = page.split_once("```python\n").unwrap();
    program.split("```").next().unwrap().to_owned()
}

/// Verifies an export with the program of the manual.
fn verify_in_python(export: &[u8], heads: &[&str]) -> Ended {
    let program = program();
    let args = [&["-c", program.as_str()], heads].concat();
    run_with_bytes(python(interpreter(), &args), export)
}

async fn submit(server: &Served, tenant: &str, key: &str) {
    let body = json!({ "payload": 1, "aegis": { "title": TITLE, "allow_edit": true } });
    let call = Call::new(server.addr, "POST", "/api/v1/hitl/actions")
        .header("Tenant-Id", tenant)
        .header("Thread-Id", "run-7")
        .header("Idempotency-Key", key)
        .json(body.to_string());
    let answer = call.send().await;
    assert!(answer.status < 300, "{answer:?}");
}

async fn decide(server: &Served, tenant: &str, key: &str) {
    let call = Call::new(server.addr, "POST", "/api/v1/hitl/approve")
        .header("Tenant-Id", tenant)
        .header("Thread-Id", "run-7")
        .header("Idempotency-Key", key)
        .json("{}");
    assert_eq!(call.send().await.status, 202);
}

/// The heads of all chains, once no event waits to be chained.
async fn heads(store: &Path, events: u64) -> Vec<Value> {
    loop {
        let heads = run(audit(store, &["head", "--json"])).expect(0).json();
        let heads = heads["chains"].as_array().unwrap().clone();
        let sum = |name: &str| heads.iter().map(|head| head[name].as_u64().unwrap()).sum();
        let (chained, unchained): (u64, u64) = (sum("seq"), sum("unchained"));
        if (chained, unchained) == (events, 0) {
            return heads;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// A server that runs, with five events of two tenants in a file.
async fn told(folder: &TempDir) -> (Served, PathBuf) {
    let store = folder.path().join("aegis.db");
    (told_in(&store).await, store)
}

/// The same in any store.
async fn told_in(store: &Path) -> Served {
    let server = Served::start(serve(store));
    for tenant in ["acme", "b"] {
        submit(&server, tenant, "one").await;
        decide(&server, tenant, "one").await;
    }
    decide(&server, "acme", "two").await;
    server
}

/// An empty PostgreSQL database, by its URL.
#[cfg(unix)]
async fn database() -> PathBuf {
    Postgres::shared().database().await.into()
}

/// The URL of a store, unless it is a file.
fn url(store: &Path) -> Option<&str> {
    store.to_str().filter(|store| store.contains("://"))
}

/// Changes a store by hand. Each kind has a statement of its own.
async fn edit(store: &Path, in_file: &str, in_postgres: &str) {
    match url(store) {
        #[cfg(unix)]
        Some(url) => {
            let client = connect(url).await;
            client.batch_execute(in_postgres).await.unwrap();
        }
        _ => {
            let database = Connection::open(store).unwrap();
            database.execute_batch(in_file).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_of_a_server_that_runs_is_verified_by_the_program_of_the_manual() {
    let folder = TempDir::new().unwrap();
    exported_and_verified(&folder.path().join("aegis.db")).await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn an_export_of_postgres_is_verified_by_the_program_of_the_manual() {
    exported_and_verified(&database().await).await;
}

async fn exported_and_verified(store: &Path) {
    let server = told_in(store).await;
    let heads = heads(store, 5).await;
    let all = export(store, &[]);
    let verified = verify(&all, &["--json"]).expect(0).json();
    assert_eq!(verified["sound"], true);
    let python = verify_in_python(all.as_bytes(), &[]).expect(0);
    for (chain, head) in verified["chains"].as_array().unwrap().iter().zip(&heads) {
        for name in ["tenant_id", "seq", "head", "unchained"] {
            assert_eq!(chain[name], head[name], "{name}");
        }
        let (tenant, seq) = (head["tenant_id"].as_str().unwrap(), &head["seq"]);
        let hash = head["head"].as_str().unwrap();
        let line = format!("{tenant}: head {hash} at seq {seq}\n");
        assert!(python.stdout.contains(&line), "{python:?}");
        assert!(verify(&all, &[]).expect(0).stdout.contains(&line));
        let shown = run(audit(store, &["head", "--tenant", tenant])).expect(0);
        assert_eq!(shown.stdout, line);
        let one = export(store, &["--tenant", tenant]);
        assert!(all.contains(&one));
        verify(&one, &["--tenant", tenant, "--head", hash]).expect(0);
        verify_in_python(one.as_bytes(), &[hash]).expect(0);
        run(audit(store, &["verify", "--head", hash])).expect(0);
        let other = if tenant == "b" { "acme" } else { "b" };
        verify(&one, &["--tenant", other]).expect(1);
        run(audit(store, &["verify", "--tenant", other, "--head", hash])).expect(1);
    }
    assert!(
        all.contains("\u{202e}\u{2028}\u{7f}\\u001b[1m \\\\u0041"),
        "{all}"
    );
    let part = export(store, &["--tenant", "acme", "--from", "3"]);
    assert_eq!(part.lines().count(), 3);
    let verified = verify(&part, &[]).expect(0);
    assert!(verified.stdout.contains("not in this export: seq 1 to 2"));
    verify_in_python(part.as_bytes(), &[]).expect(0);
    // What comes later follows on what was exported.
    decide(&server, "acme", "three").await;
    self::heads(store, 6).await;
    let longer = export(store, &["--tenant", "acme"]);
    verify(&longer, &["--head", heads[0]["head"].as_str().unwrap()]).expect(0);
    server.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_changed_in_an_export_is_found_by_both_verifiers() {
    let folder = TempDir::new().unwrap();
    let (server, store) = told(&folder).await;
    server.stop().expect(0);
    let all = export(&store, &[]);
    let lines: Vec<_> = all.lines().map(|line| format!("{line}\n")).collect();
    let head = |at: usize| {
        let line: Value = serde_json::from_str(&lines[at]).unwrap();
        line["head"].as_str().unwrap().to_owned()
    };
    let noted = [head(4), head(8)];
    let noted: Vec<&str> = noted.iter().map(String::as_str).collect();
    let arguments = ["--head", noted[0], "--head", noted[1]];
    verify(&all, &arguments).expect(0);
    verify_in_python(all.as_bytes(), &noted).expect(0);
    let mut changed = vec![String::new(), all.replace('\n', ""), "[]\n".to_owned()];
    for at in 0..lines.len() {
        let mut edits = vec![Vec::new(), vec![lines[at].clone(); 2]];
        edits.push(vec![lines[(at + 1) % lines.len()].clone()]);
        edits.push(vec![lines[at].replacen("\"seq\":", "\"seq\":1", 1)]);
        edits.push(vec![lines[at].replacen('{', "{ ", 1)]);
        edits.push(vec![lines[at].replacen('a', "\\u0061", 1)]);
        edits.push(vec![
            lines[at].replace("\"tenant_id\":\"acme\"", "\"tenant_id\":\"b\""),
        ]);
        edits.push(vec![
            lines[at]
                .replace("reviewer", "mallory")
                .replace("anonymous", "eve"),
        ]);
        edits.push(vec![lines[at].replacen("}\n", ",\"zzz\":1}\n", 1)]);
        let member = lines[at].replacen("\"seq\":", "\"seq\":1,\"seq\":", 1);
        edits.push(vec![member]);
        for edit in edits {
            let mut lines = lines.clone();
            lines.splice(at..=at, edit);
            changed.push(lines.concat());
        }
    }
    // The rest of a chain after its head.
    let event: Value = serde_json::from_str(&lines[1]).unwrap();
    let removed = json!({ "hash": event["hash"], "leaf": event["hash"], "seq": 4 });
    let mut after_the_end = lines.clone();
    after_the_end.insert(5, format!("{removed}\n"));
    changed.push(after_the_end.concat());
    // What is equal to a number and is none, a hash in capitals, and a line that was cut.
    for (at, line) in lines.iter().enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        let mut edit = |name: &str, value: Value| {
            let mut line = line.clone();
            line[name] = value;
            let mut lines = lines.clone();
            lines[at] = format!("{line}\n");
            changed.push(lines.concat());
        };
        for name in ["from", "head"] {
            if let Some(hash) = line[name].as_str() {
                edit(name, hash.to_uppercase().into());
            }
        }
        if line.get("unchained").is_some() {
            for value in [json!("x"), json!(-1), json!(0.0), json!(false), json!(null)] {
                edit("unchained", value);
            }
        }
        if let Some(seq) = line["seq"].as_f64() {
            edit("seq", seq.into());
        }
    }
    let event = &lines[1][r#"{"event":"#.len()..lines[1].rfind(",\"hash\"").unwrap()];
    let leaf = Digest::from(<[u8; 32]>::from(sha2::Sha256::digest(event))).to_string();
    for (leaf, seq) in [
        (leaf.clone(), json!(1)),
        (leaf.clone(), json!(1.0)),
        (leaf.clone(), json!(true)),
        (leaf.to_uppercase(), json!(1)),
    ] {
        let line: Value = serde_json::from_str(&lines[1]).unwrap();
        let removed = json!({ "hash": line["hash"], "leaf": leaf, "seq": seq });
        let mut lines = lines.clone();
        lines[1] = format!("{removed}\n");
        // An event that retention removed is no fault; its line is, when it is spelled otherwise.
        if seq == json!(1) && leaf == leaf.to_lowercase() {
            verify(&lines.concat(), &arguments).expect(0);
            verify_in_python(lines.concat().as_bytes(), &noted).expect(0);
        } else {
            changed.push(lines.concat());
        }
    }
    changed.push(all.trim_end().to_owned());
    changed.retain(|changed| *changed != all);
    assert!(changed.len() > 60, "{}", changed.len());
    // One process of Python verifies all of them: each would take longer to start than to end.
    let files: Vec<_> = (0..changed.len())
        .map(|number| folder.path().join(format!("{number}.jsonl")))
        .collect();
    for (file, changed) in files.iter().zip(&changed) {
        fs::write(file, changed).unwrap();
    }
    let runner = r#"
import io, sys
program, noted, folder, count = sys.argv[1], sys.argv[2:4], sys.argv[4], int(sys.argv[5])
for number in range(count):
    class Input: buffer = open(f"{folder}/{number}.jsonl", "rb")
    sys.stdin, sys.argv, is_sound = Input, ["-", *noted], True
    sys.stdout = io.StringIO()
    try: exec(program, {})
    except BaseException: is_sound = False
    sys.stdout = sys.__stdout__
    print(int(is_sound))
"#;
    let (program, count) = (program(), changed.len().to_string());
    let folder_name = folder.path().to_str().unwrap();
    let args = [
        "-c",
        runner,
        &program,
        noted[0],
        noted[1],
        folder_name,
        &count,
    ];
    let found = run(python(interpreter(), &args)).expect(0);
    let found: Vec<_> = found.stdout.lines().collect();
    assert_eq!(found.len(), changed.len());
    for ((file, changed), in_python) in files.iter().zip(&changed).zip(found) {
        let args = [&["audit", "verify", file.to_str().unwrap()], &arguments[..]].concat();
        let ended = run(aegis(&args));
        assert_eq!((ended.code(), in_python), (1, "0"), "{changed}\n{ended:?}");
        assert!(
            ended.stderr.contains("the export is not sound"),
            "{ended:?}"
        );
        assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_was_deleted_by_hand_is_named_by_all_that_verify() {
    let folder = TempDir::new().unwrap();
    deleted_and_named(&folder.path().join("aegis.db")).await;
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_was_deleted_from_postgres_is_named_by_all_that_verify() {
    deleted_and_named(&database().await).await;
}

/// The second event, as the rest of a statement.
const SECOND: &str = "event_id = (SELECT event_id FROM feed WHERE position = 2)";

async fn deleted_and_named(store: &Path) {
    let server = told_in(store).await;
    heads(store, 5).await;
    server.stop().expect(0);
    let in_postgres = format!("DELETE FROM event WHERE {SECOND}");
    edit(store, "DELETE FROM event WHERE seq = 2", &in_postgres).await;
    let ended = run(audit(store, &["verify"])).expect(1);
    let shown = "retention did not remove it";
    assert!(
        ended
            .stdout
            .starts_with("event 2: the audit chain has it as seq 2"),
        "{ended:?}"
    );
    assert!(ended.stdout.contains(shown), "{ended:?}");
    let all = export(store, &["--tenant", "acme"]);
    let ended = verify(&all, &[]).expect(1);
    assert!(ended.stdout.contains(shown), "{ended:?}");
    let ended = verify_in_python(all.as_bytes(), &[]).expect(1);
    assert!(ended.stderr.contains(shown), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_was_changed_in_the_database_is_named() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    let fault = changed_and_named(&store).await;
    let file = store.to_str().unwrap();
    let checked = run(aegis(&["check", file])).expect(1);
    assert!(checked.stdout.contains(&fault), "{checked:?}");
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_was_changed_in_postgres_is_named() {
    changed_and_named(&database().await).await;
}

async fn changed_and_named(store: &Path) -> String {
    let server = told_in(store).await;
    heads(store, 5).await;
    server.stop().expect(0);
    run(audit(store, &["verify"])).expect(0);
    let change = "UPDATE event SET actor = 'mallory\u{202e}' WHERE";
    let (in_file, in_postgres) = (format!("{change} seq = 2"), format!("{change} {SECOND}"));
    edit(store, &in_file, &in_postgres).await;
    let ended = run(audit(store, &["verify", "--json"])).expect(1);
    let json = ended.json();
    assert_eq!(json["sound"], false);
    let fault = json["faults"][0].as_str().unwrap();
    assert_eq!(
        fault,
        "event 2: it is not as it was chained, as seq 2 of tenant acme"
    );
    assert!(
        ended.stderr.contains("the audit trail is not sound"),
        "{ended:?}"
    );
    run(audit(store, &["verify", "--tenant", "b"])).expect(0);
    verify(&export(store, &["--tenant", "acme"]), &[]).expect(1);
    fault.to_owned()
}

#[test]
fn wrong_usage_of_audit_is_told() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    let missing = run(audit(&store, &["export"])).expect(1);
    assert!(
        missing.stderr.contains("the audit trail was not read"),
        "{missing:?}"
    );
    assert!(!store.exists());
    drop(SqliteStore::open(&store).unwrap());
    while AuditTrail::open(&store).is_err() {}
    for args in [
        &["export", "--from", "0", "--tenant", "a"][..],
        &["export", "--from", "2"],
        &["export", "--from", "2", "--tenant", "a"],
        &["export", "--tenant", "a b"],
        &["verify", "--head", "abc"],
    ] {
        let ended = run(audit(&store, args)).expect(2);
        assert_eq!(ended.stdout, "", "{ended:?}");
    }
    assert_eq!(export(&store, &[]), "");
    let empty = export(&store, &["--tenant", "nobody"]);
    assert_eq!(empty.lines().count(), 2);
    verify(&empty, &[]).expect(0);
    verify_in_python(empty.as_bytes(), &[]).expect(0);
    let unknown = run(audit(&store, &["verify", "--tenant", "nobody"])).expect(1);
    assert!(
        unknown.stderr.contains("tenant nobody has no events"),
        "{unknown:?}"
    );
    run(aegis(&["audit", "verify", "no-such-file"])).expect(1);
    verify(&"x".repeat(3 * 1024 * 1024), &[]).expect(1);
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_of_audit_on_postgres_is_told_without_the_password() {
    let database = database().await;
    let empty = run(audit(&database, &["head"])).expect(1);
    assert!(empty.stderr.contains("is empty"), "{empty:?}");
    let server = Served::start(serve(&database));
    for args in [
        &["export", "--from", "0", "--tenant", "a"][..],
        &["export", "--from", "2", "--tenant", "a"],
    ] {
        run(audit(&database, args)).expect(2);
    }
    assert_eq!(export(&database, &[]), "");
    let unknown = run(audit(&database, &["verify", "--tenant", "nobody"])).expect(1);
    let said = "tenant nobody has no events";
    assert!(unknown.stderr.contains(said), "{unknown:?}");
    server.stop().expect(0);
    for (url, code) in [
        ("postgres://aegis:s3cret@127.0.0.1:1/aegis", 1),
        ("postgres://aegis:s3cret@host:0x1/aegis", 2),
        ("mysql://aegis:s3cret@host/aegis", 2),
    ] {
        let ended = run(audit(Path::new(url), &["export"])).expect(code);
        assert!(!ended.text().contains("s3cret"), "{ended:?}");
        let mut help = aegis(&["audit", "export", "--help"]);
        help.env("AEGIS_STORE", url);
        assert!(!run(help).expect(0).text().contains("s3cret"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_while_it_chains_goes_on_where_it_was() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    let filled = SqliteStore::open(&store).unwrap();
    fill(&filled, 3_000).await;
    filled.close().await;
    killed_while_it_chains(&store).await;
    run(aegis(&["check", store.to_str().unwrap()])).expect(0);
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_while_it_chains_in_postgres_goes_on_where_it_was() {
    let database = database().await;
    let filled = PostgresStore::connect(url(&database).unwrap())
        .await
        .unwrap();
    fill(&filled, 3_000).await;
    filled.close().await;
    killed_while_it_chains(&database).await;
}

async fn killed_while_it_chains(store: &Path) {
    let _alone = alone().await;
    // The server has a backlog to chain, and is killed at several points of it.
    unchain(store).await;
    let mut reached = Vec::new();
    for lives in 0..6 {
        let server = Served::start(serve(store));
        decide(&server, "acme", &format!("life-{lives}")).await;
        tokio::time::sleep(std::time::Duration::from_millis(40 * lives)).await;
        server.kill();
        let head = run(audit(store, &["head", "--tenant", "acme", "--json"])).expect(0);
        reached.push(head.json()["chains"][0]["seq"].as_u64().unwrap());
        run(audit(store, &["verify"])).expect(0);
    }
    assert!(reached.is_sorted(), "{reached:?}");
    assert!(
        reached[0] < 3_006,
        "there was nothing to go on with: {reached:?}"
    );
    let server = Served::start(serve(store));
    let chained = heads(store, 3_006).await;
    server.stop().expect(0);
    let exported = export(store, &[]);
    // The same events, chained by one server from the first one.
    unchain(store).await;
    let server = Served::start(serve(store));
    assert_eq!(heads(store, 3_006).await, chained);
    server.stop().expect(0);
    assert_eq!(export(store, &[]), exported);
}

/// Records decisions of two tenants.
async fn fill<S: Store + Clone>(store: &S, count: usize) {
    let tasks: Vec<_> = (0..100)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for number in 0..count / 100 {
                    let request = Decide {
                        identity: Identity {
                            tenant_id: ["acme", "b"][number % 2].parse().unwrap(),
                            thread_id: "run-7".parse().unwrap(),
                            idempotency_key: format!("k-{task}-{number}").parse().unwrap(),
                        },
                        decision: aegis_hitl::Decision::Approve,
                        call_id: None,
                        payload: None,
                        comment: None,
                        actor: Actor::new("reviewer"),
                        require_submission: false,
                        allow_self_approval: true,
                    };
                    let decided = store.decide(request).await.unwrap();
                    assert!(matches!(decided, Decided::Recorded(_)));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

async fn unchain(store: &Path) {
    let anew = "BEGIN; UPDATE chainer SET position = 0; DELETE FROM chain; COMMIT";
    edit(store, "DELETE FROM chain", anew).await;
}
