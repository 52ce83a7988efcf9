//! A process beside the test, which runs this very binary.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};

use crate::support::again::again;
use crate::support::process::Process;

pub(super) const ROLE: &str = "AEGIS_TEST_ROLE";
pub(super) const DATABASE: &str = "AEGIS_TEST_DATABASE";

/// Dropping it kills the process.
pub(super) struct Other {
    pub(super) child: Process,
    input: Option<ChildStdin>,
    pub(super) output: Box<dyn BufRead + Send>,
}

impl Other {
    pub(super) fn start(role: &str, database: &Path) -> Self {
        Self::run(again(super::child), role, database)
    }

    /// Starts it by a command that ends with `exec "$@"`, such as a shell's that sets limits.
    pub(super) fn under(prefix: &[&str], role: &str, database: &Path) -> Self {
        // What a new namespace gives it would take away what binds it to the test, so that it is bound within.
        let bound = again(super::child);
        let mut command = Command::new(prefix[0]);
        command.args(&prefix[1..]);
        command.arg(bound.get_program()).args(bound.get_args());
        Self::run(command, role, database)
    }

    /// Starts it by [`again`]'s command with more in its environment.
    pub(super) fn run(mut command: Command, role: &str, database: &Path) -> Self {
        command
            .env(ROLE, role)
            .env(DATABASE, database)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = Process::start(command);
        let mut other = Self {
            input: child.stdin.take(),
            output: Box::new(BufReader::new(child.stderr.take().unwrap())),
            child,
        };
        assert_eq!(other.line(), "open");
        other
    }

    /// The next line, or "" at the end.
    pub(super) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Reads what it says without looking at it, so that it need not wait for anybody to do so.
    pub(super) fn read_on(&mut self) {
        let mut output = std::mem::replace(&mut self.output, Box::new(std::io::empty()));
        // It ends with the process.
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    }

    pub(super) fn ask(&mut self, line: &str) -> String {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
        self.line()
    }

    /// Kills the process, and returns what it said at the end, such as why it panicked.
    pub(super) fn last_words(&mut self) -> String {
        // The output ends with it, if it has not ended already.
        let _ = self.child.kill();
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        rest
    }

    /// Kills the process, and returns what it said before it died, without what it did not say to the end.
    pub(super) fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        let whole = rest.split_inclusive('\n');
        let whole = whole.filter_map(|line| line.strip_suffix('\n'));
        whole.map(str::to_owned).collect()
    }

    pub(super) fn end(mut self) {
        drop(self.input.take());
        assert!(self.child.wait().unwrap().success());
    }
}
