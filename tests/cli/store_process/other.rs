//! A process beside the test, which runs this very binary.

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

pub(crate) const ROLE: &str = "AEGIS_TEST_ROLE";
pub(crate) const DATABASE: &str = "AEGIS_TEST_DATABASE";

/// Dropping it kills the process.
pub(crate) struct Other {
    pub(crate) child: Child,
    input: Option<ChildStdin>,
    pub(crate) output: Box<dyn BufRead + Send>,
}

impl Other {
    pub(crate) fn run(mut command: Command, role: &str, database: &Path) -> Self {
        let mut child = command
            .args(["--ignored", "--exact", "child", "--nocapture"])
            .env(ROLE, role)
            .env(DATABASE, database)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut other = Self {
            input: child.stdin.take(),
            output: Box::new(BufReader::new(child.stderr.take().unwrap())),
            child,
        };
        assert_eq!(other.line(), "open");
        other
    }

    pub(crate) fn start(role: &str, database: &Path) -> Self {
        Self::run(Command::new(env::current_exe().unwrap()), role, database)
    }

    /// The next line, or "" at the end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Reads what it says without looking at it, so that it need not wait for anybody to do so.
    #[cfg(feature = "cli")]
    pub(crate) fn read_on(&mut self) {
        let mut output = std::mem::replace(&mut self.output, Box::new(std::io::empty()));
        // It ends with the process.
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
        self.line()
    }

    /// Kills the process, and returns what it said before it died, without what it did not say to the end.
    pub(crate) fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        let whole = rest.split_inclusive('\n');
        let whole = whole.filter_map(|line| line.strip_suffix('\n'));
        whole.map(str::to_owned).collect()
    }

    pub(crate) fn end(mut self) {
        drop(self.input.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
