//! The `aegis` binary: run to its end, or served until it is told to stop.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

use super::support::HANG;
use super::support::process::{Process, bound};

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
    run_with_bytes(command, input.as_bytes())
}

/// The same with what may be no text.
pub fn run_with_bytes(command: Command, input: &[u8]) -> Ended {
    let mut command = bound(&command);
    command.stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Process::start(command);
    // One that does not read its input closes it, and that is its right.
    let _ = child.stdin.take().unwrap().write_all(input);
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

/// A server that runs. Dropping it kills it.
pub struct Served {
    child: Process,
    pub addr: SocketAddr,
    url: String,
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
            url: String::new(),
            stdout,
            stderr,
            lines,
        };
        match served.line("listening on ") {
            Some(line) => {
                let (_, rest) = line.split_once("listening on ").unwrap();
                served.url = rest.split(',').next().unwrap().to_owned();
                if let Some((_, addr)) = served.url.split_once("://") {
                    served.addr = addr.parse().unwrap();
                }
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

    /// What it says that it listens on.
    pub fn url(&self) -> String {
        self.url.clone()
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
        signal(self.pid(), name);
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

/// Sends a process a signal, such as `TERM`.
pub fn signal(pid: u32, name: &str) {
    let kill = format!("kill -{name} {pid}");
    let sent = Command::new("sh").args(["-c", &kill]).status().unwrap();
    assert!(sent.success(), "{kill}");
}

/// Gives a server something to log at DEBUG.
pub fn make_noise(addr: SocketAddr) {
    let mut noise = TcpStream::connect(addr).unwrap();
    noise.write_all(b"\0\0\r\n\r\n").unwrap();
    noise.read_to_end(&mut Vec::new()).unwrap();
}
