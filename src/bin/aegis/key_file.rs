//! The key file, and the permissions it needs.

use std::fs::File;
use std::path::Path;

use aegis_hitl::server::Keys;

use crate::failure::Failure;
use crate::file;

/// The most bytes of a key file: some 100,000 keys.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Reads a key file. A file that others may write is refused, because they could let anyone in.
pub(crate) fn read(path: &Path) -> Result<Keys, Failure> {
    let file = file::open(path, "one with a line for each key")?;
    check_writers(path, &file)?;
    let text = file::read(path, &file, MAX_BYTES)?;
    let text = String::from_utf8(text)
        .map_err(|error| Failure::usage(format!("{}", path.display())).because(error))?;
    let keys = Keys::parse(&text)
        .map_err(|error| Failure::usage(format!("{}", path.display())).because(error))?;
    if keys.is_empty() {
        return Err(Failure::usage(format!(
            "{} holds no keys; make one with 'aegis keys new'",
            path.display()
        )));
    }
    Ok(keys)
}

/// The owner of a file can always make it writable, so the owner must be one who can let anyone in
/// anyway.
///
/// A file that others may read gets only a warning. It holds digests of random keys, and the
/// secrets of containers and pods are often readable by all their processes (0444, 0640).
#[cfg(unix)]
fn check_writers(path: &Path, file: &File) -> Result<(), Failure> {
    const READABLE: u32 = 0o044;
    const WRITABLE: u32 = 0o022;
    let mode = file::own_mode(path, file, "let anyone in")?;
    if mode & WRITABLE != 0 {
        return Err(Failure::usage(format!(
            "{} can be written by others (mode {mode:04o}), who could let anyone in; allowed is \
             that its owner alone writes it (chmod go-w)",
            path.display()
        )));
    }
    if mode & READABLE != 0 {
        tracing::warn!(
            target: crate::LOG,
            "{} can be read by others (mode {mode:04o}); it holds the digests of the keys and \
             whose they are",
            path.display()
        );
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_writers(_: &Path, _: &File) -> Result<(), Failure> {
    Ok(())
}
