//! TLS for the HTTP client: roots, identities, and what an untrusted certificate proves.

use std::sync::Arc;
use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls_platform_verifier::Verifier;

use super::Error;
use super::connector::{Builder, Client, ClientSettings, Timed};
use super::proxy::Route;

fn connector(route: Route, mut settings: ClientSettings) -> Result<HttpsConnector<Route>, Error> {
    let http2_only = settings.http2_prior_knowledge;
    let mut config = match settings.tls_config.take() {
        Some(config)
            if settings.root_certificates.is_empty() && settings.client_identity.is_none() =>
        {
            config
        }
        Some(_) => {
            return Err(Error::config(
                "both a TLS configuration and certificates are set; allowed is one, as the configuration has its own",
            ));
        }
        None => config(settings)?,
    };
    // The protocols are those that the client speaks; they are not a setting.
    config.alpn_protocols.clear();
    let builder = HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_only();
    Ok(if http2_only {
        builder.enable_http2().wrap_connector(route)
    } else {
        builder.enable_all_versions().wrap_connector(route)
    })
}

/// The platform's roots and those added to them.
fn config(settings: ClientSettings) -> Result<ClientConfig, Error> {
    let unusable = "the TLS configuration is unusable";
    let mut roots = Vec::new();
    for pem in settings.root_certificates {
        let before = roots.len();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            roots.push(certificate.map_err(|error| {
                Error::config_caused("the root certificate is not valid PEM", error)
            })?);
        }
        if roots.len() == before {
            return Err(Error::config(
                "the root certificate holds no PEM certificate",
            ));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new_with_extra_roots(roots, provider.clone())
        .map_err(|error| Error::config_caused(unusable, error))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::config_caused(unusable, error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    match settings.client_identity {
        Some(pem) => {
            let (chain, key) = identity(&pem)?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| Error::config_caused("the client identity is unusable", error))
        }
        None => Ok(builder.with_no_client_auth()),
    }
}

/// Parses the certificate chain and the private key of a client.
fn identity(pem: &[u8]) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
    let chain = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| Error::config_caused("the client identity is not valid PEM", error))?;
    if chain.is_empty() {
        return Err(Error::config(
            "the client identity holds no PEM certificate; allowed is a chain, its own first, and a private key",
        ));
    }
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| {
        Error::config_caused("the client identity holds no PEM private key", error)
    })?;
    Ok((chain, key))
}

/// Whether a connection failed because the server's certificate is not valid.
pub(super) fn is_untrusted(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    for _ in 0..32 {
        let Some(error) = next else { break };
        let tls = error.downcast_ref::<rustls::Error>();
        if matches!(tls, Some(rustls::Error::InvalidCertificate(_))) {
            return true;
        }
        // The error that an `io::Error` wraps is not its source: `source` skips to that error's
        // source.
        let io = error.downcast_ref::<std::io::Error>();
        next = match io.and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    false
}

/// Makes the client for an https server.
pub(super) fn client(
    builder: &Builder,
    route: Route,
    settings: ClientSettings,
    timeout: Duration,
) -> Result<Client, Error> {
    let connector = connector(route, settings)?;
    Ok(Client::Https(builder.build(Timed::new(connector, timeout))))
}
