//! Runs: links of a tenant that were computed together, which one row holds.

use super::{Entry, Hash, leaf, link};

/// The length of a link in a row: the event's position and the leaf.
const LINK: usize = 8 + 32;

/// Links of one tenant, and where they lead.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) tenant: String,
    /// The position of the last event.
    pub(crate) position: i64,
    /// The number of the last link.
    pub(crate) seq: u64,
    /// For each link the position of its event, with the highest byte first, and its leaf.
    pub(crate) links: Vec<u8>,
    /// The hash of the last link.
    pub(crate) hash: Hash,
}

impl Run {
    /// A run of no links behind a link of a tenant.
    pub(crate) fn behind(tenant: String, (seq, hash): (u64, Hash)) -> Self {
        Self {
            tenant,
            position: 0,
            seq,
            links: Vec::new(),
            hash,
        }
    }

    /// Adds the link of an event, whose entry gets its number. `text` is room to write it in.
    pub(crate) fn add(&mut self, position: i64, entry: &mut Entry<'_>, text: &mut String) {
        self.position = position;
        self.seq += 1;
        entry.seq = self.seq;
        text.clear();
        entry.write(text);
        let leaf = leaf(text);
        self.links.extend(position.to_be_bytes());
        self.links.extend(leaf);
        self.hash = link(&self.hash, &leaf);
    }
}

/// The links of a row: the positions of the events, and the leaves.
pub(crate) fn links(bytes: &[u8]) -> impl Iterator<Item = (i64, Hash)> {
    let (links, _) = bytes.as_chunks::<LINK>();
    links.iter().map(|link| {
        let (mut position, mut leaf) = ([0; 8], [0; 32]);
        position.copy_from_slice(&link[..8]);
        leaf.copy_from_slice(&link[8..]);
        (i64::from_be_bytes(position), leaf)
    })
}
