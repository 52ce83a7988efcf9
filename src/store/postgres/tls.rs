//! TLS with a database server: which of its certificates are taken, and what is shown to it.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use rustls_platform_verifier::BuilderVerifierExt as _;

use crate::store::StoreError;

/// The parameters of a URL that name files.
pub(super) const ROOTS: &str = "sslrootcert";
pub(super) const CERTIFICATE: &str = "sslcert";
pub(super) const KEY: &str = "sslkey";

/// What a URL says about TLS beside its mode. Paths are of files in PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tls {
    /// Whether the certificate of the server is verified.
    pub(super) verifies: bool,
    /// The authorities that are trusted. `None` are those of the system.
    pub(super) roots: Option<PathBuf>,
    /// The certificate chain that is shown to the server, and its private key.
    pub(super) identity: Option<(PathBuf, PathBuf)>,
}

impl Tls {
    /// Reads the files.
    pub(super) fn config(&self) -> Result<ClientConfig, StoreError> {
        let failed = |error: rustls::Error| {
            StoreError::unavailable("TLS cannot be set up").with_source(error)
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(failed)?;
        let builder = match &self.roots {
            Some(path) => builder.with_root_certificates(roots(path)?),
            None if self.verifies => builder.with_platform_verifier().map_err(failed)?,
            None => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider))),
        };
        let Some((chain, key)) = &self.identity else {
            return Ok(builder.with_no_client_auth());
        };
        let unusable = |error: rustls::Error| {
            StoreError::incompatible(format!(
                "the store's URL has sslcert={} and sslkey={}; allowed are a certificate and its own private key",
                chain.display(),
                key.display()
            ))
            .with_source(error)
        };
        builder
            .with_client_auth_cert(certificates(CERTIFICATE, chain)?, private_key(key)?)
            .map_err(unusable)
    }
}

fn roots(path: &Path) -> Result<RootCertStore, StoreError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ROOTS, path)? {
        roots
            .add(certificate)
            .map_err(|error| wrong(ROOTS, path, "certificates").with_source(error))?;
    }
    Ok(roots)
}

fn certificates(name: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, StoreError> {
    let wrong = || wrong(name, path, "certificates");
    let found = CertificateDer::pem_file_iter(path).map_err(|error| wrong().with_source(error))?;
    let found: Vec<_> = found
        .collect::<Result<_, _>>()
        .map_err(|error| wrong().with_source(error))?;
    match found.is_empty() {
        true => Err(wrong()),
        false => Ok(found),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, StoreError> {
    PrivateKeyDer::from_pem_file(path)
        .map_err(|error| wrong(KEY, path, "a private key").with_source(error))
}

fn wrong(name: &str, path: &Path, allowed: &str) -> StoreError {
    StoreError::incompatible(format!(
        "the store's URL has {name}={}; allowed is a file that can be read, with {allowed} as PEM",
        path.display()
    ))
}

/// Why there is no TLS with the server at `place`, and what is allowed, if that was the fault.
pub(super) fn explain(error: &tokio_postgres::Error, place: &str) -> Option<StoreError> {
    // The error that an `io::Error` wraps is not its source: `source` skips to that error's source.
    let cause = error.source();
    let io = cause.and_then(|cause| cause.downcast_ref::<io::Error>());
    let fault = io
        .and_then(io::Error::get_ref)
        .and_then(|wrapped| wrapped.downcast_ref::<rustls::Error>());
    use CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, UnknownIssuer,
    };
    let detail = match fault {
        Some(rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. })) => format!(
            "the certificate of PostgreSQL at {place} has expired; allowed is one that is valid now"
        ),
        Some(rustls::Error::InvalidCertificate(
            NotValidForName | NotValidForNameContext { .. },
        )) => {
            format!(
                "the certificate of PostgreSQL at {place} is for another host; allowed is one with the host of the store's URL \
                 as a subjectAltName (a common name is not read)"
            )
        }
        Some(rustls::Error::InvalidCertificate(UnknownIssuer)) => format!(
            "the certificate of PostgreSQL at {place} is of an authority that is not trusted; allowed are those in the file \
             that {ROOTS} names, or else those that the system trusts"
        ),
        Some(rustls::Error::InvalidCertificate(_)) => format!(
            "the certificate of PostgreSQL at {place} is not valid; allowed is one for a server, of an authority that is trusted, \
             and not that authority's own"
        ),
        Some(rustls::Error::AlertReceived(_)) => format!(
            "PostgreSQL at {place} ended the TLS handshake; if it asks for a certificate, allowed is one of an authority that it \
             trusts ({CERTIFICATE} and {KEY})"
        ),
        // The library has no predicates for these.
        None if cause.is_some_and(|cause| cause.to_string().contains("does not support TLS")) => {
            format!(
                "PostgreSQL at {place} offers no TLS; allowed is one with ssl=on, or sslmode=disable or prefer where nobody else \
                 can reach the network"
            )
        }
        Some(_) => format!("there is no TLS with PostgreSQL at {place}"),
        None if error.to_string().contains("TLS") => {
            format!("there is no TLS with PostgreSQL at {place}")
        }
        None => return None,
    };
    Some(StoreError::incompatible(detail))
}

/// Accepts any certificate, for `sslmode=prefer`: it also accepts a connection without TLS, so that
/// verifying would keep nobody out.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl AnyCertificate {
    fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.0.signature_verification_algorithms
    }
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, self.algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, self.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}
