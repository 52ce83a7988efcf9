//! The server in a process of its own: this binary, started again.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// The argument that makes this binary a server.
pub(crate) const SERVE: &str = "--serve";

pub(crate) struct Peer {
    child: Child,
    /// The server stops when this closes.
    stdin: Option<ChildStdin>,
    pub(crate) address: SocketAddr,
}

impl Peer {
    pub(crate) fn spawn(arguments: &[&str]) -> Self {
        Self::spawn_of(&std::env::current_exe().unwrap(), arguments)
    }

    /// Starts the server of a binary, which may be this bench of another build.
    pub(crate) fn spawn_of(binary: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(binary)
            .arg(SERVE)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        Self {
            address: line.trim().parse().unwrap(),
            child,
            stdin,
        }
    }

    /// The server's resident memory, in bytes.
    #[allow(dead_code)]
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        kib.unwrap().parse::<u64>().unwrap() * 1024
    }

    /// The processor time that the server has used so far, its kernel's included.
    #[allow(dead_code)]
    pub(crate) fn processor_time(&self) -> Duration {
        // The kernel counts in ticks of 10 ms on every platform that Linux tells programs about.
        const TICK: Duration = Duration::from_millis(10);
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // The name of the command may contain spaces. `utime` is the 12th field behind it.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let ticks = fields.split_whitespace().skip(11).take(2);
        TICK * ticks.map(|ticks| ticks.parse::<u32>().unwrap()).sum()
    }

    /// Stops the server and waits for a clean exit.
    pub(crate) fn stop(mut self) {
        self.stdin = None;
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if self.stdin.is_some() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Prints the address from the child process. Returns when the server must stop.
pub(crate) async fn announce(address: SocketAddr) {
    println!("{address}");
    let (stop, stopped) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = stop.send(());
    });
    let _ = stopped.await;
}
