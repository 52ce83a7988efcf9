//! `AegisService` over https, with certificates made here.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

use std::sync::Arc;

use aegis_hitl::AegisService;
use aegis_hitl::layer::Backoff;
use aegis_hitl::testing::{Act, Peer};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

/// A server that offers these protocols, and its certificate as PEM.
async fn server(alpn: &[&[u8]]) -> (Peer, String) {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let peer = Peer::start_over([Act::answer(202)], move |stream| acceptor.accept(stream)).await;
    (peer, cert.pem())
}

fn builder(peer: &Peer) -> aegis_hitl::client::Builder {
    AegisService::builder()
        .base_url(format!("https://localhost:{}", peer.address().port()))
        .tenant_id("acme")
        .thread_id("run-7")
        .backoff(Backoff::none())
}

#[tokio::test]
async fn an_approval_goes_over_https_with_http_1_and_http_2() {
    for alpn in [
        &[b"http/1.1".as_slice()][..],
        &[b"h2"],
        &[b"h2", b"http/1.1"],
    ] {
        let (peer, pem) = server(alpn).await;
        let service = builder(&peer).root_certificate_pem(pem).build().unwrap();
        for key in ["k-1", "k-2", "k-3"] {
            let receipt = service.approve(key).await.unwrap();
            assert_eq!(receipt.attempts(), 1);
        }
        let seen = peer.requests();
        assert_eq!(seen.len(), 3);
        // HTTP/2 has no `Host` header.
        assert_eq!(seen[0].header("host").is_none(), alpn[0] == b"h2");
    }
}

#[tokio::test]
async fn a_certificate_that_nobody_trusts_is_refused_before_anything_is_sent() {
    let (peer, _) = server(&[b"http/1.1"]).await;
    let (_, other) = server(&[b"http/1.1"]).await;
    let service = builder(&peer).root_certificate_pem(other).build().unwrap();
    let error = service.approve("k-1").await.unwrap_err();
    assert!(error.is_connect());
    assert_eq!(peer.count(), 0);
}

#[tokio::test]
async fn a_root_certificate_that_is_none_is_named() {
    let (peer, _) = server(&[]).await;
    for pem in [
        "",
        "hello",
        "-----BEGIN CERTIFICATE-----\n???\n-----END CERTIFICATE-----\n",
    ] {
        let error = builder(&peer)
            .root_certificate_pem(pem)
            .build()
            .unwrap_err();
        assert!(error.is_config());
        assert!(error.to_string().contains("root certificate"), "{error}");
    }
}
