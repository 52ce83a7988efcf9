//! A thousand who wait at once, over connections that are cut and a server that is restarted.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aegis_hitl::client::EventCursor;
use aegis_hitl::store::Store;
use aegis_hitl::{Decision, RequestId, TenantId};
use futures_util::StreamExt;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::support::service::builder;
use crate::support::{Disk, HANG, alone, descriptors, ends, start};

const WAITERS: usize = 1000;
const ACTIONS: usize = 16;

/// A way to the server that can be cut, and led to another address.
struct Line {
    addr: SocketAddr,
    target: watch::Sender<SocketAddr>,
    cut: watch::Sender<()>,
    open: Arc<AtomicUsize>,
}

impl Line {
    async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let line = Self {
            addr: listener.local_addr().unwrap(),
            target: watch::Sender::new(target),
            cut: watch::Sender::new(()),
            open: Arc::default(),
        };
        let (target, cuts, open) = (
            line.target.subscribe(),
            line.cut.subscribe(),
            line.open.clone(),
        );
        tokio::spawn(async move {
            // It ends with its runtime.
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, mut cut, open) = (*target.borrow(), cuts.clone(), open.clone());
                cut.mark_unchanged();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(target).await else {
                        return;
                    };
                    open.fetch_add(1, Ordering::SeqCst);
                    tokio::select! {
                        _ = cut.changed() => {}
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                    }
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        line
    }

    /// Waits until at least this many connections are open.
    async fn carries(&self, connections: usize) {
        let carries = async {
            while self.open.load(Ordering::SeqCst) < connections {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        ends(carries).await;
    }

    fn cut(&self) {
        self.cut.send_replace(());
    }
}

/// How many may wait at once with the descriptors that this process may have.
fn waiters() -> usize {
    // Each end of a connection, on both sides of the line. What else runs needs some too.
    let (each, others) = (4, 1000);
    let needed = WAITERS as u64 * each + others;
    let limit = descriptors::raise_to(needed);
    let waiters = usize::try_from(limit.saturating_sub(others) / each).unwrap_or(WAITERS);
    if waiters < WAITERS {
        println!("the limit of open files is {limit}, not {needed}: {waiters} wait, not {WAITERS}");
        assert!(
            waiters >= 20,
            "raise the limit of open files: ulimit -n {needed}"
        );
    }
    waiters.min(WAITERS)
}

fn decision_on(action: usize) -> Decision {
    match action % 3 {
        0 => Decision::Reject,
        _ => Decision::Approve,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_who_wait_lose_nothing_over_cut_connections_and_a_restart() {
    let _alone = alone().await;
    let each = waiters() / 2;
    let disk = Disk::default();
    let mut server = start(disk.clone()).await;
    let line = Line::to(server.addr).await;
    let aegis = builder(&format!("http://{}", line.addr)).build().unwrap();
    let mut ids: Vec<RequestId> = Vec::new();
    for number in 0..ACTIONS {
        let action = aegis.submit(&*format!("k-{number}")).await.unwrap();
        ids.push(action.request_id);
    }

    let waits: Vec<_> = (0..each)
        .map(|number| {
            let wait = aegis.wait_for_decision(ids[number % ACTIONS].clone(), 10 * HANG);
            tokio::spawn(wait.into_future())
        })
        .collect();
    // Each follows from another of the submissions on, and to the submission after all decisions.
    let follows: Vec<_> = (0..each)
        .map(|number| {
            let from = number % ACTIONS;
            let after: EventCursor = from.to_string().parse().unwrap();
            let mut events = aegis.events().after(after).stream();
            tokio::spawn(async move {
                let mut seen = Vec::new();
                while seen.len() < 2 * ACTIONS + 1 - from {
                    let event = events.next().await.unwrap().unwrap();
                    let cursor = event.cursor.unwrap().to_string();
                    seen.push((cursor.parse::<u64>().unwrap(), event.event));
                }
                seen
            })
        })
        .collect();
    line.carries(2 * each).await;

    let decider = |addr: SocketAddr| builder(&format!("http://{addr}")).build().unwrap();
    let mut aegis = decider(server.addr);
    for (number, id) in ids.iter().enumerate() {
        if number == ACTIONS / 2 {
            assert!(ends(server.stop()).await.is_drained());
            server = start(disk.clone()).await;
            line.target.send_replace(server.addr);
            aegis = decider(server.addr);
        }
        // Some decisions come while everybody waits, and others while most are cut off.
        if number % 5 == 1 {
            line.carries(each).await;
            line.cut();
        }
        let decided = match decision_on(number) {
            Decision::Approve => aegis.approve_action(id.clone()).await,
            Decision::Reject => aegis.reject_action(id.clone()).await,
        };
        decided.unwrap();
    }
    line.cut();
    aegis.submit("last").await.unwrap();

    for (number, wait) in waits.into_iter().enumerate() {
        let action = ends(wait).await.unwrap().unwrap();
        let number = number % ACTIONS;
        assert_eq!(action.request_id, ids[number]);
        assert_eq!(action.decision, Some(decision_on(number)));
    }
    let tenant = TenantId::new("acme").unwrap();
    let on_record = disk.events(&tenant, 0, 10 * ACTIONS).await.unwrap();
    assert_eq!(on_record.len(), 2 * ACTIONS + 1);
    for (number, follow) in follows.into_iter().enumerate() {
        let seen = ends(follow).await.unwrap();
        let expected = &on_record[number % ACTIONS..];
        let places = |events: &[(u64, aegis_hitl::protocol::Event)]| -> Vec<_> {
            let places = events.iter();
            places
                .map(|(at, event)| (*at, event.id.clone(), event.kind))
                .collect()
        };
        assert_eq!(places(&seen), places(expected));
    }
}
