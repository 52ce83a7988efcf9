//! Stderr. A server writes it by a thread of its own: a pipe that nobody reads is full after a while,
//! and must not stop those who log.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

/// The most lines that wait to be written.
const MAX_LINES: usize = 1024;

/// How long the end of the process waits for lines to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<Arc<Queue>> = OnceLock::new();

/// Makes every later write go through a queue.
pub(crate) fn start_queue() -> io::Result<()> {
    let queue = Arc::new(Queue::default());
    let writer = Arc::clone(&queue);
    thread::Builder::new()
        .name("aegis-stderr".to_owned())
        .spawn(move || writer.run(write_now))?;
    // A process has one log, so nothing is set before.
    let _ = QUEUE.set(queue);
    Ok(())
}

/// Writes a line. With a queue it does not block, and drops the line if the queue is full.
pub(crate) fn write(line: String) {
    match QUEUE.get() {
        Some(queue) => queue.push(line),
        None => write_now(&line),
    }
}

/// Waits until all lines are written, for 1 s at most.
pub(crate) fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_TIMEOUT);
    }
}

/// A line is lost if stderr is closed.
fn write_now(line: &str) {
    // A single write keeps other lines out of this one.
    let _ = io::stderr().write_all(line.as_bytes());
}

#[derive(Debug, Default)]
struct Queue {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    waiting: VecDeque<String>,
    dropped: u64,
    is_writing: bool,
}

impl Lines {
    fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.dropped == 0 && !self.is_writing
    }

    fn next(&mut self) -> Option<String> {
        // Lines are dropped while older ones wait, so the older ones come first.
        self.waiting.pop_front().or_else(|| {
            let dropped = std::mem::take(&mut self.dropped);
            (dropped > 0).then(|| {
                format!("aegis: {dropped} lines were lost, because this log was not read\n")
            })
        })
    }
}

impl Queue {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: String) {
        let mut lines = self.lines();
        // Nothing gets in before the lost ones are reported.
        if lines.dropped > 0 || lines.waiting.len() >= MAX_LINES {
            lines.dropped += 1;
        } else {
            lines.waiting.push_back(line);
        }
        drop(lines);
        self.changed.notify_all();
    }

    fn run(&self, mut write: impl FnMut(&str)) {
        let mut lines = self.lines();
        loop {
            let Some(line) = lines.next() else {
                let woken = self.changed.wait(lines);
                lines = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            lines.is_writing = true;
            drop(lines);
            write(&line);
            lines = self.lines();
            lines.is_writing = false;
            self.changed.notify_all();
        }
    }

    fn flush(&self, timeout: Duration) {
        let lines = self.lines();
        let waited = self
            .changed
            .wait_timeout_while(lines, timeout, |lines| !lines.is_done());
        drop(waited);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_find_no_room_are_counted_after_those_that_did() {
        let queue = Queue::default();
        for number in 0..MAX_LINES + 3 {
            queue.push(number.to_string());
        }
        let mut lines = queue.lines();
        for number in 0..MAX_LINES {
            assert_eq!(lines.next(), Some(number.to_string()));
        }
        let lost = lines.next().unwrap();
        assert!(lost.contains("3 lines were lost"), "{lost}");
        assert!(lines.is_done());
        drop(lines);
        queue.push("next".to_owned());
        assert_eq!(queue.lines().next(), Some("next".to_owned()));
    }
}
