//! The PEM files of the server's certificate and its key.

use std::fs::File;
use std::path::{Path, PathBuf};

use aegis_hitl::server::Tls;

use crate::failure::Failure;
use crate::file;

/// The most bytes of each file.
const MAX_BYTES: u64 = 1024 * 1024;

/// The files of a certificate chain and its private key.
#[derive(Debug)]
pub(crate) struct TlsFiles {
    certificate: PathBuf,
    key: PathBuf,
}

impl TlsFiles {
    /// Takes both files or none.
    pub(crate) fn of(
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
    ) -> Result<Option<Self>, Failure> {
        match (certificate, key) {
            (None, None) => Ok(None),
            (Some(certificate), Some(key)) => Ok(Some(Self { certificate, key })),
            (Some(_), None) => Err(Failure::usage(
                "there is a certificate (--tls-cert), and no private key (--tls-key)",
            )),
            (None, Some(_)) => Err(Failure::usage(
                "there is a private key (--tls-key), and no certificate (--tls-cert)",
            )),
        }
    }

    /// Reads both files. Errors name the one that is wrong.
    pub(crate) fn read(&self) -> Result<Tls, Failure> {
        let allowed = "one with the certificate chain as PEM";
        let file = file::open(&self.certificate, allowed)?;
        let chain = file::read(&self.certificate, &file, MAX_BYTES)?;
        let file = file::open(&self.key, "one with the private key as PEM")?;
        check_readers(&self.key, &file)?;
        let key = file::read(&self.key, &file, MAX_BYTES)?;
        Tls::from_pem(&chain, &key).map_err(|error| {
            let (certificate, key) = (self.certificate.display(), self.key.display());
            Failure::usage(match error {
                _ if error.is_mismatch() => format!("{key} does not fit {certificate}"),
                _ if error.is_key() => key.to_string(),
                _ => certificate.to_string(),
            })
            .because(error)
        })
    }

    /// Names both files.
    pub(crate) fn names(&self) -> String {
        format!("{} and {}", self.certificate.display(), self.key.display())
    }
}

/// Refuses a key that others can read, or that others could replace: they could pose as the server.
///
/// Its group may read it, because a group is how a key is shared with the servers of a machine
/// (0640), and with the processes of a pod (`fsGroup`).
#[cfg(unix)]
fn check_readers(path: &Path, file: &File) -> Result<(), Failure> {
    const FORBIDDEN: u32 = 0o026;
    let mode = file::own_mode(path, file, "pose as this server")?;
    if mode & FORBIDDEN != 0 {
        return Err(Failure::usage(format!(
            "{} can be read or written by others (mode {mode:04o}), who could pose as this server; \
             allowed is that its owner alone writes it, and that its owner and its group read it \
             (chmod g-w,o-rw)",
            path.display()
        )));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_readers(_: &Path, _: &File) -> Result<(), Failure> {
    Ok(())
}
