//! A proxy before PostgreSQL that cuts a connection exactly at a commit.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Mutex;

/// What happens at the next commit of a transaction that changes actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The commit never arrives, and the server sees the end of the connection.
    Before,
    /// The commit arrives, and its answer does not.
    After,
    /// The client sees the end of the connection first, and the commit arrives a second later.
    Late,
}

/// A proxy on a port of its own.
pub struct Proxy {
    pub port: u16,
    armed: Arc<Mutex<Option<Cut>>>,
    cuts: Arc<AtomicUsize>,
}

impl Proxy {
    /// Starts a proxy before the server with this socket.
    pub async fn start(socket: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let armed = Arc::new(Mutex::new(None));
        let cuts = Arc::new(AtomicUsize::new(0));
        let (of_task, counter) = (armed.clone(), cuts.clone());
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = UnixStream::connect(&socket).await.unwrap();
                tokio::spawn(pass(client, server, of_task.clone(), counter.clone()));
            }
        });
        Self { port, armed, cuts }
    }

    pub async fn arm(&self, cut: Cut) {
        *self.armed.lock().await = Some(cut);
    }

    /// The number of connections that were cut.
    pub fn cuts(&self) -> usize {
        self.cuts.load(Ordering::SeqCst)
    }

    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres://aegis@127.0.0.1:{}/{database}?sslmode=disable",
            self.port
        )
    }
}

async fn pass(
    client: TcpStream,
    server: UnixStream,
    armed: Arc<Mutex<Option<Cut>>>,
    cuts: Arc<AtomicUsize>,
) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut answers = tokio::spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match from_server.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(read) if to_client.write_all(&buffer[..read]).await.is_ok() => {}
                Ok(_) => break,
            }
        }
    });
    // The first message has no type.
    let mut is_first = true;
    let mut changes_actions = false;
    loop {
        let mut message = Vec::new();
        if !is_first {
            let Ok(kind) = from_client.read_u8().await else {
                break;
            };
            message.push(kind);
        }
        let Ok(length) = from_client.read_u32().await else {
            break;
        };
        let mut rest = vec![0; length as usize - 4];
        if from_client.read_exact(&mut rest).await.is_err() {
            break;
        }
        message.extend(length.to_be_bytes());
        message.extend(&rest);
        let has = |text: &[u8]| rest.windows(text.len()).any(|part| part == text);
        if message[0] == b'P' && !is_first && (has(b"aegis_insert(") || has(b"UPDATE action ")) {
            changes_actions = true;
        }
        let is_commit = message[0] == b'Q' && !is_first && has(b"COMMIT");
        is_first = false;
        let cut = if is_commit && std::mem::take(&mut changes_actions) {
            armed.lock().await.take()
        } else {
            None
        };
        if cut.is_some() {
            answers.abort();
            let _ = (&mut answers).await;
            cuts.fetch_add(1, Ordering::SeqCst);
        }
        match cut {
            None if to_server.write_all(&message).await.is_ok() => continue,
            None | Some(Cut::Before) => {}
            Some(Cut::After) => {
                to_server.write_all(&message).await.unwrap();
                // Long enough for it to be carried out; a test that is slower only sees another order.
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Some(Cut::Late) => {
                drop(from_client);
                tokio::time::sleep(Duration::from_secs(1)).await;
                to_server.write_all(&message).await.unwrap();
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        return;
    }
}
