//! A receiver of webhooks, which does what its test says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use super::HANG;
use super::raw::Raw;
use super::tls::Certified;

/// A message that arrived, whatever became of it.
#[derive(Debug, Clone)]
pub struct Received {
    /// The connection that it came on.
    pub connection: usize,
    pub path: String,
    pub headers: HeaderMap,
    pub body: String,
    pub at: Instant,
    /// What it was answered.
    pub reply: Reply,
}

impl Received {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    pub fn id(&self) -> &str {
        self.header("webhook-id")
    }

    /// The idempotency key of the action.
    pub fn key(&self) -> String {
        let json = self.json();
        let key = json["data"]["action"]["idempotency_key"].as_str();
        key.unwrap().to_owned()
    }

    /// What happened, without `action.`.
    pub fn kind(&self) -> String {
        let json = self.json();
        json["type"].as_str().unwrap()["action.".len()..].to_owned()
    }
}

/// What a receiver does with a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Status(u16),
    /// A status with a header.
    With(u16, &'static str, String),
    /// Says nothing, and keeps the connection open.
    Hang,
    /// Closes the connection without an answer.
    Close,
    /// 200, and closes in the middle of the body.
    Cut,
    /// 200 with a body that never ends.
    Endless,
}

type Handler = dyn Fn(&Received) -> Reply + Send + Sync;

/// A server on a loopback port.
pub struct Receiver {
    raw: Raw,
    shared: Arc<Shared>,
}

struct Shared {
    handler: Box<Handler>,
    received: Mutex<Vec<Received>>,
    arrived: Notify,
}

impl Receiver {
    pub async fn start(handler: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Self {
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            received: Mutex::default(),
            arrived: Notify::new(),
        });
        let serving = shared.clone();
        let raw = Raw::start(move |number, stream| serve(serving.clone(), number, stream)).await;
        Self { raw, shared }
    }

    /// Takes everything, by https.
    pub async fn accepting_by_tls(identity: &Certified) -> Self {
        let shared = Arc::new(Shared {
            handler: Box::new(|_| Reply::Status(204)),
            received: Mutex::default(),
            arrived: Notify::new(),
        });
        let (serving, acceptor) = (shared.clone(), identity.acceptor());
        let raw = Raw::start(move |number, stream| {
            let (serving, acceptor) = (serving.clone(), acceptor.clone());
            async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(serving, number, stream).await;
                }
            }
        });
        Self {
            raw: raw.await,
            shared,
        }
    }

    /// The URL of a receiver that speaks TLS.
    pub fn https_url(&self) -> String {
        format!("https://localhost:{}/hook", self.raw.address.port())
    }

    /// Takes everything.
    pub async fn accepting() -> Self {
        Self::start(|_| Reply::Status(204)).await
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.raw.address)
    }

    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().unwrap().clone()
    }

    /// What was accepted, in the order in which it came.
    pub fn accepted(&self) -> Vec<Received> {
        let mut received = self.received();
        received.retain(|message| match message.reply {
            Reply::Status(status) => (200..300).contains(&status),
            Reply::With(..) | Reply::Hang | Reply::Close => false,
            Reply::Cut | Reply::Endless => true,
        });
        received
    }

    /// Waits until what was received has what is looked for.
    pub async fn until(&self, has: impl Fn(&[Received]) -> bool) {
        let wait = async {
            loop {
                let arrived = self.shared.arrived.notified();
                if has(&self.received()) {
                    return;
                }
                arrived.await;
            }
        };
        if tokio::time::timeout(HANG, wait).await.is_err() {
            panic!("not received: {:#?}", self.received());
        }
    }

    /// Waits until this many different events were accepted.
    pub async fn until_accepted(&self, events: usize) {
        self.until(|_| {
            let accepted = self.accepted();
            let ids: std::collections::HashSet<_> = accepted
                .iter()
                .map(|message| message.id().to_owned())
                .collect();
            ids.len() >= events
        })
        .await;
    }

    /// The kinds of events that were accepted of each action, without repetitions.
    pub fn histories(&self) -> HashMap<String, Vec<String>> {
        let mut ids = std::collections::HashSet::new();
        let mut histories: HashMap<String, Vec<String>> = HashMap::new();
        for message in self.accepted() {
            if ids.insert(message.id().to_owned()) {
                histories
                    .entry(message.key())
                    .or_default()
                    .push(message.kind());
            }
        }
        histories
    }
}

async fn serve(
    shared: Arc<Shared>,
    connection: usize,
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
) {
    let mut bytes = Vec::new();
    loop {
        let Some(mut message) = read(&mut stream, &mut bytes, connection).await else {
            return;
        };
        let reply = (shared.handler)(&message);
        message.reply = reply.clone();
        shared.received.lock().unwrap().push(message);
        shared.arrived.notify_one();
        let answer = match &reply {
            Reply::Status(status) => format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n"),
            Reply::With(status, name, value) => {
                format!("HTTP/1.1 {status} X\r\n{name}: {value}\r\ncontent-length: 2\r\n\r\nno")
            }
            Reply::Close => return,
            Reply::Hang => {
                let _ = stream.read_u8().await;
                return;
            }
            Reply::Cut => "HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\nab".to_owned(),
            Reply::Endless => "HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
        };
        if stream.write_all(answer.as_bytes()).await.is_err() || reply == Reply::Cut {
            return;
        }
        if reply == Reply::Endless {
            while stream.write_all(b"8\r\n12345678\r\n").await.is_ok() {}
            return;
        }
    }
}

async fn read(
    stream: &mut (impl AsyncRead + Unpin),
    bytes: &mut Vec<u8>,
    connection: usize,
) -> Option<Received> {
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8(bytes[..head].to_vec()).unwrap();
    let mut lines = text.lines();
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers: HeaderMap = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            (name, HeaderValue::from_str(value).unwrap())
        })
        .collect();
    let length: usize = headers["content-length"].to_str().unwrap().parse().unwrap();
    while bytes.len() < head + length {
        if stream.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
    }
    let body = String::from_utf8(bytes[head..head + length].to_vec()).unwrap();
    bytes.drain(..head + length);
    Some(Received {
        connection,
        path,
        headers,
        body,
        at: Instant::now(),
        reply: Reply::Close,
    })
}
