//! `AegisService` over https, with certificates made here.

use std::sync::Arc;

use aegis_hitl::client::Builder;
use aegis_hitl::layer::{Delivery, NotRetried};
use aegis_hitl::testing::{Act, Peer};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::support::service::builder;
use crate::support::{SHORT, ends};

/// A server that offers these protocols, and its certificate as PEM.
async fn server(alpn: &[&[u8]]) -> (Peer, String) {
    server_for(alpn, None).await
}

/// A server that takes only clients with this certificate, if one is given.
async fn server_for(alpn: &[&[u8]], client: Option<&CertificateDer<'static>>) -> (Peer, String) {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match client {
        None => builder.with_no_client_auth(),
        Some(client) => {
            let mut roots = RootCertStore::empty();
            roots.add(client.clone()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        }
    };
    let mut config = builder
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let peer = Peer::start_over([Act::answer(202)], move |stream| acceptor.accept(stream)).await;
    (peer, cert.pem())
}

fn secure(peer: &Peer) -> Builder {
    builder(&format!("https://localhost:{}", peer.address().port()))
}

#[tokio::test]
async fn an_approval_goes_over_https_with_http_1_and_http_2() {
    for alpn in [
        &[b"http/1.1".as_slice()][..],
        &[b"h2"],
        &[b"h2", b"http/1.1"],
    ] {
        let (peer, pem) = server(alpn).await;
        let service = secure(&peer).root_certificate_pem(pem).build().unwrap();
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
async fn a_tls_handshake_that_gets_no_answer_was_never_sent_anything() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let silent = tokio::spawn(async move {
        let mut connections = Vec::new();
        loop {
            connections.push(listener.accept().await.unwrap());
        }
    });
    let service = builder(&format!("https://{address}"))
        .timeout(2 * SHORT)
        .max_retries(1)
        .build()
        .unwrap();
    let error = ends(service.approve("k-1").into_future())
        .await
        .unwrap_err();
    silent.abort();
    assert!(
        error.is_connect() && !error.is_outcome_unknown(),
        "{error:?}"
    );
    assert_eq!(
        (error.attempts(), error.delivery()),
        (2, Delivery::NeverSent)
    );
}

#[tokio::test]
async fn a_certificate_that_nobody_trusts_is_refused_before_anything_is_sent() {
    let (peer, _) = server(&[b"http/1.1"]).await;
    let (_, other) = server(&[b"http/1.1"]).await;
    let service = secure(&peer).root_certificate_pem(other).build().unwrap();
    let error = service.approve("k-1").await.unwrap_err();
    assert!(error.is_connect());
    // It will not be trusted in a second either.
    assert_eq!((error.attempts(), peer.count()), (1, 0));
    assert_eq!(error.not_retried(), Some(NotRetried::Permanent));
}

#[tokio::test]
async fn a_root_certificate_that_is_none_is_named() {
    let (peer, _) = server(&[]).await;
    for pem in [
        "",
        "hello",
        "-----BEGIN CERTIFICATE-----\n???\n-----END CERTIFICATE-----\n",
    ] {
        let error = secure(&peer).root_certificate_pem(pem).build().unwrap_err();
        assert!(error.is_config());
        assert!(error.to_string().contains("root certificate"), "{error}");
    }
}

#[tokio::test]
async fn a_client_proves_itself_by_its_certificate() {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["agent".to_owned()]).unwrap();
    let identity = format!("{}{}", cert.pem(), signing_key.serialize_pem());
    let (peer, pem) = server_for(&[b"h2"], Some(cert.der())).await;
    let known = secure(&peer).root_certificate_pem(pem.clone());
    let service = known.client_identity_pem(identity.clone()).build().unwrap();
    service.approve("k-1").await.unwrap();
    assert_eq!(peer.count(), 1);

    let unknown = secure(&peer).root_certificate_pem(pem).build().unwrap();
    assert!(unknown.approve("k-1").await.is_err());
    assert_eq!(peer.count(), 1);

    for wrong in ["", "hello", &cert.pem(), &signing_key.serialize_pem()] {
        let error = secure(&peer)
            .client_identity_pem(wrong)
            .build()
            .unwrap_err();
        assert!(error.is_config() && error.to_string().contains("client identity"));
    }
}

#[tokio::test]
async fn a_proxy_passes_https_on_from_end_to_end() {
    let (peer, pem) = server(&[b"h2"]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = listener.local_addr().unwrap();
    let server = peer.address();
    let tunnel = tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        let mut server = TcpStream::connect(server).await.unwrap();
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let passing = async move { copy_bidirectional(&mut client, &mut server).await };
        tokio::spawn(passing);
        String::from_utf8(head).unwrap()
    });
    let service = secure(&peer)
        .root_certificate_pem(pem)
        .proxy(format!("http://user:secret@{proxy}"))
        .build()
        .unwrap();
    service.approve("k-1").await.unwrap();
    let head = tunnel.await.unwrap();
    let target = format!("CONNECT localhost:{} HTTP/1.1\r\n", peer.address().port());
    assert!(head.starts_with(&target), "{head}");
    assert!(head.contains("Basic dXNlcjpzZWNyZXQ="), "{head}");
    let seen = &peer.requests()[0];
    assert_eq!(seen.header("proxy-authorization"), None);
}

#[tokio::test]
async fn the_tls_configuration_may_be_ones_own() {
    use tokio_rustls::rustls::ClientConfig;
    use tokio_rustls::rustls::pki_types::pem::PemObject;

    let (peer, pem) = server(&[b"h2"]).await;
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"something".to_vec()];
    let service = secure(&peer).tls_config(config.clone()).build().unwrap();
    service.approve("k-1").await.unwrap();
    assert_eq!(peer.requests()[0].version, http::Version::HTTP_2);

    let both = secure(&peer).tls_config(config).root_certificate_pem(pem);
    assert!(both.build().unwrap_err().is_config());
}
