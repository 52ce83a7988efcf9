//! Certificates that are wrong, and connections of TLS that are cut.

use std::sync::Arc;

use aegis_hitl::client::Builder;
use aegis_hitl::layer::NotRetried;
use aegis_hitl::testing::{Act, Peer};
use rcgen::{CertificateParams, CertifiedKey, KeyPair, generate_simple_self_signed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use super::{builder, said};
use crate::support::ends;
use crate::support::raw::Raw;

pub(super) async fn server(params: CertificateParams) -> (Peer, String) {
    let key = KeyPair::generate().unwrap();
    let cert = params.self_signed(&key).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![cert.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let accept = move |stream| acceptor.accept(stream);
    (
        Peer::start_over([Act::answer(202)], accept).await,
        cert.pem(),
    )
}

pub(super) fn for_name(name: &str) -> CertificateParams {
    CertificateParams::new([name.to_owned()]).unwrap()
}

pub(super) fn secure(port: u16, pem: &str) -> Builder {
    builder(&format!("https://localhost:{port}")).root_certificate_pem(pem)
}

#[tokio::test]
async fn a_certificate_of_another_name_or_time_is_refused_at_once() {
    let mut expired = for_name("localhost");
    expired.not_after = rcgen::date_time_ymd(2001, 1, 1);
    let mut future = for_name("localhost");
    future.not_before = rcgen::date_time_ymd(3000, 1, 1);
    for (what, params) in [
        ("another name", for_name("elsewhere.test")),
        ("expired", expired),
        ("not yet valid", future),
    ] {
        let (peer, pem) = server(params).await;
        let service = secure(peer.address().port(), &pem).build().unwrap();
        let error = ends(service.approve("k-1").into_future())
            .await
            .unwrap_err();
        assert!(
            error.is_connect() && !error.is_outcome_unknown(),
            "{what}: {error:?}"
        );
        assert_eq!(error.not_retried(), Some(NotRetried::Permanent), "{what}");
        assert_eq!((error.attempts(), peer.count()), (1, 0), "{what}");
    }
}

#[test]
fn a_client_identity_of_another_key_is_a_wrong_setting() {
    let key = KeyPair::generate().unwrap();
    let other = KeyPair::generate().unwrap();
    let pem = for_name("agent").self_signed(&key).unwrap().pem();
    let identity = format!("{pem}{}", other.serialize_pem());
    let error = builder("https://localhost:1")
        .client_identity_pem(identity)
        .build()
        .unwrap_err();
    assert!(error.is_config(), "{error:?}");
    assert!(!said(&error).contains("PRIVATE"), "{error:?}");
}

// Whoever sits on the path can close the connection of TLS below, but not say so within it.
#[tokio::test]
async fn an_answer_to_the_end_of_a_tls_connection_needs_that_end() {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![cert.der().clone()],
            PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap(),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    for (is_notified, bytes) in [
        (true, "HTTP/1.1 409 C\r\n\r\n{}"),
        (false, "HTTP/1.1 409 C\r\n\r\n{}"),
        (false, "HTTP/1.1 409 C\r\n\r\n"),
    ] {
        let acceptor = acceptor.clone();
        let peer = Raw::start(move |_, stream| {
            let accepted = acceptor.accept(stream);
            async move {
                let Ok(mut stream) = accepted.await else {
                    return;
                };
                let mut head = Vec::new();
                while !head.ends_with(b"{}") {
                    let Ok(byte) = stream.read_u8().await else {
                        return;
                    };
                    head.push(byte);
                }
                stream.write_all(bytes.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                if is_notified {
                    stream.shutdown().await.unwrap();
                } else {
                    stream.get_mut().0.shutdown().await.unwrap();
                }
                let _ = stream.get_mut().0.read(&mut [0; 1]).await;
            }
        })
        .await;
        let service = builder(&format!("https://localhost:{}", peer.address.port()))
            .root_certificate_pem(cert.pem())
            .max_retries(0)
            .build()
            .unwrap();
        let result = ends(service.approve("k-1").into_future()).await;
        assert_eq!(result.is_ok(), is_notified, "{bytes:?}: {result:?}");
    }
}
