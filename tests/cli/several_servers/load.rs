//! Clients that ask for anything at any server, on actions that they share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use aegis_hitl::protocol::Digest;
use aegis_hitl::{Action, Decision, Payload};
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::checker::SLOT;
use super::history::{Asked, Attempt, State, Time, Told, ToldClaim, WallClock};
use super::wire::{name_of, wire, word};
use crate::support::HANG;
use crate::support::random::Random;
use crate::support::reference::{Request, Target, Token};

pub const TENANT: &str = "acme";
const THREAD: &str = "run-7";

/// The actions that clients choose from at a time.
const ACTIONS: usize = 16;

/// The calls that are made for each action.
const CALLS: usize = 40;

pub const SECOND: Time = 1_000_000;
const LONG: Time = 300 * SECOND;
const SHORT: Time = SECOND;

/// How long an action that expires may be decided.
const UNDECIDED: Time = 3 * SECOND / 2;

const TO: Target = Target {
    slot: SLOT,
    foreign: false,
};

/// What all clients know of one action, and what was said about it.
pub struct Subject {
    pub number: usize,
    /// The server's id, once somebody knows it.
    pub id: OnceLock<String>,
    expires: Option<Time>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// The tokens of its claims.
    tokens: BTreeMap<u64, String>,
    attempts: Vec<Attempt>,
}

impl Subject {
    fn new(number: usize, now: Time) -> Self {
        Self {
            number,
            id: OnceLock::new(),
            expires: (number % 6 == 5).then_some(now + UNDECIDED),
            known: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap()
    }

    pub fn attempts(&self) -> Vec<Attempt> {
        self.known().attempts.clone()
    }

    pub fn token(&self, fence: u64) -> String {
        self.known().tokens[&fence].clone()
    }

    pub fn tokens(&self) -> Vec<String> {
        self.known().tokens.values().cloned().collect()
    }

    pub fn key(&self) -> String {
        format!("key-{}", self.number)
    }

    /// Whether its claims are short.
    pub fn is_short(&self) -> bool {
        self.number % 4 == 1
    }

    fn lease(&self) -> Time {
        if self.is_short() { SHORT } else { LONG }
    }

    /// A payload of it by its number. The second is another one than everybody means.
    pub fn payload(&self, version: usize) -> Value {
        json!({ "number": self.number, "version": version })
    }

    pub fn digest(&self, version: usize) -> Digest {
        let text = self.payload(version).to_string();
        Digest::of(&Payload::from_json(&text).unwrap()).unwrap()
    }
}

/// All that the clients share.
pub struct Load {
    client: Client,
    servers: Vec<SocketAddr>,
    clock: WallClock,
    subjects: Mutex<Vec<Arc<Subject>>>,
    calls: AtomicUsize,
    is_over: AtomicBool,
    /// How many attempts were answered.
    answered: watch::Sender<usize>,
    wrong: Mutex<Vec<String>>,
}

impl Load {
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self {
            client: client(),
            servers,
            clock: WallClock::start(),
            subjects: Mutex::default(),
            calls: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            answered: watch::Sender::new(0),
            wrong: Mutex::default(),
        }
    }

    /// Waits until this many more attempts are answered.
    pub async fn answers(&self, more: usize) {
        let mut answered = self.answered.subscribe();
        let enough = *answered.borrow() + more;
        let reached = timeout(HANG, answered.wait_for(|count| *count >= enough)).await;
        reached.expect("the clients are not answered").unwrap();
    }

    pub fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// The actions that somebody asked about.
    pub fn subjects(&self) -> Vec<Arc<Subject>> {
        let subjects = self.subjects.lock().unwrap().clone();
        let asked = subjects.into_iter();
        asked
            .filter(|subject| !subject.known().attempts.is_empty())
            .collect()
    }

    /// What no model is needed for to see that it is wrong.
    pub fn wrong(&self) -> Vec<String> {
        self.wrong.lock().unwrap().clone()
    }

    fn is_wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    fn subject(&self, number: usize) -> Arc<Subject> {
        let mut subjects = self.subjects.lock().unwrap();
        while subjects.len() <= number {
            let subject = Subject::new(subjects.len(), self.clock.now());
            subjects.push(Arc::new(subject));
        }
        subjects[number].clone()
    }

    /// One call after the other, until it is over.
    pub async fn keep_asking(self: Arc<Self>, client: usize, mut random: Random) {
        while !self.is_over() {
            let call = self.calls.fetch_add(1, Ordering::SeqCst);
            let number = call / CALLS + random.below(ACTIONS as u64) as usize;
            let subject = self.subject(number);
            let asked = self.choose(&subject, call, &mut random);
            self.carry_out(client, &subject, &asked, &mut random).await;
        }
    }

    /// Chooses what to ask.
    fn choose(&self, subject: &Subject, call: usize, random: &mut Random) -> Asked {
        let call = Some(call);
        let version = usize::from(random.percent(2));
        let payload = (!subject.number.is_multiple_of(3)).then_some(version);
        let decision = if random.percent(85) {
            Decision::Approve
        } else {
            Decision::Reject
        };
        let choice = random.below(100);
        let is_submitted = subject.expires.is_none_or(|end| self.clock.now() < end);
        if choice < 10 && is_submitted {
            return Asked::Request(Request::Submit {
                slot: SLOT,
                call,
                payload,
                title: None,
                expires: subject.expires,
                allow_edit: false,
                actor: 0,
                only_existing: false,
            });
        }
        if choice < 25 || subject.id.get().is_none() {
            return Asked::Request(Request::Decide {
                slot: SLOT,
                decision,
                call,
                payload,
                comment: None,
                actor: 0,
                strict: false,
                self_approval: true,
            });
        }
        let fences: Vec<_> = subject.known().tokens.keys().copied().collect();
        let newest = fences.last().copied();
        let held = newest.map(|newest| match random.percent(75) {
            true => Token::Fence(newest),
            false => Token::Fence(random.pick(&fences)),
        });
        match (choice, held) {
            (25..40, _) => Asked::Request(Request::DecideById {
                to: TO,
                decision,
                call,
                digest: payload,
                edited: None,
                comment: None,
                actor: 0,
                self_approval: true,
            }),
            (40..42, _) => Asked::Request(Request::Cancel {
                to: TO,
                call,
                actor: 0,
                may_cancel_all: true,
            }),
            (60..66, Some(token)) => Asked::Request(Request::Renew {
                to: TO,
                token,
                lease: subject.lease(),
            }),
            (66..84, Some(token)) => Asked::Request(Request::Finish {
                to: TO,
                token,
                report: if random.percent(25) {
                    Ok(None)
                } else {
                    Err(None)
                },
                call,
                actor: 0,
            }),
            (84..92, _) => Asked::Status,
            (92.., _) => Asked::History,
            _ => Asked::Request(Request::Acquire {
                to: TO,
                digest: payload,
                lease: subject.lease(),
                call,
                actor: 0,
            }),
        }
    }

    /// Asks until there is an answer, mostly, always as the same call.
    async fn carry_out(
        &self,
        client: usize,
        subject: &Subject,
        asked: &Asked,
        random: &mut Random,
    ) {
        loop {
            let server = random.pick(&self.servers);
            let patience = random.millis(1000, 6000);
            match self.attempt(client, subject, asked, server, patience).await {
                Ended::Answered(_) => return,
                // Nobody serves there now.
                Ended::NeverSent => sleep(random.millis(20, 80)).await,
                Ended::Unknown if random.percent(15) => return,
                Ended::Unknown => sleep(random.millis(10, 200)).await,
            }
        }
    }

    /// Makes one attempt, and keeps what was told.
    pub async fn attempt(
        &self,
        client: usize,
        subject: &Subject,
        asked: &Asked,
        server: SocketAddr,
        patience: Duration,
    ) -> Ended {
        let request = self.request(server, subject, asked).timeout(patience);
        let sent = self.clock.now();
        let answering = async {
            let reply = request.send().await?;
            let (status, headers) = (reply.status().as_u16(), reply.headers().clone());
            Ok::<_, reqwest::Error>((status, headers, reply.bytes().await?))
        };
        let answered = answering.await;
        let at = self.clock.now();
        let mut attempt = Attempt {
            client,
            sent,
            asked: asked.clone(),
            told: None,
        };
        let (status, headers, body) = match answered {
            Ok(answer) if answer.0 < 500 => answer,
            Err(error) if error.is_connect() => return Ended::NeverSent,
            _ => {
                if matches!(asked, Asked::Request(_)) {
                    subject.known().attempts.push(attempt);
                }
                return Ended::Unknown;
            }
        };
        self.answered.send_modify(|count| *count += 1);
        let body: Value = serde_json::from_slice(&body).unwrap();
        let is_replayed = headers.contains_key("idempotency-replayed");
        let Some(word) = word(asked, status, is_replayed, &body) else {
            if !is_too_late(subject, status, at) {
                self.is_wrong(format!("{}: {asked}: {status} {body}", subject.key()));
            }
            return Ended::Answered(None);
        };
        let told = self.learn(subject, word, &body);
        let claim = matches!(word, "claimed" | "extended")
            || word == "replayed" && body.get("claim").is_some();
        if claim != told.claim.is_some() {
            self.is_wrong(format!("{}: {asked}: {status} {body}", subject.key()));
        }
        attempt.told = Some((at, told));
        subject.known().attempts.push(attempt);
        Ended::Answered(Some(body))
    }

    /// Reads an answer, and keeps the id and the token in it.
    fn learn(&self, subject: &Subject, word: &'static str, body: &Value) -> Told {
        let shown = if body.get("request_id").is_some() {
            Some(body)
        } else {
            body.get("action")
        };
        let action: Option<Action> =
            shown.map(|shown| serde_json::from_value(shown.clone()).unwrap());
        if let Some(action) = &action {
            let id = action.request_id.as_str();
            let first = subject.id.get_or_init(|| id.to_owned());
            if first != id {
                self.is_wrong(format!("{} is {first} and {id}", subject.key()));
            }
            let key = action.idempotency_key.as_ref().map(|key| key.as_str());
            if key.is_some_and(|key| key != subject.key()) {
                self.is_wrong(format!("{} was answered by {key:?}", subject.key()));
            }
        }
        let claim = body.get("claim").map(|claim| {
            let fence = claim["fence"].as_u64().unwrap();
            let token = claim["token"].as_str().unwrap();
            let mut known = subject.known();
            let first = known
                .tokens
                .entry(fence)
                .or_insert_with(|| token.to_owned());
            if first != token {
                self.is_wrong(format!("{} has two claims {fence}", subject.key()));
            }
            let until: jiff::Timestamp = claim["expires_at"].as_str().unwrap().parse().unwrap();
            let until = until.as_microsecond();
            ToldClaim { fence, until }
        });
        let history = action.as_ref().and_then(|action| action.history.as_ref());
        Told {
            word,
            state: action.as_ref().map(|action| State {
                status: action.status,
                decision: action.decision,
                closed: action.closed,
                execution: action.execution,
            }),
            claim,
            kinds: history.map(|events| events.iter().map(|event| event.kind).collect()),
        }
    }

    fn request(&self, server: SocketAddr, subject: &Subject, asked: &Asked) -> RequestBuilder {
        let wire = wire(subject, asked);
        let url = format!("http://{server}/api/v1/hitl/{}", wire.path);
        let mut request = self
            .client
            .request(wire.method, url)
            .header("Tenant-Id", TENANT);
        if wire.is_keyed {
            request = request
                .header("Thread-Id", THREAD)
                .header("Idempotency-Key", subject.key());
        }
        if let Some(call) = wire.call {
            request = request.header("X-Request-Id", name_of(call));
        }
        match wire.body {
            Some(body) => request
                .header("Content-Type", "application/json")
                .body(body.to_string()),
            None => request,
        }
    }
}

/// How an attempt ended. An answer has its body, unless it is not of the model.
#[derive(Debug)]
pub enum Ended {
    Answered(Option<Value>),
    Unknown,
    NeverSent,
}

/// A client that sends each request once.
pub fn client() -> Client {
    Client::builder()
        .retry(reqwest::retry::never())
        .timeout(HANG)
        .build()
        .unwrap()
}

/// An action whose time to decide is over can no longer be submitted with that time.
fn is_too_late(subject: &Subject, status: u16, at: Time) -> bool {
    status == 400 && subject.expires.is_some_and(|end| end <= at)
}
