//! The memory for large bodies, whatever connection they belong to.

use std::collections::HashMap;
use std::ops::Deref;
use std::str::Utf8Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::Peer;

/// The memory that each body may take without asking, in bytes. Most bodies need no more, and it is
/// little beside what the request takes anyway.
pub(crate) const FREE: usize = 8 * 1024;

/// One connection, and one peer, hold at most one part in so many of a room.
const PARTS: usize = 4;

/// Who holds a body: a connection and the peer that opened it, as far as they are known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Holder {
    pub(crate) connection: Option<u64>,
    pub(crate) peer: Option<Peer>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Held {
    ByConnection(u64),
    ByPeer(Peer),
}

impl Holder {
    fn each(self) -> impl Iterator<Item = Held> {
        let connection = self.connection.map(Held::ByConnection);
        connection.into_iter().chain(self.peer.map(Held::ByPeer))
    }
}

/// A number of bytes that all large bodies share.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    /// The most bytes of one holder, unless they are of a single body.
    part: usize,
    space: Arc<Mutex<Space>>,
}

#[derive(Debug)]
struct Space {
    left: usize,
    held: HashMap<Held, usize>,
}

impl Room {
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            part: bytes / PARTS,
            space: Arc::new(Mutex::new(Space {
                left: bytes,
                held: HashMap::new(),
            })),
        }
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes nothing yet.
    pub(crate) fn share(&self, holder: Holder) -> Share {
        Share {
            room: self.clone(),
            holder,
            bytes: 0,
        }
    }

    /// Makes bytes of a text. A large text takes room until the last of them is dropped. `None` if
    /// there is no room.
    pub(crate) fn hold(&self, holder: Holder, text: Vec<u8>) -> Option<Bytes> {
        if text.len() <= FREE {
            return Some(text.into());
        }
        let mut share = self.share(holder);
        let has_room = share.grow_to(text.len());
        has_room.then(|| Bytes::from_owner(share.hold(text)))
    }
}

/// A part of the room. It is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    room: Room,
    holder: Holder,
    bytes: usize,
}

impl Share {
    /// Returns whether there is room for that many bytes, of which the first [`FREE`] take none.
    pub(crate) fn grow_to(&mut self, bytes: usize) -> bool {
        let bytes = bytes.saturating_sub(FREE);
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 {
            return true;
        }
        let mut space = self.room.space();
        let Some(left) = space.left.checked_sub(more) else {
            return false;
        };
        // A body that is larger than a part still finds room, as the holder's only one.
        let is_too_much = |held: Held| {
            let held = space.held.get(&held).copied().unwrap_or_default();
            held > self.bytes && held + more > self.room.part
        };
        if self.holder.each().any(is_too_much) {
            return false;
        }
        space.left = left;
        for held in self.holder.each() {
            *space.held.entry(held).or_default() += more;
        }
        drop(space);
        self.bytes += more;
        true
    }

    /// Keeps the share for as long as a text.
    pub(crate) fn hold(self, text: Vec<u8>) -> HeldBytes {
        HeldBytes { text, share: self }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let mut space = self.room.space();
        space.left += self.bytes;
        for held in self.holder.each() {
            let Some(bytes) = space.held.get_mut(&held) else {
                continue;
            };
            *bytes -= self.bytes;
            if *bytes == 0 {
                space.held.remove(&held);
            }
        }
    }
}

/// A body and its share of the room.
#[derive(Debug)]
pub(crate) struct HeldBytes {
    text: Vec<u8>,
    share: Share,
}

impl HeldBytes {
    pub(crate) fn into_text(self) -> Result<HeldText, Utf8Error> {
        let text = String::from_utf8(self.text).map_err(|error| error.utf8_error())?;
        Ok(HeldText {
            text,
            _share: self.share,
        })
    }
}

impl AsRef<[u8]> for HeldBytes {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

impl Deref for HeldBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.text
    }
}

/// A text and its share of the room.
#[derive(Debug)]
pub(crate) struct HeldText {
    text: String,
    _share: Share,
}

impl Deref for HeldText {
    type Target = str;

    fn deref(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: Holder = Holder {
        connection: None,
        peer: None,
    };

    fn text(len: usize) -> Vec<u8> {
        vec![b'x'; FREE + len]
    }

    #[test]
    fn a_share_is_given_back_with_the_last_of_the_bytes() {
        let room = Room::new(10_000);
        let small = [room.hold(NOBODY, text(0)), room.hold(NOBODY, text(0))];
        assert!(small.iter().all(Option::is_some));
        let large = room.hold(NOBODY, text(10_000)).unwrap();
        assert_eq!(room.hold(NOBODY, text(1)), None);
        let rest = large.slice(1..2);
        drop(large);
        assert_eq!(room.hold(NOBODY, text(1)), None);
        drop(rest);
        assert!(room.hold(NOBODY, text(10_000)).is_some());
    }

    #[test]
    fn one_connection_and_one_peer_hold_a_quarter_and_leave_the_rest_to_others() {
        let room = Room::new(10_000);
        let of = |connection, peer: Option<&str>| Holder {
            connection: Some(connection),
            peer: peer.map(|peer| Peer::of(peer.parse().unwrap())),
        };
        let first = of(1, None);
        let held = [
            room.hold(first, text(2_000)).unwrap(),
            room.hold(first, text(500)).unwrap(),
        ];
        assert_eq!(room.hold(first, text(1)), None);
        assert!(room.hold(first, text(0)).is_some());
        let second = of(2, None);
        assert!(room.hold(second, text(2_500)).is_some());
        drop(held);
        assert!(room.hold(first, text(2_500)).is_some());

        let peers = room.hold(of(3, Some("192.0.2.1")), text(2_000)).unwrap();
        assert_eq!(room.hold(of(4, Some("192.0.2.1")), text(501)), None);
        let others = room.hold(of(5, Some("192.0.2.2")), text(2_500));
        assert!(others.is_some());
        drop((peers, others));
        let space = room.space();
        assert_eq!((space.left, space.held.len()), (10_000, 0));
    }

    #[test]
    fn a_body_of_more_than_a_quarter_finds_room_as_the_only_one_of_its_holder() {
        let room = Room::new(10_000);
        let holder = Holder {
            connection: Some(1),
            peer: None,
        };
        let mut share = room.share(holder);
        assert!(share.grow_to(FREE + 2_000) && share.grow_to(FREE + 9_000));
        assert_eq!(room.hold(holder, text(1)), None);
        drop(share);
        let small = room.hold(holder, text(1)).unwrap();
        assert_eq!(room.hold(holder, text(9_000)), None);
        drop(small);
    }
}
