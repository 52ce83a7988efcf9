//! Files that a setting names.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::failure::Failure;

/// Opens a regular file. `allowed` says what should be in it.
pub(crate) fn open(path: &Path, allowed: &str) -> Result<File, Failure> {
    // Before it is opened, because opening a FIFO waits for whoever writes to it.
    let metadata = std::fs::metadata(path).map_err(|error| unreadable(path, error))?;
    if !metadata.is_file() {
        return Err(Failure::usage(format!(
            "{} is no regular file; allowed is {allowed}",
            path.display()
        )));
    }
    File::open(path).map_err(|error| unreadable(path, error))
}

/// Reads a file of at most `most` bytes.
pub(crate) fn read(path: &Path, file: &File, most: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = file.take(most + 1).read_to_end(&mut bytes);
    let read = read.map_err(|error| unreadable(path, error))?;
    if read as u64 > most {
        return Err(Failure::usage(format!(
            "{} is larger than {most} bytes",
            path.display()
        )));
    }
    Ok(bytes)
}

/// Checks that a file belongs to the user that this process runs as, or to root, and returns its
/// mode. The owner of a file can always change it. `danger` says what another one could do.
#[cfg(unix)]
pub(crate) fn own_mode(path: &Path, file: &File, danger: &str) -> Result<u32, Failure> {
    use std::os::unix::fs::MetadataExt;

    let metadata = file.metadata().map_err(|error| unreadable(path, error))?;
    let owner = metadata.uid();
    let user = rustix::process::geteuid().as_raw();
    if owner != user && owner != 0 {
        return Err(Failure::usage(format!(
            "{} belongs to the user {owner}, who could {danger}; allowed is that it belongs to the \
             user {user}, whom this server runs as, or to root (chown)",
            path.display()
        )));
    }
    Ok(metadata.mode() & 0o7777)
}

fn unreadable(path: &Path, error: std::io::Error) -> Failure {
    Failure::usage(format!("cannot read {}", path.display())).because(error)
}
