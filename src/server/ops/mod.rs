//! The view of an operator: health checks, and outages in the log.

mod health;
mod outage;

pub(crate) use self::health::WithHealth;
pub(crate) use self::outage::Outage;
