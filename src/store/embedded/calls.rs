//! Finds the action that a call id (`X-Request-Id`) names.
//!
//! An index on these random ids would cost every event a page of its own in the log, and they are seldom asked for. So the ids
//! of the newest events are kept in memory, and every [`BLOCK`] events they are written as one block: short tags, sorted,
//! in [`BUCKETS`] rows. The rows of one bucket lie side by side, and a look-up reads one row for each block. A tag only leads to
//! an event, whose whole call id is compared.
//!
//! A call that changed nothing has no event. To write one for each would let a caller who repeats itself fill the disk, so the newest
//! [`CONFIRMED`] of them are kept in memory alone.

use std::collections::{HashSet, VecDeque};
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

/// The most calls that changed nothing and are remembered: about 1 MiB of them.
pub(super) const CONFIRMED: usize = if cfg!(test) { 64 } else { 16_384 };

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
    confirmed: Mutex<Confirmed>,
}

/// A call that changed nothing, and the row of the action that it was answered with.
pub(super) type Confirmation = (Uuid, i64);

/// The newest calls that changed nothing, each once.
#[derive(Debug, Default)]
struct Confirmed {
    order: VecDeque<Confirmation>,
    known: HashSet<Confirmation>,
}

impl Confirmed {
    fn add(&mut self, confirmation: Confirmation) {
        if !self.known.insert(confirmation) {
            return;
        }
        if self.order.len() == CONFIRMED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.order.push_back(confirmation);
    }

    fn of(&self, call: Uuid) -> Vec<i64> {
        let of = self.order.iter().filter(|(named, _)| *named == call);
        of.map(|(_, action)| *action).collect()
    }
}

/// What a call id was found to name.
#[derive(Debug, Clone, Copy)]
enum Found {
    Nothing,
    One(i64),
    Several,
}

impl Found {
    /// Takes one more action into account, and says whether it still is one at most.
    fn is_only(&mut self, action: Option<i64>) -> bool {
        match (*self, action) {
            (_, None) => {}
            (Self::Nothing, Some(action)) => *self = Self::One(action),
            (Self::One(one), Some(other)) if one == other => {}
            (Self::One(_) | Self::Several, Some(_)) => *self = Self::Several,
        }
        !matches!(self, Self::Several)
    }
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
            confirmed: Mutex::default(),
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

    /// Takes note of calls that changed nothing.
    pub(super) fn confirm(&self, calls: &[Confirmation]) {
        if !calls.is_empty() {
            let mut confirmed = self.confirmed();
            calls.iter().for_each(|call| confirmed.add(*call));
        }
    }

    /// The row of the action that a call id names, if it names one action only: of a tenant, or of all.
    pub(super) fn find(
        &self,
        connection: &Connection,
        call: Uuid,
        tenant: Option<&str>,
    ) -> rusqlite::Result<Option<i64>> {
        let mut found = self.find_recorded(connection, call, tenant)?;
        // What is on record comes first, so that no repeated call takes it away.
        if matches!(found, Found::Nothing) {
            let confirmed = self.confirmed().of(call);
            for action in confirmed {
                if !found.is_only(action_of(connection, action, tenant)?) {
                    break;
                }
            }
        }
        Ok(match found {
            Found::One(action) => Some(action),
            Found::Nothing | Found::Several => None,
        })
    }

    fn find_recorded(
        &self,
        connection: &Connection,
        call: Uuid,
        tenant: Option<&str>,
    ) -> rusqlite::Result<Found> {
        let tag = self.secret.tag(call);
        // Before the blocks: what is moved from here to there meanwhile is found twice, and not missed.
        let recent: Vec<i64> = {
            let recent = self.recent();
            let found = recent.named.iter().filter(|named| named.tag == tag);
            found.map(|named| named.seq).collect()
        };
        let mut found = Found::Nothing;
        for seq in recent {
            if !found.is_only(named_action(connection, seq, call, tenant)?) {
                return Ok(found);
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
                if !found.is_only(named_action(connection, seq, call, tenant)?) {
                    return Ok(found);
                }
            }
        }
        Ok(found)
    }

    fn confirmed(&self) -> MutexGuard<'_, Confirmed> {
        self.confirmed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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

/// The action of an event, if that has this call id and the action is this tenant's.
fn named_action(
    connection: &Connection,
    seq: i64,
    call: Uuid,
    tenant: Option<&str>,
) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached(
            "SELECT action.id FROM event JOIN action ON action.id = event.action \
             WHERE seq = ?1 AND event.call_id = ?2 AND (?3 IS NULL OR tenant_id = ?3)",
        )?
        .query_row(params![seq, call.as_bytes(), tenant], |row| row.get(0))
        .optional()
}

/// An action, if it is this tenant's.
fn action_of(
    connection: &Connection,
    action: i64,
    tenant: Option<&str>,
) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("SELECT id FROM action WHERE id = ?1 AND (?2 IS NULL OR tenant_id = ?2)")?
        .query_row(params![action, tenant], |row| row.get(0))
        .optional()
}
