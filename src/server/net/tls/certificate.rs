//! The certificate and the private key of a server.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::Certificate;
use x509_cert::der::Decode;

/// The protocols that the server offers (ALPN).
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The certificate chain and the private key of a [`Server`](crate::server::Server) that speaks
/// TLS 1.2 and 1.3.
///
/// ```no_run
/// use aegis_hitl::server::{Server, Tls};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let tls = Tls::from_pem(&std::fs::read("chain.pem")?, &std::fs::read("key.pem")?)?;
/// let server = Server::bind("0.0.0.0:8443").await?.tls(tls);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Tls {
    config: Arc<ServerConfig>,
    end: Option<SystemTime>,
}

impl Tls {
    /// Takes a certificate chain, the server's own certificate first, and the private key of that
    /// certificate, both as PEM. Either may hold other items, which are skipped, so that both can
    /// be the same file.
    ///
    /// # Errors
    ///
    /// If there is no certificate or no key, if one is malformed or of an unknown kind, or if the
    /// key is not that of the certificate. An encrypted key counts as none.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, InvalidTls> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<_, _>>()
            .map_err(|error| InvalidTls(Kind::Certificate(error)))?;
        if chain.is_empty() {
            return Err(InvalidTls(Kind::NoCertificate));
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| {
            InvalidTls(match error {
                pem::Error::NoItemsFound => Kind::NoKey,
                error => Kind::Key(error),
            })
        })?;
        let ends = chain.iter().filter_map(end);
        let end = ends.min();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        // Checked by itself, so that the error names the key.
        (provider.key_provider)
            .load_private_key(key.clone_key())
            .map_err(|error| InvalidTls(Kind::UnusableKey(error)))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map(|builder| builder.with_no_client_auth())
            .and_then(|builder| builder.with_single_cert(chain, key))
            .map_err(|error| {
                InvalidTls(match error {
                    rustls::Error::InconsistentKeys(_) => Kind::Mismatch,
                    error => Kind::Unusable(error),
                })
            })?;
        Ok(Self {
            end,
            ..Self::from_config(config)
        })
    }

    /// Takes a configuration of one's own, such as one that asks for certificates of clients. The
    /// protocols offered (ALPN) are those of the server, and early data is not accepted, because it
    /// can be replayed.
    pub fn from_config(mut config: ServerConfig) -> Self {
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        config.max_early_data_size = 0;
        Self {
            config: Arc::new(config),
            end: None,
        }
    }

    /// Returns when the chain ends: its certificate that ends first. `None` if that is not known, as
    /// for [a configuration of one's own](Self::from_config).
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.end
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

/// When a certificate ends. `None` if it cannot be parsed, which is up to rustls to refuse.
fn end(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let certificate = Certificate::from_der(certificate).ok()?;
    let end = certificate.tbs_certificate.validity.not_after;
    UNIX_EPOCH.checked_add(end.to_unix_duration())
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

/// The error of a [`Tls`] that cannot be. It repeats nothing of the key.
#[derive(Debug)]
pub struct InvalidTls(Kind);

#[derive(Debug)]
enum Kind {
    NoCertificate,
    Certificate(pem::Error),
    NoKey,
    Key(pem::Error),
    UnusableKey(rustls::Error),
    Mismatch,
    Unusable(rustls::Error),
}

impl InvalidTls {
    /// Returns whether the key by itself is wrong, or missing.
    pub fn is_key(&self) -> bool {
        matches!(self.0, Kind::NoKey | Kind::Key(_) | Kind::UnusableKey(_))
    }

    /// Returns whether the key is not that of the certificate.
    pub fn is_mismatch(&self) -> bool {
        matches!(self.0, Kind::Mismatch)
    }
}

impl fmt::Display for InvalidTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Kind::NoCertificate => {
                "there is no certificate; allowed is a chain as PEM, the server's own first"
            }
            Kind::Certificate(_) => "a certificate is not valid PEM",
            Kind::NoKey => {
                "there is no private key; allowed is one as PEM, in the form of PKCS #8, PKCS #1 \
                 or SEC 1, that is not encrypted"
            }
            Kind::Key(_) => "the private key is not valid PEM",
            Kind::UnusableKey(_) => {
                "the private key cannot be used; allowed are RSA of 2048 to 4096 bits, ECDSA with \
                 P-256 or P-384, and Ed25519"
            }
            Kind::Mismatch => "the private key is not that of the certificate",
            Kind::Unusable(_) => "the certificate cannot be used",
        })
    }
}

impl StdError for InvalidTls {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0 {
            Kind::NoCertificate | Kind::NoKey | Kind::Mismatch => None,
            // What ring says of a key it says in an error of its own words, without the key.
            Kind::Certificate(error) | Kind::Key(error) => Some(error),
            Kind::UnusableKey(error) | Kind::Unusable(error) => Some(error),
        }
    }
}
