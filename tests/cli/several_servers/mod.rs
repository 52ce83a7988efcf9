//! Three servers on one database, while servers are killed and PostgreSQL crashes: what clients are told
//! can have happened, to each action in one order.
//!
//! ```sh
//! cargo test --all-features --test cli several_servers                  10 rounds, another seed each time
//! AEGIS_CHAOS_ROUNDS=200 cargo test --all-features --test cli three_servers   more
//! AEGIS_CHAOS_SEED=17 cargo test --all-features --test cli three_servers      the same faults again
//! ```

mod checker;
mod cluster;
mod feed;
mod history;
mod load;
mod record;
mod rolling;
mod wire;

use std::collections::HashSet;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use self::cluster::{Cluster, SERVERS};
use self::feed::Follower;
use self::history::Asked;
use self::load::{Ended, Load, Subject};
use crate::support::random::Random;
use crate::support::{HANG, alone};

const CLIENTS: usize = 64;

/// The attempts that are answered between two faults, at least.
const BETWEEN: usize = 150;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect(name))
}

/// One fault after the other: at each the database crashes, and one server or more are killed.
async fn disturb(cluster: &mut Cluster, random: &mut Random) {
    let server = random.below(SERVERS as u64) as usize;
    match random.below(4) {
        0 => {
            cluster.kill(server);
            sleep(random.millis(0, 200)).await;
            cluster.crash();
            sleep(random.millis(0, 400)).await;
            cluster.recover();
        }
        1 => {
            cluster.crash();
            sleep(random.millis(0, 400)).await;
            cluster.kill(server);
            cluster.recover();
        }
        2 => {
            cluster.crash();
            cluster.recover();
            sleep(random.millis(0, 50)).await;
            cluster.kill(server);
        }
        _ => {
            let other = (server + 1) % SERVERS;
            cluster.kill(server);
            cluster.kill(other);
            sleep(random.millis(0, 100)).await;
            cluster.run(other);
            cluster.crash();
            cluster.recover();
        }
    }
    cluster.run(server);
}

/// The last read of each action, once nothing of it is still to end by itself.
async fn settle(load: &Load, cluster: &Cluster, subject: &Subject) {
    let settling = async {
        loop {
            let server = cluster.addrs()[0];
            let ended = load
                .attempt(CLIENTS, subject, &Asked::History, server, HANG)
                .await;
            let Ended::Answered(Some(body)) = ended else {
                panic!("{}: {ended:?}", subject.key());
            };
            let is_due = subject.is_short() && body["execution"] == "claimed"
                || body["status"] == "PENDING" && !body["expires_at"].is_null();
            if !is_due {
                return;
            }
            sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let settled = timeout(HANG, settling).await;
    assert!(settled.is_ok(), "{} does not end", subject.key());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn three_servers_answer_as_one_would_whatever_is_killed() {
    let _alone = alone().await;
    let seed =
        number("AEGIS_CHAOS_SEED").unwrap_or_else(|| u64::from(Uuid::new_v4().as_fields().0));
    let rounds = number("AEGIS_CHAOS_ROUNDS").unwrap_or(10);
    println!("AEGIS_CHAOS_SEED={seed} AEGIS_CHAOS_ROUNDS={rounds}");
    let mut cluster = Cluster::start().await;
    let load = Arc::new(Load::new(cluster.addrs().to_vec()));
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let random = Random::new(seed, 100 + client as u64);
        clients.spawn(load.clone().keep_asking(client, random));
    }
    let followers = [(); 2].map(|()| Follower::new(cluster.addrs()));
    let mut following = JoinSet::new();
    for (number, follower) in followers.iter().enumerate() {
        let random = Random::new(seed, 10 + number as u64);
        following.spawn(follower.clone().follow(random));
    }
    let mut random = Random::new(seed, 1);
    for _ in 0..rounds {
        load.answers(BETWEEN).await;
        sleep(random.millis(0, 300)).await;
        disturb(&mut cluster, &mut random).await;
    }
    load.answers(BETWEEN).await;
    load.end();
    timeout(HANG, clients.join_all())
        .await
        .expect("the clients end");
    // What they gave up on is answered or cut off with the servers.
    for server in 0..SERVERS {
        cluster.stop(server);
        cluster.run(server);
    }

    let subjects = load.subjects();
    for subject in subjects.iter().filter(|subject| subject.id.get().is_some()) {
        settle(&load, &cluster, subject).await;
    }
    assert_eq!(load.wrong(), Vec::<String>::new());
    let mut tokens = HashSet::new();
    let mut attempts = 0;
    let mut unknown = 0;
    for subject in &subjects {
        let history = subject.attempts();
        attempts += history.len();
        unknown += history
            .iter()
            .filter(|attempt| attempt.told.is_none())
            .count();
        if let Err(report) = checker::check(&history) {
            panic!("{} cannot be explained:\n{report}", subject.key());
        }
        for token in subject.tokens() {
            assert!(
                tokens.insert(token),
                "{}: a token was given twice",
                subject.key()
            );
        }
    }
    let events = record::check(&cluster, &load, &followers).await;
    following.abort_all();
    println!(
        "{} calls about {} actions in {attempts} attempts, {unknown} of them unknown; {events} events",
        load.calls(),
        subjects.len()
    );
    for server in 0..SERVERS {
        cluster.stop(server);
    }
}
