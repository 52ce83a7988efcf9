//! The comparison of a chain with the events on record, in the words of all stores.

use super::{Entry, Hash, leaf, link, origin};
use crate::protocol::Escaped;

/// The most faults that are listed.
const MAX_FAULTS: usize = 100;

/// The first faults, in words.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<String>);

impl Faults {
    pub(crate) fn add(&mut self, fault: String) {
        if self.0.len() < MAX_FAULTS {
            // Names in a database can hold control characters.
            self.0.push(Escaped::line(&fault).to_string());
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn into_vec(self) -> Vec<String> {
        self.0
    }
}

/// A tenant's links, which are gone through in order and compared with its events.
#[derive(Debug)]
pub(crate) struct Comparison<'a> {
    tenant: &'a str,
    faults: &'a mut Faults,
    /// The number and the hash of the last link, and the position of its event.
    seq: u64,
    hash: Hash,
    last: i64,
    removed: u64,
}

impl<'a> Comparison<'a> {
    pub(crate) fn new(tenant: &'a str, faults: &'a mut Faults) -> Self {
        Self {
            tenant,
            faults,
            seq: 0,
            hash: origin(tenant),
            last: i64::MIN,
            removed: 0,
        }
    }

    /// Takes the next link. Returns its number.
    pub(crate) fn link(&mut self, position: i64, leaf: &Hash) -> u64 {
        self.seq += 1;
        if position <= self.last {
            self.faults.add(format!(
                "the audit chain of tenant {}: seq {} is not in order",
                self.tenant, self.seq
            ));
        }
        self.last = position;
        self.hash = link(&self.hash, leaf);
        self.seq
    }

    /// Compares the event of the last link with what was chained.
    pub(crate) fn event(&mut self, mut entry: Entry<'_>, chained: &Hash) {
        entry.seq = self.seq;
        let mut text = String::new();
        entry.write(&mut text);
        if leaf(&text) != *chained {
            self.faults.add(format!(
                "event {}: it is not as it was chained, as seq {} of tenant {}",
                self.last, self.seq, self.tenant
            ));
        }
    }

    /// Notes that the event of a link is no longer on record.
    pub(crate) fn gone(&mut self, position: i64, seq: u64, is_swept: bool) {
        if is_swept {
            self.removed += 1;
        } else {
            self.faults.add(format!(
                "event {position}: the audit chain has it as seq {seq} of tenant {}, \
                 and it is missing: retention did not remove it",
                self.tenant
            ));
        }
    }

    /// Notes an event for which there is no link.
    pub(crate) fn unchained(&mut self, position: i64) {
        self.faults.add(format!(
            "event {position}: the audit chain of tenant {} does not have it",
            self.tenant
        ));
    }

    /// Ends a run: compares what its row says of the last link.
    pub(crate) fn end_run(&mut self, position: i64, seq: i64, hash: Hash) {
        if u64::try_from(seq) != Ok(self.seq) || position != self.last || hash != self.hash {
            self.faults.add(format!(
                "the audit chain of tenant {}: the row of event {position} does not follow from its links",
                self.tenant
            ));
            // Else every later row would be at fault, too.
            (self.seq, self.hash) = (seq.unsigned_abs(), hash);
        }
    }

    /// Notes a row that is further than the chain is said to have come.
    #[cfg(feature = "postgres")]
    pub(crate) fn beyond(&mut self, position: i64, reached: i64) {
        self.faults.add(format!(
            "the audit chain of tenant {}: it has a row of event {position}, though all chains are \
             said to end with event {reached}",
            self.tenant
        ));
    }

    /// The number of events that sweeps have removed.
    pub(crate) fn removed(&self) -> u64 {
        self.removed
    }
}
