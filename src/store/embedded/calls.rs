//! Finds the action that a call id (`X-Request-Id`) names.
//!
//! An index on these random ids would cost every event a page of its own in the log, and they are seldom asked for. So the ids
//! of the newest events are kept in memory, and every [`BLOCK`] events they are written as one block: short tags, sorted,
//! in [`BUCKETS`] rows. The rows of one bucket lie side by side, and a look-up reads one row for each block. A tag only leads to
//! an event, whose whole call id is compared.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use super::secret::Secret;

/// How many events make a block. Unit tests see many with little to write.
pub(super) const BLOCK: i64 = if cfg!(test) { 64 } else { 32_768 };

/// The rows that a block may have: one for each first byte of a tag.
const BUCKETS: i64 = 256;

/// The bits of a row's number below its bucket; they hold the sequence number at which the block ends.
const END: u32 = 48;

/// One call id of one event.
#[derive(Debug, Clone, Copy)]
pub(super) struct Named {
    /// 48 bits.
    tag: u64,
    seq: i64,
}

/// The index, as far as it is in memory.
#[derive(Debug)]
pub(super) struct Calls {
    secret: Secret,
    recent: Mutex<Recent>,
}

/// What no block has.
#[derive(Debug)]
struct Recent {
    /// The first event after the last block.
    begin: i64,
    named: Vec<Named>,
}

impl Calls {
    pub(super) fn load(connection: &Connection, secret: Secret) -> rusqlite::Result<Self> {
        Ok(Self {
            secret,
            recent: Mutex::new(Recent::load(connection, secret)?),
        })
    }

    /// Reads again what is on record, after a fault that left that in doubt.
    pub(super) fn reload(&self, connection: &Connection) -> rusqlite::Result<()> {
        let recent = Recent::load(connection, self.secret)?;
        *self.recent() = recent;
        Ok(())
    }

    pub(super) fn secret(&self) -> Secret {
        self.secret
    }

    pub(super) fn named(&self, call: Uuid, seq: i64) -> Named {
        let tag = self.secret.tag(call);
        Named { tag, seq }
    }

    /// Writes a block, if it is time for one: with `new`, which end before `end`.
    ///
    /// When that is committed, [`add`](Self::add) is to be told.
    pub(super) fn write(
        &self,
        connection: &Connection,
        new: &[Named],
        end: i64,
    ) -> rusqlite::Result<bool> {
        let mut entries: Vec<u64> = {
            let recent = self.recent();
            if end - recent.begin < BLOCK {
                return Ok(false);
            }
            let named = recent.named.iter().chain(new);
            named.filter_map(|named| named.entry(end)).collect()
        };
        entries.sort_unstable();
        let mut insert =
            connection.prepare_cached("INSERT INTO call_block (id, entries) VALUES (?1, ?2)")?;
        let mut rest = &*entries;
        for bucket in 0..BUCKETS {
            let (row, others) =
                rest.split_at(rest.partition_point(|entry| (entry >> 56) as i64 <= bucket));
            rest = others;
            // The first bucket has a row even if that is empty: the last block's end is read from there.
            if row.is_empty() && bucket > 0 {
                continue;
            }
            let bytes: Vec<u8> = row.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            insert.execute(params![bucket << END | end, bytes])?;
        }
        Ok(true)
    }

    /// Takes note of what was committed: `new`, which end before `end`, and whether a block was written with them.
    pub(super) fn add(&self, new: &[Named], end: i64, is_written: bool) {
        let mut recent = self.recent();
        if is_written {
            recent.begin = end;
            recent.named.clear();
        } else {
            recent.named.extend_from_slice(new);
        }
    }

    /// The row of the action that a call id names, if it names one action only.
    pub(super) fn find(
        &self,
        connection: &Connection,
        call: Uuid,
    ) -> rusqlite::Result<Option<i64>> {
        let tag = self.secret.tag(call);
        // Before the blocks: what is moved from here to there meanwhile is found twice, and not missed.
        let recent: Vec<i64> = {
            let recent = self.recent();
            let found = recent.named.iter().filter(|named| named.tag == tag);
            found.map(|named| named.seq).collect()
        };
        let mut action = None;
        for seq in recent {
            if !is_only(&mut action, named_action(connection, seq, call)?) {
                return Ok(None);
            }
        }
        let mut blocks = connection
            .prepare_cached("SELECT id, entries FROM call_block WHERE id BETWEEN ?1 AND ?2")?;
        let first = ((tag >> 40) as i64) << END;
        let mut blocks = blocks.query(params![first, first | ((1 << END) - 1)])?;
        while let Some(row) = blocks.next()? {
            let end = row.get::<_, i64>(0)? - first;
            let (entries, _) = row.get_ref(1)?.as_blob()?.as_chunks::<8>();
            let at = entries.partition_point(|entry| u64::from_be_bytes(*entry) >> 16 < tag);
            let entries = entries[at..].iter().map(|entry| u64::from_be_bytes(*entry));
            for entry in entries.take_while(|entry| entry >> 16 == tag) {
                let seq = end - (entry & 0xffff) as i64;
                if !is_only(&mut action, named_action(connection, seq, call)?) {
                    return Ok(None);
                }
            }
        }
        Ok(action)
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recent {
    fn load(connection: &Connection, secret: Secret) -> rusqlite::Result<Self> {
        let begin = connection.query_row(
            "SELECT coalesce(max(id), 0) FROM call_block WHERE id < ?1",
            [1_i64 << END],
            |row| row.get(0),
        )?;
        let mut events = connection.prepare(
            "SELECT seq, call_id FROM event WHERE seq >= ?1 AND typeof(call_id) = 'blob'",
        )?;
        let named = events.query_map([begin], |row| {
            let tag = secret.tag(Uuid::from_bytes(row.get(1)?));
            Ok(Named {
                tag,
                seq: row.get(0)?,
            })
        })?;
        Ok(Self {
            begin,
            named: named.collect::<Result<_, _>>()?,
        })
    }
}

impl Named {
    /// The tag, and how far before the block's end the event is. Only an edit by hand makes gaps that are too large for that.
    fn entry(self, end: i64) -> Option<u64> {
        let distance = u16::try_from(end - self.seq).ok()?;
        Some(self.tag << 16 | u64::from(distance))
    }
}

/// Whether no other action was found before.
fn is_only(action: &mut Option<i64>, found: Option<i64>) -> bool {
    match (&action, found) {
        (Some(one), Some(other)) => *one == other,
        (None, Some(_)) => {
            *action = found;
            true
        }
        (_, None) => true,
    }
}

/// The action of an event, if that has this call id.
fn named_action(connection: &Connection, seq: i64, call: Uuid) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("SELECT action FROM event WHERE seq = ?1 AND call_id = ?2")?
        .query_row(params![seq, call.as_bytes()], |row| row.get(0))
        .optional()
}
