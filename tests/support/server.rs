//! A server in this process.

use std::net::SocketAddr;

use aegis_hitl::server::{HitlService, HitlServiceBuilder, ServeError, Server, Shutdown};
use aegis_hitl::store::Store;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::{Call, HANG};

/// A server on a loopback port of its own.
pub struct Running {
    pub addr: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<Shutdown, ServeError>>,
}

/// Serves the store with the default settings.
pub async fn start<St: Store>(store: St) -> Running {
    start_with(store, |service| service, |server| server).await
}

/// Serves the store with other settings.
pub async fn start_with<St: Store>(
    store: St,
    service: impl FnOnce(HitlServiceBuilder<St>) -> HitlServiceBuilder<St>,
    server: impl FnOnce(Server) -> Server,
) -> Running {
    let service = service(HitlService::builder(store)).build().unwrap();
    let server = server(Server::bind("127.0.0.1:0").await.unwrap());
    let addr = server.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let ended = tokio::spawn(server.serve(service, async move { _ = stopped.await }));
    Running { addr, stop, ended }
}

impl Running {
    /// A `POST /hitl/{action}` of tenant `t`, thread `h` with the key.
    pub fn post(&self, action: &str, key: &str) -> Call {
        Call::post(self.addr, action, key)
    }

    pub fn approve(&self, key: &str) -> Call {
        self.post("approve", key)
    }

    pub fn reject(&self, key: &str) -> Call {
        self.post("reject", key)
    }

    pub fn submit(&self, key: &str) -> Call {
        self.post("actions", key)
    }

    /// A `GET /hitl/status/{id}` without credentials.
    pub fn status(&self, id: &str) -> Call {
        self.get(&format!("/api/v1/hitl/status/{id}"))
    }

    pub fn get(&self, path: &str) -> Call {
        Call::new(self.addr, "GET", path)
    }

    /// Asserts that the server is well.
    pub async fn still_answers(&self) {
        let reply = self.approve(&Uuid::new_v4().to_string()).send().await;
        assert_eq!(reply.status, 202);
    }

    /// Starts the shutdown and leaves the rest to run.
    pub fn begin_stop(self) -> JoinHandle<Result<Shutdown, ServeError>> {
        _ = self.stop.send(());
        self.ended
    }

    /// Shuts down and says how it ended.
    pub async fn stop(self) -> Shutdown {
        let ended = tokio::time::timeout(HANG, self.begin_stop());
        ended.await.unwrap().unwrap().unwrap()
    }
}
