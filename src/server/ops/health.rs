//! `GET /livez`, `GET /readyz` and `GET /metrics`, outside the prefix.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::Either;
use http::request::Parts;
use http::{Method, Request, StatusCode, Version};
use http_body::Body;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tower_service::Service;

use crate::protocol::X_REQUEST_ID;
use crate::server::api::shutting_down;
use crate::server::http::headers;
use crate::server::http::response;
use crate::server::http::{Arrival, Holder, Rejection, RequestBody, Response, head};
use crate::server::ops::scrape::Scraper;
use crate::server::service::{HitlService, ResponseFuture};
use crate::store::Store;

/// How long the store may take to complete the write of a check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a successful check remains valid. Each check costs a write, and anyone can request one.
const CHECK_AGE: Duration = Duration::from_secs(1);

/// What an address is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Everything. With API keys, metrics have an address of their own.
    Service,
    /// Metrics, and whether the process is alive.
    Metrics,
}

/// Serves a [`HitlService`], the two health endpoints, and metrics.
pub(crate) struct WithHealth<St> {
    service: HitlService<St>,
    purpose: Purpose,
    arrival: Arrival,
    shared: Arc<Shared>,
}

/// What all connections share.
#[derive(Debug, Default)]
struct Shared {
    last_success: Mutex<Option<Instant>>,
    /// The number of connections so far.
    connections: AtomicU64,
    scraper: Scraper,
}

impl<St: Store> WithHealth<St> {
    /// Makes the service of a listener. `arrival` is what its requests have in common.
    pub(crate) fn new(service: HitlService<St>, arrival: Arrival) -> Self {
        Self {
            service,
            purpose: Purpose::Service,
            arrival,
            shared: Arc::default(),
        }
    }

    /// Returns the service of the address for metrics.
    pub(crate) fn for_metrics(&self) -> Self {
        Self {
            purpose: Purpose::Metrics,
            ..self.clone()
        }
    }

    /// Returns a service for the connection of a client.
    pub(crate) fn for_peer(&self, peer: Option<IpAddr>) -> Self {
        let mut this = self.clone();
        this.arrival.peer = peer;
        let number = self.shared.connections.fetch_add(1, Ordering::Relaxed);
        this.arrival.connection = Some(number);
        this
    }
}

impl<St> Clone for WithHealth<St> {
    fn clone(&self) -> Self {
        Self {
            service: self.service.clone(),
            purpose: self.purpose,
            arrival: self.arrival,
            shared: Arc::clone(&self.shared),
        }
    }
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
}

const OK: Health = Health { status: "ok" };

#[derive(Clone, Copy)]
enum Probe {
    Liveness,
    Readiness,
    Metrics,
    /// There is nothing at this path.
    Nothing,
}

impl<St: Store> WithHealth<St> {
    async fn probe(self, probe: Probe, parts: Parts) -> Response {
        let ok = || response::json(StatusCode::OK, &OK);
        let result = match probe {
            Probe::Nothing => Err(Rejection::not_found("there is no such path")),
            _ if parts.method != Method::GET && parts.method != Method::HEAD => {
                Err(Rejection::method("GET, HEAD"))
            }
            Probe::Liveness => Ok(ok()),
            Probe::Readiness => self.readiness(&parts).await.map(|()| ok()),
            Probe::Metrics => {
                // A scraper may call its own address by any name.
                let arrival = Some(self.arrival).filter(|_| self.purpose == Purpose::Service);
                let api = self.service.api();
                self.shared.scraper.answer(api, &parts, arrival).await
            }
        };
        let mut response = result.unwrap_or_else(Rejection::into_response);
        if parts.method == Method::HEAD {
            response::without_body(&mut response);
        }
        response
    }

    async fn readiness(&self, parts: &Parts) -> Result<(), Rejection> {
        let api = self.service.api();
        api.admit(parts, self.arrival)?;
        if api.drain.has_started() {
            return Err(shutting_down());
        }
        let check = async {
            // One check runs at a time. Those that wait for the lock reuse its result if it was
            // successful.
            let mut last_success = self.shared.last_success.lock().await;
            if last_success.is_some_and(|at| at.elapsed() < CHECK_AGE) {
                return Ok(());
            }
            api.store.check().await?;
            api.store_answers();
            *last_success = Some(Instant::now());
            Ok(())
        };
        match timeout(CHECK_TIMEOUT, check).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                api.store_failed(&error);
                Err(Rejection::unavailable("the store takes no writes"))
            }
            Err(_) => {
                api.store_is_late(CHECK_TIMEOUT);
                Err(Rejection::unavailable(format!(
                    "the store took no write within {CHECK_TIMEOUT:?}"
                )))
            }
        }
    }
}

/// Responds to a malformed request and closes its connection: the bytes that follow may not be a
/// request.
async fn reject<B: Body>(rejection: Rejection, parts: &Parts, body: B) -> Response {
    let body = pin!(body);
    RequestBody::new(body, &parts.headers, Holder::default())
        .discard()
        .await;
    let mut response = rejection.into_response();
    // HTTP/2 frames each stream, so other requests on the connection are intact.
    if parts.version < Version::HTTP_2 {
        response::close_after(&mut response);
    }
    if let Some(call_id) = headers::call_id_to_echo(&parts.headers) {
        response.headers_mut().insert(X_REQUEST_ID, call_id);
    }
    if parts.method == Method::HEAD {
        response::without_body(&mut response);
    }
    response
}

impl<St, B> Service<Request<B>> for WithHealth<St>
where
    St: Store,
    B: Body + Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future =
        Either<ResponseFuture, Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (parts, body) = request.into_parts();
        if let Err(rejection) = head::check(&parts) {
            return Either::Right(Box::pin(async move {
                Ok(reject(rejection, &parts, body).await)
            }));
        }
        let request = Request::from_parts(parts, body);
        let probe = match (request.uri().path(), self.purpose) {
            ("/livez" | "/livez/", _) => Probe::Liveness,
            ("/readyz" | "/readyz/", Purpose::Service) => Probe::Readiness,
            ("/metrics" | "/metrics/", Purpose::Metrics) => Probe::Metrics,
            ("/metrics" | "/metrics/", Purpose::Service)
                if self.service.auth().trusts_tenant_header() =>
            {
                Probe::Metrics
            }
            (_, Purpose::Metrics) => Probe::Nothing,
            (_, Purpose::Service) => {
                return Either::Left(self.service.respond(request, self.arrival));
            }
        };
        let this = self.clone();
        let (parts, _) = request.into_parts();
        Either::Right(Box::pin(async move { Ok(this.probe(probe, parts).await) }))
    }
}
