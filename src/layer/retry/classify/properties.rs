//! What holds for every `Retry-After`.

use std::time::UNIX_EPOCH;

use http::HeaderValue;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn parsed(value: &[u8]) -> Option<Duration> {
    let mut headers = HeaderMap::new();
    headers.insert(RETRY_AFTER, HeaderValue::from_bytes(value).unwrap());
    retry_after(&headers)
}

/// The three forms of RFC 9110, section 5.6.7: IMF-fixdate, RFC 850's and asctime's.
fn forms(date: SystemTime) -> [String; 3] {
    let fixdate = httpdate::fmt_http_date(date);
    let (weekday, rest) = fixdate.split_once(", ").unwrap();
    let [day, month, year, time, _]: [&str; 5] =
        rest.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let long = match weekday {
        "Mon" => "Monday",
        "Tue" => "Tuesday",
        "Wed" => "Wednesday",
        "Thu" => "Thursday",
        "Fri" => "Friday",
        "Sat" => "Saturday",
        _ => "Sunday",
    };
    let number: u32 = day.parse().unwrap();
    [
        fixdate.clone(),
        format!("{long}, {day}-{month}-{} {time} GMT", &year[2..]),
        format!("{weekday} {month} {number:>2} {time} {year}"),
    ]
}

/// A piece of a value that may be taken for a number or a date.
fn piece() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "0",
        "7",
        "59",
        "60",
        "99999999999999999999",
        ".",
        "-",
        "+",
        "e",
        " ",
        ":",
        ",",
        "Sun",
        "Sunday",
        "Nov",
        "06",
        "31",
        "1994",
        "9999",
        "0000",
        "08:49:37",
        "24:60:61",
        "GMT",
        "é",
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whole_seconds_are_read_exactly(seconds in any::<u64>(), zeros in 0..4_usize, pad in 0..3_usize) {
        let pad = " ".repeat(pad);
        let value = format!("{pad}{}{seconds}{pad}", "0".repeat(zeros));
        prop_assert_eq!(parsed(value.as_bytes()), Some(Duration::from_secs(seconds)));
    }

    #[test]
    fn a_number_of_any_length_is_at_least_as_long_as_what_fits(digits in vec(b'0'..=b'9', 1..60)) {
        let wait = parsed(&digits).unwrap();
        let text = String::from_utf8(digits).unwrap();
        prop_assert_eq!(wait.as_secs(), text.parse().unwrap_or(u64::MAX));
    }

    #[test]
    fn a_fraction_is_read_to_the_nanosecond(seconds in 0..1_u64 << 53, digits in vec(b'0'..=b'9', 1..40)) {
        let digits = String::from_utf8(digits).unwrap();
        let wait = parsed(format!("{seconds}.{digits}").as_bytes()).unwrap();
        let nanos: u64 = format!("{digits:0<9}")[..9].parse().unwrap();
        let floor = Duration::new(seconds, 0) + Duration::from_nanos(nanos);
        // What is beyond nanoseconds may be rounded up.
        prop_assert!(wait >= floor && wait <= floor + Duration::from_nanos(1), "{wait:?} {floor:?}");
    }

    #[test]
    fn a_date_is_a_wait_in_all_three_forms(seconds in 0..3_124_223_999_u64) {
        // Up to 2068: two digits of a year say no more.
        let date = UNIX_EPOCH + Duration::from_secs(seconds);
        for text in forms(date) {
            let before = SystemTime::now();
            let wait = parsed(text.as_bytes());
            let after = SystemTime::now();
            let distance = |now| date.duration_since(now).unwrap_or_default();
            prop_assert!(
                wait <= Some(distance(before)) && wait >= Some(distance(after)),
                "{text}: {wait:?}"
            );
        }
    }

    #[test]
    fn a_date_near_now_is_a_wait_in_all_three_forms(seconds in -5000..5000_i64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let date = UNIX_EPOCH + Duration::from_secs(now.checked_add_signed(seconds).unwrap());
        for text in forms(date) {
            let wait = parsed(text.as_bytes());
            let latest = date.duration_since(SystemTime::now()).unwrap_or_default();
            prop_assert!(wait >= Some(latest), "{text}: {wait:?}");
            prop_assert!(wait <= Some(Duration::from_secs(seconds.max(0).unsigned_abs())), "{text}: {wait:?}");
        }
    }

    #[test]
    fn no_value_panics_and_what_is_no_wait_is_none(bytes in vec(prop_oneof![Just(b'\t'), 0x20..=0x7e_u8, 0x80..=0xff_u8], 0..40)) {
        if let Some(wait) = parsed(&bytes) {
            let text = str::from_utf8(&bytes).unwrap().trim();
            let is_number = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
            prop_assert!(is_number || httpdate::parse_http_date(text).is_ok(), "{text}: {wait:?}");
        }
    }

    #[test]
    fn what_is_nearly_a_wait_panics_neither(pieces in vec(piece(), 0..8)) {
        let text = pieces.concat();
        if parsed(text.as_bytes()).is_some() {
            let text = text.trim();
            let points = text.bytes().filter(|byte| *byte == b'.').count();
            let is_number = points <= 1
                && text.split('.').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
            prop_assert!(is_number || httpdate::parse_http_date(text).is_ok(), "{text}");
        }
    }
}
