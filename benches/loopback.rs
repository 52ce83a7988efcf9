//! Measures what the layers cost end to end: requests per second and latency over kept connections,
//! to a server that does no work.
//!
//! Server and client are two processes with one thread each, so on two cores neither waits for the
//! other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "support/child.rs"]
mod child;
#[path = "support/latency.rs"]
mod latency;
#[path = "support/results.rs"]
mod results;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use aegis_hitl::layer::AegisLayer;
use aegis_hitl::{AegisService, TenantId, ThreadId};
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use reqwest_retry::{RetryTransientMiddleware, policies::ExponentialBackoff};
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;
use tower::{Layer, Service, ServiceExt};

use child::Peer;
use latency::{Sample, Summary};

const ROUNDS: usize = 9;
const EACH: Duration = Duration::from_millis(600);
const CONCURRENCY: [usize; 2] = [1, 64];

const BODY: &[u8] = br#"{"payload":{"to":"a@b.c","amount":12.5,"currency":"EUR"}}"#;
const ANSWER: &[u8] = br#"{"request_id":"6f9b2c9e-6c1f-4c3a-9a57-0c8f2c6a4f10","status":"COMMITTED","decision":"approve"}"#;

fn headers() -> [(HeaderName, HeaderValue); 4] {
    [
        ("tenant-id", "acme"),
        ("thread-id", "run-7"),
        ("idempotency-key", "6f9b2c9e-6c1f-4c3a-9a57-0c8f2c6a4f10"),
        ("x-request-id", "c1f4c3a9-2c9e-4a57-8c2f-6a4f106f9b2c"),
    ]
    .map(|(name, value)| {
        (
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        )
    })
}

/// Answers 202 to everything.
async fn serve() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                let answer = service_fn(|request: Request<Incoming>| async {
                    request.into_body().collect().await?;
                    let mut response = Response::new(Full::new(Bytes::from_static(ANSWER)));
                    *response.status_mut() = StatusCode::ACCEPTED;
                    let json = HeaderValue::from_static("application/json");
                    response.headers_mut().insert(CONTENT_TYPE, json);
                    Ok::<_, hyper::Error>(response)
                });
                let _ = http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), answer)
                    .await;
            });
        }
    });
    child::announce(address).await;
}

type Call = Rc<dyn Fn() -> Pin<Box<dyn Future<Output = ()>>>>;

struct Contender {
    name: &'static str,
    call: Call,
    samples: [Vec<Sample>; CONCURRENCY.len()],
}

impl Contender {
    fn new<F: Future<Output = ()> + 'static>(
        name: &'static str,
        call: impl Fn() -> F + 'static,
    ) -> Self {
        Self {
            name,
            call: Rc::new(move || Box::pin(call())),
            samples: Default::default(),
        }
    }
}

fn hyper_client() -> Client<HttpConnector, Full<Bytes>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).build(connector)
}

fn request(uri: &Uri, extra: &[(HeaderName, HeaderValue)], body: Bytes) -> Request<Full<Bytes>> {
    let json = HeaderValue::from_static("application/json");
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(CONTENT_TYPE, json.clone());
    headers.insert(ACCEPT, json);
    for (name, value) in extra {
        headers.insert(name.clone(), value.clone());
    }
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.clone();
    *request.headers_mut() = headers;
    request
}

async fn read(response: Response<Incoming>) {
    assert_eq!(response.status(), 202);
    response.into_body().collect().await.unwrap();
}

fn through<S>(
    name: &'static str,
    service: S,
    uri: &Uri,
    extra: impl Into<Vec<(HeaderName, HeaderValue)>>,
) -> Contender
where
    S: Service<Request<Full<Bytes>>, Response = Response<Incoming>> + Clone + 'static,
    S::Error: std::fmt::Debug,
{
    let (uri, extra) = (uri.clone(), extra.into());
    Contender::new(name, move || {
        let request = request(&uri, &extra, Bytes::from_static(BODY));
        let answer = service.clone().oneshot(request);
        async { read(answer.await.unwrap()).await }
    })
}

/// What any client must read of an answer.
#[derive(Deserialize)]
struct Answer {
    request_id: String,
    status: String,
    decision: Option<String>,
}

/// The least that a client of JSON can cost: serializes the payload and parses the answer.
fn json_both_ways(uri: &Uri, payload: serde_json::Value) -> Contender {
    let (service, uri, extra) = (hyper_client(), uri.clone(), headers());
    Contender::new("hyper-util, constant headers, JSON both ways", move || {
        let body = serde_json::to_vec(&payload).unwrap();
        let answer = service.request(request(&uri, &extra, body.into()));
        async {
            let answer = answer.await.unwrap();
            assert_eq!(answer.status(), 202);
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            let answer: Answer = serde_json::from_slice(&body).unwrap();
            assert_eq!(answer.decision.as_deref(), Some("approve"));
            std::hint::black_box((answer.request_id, answer.status));
        }
    })
}

fn contenders(address: SocketAddr) -> Vec<Contender> {
    let base = format!("http://{address}");
    let uri: Uri = format!("{base}/api/v1/hitl/approve").parse().unwrap();
    let url: reqwest::Url = uri.to_string().parse().unwrap();

    let layer = AegisLayer::new()
        .tenant(TenantId::new("acme").unwrap())
        .thread(ThreadId::new("run-7").unwrap())
        .mint_idempotency_key();
    let aegis = AegisService::builder()
        .base_url(base)
        .tenant_id("acme")
        .thread_id("run-7")
        .build()
        .unwrap();
    let payload = json!({"to": "a@b.c", "amount": 12.5, "currency": "EUR"});

    let with_reqwest = move |url: &reqwest::Url| {
        let (parts, _) = request(&Uri::from_static("/"), &headers(), Bytes::new()).into_parts();
        let mut request = reqwest::Request::new(Method::POST, url.clone());
        *request.headers_mut() = parts.headers;
        *request.body_mut() = Some(Bytes::from_static(BODY).into());
        request
    };
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let retries = ExponentialBackoff::builder().build_with_max_retries(3);
    let retrying = reqwest_middleware::ClientBuilder::new(client.clone())
        .with(RetryTransientMiddleware::new_with_policy(retries))
        .build();
    let second_url = url.clone();

    vec![
        through("hyper-util, bare", hyper_client(), &uri, []),
        through(
            "hyper-util, constant headers",
            hyper_client(),
            &uri,
            headers(),
        ),
        json_both_ways(&uri, payload.clone()),
        through(
            "hyper-util + AegisLayer",
            layer.layer(hyper_client()),
            &uri,
            [],
        ),
        Contender::new("AegisService", move || {
            let key = aegis_hitl::IdempotencyKey::mint();
            let call = aegis.approve(&key).payload(&payload);
            async { drop(call.await.unwrap()) }
        }),
        Contender::new("reqwest, constant headers", move || {
            let answer = client.execute(with_reqwest(&url));
            async { drop(answer.await.unwrap().bytes().await.unwrap()) }
        }),
        Contender::new("reqwest + reqwest-retry", move || {
            let (client, request) = (retrying.clone(), with_reqwest(&second_url));
            async move {
                let answer = client.execute(request).await.unwrap();
                answer.bytes().await.unwrap();
            }
        }),
    ]
}

async fn measure(call: &Call, concurrency: usize, time: Duration) -> Sample {
    let begun = Instant::now();
    let tasks: Vec<_> = (0..concurrency)
        .map(|_| {
            let call = call.clone();
            tokio::task::spawn_local(async move {
                let mut latencies = Vec::with_capacity(1 << 14);
                let mut now = Instant::now();
                while now.duration_since(begun) < time {
                    call().await;
                    let done = Instant::now();
                    latencies.push(done.duration_since(now).as_nanos() as u32);
                    now = done;
                }
                latencies
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    Sample::of(all, begun.elapsed())
}

fn main() -> Result<(), Infallible> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    if std::env::args().any(|argument| argument == child::SERVE) {
        runtime.block_on(serve());
        return Ok(());
    }
    if !results::is_asked_for() {
        return Ok(());
    }
    let peer = Peer::spawn(&[]);
    let mut contenders = contenders(peer.address);
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        for round in 0..ROUNDS {
            let first = round % contenders.len();
            contenders.rotate_left(first);
            for contender in &mut contenders {
                for (samples, concurrency) in contender.samples.iter_mut().zip(CONCURRENCY) {
                    // Opens the connections before the measurement.
                    measure(&contender.call, concurrency, EACH / 10).await;
                    samples.push(measure(&contender.call, concurrency, EACH).await);
                }
            }
            contenders.rotate_right(first);
        }
    });
    peer.stop();

    println!("| client | calls at once | requests/s | p50, us | p99, us |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    let mut rows = Vec::new();
    for (at, concurrency) in CONCURRENCY.into_iter().enumerate() {
        for contender in &contenders {
            let summary = Summary::of(&contender.samples[at]);
            println!(
                "| {} | {concurrency} | {:.0} | {:.0} | {:.0} |",
                contender.name, summary.rate, summary.p50, summary.p99
            );
            rows.push(json!({
                "name": contender.name,
                "concurrency": concurrency,
                "summary": summary,
            }));
        }
    }
    results::save("loopback", &json!(rows));
    Ok(())
}
