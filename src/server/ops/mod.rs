//! The view of an operator: health checks, and outages in the log.

pub(crate) mod health;
pub(crate) mod outage;
