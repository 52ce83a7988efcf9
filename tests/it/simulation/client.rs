//! The clients: the real layers and services, over hyper-util's client on the simulated network.

use std::error::Error as StdError;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use aegis_hitl::layer::{
    AegisLayer, AttemptTimeout, Attempts, Backoff, Confirmation, Deadline, Delivery, HyperErrors,
    MaxRetries, RetryError, RetryLayer, TrackDelivery, TrackDeliveryLayer,
};
use aegis_hitl::protocol::{IDEMPOTENCY_KEY, TENANT_ID, THREAD_ID, X_REQUEST_ID};
use aegis_hitl::{
    Action, AegisService, Decision, Error, IdempotencyKey, Outcome, RequestId, TenantId, ThreadId,
};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::{Instant, timeout, timeout_at};
use tower::util::BoxCloneSyncService;
use tower::{Layer, Service, ServiceExt};

use super::network::{Endpoint, Network};
use super::world::{Asked, Told};

pub const TENANT: &str = "tenant";
const THREAD: &str = "thread";
// A name that the service answers for without keys.
const BASE: &str = "http://localhost";

type Hyper = legacy::Client<Connector, Full<Bytes>>;
type Failed = Box<dyn StdError + Send + Sync>;
/// The service over the simulated network.
pub type Aegis = AegisService<TrackDelivery<Resend, HyperErrors>>;
type Stack = BoxCloneSyncService<Request<Full<Bytes>>, Response<Incoming>, RetryError>;

/// Which of the crate's clients it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// `AegisService`.
    Service,
    /// `AegisLayer` over `TrackDeliveryLayer`.
    Layer,
    /// `RetryLayer` over `TrackDeliveryLayer`.
    Retry,
}

/// What a client is set to.
#[derive(Clone, Debug)]
pub struct Settings {
    pub flavour: Flavour,
    pub http2: bool,
    pub timeout: Duration,
    pub retries: u32,
    pub backoff: Vec<Duration>,
    pub seed: u64,
    /// Sends again below the layers what they send once, as no layer may.
    pub resends: bool,
}

/// What one call is limited to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub deadline: Option<Duration>,
}

impl Settings {
    /// When a call has to be over at the latest.
    pub fn bound(&self, limits: Limits) -> Duration {
        // The longest `Retry-After` that is waited for is longer than every backoff.
        let attempts = self.timeout * (self.retries + 1);
        let waits = Duration::from_secs(30) * self.retries;
        limits.deadline.unwrap_or(attempts + waits)
    }
}

/// A client of one host.
#[derive(Clone)]
pub struct Client {
    calls: Calls,
    settings: Settings,
}

#[derive(Clone)]
enum Calls {
    Service(Box<Aegis>),
    Stack(Stack),
}

impl Client {
    pub fn new(network: &Network, host: usize, settings: Settings) -> Self {
        let connector = Connector {
            network: network.clone(),
            host,
            // As `AegisService`'s own client has it.
            limit: settings.timeout / 2,
        };
        let hyper = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(5))
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .http2_keep_alive_interval(Duration::from_secs(10))
            .http2_keep_alive_timeout(Duration::from_secs(5))
            .http2_only(settings.http2)
            .build(connector);
        let hyper = Resend {
            inner: hyper,
            resends: settings.resends,
        };
        let tracked = TrackDeliveryLayer::hyper_util().layer(hyper);
        let backoff = Backoff::steps(settings.backoff.clone());
        let retry = RetryLayer::new()
            .attempt_timeout(settings.timeout)
            .max_retries(settings.retries)
            .backoff(backoff.clone())
            .budget(None)
            .seed(settings.seed);
        let calls = match settings.flavour {
            Flavour::Service => {
                let service = AegisService::builder()
                    .base_url(BASE)
                    .tenant_id(TENANT)
                    .thread_id(THREAD)
                    .timeout(settings.timeout)
                    .max_retries(settings.retries)
                    .backoff(backoff)
                    .budget(None)
                    .build_with(tracked);
                Calls::Service(Box::new(service.unwrap()))
            }
            Flavour::Layer => {
                let layer = AegisLayer::new()
                    .tenant(TenantId::new(TENANT).unwrap())
                    .thread(ThreadId::new(THREAD).unwrap())
                    .retry(retry);
                Calls::Stack(BoxCloneSyncService::new(layer.layer(tracked)))
            }
            Flavour::Retry => Calls::Stack(BoxCloneSyncService::new(retry.layer(tracked))),
        };
        Self { calls, settings }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The service of a client that is one.
    pub fn aegis(&self) -> &Aegis {
        let Calls::Service(service) = &self.calls else {
            unreachable!("the human loop goes by the service")
        };
        service
    }

    /// Asks for a decision.
    pub async fn decide(&self, asked: &Asked, payload: Option<&str>, limits: Limits) -> Told {
        match &self.calls {
            Calls::Service(service) => {
                let call = service
                    .execute(asked.decision, asked.key.as_str())
                    .call_id(asked.call.as_str());
                let call = match payload {
                    Some(text) => call.payload(&serde_json::json!({ "text": text })),
                    None => call,
                };
                let call = match limits.deadline {
                    Some(deadline) => call.deadline(deadline),
                    None => call,
                };
                match call.await {
                    Ok(receipt) => Told::OnRecord {
                        outcome: receipt.outcome(),
                        action: receipt.action().cloned().map(Box::new),
                        attempts: receipt.attempts(),
                    },
                    Err(error) => refused(&error),
                }
            }
            Calls::Stack(stack) => {
                let path = match asked.decision {
                    Decision::Approve => "/api/v1/hitl/approve",
                    Decision::Reject => "/api/v1/hitl/reject",
                };
                let body = payload.map_or("{}".to_owned(), |text| {
                    serde_json::json!({ "text": text }).to_string()
                });
                let mut request = self.request(path, &asked.call, body, limits);
                let key = IdempotencyKey::new(asked.key.as_str()).unwrap();
                match self.settings.flavour {
                    // The layer takes it from here.
                    Flavour::Layer => {
                        request.extensions_mut().insert(key);
                    }
                    _ => {
                        let headers = request.headers_mut();
                        headers.insert(IDEMPOTENCY_KEY, key.header_value());
                        headers.insert(TENANT_ID, HeaderValue::from_static(TENANT));
                        headers.insert(THREAD_ID, HeaderValue::from_static(THREAD));
                    }
                }
                let bound = Instant::now() + self.settings.bound(limits);
                let answer = stack.clone().oneshot(request).await;
                answered(answer, bound).await
            }
        }
    }

    /// Sends what may not be sent twice.
    pub async fn charge(&self, call: &str, limits: Limits) -> Result<StatusCode, Delivery> {
        let Calls::Stack(stack) = &self.calls else {
            unreachable!("a charge goes through the layers")
        };
        let request = self.request("/charge", call, "{\"amount\":1}".to_owned(), limits);
        match stack.clone().oneshot(request).await {
            Ok(response) => Ok(response.status()),
            Err(error) => Err(error.delivery()),
        }
    }

    fn request(
        &self,
        path: &str,
        call: &str,
        body: String,
        limits: Limits,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::from(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = format!("{BASE}{path}").parse().unwrap();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(X_REQUEST_ID, RequestId::new(call).unwrap().header_value());
        let extensions = request.extensions_mut();
        extensions.insert(Deadline(limits.deadline));
        extensions.insert(MaxRetries(self.settings.retries));
        extensions.insert(AttemptTimeout(Some(self.settings.timeout)));
        request
    }
}

/// What the answer to a decision tells those who have the layers only: 202 is accepted, and 409 a duplicate.
async fn answered(answer: Result<Response<Incoming>, RetryError>, bound: Instant) -> Told {
    let response = match answer {
        Ok(response) => response,
        Err(error) => {
            return Told::Refused {
                recorded: None,
                is_unknown: error.delivery() != Delivery::NeverSent,
                delivery: error.delivery(),
                attempts: error.attempts(),
                status: None,
                is_timeout: error.is_timeout(),
            };
        }
    };
    let attempts = Attempts::of(&response);
    let status = response.status();
    let outcome = match Confirmation::of(&response) {
        Some(Confirmation::Fresh) => Some(Outcome::Accepted),
        Some(Confirmation::Duplicate) => Some(Outcome::Duplicate),
        None if status == StatusCode::CONFLICT => Some(Outcome::Duplicate),
        None => None,
    };
    match outcome {
        Some(outcome) => {
            // The layers leave the body to the caller, and so does their deadline.
            let body = timeout_at(bound, response.into_body().collect()).await;
            let body = body.ok().and_then(Result::ok).map(|body| body.to_bytes());
            let action = body.filter(|_| outcome == Outcome::Accepted);
            let action = action.and_then(|body| serde_json::from_slice::<Action>(&body).ok());
            Told::OnRecord {
                outcome,
                action: action.map(Box::new),
                attempts,
            }
        }
        // A status is all that there is: no claim is made of what is on record.
        None => Told::Refused {
            recorded: None,
            is_unknown: true,
            delivery: Delivery::Answered,
            attempts,
            status: Some(status.as_u16()),
            is_timeout: false,
        },
    }
}

fn refused(error: &Error) -> Told {
    Told::Refused {
        recorded: error.recorded().cloned().map(Box::new),
        is_unknown: error.is_outcome_unknown(),
        delivery: error.delivery(),
        attempts: error.attempts(),
        status: error.status_code().map(|status| status.as_u16()),
        is_timeout: error.is_timeout(),
    }
}

/// hyper-util's client, which a faulty one may stand in for that sends again what failed.
#[derive(Clone)]
pub struct Resend {
    inner: Hyper,
    resends: bool,
}

impl Service<Request<Full<Bytes>>> for Resend {
    type Response = Response<Incoming>;
    type Error = legacy::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, legacy::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), legacy::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        if !self.resends {
            return Box::pin(self.inner.request(request));
        }
        let client = self.inner.clone();
        Box::pin(async move {
            let answer = client.request(request.clone()).await;
            match answer {
                Ok(answer) if answer.status().is_success() => Ok(answer),
                _ => client.request(request).await,
            }
        })
    }
}

/// Connects over the simulated network.
#[derive(Clone)]
struct Connector {
    network: Network,
    host: usize,
    limit: Duration,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Endpoint>;
    type Error = Failed;
    type Future = Pin<Box<dyn Future<Output = Result<TokioIo<Endpoint>, Failed>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self {
            network,
            host,
            limit,
        } = self.clone();
        Box::pin(async move {
            let connected = timeout(limit, network.connect(host)).await;
            let late = |_| io::Error::from(io::ErrorKind::TimedOut);
            Ok(TokioIo::new(connected.map_err(late)??))
        })
    }
}
