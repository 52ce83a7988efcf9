//! The HTTP client of the outbox. Besides this file, only the client's connector names hyper-util's
//! legacy client.

use std::error::Error as StdError;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::timeout;

use super::{Endpoint, OutboxError};
use crate::layer::ResponseHead;

/// How long an idle connection stays open. Shorter than the idle timeouts of servers and balancers,
/// so that requests rarely meet a connection that is being closed.
const IDLE: Duration = Duration::from_secs(5);

/// What is read of an answer, so that its connection can be used again.
const MAX_ANSWER: usize = 64 * 1024;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// The most bytes that are read at once, and so of the head of an answer. All interim answers (1xx)
/// among them are parsed in one go, during which nothing else of their thread has its turn.
const MAX_READ: usize = 16 * 1024;

/// How an attempt ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The receiver has the message.
    Accepted(StatusCode),
    /// The receiver wants no more messages.
    Gone,
    /// Another attempt may succeed.
    Failed {
        /// The failure in a few words, without anything confidential.
        failure: String,
        /// The time that the receiver asked for.
        retry_after: Option<Duration>,
    },
}

impl Answer {
    pub(super) fn failed(failure: impl Into<String>) -> Self {
        Self::Failed {
            failure: failure.into(),
            retry_after: None,
        }
    }
}

/// An HTTP/1.1 client that follows no redirects and uses no proxy: the URLs are the operator's.
#[derive(Debug, Clone)]
pub(super) struct HttpClient {
    #[cfg(not(feature = "tls"))]
    client: legacy::Client<HttpConnector, Full<Bytes>>,
    #[cfg(feature = "tls")]
    client: legacy::Client<hyper_rustls::HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
}

impl HttpClient {
    /// Makes a client for an endpoint. A request may take this long, with the connection.
    #[cfg_attr(not(feature = "tls"), expect(unused_variables))]
    pub(super) fn new(endpoint: &Endpoint, timeout: Duration) -> Result<Self, OutboxError> {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        // Divided among the addresses of a name, so that an unresponsive one leaves time for the
        // others.
        http.set_connect_timeout(Some(timeout / 2));
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        builder
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .http1_max_buf_size(MAX_READ);
        Ok(Self {
            #[cfg(not(feature = "tls"))]
            client: builder.build(http),
            #[cfg(feature = "tls")]
            client: builder.build(tls::connector(http, endpoint.roots.clone())?),
            timeout,
        })
    }

    /// Sends a message.
    pub(super) async fn send(&self, message: Request<Full<Bytes>>) -> Answer {
        let response = match timeout(self.timeout, self.client.request(message)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) if error.is_connect() => {
                return Answer::failed(format!("no connection{}", reason(&error)));
            }
            Ok(Err(_)) => return Answer::failed("the connection broke off"),
            Err(_) => return Answer::failed("no answer in time"),
        };
        let answer = judge(&response);
        // The head tells all. A body that breaks off or does not end changes nothing.
        let _ = timeout(ANSWER_TIMEOUT.min(self.timeout), read_away(response)).await;
        answer
    }
}

fn judge(response: &Response<Incoming>) -> Answer {
    match response.status() {
        status if status.is_success() => Answer::Accepted(status),
        StatusCode::GONE => Answer::Gone,
        status => Answer::Failed {
            failure: format!("status {}", status.as_u16()),
            retry_after: ResponseHead::of(response).retry_after(),
        },
    }
}

/// What kept a connection from being made: the system's words, which name no path.
fn reason(error: &legacy::Error) -> String {
    let mut reason = String::new();
    let mut next: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        #[cfg(feature = "tls")]
        if error.is::<rustls::Error>() {
            return ": TLS failed, perhaps the certificate is not trusted".to_owned();
        }
        let io = error.downcast_ref::<std::io::Error>();
        if let Some(io) = io {
            reason = format!(": {}", io.kind());
        }
        // The error that an `io::Error` wraps is not its source: `source` skips to that error's
        // source.
        next = match io.and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    reason
}

/// Reads a body to its end, up to a limit.
async fn read_away(response: Response<Incoming>) {
    let mut body = pin!(response.into_body());
    let mut left = MAX_ANSWER;
    while !body.is_end_stream() {
        let Some(Ok(frame)) = body.frame().await else {
            return;
        };
        // An empty frame counts as well: any number of them may be ready.
        let length = frame.data_ref().map_or(0, Bytes::len).max(1);
        match left.checked_sub(length) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

#[cfg(feature = "tls")]
mod tls {
    use std::sync::Arc;

    use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
    use rustls::ClientConfig;
    use rustls::pki_types::CertificateDer;
    use rustls_platform_verifier::Verifier;

    use super::{HttpConnector, OutboxError};

    /// Trusts what the platform trusts, and these roots.
    pub(super) fn connector(
        mut http: HttpConnector,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<HttpsConnector<HttpConnector>, OutboxError> {
        http.enforce_http(false);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Verifier::new_with_extra_roots(roots, provider.clone());
        let verifier = verifier.map_err(OutboxError::tls)?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(OutboxError::tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        Ok(HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http))
    }
}
