//! reqwest's client as a tower service of HTTP requests.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use ::reqwest::redirect::Policy;
use ::reqwest::{Body, Client, ClientBuilder, Error, Request, Response, retry};
use bytes::Bytes;
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::layer::{Exchange, Failure, judge_hyper};

/// reqwest's client as a tower service of HTTP requests, for the layers to stack on.
///
/// Make it from a `ClientBuilder`: [`from_builder`](Self::from_builder) switches off what reqwest
/// would do by itself between the layers and the network:
///
/// - *Redirects.* They would send the idempotency key and the tenant to whatever address a response
///   names, and let reqwest call more than one server within one attempt.
/// - *Retries.* The layers do not see them, so attempts would multiply. By default reqwest retries
///   what it believes was refused by the protocol. This includes every request on a connection that
///   goes away (`GOAWAY`), although hyper cannot always tell whether that request was processed.
///
/// One call is then one request, and a connect error proves that the request was never sent. The
/// retry layer sends it again whatever its method.
///
#[cfg_attr(feature = "test-util", doc = "```")]
#[cfg_attr(not(feature = "test-util"), doc = "```ignore")]
/// use aegis_hitl::adapter::ReqwestClient;
/// use aegis_hitl::layer::AegisLayer;
/// # use aegis_hitl::testing::{Act, Peer};
/// use bytes::Bytes;
/// use http::Request;
/// use http_body_util::Full;
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let peer = Peer::start([Act::answer(201)]).await;
/// # let url = peer.url();
/// let client = ReqwestClient::from_builder(reqwest::Client::builder().user_agent("agent/1.0"))?;
/// let service = ServiceBuilder::new()
///     .layer(AegisLayer::new().mint_idempotency_key())
///     .service(client);
///
/// let request = Request::post(url).body(Full::<Bytes>::from("{}"))?;
/// let response = service.oneshot(request).await?;
/// assert_eq!(response.status(), 201);
/// // All that reqwest can do with a response.
/// let text = reqwest::Response::from(response).text().await?;
/// # assert_eq!(text, "");
/// # Ok(())
/// # }
/// ```
///
/// Bodies pass through without a copy of their bytes. An error of a request's body arrives in
/// words. A timeout set on reqwest's client limits an attempt and its response's body;
/// [`RetryLayer::attempt_timeout`](crate::layer::RetryLayer::attempt_timeout) limits the time until
/// the response's head. Set `connect_timeout`: a request whose connect times out was never sent,
/// one whose attempt times out may have been.
#[derive(Clone)]
pub struct ReqwestClient {
    client: Client,
    /// Whether one call is one request, so that a connect error covers all of it.
    single: bool,
}

impl ReqwestClient {
    /// Builds a client without redirects and retries of its own; see [`ReqwestClient`].
    ///
    /// # Errors
    ///
    /// If reqwest cannot build the client.
    pub fn from_builder(builder: ClientBuilder) -> Result<Self, Error> {
        let client = builder
            .redirect(Policy::none())
            .retry(retry::never())
            .build()?;
        Ok(Self {
            client,
            single: true,
        })
    }
}

/// Wraps a client as configured, with its redirects and retries.
///
/// A connect can then fail on the way to the second server after a first one has acted. No error
/// proves that a request was never sent, and a request that is not safe to repeat is sent once. Use
/// [`ReqwestClient::from_builder`] if the configuration is yours.
impl From<Client> for ReqwestClient {
    fn from(client: Client) -> Self {
        Self {
            client,
            single: false,
        }
    }
}

impl fmt::Debug for ReqwestClient {
    // reqwest's own `Debug` shows the default headers, which may contain credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestClient").finish_non_exhaustive()
    }
}

impl<B> Service<http::Request<B>> for ReqwestClient
where
    B: http_body::Body<Data: Into<Bytes>> + Send + Sync + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Response = http::Response<Body>;
    type Error = ReqwestError;
    type Future = ReqwestFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // reqwest queues, so it is always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let exchange = Exchange::begin();
        let single = self.single;
        let request = request.map(|body| Body::wrap(Untyped { body }));
        let state = match Request::try_from(request) {
            Ok(request) => State::Sent {
                attempt: Service::call(&mut self.client, request),
            },
            Err(error) => State::Invalid { error: Some(error) },
        };
        ReqwestFuture {
            state,
            // Nothing is ever proven about a client that may send more than once.
            exchange: Some(exchange).filter(|_| single),
        }
    }
}

pin_project! {
    /// The future of [`ReqwestClient`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ReqwestFuture {
        #[pin]
        state: State,
        exchange: Option<Exchange>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State {
        Sent { #[pin] attempt: <Client as Service<Request>>::Future },
        // reqwest cannot send the request.
        Invalid { error: Option<Error> },
    }
}

impl Future for ReqwestFuture {
    type Output = Result<http::Response<Body>, ReqwestError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = match this.state.project() {
            StateProj::Sent { attempt } => attempt.poll(cx),
            StateProj::Invalid { error } => error.take().map_or(Poll::Pending, |error| {
                Poll::Ready(Err::<Response, _>(error))
            }),
        };
        let exchange = this.exchange;
        result.map_ok(http::Response::from).map_err(|source| {
            if let Some(exchange) = exchange.take() {
                exchange.failed(judge(&source));
            }
            // Its URL may contain a password or a token.
            let source = source.without_url();
            ReqwestError { source }
        })
    }
}

impl fmt::Debug for ReqwestFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestFuture").finish_non_exhaustive()
    }
}

/// Judges what an error of a reqwest request proves.
fn judge(error: &Error) -> Failure {
    if error.is_builder() {
        // reqwest cannot use the URL, or its scheme is neither http nor https.
        Failure::Permanent
    } else if error.is_connect() {
        Failure::NeverSent
    } else {
        judge_hyper(error)
    }
}

/// Why reqwest failed. The [`source`](StdError::source) is reqwest's error, without the URL.
#[derive(Debug)]
pub struct ReqwestError {
    source: Error,
}

impl ReqwestError {
    /// Borrows reqwest's error.
    pub fn get_ref(&self) -> &Error {
        &self.source
    }

    /// Returns reqwest's error.
    pub fn into_inner(self) -> Error {
        self.source
    }
}

impl fmt::Display for ReqwestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.source.is_connect() {
            "no connection"
        } else {
            "the HTTP exchange failed"
        })
    }
}

impl StdError for ReqwestError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.source)
    }
}

pin_project! {
    /// A request body whose errors are reduced to words. An error from another exchange, as of a
    /// proxied body, may contain a proof about that exchange. It proves nothing about the one that
    /// fails here.
    struct Untyped<B> {
        #[pin]
        body: B,
    }
}

impl<B> http_body::Body for Untyped<B>
where
    B: http_body::Body,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Data = B::Data;
    type Error = Words;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Words>>> {
        let frame = self.project().body.poll_frame(cx);
        frame.map_err(|error| Words::of(&*error.into()))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// The text of an error and its sources, without their types.
#[derive(Debug)]
struct Words {
    message: String,
    source: Option<Box<Words>>,
}

impl Words {
    fn of(error: &(dyn StdError + 'static)) -> Self {
        // Chains are short. The bound ends a cyclic one.
        Self::down_to(32, error)
    }

    fn down_to(depth: usize, error: &(dyn StdError + 'static)) -> Self {
        let source = error.source().filter(|_| depth > 0);
        Self {
            message: error.to_string(),
            source: source.map(|source| Box::new(Self::down_to(depth - 1, source))),
        }
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Words {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
