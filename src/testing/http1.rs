//! The peer on HTTP/1.1.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Sleep;

use super::State;
use super::act::{Answer, Ending, Kind};

/// An error makes hyper close the connection without an answer, or without the rest of one.
type Break = &'static str;

pub(super) async fn serve<I>(io: I, state: Arc<State>)
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(|request| exchange(request, state.clone()));
    // The script asks for errors.
    let _ = http1::Builder::new()
        .serve_connection(TokioIo::new(io), service)
        .await;
}

async fn exchange(
    request: Request<Incoming>,
    state: Arc<State>,
) -> Result<Response<ActBody>, Break> {
    let (parts, mut body) = request.into_parts();
    let (entry, act) = state.arrived(parts);
    if !act.early {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| "the request broke off")?;
            if let Ok(data) = frame.into_data() {
                state.received(entry, &data);
            }
        }
    }
    if !act.delay.is_zero() {
        tokio::time::sleep(act.delay).await;
    }
    match act.kind {
        Kind::Answer(answer) => Ok(response(*answer)),
        Kind::LoseReply => Err("the reply is lost"),
        Kind::Hang => std::future::pending().await,
        Kind::ResetStream { .. } | Kind::GoAway { .. } => {
            let mut response = Response::new(ActBody::new(
                Bytes::from_static(b"the script needs HTTP/2"),
                Ending::AtOnce,
            ));
            *response.status_mut() = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
            Ok(response)
        }
    }
}

fn response(answer: Answer) -> Response<ActBody> {
    let mut response = Response::new(ActBody::new(answer.body, answer.ending));
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    if answer.last {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    response
}

/// The time for hyper to write what it has before the body breaks off.
const FLUSH: Duration = Duration::from_millis(20);

struct ActBody {
    data: Option<Bytes>,
    before: Option<Pin<Box<Sleep>>>,
    ending: Ending,
    flush: Option<Pin<Box<Sleep>>>,
}

impl ActBody {
    fn new(data: Bytes, ending: Ending) -> Self {
        Self {
            data: Some(data).filter(|data| !data.is_empty()),
            before: match ending {
                Ending::Late(delay) => Some(Box::pin(tokio::time::sleep(delay))),
                _ => None,
            },
            ending,
            flush: None,
        }
    }
}

impl Body for ActBody {
    type Data = Bytes;
    type Error = Break;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Break>>> {
        if let Some(before) = &mut self.before {
            std::task::ready!(before.as_mut().poll(cx));
            self.before = None;
        }
        if let Some(data) = self.data.take() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        match self.ending {
            Ending::AtOnce | Ending::Late(_) => Poll::Ready(None),
            Ending::Never => Poll::Pending,
            Ending::BreaksOff => self
                .flush
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(FLUSH)))
                .as_mut()
                .poll(cx)
                .map(|()| Some(Err("the answer breaks off"))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.ending, Ending::AtOnce) && self.data.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match self.ending {
            Ending::AtOnce => {
                SizeHint::with_exact(self.data.as_ref().map_or(0, |data| data.len() as u64))
            }
            _ => SizeHint::default(),
        }
    }
}
