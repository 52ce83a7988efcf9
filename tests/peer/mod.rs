//! A scripted HTTP peer on a real socket that keeps what it was sent.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]
#![allow(dead_code)]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;

/// What the peer does with one request.
#[derive(Debug, Clone)]
pub enum Act {
    /// Answers with this status, these headers and this body.
    Answer(u16, Vec<(&'static str, String)>, String),
    /// Reads the request, then closes the connection without an answer.
    LoseReply,
    /// Never answers.
    Hang,
    /// Promises a long body and sends only its start.
    Truncate(u16),
}

pub fn answer(status: u16) -> Act {
    Act::Answer(status, Vec::new(), String::new())
}

pub fn answer_with(status: u16, body: serde_json::Value) -> Act {
    Act::Answer(status, Vec::new(), body.to_string())
}

pub fn answer_after(status: u16, retry_after: &str) -> Act {
    Act::Answer(
        status,
        vec![("retry-after", retry_after.to_owned())],
        String::new(),
    )
}

#[derive(Debug, Clone)]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

#[derive(Clone)]
pub struct Peer {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    script: Arc<Mutex<VecDeque<Act>>>,
    connections: Arc<AtomicUsize>,
}

impl Peer {
    /// Starts a peer that plays `script` and then repeats its last act.
    pub async fn start(script: impl IntoIterator<Item = Act>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener, script)
    }

    pub fn on(listener: TcpListener, script: impl IntoIterator<Item = Act>) -> Self {
        let peer = Self::new(listener.local_addr().unwrap(), script);
        let serving = peer.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                serving.serve(stream);
            }
        });
        peer
    }

    pub async fn start_tls(
        script: impl IntoIterator<Item = Act>,
        acceptor: tokio_rustls::TlsAcceptor,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = Self::new(listener.local_addr().unwrap(), script);
        let serving = peer.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                // A client that does not trust the certificate breaks off here.
                if let Ok(stream) = acceptor.accept(stream).await {
                    serving.serve(stream);
                }
            }
        });
        peer
    }

    fn new(address: SocketAddr, script: impl IntoIterator<Item = Act>) -> Self {
        Self {
            address,
            seen: Arc::default(),
            script: Arc::new(Mutex::new(script.into_iter().collect())),
            connections: Arc::default(),
        }
    }

    fn serve<I>(&self, stream: I)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.connections.fetch_add(1, Ordering::SeqCst);
        let peer = self.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| peer.clone().act(request));
            // Errors are what the script asks for.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }

    async fn act(self, request: Request<Incoming>) -> Result<Response<Body>, &'static str> {
        let (parts, body) = request.into_parts();
        let body = body
            .collect()
            .await
            .map_err(|_| "broken request")?
            .to_bytes();
        self.seen.lock().unwrap().push(Seen {
            method: parts.method,
            path: parts.uri.path().to_owned(),
            headers: parts.headers,
            body,
        });
        let act = {
            let mut script = self.script.lock().unwrap();
            if script.len() > 1 {
                script.pop_front().unwrap()
            } else {
                script[0].clone()
            }
        };
        match act {
            Act::Answer(status, headers, body) => {
                let mut response = Response::builder().status(status);
                for (name, value) in headers {
                    response = response.header(name, value);
                }
                Ok(response.body(Full::from(body).boxed_unsync()).unwrap())
            }
            Act::LoseReply => Err("the reply is lost"),
            Act::Hang => std::future::pending().await,
            Act::Truncate(status) => {
                let response = Response::builder()
                    .status(status)
                    .header("content-length", "1000");
                let frames = short_body();
                Ok(response.body(frames).unwrap())
            }
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

/// A body whose first bytes come, and which then ends short of its length, so that hyper closes the connection.
fn short_body() -> Body {
    struct Short {
        sent: bool,
        end: std::pin::Pin<Box<tokio::time::Sleep>>,
    }
    impl http_body::Body for Short {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
            if !std::mem::replace(&mut self.sent, true) {
                let start = Bytes::from_static(b"{\"request_id\":");
                return Poll::Ready(Some(Ok(http_body::Frame::data(start))));
            }
            // hyper writes the head and the start when the body is pending.
            self.end.as_mut().poll(cx).map(|()| None)
        }
    }
    Short {
        sent: false,
        end: Box::pin(tokio::time::sleep(Duration::from_millis(50))),
    }
    .boxed_unsync()
}

/// A port on which nothing listens.
pub async fn closed_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

pub const SHORT: Duration = Duration::from_millis(200);
