//! The Unix socket that the server listens on, from its making to its removal.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

use crate::failure::Failure;
use crate::listen::Mode;

/// How long another server may take to make a socket in the same folder.
const TURN: Duration = Duration::from_secs(5);

/// A socket that this process made. Dropping it removes the file, if it is still this socket.
#[derive(Debug)]
pub(crate) struct UnixSocket {
    path: PathBuf,
    /// The device and the inode.
    id: (u64, u64),
}

impl UnixSocket {
    /// Makes a socket and listens on it. One that a dead server left is replaced. One on which
    /// somebody listens is not, and neither is another kind of file.
    pub(crate) async fn bind(path: &Path, mode: Mode) -> Result<(UnixListener, Self), Failure> {
        // Two servers that start at once could take each other's socket for one that was left.
        let _turn = turn(path).await;
        remove_stale(path).await?;
        let cannot =
            |error| Failure::other(format!("cannot listen on {}", path.display())).because(error);
        // Nobody else may connect before the mode is set.
        let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        let listener = bound.map_err(cannot)?;
        let metadata = std::fs::symlink_metadata(path).map_err(cannot)?;
        let socket = Self {
            path: path.to_owned(),
            id: id(&metadata),
        };
        let permissions = std::fs::Permissions::from_mode(mode.0);
        std::fs::set_permissions(path, permissions).map_err(cannot)?;
        Ok((listener, socket))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for UnixSocket {
    /// While the server still listens nobody takes the socket for one that was left, so this removes
    /// no other server's.
    fn drop(&mut self) {
        let metadata = std::fs::symlink_metadata(&self.path);
        if metadata.is_ok_and(|metadata| id(&metadata) == self.id) {
            // If it stays, the next server replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Waits for the turn to make a socket in this folder. Where folders cannot be locked, there are no
/// turns.
async fn turn(path: &Path) -> Option<File> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let folder = File::open(folder).ok()?;
    let locked = async {
        let mut waits = false;
        loop {
            match folder.try_lock() {
                Err(TryLockError::WouldBlock) => {}
                ended => return ended.is_ok(),
            }
            if !std::mem::replace(&mut waits, true) {
                tracing::info!(
                    target: crate::LOG,
                    "another server is making a socket in the folder of {}",
                    path.display()
                );
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(TURN, locked).await.ok()?.then_some(folder)
}

/// Removes a socket that nobody listens on.
async fn remove_stale(path: &Path) -> Result<(), Failure> {
    let cannot = |what: &str, error: io::Error| {
        Failure::other(format!("cannot {what} {}", path.display())).because(error)
    };
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            return Err(Failure::usage(format!(
                "{} is no socket; allowed is a path where there is nothing, or a socket that a \
                 server left",
                path.display()
            )));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(cannot("look at", error)),
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A full queue is the queue of somebody who listens.
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
            return Err(cannot("tell whether another server listens on", error));
        }
        Ok(_) | Err(_) => {
            return Err(Failure::other(format!(
                "another server listens on {}",
                path.display()
            )));
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(cannot("replace the socket that a server left:", error))
        }
        _ => Ok(()),
    }
}
