//! Without the crate feature `tls`, no server has TLS.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use super::activity::Activity;
use super::socket::Socket;
use super::stream::Stream;
use crate::server::ops::metrics::Metrics;

#[derive(Debug, Clone)]
pub(crate) enum Acceptor {}

impl Acceptor {
    pub(crate) async fn watch_expiry(self, _: Arc<Metrics>) -> Infallible {
        match self {}
    }

    pub(super) async fn accept(&self, _: Socket, _: &Arc<Activity>) -> io::Result<Stream> {
        match *self {}
    }
}
