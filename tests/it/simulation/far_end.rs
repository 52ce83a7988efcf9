//! The far end: the store, the service on it, and what stands in front of the service.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crate::support::forward_the_human_loop;
use aegis_hitl::protocol::X_REQUEST_ID;
use aegis_hitl::server::HitlService;
use aegis_hitl::store::{
    Decide, Decided, MemoryStore, Store, StoreError, Submit, Submitted, Totals, Watch,
};
use aegis_hitl::{Action, RequestId, TenantId};
use bytes::Bytes;
use futures_util::FutureExt;
use http::header::{CONTENT_TYPE, RETRY_AFTER, USER_AGENT};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt;
use uuid::Uuid;

use super::network::{Endpoint, Host, Network};
use super::site::Disturbed;
use super::world::World;
use crate::support::random::Random;

/// The in-memory store behind a network: slow at times, at times out of reach, and it outlives the server.
///
/// Ids and times are the simulation's own, so that every byte repeats itself.
#[derive(Clone)]
pub struct SimulatedStore {
    shared: Arc<Shared>,
}

struct Shared {
    memory: Mutex<MemoryStore>,
    random: Mutex<Random>,
    faults: Mutex<StoreFaults>,
    ids: Mutex<Ids>,
    /// How far the store's clock is off.
    started: (Instant, SystemTime),
    world: World,
}

#[derive(Clone, Copy, Default, Debug)]
pub struct StoreFaults {
    /// The longest delay in milliseconds.
    pub slowness: u64,
    /// The chance of an error before or after the commit, in percent.
    pub errors: u64,
}

#[derive(Default)]
struct Ids {
    simulated: HashMap<RequestId, Known>,
    memory: HashMap<Uuid, Uuid>,
}

#[derive(Clone)]
struct Known {
    id: RequestId,
    created_at: SystemTime,
    decided_at: Option<SystemTime>,
}

impl SimulatedStore {
    pub fn new(seed: u64, world: World) -> Self {
        let mut random = Random::new(seed, 2);
        let clock = SystemTime::UNIX_EPOCH + random.millis(1, 4_000_000_000_000);
        Self {
            shared: Arc::new(Shared {
                memory: Mutex::new(MemoryStore::new()),
                random: Mutex::new(random),
                faults: Mutex::default(),
                ids: Mutex::default(),
                started: (Instant::now(), clock),
                world,
            }),
        }
    }

    fn memory(&self) -> MemoryStore {
        self.shared.memory.lock().unwrap().clone()
    }

    /// Draws how long the store takes before and after it does its work, and whether it fails then.
    fn draw(&self) -> [(Duration, bool); 2] {
        let faults = *self.shared.faults.lock().unwrap();
        let mut random = self.shared.random.lock().unwrap();
        [(); 2].map(|()| {
            (
                random.millis(0, faults.slowness + 1),
                random.percent(faults.errors),
            )
        })
    }

    /// The action with the simulation's id and times in place of the memory's.
    fn simulated(&self, mut action: Action) -> Action {
        let (started, clock) = self.shared.started;
        let now = clock + started.elapsed();
        let mut ids = self.shared.ids.lock().unwrap();
        let number = ids.simulated.len() as u128 + 1;
        let Ids { simulated, memory } = &mut *ids;
        let known = simulated.entry(action.request_id).or_insert_with_key(|id| {
            // A UUIDv7 by its version and variant, as the memory's.
            let uuid = Uuid::from_u128((0x7 << 76) | (0x8 << 60) | number);
            memory.extend(id.as_uuid().map(|id| (uuid, id)));
            Known {
                id: RequestId::from(uuid),
                created_at: now,
                decided_at: None,
            }
        });
        if action.decided_at.is_some() {
            action.decided_at = Some(*known.decided_at.get_or_insert(now));
        }
        action.request_id = known.id.clone();
        action.created_at = Some(known.created_at);
        action
    }
}

impl Disturbed for SimulatedStore {
    fn set_faults(&self, faults: StoreFaults) {
        *self.shared.faults.lock().unwrap() = faults;
    }

    fn forget(&self) {
        *self.shared.memory.lock().unwrap() = MemoryStore::new();
    }
}

impl Store for SimulatedStore {
    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        let [(before, is_lost), (after, is_unknown)] = self.draw();
        sleep(before).await;
        if is_lost {
            return Err(StoreError::unavailable("the store is out of reach"));
        }
        // A task of its own: what the store was asked to do is not taken back when the server ends.
        let (sender, receiver) = oneshot::channel();
        let this = self.clone();
        tokio::spawn(async move {
            let asked = request.clone();
            let decided = this.memory().decide(request).await;
            let decided = decided.map(|decided| match decided {
                Decided::Recorded(action) => Decided::Recorded(this.simulated(action)),
                Decided::Replayed(action) => Decided::Replayed(this.simulated(action)),
                Decided::Duplicate(action) => Decided::Duplicate(this.simulated(action)),
                Decided::Conflict(action) => Decided::Conflict(this.simulated(action)),
                Decided::PayloadMismatch(action) => {
                    Decided::PayloadMismatch(this.simulated(action))
                }
                Decided::Closed(action) => Decided::Closed(this.simulated(action)),
                Decided::SelfApproval(action) => Decided::SelfApproval(this.simulated(action)),
                Decided::DigestMissing(action) => Decided::DigestMissing(this.simulated(action)),
                Decided::EditNotAllowed(action) => Decided::EditNotAllowed(this.simulated(action)),
                Decided::NotFound => Decided::NotFound,
            });
            if let Ok(decided) = &decided {
                this.shared.world.decided(&asked, decided);
            }
            sleep(after).await;
            // A server that has ended reads no answer.
            _ = sender.send(decided);
        });
        let decided = receiver.await;
        if is_unknown {
            return Err(StoreError::unavailable("what became of the commit is open"));
        }
        decided.map_err(|_| StoreError::unavailable("the store has ended"))?
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        let submitted = self.memory().submit(request).await?;
        Ok(match submitted {
            Submitted::Recorded(action) => Submitted::Recorded(self.simulated(action)),
            Submitted::Existing(action) => Submitted::Existing(self.simulated(action)),
            Submitted::PayloadMismatch(action) => {
                Submitted::PayloadMismatch(self.simulated(action))
            }
            Submitted::NotFound => Submitted::NotFound,
        })
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        let known = self.shared.ids.lock().unwrap().memory.get(&id).copied();
        let found = self.memory().find(known.unwrap_or(id), tenant).await?;
        Ok(found.map(|action| self.simulated(action)))
    }

    forward_the_human_loop!(self, self.memory(), {});

    fn watch(&self, id: Uuid) -> Watch {
        self.memory().watch(id)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.memory().check().await
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        self.memory().totals().await
    }
}

/// The tasks of one process, which end with it.
#[derive(Clone)]
struct Process {
    tasks: Arc<Mutex<Vec<AbortHandle>>>,
    world: World,
}

impl Process {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let world = self.world.clone();
        let task = tokio::spawn(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                world.violation(format_args!("a task of the server panicked"));
            }
        });
        self.tasks.lock().unwrap().push(task.abort_handle());
    }

    fn kill(&self) {
        for task in self.tasks.lock().unwrap().drain(..) {
            task.abort();
        }
    }
}

impl<F> hyper::rt::Executor<F> for Process
where
    F: Future + Send + 'static,
{
    fn execute(&self, future: F) {
        self.spawn(async move {
            future.await;
        });
    }
}

/// What stands in front of the service and what it does wrong, in percent.
#[derive(Clone, Copy, Default, Debug)]
pub struct Proxy {
    /// Answers in place of the service, which gets nothing.
    pub refuses: u64,
    /// Answers in place of the service, which has done its work.
    pub hides: u64,
    /// The longest delay of an answer in milliseconds.
    pub slowness: u64,
    /// Says that the opposite decision is the one that was asked for.
    pub lies: u64,
    /// Sends a request again, late, as a network or a proxy may.
    pub repeats: u64,
}

/// A server that runs.
pub struct Server<St> {
    process: Process,
    service: HitlService<St>,
    drain: Arc<Notify>,
}

impl<St: Store> Server<St> {
    pub fn start(
        network: &Network,
        store: St,
        world: &World,
        random: &Arc<Mutex<Random>>,
        proxy: &Arc<Mutex<Proxy>>,
    ) -> Self {
        let process = Process {
            tasks: Arc::default(),
            world: world.clone(),
        };
        let service = HitlService::new(store);
        let drain = Arc::new(Notify::new());
        let mut accepted = network.listen();
        let front = Front {
            service: service.clone(),
            world: world.clone(),
            random: Arc::clone(random),
            proxy: Arc::clone(proxy),
        };
        let (connections, draining) = (process.clone(), Arc::clone(&drain));
        process.spawn(async move {
            while let Some(endpoint) = accepted.recv().await {
                let connection = serve(
                    endpoint,
                    connections.clone(),
                    front.clone(),
                    draining.clone(),
                );
                connections.spawn(connection);
            }
        });
        Self {
            process,
            service,
            drain,
        }
    }

    /// Ends at once, and all that is under way with it.
    pub fn kill(self, network: &Network, host: Host) {
        network.stop_listening(host);
        self.process.kill();
    }

    /// Answers what is under way, as long as it takes or until the deadline.
    pub async fn shut_down(self, network: &Network, deadline: Duration) {
        network.stop_listening(Host::Refuses);
        self.service.drain();
        self.drain.notify_waiters();
        sleep(deadline).await;
        self.process.kill();
    }
}

/// One connection, with the settings of the crate's own accept loop.
async fn serve<St: Store>(
    endpoint: Endpoint,
    process: Process,
    front: Front<St>,
    drain: Arc<Notify>,
) {
    let mut http = auto::Builder::new(process);
    // A client that does not know of the limit yet has its streams refused.
    let streams = front.random(|random| random.pick(&[1, 2, 128]));
    http.http1()
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .header_read_timeout(Duration::from_secs(8))
        .max_buf_size(32 * 1024);
    http.http2()
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .max_header_list_size(32 * 1024)
        .max_concurrent_streams(streams)
        .initial_stream_window_size(256 * 1024)
        .initial_connection_window_size(1024 * 1024)
        .keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10));
    let service = service_fn(move |request| {
        let front = front.clone();
        async move { Ok::<_, Infallible>(front.answer(request).await) }
    });
    let connection = http.serve_connection(TokioIo::new(endpoint), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        biased;
        _ = &mut connection => return,
        () = drain.notified() => connection.as_mut().graceful_shutdown(),
    }
    _ = connection.await;
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

#[derive(Clone)]
struct Front<St> {
    service: HitlService<St>,
    world: World,
    random: Arc<Mutex<Random>>,
    proxy: Arc<Mutex<Proxy>>,
}

impl<St: Store> Front<St> {
    fn random<T>(&self, draw: impl FnOnce(&mut Random) -> T) -> T {
        draw(&mut self.random.lock().unwrap())
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let header = |name| {
            let value = request.headers().get(name);
            value.and_then(|value: &HeaderValue| value.to_str().ok())
        };
        let call = header(X_REQUEST_ID).unwrap_or_default().to_owned();
        let reads = header(USER_AGENT).is_some_and(|agent| agent.starts_with("aegis-hitl/"));
        let mut response = self.answer_to(&call, reads, request).await;
        let wait = response.headers_mut().get_mut(RETRY_AFTER);
        // `AegisService` spreads the waits that it is told, at random, and has no seed for it.
        if let Some(wait) = wait.filter(|wait| reads && matches!(wait.as_bytes(), b"1" | b"3")) {
            *wait = HeaderValue::from_static("0");
        }
        response
    }

    /// `reads` is whether the client reads the body of an answer.
    async fn answer_to(
        &self,
        call: &str,
        reads: bool,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let path = request.uri().path().to_owned();
        self.world.arrived(call, &path);
        let Proxy {
            refuses,
            hides,
            slowness,
            lies,
            repeats,
        } = *self.proxy.lock().unwrap();
        if self.random(|random| random.percent(refuses)) {
            // Only who reads the body knows that such a 409 is none of the protocol's.
            return self.page(reads);
        }
        let mut response = if path == "/charge" {
            self.charge(request).await
        } else if self.random(|random| repeats > 0 && random.percent(repeats)) {
            self.answer_and_repeat(request).await
        } else {
            let answered = self.service.clone().oneshot(request).await;
            let Ok(answer) = answered;
            answer.map(UnsyncBoxBody::new)
        };
        sleep(self.random(|random| random.millis(0, slowness + 1))).await;
        if self.random(|random| random.percent(hides)) {
            // Whoever has passed a request on does not say that it was refused.
            let status = self.random(|random| random.pick(&[500, 502, 504]));
            return self.response(status);
        }
        if response.status() == StatusCode::UNPROCESSABLE_ENTITY
            && self.random(|random| random.percent(lies))
        {
            *response.status_mut() = StatusCode::CONFLICT;
        }
        response
    }

    /// Passes a request on, and once more when its answer may be long forgotten.
    async fn answer_and_repeat(&self, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let body = timeout(Duration::from_secs(10), body.collect()).await;
        let Ok(Ok(body)) = body else {
            return self.response(400);
        };
        let body = body.to_bytes();
        let request = move || Request::from_parts(head.clone(), Full::new(body.clone()));
        let (service, again) = (self.service.clone(), request());
        let late = self.random(|random| random.millis(0, 40_000));
        // It outlives the server.
        tokio::spawn(async move {
            sleep(late).await;
            _ = service.oneshot(again).await;
        });
        let Ok(answer) = self.service.clone().oneshot(request()).await;
        answer.map(UnsyncBoxBody::new)
    }

    /// What a side effect without a key is: it happens each time.
    async fn charge(&self, request: Request<Incoming>) -> Response<Body> {
        _ = timeout(Duration::from_secs(10), request.into_body().collect()).await;
        let (status, wait) = self.random(|random| {
            let wait = random.millis(0, 4000);
            (random.pick(&[200, 200, 500, 503, 429, 408]), wait)
        });
        sleep(wait).await;
        self.response(status)
    }

    /// An answer that is none of the protocol's, as proxies and balancers send it.
    fn page(&self, with_conflict: bool) -> Response<Body> {
        // Nothing of the request was passed on.
        let status = self.random(|random| random.pick(&[500, 502, 503, 403, 403, 429, 408, 409]));
        let status = if status == 409 && !with_conflict {
            502
        } else {
            status
        };
        self.response(status)
    }

    fn response(&self, status: u16) -> Response<Body> {
        let body = Full::from("<html>no</html>").boxed_unsync();
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html"));
        // Clocks differ: a date may lie in another century, in either direction.
        let waits = [
            None,
            None,
            Some("0"),
            Some("1"),
            Some("3"),
            Some("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some("Thu, 31 Dec 2099 23:59:59 GMT"),
            Some("soon"),
        ];
        if let Some(wait) = self.random(|random| random.pick(&waits)) {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(wait));
        }
        response
    }
}
