//! Connections: accepting, serving, limiting and closing them.

pub(crate) mod accept;
pub(crate) mod descriptors;

mod activity;
mod connection;
mod places;

pub(crate) use self::activity::Timeouts;
pub(crate) use self::places::{ConnectionLimits, Peer, Places};
