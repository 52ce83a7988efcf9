//! The endpoints, one file for each.

mod decide;
mod route;
mod status;
mod submit;

pub(crate) use self::route::Route;
