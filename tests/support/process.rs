//! Processes beside the test, which do not outlive it.

use std::net::TcpListener;
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};

/// A port below those that the system gives to clients: one of those could be taken by a client's own attempt to connect
/// while no server listens, and whoever waits for the server would meet itself. No test of this process gets one
/// that another has, whose server may be down just now.
pub fn port() -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + u16::try_from(std::process::id() % 5_000).unwrap();
    loop {
        let port = first + TAKEN.fetch_add(1, Ordering::SeqCst);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
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
