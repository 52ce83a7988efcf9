//! Reads a failed response to its end, so that its connection can be reused.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Buf;
use http_body::Body;

/// Reads what is available of a body. Returns whether there is nothing more to wait for: the end,
/// an error, or the bound was reached.
pub(super) fn is_drained<R: Body>(
    mut body: Pin<&mut R>,
    left: &mut usize,
    cx: &mut Context<'_>,
) -> bool {
    loop {
        if body.is_end_stream() {
            return true;
        }
        match body.as_mut().poll_frame(cx) {
            Poll::Pending => return false,
            Poll::Ready(None | Some(Err(_))) => return true,
            Poll::Ready(Some(Ok(frame))) => {
                // An empty frame counts as well: any number of them may be ready.
                let length = frame.data_ref().map_or(0, Buf::remaining).max(1);
                match left.checked_sub(length) {
                    Some(rest) => *left = rest,
                    None => return true,
                }
            }
        }
    }
}
