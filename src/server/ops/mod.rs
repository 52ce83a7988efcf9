//! The view of an operator: health checks, metrics, the description of the API, and outages in the
//! log.

pub(crate) mod health;
pub(crate) mod metrics;
pub(crate) mod openapi;
pub(crate) mod outage;
pub(crate) mod scrape;
