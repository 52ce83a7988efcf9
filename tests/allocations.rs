//! What a call costs in allocations, exactly, and what those who wait hold. The counts are a thread's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../benches/support/counting.rs"]
mod counting;

use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use aegis_hitl::layer::{
    AegisLayer, Attempts, Backoff, RetryLayer, SetIdempotencyKeyLayer, SetRequestIdLayer,
};
use aegis_hitl::{IdempotencyKey, TenantId, ThreadId};
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri};
use http_body_util::Full;
use tower::{Layer, Service};

use counting::allocations;

type Body = Full<Bytes>;

const BODY: &[u8] = br#"{"payload":{"to":"a@b.c","amount":12,"currency":"EUR"}}  "#;

/// Answers `failures` requests with 503, and then 200.
#[derive(Clone)]
struct Peer {
    failures: &'static std::cell::Cell<u32>,
}

impl Peer {
    fn failing(failures: u32) -> Self {
        Self {
            failures: Box::leak(Box::new(std::cell::Cell::new(failures))),
        }
    }
}

impl Service<Request<Body>> for Peer {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        let mut response = Response::new(Full::default());
        if let Some(left) = self.failures.get().checked_sub(1) {
            self.failures.set(left);
            *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
        }
        ready(Ok(response))
    }
}

fn request(uri: &Uri, given: &[(HeaderName, HeaderValue)]) -> Request<Body> {
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    for (name, value) in given {
        headers.insert(name, value.clone());
    }
    let mut request = Request::new(Full::new(Bytes::from_static(BODY)));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.clone();
    *request.headers_mut() = headers;
    request
}

/// The allocations of one call, from the request at hand to the response dropped.
fn cost<S>(service: &mut S, request: Request<Body>) -> (u64, u32)
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    let mut cx = Context::from_waker(Waker::noop());
    allocations(|| {
        assert!(service.poll_ready(&mut cx).is_ready());
        let mut call = pin!(service.call(request));
        let Poll::Ready(Ok(response)) = call.as_mut().poll(&mut cx) else {
            panic!("the peer answers at once");
        };
        assert_eq!(response.status(), 200);
        Attempts::of(&response)
    })
}

fn named() -> AegisLayer {
    AegisLayer::new()
        .tenant(TenantId::new("acme").unwrap())
        .thread(ThreadId::new("run-7").unwrap())
        .retry(RetryLayer::new().backoff(Backoff::none()))
}

#[test]
fn a_first_attempt_allocates_for_what_is_minted_and_for_nothing_else() {
    let uri: Uri = "http://localhost/hitl/approve".parse().unwrap();
    let key = IdempotencyKey::new("key-1").unwrap().header_value();
    let id = HeaderValue::from_static("6f9b2c9e-6c1f-4c3a-9a57-0c8f2c6a4f10");
    let keyed = [(HeaderName::from_static("idempotency-key"), key)];
    let full = [
        keyed[0].clone(),
        (HeaderName::from_static("x-request-id"), id),
    ];
    let peer = Peer::failing(0);
    // The random generator makes its state once a thread.
    drop(IdempotencyKey::mint());

    let mut bare = peer.clone();
    assert_eq!(cost(&mut bare, request(&uri, &full)).0, 0);

    // A minted key and a minted request id: one each, kept copy included.
    let mut minting = named().mint_idempotency_key().layer(peer.clone());
    assert_eq!(cost(&mut minting, request(&uri, &[])).0, 2);
    // So it stays when the service is used again.
    assert_eq!(cost(&mut minting, request(&uri, &[])).0, 2);

    // A given key: the request id alone.
    assert_eq!(cost(&mut minting, request(&uri, &keyed)).0, 1);

    // Everything given: nothing, whether the request is kept for a retry or not.
    assert_eq!(cost(&mut minting, request(&uri, &full)).0, 0);
    let mut once = named()
        .retry(RetryLayer::new().max_retries(0))
        .layer(peer.clone());
    assert_eq!(cost(&mut once, request(&uri, &full)).0, 0);

    // The layers alone. That a key was minted is noted in the request's extensions, which takes two.
    let mut key = SetIdempotencyKeyLayer::mint().layer(peer.clone());
    assert_eq!(cost(&mut key, request(&uri, &[])).0, 3);
    let mut id = SetRequestIdLayer::mint().layer(peer.clone());
    assert_eq!(cost(&mut id, request(&uri, &[])).0, 1);
    let mut retry = RetryLayer::new().layer(peer);
    assert_eq!(cost(&mut retry, request(&uri, &full)).0, 0);

    // A retry: the header map's two tables, and one note of the attempts on the response (three, once a call).
    for (failures, expected) in [(1, 2 + 3), (3, 3 * 2 + 3)] {
        let mut flaky = named().layer(Peer::failing(failures));
        let (count, attempts) = cost(&mut flaky, request(&uri, &full));
        assert_eq!((count, attempts), (expected, failures + 1));
    }
}

/// What those who wait at a server hold, in bytes.
#[cfg(all(feature = "server", feature = "test-util"))]
mod waiters {
    use std::pin::Pin;

    use aegis_hitl::server::{HitlService, ResponseBody};
    use aegis_hitl::store::MemoryStore;
    use http_body::Body as _;
    use tokio::runtime::Runtime;

    use super::*;

    const WAITERS: usize = 10_000;

    /// The allocations of a duplicate decision, as many as before it was counted.
    const DUPLICATE: u64 = 23;

    fn runtime() -> Runtime {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().build().unwrap()
    }

    fn of(tenant: &str, method: Method, path: &str) -> http::request::Builder {
        let uri = format!("http://localhost/api/v1/hitl/{path}");
        let request = Request::builder().method(method).uri(uri);
        request.header("tenant-id", tenant)
    }

    fn call(
        service: &HitlService<MemoryStore>,
        request: Request<Body>,
    ) -> Pin<Box<impl Future<Output = Result<Response<ResponseBody>, Infallible>>>> {
        Box::pin(service.clone().call(request))
    }

    /// Submits an action with a payload of 1 KiB, and returns its id.
    fn submit(service: &HitlService<MemoryStore>, number: usize) -> String {
        let payload = format!(r#"{{"text":"{}"}}"#, "x".repeat(1024));
        let request = of("acme", Method::POST, "actions")
            .header("thread-id", "run-7")
            .header("idempotency-key", number.to_string())
            .header("content-type", "application/json")
            .body(Full::from(payload))
            .unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(Ok(response)) = call(service, request).as_mut().poll(&mut cx) else {
            panic!("the store answers at once");
        };
        assert_eq!(response.status(), 201);
        let location = response.headers()["location"].to_str().unwrap();
        location.rsplit_once('/').unwrap().1.to_owned()
    }

    /// The bytes that each of many holds, once the tasks that they started wait too.
    fn held_by_each<T>(runtime: &Runtime, make: impl Fn(usize) -> T) -> u64 {
        let mut all = Vec::with_capacity(WAITERS);
        let counted = allocation_counter::measure(|| {
            all.extend((0..WAITERS).map(make));
            runtime.block_on(async {
                for _ in 0..WAITERS {
                    tokio::task::yield_now().await;
                }
            });
        });
        assert_eq!(all.len(), WAITERS);
        u64::try_from(counted.bytes_current).unwrap() / WAITERS as u64
    }

    /// What `aegis_requests_total` and the like cost. A store of its own allocates as well, so the
    /// call is one that changes nothing.
    #[test]
    fn a_decision_is_counted_without_an_allocation() {
        let runtime = runtime();
        let _entered = runtime.enter();
        let service = HitlService::new(MemoryStore::new());
        let mut cx = Context::from_waker(Waker::noop());
        let mut decide = || {
            let request: Request<Body> = of("acme", Method::POST, "approve")
                .header("thread-id", "run-7")
                .header("idempotency-key", "k")
                .body(Full::default())
                .unwrap();
            let mut service = service.clone();
            let (count, status) = allocations(|| {
                let mut call = pin!(service.call(request));
                let Poll::Ready(Ok(response)) = call.as_mut().poll(&mut cx) else {
                    panic!("the store answers at once");
                };
                response.status().as_u16()
            });
            (count, status)
        };
        assert_eq!(decide().1, 202);
        // The first request of an endpoint makes room for its numbers.
        assert_eq!(decide(), (DUPLICATE, 409));
        assert_eq!(decide(), (DUPLICATE, 409));
    }

    #[test]
    fn ten_thousand_who_wait_for_a_decision_hold_little_each() {
        let runtime = runtime();
        let _entered = runtime.enter();
        let service = HitlService::new(MemoryStore::new());
        let ids: Vec<_> = (0..WAITERS)
            .map(|number| submit(&service, number))
            .collect();
        let held = held_by_each(&runtime, |number| {
            let path = format!("status/{}", ids[number]);
            let request = of("acme", Method::GET, &path).header("prefer", "wait=55");
            let mut waiting = call(&service, request.body(Full::default()).unwrap());
            let mut cx = Context::from_waker(Waker::noop());
            assert!(waiting.as_mut().poll(&mut cx).is_pending());
            waiting
        });
        assert!(held <= 4096, "{held} bytes each");
    }

    #[test]
    fn ten_thousand_who_follow_the_events_hold_little_each() {
        let runtime = runtime();
        let _entered = runtime.enter();
        let service = HitlService::new(MemoryStore::new());
        // All of one tenant share a reader.
        for (tenants, most) in [(1, 1024), (WAITERS, 3072)] {
            let held = held_by_each(&runtime, |number| {
                let tenant = format!("acme-{}", number % tenants);
                let request = of(&tenant, Method::GET, "events");
                let request = request.body(Full::default()).unwrap();
                let mut cx = Context::from_waker(Waker::noop());
                let answered = call(&service, request).as_mut().poll(&mut cx);
                let Poll::Ready(Ok(response)) = answered else {
                    panic!("the store answers at once");
                };
                let mut body = response.into_body();
                // The place to resume at, and then nothing.
                assert!(Pin::new(&mut body).poll_frame(&mut cx).is_ready());
                assert!(Pin::new(&mut body).poll_frame(&mut cx).is_pending());
                body
            });
            assert!(held <= most, "{held} bytes each, for {tenants} tenants");
        }
    }
}
