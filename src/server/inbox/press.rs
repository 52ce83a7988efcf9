//! Large pages are rendered beside the workers, so that decisions go on meanwhile.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task;

use super::page::rejected;
use crate::server::http::{Rejection, Response};

/// The most bytes of text that are rendered on a worker, which takes a few milliseconds at most.
const SMALL: usize = 8 * 1024;

/// The most large pages that are rendered at once. Each takes a core, and some megabytes.
const AT_ONCE: usize = 2;

/// The most large pages that are rendered or wait for it. Each holds the record of its action.
const PLACES: usize = 64;

#[derive(Debug)]
pub(super) struct Press {
    at_once: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

impl Default for Press {
    fn default() -> Self {
        Self {
            at_once: Arc::new(Semaphore::new(AT_ONCE)),
            places: Arc::new(Semaphore::new(PLACES)),
        }
    }
}

impl Press {
    /// Renders a page that shows so many bytes of text.
    pub(super) async fn render(
        &self,
        len: usize,
        render: impl FnOnce() -> Response + Send + 'static,
    ) -> Response {
        if len <= SMALL {
            return render();
        }
        let unavailable = |detail| rejected(Rejection::unavailable(detail));
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            return unavailable("too many large pages are being shown; ask for this one again");
        };
        let turn = self.at_once.clone().acquire_owned().await;
        // The permits move into the task, because dropping the future does not stop it.
        let rendered = task::spawn_blocking(move || {
            let _permits = (place, turn);
            render()
        });
        let rendered = rendered.await;
        rendered.unwrap_or_else(|_| unavailable("the page cannot be shown"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use http::StatusCode;
    use tokio::sync::mpsc::unbounded_channel;
    use tokio_test::task::spawn;
    use tokio_test::{assert_pending, assert_ready};

    use super::*;
    use crate::server::http::ResponseBody;

    fn blank() -> Response {
        Response::new(ResponseBody::default())
    }

    #[tokio::test]
    async fn a_small_page_is_rendered_on_the_worker_and_a_large_one_beside_it() {
        let press = Press::default();
        for (len, is_here) in [(0, true), (SMALL, true), (SMALL + 1, false)] {
            let worker = thread::current().id();
            let render = move || {
                assert_eq!(thread::current().id() == worker, is_here);
                blank()
            };
            assert_eq!(press.render(len, render).await.status(), StatusCode::OK);
        }
    }

    #[tokio::test]
    async fn a_render_that_nobody_waits_for_still_counts_until_it_ends() {
        let press = Press::default();
        let (began, mut beginnings) = unbounded_channel();
        let mut gates = Vec::new();
        let mut waits = Vec::new();
        for _ in 0..AT_ONCE {
            let (gate, opened) = mpsc::channel::<()>();
            let began = began.clone();
            gates.push(gate);
            waits.push(spawn(press.render(SMALL + 1, move || {
                began.send(()).unwrap();
                _ = opened.recv();
                blank()
            })));
        }
        for wait in &mut waits {
            assert_pending!(wait.poll());
            beginnings.recv().await.unwrap();
        }
        let mut next = spawn(press.render(SMALL + 1, blank));
        assert_pending!(next.poll());
        // The connections are closed, but their renders have not ended.
        drop(waits);
        assert_pending!(next.poll());
        assert_eq!(press.at_once.available_permits(), 0);
        drop(gates);
        assert_eq!(next.await.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn who_leaves_the_queue_gives_up_the_place_and_a_full_queue_answers_at_once() {
        let press = Press::default();
        let turns = press.at_once.clone().acquire_many_owned(AT_ONCE as u32);
        let turns = turns.await.unwrap();
        let mut queue: Vec<_> = (0..PLACES)
            .map(|_| spawn(press.render(SMALL + 1, blank)))
            .collect();
        for wait in &mut queue {
            assert_pending!(wait.poll());
        }
        let full = assert_ready!(spawn(press.render(SMALL + 1, blank)).poll());
        assert_eq!(full.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(full.headers().contains_key("retry-after"));
        queue.pop();
        let mut last = spawn(press.render(SMALL + 1, blank));
        assert_pending!(last.poll());
        drop((queue, turns));
        assert_eq!(last.await.status(), StatusCode::OK);
        assert_eq!(press.places.available_permits(), PLACES);
    }

    #[tokio::test]
    async fn a_render_that_panics_is_an_answer_and_gives_its_permits_back() {
        let press = Press::default();
        for _ in 0..=AT_ONCE {
            let failed = press
                .render(SMALL + 1, || panic!("as the test asked"))
                .await;
            assert_eq!(failed.status(), StatusCode::SERVICE_UNAVAILABLE);
        }
    }
}
