//! A load generator: kept HTTP/1.1 connections with one request at a time on each. It does as
//! little work per request as possible.

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::latency::Sample;

/// The keys of the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    /// A new key for each request: every answer is a new decision.
    New,
    /// The same few keys again and again: after the first round every answer is a 409.
    Repeated,
}

/// The number of keys that each connection repeats.
const REPEATED: usize = 50;

pub(crate) const BODY: &[u8] = br#"{"payload":{"to":"a@b.c","amount":12.5,"currency":"EUR"}}"#;

struct Connection {
    stream: TcpStream,
    request: Vec<u8>,
    /// The offsets of the key and the request id in the request.
    key: usize,
    id: usize,
    answer: Vec<u8>,
    repeated: Vec<Uuid>,
    next: usize,
}

impl Connection {
    async fn open(address: SocketAddr, number: usize, keys: Keys) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut request = Vec::new();
        let blank = Uuid::nil().hyphenated();
        write!(
            request,
            "POST /api/v1/hitl/approve HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
             accept: application/json\r\ntenant-id: acme\r\nthread-id: run-{number:04}\r\nidempotency-key: "
        )
        .unwrap();
        let key = request.len();
        write!(request, "{blank}\r\nx-request-id: ").unwrap();
        let id = request.len();
        write!(request, "{blank}\r\ncontent-length: {}\r\n\r\n", BODY.len()).unwrap();
        request.extend_from_slice(BODY);
        let repeated = match keys {
            Keys::New => Vec::new(),
            Keys::Repeated => (0..REPEATED).map(|_| Uuid::new_v4()).collect(),
        };
        Self {
            stream,
            request,
            key,
            id,
            answer: Vec::with_capacity(4096),
            repeated,
            next: 0,
        }
    }

    /// Sends one request, and returns the status of the answer.
    async fn ask(&mut self) -> u16 {
        let key = match self.repeated.get(self.next % REPEATED) {
            Some(key) => *key,
            None => Uuid::new_v4(),
        };
        self.next += 1;
        for (at, uuid) in [(self.key, key), (self.id, Uuid::now_v7())] {
            let place = &mut self.request[at..at + Hyphenated::LENGTH];
            uuid.hyphenated().encode_lower(place);
        }
        self.stream.write_all(&self.request).await.unwrap();
        self.answer.clear();
        loop {
            let read = self.stream.read_buf(&mut self.answer).await.unwrap();
            assert!(read > 0, "the server closed the connection");
            if let Some(status) = status_of_whole(&self.answer) {
                return status;
            }
        }
    }
}

/// The status of an answer, once all of it has arrived.
fn status_of_whole(answer: &[u8]) -> Option<u16> {
    const LENGTH: &[u8] = b"\r\ncontent-length: ";
    let head = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let at = answer[..head]
        .windows(LENGTH.len())
        .position(|window| window == LENGTH)
        .expect("an answer without a length");
    let digits = answer[at + LENGTH.len()..].iter();
    let length = digits
        .take_while(|byte| byte.is_ascii_digit())
        .fold(0, |length, digit| length * 10 + usize::from(digit - b'0'));
    if answer.len() < head + 4 + length {
        return None;
    }
    std::str::from_utf8(&answer[9..12]).unwrap().parse().ok()
}

/// Generates load for `time`.
pub(crate) async fn run(
    address: SocketAddr,
    connections: usize,
    keys: Keys,
    time: Duration,
) -> Sample {
    // All connections open at once, because the server may close one that idles while others open.
    let opening: Vec<_> = (0..connections)
        .map(|number| {
            tokio::spawn(async move {
                let mut connection = Connection::open(address, number, keys).await;
                for _ in 0..connection.repeated.len() {
                    assert_eq!(connection.ask().await, 202);
                }
                connection
            })
        })
        .collect();
    let mut open = Vec::new();
    for connection in opening {
        open.push(connection.await.unwrap());
    }
    let expected = match keys {
        Keys::New => 202,
        Keys::Repeated => 409,
    };
    let begun = Instant::now();
    let tasks: Vec<_> = open
        .into_iter()
        .map(|mut connection| {
            tokio::spawn(async move {
                let mut latencies = Vec::with_capacity(1 << 14);
                let mut now = begun;
                while now.duration_since(begun) < time {
                    assert_eq!(connection.ask().await, expected);
                    let done = Instant::now();
                    latencies.push(done.duration_since(now).as_nanos() as u32);
                    now = done;
                }
                latencies
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    Sample::of(all, begun.elapsed())
}
