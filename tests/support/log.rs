//! What is logged.

use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::sync::Once;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::dynamic_filter_fn;
use tracing_subscriber::layer::SubscriberExt;

thread_local! {
    static LEVEL: Cell<LevelFilter> = const { Cell::new(LevelFilter::OFF) };
    static TEXT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What this thread logs for as long as this lives.
///
/// A subscriber of each test would not do: where only one thread has a subscriber, what another thread without one is the first
/// to reach counts as switched off for both. There is one for the whole process, and each thread has its own level and text.
pub struct Log {
    // The state is the thread's.
    _not_send: PhantomData<*const ()>,
}

/// Writes to the thread's text.
struct Text;

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        TEXT.with_borrow_mut(|text| text.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Keeps what this thread logs at this level and the more severe ones.
    pub fn capture(level: tracing::Level) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            let enabled = dynamic_filter_fn(|metadata, _| *metadata.level() <= LEVEL.get());
            let text = tracing_subscriber::fmt::layer()
                .with_ansi(false)
                .without_time()
                .with_writer(|| Text);
            let subscriber = tracing_subscriber::registry().with(enabled).with(text);
            tracing::subscriber::set_global_default(subscriber).unwrap();
        });
        // For what another thread reached first while the subscriber was being installed.
        tracing::callsite::rebuild_interest_cache();
        assert_eq!(LEVEL.get(), LevelFilter::OFF, "one log to a thread");
        LEVEL.set(level.into());
        Self {
            _not_send: PhantomData,
        }
    }

    /// What has been logged. The store logs on threads of its own, which is not here.
    pub fn text(&self) -> String {
        TEXT.with_borrow(|text| String::from_utf8_lossy(text).into_owned())
    }

    /// The lines of [`Self::text`].
    pub fn lines(&self) -> Vec<String> {
        self.text().lines().map(str::to_owned).collect()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        LEVEL.set(LevelFilter::OFF);
        TEXT.take();
    }
}
