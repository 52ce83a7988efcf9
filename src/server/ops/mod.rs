//! What an operator sees of a server.

mod health;
mod outage;

pub(crate) use self::health::WithHealth;
pub(crate) use self::outage::Outage;
