//! Values as PostgreSQL writes them in the text format of `COPY`.
//!
//! What is sent to the database is byte for byte what it gives back, so one can be compared with the
//! other.

use std::fmt::Write as _;

use jiff::SignedDuration;
use jiff::civil::date;
use rusqlite::Row;
use rusqlite::types::ValueRef;
use uuid::Uuid;

use crate::protocol::hex;
use crate::store::postgres::kept;

/// How a column of the embedded store is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Kind {
    /// Names, words and JSON, which have no U+0000.
    Text,
    /// Text of people and agents.
    Free,
    Number,
    Flag,
    /// Microseconds since 1970. A time behind the year 9999 becomes its end, as the store keeps it.
    Time,
    /// 16 bytes.
    Id,
    /// 16 bytes, or text.
    Call,
    Bytes,
}

/// The end of the year 9999, in microseconds since 1970.
const LAST: i64 = 253_402_300_799_000_000;

/// The start of the year 1. PostgreSQL writes times before it in another form.
const FIRST: i64 = -62_135_596_800_000_000;

/// Appends a row, and the end of its line. `columns` are its names, each with its kind.
///
/// # Errors
///
/// The name of the column whose value has no form in PostgreSQL, which only an edit by hand can have
/// written.
pub(in crate::store) fn write(
    line: &mut Vec<u8>,
    row: &Row<'_>,
    columns: &[(&'static str, Kind)],
) -> Result<(), &'static str> {
    for (at, (name, kind)) in columns.iter().enumerate() {
        if at > 0 {
            line.push(b'\t');
        }
        let value = row.get_ref(at).map_err(|_| *name)?;
        append(line, value, *kind).ok_or(*name)?;
    }
    line.push(b'\n');
    Ok(())
}

fn append(line: &mut Vec<u8>, value: ValueRef<'_>, kind: Kind) -> Option<()> {
    match (kind, value) {
        (_, ValueRef::Null) => line.extend(b"\\N"),
        (Kind::Text, ValueRef::Text(text)) => {
            let text = std::str::from_utf8(text).ok()?;
            if text.contains('\0') {
                return None;
            }
            escape(line, text);
        }
        (Kind::Call, ValueRef::Text(_)) => append(line, value, Kind::Text)?,
        (Kind::Free, ValueRef::Text(text)) => {
            escape(line, &kept(std::str::from_utf8(text).ok()?));
        }
        (Kind::Number, ValueRef::Integer(number)) => line.extend(number.to_string().bytes()),
        (Kind::Flag, ValueRef::Integer(flag)) => line.push(if flag == 0 { b'f' } else { b't' }),
        (Kind::Time, ValueRef::Integer(micros)) => time(line, micros)?,
        (Kind::Id | Kind::Call, ValueRef::Blob(bytes)) => {
            let id = Uuid::from_slice(bytes).ok()?;
            line.extend(
                id.hyphenated()
                    .encode_lower(&mut Uuid::encode_buffer())
                    .bytes(),
            );
        }
        (Kind::Bytes, ValueRef::Blob(bytes)) => {
            line.extend(b"\\\\x");
            line.extend(hex(bytes).bytes());
        }
        _ => return None,
    }
    Some(())
}

fn escape(line: &mut Vec<u8>, text: &str) {
    for byte in text.bytes() {
        let letter = match byte {
            b'\\' => b'\\',
            0x08 => b'b',
            0x0c => b'f',
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            0x0b => b'v',
            other => {
                line.push(other);
                continue;
            }
        };
        line.extend([b'\\', letter]);
    }
}

fn time(line: &mut Vec<u8>, micros: i64) -> Option<()> {
    if micros < FIRST {
        return None;
    }
    // A time stamp of the library ends some hours before the year.
    let since = SignedDuration::from_micros(micros.min(LAST));
    let time = date(1970, 1, 1).at(0, 0, 0, 0).checked_add(since).ok()?;
    let mut text = format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        time.year(),
        time.month(),
        time.day(),
        time.hour(),
        time.minute(),
        time.second()
    );
    let rest = time.subsec_nanosecond() / 1000;
    if rest > 0 {
        write!(text, ".{rest:06}").ok()?;
        text.truncate(text.trim_end_matches('0').len());
    }
    line.extend(text.bytes());
    line.extend(b"+00");
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(value: ValueRef<'_>, kind: Kind) -> Option<String> {
        let mut line = Vec::new();
        append(&mut line, value, kind)?;
        Some(String::from_utf8(line).unwrap())
    }

    #[test]
    fn a_time_is_written_as_postgresql_writes_it() {
        for (micros, text) in [
            (0, "1970-01-01 00:00:00+00"),
            (-1, "1969-12-31 23:59:59.999999+00"),
            (1_500_000, "1970-01-01 00:00:01.5+00"),
            (951_782_400_000_010, "2000-02-29 00:00:00.00001+00"),
            (LAST, "9999-12-31 23:59:59+00"),
            (i64::MAX, "9999-12-31 23:59:59+00"),
            (FIRST, "0001-01-01 00:00:00+00"),
        ] {
            let time = written(ValueRef::Integer(micros), Kind::Time);
            assert_eq!(time.as_deref(), Some(text), "{micros}");
        }
        assert_eq!(written(ValueRef::Integer(FIRST - 1), Kind::Time), None);
    }

    #[test]
    fn a_value_of_another_kind_is_refused() {
        let text = ValueRef::Text(b"a\0b");
        assert_eq!(written(text, Kind::Text), None);
        assert_eq!(written(text, Kind::Free).as_deref(), Some("a\u{2400}0b"));
        assert_eq!(written(ValueRef::Text(b"\xff"), Kind::Free), None);
        assert_eq!(written(ValueRef::Text(b"1"), Kind::Number), None);
        assert_eq!(written(ValueRef::Blob(b"short"), Kind::Id), None);
        assert_eq!(written(ValueRef::Real(0.5), Kind::Time), None);
        assert_eq!(written(ValueRef::Null, Kind::Id).as_deref(), Some("\\N"));
    }
}
