//! What a store does by itself: it ends what is over, publishes and chains events, and tells other
//! servers.

use std::future;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Notify, watch};
use tokio_postgres::AsyncMessage;
use tokio_postgres::types::Type;

use super::Inner;
use super::address::Address;
use super::fault::Fault;
use super::rows::get;
use super::session::{Pool, Session, Values};
use super::state::State;
use super::wall::Scope;
use crate::store::StoreError;

/// How often records that are due are looked for, and what other servers did.
const EACH: Duration = Duration::from_millis(500);

/// The most records that one transaction brings up to the present.
const MAX_DUE: i64 = 256;

/// How often the partitions of the months to come are looked for.
const PARTITIONS_EACH: Duration = Duration::from_secs(6 * 3600);

/// The shortest pause between two notifications of other servers.
const NOTIFY_PAUSE: Duration = Duration::from_millis(20);

/// The pause before a connection that was lost is made again.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// The one channel. A notification says only that something was recorded.
const CHANNEL: &str = "aegis";

/// Wake-ups of the tasks.
#[derive(Debug, Default)]
pub(super) struct Bells {
    /// Something was recorded here, which other servers may wait for.
    pub(super) recorded: Notify,
    /// Another server recorded something.
    pub(super) elsewhere: Notify,
    closed: watch::Sender<bool>,
}

impl Bells {
    /// Ends the tasks.
    pub(super) fn close(&self) {
        self.closed.send_replace(true);
    }

    fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Completes when the store is closed.
    async fn closed(&self) {
        // The sender is in `self`, so this cannot fail.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }
}

impl Inner {
    /// Starts the tasks. They end with the store.
    pub(super) fn start_tasks(self: &Arc<Self>, direct: Address) {
        self.start_lanes();
        self.task(|store| async move {
            let due = store.settle().await;
            if let Err(error) = due {
                tracing::debug!(%error, "what is due cannot be settled");
            }
            EACH
        });
        let partitioned = Arc::new(std::sync::Mutex::new(None::<Instant>));
        self.task(move |store| {
            let partitioned = partitioned.clone();
            async move {
                let is_due = {
                    let mut last = partitioned.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let is_due = last.is_none_or(|last| last.elapsed() > PARTITIONS_EACH);
                    if is_due {
                        *last = Some(Instant::now());
                    }
                    is_due
                };
                if is_due && let Err(fault) = make_partitions(&store.pool).await {
                    tracing::warn!(error = %fault.into_error(), "the partitions of the months to come cannot be made");
                }
                EACH
            }
        });
        self.task(|store| async move { store.chain().await });
        let bells = Arc::downgrade(&self.bells);
        self.task(move |store| {
            let bells = bells.clone();
            async move {
                if let Err(error) = store.follow().await {
                    tracing::debug!(%error, "events cannot be published");
                }
                let until = tokio::time::Instant::now() + EACH;
                let watchers = store.watchers.clone();
                drop(store);
                // While nobody waits here for what others record, it is published twice a second, and
                // not with each notification. Whoever reads events publishes them first.
                let _ = tokio::time::timeout_at(until, watchers.someone()).await;
                // Whatever came meanwhile rings at once.
                if let Some(bells) = bells.upgrade() {
                    let _ = tokio::time::timeout_at(until, bells.elsewhere.notified()).await;
                }
                Duration::ZERO
            }
        });
        let bells = Arc::downgrade(&self.bells);
        self.task(move |store| {
            let bells = bells.clone();
            async move {
                let store = Arc::downgrade(&store);
                if let Some(bells) = bells.upgrade() {
                    tokio::select! {
                        () = bells.recorded.notified() => {}
                        () = bells.closed() => return Duration::ZERO,
                    }
                }
                if let Some(store) = store.upgrade()
                    && let Err(fault) = store.notify().await
                {
                    tracing::debug!(error = %fault.into_error(), "other servers cannot be notified");
                }
                NOTIFY_PAUSE
            }
        });
        let (bells, state) = (Arc::downgrade(&self.bells), self.state.clone());
        tokio::spawn(async move {
            while let Some(bells) = bells.upgrade().filter(|bells| !bells.is_closed()) {
                if let Err(error) = listen(&direct, &bells, &state).await {
                    tracing::debug!(%error, "the connection that listens is lost");
                }
                drop(bells);
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
        });
    }

    /// Runs a step again and again, each time after the pause that it returns, until the store is
    /// closed or dropped.
    fn task<F, Fut>(self: &Arc<Self>, step: F)
    where
        F: Fn(Arc<Self>) -> Fut + Send + 'static,
        Fut: Future<Output = Duration> + Send,
    {
        let store: Weak<Self> = Arc::downgrade(self);
        let bells = Arc::downgrade(&self.bells);
        tokio::spawn(async move {
            while let Some(store) = store.upgrade() {
                if store.state.is_closing() {
                    break;
                }
                let pause = step(store).await;
                let Some(bells) = bells.upgrade() else {
                    break;
                };
                let closed = bells.closed();
                let _ = tokio::time::timeout(pause, closed).await;
            }
        });
    }

    async fn settle(&self) -> Result<(), StoreError> {
        while self.settle_due(MAX_DUE).await.map_err(Fault::into_error)? {}
        Ok(())
    }

    /// Writes this server's heartbeat, which shows that a write is durable, and with it all that is
    /// before it in the log.
    pub(super) async fn beat(&self, session: Session) -> Result<(), Fault> {
        let (unsure, begun) = (self.state.doubts(), Instant::now());
        let server: &Values<'_> = &[(&self.server, Type::UUID)];
        let (started, beaten) = tokio::join!(
            biased;
            session.begin(),
            session.query(
                "INSERT INTO heartbeat (server, at) VALUES ($1, clock_timestamp()) \
                 ON CONFLICT (server) DO UPDATE SET at = excluded.at RETURNING at AS now",
                server,
            ),
        );
        started?;
        if let Some(row) = beaten?.first() {
            let now: SystemTime = get(row, "now")?;
            self.state.set_time(now);
        }
        session.finish().await?;
        self.state.set_written(unsure, begun);
        Ok(())
    }

    /// Tells other servers that something was recorded. It is a hint, so it need not be durable.
    async fn notify(&self) -> Result<(), Fault> {
        let mut session = Session::open(&self.pool, Scope::Nobody).await?;
        let notify = format!("BEGIN; SET LOCAL synchronous_commit = off; NOTIFY {CHANNEL}; COMMIT");
        session.run(&notify).await?;
        session.release();
        Ok(())
    }
}

/// Makes the partitions of this month and the next two, if the user may, and removes the heartbeats of
/// servers that are gone.
pub(super) async fn make_partitions(pool: &Pool) -> Result<(), Fault> {
    // A partition is made as a table of its own and attached, which lets others append meanwhile.
    // What is in the default partition already stays there.
    const MAKE: &str = "DO $do$ DECLARE month timestamptz; name text; BEGIN \
         PERFORM pg_advisory_xact_lock(4702394921426175818); \
         IF has_schema_privilege(current_schema(), 'CREATE') \
           AND pg_has_role((SELECT relowner FROM pg_class WHERE oid = 'event'::regclass), 'USAGE') THEN \
         FOR later IN 0..2 LOOP \
           month := date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC' + make_interval(months => later)) AT TIME ZONE 'UTC'; \
           name := 'event_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM'); \
           CONTINUE WHEN to_regclass(name) IS NOT NULL; \
           CONTINUE WHEN EXISTS (SELECT FROM event_default WHERE at >= month \
             AND at < (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC'); \
           EXECUTE format('CREATE TABLE %I (LIKE event INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name); \
           EXECUTE format('ALTER TABLE event ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', \
             name, month, (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC'); \
         END LOOP; \
         END IF; \
         DELETE FROM heartbeat WHERE at < clock_timestamp() - interval '1 day'; \
         END $do$";
    let session = Session::open(pool, Scope::Nobody).await?;
    session.begin().await?;
    session.run(MAKE).await?;
    session.finish().await
}

/// Listens on a connection of its own until that is lost.
///
/// Behind a pooler the connections of requests can outlive the database. If it was started again, or
/// another one took its place, this connection alone shows it.
async fn listen(
    address: &Address,
    bells: &Bells,
    state: &State,
) -> Result<(), tokio_postgres::Error> {
    let (client, mut connection) = address.config.connect(address.tls.clone()).await?;
    let listen = format!("LISTEN {CHANNEL}");
    let listening = client.batch_execute(&listen);
    let mut listening = std::pin::pin!(listening);
    let mut is_listening = false;
    loop {
        tokio::select! {
            done = &mut listening, if !is_listening => {
                done?;
                is_listening = true;
                // What came before is seen now.
                bells.elsewhere.notify_one();
            }
            message = future::poll_fn(|context| connection.poll_message(context)) => match message {
                Some(Ok(AsyncMessage::Notification(_))) => bells.elsewhere.notify_one(),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    state.set_unsure();
                    return Err(error);
                }
                None => {
                    state.set_unsure();
                    return Ok(());
                }
            },
            () = bells.closed() => return Ok(()),
        }
    }
}
