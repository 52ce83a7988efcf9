//! Without the crate feature `tls`, no server has TLS.

use std::io;
use std::sync::Arc;

use super::activity::Activity;
use super::socket::Socket;
use super::stream::Stream;

#[derive(Debug, Clone)]
pub(crate) enum Acceptor {}

impl Acceptor {
    pub(super) async fn accept(&self, _: Socket, _: &Arc<Activity>) -> io::Result<Stream> {
        match *self {}
    }
}
