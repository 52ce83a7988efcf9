//! `GET /metrics`.

use std::time::Duration;

use http::request::Parts;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::metrics::{CONTENT_TYPE, Reading};
use crate::outbox::Tally;
use crate::server::api::Api;
use crate::server::http::response;
use crate::server::http::{Arrival, Rejection, Response};
use crate::store::Store;

/// How long the store may take to be read. Without it, the rest is shown.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers a scrape.
#[derive(Debug, Default)]
pub(crate) struct Scraper {
    /// One scrape at a time reads the store, so that scrapes take little from those who decide.
    turn: Mutex<()>,
}

impl Scraper {
    /// Checks the host of the request if it came to the address of the service, and answers.
    /// `arrival` is `None` for the address for metrics.
    pub(crate) async fn answer<St: Store>(
        &self,
        api: &Api<St>,
        parts: &Parts,
        arrival: Option<Arrival>,
    ) -> Result<Response, Rejection> {
        if let Some(arrival) = arrival {
            api.admit(parts, arrival)?;
        }
        let read = async {
            let _turn = self.turn.lock().await;
            let endpoints = async {
                match api.settings.webhooks {
                    Some(_) => api.store.endpoints().await,
                    None => Ok(Vec::new()),
                }
            };
            (api.store.backlog().await, endpoints.await)
        };
        let (backlog, webhooks) = match timeout(READ_TIMEOUT, read).await {
            Ok((backlog, webhooks)) => (backlog.ok(), webhooks.ok()),
            Err(_) => (None, None),
        };
        let reading = Reading {
            statistics: api.store.statistics(),
            backlog,
            webhooks,
            tally: api.settings.webhooks.as_ref().map(Tally::read),
            reloads: api.settings.reloads.clone(),
        };
        let text = api.metrics.text(reading);
        let text = text.map_err(|_| Rejection::unavailable("the metrics cannot be shown"))?;
        Ok(response::text(CONTENT_TYPE, text))
    }
}
