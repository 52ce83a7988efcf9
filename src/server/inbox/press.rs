//! Large pages are rendered beside the workers, so that decisions go on meanwhile.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Semaphore;
use tokio::task;

use super::viewer::Viewer;
use crate::server::http::{Rejection, Response};

/// The most bytes of text that are rendered on a worker, which takes a few milliseconds at most.
const SMALL: usize = 8 * 1024;

/// The most large pages that are rendered at once. Each takes a core, and some megabytes.
const AT_ONCE: usize = 2;

/// The most large pages that are rendered or wait for it. Each holds the record of its action.
const PLACES: usize = 64;

/// The most of these that are one viewer's.
const PLACES_EACH: usize = PLACES / 4;

#[derive(Debug)]
pub(super) struct Press {
    at_once: Arc<Semaphore>,
    /// The places that are taken, by the name of the viewer.
    taken: Taken,
}

type Taken = Arc<Mutex<HashMap<String, usize>>>;

impl Default for Press {
    fn default() -> Self {
        Self {
            at_once: Arc::new(Semaphore::new(AT_ONCE)),
            taken: Taken::default(),
        }
    }
}

impl Press {
    /// Renders a page that shows so many bytes of text to a viewer.
    ///
    /// # Errors
    ///
    /// 503 if the viewer, or all viewers together, wait for as many large pages as they may.
    pub(super) async fn render(
        &self,
        viewer: &Viewer,
        len: usize,
        render: impl FnOnce() -> Response + Send + 'static,
    ) -> Result<Response, Rejection> {
        if len <= SMALL {
            return Ok(render());
        }
        let place = Place::take(&self.taken, viewer.name())?;
        self.print(place, render).await
    }

    /// Renders a page that gives back what somebody typed. It waits whoever else does: the text
    /// would be lost with it, and has its share of the room for bodies.
    pub(super) async fn give_back(
        &self,
        len: usize,
        render: impl FnOnce() -> Response + Send + 'static,
    ) -> Result<Response, Rejection> {
        if len <= SMALL {
            return Ok(render());
        }
        self.print((), render).await
    }

    async fn print(
        &self,
        place: impl Send + 'static,
        render: impl FnOnce() -> Response + Send + 'static,
    ) -> Result<Response, Rejection> {
        let turn = self.at_once.clone().acquire_owned().await;
        // The permits move into the task, because dropping the future does not stop it.
        let rendered = task::spawn_blocking(move || {
            let _permits = (place, turn);
            render()
        });
        let rendered = rendered.await;
        rendered.map_err(|_| Rejection::unavailable("the page cannot be shown"))
    }
}

/// A place of a viewer. It is given back when it is dropped.
#[derive(Debug)]
struct Place {
    taken: Taken,
    viewer: String,
}

impl Place {
    fn take(taken: &Taken, viewer: String) -> Result<Self, Rejection> {
        let mut places = taken.lock().unwrap_or_else(PoisonError::into_inner);
        if places.values().sum::<usize>() >= PLACES {
            return Err(Rejection::unavailable(
                "too many large pages are being shown; ask for this one again",
            ));
        }
        let theirs = places.entry(viewer.clone()).or_default();
        if *theirs >= PLACES_EACH {
            return Err(Rejection::unavailable(
                "you are being shown too many large pages; ask for this one again",
            ));
        }
        *theirs += 1;
        Ok(Self {
            taken: Arc::clone(taken),
            viewer,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(theirs) = places.get_mut(&self.viewer) {
            *theirs -= 1;
            if *theirs == 0 {
                places.remove(&self.viewer);
            }
        }
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
    use crate::store::Actor;

    fn blank() -> Response {
        Response::new(ResponseBody::default())
    }

    fn viewer(number: usize) -> Viewer {
        Viewer {
            actor: Actor::new(format!("viewer {number}")),
            ..Viewer::local()
        }
    }

    impl Press {
        /// Renders a page for the first viewer.
        async fn show(
            &self,
            len: usize,
            render: impl FnOnce() -> Response + Send + 'static,
        ) -> StatusCode {
            let rendered = self.render(&viewer(0), len, render).await;
            rendered.map_or_else(|rejection| rejection.status(), |page| page.status())
        }
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
            assert_eq!(press.show(len, render).await, StatusCode::OK);
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
            waits.push(spawn(press.show(SMALL + 1, move || {
                began.send(()).unwrap();
                _ = opened.recv();
                blank()
            })));
        }
        for wait in &mut waits {
            assert_pending!(wait.poll());
            beginnings.recv().await.unwrap();
        }
        let mut next = spawn(press.show(SMALL + 1, blank));
        assert_pending!(next.poll());
        // The connections are closed, but their renders have not ended.
        drop(waits);
        assert_pending!(next.poll());
        assert_eq!(press.at_once.available_permits(), 0);
        drop(gates);
        assert_eq!(next.await, StatusCode::OK);
    }

    #[tokio::test]
    async fn who_leaves_the_queue_gives_up_the_place_and_a_full_queue_answers_at_once() {
        let press = Press::default();
        let turns = press.at_once.clone().acquire_many_owned(AT_ONCE as u32);
        let turns = turns.await.unwrap();
        let viewers: Vec<_> = (0..5).map(viewer).collect();
        let ask = |number: usize| spawn(press.render(&viewers[number], SMALL + 1, blank));
        let mut queue = Vec::new();
        for number in 0..4 {
            for _ in 0..PLACES_EACH {
                let mut wait = ask(number);
                assert_pending!(wait.poll());
                queue.push(wait);
            }
            // Whether there is room for others or not.
            let refused = assert_ready!(ask(number).poll()).unwrap_err();
            assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        }
        let full = assert_ready!(ask(4).poll()).unwrap_err();
        assert_eq!(full.status(), StatusCode::SERVICE_UNAVAILABLE);
        // What somebody typed is not lost for that.
        let mut typed = spawn(press.give_back(SMALL + 1, blank));
        assert_pending!(typed.poll());
        queue.pop();
        let mut last = ask(4);
        assert_pending!(last.poll());
        drop((queue, turns));
        assert_eq!(last.await.unwrap().status(), StatusCode::OK);
        assert_eq!(typed.await.unwrap().status(), StatusCode::OK);
        assert!(press.taken.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_render_that_panics_is_an_answer_and_gives_its_permits_back() {
        let press = Press::default();
        for _ in 0..=AT_ONCE {
            let failed = press.show(SMALL + 1, || panic!("as the test asked")).await;
            assert_eq!(failed, StatusCode::SERVICE_UNAVAILABLE);
        }
    }
}
