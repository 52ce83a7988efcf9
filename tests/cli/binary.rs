//! The `aegis` binary: run to its end, or served until it is told to stop.

// Each test crate takes what it needs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    unreachable_pub
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use serde_json::Value;

/// Far beyond what any step takes; only a hang gets here.
pub const HANG: Duration = Duration::from_secs(60);

/// The binary with these arguments, and with nothing set by the environment of the test.
pub fn aegis(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aegis"));
    command.args(args);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("AEGIS_") || text == "NO_COLOR" || text.starts_with("CLICOLOR") {
            command.env_remove(&name);
        }
    }
    command
}

/// `aegis serve` on a port of its own.
pub fn serve(store: &Path) -> Command {
    let mut command = aegis(&["serve", "--listen", "127.0.0.1:0", "--store"]);
    command.arg(store);
    command
}

/// What a command left behind.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Asserts the exit code, and shows everything if it is another.
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{self:?}");
        self
    }

    /// What was printed to stdout: one JSON document on one line.
    pub fn json(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Both streams.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// Runs a command to its end.
pub fn run(command: Command) -> Ended {
    run_with_input(command, "")
}

/// Runs a command to its end, with something to read.
pub fn run_with_input(command: Command, input: &str) -> Ended {
    let mut command = bound(&command);
    command.stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Process::start(command);
    // One that does not read its input closes it, and that is its right.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let stdout = within(&stdout, &child);
    let stderr = within(&stderr, &child);
    Ended {
        status: child.wait().unwrap(),
        stdout,
        stderr,
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

fn within(stream: &Receiver<String>, child: &Process) -> String {
    let text = stream.recv_timeout(HANG);
    text.unwrap_or_else(|_| panic!("it does not end: {child:?}"))
}

/// A child process that does not outlive its test: dropping this kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    #[expect(dead_code, reason = "shown by Debug")]
    command: Command,
}

impl Process {
    pub fn start(mut command: Command) -> Self {
        match command.spawn() {
            Ok(child) => Self { child, command },
            Err(error) => panic!("{error}: {command:?}"),
        }
    }
}

impl Deref for Process {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The same command, which the kernel kills when the thread that started it ends, as when the test process is killed and drops
/// nothing. Where util-linux has no `setpriv` it is the command as it was.
pub fn bound(command: &Command) -> Command {
    static SETPRIV: LazyLock<bool> = LazyLock::new(|| {
        let tried = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "true"])
            .stderr(Stdio::null())
            .status();
        tried.is_ok_and(|status| status.success())
    });
    let mut bound = if *SETPRIV {
        let mut bound = Command::new("setpriv");
        bound.args(["--pdeathsig", "KILL", "--"]);
        bound.arg(command.get_program());
        bound
    } else {
        Command::new(command.get_program())
    };
    bound.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bound.env(name, value),
            None => bound.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        bound.current_dir(folder);
    }
    bound
}

/// A server that runs. Dropping it kills it.
pub struct Served {
    child: Process,
    pub addr: SocketAddr,
    stdout: Receiver<String>,
    stderr: Arc<Mutex<String>>,
    lines: Receiver<String>,
}

impl Served {
    /// Starts a server and waits until it listens.
    pub fn start(command: Command) -> Self {
        Self::try_start(command).unwrap_or_else(|ended| panic!("it does not serve: {ended:?}"))
    }

    /// Starts a server, and waits until it listens or ends.
    pub fn try_start(command: Command) -> Result<Self, Ended> {
        let mut command = bound(&command);
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Process::start(command);
        let stdout = collect(child.stdout.take().unwrap());
        let stderr = Arc::new(Mutex::new(String::new()));
        let (sender, lines) = channel();
        let (pipe, seen) = (child.stderr.take().unwrap(), stderr.clone());
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let mut seen = seen.lock().unwrap();
                seen.push_str(&line);
                seen.push('\n');
                drop(seen);
                let _ = sender.send(line);
            }
        });
        let mut served = Self {
            child,
            addr: SocketAddr::from(([0; 4], 0)),
            stdout,
            stderr,
            lines,
        };
        match served.line("listening on http://") {
            Some(line) => {
                let (_, rest) = line.split_once("http://").unwrap();
                served.addr = rest.split(',').next().unwrap().parse().unwrap();
                Ok(served)
            }
            None => Err(served.ended()),
        }
    }

    /// Waits for a line of stderr that has this in it. `None` if the server ends before.
    pub fn line(&self, part: &str) -> Option<String> {
        loop {
            match self.lines.recv_timeout(HANG) {
                Ok(line) if line.contains(part) => return Some(line),
                Ok(_) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(error) => panic!("no '{part}': {error}: {}", self.stderr()),
            }
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to stderr by now.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.pid());
        assert!(
            Command::new("sh")
                .args(["-c", &kill])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Asks the server to end, and waits until it has.
    pub fn stop(self) -> Ended {
        self.signal("TERM");
        self.ended()
    }

    /// Kills the server as a power cut would, as far as the process is concerned.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until the server has ended.
    pub fn ended(mut self) -> Ended {
        let stdout = self.stdout.recv_timeout(HANG);
        let Ok(stdout) = stdout else {
            panic!("it does not end: {}", self.stderr());
        };
        // The streams are closed when the process ends, and the reader has then kept all of them.
        while self.lines.recv_timeout(HANG).is_ok() {}
        Ended {
            status: self.child.wait().unwrap(),
            stdout,
            stderr: self.stderr(),
        }
    }
}

/// Opens a database to look at it, beside the server that has it.
pub fn look_at(database: &Path) -> Connection {
    let connection =
        Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    connection.busy_timeout(HANG).unwrap();
    connection
}

/// Decisions and events, as of one moment.
pub fn counts(database: &Connection) -> [u64; 2] {
    let sql = "SELECT (SELECT count(decision) FROM action), (SELECT count(*) FROM event)";
    let count = |row: &rusqlite::Row<'_>, at| row.get::<_, i64>(at).map(i64::unsigned_abs);
    let counts = database.query_row(sql, [], |row| Ok([count(row, 0)?, count(row, 1)?]));
    counts.unwrap()
}

/// What SQLite says of the file: `ok` if it is sound.
pub fn integrity(database: &Connection) -> String {
    database
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap()
}
