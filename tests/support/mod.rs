//! What the server's tests share: an embedded store, a store that fails on command, a running server, and clients.

// Each test crate takes what it needs.
#![allow(dead_code, unreachable_pub, unused_imports)]

mod client;
mod disk;
pub mod h2;
mod log;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aegis_hitl::server::{HitlService, HitlServiceBuilder, ServeError, Server, Shutdown};
use aegis_hitl::store::{Decide, Decided, Store, StoreError, Submit, Submitted, Totals, Watch};
use aegis_hitl::{Action, TenantId};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use uuid::Uuid;

pub use self::client::{Call, Reply, raw, raw_until_closed};
pub use self::disk::{Disk, edit};
pub use self::log::Log;

/// Far beyond what any step takes; only a hang gets here.
pub const HANG: Duration = Duration::from_secs(30);

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
        Call::new(self.addr, "POST", format!("/api/v1/hitl/{action}"))
            .header("Tenant-Id", "t")
            .header("Thread-Id", "h")
            .header("Idempotency-Key", key)
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

/// What a [`Faulty`] store does when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Mood {
    Well,
    /// Answers with an error.
    Fails,
    /// Answers only once [`Faulty::release`] is called.
    Hangs,
    /// Panics.
    Panics,
}

/// A store in front of another one, which fails on command.
#[derive(Clone)]
pub struct Faulty<St> {
    store: St,
    shared: Arc<Shared>,
}

struct Shared {
    mood: AtomicUsize,
    release: Notify,
    arrived: Notify,
    asked: AtomicUsize,
}

impl<St: Store> Faulty<St> {
    pub fn new(store: St, mood: Mood) -> Self {
        Self {
            store,
            shared: Arc::new(Shared {
                mood: AtomicUsize::new(mood as usize),
                release: Notify::new(),
                arrived: Notify::new(),
                asked: AtomicUsize::new(0),
            }),
        }
    }

    pub fn set(&self, mood: Mood) {
        self.shared.mood.store(mood as usize, Ordering::SeqCst);
    }

    /// Lets one call go on that hangs.
    pub fn release(&self) {
        self.shared.release.notify_one();
    }

    /// Waits until a call arrives.
    pub async fn arrived(&self) {
        self.shared.arrived.notified().await;
    }

    /// How many calls have come, of any kind.
    pub fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }

    async fn pass(&self) -> Result<(), StoreError> {
        self.shared.asked.fetch_add(1, Ordering::SeqCst);
        self.shared.arrived.notify_one();
        match self.shared.mood.load(Ordering::SeqCst) {
            mood if mood == Mood::Fails as usize => {
                Err(StoreError::unavailable("/secret/path: disk I/O error"))
            }
            mood if mood == Mood::Hangs as usize => {
                self.shared.release.notified().await;
                Ok(())
            }
            mood if mood == Mood::Panics as usize => panic!("as the test asked"),
            _ => Ok(()),
        }
    }
}

impl<St: Store> Store for Faulty<St> {
    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        self.pass().await?;
        self.store.decide(request).await
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        self.pass().await?;
        self.store.submit(request).await
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        self.pass().await?;
        self.store.find(id, tenant).await
    }

    fn watch(&self, id: Uuid) -> Watch {
        self.store.watch(id)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.pass().await?;
        self.store.check().await
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        self.store.totals().await
    }
}
