//! The manual: how the crate is built, what it promises, and how to run it.
//!
//! | page | for whom |
//! | --- | --- |
//! | [`architecture`] | whoever reads or changes the code |
//! | [`guarantees`] | whoever relies on the layers or the server |
//! | [`storage`] | whoever opens, copies or queries the database |
//! | [`scaling`] | whoever outgrows one machine |
//! | [`agents`] | whoever writes an agent |
//! | [`reviewing`] | whoever decides |
//! | [`operating`] | whoever runs the server |
//! | [`audit`] | whoever has to prove what was decided |
//! | [`contributing`] | whoever sends a change |
//!
//! This module has no code. It exists in the documentation alone.

/// Makes one page of a Markdown file.
///
/// The pages link to one another by file name, which works on a forge. Of two definitions of a link
/// the first one counts, so those written here lead to the modules in the documentation.
macro_rules! page {
    ($name:ident, $text:expr) => {
        #[doc = "[architecture.md]: crate::manual::architecture"]
        #[doc = "[guarantees.md]: crate::manual::guarantees"]
        #[doc = "[storage.md]: crate::manual::storage"]
        #[doc = "[scaling.md]: crate::manual::scaling"]
        #[doc = "[agents.md]: crate::manual::agents"]
        #[doc = "[reviewing.md]: crate::manual::reviewing"]
        #[doc = "[operating.md]: crate::manual::operating"]
        #[doc = "[audit.md]: crate::manual::audit"]
        #[doc = "[contributing.md]: crate::manual::contributing"]
        #[doc = ""]
        #[doc = $text]
        pub mod $name {}
    };
}

page!(architecture, include_str!("architecture.md"));
page!(guarantees, include_str!("guarantees.md"));
page!(storage, include_str!("storage.md"));
page!(scaling, include_str!("scaling.md"));
page!(agents, include_str!("agents.md"));
page!(reviewing, include_str!("reviewing.md"));
page!(operating, include_str!("operating.md"));
page!(audit, include_str!("audit.md"));
page!(contributing, include_str!("contributing.md"));
