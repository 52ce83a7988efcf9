//! Connections.

pub(crate) mod accept;
pub(crate) mod descriptors;

mod activity;
mod connection;
mod places;

pub(crate) use self::activity::Patience;
pub(crate) use self::places::{Bounds, Places};
