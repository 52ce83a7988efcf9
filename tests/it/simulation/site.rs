//! The server's side of a simulation, and the faults that it meets.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_hitl::store::Store;
use tokio::time::{Instant, sleep};

use super::far_end::{Proxy, Server, StoreFaults};
use super::network::{Cut, Direction, Host, Network};
use super::world::World;
use crate::support::random::Random;

/// A store that may be disturbed.
pub trait Disturbed: Store {
    fn set_faults(&self, faults: StoreFaults);

    /// Loses everything, as no store may.
    fn forget(&self);
}

pub struct Site<St> {
    pub world: World,
    pub network: Network,
    pub store: St,
    pub proxy: Arc<Mutex<Proxy>>,
    pub front: Arc<Mutex<Random>>,
    pub faults: Random,
    /// The number of clients.
    pub clients: usize,
    /// How long faults go on: some seeds have all at once.
    pub lasts: Duration,
    /// Whether the proxy sends requests again, late.
    pub repeats: bool,
    /// Whether the store loses everything when the server starts again.
    pub forgets: bool,
    /// Whether a conflict is answered as a duplicate.
    pub lies: bool,
}

impl<St: Disturbed> Site<St> {
    fn server(&self) -> Server<St> {
        Server::start(
            &self.network,
            self.store.clone(),
            &self.world,
            &self.front,
            &self.proxy,
        )
    }

    /// Lets faults happen for a while.
    pub async fn trouble(&mut self) -> Server<St> {
        let mut server = self.server();
        let ends = Instant::now() + self.lasts;
        let pace = self.lasts.as_millis() as u64 / 8;
        // Some seeds are calm, and some have one kind of fault only.
        let kinds: Vec<u64> = match self.faults.below(8) {
            0 => vec![],
            1 => vec![self.faults.below(9)],
            _ => (0..9).collect(),
        };
        // What is in the way at times is there from the start at others.
        if !kinds.is_empty() && self.faults.percent(30) {
            self.disturb_the_store();
            self.disturb_the_proxy();
        }
        while Instant::now() < ends {
            sleep(self.faults.millis(1, pace)).await;
            if kinds.is_empty() {
                continue;
            }
            let millis = |random: &mut Random| random.millis(1, pace * 3);
            match self.faults.pick(&kinds) {
                0 => {
                    let client = self.faults.below(self.clients as u64) as usize;
                    let directions = self.faults.pick(&[
                        &[Direction::ToServer][..],
                        &[Direction::ToClient],
                        &[Direction::ToServer, Direction::ToClient],
                    ]);
                    self.world
                        .note(format_args!("client {client}: partition {directions:?}"));
                    for direction in directions {
                        self.network.set_link(client, *direction, false);
                    }
                    let (network, world) = (self.network.clone(), self.world.clone());
                    let lasts = millis(&mut self.faults);
                    tokio::spawn(async move {
                        sleep(lasts).await;
                        world.note(format_args!("client {client}: partition heals"));
                        for direction in directions {
                            network.set_link(client, *direction, true);
                        }
                    });
                }
                1 => {
                    let slowness = self.faults.pick(&[2, 20, 200, 1500]);
                    self.world
                        .note(format_args!("network: up to {slowness} ms"));
                    self.network.set_slowness(slowness);
                }
                2 => {
                    let cuts = self.faults.pick(&[0, 20, 60]);
                    self.world
                        .note(format_args!("network: {cuts} % of connections"));
                    self.network.set_cuts(cuts);
                }
                3 | 4 => {
                    let cut = self.faults.pick(&[Cut::Reset, Cut::Close, Cut::Silence]);
                    self.network.cut_one(cut);
                }
                5 | 6 => {
                    self.world.restarted();
                    match self.faults.below(3) {
                        0 => {
                            self.world.note(format_args!("server: drains"));
                            let deadline = self.faults.millis(1, 3000);
                            server.shut_down(&self.network, deadline).await;
                        }
                        kind => {
                            let host = [Host::Refuses, Host::Silent][kind as usize - 1];
                            self.world.note(format_args!("server: ends, {host:?}"));
                            server.kill(&self.network, host);
                        }
                    }
                    sleep(millis(&mut self.faults)).await;
                    if self.forgets {
                        self.store.forget();
                    }
                    self.world.note(format_args!("server: starts"));
                    server = self.server();
                }
                7 => self.disturb_the_store(),
                _ => self.disturb_the_proxy(),
            }
            if self.lies {
                self.proxy.lock().unwrap().lies = 100;
            }
        }
        server
    }

    fn disturb_the_store(&mut self) {
        let faults = StoreFaults {
            slowness: self.faults.pick(&[0, 50, 1000, 4000]),
            errors: self.faults.pick(&[0, 10, 40]),
        };
        self.world.note(format_args!("{faults:?}"));
        self.store.set_faults(faults);
    }

    fn disturb_the_proxy(&mut self) {
        let proxy = Proxy {
            refuses: self.faults.pick(&[0, 10, 30]),
            hides: self.faults.pick(&[0, 10, 30]),
            slowness: self.faults.pick(&[0, 100, 3000]),
            lies: 0,
            repeats: if self.repeats {
                self.faults.pick(&[0, 10, 40])
            } else {
                0
            },
        };
        self.world.note(format_args!("{proxy:?}"));
        *self.proxy.lock().unwrap() = proxy;
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.network.heal();
        self.store.set_faults(StoreFaults::default());
        *self.proxy.lock().unwrap() = Proxy::default();
        self.world.note(format_args!("all is well again"));
    }
}
