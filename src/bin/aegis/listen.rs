//! What the server listens on: an address, or a Unix socket.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use aegis_hitl::server::Server;
use serde::Deserialize;

use crate::failure::Failure;
#[cfg(unix)]
use crate::unix_socket::UnixSocket;

/// What precedes the path of a Unix socket.
const UNIX: &str = "unix:";

/// An address with a port, or `unix:` with a path.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum Listen {
    Tcp(SocketAddr),
    #[cfg(unix)]
    Unix(PathBuf),
}

impl Default for Listen {
    fn default() -> Self {
        Self::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8000))
    }
}

impl FromStr for Listen {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix(UNIX) {
            #[cfg(unix)]
            Some(path) if !path.is_empty() => Ok(Self::Unix(PathBuf::from(path))),
            #[cfg(not(unix))]
            Some(_) => Err("there are no Unix sockets on this system"),
            #[cfg(unix)]
            Some(_) => Err("no path of a Unix socket; allowed is one such as \
                            unix:/run/aegis/aegis.sock"),
            None => text.parse().map(Self::Tcp).map_err(|_| {
                "no address; allowed is an IP address with a port, such as 127.0.0.1:8000, or \
                 unix: with the path of a socket"
            }),
        }
    }
}

impl TryFrom<String> for Listen {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            #[cfg(unix)]
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

/// What the server is bound to.
#[derive(Debug)]
pub(crate) enum Bound {
    Tcp(SocketAddr),
    /// The socket is removed when this is dropped.
    #[cfg(unix)]
    Unix(UnixSocket),
}

impl Listen {
    /// Binds a server to it. A Unix socket gets this mode, or 0600.
    pub(crate) async fn bind(&self, mode: Option<Mode>) -> Result<(Server, Bound), Failure> {
        let cannot = |error| Failure::other(format!("cannot listen on {self}")).because(error);
        match self {
            Self::Tcp(_) if mode.is_some() => Err(Failure::usage(
                "there is a mode for a Unix socket (--socket-mode), and --listen names none",
            )),
            Self::Tcp(address) => {
                let server = Server::bind(address).await.map_err(cannot)?;
                let address = server.local_addr().map_err(cannot)?;
                Ok((server, Bound::Tcp(address)))
            }
            #[cfg(unix)]
            Self::Unix(path) => {
                let (listener, socket) = UnixSocket::bind(path, mode.unwrap_or_default()).await?;
                let server = Server::from_unix_listener(listener);
                Ok((server, Bound::Unix(socket)))
            }
        }
    }
}

/// The permissions of a Unix socket, in octal. To connect takes the one to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
#[cfg_attr(not(unix), expect(dead_code, reason = "there are no Unix sockets"))]
pub(crate) struct Mode(pub(crate) u32);

impl Default for Mode {
    fn default() -> Self {
        Self(0o600)
    }
}

impl FromStr for Mode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_octal = !text.is_empty() && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match u32::from_str_radix(text, 8) {
            Ok(mode) if is_octal && mode <= 0o777 => Ok(Self(mode)),
            _ => Err("no mode; allowed are permissions in octal, such as 0660"),
        }
    }
}

impl TryFrom<String> for Mode {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}
