//! The store behind pgbouncer in transaction mode.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use aegis_hitl::store::{PostgresStore, conformance};
use tempfile::TempDir;

use super::name_of;
use super::wall::Walled;
use crate::support::HANG;
use crate::support::postgres::{Postgres, unprivileged_command};
use crate::support::process::{Process, bound, port};

/// A pooler on a port of its own, with fewer connections than its clients have.
struct Pooler {
    port: u16,
    folder: TempDir,
    _process: Process,
}

impl Pooler {
    /// Starts one that logs in as this user.
    fn start(server: &Postgres, user: &str) -> Self {
        let folder = TempDir::new().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let port = port();
        let settings = format!(
            "[databases]\n* = host={} user={user}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 4\n\
             max_client_conn = 500\nlogfile = {}\n",
            server.folder().display(),
            folder.path().join("log").display()
        );
        let path = folder.path().join("pgbouncer.ini");
        fs::write(&path, settings).unwrap();
        let program = Path::new("/usr/sbin/pgbouncer");
        assert!(
            program.exists(),
            "no {}; on Debian or Ubuntu: sudo apt-get install pgbouncer",
            program.display()
        );
        let mut command = unprivileged_command(program);
        command.arg("--quiet").arg(path);
        let process = Process::start(bound(&command));
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < HANG, "the pooler does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self {
            port,
            folder,
            _process: process,
        }
    }

    fn url(&self, database: &str) -> String {
        format!(
            "postgres://aegis@127.0.0.1:{}/{database}?sslmode=disable",
            self.port
        )
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn servers_behind_a_pooler_conform_together() {
    // What a transaction may see must end with it, as the next one is somebody else's.
    let walled = Walled::shared().await;
    let pooler = Pooler::start(walled.server(), "aegis_server");
    let last = Mutex::new(Vec::<PostgresStore>::new());
    conformance::run_together(|| async {
        let direct = walled.database().await;
        let url = pooler.url(name_of(&direct));
        let mut stores = Vec::new();
        for _ in 0..2 {
            let store = PostgresStore::builder(&url).direct(&direct).connections(8);
            stores.push(store.connect().await.unwrap());
        }
        let before = std::mem::replace(&mut *last.lock().unwrap(), stores.clone());
        for store in before {
            store.close().await;
        }
        stores
    })
    .await;
    let log = fs::read_to_string(pooler.folder.path().join("log")).unwrap();
    assert!(
        !log.contains("when not linked"),
        "something listens through the pooler"
    );
}
