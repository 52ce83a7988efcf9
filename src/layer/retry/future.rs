//! The future of a call: its attempts and the states between them.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::time::Sleep;
use tower_service::Service;

use super::call::Call;
use super::drain::is_drained;
use super::kept::{Kept, KeptHeaders};
use super::timer::poll_timer;
use super::{AttemptOutcome, Attempts, NotRetried, Replay, RetryError};
use crate::layer::ResponseHead;

pin_project! {
    /// The future of [`Retry`](super::Retry) and of [`Aegis`](crate::layer::Aegis).
    #[must_use = "futures do nothing unless polled"]
    pub struct RetryFuture<S, B, R>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        state: State<S::Future, R>,
        // What the state waits for besides its own future; see `State`.
        #[pin]
        timer: Option<Sleep>,
        call: Call,
        // Everything needed for further attempts. These three are fields rather than a struct,
        // which would be moved once more on its way here.
        service: Option<S>,
        kept: Kept<B>,
        headers: KeptHeaders,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, R> {
        // An attempt is in progress. The timer is its timeout or the deadline, whichever comes
        // first, and starts when the attempt first has to wait.
        Attempt { #[pin] attempt: F },
        // A failed response is being read to its end. The timer is the limit on time.
        Drain { #[pin] body: R, left: usize },
        // The next attempt is not due yet. The timer is its due time.
        Wait,
        // The service is being polled ready. The timer is the deadline, if there is one.
        Ready,
    }
}

impl<S, B, R> RetryFuture<S, B, R>
where
    S: Service<Request<B>>,
{
    /// Starts a call with its first attempt. Inlined, so that the parts are built in place.
    #[inline(always)]
    pub(super) fn new(
        call: Call,
        attempt: S::Future,
        service: Option<S>,
        kept: Kept<B>,
        headers: KeptHeaders,
    ) -> Self {
        Self {
            state: State::Attempt { attempt },
            timer: None,
            call,
            service,
            kept,
            headers,
        }
    }
}

impl<S, B, R> fmt::Debug for RetryFuture<S, B, R>
where
    S: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryFuture")
            .field("attempts", &self.call.attempts)
            .field("max_retries", &self.call.max_retries)
            .finish_non_exhaustive()
    }
}

impl<S, B, R> Future for RetryFuture<S, B, R>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Replay,
    R: Body,
{
    type Output = Result<Response<R>, RetryError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Attempt { attempt } => {
                    let polled = {
                        let _scope = this.call.track.enter();
                        attempt.poll(cx)
                    };
                    match polled {
                        Poll::Ready(Ok(mut response)) => {
                            this.timer.set(None);
                            this.call.answered_after(Attempts::earlier(&response));
                            let outcome = AttemptOutcome::Answered(ResponseHead::of(&response));
                            match this.call.next(this.kept, &outcome) {
                                Ok(()) => this.state.set(State::Drain {
                                    body: response.into_body(),
                                    left: this.call.policy.drain_bytes,
                                }),
                                Err(reason) => {
                                    this.call.end(this.kept, &mut response, reason);
                                    return Poll::Ready(Ok(response));
                                }
                            }
                        }
                        Poll::Ready(Err(error)) => {
                            this.timer.set(None);
                            let error = error.into();
                            match this.call.next(this.kept, &AttemptOutcome::Failed(&*error)) {
                                Ok(()) => this.state.set(State::Wait),
                                Err(reason) => {
                                    let report =
                                        this.call.report(this.kept, this.headers, Some(reason));
                                    return Poll::Ready(Err(RetryError::failed(error, report)));
                                }
                            }
                        }
                        Poll::Pending => {
                            ready!(poll_attempt_timer(this.timer.as_mut(), this.call, cx));
                            let call = &mut *this.call;
                            if call.is_past_deadline() {
                                call.cut(this.kept);
                                let error = past_deadline(call, this.kept, this.headers);
                                return Poll::Ready(Err(error));
                            }
                            match call.next(this.kept, &AttemptOutcome::TimedOut) {
                                Ok(()) => {
                                    this.timer.set(None);
                                    // Drops the attempt, which cancels it.
                                    this.state.set(State::Wait);
                                }
                                Err(reason) => {
                                    let after = call.attempt_timeout.unwrap_or_default();
                                    let report = call.report(this.kept, this.headers, Some(reason));
                                    return Poll::Ready(Err(RetryError::attempt_timed_out(
                                        after, report,
                                    )));
                                }
                            }
                        }
                    }
                }
                StateProj::Drain { body, left } => {
                    if !is_drained(body, left, cx) {
                        let call = &*this.call;
                        ready!(poll_timer(this.timer.as_mut(), cx, || {
                            call.no_later_than_deadline(call.policy.drain_time)
                        }));
                    }
                    this.timer.set(None);
                    this.state.set(State::Wait);
                }
                StateProj::Wait => {
                    // A zero wait does not touch the timer.
                    if !this.call.wait.is_zero() {
                        let due = this.call.due;
                        ready!(poll_timer(this.timer.as_mut(), cx, || due));
                    }
                    this.timer.set(None);
                    this.state.set(State::Ready);
                }
                StateProj::Ready => {
                    // Without this, attempts that fail at once and do not wait would all run in one
                    // poll.
                    ready!(pin!(tokio::task::consume_budget()).poll(cx));
                    let call = &mut *this.call;
                    if call.is_past_deadline() {
                        let error = past_deadline(call, this.kept, this.headers);
                        return Poll::Ready(Err(error));
                    }
                    let service = this.service.as_mut();
                    match service.map_or(Poll::Ready(Ok(())), |service| service.poll_ready(cx)) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => {
                            let report = call.report(this.kept, this.headers, None);
                            return Poll::Ready(Err(RetryError::failed(error.into(), report)));
                        }
                        Poll::Pending => {
                            let deadline = call.deadline;
                            ready!(poll_timer(this.timer.as_mut(), cx, || deadline));
                            let error = past_deadline(call, this.kept, this.headers);
                            return Poll::Ready(Err(error));
                        }
                    }
                    let (Some(service), Some(body)) = (this.service.as_mut(), this.kept.body())
                    else {
                        // A leftover of an earlier attempt has read on, past what is kept of the
                        // body.
                        let report = call.report(this.kept, this.headers, Some(NotRetried::Body));
                        let error = "the request body cannot be sent again any more";
                        return Poll::Ready(Err(RetryError::failed(error.into(), report)));
                    };
                    let mut request = this.kept.request(this.headers, body);
                    this.timer.set(None);
                    call.begin_again(&mut request);
                    let attempt = {
                        let _scope = call.track.enter();
                        service.call(request)
                    };
                    this.state.set(State::Attempt { attempt });
                }
            }
        }
    }
}

fn past_deadline<B>(call: &mut Call, kept: &Kept<B>, headers: &KeptHeaders) -> RetryError {
    RetryError::deadline_exceeded(call.report(kept, headers, Some(NotRetried::Deadline)))
}

/// Waits for the attempt's timeout or the deadline, whichever comes first.
fn poll_attempt_timer(
    timer: Pin<&mut Option<Sleep>>,
    call: &Call,
    cx: &mut Context<'_>,
) -> Poll<()> {
    poll_timer(timer, cx, || match call.attempt_timeout {
        Some(timeout) => call.no_later_than_deadline(timeout),
        None => call.deadline,
    })
}
