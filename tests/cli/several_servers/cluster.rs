//! Three servers on one PostgreSQL, which come and go.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

use tokio_postgres::Client;

use crate::binary::{Served, aegis};
use crate::support::HANG;
use crate::support::postgres::{Postgres, connect};
use crate::support::process::port;

pub const SERVERS: usize = 3;

pub struct Cluster {
    postgres: Postgres,
    url: String,
    servers: Vec<Option<Served>>,
    addrs: Vec<SocketAddr>,
}

impl Cluster {
    pub async fn start() -> Self {
        let postgres = Postgres::start(&[]);
        let url = postgres.database().await;
        let mut cluster = Self {
            postgres,
            url,
            servers: Vec::new(),
            addrs: Vec::new(),
        };
        for _ in 0..SERVERS {
            let addr = SocketAddr::from(([127, 0, 0, 1], port()));
            cluster
                .servers
                .push(Some(Served::start(cluster.command(addr))));
            cluster.addrs.push(addr);
        }
        cluster
    }

    fn command(&self, addr: SocketAddr) -> std::process::Command {
        let listen = addr.to_string();
        let mut command = aegis(&["serve", "--listen", &listen, "--store"]);
        command.arg(Path::new(&self.url)).env("AEGIS_LOG", "warn");
        command
    }

    pub fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// A connection to the database.
    pub async fn client(&self) -> Client {
        connect(&self.url).await
    }

    /// Kills a server.
    pub fn kill(&mut self, server: usize) {
        let Some(served) = self.servers[server].take() else {
            return;
        };
        assert_calm(&served.stderr());
        served.kill();
    }

    /// Asks a server to end, and waits until it has.
    pub fn stop(&mut self, server: usize) {
        let Some(served) = self.servers[server].take() else {
            return;
        };
        assert_calm(&served.stop().expect(0).stderr);
    }

    /// Starts a server where it was. The database may have come back only just now.
    pub fn run(&mut self, server: usize) {
        let begun = Instant::now();
        let served = loop {
            match Served::try_start(self.command(self.addrs[server])) {
                Ok(served) => break served,
                Err(ended) => assert!(begun.elapsed() < HANG, "it does not start: {ended:?}"),
            }
        };
        self.servers[server] = Some(served);
    }

    /// Ends the database as a crash does.
    pub fn crash(&self) {
        self.postgres.stop();
    }

    pub fn recover(&self) {
        self.postgres.run();
    }
}

fn assert_calm(stderr: &str) {
    assert!(!stderr.contains("panicked"), "{stderr}");
}
