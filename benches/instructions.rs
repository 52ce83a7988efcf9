//! Counts the instructions of a call with callgrind. The counts are the same on a busy machine as
//! on a quiet one.
//!
//! Needs valgrind, and a runner of the same version as the library:
//! `cargo install gungraun-runner --version …`.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    dead_code
)]

#[path = "support/stacks.rs"]
mod stacks;

use std::process::{Command, Stdio};

/// Whether a program can be started.
fn is_there(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok()
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    // Callgrind runs this binary with this argument.
    let is_inner = arguments
        .get(1)
        .is_some_and(|first| first == "--gungraun-run");
    if !is_inner {
        if !arguments.iter().any(|argument| argument == "--bench") {
            return;
        }
        let runner = option_env!("GUNGRAUN_RUNNER").unwrap_or("gungraun-runner");
        for (program, remedy) in [
            ("valgrind", "apt-get install valgrind"),
            (runner, "cargo install gungraun-runner --version 0.20.0"),
        ] {
            if !is_there(program) {
                println!("instruction counts are skipped: there is no {program} ({remedy})");
                return;
            }
        }
    }
    counted::run();
}

mod counted {
    use std::hint::black_box;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use gungraun::prelude::*;
    use http::Request;

    use crate::stacks::{self, Body, Floor, Peer, Stack, Template};

    type Call = Box<dyn FnOnce() -> Box<dyn std::any::Any>>;

    /// Prepares the next call of a stack that has already made some.
    fn of<S: Stack + 'static>(stack: impl Fn(Peer) -> S, template: Template) -> Call {
        let mut service = stack(Peer::new());
        for _ in 0..10 {
            call(&mut service, template.request());
        }
        let request = template.request();
        Box::new(move || {
            call(&mut service, request);
            // Dropped outside of the counted part.
            Box::new(service)
        })
    }

    fn call<S: Stack>(service: &mut S, request: Request<Body>) {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(service.poll_ready(&mut cx).is_ready());
        let mut call = pin!(service.call(request));
        let Poll::Ready(response) = call.as_mut().poll(&mut cx) else {
            panic!("the peer answers at once");
        };
        drop(black_box(response));
    }

    #[library_benchmark]
    #[bench::bare(of(|peer| peer, Template::new()))]
    #[bench::floor(of(Floor::new, Template::new()))]
    #[bench::aegis_layer(of(stacks::aegis, Template::new()))]
    #[bench::retry_layer(of(stacks::retry, Template::keyed()))]
    #[bench::tower_retry(of(stacks::tower_retry, Template::keyed()))]
    #[bench::tower_http_and_tower_retry(of(stacks::tower_http, Template::new()))]
    fn first_try(call: Call) -> Box<dyn std::any::Any> {
        black_box(call())
    }

    library_benchmark_group!(name = calls, benchmarks = first_try);

    gungraun::main!(library_benchmark_groups = calls);

    pub(super) fn run() {
        main();
    }
}
