//! The memory for large bodies, whatever connection they belong to.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

/// The memory that each body may take without asking, in bytes. Most bodies need no more, and it is
/// little beside what the request takes anyway.
pub(crate) const FREE: usize = 8 * 1024;

/// A number of bytes that all large bodies share.
#[derive(Debug, Clone)]
pub(crate) struct Room(Arc<AtomicUsize>);

impl Room {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(bytes)))
    }

    /// Takes nothing yet.
    pub(crate) fn share(&self) -> Share {
        Share {
            room: self.clone(),
            bytes: 0,
        }
    }

    /// Makes bytes of a text. A large text takes room until the last of them is dropped. `None` if
    /// there is no room.
    pub(crate) fn hold(&self, text: Vec<u8>) -> Option<Bytes> {
        if text.len() <= FREE {
            return Some(text.into());
        }
        let mut share = self.share();
        let has_room = share.grow_to(text.len());
        has_room.then(|| Bytes::from_owner(share.hold(text)))
    }
}

/// A part of the room. It is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    room: Room,
    bytes: usize,
}

impl Share {
    /// Returns whether there is room for that many bytes, of which the first [`FREE`] take none.
    pub(crate) fn grow_to(&mut self, bytes: usize) -> bool {
        let bytes = bytes.saturating_sub(FREE);
        let more = bytes.saturating_sub(self.bytes);
        let take = |left: usize| left.checked_sub(more);
        // Only the number itself is shared, so no order is needed.
        let left = &self.room.0;
        let has_room = more == 0
            || left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                .is_ok();
        if has_room {
            self.bytes += more;
        }
        has_room
    }

    /// Keeps the share for as long as a text.
    pub(crate) fn hold(self, text: Vec<u8>) -> Held {
        Held { text, _share: self }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.room.0.fetch_add(self.bytes, Ordering::Relaxed);
        }
    }
}

/// A text and its share of the room.
#[derive(Debug)]
pub(crate) struct Held {
    text: Vec<u8>,
    _share: Share,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

impl Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_given_back_with_the_last_of_the_bytes() {
        let room = Room::new(10_000);
        let text = |len| vec![b'x'; len];
        let small = [room.hold(text(FREE)), room.hold(text(FREE))];
        assert!(small.iter().all(Option::is_some));
        let large = room.hold(text(FREE + 10_000)).unwrap();
        assert_eq!(room.hold(text(FREE + 1)), None);
        let rest = large.slice(1..2);
        drop(large);
        assert_eq!(room.hold(text(FREE + 1)), None);
        drop(rest);
        assert!(room.hold(text(FREE + 10_000)).is_some());
    }
}
