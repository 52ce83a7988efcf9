//! Peers that write their bytes by hand, so that they can say what no HTTP library lets them say.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// A peer that is a function of the number of the connection and its stream.
pub struct Raw {
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Raw {
    pub async fn start<F, Fut>(serve: F) -> Self
    where
        F: Fn(usize, TcpStream) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = connections.clone();
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                open.spawn(serve(counter.fetch_add(1, Ordering::SeqCst), stream));
            }
        });
        Self {
            address,
            connections,
            task: task.abort_handle(),
        }
    }

    /// Reads one request on each connection, writes these bytes and closes.
    pub async fn says(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes: Arc<[u8]> = bytes.into().into();
        Self::start(move |_, mut stream| {
            let bytes = bytes.clone();
            async move {
                if read_request(&mut stream).await.is_some() {
                    let _ = stream.write_all(&bytes).await;
                    let _ = stream.shutdown().await;
                    // Until the client has closed too, so that nothing of the answer is reset away.
                    let _ = stream.read(&mut [0; 1]).await;
                }
            }
        })
        .await
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn count(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Reads a request of HTTP/1.1 with a `Content-Length` or none. `None` if it broke off.
pub async fn read_request(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
        .unwrap_or(0_usize);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((head, body))
}

/// The bytes of an answer of HTTP/1.1 behind its version.
pub fn head(rest: &str) -> Vec<u8> {
    format!("HTTP/1.1 {rest}").into_bytes()
}

/// The bytes of an answer with this body and its length.
pub fn sized(status: &str, body: &[u8]) -> Vec<u8> {
    let mut answer = head(&format!(
        "{status}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    ));
    answer.extend_from_slice(body);
    answer
}
