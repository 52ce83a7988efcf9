//! HTTP/2 by hand, so that it can misbehave: a client, and the frames of a server.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::HANG;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// `SETTINGS_INITIAL_WINDOW_SIZE`: how much of each answer the server may send at once.
const INITIAL_WINDOW: u16 = 4;

/// A frame as the other side sent it.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Reads a whole frame; `None` if the stream ends.
    pub async fn read(stream: &mut TcpStream) -> Option<Self> {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.ok()?;
        let len = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload).await.ok()?;
        Some(Self {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
            payload,
        })
    }
}

/// The bytes of a frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A head with this status, uncompressed.
pub fn status(code: &str) -> Vec<u8> {
    let mut block = vec![0x08, 3];
    block.extend_from_slice(code.as_bytes());
    block
}

/// A connection that is alive, as it acknowledges settings and answers pings, whatever else it does.
pub struct H2 {
    stream: TcpStream,
    next: u32,
}

impl H2 {
    /// Connects, and lets the server send this many bytes of each answer.
    pub async fn connect(addr: SocketAddr, window: u32) -> Self {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .unwrap();
        let mut h2 = Self { stream, next: 1 };
        let mut settings = INITIAL_WINDOW.to_be_bytes().to_vec();
        settings.extend(window.to_be_bytes());
        h2.write(SETTINGS, 0, 0, &settings).await;
        h2
    }

    /// A connection that has had an answer, and is kept.
    pub async fn kept(addr: SocketAddr) -> Self {
        let mut client = Self::connect(addr, 65_535).await;
        client.get("/livez", &[]).await;
        client.until(DATA).await;
        client
    }

    /// Writes a frame. A server that is gone already is seen when the next one is read.
    pub async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        _ = self
            .stream
            .write_all(&frame(kind, flags, stream, payload))
            .await;
    }

    /// Sends a whole `GET` and returns its stream.
    pub async fn get(&mut self, path: &str, headers: &[(&str, &str)]) -> u32 {
        self.begin(END_STREAM | END_HEADERS, path, headers).await
    }

    /// Sends the headers of a `GET` with these flags and returns its stream.
    pub async fn begin(&mut self, flags: u8, path: &str, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        // `:method: GET` and `:scheme: http`, then literals that are not indexed.
        let mut block = vec![0x82, 0x86, 0x04];
        text(&mut block, path);
        block.push(0x01);
        text(&mut block, "h");
        for (name, value) in headers {
            block.push(0);
            text(&mut block, name);
            text(&mut block, value);
        }
        self.write(HEADERS, flags, id, &block).await;
        id
    }

    /// Reads the next frame that is not about the connection's upkeep; `None` once the server has closed.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            let frame = Frame::read(&mut self.stream).await?;
            match frame.kind {
                SETTINGS if frame.flags & ACK == 0 => self.write(SETTINGS, ACK, 0, &[]).await,
                PING if frame.flags & ACK == 0 => {
                    self.write(PING, ACK, 0, &frame.payload).await;
                }
                SETTINGS | PING => {}
                _ => return Some(frame),
            }
        }
    }

    /// Reads until a frame of this kind, which must come.
    pub async fn until(&mut self, kind: u8) -> Frame {
        let read = async {
            loop {
                let frame = self.next().await.expect("the connection is open");
                if frame.kind == kind {
                    return frame;
                }
            }
        };
        timeout(HANG, read).await.unwrap()
    }

    /// Reads until the server closes, and returns the kinds of the frames before that.
    pub async fn until_closed(&mut self, within: Duration) -> Vec<u8> {
        let mut kinds = Vec::new();
        let read = async {
            while let Some(frame) = self.next().await {
                kinds.push(frame.kind);
            }
        };
        let closed = timeout(within, read).await.is_ok();
        assert!(closed, "the server does not close; it sent {kinds:?}");
        kinds
    }
}

/// A string of HPACK, without Huffman's code.
fn text(block: &mut Vec<u8>, text: &str) {
    block.push(u8::try_from(text.len()).unwrap());
    assert!(text.len() < 127);
    block.extend(text.as_bytes());
}
