//! `aegis serve --retain`: what is over goes while clients decide and the server is killed, and no
//! key is decided twice.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_hitl::Decision;
use aegis_hitl::store::{SqliteStore, Verified};
use rusqlite::Connection;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::binary::{Served, aegis, run, serve};
use crate::python::{environment, python};
use crate::support::postgres::{Postgres, connect};
use crate::support::process::port;
use crate::support::receiver::{Receiver, Reply};
use crate::support::rows::look_at;
use crate::support::{Call, HANG, alone};

const KILLS: usize = 8;
const CLIENTS: usize = 8;
const TENANTS: [&str; 2] = ["acme", "globex"];

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// Tenant and key.
type Identity = (String, String);

/// What clients were told of each decision: the action's id, and the decision.
type Told = HashMap<Identity, (String, Decision)>;

struct Clients {
    client: reqwest::Client,
    /// The servers, which have one store.
    urls: Vec<String>,
    told: Mutex<Told>,
    asked: watch::Sender<usize>,
    /// Answers to keys that were decided before.
    repeated: Mutex<HashMap<u16, usize>>,
}

impl Clients {
    fn of(urls: Vec<String>) -> Arc<Self> {
        Arc::new(Self {
            client: reqwest::Client::builder().timeout(HANG).build().unwrap(),
            urls,
            told: Mutex::default(),
            asked: watch::Sender::new(0),
            repeated: Mutex::default(),
        })
    }

    /// Starts [`CLIENTS`], until the sender says that it is over.
    fn start(self: &Arc<Self>) -> (JoinSet<()>, watch::Sender<bool>) {
        let (is_over, over) = watch::channel(false);
        let mut running = JoinSet::new();
        for client in 0..CLIENTS {
            let (clients, over) = (self.clone(), over.clone());
            running.spawn(async move { clients.run(client, over).await });
        }
        (running, is_over)
    }

    /// Waits for so many more answers.
    async fn answered(&self, more: usize) {
        let mut asked = self.asked.subscribe();
        let enough = *asked.borrow() + more;
        let reached = timeout(HANG, asked.wait_for(|asked| *asked >= enough));
        reached.await.unwrap().unwrap();
    }

    /// Waits until the receiver has an event of each decision that clients were told of, and asserts
    /// that it has one of each. Returns what they were told.
    async fn each_once(&self, taken: &Taken) -> Told {
        let told = self.told.lock().unwrap().clone();
        let has_all = || taken.lock().unwrap().len() >= told.len();
        until(has_all, "an event was lost").await;
        for (identity, events) in &*taken.lock().unwrap() {
            assert_eq!(events.len(), 1, "{identity:?} was decided twice");
            assert!(told.contains_key(identity));
        }
        told
    }

    /// Asks until there is an answer, with the same call id.
    async fn ask(&self, identity: &Identity, decision: Decision) -> (u16, bool, Value) {
        let call_id = Uuid::new_v4().to_string();
        let asking = async {
            let mut next = self.urls.iter().cycle();
            next.nth(*self.asked.borrow() % self.urls.len());
            loop {
                let url = next.next().unwrap();
                let request = self
                    .client
                    .post(format!("{url}/api/v1/hitl/{decision}"))
                    .header("Tenant-Id", &identity.0)
                    .header("Thread-Id", "run-7")
                    .header("Idempotency-Key", &identity.1)
                    .header("X-Request-Id", &call_id);
                let answered = async {
                    let reply = request.send().await?;
                    let is_replayed = reply.headers().contains_key("idempotency-replayed");
                    let status = reply.status().as_u16();
                    Ok::<_, reqwest::Error>((status, is_replayed, reply.bytes().await?))
                };
                match answered.await {
                    Ok((503, ..)) | Err(_) => sleep(Duration::from_millis(10)).await,
                    Ok((status, is_replayed, body)) => {
                        let body = serde_json::from_slice(&body).unwrap();
                        return (status, is_replayed, body);
                    }
                }
            }
        };
        let answer = timeout(HANG, asking).await.expect("no answer");
        self.asked.send_modify(|asked| *asked += 1);
        answer
    }

    /// Decides on a new key.
    async fn decide(&self, identity: Identity, decision: Decision) {
        let (status, _, body) = self.ask(&identity, decision).await;
        // An earlier attempt may have been recorded, and what it recorded removed, before this one.
        let action = match status {
            202 => &body,
            409 => &body["action"],
            _ => panic!("{identity:?}: {status} {body}"),
        };
        let id = action["request_id"].as_str().unwrap().to_owned();
        let before = self.told.lock().unwrap().insert(identity, (id, decision));
        assert_eq!(before, None);
    }

    /// Asks again about a key that was decided, for the same decision or the other one.
    async fn repeat(&self, identity: &Identity, asks_for_other: bool) {
        let (id, decision) = self.told.lock().unwrap()[identity].clone();
        let (asked, expected) = match asks_for_other {
            true => (decision.opposite(), 422),
            false => (decision, 409),
        };
        let (status, _, body) = self.ask(identity, asked).await;
        assert_eq!(status, expected, "{identity:?} {asked}: {body}");
        assert_eq!(body["action"]["request_id"], *id, "decided twice");
        assert_eq!(body["action"]["decision"], decision.as_str());
        *self.repeated.lock().unwrap().entry(status).or_default() += 1;
    }

    /// One of [`CLIENTS`], each two of which use the same keys for two tenants.
    async fn run(&self, client: usize, over: watch::Receiver<bool>) {
        let identity = |number: usize| {
            let key = format!("key-{}-{number}", client / 2);
            (TENANTS[client % 2].to_owned(), key)
        };
        for number in 0.. {
            if *over.borrow() {
                return;
            }
            let decision = match (number + client) % 3 {
                0 => Decision::Reject,
                _ => Decision::Approve,
            };
            self.decide(identity(number), decision).await;
            for older in [number / 2, number * 7 / 8, number.saturating_sub(1)] {
                self.repeat(&identity(older), older % 4 == 0).await;
            }
        }
    }
}

struct Place {
    folder: TempDir,
    port: u16,
}

impl Place {
    fn new(config: &str) -> Self {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("aegis.toml"), config).unwrap();
        let port = port();
        Self { folder, port }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("aegis.db")
    }

    fn serve(&self) -> Command {
        let listen = format!("127.0.0.1:{}", self.port);
        let mut command = aegis(&["serve", "--listen", &listen, "--retain", "1h", "--store"]);
        command.arg(self.store()).env("AEGIS_LOG", "warn");
        command
            .arg("--config")
            .arg(self.folder.path().join("aegis.toml"));
        command
    }

    /// Lets hours pass, in which no server runs.
    fn let_pass(&self, hours: i64) {
        let database = Connection::open(self.store()).unwrap();
        let by = hours * 3_600_000_000;
        let columns = [
            ("action", "created_at"),
            ("action", "decided_at"),
            ("event", "at"),
            ("endpoint", "held_until"),
            ("endpoint", "left_at"),
            ("undelivered", "parked_at"),
            ("undelivered", "due"),
            ("postponed", "until"),
        ];
        database.execute_batch("BEGIN").unwrap();
        for (table, column) in columns {
            let sql = format!("UPDATE {table} SET {column} = {column} - {by}");
            database.execute(&sql, []).unwrap();
        }
        // The audit chain is right to tell of all this. It begins anew.
        database.execute_batch("DELETE FROM chain; COMMIT").unwrap();
    }
}

fn number(store: &Path, sql: &str) -> usize {
    let number: u32 = look_at(store).query_row(sql, [], |row| row.get(0)).unwrap();
    number as usize
}

fn verified(store: &Path) -> Verified {
    let verified = SqliteStore::verify(store).unwrap();
    assert_eq!(verified.faults, Vec::<String>::new());
    verified
}

async fn until(is: impl Fn() -> bool, what: &str) {
    let waiting = async {
        while !is() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(HANG, waiting)
        .await
        .unwrap_or_else(|_| panic!("{what}"));
}

/// The events that a receiver has taken of each action.
type Taken = Arc<Mutex<HashMap<Identity, HashSet<String>>>>;

/// A receiver that refuses the first attempt of some events.
async fn receiver(taken: &Taken) -> Receiver {
    let (taken, refused) = (taken.clone(), Mutex::new(HashSet::new()));
    Receiver::start(move |message| {
        let action = &message.json()["data"]["action"];
        let text = |member: &str| action[member].as_str().unwrap().to_owned();
        let (tenant, key) = (text("tenant_id"), message.key());
        let is_first = || refused.lock().unwrap().insert(message.id().to_owned());
        if key.ends_with("11") && is_first() {
            return Reply::Status(500);
        }
        let mut taken = taken.lock().unwrap();
        let of_it = taken.entry((tenant, key)).or_default();
        of_it.insert(message.id().to_owned());
        Reply::Status(204)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_key_is_decided_twice_and_no_event_lost_where_old_actions_go_under_sigkill() {
    let _alone = alone().await;
    let taken = Taken::default();
    let receiver = receiver(&taken).await;
    let place = Place::new(&format!(
        "[[webhook]]\nname = \"billing\"\nurl = \"{}\"\nsecret = \"{SECRET}\"\nfrom = \"oldest\"\n",
        receiver.url()
    ));
    let mut server = Served::start(place.serve());
    let clients = Clients::of(vec![server.url()]);
    let (running, is_over) = clients.start();
    let mut removed = Vec::new();
    for kill in 0..KILLS {
        clients.answered(300 + kill * 137 % 200).await;
        server.kill();
        // All that was decided is old when the next server begins.
        place.let_pass(2);
        removed.push(verified(&place.store()).totals.removed);
        server = Served::start(place.serve());
    }
    is_over.send_replace(true);
    let ended = timeout(HANG, running.join_all());
    ended.await.unwrap();
    assert!(
        removed.is_sorted() && removed.last() > Some(&20),
        "{removed:?}"
    );

    // The receiver gets one event of each, though most of the actions are gone.
    let told = clients.each_once(&taken).await;
    server.stop().expect(0);
    place.let_pass(2);
    let server = Served::start(place.serve());
    let store = place.store();
    let rest = || number(&store, "SELECT count(*) FROM action") == 1;
    until(rest, "what is over stays").await;
    for (number, identity) in told.keys().enumerate().take(200) {
        clients.repeat(identity, number % 2 == 0).await;
    }
    server.stop().expect(0);
    let totals = verified(&store).totals;
    assert_eq!(totals.actions + totals.removed, told.len() as u64);
    let checked = run({
        let mut command = aegis(&["check", "--json"]);
        command.arg(&store);
        command
    });
    assert_eq!(checked.expect(0).json()["removed"], totals.removed);
    println!(
        "{} keys over {KILLS} kills, removed by then: {removed:?}; repeated: {:?}",
        told.len(),
        clients.repeated.lock().unwrap()
    );
}

/// Lets hours pass in a database, while servers run. What they have begun is over before, or after.
async fn let_pass(url: &str, hours: u32) {
    let client = connect(url).await;
    let columns = [
        ("action", "created_at"),
        ("action", "decided_at"),
        ("event", "at"),
        ("feed", "at"),
        ("undelivered", "parked_at"),
        ("undelivered", "due"),
        ("postponed", "until"),
    ];
    let mut pass = "BEGIN; LOCK TABLE sweep, publisher, action, event, feed, endpoint, undelivered, postponed \
                    IN ACCESS EXCLUSIVE MODE; "
        .to_owned();
    for (table, column) in columns {
        pass += &format!("UPDATE {table} SET {column} = {column} - interval '{hours}h'; ");
    }
    // But for endpoints: one that nobody had held for so long would keep nothing.
    pass += "COMMIT";
    // A server may wait for it the other way around, and then one of them is told to give way.
    let passed = async {
        while let Err(error) = client.batch_execute(&pass).await {
            let code = error.code().map(|code| code.code().to_owned());
            assert_eq!(code.as_deref(), Some("40P01"), "{error}");
            client.batch_execute("ROLLBACK").await.unwrap();
        }
    };
    timeout(HANG, passed).await.unwrap();
}

async fn number_in(url: &str, sql: &str) -> usize {
    let row = connect(url).await.query_one(sql, &[]).await.unwrap();
    usize::try_from(row.get::<_, i64>(0)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_key_is_decided_twice_and_no_event_lost_where_servers_share_a_postgres() {
    let _alone = alone().await;
    let taken = Taken::default();
    let receiver = receiver(&taken).await;
    let url = Postgres::shared().database().await;
    let folder = TempDir::new().unwrap();
    let config = folder.path().join("aegis.toml");
    let webhook = format!(
        "[[webhook]]\nname = \"billing\"\nurl = \"{}\"\nsecret = \"{SECRET}\"\nfrom = \"oldest\"\n",
        receiver.url()
    );
    fs::write(&config, webhook).unwrap();
    let ports = [port(), port()];
    let serve = |port: u16| {
        let listen = format!("127.0.0.1:{port}");
        let mut command = aegis(&[
            "serve", "--listen", &listen, "--retain", "1h", "--store", &url,
        ]);
        command
            .env("AEGIS_LOG", "warn")
            .arg("--config")
            .arg(&config);
        Served::start(command)
    };
    let mut servers = ports.map(|port| Some(serve(port)));
    let clients = Clients::of(servers.iter().flatten().map(Served::url).collect());
    let (running, is_over) = clients.start();
    let tombstones = "SELECT count(removed_at) FROM action";
    let mut removed = Vec::new();
    for kill in 0..KILLS {
        clients.answered(300 + kill * 137 % 200).await;
        let_pass(&url, 2).await;
        removed.push(number_in(&url, tombstones).await);
        // Now it is removing, and so is the other one. Looking must not be most of what the database does.
        let before = *removed.last().unwrap() as i64;
        let looking = connect(&url).await;
        let more = async {
            let count = async || looking.query_one(tombstones, &[]).await.unwrap();
            while count().await.get::<_, i64>(0) <= before {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(HANG, more).await.expect("nothing goes");
        let at = kill % 2;
        servers[at].take().unwrap().kill();
        // The minute has passed that it had to deliver.
        let lapse = "UPDATE endpoint SET held_until = clock_timestamp() WHERE holder IS NOT NULL";
        connect(&url).await.batch_execute(lapse).await.unwrap();
        servers[at] = Some(serve(ports[at]));
    }
    is_over.send_replace(true);
    let ended = timeout(HANG, running.join_all());
    ended.await.unwrap();
    assert!(
        removed.is_sorted() && removed.last() > Some(&20),
        "{removed:?}"
    );

    let told = clients.each_once(&taken).await;
    let rest = "SELECT count(*) FROM action WHERE removed_at IS NULL";
    let_pass(&url, 2).await;
    let all_go = async {
        while number_in(&url, rest).await > 1 {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(HANG, all_go).await.expect("what is over stays");
    for (number, identity) in told.keys().enumerate().take(200) {
        clients.repeat(identity, number % 2 == 0).await;
    }
    let gone = number_in(&url, tombstones).await;
    assert_eq!(gone + 1, told.len());
    assert_eq!(number_in(&url, "SELECT tombstones FROM sweep").await, gone);
    // Every position that was given is that of an event on record, or of one that was removed.
    let accounted = "SELECT count(*) FROM (SELECT position FROM swept UNION ALL SELECT position FROM feed) AS known";
    assert_eq!(
        number_in(&url, accounted).await,
        number_in(&url, "SELECT position FROM publisher").await
    );
    for server in servers.into_iter().flatten() {
        server.stop().expect(0);
    }
    println!(
        "{} keys over {KILLS} kills, removed by then: {removed:?}; repeated: {:?}",
        told.len(),
        clients.repeated.lock().unwrap()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_published_python_sdk_takes_what_was_removed_for_done() {
    let interpreter = environment(
        "python-sdk-0.1.2",
        &["aegis-idempotency==0.1.2"],
        "import aegis_hitl",
    );
    let place = Place::new("");
    let server = Served::start(place.serve());
    for key in ["k-1", "k-2"] {
        let reply = Call::post(server.addr, "approve", key).send().await;
        assert_eq!(reply.status, 202);
    }
    server.stop().expect(0);
    place.let_pass(2);
    let server = Served::start(place.serve());
    let store = place.store();
    let is_gone = || number(&store, "SELECT count(*) FROM tombstone") == 1;
    until(is_gone, "nothing goes").await;
    let program = "import asyncio, os\n\
                   from aegis_hitl import AegisClient\n\
                   async def main():\n\
                   \x20   async with AegisClient(os.environ['SDK_URL'], tenant_id='t', thread_id='h') as client:\n\
                   \x20       for ask in [client.approve, client.reject]:\n\
                   \x20           response = await ask('k-1')\n\
                   \x20           print(response.status_code, response.json()['code'])\n\
                   asyncio.run(main())\n";
    let mut command = python(&interpreter, &["-c", program]);
    command.env("SDK_URL", server.url());
    let ended = run(command).expect(0);
    assert_eq!(ended.stdout, "409 duplicate\n422 decision-conflict\n");
    server.stop().expect(0);
}

#[test]
fn a_retention_is_a_number_of_days_or_hours() {
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    for wrong in [
        "0d",
        "30",
        "d",
        "1.5h",
        "30m",
        "-1d",
        "+1d",
        "1 h",
        "",
        "99999999999d",
    ] {
        let mut command = serve(&store);
        command.arg(format!("--retain={wrong}"));
        let ended = run(command).expect(2);
        let allowed = "such as 30d or 12h, at least 1h";
        assert!(ended.stderr.contains(allowed), "{wrong}: {}", ended.stderr);
        assert!(ended.stderr.contains(wrong), "{}", ended.stderr);
    }
    assert!(!store.exists());
    let config = folder.path().join("aegis.toml");
    fs::write(&config, "[serve]\nretain = \"0h\"\n").unwrap();
    let mut command = serve(&store);
    command.arg("--config").arg(&config);
    assert!(run(command).expect(2).stderr.contains("'0h'"));
    for (flag, variable, file) in [
        (Some("30d"), "0h", "0h"),
        (None, "12h", "0h"),
        (None, "", "1h"),
    ] {
        fs::write(&config, format!("[serve]\nretain = \"{file}\"\n")).unwrap();
        let mut command = serve(&store);
        command.arg("--config").arg(&config);
        command.args(flag.map(|flag| format!("--retain={flag}")));
        if !variable.is_empty() {
            command.env("AEGIS_RETAIN", variable);
        }
        Served::start(command).stop().expect(0);
    }
}
