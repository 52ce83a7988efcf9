//! Deadlines, drips, and times that no clock can hold.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use aegis_hitl::AegisService;
use aegis_hitl::client::OnDuplicate;
use aegis_hitl::layer::{Backoff, RetryLayer};
use aegis_hitl::testing::{Act, Peer};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::Full;
use tokio::io::AsyncWriteExt;
use tower::{Layer, ServiceExt, service_fn};

use super::builder;
use crate::support::raw::{Raw, head, read_request};
use crate::support::{HANG, ends};

#[tokio::test]
async fn a_calls_own_deadline_takes_the_place_of_the_services_however_long_it_is() {
    let late = Act::answer(202).after(Duration::from_millis(600));
    let peer = Peer::start([late]).await;
    let service = builder(&peer.url())
        .deadline(Duration::from_millis(200))
        .build()
        .unwrap();
    let year = service
        .approve("k-1")
        .deadline(Duration::from_secs(31_536_000));
    assert!(ends(year.into_future()).await.is_ok());
    let unlimited = service.approve("k-1").deadline(Duration::MAX);
    let receipt = ends(unlimited.into_future()).await;
    assert!(receipt.is_ok(), "{receipt:?}");
}

/// Something that is never ready and always about to be: it uses up what one poll may do, each time.
async fn busy() {
    loop {
        tokio::task::consume_budget().await;
    }
}

#[tokio::test]
async fn an_attempt_that_is_always_busy_is_cut_by_its_timeout_and_by_the_deadline() {
    let client = service_fn(|_: Request<Full<Bytes>>| async {
        busy().await;
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    for layer in [
        RetryLayer::new().attempt_timeout(Duration::from_millis(50)),
        RetryLayer::new().deadline(Duration::from_millis(50)),
    ] {
        let call = layer
            .max_retries(0)
            .layer(client)
            .oneshot(Request::new(Full::default()));
        assert!(ends(call).await.unwrap_err().is_timeout());
    }
}

#[tokio::test]
async fn a_drip_is_bounded_by_the_deadline_wherever_it_is() {
    let head_only = "HTTP/1.1 409 C\r\nx: ".to_owned();
    let interim = String::new();
    for (name, first, drop) in [
        ("head", head_only, "y"),
        ("interim answers", interim, "HTTP/1.1 103 Early\r\n\r\n"),
        (
            "409",
            "HTTP/1.1 409 C\r\nContent-Length: 100000\r\n\r\n{".to_owned(),
            " ",
        ),
        (
            "422",
            "HTTP/1.1 422 C\r\nContent-Length: 100000\r\n\r\n{".to_owned(),
            " ",
        ),
        (
            "503",
            "HTTP/1.1 503 C\r\nContent-Length: 100000\r\n\r\n{".to_owned(),
            " ",
        ),
        (
            "200",
            "HTTP/1.1 200 C\r\nContent-Length: 100000\r\n\r\n{".to_owned(),
            " ",
        ),
        (
            "trailers",
            "HTTP/1.1 409 C\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: ".to_owned(),
            "y",
        ),
    ] {
        let peer = Raw::start(move |_, mut stream| {
            let first = first.clone();
            async move {
                if read_request(&mut stream).await.is_none() {
                    return;
                }
                let _ = stream.write_all(first.as_bytes()).await;
                while stream.write_all(drop.as_bytes()).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        })
        .await;
        let service = builder(&peer.url()).timeout(2 * HANG).build().unwrap();
        let limit = Duration::from_millis(500);
        let result = ends(service.approve("k-1").deadline(limit).into_future()).await;
        assert!(result.is_err(), "{name}: {result:?}");
        let status = ends(service.status("r-1").deadline(limit).into_future()).await;
        assert!(status.is_err(), "{name}: {status:?}");
    }
}

#[tokio::test]
async fn a_flood_of_interim_answers_does_not_outlast_the_deadline() {
    let peer = Raw::start(|_, mut stream| async move {
        if read_request(&mut stream).await.is_none() {
            return;
        }
        let flood = "HTTP/1.1 103 Early\r\n\r\n".repeat(1000);
        while stream.write_all(flood.as_bytes()).await.is_ok() {}
    })
    .await;
    let service = builder(&peer.url()).timeout(2 * HANG).build().unwrap();
    let call = service.approve("k-1").deadline(Duration::from_millis(500));
    assert!(ends(call.into_future()).await.is_err());
}

#[tokio::test]
async fn no_time_is_too_long_or_too_short() {
    let times = [Duration::ZERO, Duration::from_nanos(1), Duration::MAX];
    for timeout in times {
        for deadline in times {
            let peer = Peer::start([Act::answer(202)]).await;
            let service = AegisService::builder()
                .base_url(peer.url())
                .tenant_id("acme")
                .thread_id("run-7")
                .backoff(Backoff::constant(Duration::MAX))
                .timeout(timeout)
                .deadline(deadline)
                .on_duplicate(OnDuplicate::Verify)
                .max_retries(u32::MAX)
                .build();
            let is_none = timeout.is_zero() || deadline.is_zero();
            assert_eq!(service.is_err(), is_none);
            let other = builder(&peer.url()).build().unwrap();
            for service in service.into_iter().chain([other]) {
                let call = service
                    .approve("k-1")
                    .timeout(timeout)
                    .deadline(deadline)
                    .max_retries(0);
                let _ = ends(call.into_future()).await;
                let call = service
                    .status("r-1")
                    .timeout(timeout)
                    .deadline(deadline)
                    .wait(Duration::MAX);
                let _ = ends(call.max_retries(0).into_future()).await;
            }
        }
    }
}

#[tokio::test]
async fn no_retry_after_makes_a_call_hang_or_come_early() {
    for (value, attempts) in [
        ("-5", 2),
        ("1e9", 2),
        ("0x10", 2),
        ("NaN", 2),
        ("inf", 2),
        ("0", 2),
        ("00000000000000000000", 2),
        ("0.0", 2),
        (" 0 ", 2),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 2),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 2),
        ("Sun Nov  6 08:49:37 1994", 2),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 1),
        ("99999999999999999999999999", 1),
        ("99999999999999999999999999.5", 1),
        ("30.000000001", 1),
        ("31", 1),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 2),
        ("Thu, 99 Jan 1970 99:99:99 GMT", 2),
        ("Mon, 01 Jan 0000 00:00:00 GMT", 2),
        ("\u{e9}", 2),
    ] {
        let answer = format!("503 Busy\r\nContent-Length: 0\r\nRetry-After: {value}\r\n\r\n");
        let peer = Raw::says(head(&answer)).await;
        let service = builder(&peer.url()).max_retries(1).build().unwrap();
        let error = ends(service.approve("k-1").into_future())
            .await
            .unwrap_err();
        assert_eq!(error.attempts(), attempts, "{value}: {error:?}");
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_anywhere_costs_no_budget_and_harms_no_other() {
    let budget = aegis_hitl::layer::Budget::new(0.0).burst(50);
    let before = format!("{budget:?}");
    let peer = Peer::start([Act::answer(503).body("{}")]).await;
    let service = builder(&peer.url())
        .backoff(Backoff::constant(Duration::from_secs(60)))
        .budget(budget.clone())
        .build()
        .unwrap();
    for polls in 0..40 {
        let mut call = service.approve("k-1").into_future();
        let mut left = polls;
        let dropped = std::future::poll_fn(|cx| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            if call.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        ends(dropped).await;
        drop(call);
        tokio::task::yield_now().await;
    }
    assert_eq!(format!("{budget:?}"), before);
}

#[tokio::test]
async fn a_body_that_is_always_busy_does_not_outlast_its_patience() {
    struct Busy(Pin<Box<dyn Future<Output = ()> + Send>>);

    impl Body for Busy {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.as_mut().poll(cx).map(|()| None)
        }
    }

    for status in [202, 503] {
        let client = service_fn(move |_: Request<Full<Bytes>>| async move {
            let body = Busy(Box::pin(busy()));
            Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
        });
        let service = AegisService::builder()
            .tenant_id("acme")
            .thread_id("run-7")
            .timeout(Duration::from_secs(2))
            .max_retries(0)
            .build_with(client)
            .unwrap();
        let call = service.approve("k-1").deadline(Duration::from_secs(2));
        let ended = tokio::time::timeout(Duration::from_secs(5), call.into_future()).await;
        assert!(ended.is_ok(), "no timer ends the body of a {status}");
    }
}

#[tokio::test]
async fn a_call_that_fails_at_once_lets_others_run_between_its_attempts() {
    let client = service_fn(|_: Request<Full<Bytes>>| async {
        Err::<Response<Full<Bytes>>, _>(std::io::Error::other("shed"))
    });
    let service = RetryLayer::new()
        .backoff(Backoff::none())
        .budget(None)
        .max_retries(1_000_000)
        .layer(client);
    let request = Request::put("/").body(Full::default()).unwrap();
    let limit = Duration::from_millis(50);
    let result = tokio::time::timeout(limit, service.oneshot(request)).await;
    // A call that lets no timer run comes to its own end.
    assert!(result.is_err());
}

/// The longest time that can be added to what a clock says now.
fn longest() -> Duration {
    let now = tokio::time::Instant::now();
    let mut longest = Duration::ZERO;
    for bit in (0..94).rev() {
        let nanos = 1_u128 << bit;
        let more = Duration::new(
            u64::try_from(nanos / 1_000_000_000).unwrap_or(u64::MAX),
            u32::try_from(nanos % 1_000_000_000).unwrap(),
        );
        if let Some(longer) = longest.checked_add(more)
            && now.checked_add(longer).is_some()
        {
            longest = longer;
        }
    }
    longest
}

// A clock can hold it, but nothing can be added to it.
#[tokio::test(start_paused = true)]
async fn the_last_instant_that_a_clock_can_hold_is_no_panic() {
    let set: [fn(RetryLayer) -> RetryLayer; 4] = [
        |layer| layer.attempt_timeout(None).deadline(longest()),
        |layer| layer.attempt_timeout(longest()),
        |layer| layer.backoff(Backoff::constant(longest())),
        |layer| layer.drain(1, longest()),
    ];
    let mut panicked = Vec::new();
    for (at, set) in set.into_iter().enumerate() {
        for status in [None, Some(503)] {
            let client = service_fn(move |_: Request<Full<Bytes>>| async move {
                let Some(status) = status else {
                    return std::future::pending().await;
                };
                let never = futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>();
                let body = http_body_util::StreamBody::new(never);
                Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
            });
            let request = Request::put("/").body(Full::default()).unwrap();
            let call = set(RetryLayer::new()).layer(client).oneshot(request);
            let call = tokio::time::timeout(Duration::from_secs(3600), call);
            if tokio::spawn(async move { drop(call.await) }).await.is_err() {
                panicked.push((at, status));
            }
        }
    }
    assert!(panicked.is_empty(), "{panicked:?}");
}
