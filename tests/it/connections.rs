//! What `AegisService` does with its connections.

use std::time::Duration;

use aegis_hitl::testing::{Act, Peer};
use http::{Request, Version};
use http_body_util::Full;
use tower::Service;

use crate::support::again::{again, passes};
use crate::support::service::builder;
use crate::support::{SHORT, ends};

#[tokio::test]
async fn http_2_is_spoken_by_prior_knowledge() {
    let peer = Peer::start([Act::answer(202)]).await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .build()
        .unwrap();
    for key in ["k-1", "k-2"] {
        service.approve(key).await.unwrap();
    }
    assert_eq!((peer.count(), peer.connections()), (2, 1));
    assert_eq!(peer.requests()[0].version, Version::HTTP_2);
}

// HTTP/2 would put every further attempt on the connection that answers no more.
#[tokio::test]
async fn an_attempt_after_a_timeout_goes_over_a_new_connection() {
    let peer = Peer::start([Act::hang(), Act::answer(202)]).await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .timeout(SHORT)
        .build()
        .unwrap();
    assert_eq!(service.approve("k-1").await.unwrap().attempts(), 2);
    assert_eq!((peer.count(), peer.connections()), (2, 2));
    // The new one is used on.
    service.approve("k-2").await.unwrap();
    assert_eq!((peer.count(), peer.connections()), (3, 2));
}

// The head came in time, so the pool thinks well of the connection.
#[tokio::test]
async fn an_attempt_after_an_answer_that_stalled_goes_over_a_new_connection() {
    let whole = r#"{"request_id":"r-1","status":"PENDING"}"#;
    let peer = Peer::start([
        Act::answer(200).body("{").body_never_ends(),
        Act::answer(200).body(whole),
    ])
    .await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .timeout(SHORT)
        .build()
        .unwrap();
    service.status("r-1").await.unwrap();
    assert_eq!((peer.count(), peer.connections()), (2, 2));
    service.status("r-1").await.unwrap();
    assert_eq!((peer.count(), peer.connections()), (3, 2));
}

/// Passes connections on to a peer, until those that are open go dead: nothing passes any more, and nobody is told.
struct Relay {
    url: String,
    frozen: tokio::sync::watch::Sender<usize>,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    async fn before(peer: &Peer) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let target = peer.address();
        let (frozen, watched) = tokio::sync::watch::channel(0);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            for number in 1.. {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut watched = watched.clone();
                connections.spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                        _ = watched.wait_for(|frozen| *frozen >= number) => {}
                    }
                    // Holds both ends open.
                    std::future::pending::<()>().await;
                });
            }
        });
        Self { url, frozen, task }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn a_peer_that_is_gone_without_a_word_is_found_out_by_pings() {
    let peer = Peer::start([Act::answer(202)]).await;
    let relay = Relay::before(&peer).await;
    let service = builder(&relay.url)
        .http2_prior_knowledge()
        .http2_keep_alive(SHORT / 4, SHORT / 2)
        // Only the pings end the attempt in time.
        .timeout(Duration::from_secs(600))
        .build()
        .unwrap();
    service.approve("k-1").await.unwrap();
    relay.frozen.send(1).unwrap();
    let call = service.approve("k-2").into_future();
    assert_eq!(ends(call).await.unwrap().attempts(), 2);
    // The request on the dead connection never arrived.
    assert_eq!((peer.count(), peer.connections()), (2, 2));
}

#[test]
fn a_keep_alive_of_no_time_is_refused() {
    let builder = builder("http://127.0.0.1:1");
    for (interval, timeout) in [(Duration::ZERO, SHORT), (SHORT, Duration::ZERO)] {
        let builder = builder.clone().http2_keep_alive(interval, timeout);
        let error = builder.build().unwrap_err();
        assert!(error.is_config() && error.to_string().contains("keep-alive"));
    }
}

#[tokio::test]
async fn every_request_names_its_user_agent() {
    let peer = Peer::start([Act::answer(202)]).await;
    let default = builder(&peer.url()).build().unwrap();
    default.approve("k-1").await.unwrap();
    let named = builder(&peer.url())
        .user_agent("bot/2 (x)")
        .build()
        .unwrap();
    named.approve("k-1").await.unwrap();
    let _ = named.status("r-1").await;
    let own = concat!("aegis-hitl/", env!("CARGO_PKG_VERSION"));
    let agents: Vec<_> = peer
        .requests()
        .iter()
        .map(|request| request.header("user-agent").map(str::to_owned))
        .collect();
    let expected = [own, "bot/2 (x)", "bot/2 (x)"].map(|agent| Some(agent.to_owned()));
    assert_eq!(agents, expected);
    for wrong in ["", " ", "a\nb", "\u{e9}"] {
        let error = builder(&peer.url()).user_agent(wrong).build().unwrap_err();
        assert!(error.is_config() && error.to_string().contains("user agent"));
    }
}

#[tokio::test]
async fn the_host_header_names_the_server_of_the_request() {
    let proxy = Peer::start(std::iter::repeat_n(Act::answer(202), 7)).await;
    let to = |server: &str| {
        let through = builder(&format!("http://{server}")).proxy(proxy.url());
        through.build().unwrap()
    };
    for (server, host) in [
        ("server.test", "server.test"),
        ("server.test:80", "server.test"),
        ("server.test:443", "server.test:443"),
        ("[2001:db8::1]:8000", "[2001:db8::1]:8000"),
    ] {
        to(server).approve("k-1").await.unwrap();
        let seen = proxy.requests().pop().unwrap();
        assert_eq!(seen.header("host"), Some(host), "{server}");
    }
    // The client is public, so requests to another server or with their own header are possible.
    let mut client = to("server.test").into_inner();
    for (uri, own, host) in [
        ("http://other.test/", None, "other.test"),
        ("http://server.test/", Some("own.test"), "own.test"),
        ("http://server.test:8000/", None, "server.test:8000"),
    ] {
        let mut request = Request::post(uri);
        if let Some(own) = own {
            request = request.header("host", own);
        }
        let request = request.body(Full::default()).unwrap();
        client.call(request).await.unwrap();
        let seen = proxy.requests().pop().unwrap();
        assert_eq!(seen.header("host"), Some(host), "{uri}");
    }
}

#[tokio::test]
async fn a_proxy_is_sent_the_requests_to_an_http_server() {
    let proxy = Peer::start([Act::answer(202)]).await;
    let url = proxy.url().replace("http://", "http://user:secret@");
    let through = builder("http://server.test").proxy(url);
    assert!(!format!("{through:?}").contains("secret"));
    let service = through.clone().build().unwrap();
    service.approve("k-1").await.unwrap();
    let seen = &proxy.requests()[0];
    let target = "http://server.test/api/v1/hitl/approve";
    assert_eq!(seen.uri.to_string(), target);
    assert_eq!(seen.header("host"), Some("server.test"));
    // user:secret
    let expected = "Basic dXNlcjpzZWNyZXQ=";
    assert_eq!(seen.header("proxy-authorization"), Some(expected));

    let both = through.http2_prior_knowledge().build().unwrap_err();
    assert!(both.is_config());
    for wrong in [
        "",
        "socks5://secret:1",
        "https://secret",
        "http://a:secret@",
    ] {
        let error = builder("http://server.test").proxy(wrong).build();
        let error = error.unwrap_err();
        assert!(error.is_config() && error.to_string().contains("proxy"));
        assert!(!format!("{error} {error:?}").contains("secret"));
    }
}

// The environment of a process is not to be changed while it runs, so another process has it.
#[tokio::test]
async fn the_environment_names_the_proxy() {
    let proxy = Peer::start([Act::answer(202)]).await;
    let mut command = again(calls_under_a_proxy_of_the_environment);
    command.env("HTTP_PROXY", proxy.url());
    command.env("NO_PROXY", "spared.invalid");
    passes(command).await;
    assert_eq!(proxy.count(), 1);
}

#[tokio::test]
#[ignore = "run by the_environment_names_the_proxy"]
async fn calls_under_a_proxy_of_the_environment() {
    let builder = |url: &str| builder(url).max_retries(0);
    let proxied = builder("http://server.invalid").build().unwrap();
    proxied.approve("k-1").await.unwrap();
    for direct in [
        builder("http://server.invalid").no_proxy(),
        builder("http://spared.invalid"),
        builder("http://localhost:1"),
        builder("http://[::1]:1"),
    ] {
        let error = direct.build().unwrap().approve("k-1").await.unwrap_err();
        assert!(error.is_connect(), "{error:?}");
    }
}
