//! Webhooks of a server, and what an operator does about them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use aegis_hitl::Decision;
use aegis_hitl::store::{
    Actor, Decide, DeliveryResult, Identity, MarkDeliveries, SqliteStore, Start, Store,
    TakeEndpoint,
};
use serde_json::Value;
use tempfile::TempDir;
use uuid::Uuid;

use crate::binary::{Ended, Served, aegis, run, serve, signal};
use crate::support::process::{Process, bound};
use crate::support::receiver::{Receiver, Reply};
use crate::support::tls::Certified;
use crate::support::{Call, HANG};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        Self { folder }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("aegis.db")
    }

    /// A server with this configuration.
    fn serve(&self, config: &str) -> Command {
        let file = self.folder.path().join("aegis.toml");
        fs::write(&file, config).unwrap();
        let mut command = serve(&self.store());
        command.arg("--config").arg(file);
        command
    }

    fn webhooks(&self, args: &[&str]) -> Ended {
        let mut command = aegis(&["webhooks"]);
        command.args(args).arg("--store").arg(self.store());
        run(command)
    }

    fn state(&self) -> Value {
        let json = self.webhooks(&["state", "--json"]).expect(0).json();
        json["endpoints"][0].clone()
    }

    fn until(&self, is: impl Fn(&Value) -> bool) {
        let begun = Instant::now();
        while !is(&self.state()) {
            assert!(begun.elapsed() < HANG, "{}", self.state());
        }
    }
}

fn config(receiver: &Receiver) -> String {
    let url = receiver.url();
    format!("[[webhook]]\nname = \"billing\"\nurl = \"{url}\"\nsecret = \"{SECRET}\"\n")
}

async fn approve(server: &Served, key: &str) {
    let reply = Call::post(server.addr, "approve", key).send().await;
    assert_eq!(reply.status, 202);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_delivers_what_its_configuration_says() {
    let receiver = Receiver::accepting().await;
    let place = Place::new();
    let file = place.folder.path().join("secrets");
    fs::write(&file, format!("whsec_{}\n{SECRET}\n", "A".repeat(32))).unwrap();
    let url = receiver.url();
    let server = Served::start(place.serve(&format!(
        "[serve]\npublic-url = \"https://aegis.example.com\"\n\
         [[webhook]]\nname = \"billing\"\nurl = \"{url}\"\nformat = \"standard\"\n\
         secret-file = \"{}\"\ntenants = [\"t\"]\nevents = [\"approved\"]\nfrom = \"oldest\"\n\
         [[webhook]]\nname = \"chat\"\nurl = \"{url}\"\nformat = \"slack\"\n\
         tenants = [\"nobody\"]\n",
        file.display()
    )));
    assert!(server.stderr().contains("can be read or written by others"));
    approve(&server, "k").await;
    receiver.until_accepted(1).await;
    let message = &receiver.received()[0];
    let verifier = standardwebhooks::Webhook::new(SECRET).unwrap();
    verifier
        .verify(message.body.as_bytes(), &message.headers)
        .unwrap();
    let text = place.webhooks(&["state"]).expect(0).stdout;
    assert!(text.contains("billing") && text.contains("chat") && text.contains("served"));
    server.stop().expect(0);
    let text = place.webhooks(&["state"]).expect(0).stdout;
    assert_eq!(text.matches("not served").count(), 2, "{text}");
    assert_eq!(receiver.received().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_sends_again_under_the_same_id() {
    let pid = Arc::new(AtomicU32::new(0));
    let victim = pid.clone();
    let receiver = Receiver::start(move |_| {
        // It gets the answer no more.
        match victim.swap(0, Ordering::SeqCst) {
            0 => {}
            pid => signal(pid, "KILL"),
        }
        Reply::Status(200)
    })
    .await;
    let place = Place::new();
    let server = Served::start(place.serve(&config(&receiver)));
    place.until(|state| state["held_until"].is_string());
    pid.store(server.pid(), Ordering::SeqCst);
    approve(&server, "k").await;
    receiver.until(|received| received.len() == 1).await;
    drop(server);
    let server = Served::start(place.serve(&config(&receiver)));
    receiver.until(|received| received.len() == 2).await;
    place.until(|state| state["behind"] == 0);
    server.stop().expect(0);
    let received = receiver.received();
    assert_eq!(received[0].id(), received[1].id());
    assert_eq!(received[0].json(), received[1].json());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_hangs_does_not_keep_the_server_alive() {
    let receiver = Receiver::start(|_| Reply::Hang).await;
    let place = Place::new();
    let mut command = place.serve(&config(&receiver));
    command.args(["--drain-timeout", "1"]);
    let server = Served::start(command);
    place.until(|state| state["held_until"].is_string());
    approve(&server, "k").await;
    receiver.until(|received| received.len() == 1).await;
    let begun = Instant::now();
    server.stop().expect(0);
    // A request may take 10 s.
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(place.state()["behind"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_endpoint_is_resumed_by_a_command() {
    let is_gone = Arc::new(AtomicBool::new(true));
    let gone = is_gone.clone();
    let receiver = Receiver::start(move |_| match gone.load(Ordering::SeqCst) {
        true => Reply::Status(410),
        false => Reply::Status(200),
    })
    .await;
    let place = Place::new();
    let server = Served::start(place.serve(&config(&receiver)));
    place.until(|state| state["held_until"].is_string());
    approve(&server, "k").await;
    place.until(|state| state["stopped_at"].is_string());
    let text = place.webhooks(&["state"]).expect(0).stdout;
    assert!(text.contains("stopped 2"), "{text}");
    assert!(
        server
            .line("is gone")
            .is_some_and(|line| line.contains("billing"))
    );
    is_gone.store(false, Ordering::SeqCst);
    place.webhooks(&["resume", "typo"]).expect(2);
    let resumed = place.webhooks(&["resume", "billing", "--json"]).expect(0);
    assert_eq!(resumed.json()["resumed"], true);
    let again = place.webhooks(&["resume", "billing"]).expect(0);
    assert!(again.stdout.contains("was not stopped"), "{again:?}");
    receiver.until_accepted(1).await;
    server.stop().expect(0);
}

/// Events that were given up for the endpoint.
async fn dead_letters(place: &Place, number: u64) {
    let store = SqliteStore::open(place.store()).unwrap();
    let holder = Uuid::new_v4();
    let lease = Duration::from_secs(60);
    let take = TakeEndpoint {
        endpoint: "billing".to_owned(),
        start: Start::Oldest,
        holder,
        lease,
    };
    store.take_endpoint(take).await.unwrap();
    for position in 1..=number {
        let decide = Decide {
            identity: Identity {
                tenant_id: "t".parse().unwrap(),
                thread_id: "h".parse().unwrap(),
                idempotency_key: format!("k-{position}").parse().unwrap(),
            },
            decision: Decision::Approve,
            call_id: None,
            payload: None,
            comment: None,
            actor: Actor::new("alice"),
            require_submission: false,
            allow_self_approval: true,
        };
        store.decide(decide).await.unwrap();
        for attempts in 1..=2 {
            let failed = DeliveryResult::Failed {
                attempts,
                wait: Duration::ZERO,
                failure: "status 500".to_owned(),
            };
            let mark = MarkDeliveries {
                endpoint: "billing".to_owned(),
                holder,
                lease,
                position,
                results: vec![(position, failed)],
                give_up_after: Duration::ZERO,
                stop: false,
            };
            store.mark_deliveries(mark).await.unwrap();
        }
    }
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_and_resent_by_commands() {
    let receiver = Receiver::accepting().await;
    let place = Place::new();
    dead_letters(&place, 3).await;
    let list = place
        .webhooks(&["list", "billing", "--json"])
        .expect(0)
        .json();
    let letters = list["dead_letters"].as_array().unwrap();
    assert_eq!(letters.len(), 3);
    assert_eq!(letters[0]["failure"], "status 500");
    assert_eq!(letters[0]["type"], "action.approved");
    assert_eq!(letters[0]["attempts"], 2);
    let event = |index: usize| letters[index]["event"].as_str().unwrap();
    let text = place.webhooks(&["list", "billing"]).expect(0).stdout;
    assert!(
        text.contains(event(0)) && text.contains("status 500"),
        "{text}"
    );
    let typo = place.webhooks(&["list", "biling"]).expect(2);
    assert!(typo.stderr.contains("'biling'"), "{typo:?}");
    place.webhooks(&["resend", "billing"]).expect(2);
    place.webhooks(&["resend", "biling", "--all"]).expect(2);
    place.webhooks(&["resend", "billing", "no-uuid"]).expect(2);
    let stranger = Uuid::new_v4().to_string();
    let partly = place
        .webhooks(&["resend", "billing", &stranger, event(0)])
        .expect(1);
    assert!(partly.stderr.contains("1 of 2"), "{partly:?}");

    let server = Served::start(place.serve(&config(&receiver)));
    receiver.until_accepted(1).await;
    assert_eq!(receiver.received()[0].id(), event(0));
    // Beside the server, which finds it by itself.
    let one = place
        .webhooks(&["resend", "billing", event(2), event(2), "--json"])
        .expect(0);
    assert_eq!(one.json()["resent"], 1);
    receiver.until_accepted(2).await;
    let all = place.webhooks(&["resend", "billing", "--all"]).expect(0);
    assert_eq!(all.stdout, "dead letters to be sent again: 1\n");
    receiver.until_accepted(3).await;
    place.until(|state| state["dead"] == 0 && state["parked"] == 0);
    server.stop().expect(0);
    run({
        let mut check = aegis(&["check"]);
        check.arg(place.store());
        check
    })
    .expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_delivers_to_a_receiver_with_a_private_ca() {
    let identity = Certified::new();
    let receiver = Receiver::accepting_by_tls(&identity).await;
    let place = Place::new();
    let (ca, _) = identity.write(place.folder.path());
    let url = receiver.https_url();
    let config = format!(
        "[[webhook]]\nname = \"billing\"\nurl = \"{url}\"\nsecret = \"{SECRET}\"\n\
         from = \"oldest\"\n"
    );
    let server = Served::start(place.serve(&config));
    approve(&server, "k").await;
    let said = server.line("a webhook was not delivered").unwrap();
    assert!(said.contains("the certificate is not trusted"), "{said}");
    server.stop().expect(0);
    assert!(receiver.received().is_empty());

    let server = Served::start(place.serve(&format!("{config}ca = {ca:?}\n")));
    receiver.until_accepted(1).await;
    place.until(|state| state["behind"] == 0 && state["parked"] == 0);
    server.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_ca_is_trusted_in_addition_to_the_platform() {
    let (identity, other) = (Certified::new(), Certified::new());
    let receiver = Receiver::accepting_by_tls(&identity).await;
    let place = Place::new();
    let (platform, _) = identity.write(place.folder.path());
    let private = place.folder.path().join("private.pem");
    fs::write(&private, &other.certificate).unwrap();
    let url = receiver.https_url();
    let mut command = place.serve(&format!(
        "[[webhook]]\nname = \"billing\"\nurl = \"{url}\"\nsecret = \"{SECRET}\"\n\
         from = \"oldest\"\nca = {private:?}\n"
    ));
    command.env("SSL_CERT_FILE", platform);
    let server = Served::start(command);
    approve(&server, "k").await;
    receiver.until_accepted(1).await;
    server.stop().expect(0);
}

/// The value of a line of the metrics.
async fn metric(server: &Served, series: &str) -> f64 {
    let text = Call::new(server.addr, "GET", "/metrics").send().await;
    let text = String::from_utf8(text.body.to_vec()).unwrap();
    let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    let found = lines.find(|(name, _)| *name == series);
    found
        .unwrap_or_else(|| panic!("no {series}: {text}"))
        .1
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_reads_the_webhooks_again() {
    let [old, new] = [Receiver::accepting().await, Receiver::accepting().await];
    let place = Place::new();
    let file = place.folder.path().join("aegis.toml");
    let server = Served::start(place.serve(&config(&old)));
    approve(&server, "k-1").await;
    old.until_accepted(1).await;

    fs::write(&file, config(&new)).unwrap();
    server.signal("HUP");
    let said = server.line("the webhooks were read again").unwrap();
    assert!(
        said.contains("INFO") && said.contains("1 endpoint"),
        "{said}"
    );
    server.line("the log filter was read again").unwrap();
    // The change takes effect a moment later.
    let mut sent = 1;
    while new.accepted().is_empty() {
        sent += 1;
        approve(&server, &format!("k-{sent}")).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    place.until(|state| state["behind"] == 0);
    assert_eq!(old.accepted().len() + new.accepted().len(), sent);
    let before = old.accepted().len();

    for (wrong, shown) in [
        (config(&old).repeat(2), "'billing' has the name of another"),
        (
            config(&old).replace("whsec_", "token"),
            "the secret is malformed",
        ),
        ("[[webhook]]\n".to_owned(), "missing field `name`"),
    ] {
        let before = metric(&server, "aegis_reload_failures_total").await;
        fs::write(&file, wrong).unwrap();
        server.signal("HUP");
        let said = server
            .line("the webhooks read before stay in force")
            .unwrap();
        assert!(said.contains("ERROR") && said.contains(shown), "{said}");
        let begun = Instant::now();
        while metric(&server, "aegis_reload_failures_total").await == before {
            assert!(begun.elapsed() < HANG);
        }
        let accepted = new.accepted().len();
        approve(
            &server,
            &format!("k-{shown}").replace([' ', '`', '\''], "-"),
        )
        .await;
        new.until_accepted(accepted + 1).await;
    }
    assert_eq!(old.accepted().len(), before);

    // Without an endpoint, nothing is delivered, and the metrics show none.
    fs::write(&file, "").unwrap();
    server.signal("HUP");
    let said = server.line("the webhooks were read again").unwrap();
    assert!(said.contains("0 endpoints"), "{said}");
    place.until(|state| state["held_until"].is_null());
    approve(&server, "k-last").await;
    let text = Call::new(server.addr, "GET", "/metrics").send().await;
    let text = String::from_utf8(text.body.to_vec()).unwrap();
    assert!(!text.contains("billing"), "{text}");
    assert_eq!(place.state()["behind"], 1);
    let ended = server.stop().expect(0);
    assert!(!ended.stderr.contains("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_left_the_file_is_forgotten_by_a_command() {
    let receiver = Receiver::accepting().await;
    let place = Place::new();
    let server = Served::start(place.serve(&config(&receiver)));
    approve(&server, "k").await;
    receiver.until_accepted(1).await;
    place.webhooks(&["forget", "typo"]).expect(2);
    let refused = place.webhooks(&["forget", "billing"]).expect(3);
    assert!(
        refused.stderr.contains("a server delivers to 'billing'"),
        "{refused:?}"
    );
    assert_eq!(place.state()["name"], "billing");

    fs::write(place.folder.path().join("aegis.toml"), "").unwrap();
    server.signal("HUP");
    place.until(|state| state["held_until"].is_null());
    let forgotten = place.webhooks(&["forget", "billing"]).expect(0);
    assert_eq!(forgotten.stdout, "'billing' is forgotten\n");
    assert!(place.state().is_null());
    server.stop().expect(0);

    // Without a server, as one that was killed leaves it.
    dead_letters(&place, 2).await;
    assert_eq!(place.state()["dead"], 2);
    let forgotten = place.webhooks(&["forget", "billing", "--json"]).expect(0);
    assert_eq!(forgotten.json()["forgotten"], true);
    assert!(place.state().is_null());
    run({
        let mut check = aegis(&["check"]);
        check.arg(place.store());
        check
    })
    .expect(0);
}

#[test]
fn a_wrong_endpoint_is_named_without_its_secrets() {
    let place = Place::new();
    let not_pem = place.folder.path().join("not.pem");
    fs::write(&not_pem, "hello").unwrap();
    let https = "url = \"https://127.0.0.1:1/token\"";
    let webhook = |rest: &str| format!("[[webhook]]\nname = \"billing\"\n{rest}\n");
    let url = "url = \"http://127.0.0.1:1/token\"";
    let secret = format!("secret = \"{SECRET}\"");
    for (config, shown) in [
        (webhook(url), "'billing': the endpoint has no secret"),
        (
            webhook(&format!("{url}\nsecret = \"whsec_token\"")),
            "'billing': the secret",
        ),
        (
            webhook(&format!("{url}\nsecret = \"token\"")),
            "'billing': the secret",
        ),
        (
            webhook(&format!("{url}\nsecret = []")),
            "'billing': the endpoint has no secret",
        ),
        (
            webhook(&format!("{url}\n{secret}\nsecret-file = \"f\"")),
            "'billing': both",
        ),
        (
            webhook(&format!("{url}\nsecret-file = \"/missing\"")),
            "'billing': cannot read",
        ),
        (
            webhook(&format!("{https}\n{secret}\nca = \"/missing.pem\"")),
            "'billing': ca: cannot read /missing.pem",
        ),
        (
            webhook(&format!("{https}\n{secret}\nca = \"/\"")),
            "'billing': ca: / is no regular file",
        ),
        (
            webhook(&format!("{https}\n{secret}\nca = {not_pem:?}")),
            "not.pem: the endpoint has no certificate",
        ),
        (
            webhook(&format!("{url}\n{secret}\nca = {not_pem:?}")),
            "allowed is https://",
        ),
        (
            webhook(&format!("{url}\n{secret}\nformat = \"ntfy\"")),
            "'billing': has a secret",
        ),
        (
            webhook(&format!("{url}\nformat = \"slack\"")),
            "'billing' is for notifications",
        ),
        (
            webhook(&format!("{url}\n{secret}\nevents = [\"decided\"]")),
            "'billing': ",
        ),
        (
            webhook(&format!("{url}\n{secret}\ntenants = [\"a b\"]")),
            "'billing': ",
        ),
        (
            webhook(&format!("{url}\n{secret}\ntenants = []")),
            "'billing': tenants is empty",
        ),
        (
            webhook(&format!("{url}\n{secret}\nevents = []")),
            "'billing': events is empty",
        ),
        (
            webhook(&format!("url = \"token\"\n{secret}")),
            "'billing': the endpoint has a URL",
        ),
        (
            webhook(&format!("{url}\n{secret}\nretries = 3")),
            "unknown field `retries`",
        ),
        (
            webhook(&format!("{url}\n{secret}\nformat = \"xml\"")),
            "`xml`",
        ),
        (
            webhook(&format!("{url}\n{secret}\nfrom = \"then\"")),
            "`then`",
        ),
        (
            webhook(&format!("{url}\n{secret}\n")).repeat(2),
            "'billing' has the name of another",
        ),
        (
            "[[webhook]]\nurl = \"http://h/\"".to_owned(),
            "missing field `name`",
        ),
        (
            "[serve]\npublic-url = \"aegis.example.com\"".to_owned(),
            "public-url",
        ),
    ] {
        let ended = run(place.serve(&config)).expect(2);
        assert!(ended.stderr.contains(shown), "{shown}: {ended:?}");
        for secret in ["token", &SECRET[6..]] {
            assert!(!ended.text().contains(secret), "{config}: {ended:?}");
        }
        assert!(!place.store().exists(), "{config}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_of_the_manual_verifies_what_the_server_sends() {
    let manual = include_str!("../../src/manual/operating.md");
    let example = manual.split("```python\n").nth(1).unwrap();
    let example = example.split("```").next().unwrap();
    let place = Place::new();
    let mut python = Command::new("python3");
    python.args([
        "-c",
        &example.replace("serve_forever()", "serve_forever(0.1)"),
    ]);
    // A port that was free a moment ago.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    python.env("PORT", address.port().to_string());
    python.env("WEBHOOK_SECRET", SECRET);
    let mut python = bound(&python);
    python
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null());
    let mut python = Process::start(python);
    let stdout = BufReader::new(python.stdout.take().unwrap());
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    let begun = Instant::now();
    while std::net::TcpStream::connect(address).is_err() {
        assert!(begun.elapsed() < HANG, "it does not listen");
    }
    let body = "{}";
    let forged = Call::new(address, "POST", "/")
        .header("webhook-id", "e-1")
        .header("webhook-timestamp", "1")
        .header("webhook-signature", "v1,x")
        .json(body);
    assert_eq!(forged.send().await.status, 401);
    let config =
        format!("[[webhook]]\nname = \"a\"\nurl = \"http://{address}/\"\nsecret = \"{SECRET}\"\n");
    let server = Served::start(place.serve(&config));
    place.until(|state| state["held_until"].is_string());
    approve(&server, "k").await;
    let line = lines.recv_timeout(HANG).unwrap();
    assert!(line.starts_with("action.approved 0"), "{line}");
    place.until(|state| state["behind"] == 0 && state["parked"] == 0);
    server.stop().expect(0);
}
