//! The log (`-wal`) as a file: whether a transaction that was synced is damaged.
//!
//! SQLite takes the first frame that is not whole for the end of the log
//! (<https://sqlite.org/walformat.html>). After a crash that is right: what stands behind was never
//! synced. If the frame was damaged later, all that was acknowledged behind it is lost.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::path::Path;

const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// The magic number. Its last bit says whether the words of the checksums are big-endian.
const MAGIC: u32 = 0x377f_0682;

/// Returns what is wrong with the log, in words.
pub(super) fn fault(log: &Path) -> io::Result<Option<String>> {
    let mut previous = None;
    loop {
        let mut file = match File::open(log) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => BufReader::with_capacity(1 << 20, opened?),
        };
        let header = header(&mut file)?;
        let Some(fault) = read(&header, &mut file)? else {
            return Ok(None);
        };
        // A server may write meanwhile: a frame that was half written is whole the next time, and
        // a log that is used again from its start has another header.
        let found = Some((header, fault));
        if previous == found {
            return Ok(found.map(|(_, fault)| fault));
        }
        previous = found;
    }
}

fn header(file: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut header = Vec::new();
    file.take(HEADER as u64).read_to_end(&mut header)?;
    Ok(header)
}

fn read(header: &[u8], file: &mut BufReader<File>) -> io::Result<Option<String>> {
    let mut frame = vec![0; FRAME_HEADER];
    let Some(log) = Log::of(header) else {
        // The header is synced before the first frame is written.
        let is_used = file.read_exact(&mut frame).is_ok();
        return Ok(is_used.then(|| "the log (-wal): its header is damaged".to_owned()));
    };
    let mut sum = log.sum;
    let mut number = 0_u64;
    let mut broken = None;
    let mut commits = 0_u64;
    frame.resize(FRAME_HEADER + log.page_size, 0);
    loop {
        match file.read_exact(&mut frame) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            read => read?,
        }
        number += 1;
        let (head, page) = frame.split_at(FRAME_HEADER);
        // The others are of an earlier use of the log.
        let is_current = head[8..16] == log.salts;
        if broken.is_none() {
            sum = log.add(log.add(sum, &head[..8]), page);
            if !is_current || word(head, 0) == 0 || sum != (word(head, 16), word(head, 20)) {
                broken = Some(number);
            }
        }
        commits += u64::from(broken.is_some() && is_current && word(head, 4) != 0);
    }
    // A commit is synced before the next one begins, so a crash can break the last one only.
    Ok(broken.filter(|_| commits > 1).map(|broken| {
        format!("the log (-wal): frame {broken} is damaged; what was committed behind it is lost")
    }))
}

struct Log {
    is_big_endian: bool,
    page_size: usize,
    salts: [u8; 8],
    sum: (u32, u32),
}

impl Log {
    fn of(header: &[u8]) -> Option<Self> {
        if header.len() < HEADER || word(header, 0) & !1 != MAGIC {
            return None;
        }
        let page_size = word(header, 8) as usize;
        let mut log = Self {
            is_big_endian: word(header, 0) & 1 == 1,
            page_size,
            salts: header[16..24].try_into().ok()?,
            sum: (0, 0),
        };
        log.sum = log.add(log.sum, &header[..24]);
        let is_whole = log.sum == (word(header, 24), word(header, 28));
        (is_whole && page_size.is_power_of_two() && (512..=65_536).contains(&page_size))
            .then_some(log)
    }

    /// Adds bytes to a checksum.
    fn add(&self, (mut one, mut two): (u32, u32), bytes: &[u8]) -> (u32, u32) {
        let read = if self.is_big_endian {
            u32::from_be_bytes
        } else {
            u32::from_le_bytes
        };
        let (words, _) = bytes.as_chunks::<4>();
        let (pairs, _) = words.as_chunks::<2>();
        for [first, second] in pairs {
            one = one.wrapping_add(read(*first)).wrapping_add(two);
            two = two.wrapping_add(read(*second)).wrapping_add(one);
        }
        (one, two)
    }
}

/// A word of a header, all of which are big-endian.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}
