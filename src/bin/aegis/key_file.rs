//! The key file, and the permissions it needs.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use aegis_hitl::server::Keys;

use crate::failure::Failure;

/// The most bytes of a key file: some 100,000 keys.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Reads a key file. A file that others may write is refused, because they could let anyone in.
pub(crate) fn read(path: &Path) -> Result<Keys, Failure> {
    let unreadable =
        |error| Failure::usage(format!("cannot read {}", path.display())).because(error);
    // Before it is opened, because opening a FIFO waits for whoever writes to it.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(Failure::usage(format!(
            "{} is no regular file; allowed is one with a line for each key",
            path.display()
        )));
    }
    let file = File::open(path).map_err(unreadable)?;
    check_writers(path, &file)?;
    let mut text = String::new();
    let read = file
        .take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if read as u64 > MAX_BYTES {
        return Err(Failure::usage(format!(
            "{} is larger than {MAX_BYTES} bytes",
            path.display()
        )));
    }
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
    use std::os::unix::fs::MetadataExt;

    const READABLE: u32 = 0o044;
    const WRITABLE: u32 = 0o022;
    let metadata = file.metadata().map_err(|error| {
        Failure::usage(format!("cannot read {}", path.display())).because(error)
    })?;
    let owner = metadata.uid();
    let user = rustix::process::geteuid().as_raw();
    if owner != user && owner != 0 {
        return Err(Failure::usage(format!(
            "{} belongs to the user {owner}, who could let anyone in; allowed is that it belongs to \
             the user {user}, whom this server runs as, or to root (chown)",
            path.display()
        )));
    }
    let mode = metadata.mode() & 0o7777;
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
