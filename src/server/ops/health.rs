//! `GET /livez` and `GET /readyz`, beside the endpoints and outside the prefix.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::Either;
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tower_service::Service;

use crate::protocol::X_REQUEST_ID;
use crate::server::api::shutting_down;
use crate::server::http::headers as request;
use crate::server::http::response as answer;
use crate::server::http::{Answer, Refusal, ResponseBody, Upload, head};
use crate::server::service::{HitlService, ResponseFuture};
use crate::store::Store;

/// How long the store may take to show that it takes a write.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a good check stands, as each one costs a write and anyone may ask.
const CHECK_AGE: Duration = Duration::from_secs(1);

/// A [`HitlService`] with the two health checks beside it.
pub(crate) struct WithHealth<St> {
    service: HitlService<St>,
    /// The address that is listened on.
    address: IpAddr,
    last_good: Arc<Mutex<Option<Instant>>>,
}

impl<St: Store> WithHealth<St> {
    pub(crate) fn new(service: HitlService<St>, address: IpAddr) -> Self {
        Self {
            service,
            address,
            last_good: Arc::default(),
        }
    }
}

impl<St> Clone for WithHealth<St> {
    fn clone(&self) -> Self {
        Self {
            service: self.service.clone(),
            address: self.address,
            last_good: Arc::clone(&self.last_good),
        }
    }
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
}

const GOOD: Health = Health { status: "ok" };

#[derive(Clone, Copy)]
enum Check {
    Live,
    Ready,
}

impl<St: Store> WithHealth<St> {
    async fn check(self, check: Check, parts: Parts) -> Answer {
        let result = match check {
            _ if parts.method != Method::GET && parts.method != Method::HEAD => {
                Err(Refusal::method("GET, HEAD"))
            }
            Check::Live => Ok(()),
            Check::Ready => self.ready(&parts).await,
        };
        let mut answer = match result {
            Ok(()) => answer::success(StatusCode::OK, &GOOD),
            Err(refusal) => refusal.into_answer(),
        };
        if parts.method == Method::HEAD {
            answer::without_body(&mut answer);
        }
        answer
    }

    async fn ready(&self, parts: &Parts) -> Result<(), Refusal> {
        let shared = self.service.shared();
        shared.admit(parts, Some(self.address))?;
        if shared.drain.has_started() {
            return Err(shutting_down());
        }
        let check = async {
            // One at a time: those who wait take the result of the one before them, if it is good.
            let mut last_good = self.last_good.lock().await;
            if last_good.is_some_and(|at| at.elapsed() < CHECK_AGE) {
                return Ok(());
            }
            shared.store.check().await?;
            shared.store_answers();
            *last_good = Some(Instant::now());
            Ok(())
        };
        match timeout(CHECK_TIMEOUT, check).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                shared.store_failed(&error);
                Err(Refusal::unavailable("the store takes no writes"))
            }
            Err(_) => {
                shared.store_is_late(CHECK_TIMEOUT);
                Err(Refusal::unavailable(format!(
                    "the store took no write within {CHECK_TIMEOUT:?}"
                )))
            }
        }
    }
}

/// Answers a request that is none, and ends its connection: what follows may be no request either.
async fn refuse<B: Body>(refusal: Refusal, parts: &Parts, body: B) -> Answer {
    let body = pin!(body);
    Upload::new(body, &parts.headers).discard().await;
    let mut answer = refusal.into_answer();
    // HTTP/2 has streams, and what follows on another one is a request.
    if parts.version < Version::HTTP_2 {
        answer::close_after(&mut answer);
    }
    if let Some(call_id) = request::echo(&parts.headers) {
        answer.headers_mut().insert(X_REQUEST_ID, call_id);
    }
    if parts.method == Method::HEAD {
        answer::without_body(&mut answer);
    }
    answer
}

impl<St, B> Service<Request<B>> for WithHealth<St>
where
    St: Store,
    B: Body + Send + 'static,
{
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = Either<
        ResponseFuture,
        Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Infallible>> + Send>>,
    >;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (parts, body) = request.into_parts();
        if let Err(refusal) = head::check(&parts) {
            return Either::Right(Box::pin(
                async move { Ok(refuse(refusal, &parts, body).await) },
            ));
        }
        let request = Request::from_parts(parts, body);
        let check = match request.uri().path() {
            "/livez" | "/livez/" => Check::Live,
            "/readyz" | "/readyz/" => Check::Ready,
            _ => return Either::Left(self.service.answer(request, Some(self.address))),
        };
        let this = self.clone();
        let (parts, _) = request.into_parts();
        Either::Right(Box::pin(async move { Ok(this.check(check, parts).await) }))
    }
}
