//! Clients: one over hyper, and one that writes bytes.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::HANG;

/// A request on a connection of its own.
#[derive(Clone)]
pub struct Call {
    addr: SocketAddr,
    request: Request<Bytes>,
    host: String,
    http2: bool,
}

impl Call {
    pub fn new(addr: SocketAddr, method: &str, path: impl Into<String>) -> Self {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{addr}{}", path.into()))
            .body(Bytes::new())
            .unwrap();
        Self {
            addr,
            request,
            host: addr.to_string(),
            http2: false,
        }
    }

    /// A `POST /hitl/{action}` of tenant `t`, thread `h` with the key.
    pub fn post(addr: SocketAddr, action: &str, key: &str) -> Self {
        Self::new(addr, "POST", format!("/api/v1/hitl/{action}"))
            .header("Tenant-Id", "t")
            .header("Thread-Id", "h")
            .header("Idempotency-Key", key)
    }

    /// Names another host than the address: in the `Host` header, or over HTTP/2 as the `:authority`.
    pub fn host(mut self, host: &str) -> Self {
        self.host = host.to_owned();
        self
    }

    /// Sets a header, or adds a second one.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        let value = HeaderValue::from_bytes(value.as_ref()).unwrap();
        self.request.headers_mut().append(name, value);
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.request.headers_mut().remove(name).unwrap();
        self
    }

    pub fn method(mut self, method: &str) -> Self {
        *self.request.method_mut() = method.parse().unwrap();
        self
    }

    /// Sets a body, declared as JSON.
    pub fn json(self, body: impl Into<Bytes>) -> Self {
        self.body(body).header("Content-Type", "application/json")
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        *self.request.body_mut() = body.into();
        self
    }

    /// Asks over HTTP/2, with prior knowledge.
    pub fn http2(mut self) -> Self {
        self.http2 = true;
        self
    }

    pub async fn send(self) -> Reply {
        timeout(HANG, self.try_send()).await.unwrap().unwrap()
    }

    pub async fn try_send(self) -> Result<Reply, hyper::Error> {
        let stream = TcpStream::connect(self.addr).await.unwrap();
        self.send_over("http", stream).await
    }

    /// Sends the request over a connection that is already open.
    pub async fn send_over(
        self,
        scheme: &str,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Reply, hyper::Error> {
        let io = TokioIo::new(stream);
        let (parts, body) = self.request.into_parts();
        let mut request = Request::from_parts(parts, Full::new(body));
        let response = if self.http2 {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            let path = request.uri().path_and_query().unwrap();
            *request.uri_mut() = format!("{scheme}://{}{path}", self.host).parse().unwrap();
            sender.send_request(request).await?
        } else {
            let host = HeaderValue::from_str(&self.host).unwrap();
            request.headers_mut().insert("host", host);
            let path = request.uri().path_and_query().unwrap().clone();
            *request.uri_mut() = path.into();
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
            tokio::spawn(connection);
            sender.send_request(request).await?
        };
        let (parts, body) = response.into_parts();
        Ok(Reply {
            status: parts.status.as_u16(),
            headers: parts.headers,
            body: body.collect().await?.to_bytes(),
        })
    }
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// A member of the body, as text.
    pub fn text(&self, member: &str) -> String {
        self.json()[member].as_str().unwrap_or_default().to_owned()
    }

    /// The id of the action in the body.
    pub fn request_id(&self) -> String {
        self.text("request_id")
    }

    /// Everything but the time of day.
    pub fn without_date(&self) -> (u16, Vec<(String, String)>, Bytes) {
        let mut headers: Vec<_> = self
            .headers
            .iter()
            .filter(|(name, _)| *name != "date")
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        headers.sort();
        (self.status, headers, self.body.clone())
    }
}

/// Sends bytes and reads until the server closes the connection.
pub async fn raw(addr: SocketAddr, bytes: impl AsRef<[u8]>) -> String {
    raw_until_closed(addr, bytes).await.0
}

/// Sends bytes, reads until the server closes the connection, and says how long that took.
pub async fn raw_until_closed(addr: SocketAddr, bytes: impl AsRef<[u8]>) -> (String, Duration) {
    let since = std::time::Instant::now();
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let mut answer = Vec::new();
    let (mut reader, mut writer) = stream.split();
    // A server may answer and close before it has read everything: reading goes on beside the writing.
    let write = async { _ = writer.write_all(bytes.as_ref()).await };
    let read = async { _ = reader.read_to_end(&mut answer).await };
    timeout(HANG, async { tokio::join!(write, read) })
        .await
        .expect("the server closes the connection");
    (
        String::from_utf8_lossy(&answer).into_owned(),
        since.elapsed(),
    )
}

/// Reads text until it ends so, or the other side closes.
pub async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = String::new();
    let read = async {
        while !text.ends_with(end) {
            let mut bytes = [0; 4096];
            match stream.read(&mut bytes).await.unwrap() {
                0 => break,
                len => text.push_str(std::str::from_utf8(&bytes[..len]).unwrap()),
            }
        }
    };
    timeout(HANG, read).await.unwrap();
    text
}
