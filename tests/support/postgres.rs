//! A real PostgreSQL for tests: a server of this test process in a temporary folder.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

/// What to install where there is no PostgreSQL.
const INSTALL: &str = "no PostgreSQL in /usr/lib/postgresql/*/bin or $AEGIS_POSTGRES_BIN; \
                       on Debian or Ubuntu: sudo apt-get install postgresql";

/// How long a server may take to start.
const STARTS: Duration = Duration::from_secs(60);

/// A PostgreSQL server in a temporary folder, without a network: its socket is in the folder too.
///
/// It ends with the test process, however that ends: a shell between the two waits for the end of
/// its input, and then kills the server.
#[derive(Debug)]
pub struct Postgres {
    folder: TempDir,
    bin: PathBuf,
    port: u16,
    keeper: Mutex<Option<Child>>,
}

static DATABASES: AtomicUsize = AtomicUsize::new(0);

impl Postgres {
    /// The server that the tests of this process share.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(|| Self::start(&[]))
    }

    /// Starts a server of its own, with these settings.
    pub fn start(settings: &[&str]) -> Self {
        Self::start_at(5432, settings, |_| {})
    }

    /// The same at a port that is not the usual one, and with what else is prepared in its folder.
    pub fn start_at(port: u16, settings: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        let bin = binaries();
        let folder = TempDir::new().unwrap();
        let data = folder.path().join("data");
        fs::create_dir(&data).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
        // It refuses to run as root.
        leave(folder.path());
        leave(&data);
        let mut initdb = unprivileged_command(&bin.join("initdb"));
        initdb.args([
            "--username=aegis",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
        ]);
        let made = initdb.arg("--pgdata").arg(&data).output().unwrap();
        assert!(
            made.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let mut lines = format!(
            "listen_addresses = ''\nport = {port}\nunix_socket_directories = '{}'\nmax_connections = 400\nshared_buffers = 64MB\n\
             fsync = on\nsynchronous_commit = on\n",
            folder.path().display()
        );
        for setting in settings {
            lines.push_str(setting);
            lines.push('\n');
        }
        let access = "local replication all trust\n\
                      local all locked scram-sha-256\n\
                      local all all trust\n\
                      hostssl all locked 127.0.0.1/32 scram-sha-256\n\
                      hostnossl all locked 127.0.0.1/32 reject\n\
                      hostssl all certified 127.0.0.1/32 cert\n\
                      host all all 127.0.0.1/32 trust\n";
        fs::write(data.join("pg_hba.conf"), access).unwrap();
        let path = data.join("postgresql.auto.conf");
        fs::write(&path, lines).unwrap();
        prepare(&data);
        let server = Self {
            folder,
            bin,
            port,
            keeper: Mutex::new(None),
        };
        server.run();
        server
    }

    /// Starts the server again after it was [stopped](Self::stop).
    pub fn run(&self) {
        let server = unprivileged_command(&self.bin.join("postgres"));
        let mut keeper = Command::new("sh");
        // The server's own input is not the pipe, whose end nobody but the keeper must wait for.
        // Without a last word the test process is gone, and nobody else removes the folder.
        let keep = "dir=$1; shift; \"$@\" </dev/null & read -r _; kept=$?; kill -QUIT $!; wait $!; \
                    [ $kept = 0 ] || rm -rf \"$dir\"";
        keeper.args(["-c", keep, "keeper"]).arg(self.folder.path());
        keeper.arg(server.get_program()).args(server.get_args());
        keeper.arg("-D").arg(self.data());
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .unwrap();
        keeper
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        *self.keeper.lock().unwrap() = Some(keeper.spawn().unwrap());
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() || !self.answers() {
            assert!(
                begun.elapsed() < STARTS,
                "PostgreSQL does not start: {}",
                self.logged()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the server as a crash does: without a checkpoint, and without an answer to anybody.
    pub fn stop(&self) {
        if let Some(mut keeper) = self.keeper.lock().unwrap().take() {
            if let Some(mut input) = keeper.stdin.take() {
                input.write_all(b"stop\n").unwrap();
            }
            keeper.wait().unwrap();
        }
    }

    fn answers(&self) -> bool {
        let mut ready = Command::new(self.bin.join("pg_isready"));
        ready.arg("--quiet").arg("--host").arg(self.folder.path());
        ready.arg("--port").arg(self.port.to_string());
        ready.status().is_ok_and(|status| status.success())
    }

    /// The folder with its data.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// What the server has logged.
    pub fn logged(&self) -> String {
        let mut text = Vec::new();
        if let Ok(mut log) = fs::File::open(self.log()) {
            log.read_to_end(&mut text).unwrap();
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The folder with the server's socket.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The server's socket.
    pub fn socket(&self) -> PathBuf {
        let name = format!(".s.PGSQL.{}", self.port);
        self.folder.path().join(name)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder with the server's programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The URL of a database of this server.
    pub fn url(&self, database: &str) -> String {
        let host = self.folder.path().to_str().unwrap().replace('/', "%2F");
        match self.port {
            5432 => format!("postgres://aegis@{host}/{database}"),
            port => format!("postgres://aegis@{host}:{port}/{database}"),
        }
    }

    /// Makes an empty database, and returns its URL.
    pub async fn database(&self) -> String {
        self.database_from("template0").await
    }

    /// Makes a copy of a database that nobody uses, which is waited for, and returns its URL.
    pub async fn database_from(&self, template: &str) -> String {
        let name = format!("aegis_{}", DATABASES.fetch_add(1, Ordering::SeqCst));
        let client = self.client("postgres").await;
        client
            .batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {template}"))
            .await
            .unwrap();
        self.url(&name)
    }

    /// A connection of its own to a database.
    pub async fn client(&self, database: &str) -> Client {
        connect(&self.url(database)).await
    }
}

/// A connection of its own.
pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The newest PostgreSQL of the system.
fn binaries() -> PathBuf {
    if let Some(bin) = std::env::var_os("AEGIS_POSTGRES_BIN") {
        return bin.into();
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let versions = versions.map(|version| version.unwrap().path());
    let newest = versions
        .filter(|path| path.join("bin/initdb").exists())
        .max_by_key(|path| path.file_name()?.to_str()?.parse::<u32>().ok());
    newest.expect(INSTALL).join("bin")
}

/// Leaves a file to the user that servers run as.
pub fn leave(path: &Path) {
    if is_root() {
        let (user, group) = unprivileged();
        std::os::unix::fs::chown(path, Some(user), Some(group)).unwrap();
    }
}

fn is_root() -> bool {
    rustix::process::getuid().is_root()
}

/// The user that the package made, or else the one that owns nothing.
fn unprivileged() -> (u32, u32) {
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let find = |name: &str| {
        let mut users = users
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>());
        let user = users.find(|fields| fields[0] == name)?;
        Some((user[2].parse().ok()?, user[3].parse().ok()?))
    };
    find("postgres")
        .or_else(|| find("nobody"))
        .expect("a user that is not root")
}

/// A command that does not run as root.
pub fn unprivileged_command(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let (user, group) = unprivileged();
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={group}")]);
    // It would be lost with the change of the user, if it were set before.
    command.args(["--clear-groups", "--pdeathsig", "KILL", "--"]);
    command.arg(program);
    command
}
