//! Proxies that lie, and those of the environment.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_hitl::testing::{Act, Peer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{builder, said, tls};
use crate::support::again::{again, passes};
use crate::support::ends;
use crate::support::raw::{Raw, head, read_request, sized};

#[tokio::test]
async fn a_proxy_that_stalls_or_lies_in_the_tunnel_is_sent_no_request() {
    let (_, pem) = tls::server(tls::for_name("localhost")).await;
    let flood = format!("HTTP/1.1 200 OK\r\n{}", "x: y\r\n".repeat(10_000));
    let cases: [(&str, Vec<u8>); 9] = [
        ("silence", vec![]),
        ("half a head", b"HTTP/1.1 200 OK\r\n".to_vec()),
        ("endless headers", flood.into_bytes()),
        (
            "an open tunnel to nowhere",
            b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        ),
        (
            "its own answer",
            sized("202 Accepted", b"{\"status\":\"COMMITTED\"}"),
        ),
        (
            "its own answer for a tunnel",
            sized("200 OK", b"HTTP/1.1 202 Accepted\r\n\r\n"),
        ),
        (
            "a demand",
            head("407 Who\r\nProxy-Authenticate: Basic\r\n\r\n"),
        ),
        ("a refusal", head("403 No\r\n\r\n")),
        ("noise", vec![0xff; 10_000]),
    ];
    for (what, bytes) in cases {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let log = heard.clone();
        let proxy = Raw::start(move |_, mut stream| {
            let (bytes, log) = (bytes.clone(), log.clone());
            async move {
                let _ = read_request(&mut stream).await;
                let _ = stream.write_all(&bytes).await;
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    log.lock().unwrap().extend_from_slice(&buffer[..read]);
                }
            }
        })
        .await;
        let service = tls::secure(1, &pem)
            .proxy(format!("http://user:secret@{}", proxy.address))
            .timeout(Duration::from_millis(600))
            .max_retries(1)
            .build()
            .unwrap();
        let error = ends(service.approve("k-1").into_future())
            .await
            .unwrap_err();
        assert!(
            error.is_connect() && !error.is_outcome_unknown(),
            "{what}: {error:?}"
        );
        let said = said(&error);
        assert!(
            !said.contains("secret") && !said.contains("dXNlcjpzZWNyZXQ"),
            "{said}"
        );
        let heard = String::from_utf8_lossy(&heard.lock().unwrap()).to_lowercase();
        assert!(
            !heard.contains("k-1") && !heard.contains("acme"),
            "{what}: {heard}"
        );
    }
}

#[test]
fn each_part_of_a_proxys_url_is_checked() {
    let mut taken = Vec::new();
    for url in [
        "",
        "*",
        "http://",
        "http://host:99999",
        "http://host:0",
        "http://host:",
        "http://[fe80::1%25eth0]:3128",
        "http://user:p@ss@host:3128",
        "socks5://host:1080",
        "https://host:3128",
        "ftp://host",
        "http://host:3128/path",
        "http://host:3128?query",
    ] {
        let built = builder("http://example.com").proxy(url).build();
        match built {
            Ok(_) => taken.push(url),
            Err(error) => assert!(error.is_config() && !said(&error).contains("p@ss"), "{url}"),
        }
    }
    assert!(taken.is_empty(), "{taken:?}");
}

#[tokio::test]
async fn a_proxy_that_answers_by_itself_confirms_nothing() {
    for (status, kind, body) in [
        (200, "text/html", "<html>portal</html>"),
        (202, "text/html", "<html>portal</html>"),
        (302, "text/html", ""),
        (407, "text/html", "who?"),
        (409, "text/html", "<html>conflict</html>"),
        (502, "text/html", "bad"),
    ] {
        let act = Act::answer(status)
            .header("content-type", kind)
            .header("location", "http://portal.invalid/")
            .header("proxy-authenticate", "Basic")
            .body(body);
        let proxy = Peer::start([act]).await;
        let service = builder("http://server.test")
            .proxy(proxy.url().replace("http://", "http://user:secret@"))
            .build()
            .unwrap();
        let error = ends(service.approve("k-1").into_future())
            .await
            .unwrap_err();
        let said = said(&error);
        assert!(
            !said.contains("secret") && !said.contains("dXNlcjpzZWNyZXQ"),
            "{said}"
        );
        let sent = if status == 502 { 4 } else { 1 };
        assert_eq!(proxy.count(), sent, "{status}: {error:?}");
    }
}

// The environment of a process is not to be changed while it runs, so another process has it.
async fn under(environment: &[(&str, &str)], proxied: bool) -> bool {
    let proxy = Peer::start([Act::answer(202)]).await;
    let mut command = again(one_call_to_another_host);
    for name in [
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    ] {
        command.env_remove(name);
    }
    for (name, value) in environment {
        command.env(name, value.replace("PROXY", &proxy.address().to_string()));
    }
    let said = passes(command).await;
    assert!(!said.contains("secret"), "{said}");
    (proxy.count() == 1) == proxied
}

#[tokio::test]
#[ignore = "run by others"]
async fn one_call_to_another_host() {
    let result =
        builder(&std::env::var("ADVERSARY_URL").unwrap_or("http://server.invalid".to_owned()))
            .max_retries(0)
            .build();
    match result {
        Ok(service) => println!(
            "sent: {:?}",
            ends(service.approve("k-1").into_future()).await
        ),
        Err(error) => println!("refused: {}", said(&error)),
    }
}

#[tokio::test]
async fn the_environments_proxy_is_taken_as_curl_takes_it() {
    let proxy = "http://user:secret@PROXY";
    for (environment, proxied) in [
        (&[("HTTP_PROXY", proxy)][..], true),
        (&[("http_proxy", proxy)], true),
        (&[("ALL_PROXY", proxy)], true),
        (&[("HTTPS_PROXY", proxy)], false),
        (&[("HTTP_PROXY", "PROXY")], true),
        (&[("HTTP_PROXY", proxy), ("NO_PROXY", "*")], false),
        (
            &[("HTTP_PROXY", proxy), ("NO_PROXY", "a, .invalid ,b")],
            false,
        ),
        (&[("HTTP_PROXY", proxy), ("NO_PROXY", "invalid")], false),
        (
            &[("HTTP_PROXY", proxy), ("NO_PROXY", "SERVER.invalid")],
            false,
        ),
        (
            &[("HTTP_PROXY", proxy), ("NO_PROXY", "erver.invalid")],
            true,
        ),
        (&[("HTTP_PROXY", proxy), ("NO_PROXY", ",,,")], true),
        // httpoxy: a header of a CGI request.
        (&[("HTTP_PROXY", proxy), ("REQUEST_METHOD", "GET")], false),
        (&[("HTTP_PROXY", "socks5://user:secret@PROXY")], false),
    ] {
        assert!(under(environment, proxied).await, "{environment:?}");
    }
}

#[tokio::test]
async fn an_unusable_proxy_of_the_environment_is_not_passed_by() {
    // Whoever sets one may have to keep requests from going out directly.
    let (http, https) = ("http://server.invalid", "https://server.invalid");
    for (url, environment, refused) in [
        (http, &[("HTTP_PROXY", "http://us er@host")][..], true),
        (http, &[("HTTP_PROXY", "https://host:3128")], true),
        (http, &[("HTTP_PROXY", "http://host:0")], true),
        (https, &[("HTTPS_PROXY", "http://us er@host")], true),
        (http, &[("HTTPS_PROXY", "http://us er@host")], false),
        // A header of a CGI request.
        (
            http,
            &[
                ("HTTP_PROXY", "http://us er@host"),
                ("REQUEST_METHOD", "GET"),
            ],
            false,
        ),
    ] {
        let mut command = again(one_call_to_another_host);
        command.env("ADVERSARY_URL", url);
        command.envs(environment.iter().copied());
        let said = passes(command).await;
        assert_eq!(
            said.contains("refused: "),
            refused,
            "{environment:?}: {said}"
        );
    }
}

#[tokio::test]
async fn a_server_on_any_loopback_address_is_reached_past_the_environments_proxy() {
    let proxy = Peer::start([Act::answer(202)]).await;
    for url in [
        "http://localhost.:1",
        "http://[::ffff:127.0.0.1]:1",
        "http://127.1:1",
        "http://127.9.9.9:1",
    ] {
        let mut command = again(one_call_to_another_host);
        command.env("HTTP_PROXY", proxy.url());
        command.env("ADVERSARY_URL", url);
        passes(command).await;
        assert_eq!(proxy.count(), 0, "{url}");
    }
}
