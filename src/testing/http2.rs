//! The peer on HTTP/2, close enough to the frames to refuse streams and to go away.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::State;
use super::act::{Answer, Ending, Kind};

pub(super) async fn serve<I>(io: I, state: Arc<State>)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let io = Shared(Arc::new(Mutex::new(io)));
    let Ok(mut connection) = h2::server::handshake(io.clone()).await else {
        return;
    };
    let closing = Arc::new(Notify::new());
    let leaving = Arc::new(Notify::new());
    // Dropped with the connection, which ends hanging streams.
    let mut streams = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            () = leaving.notified() => {
                connection.graceful_shutdown();
                continue;
            }
            () = closing.notified() => return,
        };
        let Some(Ok((request, respond))) = accepted else {
            return;
        };
        let stream = Exchange {
            io: io.clone(),
            state: state.clone(),
            closing: closing.clone(),
            leaving: leaving.clone(),
        };
        streams.spawn(stream.run(request, respond));
    }
}

struct Exchange<I> {
    io: Shared<I>,
    state: Arc<State>,
    closing: Arc<Notify>,
    leaving: Arc<Notify>,
}

impl<I> Exchange<I>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    async fn run(mut self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let (parts, mut body) = request.into_parts();
        let (entry, act) = self.state.arrived(parts);
        if !act.early {
            while let Some(data) = body.data().await {
                let Ok(data) = data else { return };
                let _ = body.flow_control().release_capacity(data.len());
                self.state.received(entry, &data);
            }
        }
        if !act.delay.is_zero() {
            tokio::time::sleep(act.delay).await;
        }
        // Whatever fails from here on fails because the client is gone.
        match act.kind {
            Kind::Answer(answer) => {
                if answer.last {
                    self.leaving.notify_one();
                }
                let _ = answer_with(*answer, &mut respond).await;
            }
            Kind::LoseReply => {
                self.closing.notify_one();
                std::future::pending().await
            }
            Kind::Hang => std::future::pending().await,
            Kind::ResetStream { code } => respond.send_reset(Reason::from(code)),
            Kind::GoAway { covers, code } => {
                let stream = respond.stream_id().as_u32();
                // A client's streams have odd numbers.
                let last = if covers { stream } else { stream - 1 };
                let _ = self.io.write_all(&go_away(last, code)).await;
                let _ = self.io.flush().await;
                if covers {
                    self.closing.notify_one();
                }
                std::future::pending().await
            }
        }
    }
}

async fn answer_with(answer: Answer, respond: &mut SendResponse<Bytes>) -> Result<(), h2::Error> {
    let mut head = Response::new(());
    *head.status_mut() = answer.status;
    *head.headers_mut() = answer.headers;
    let bare = answer.body.is_empty()
        && answer.trailers.is_empty()
        && matches!(answer.ending, Ending::AtOnce);
    let mut body = respond.send_response(head, bare)?;
    if bare {
        return Ok(());
    }
    if let Ending::Late(delay) = answer.ending {
        tokio::time::sleep(delay).await;
    }
    let ends = matches!(answer.ending, Ending::AtOnce | Ending::Late(_));
    body.send_data(answer.body, ends && answer.trailers.is_empty())?;
    match answer.ending {
        Ending::AtOnce | Ending::Late(_) if answer.trailers.is_empty() => {}
        Ending::AtOnce | Ending::Late(_) => body.send_trailers(answer.trailers)?,
        Ending::Never => std::future::pending().await,
        Ending::BreaksOff => {
            // A reset drops frames that are still queued.
            tokio::time::sleep(super::FLUSH).await;
            body.send_reset(Reason::INTERNAL_ERROR);
        }
    }
    Ok(())
}

/// A `GOAWAY` frame (RFC 9113, section 6.8). h2 only announces last stream ids that cover all
/// streams it has seen.
fn go_away(last_stream_id: u32, code: u32) -> Vec<u8> {
    const HEAD: [u8; 9] = [0, 0, 8, 7, 0, 0, 0, 0, 0];
    let mut frame = HEAD.to_vec();
    frame.extend_from_slice(&last_stream_id.to_be_bytes());
    frame.extend_from_slice(&code.to_be_bytes());
    frame
}

/// A connection on which frames can be written beside h2, between h2's own.
struct Shared<I>(Arc<Mutex<I>>);

impl<I> Clone for Shared<I> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<I> Shared<I> {
    fn lock(&self) -> MutexGuard<'_, I> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Shared<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_read(cx, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Shared<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.lock()).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_shutdown(cx)
    }
}
