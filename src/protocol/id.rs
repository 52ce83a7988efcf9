//! The values that name a call: tenant, thread, idempotency key, request id, API key.
//!
//! Each is checked once, on construction. It holds a [`HeaderValue`], whose clones share one
//! buffer.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::HeaderValue;
use sha2::{Digest, Sha256};
use uuid::{NoContext, Timestamp, Uuid};

/// The maximum length of a tenant, a thread, a key or a request id, in characters.
pub const MAX_LEN: usize = 255;

/// The maximum length of an API key, in characters.
pub const MAX_API_KEY_LEN: usize = 4096;

/// A value that is not a valid tenant, thread, key, request id or credential.
///
/// The message says which value, what is wrong with it and what is allowed. It does not repeat the
/// value, which may be a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidValue {
    name: &'static str,
    max: usize,
    fault: Fault,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Fault {
    Empty,
    TooLong(usize),
    Invisible { at: usize },
    Quoting,
}

impl InvalidValue {
    /// Returns the kind of value that was refused, such as `tenant id`.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl fmt::Display for InvalidValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, max, fault } = self;
        match fault {
            Fault::Empty => write!(f, "the {name} is empty")?,
            Fault::TooLong(len) => write!(f, "the {name} has {len} characters")?,
            Fault::Invisible { at } => {
                write!(
                    f,
                    "the {name} has a space, control or non-ASCII character at byte {at}"
                )?;
            }
            Fault::Quoting => write!(
                f,
                "the {name} opens with a quote but is not a quoted string"
            )?,
        }
        write!(f, "; allowed are 1 to {max} visible ASCII characters")
    }
}

impl std::error::Error for InvalidValue {}

impl From<std::convert::Infallible> for InvalidValue {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

/// Checks that `text` has 1 to `max` visible ASCII characters.
fn check(name: &'static str, max: usize, text: &[u8]) -> Result<(), InvalidValue> {
    let fault = if text.is_empty() {
        Fault::Empty
    } else if let Some(at) = text.iter().position(|byte| !byte.is_ascii_graphic()) {
        Fault::Invisible { at }
    } else if text.len() > max {
        Fault::TooLong(text.len())
    } else {
        return Ok(());
    };
    Err(InvalidValue { name, max, fault })
}

/// Makes a header value from checked text. The bytes are shared from the start, so the first clone
/// allocates nothing.
fn shared_value<T: AsRef<[u8]> + Send + 'static>(text: T, sensitive: bool) -> HeaderValue {
    // Visible ASCII is always a header value, so the fallback is unreachable.
    let mut value = HeaderValue::from_maybe_shared(Bytes::from_owner(text))
        .unwrap_or_else(|_| HeaderValue::from_static(""));
    value.set_sensitive(sensitive);
    value
}

fn as_text(value: &HeaderValue) -> &str {
    // These types hold visible ASCII only, so the fallback is unreachable.
    value.to_str().unwrap_or_default()
}

/// What all identifiers have in common. Each type below adds only what is its own.
macro_rules! identifier {
    ($type:ident, $name:literal, $max:expr, sensitive: $sensitive:literal) => {
        impl $type {
            /// Checks `value` and stores it.
            ///
            /// # Errors
            ///
            #[doc = concat!("If `value` is empty, too long, or holds anything but visible ASCII (0x21 to 0x7E).")]
            pub fn new(value: impl Into<String>) -> Result<Self, InvalidValue> {
                let value = value.into();
                check($name, $max, value.as_bytes())?;
                Ok(Self(shared_value(value, $sensitive)))
            }

            /// Returns the value as text.
            pub fn as_str(&self) -> &str {
                as_text(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = InvalidValue;

            fn from_str(value: &str) -> Result<Self, Self::Err> {
                Self::new(value)
            }
        }

        impl TryFrom<&str> for $type {
            type Error = InvalidValue;

            fn try_from(value: &str) -> Result<Self, Self::Error> {
                Self::new(value)
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidValue;

            fn try_from(value: String) -> Result<Self, Self::Error> {
                Self::new(value)
            }
        }

        impl TryFrom<&String> for $type {
            type Error = InvalidValue;

            fn try_from(value: &String) -> Result<Self, Self::Error> {
                Self::new(value.as_str())
            }
        }

        impl TryFrom<&$type> for $type {
            type Error = InvalidValue;

            fn try_from(value: &$type) -> Result<Self, Self::Error> {
                Ok(value.clone())
            }
        }
    };
}

/// Implements equality, order and hashing by the text, as `str` does.
macro_rules! compare_as_text {
    ($type:ident) => {
        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                self.0.as_bytes() == other.0.as_bytes()
            }
        }

        impl Eq for $type {}

        impl Hash for $type {
            fn hash<H: Hasher>(&self, state: &mut H) {
                // As `str` does, so that a map keyed by ids can be looked up by text.
                self.as_str().hash(state);
            }
        }

        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $type {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                self.as_str().cmp(other.as_str())
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                self.as_str()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        #[cfg(any(feature = "client", feature = "server"))]
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        #[cfg(any(feature = "client", feature = "server"))]
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                Self::new(text).map_err(serde::de::Error::custom)
            }
        }
    };
}

/// The tenant that an action belongs to: 1 to 255 visible ASCII characters, sent as `Tenant-Id`.
///
/// The header value is marked sensitive, and `Debug` shows no text.
#[derive(Clone)]
pub struct TenantId(HeaderValue);

identifier!(TenantId, "tenant id", MAX_LEN, sensitive: true);
compare_as_text!(TenantId);

impl TenantId {
    /// Returns the value of the `Tenant-Id` header.
    pub fn header_value(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantId(..)")
    }
}

/// The conversation or agent run that an action belongs to: 1 to 255 visible ASCII characters, sent
/// as `Thread-Id`.
#[derive(Clone)]
pub struct ThreadId(HeaderValue);

identifier!(ThreadId, "thread id", MAX_LEN, sensitive: false);
compare_as_text!(ThreadId);

impl ThreadId {
    /// Returns the value of the `Thread-Id` header.
    pub fn header_value(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Debug for ThreadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ThreadId").field(&self.as_str()).finish()
    }
}

/// Makes two calls the same call: 1 to 255 visible ASCII characters, sent as `Idempotency-Key`.
///
/// A key is given ([`new`](Self::new)), minted for one logical call ([`mint`](Self::mint)), or
/// derived from the parts that name an action ([`derive`](Self::derive)). An agent that restarts
/// after a crash derives the same key again.
///
/// ```
/// use aegis_hitl::IdempotencyKey;
///
/// let key = IdempotencyKey::derive(["run-7", "send-email", "a@b.c"]);
/// assert_eq!(key, IdempotencyKey::derive(["run-7", "send-email", "a@b.c"]));
/// assert_ne!(key, IdempotencyKey::derive(["run-7", "send-email", "a@", "b.c"]));
/// ```
///
/// The header value is marked sensitive, and `Debug` shows no text.
#[derive(Clone)]
pub struct IdempotencyKey(HeaderValue);

identifier!(IdempotencyKey, "idempotency key", MAX_LEN, sensitive: true);
compare_as_text!(IdempotencyKey);

impl IdempotencyKey {
    /// Mints a random key, a UUIDv4 from a cryptographically secure generator.
    pub fn mint() -> Self {
        Self(uuid_value(Uuid::new_v4(), false, true))
    }

    /// Derives a key from the parts that name an action.
    ///
    /// The same parts give the same key on every machine and in every version of this crate.
    /// Different lists of parts give different keys: each part is hashed after its length
    /// (SHA-256), so `["ab", "c"]` and `["a", "bc"]` differ. The key is 64 hexadecimal digits and
    /// does not reveal the parts.
    pub fn derive<I>(parts: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<[u8]>,
    {
        let mut digest = Sha256::new_with_prefix(b"aegis-hitl idempotency key v1\n");
        for part in parts {
            let part = part.as_ref();
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        Self(shared_value(hex(&digest.finalize()), true))
    }

    /// Parses the value of an `Idempotency-Key` header: the bare key, or the quoted string of the
    /// [IETF draft].
    ///
    /// # Errors
    ///
    /// If the value begins with a quote but is not a structured-field string, or if the key is not
    /// 1 to 255 visible ASCII characters.
    ///
    /// [IETF draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
    pub fn from_header(value: &HeaderValue) -> Result<Self, InvalidValue> {
        let bytes = value.as_bytes();
        let Some(quoted) = bytes.strip_prefix(b"\"") else {
            check(Self::NAME, MAX_LEN, bytes)?;
            return Ok(Self(shared_value(
                String::from_utf8_lossy(bytes).into_owned(),
                true,
            )));
        };
        let key = unquote(quoted).ok_or(InvalidValue {
            name: Self::NAME,
            max: MAX_LEN,
            fault: Fault::Quoting,
        })?;
        check(Self::NAME, MAX_LEN, &key)?;
        Ok(Self(shared_value(
            String::from_utf8_lossy(&key).into_owned(),
            true,
        )))
    }

    const NAME: &'static str = "idempotency key";

    /// Returns the value of the `Idempotency-Key` header: the bare key, as the Python SDK sends it.
    ///
    /// A key that begins with a quote is sent quoted, because its bare form would be read as a
    /// quoted string.
    pub fn header_value(&self) -> HeaderValue {
        if self.0.as_bytes().starts_with(b"\"") {
            return self.quoted_header_value();
        }
        self.0.clone()
    }

    /// Returns the value of the `Idempotency-Key` header as the [IETF draft] has it: a quoted
    /// structured-field string.
    ///
    /// [IETF draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
    pub fn quoted_header_value(&self) -> HeaderValue {
        let mut quoted = String::with_capacity(self.as_str().len() + 2);
        quoted.push('"');
        for character in self.as_str().chars() {
            if matches!(character, '"' | '\\') {
                quoted.push('\\');
            }
            quoted.push(character);
        }
        quoted.push('"');
        shared_value(quoted, true)
    }
}

impl fmt::Debug for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdempotencyKey(..)")
    }
}

/// Reads the rest of a structured-field string (RFC 9651, section 4.2.5) after its opening quote.
fn unquote(rest: &[u8]) -> Option<Vec<u8>> {
    let mut key = Vec::with_capacity(rest.len());
    let mut bytes = rest.iter().copied();
    loop {
        match bytes.next()? {
            b'"' => return bytes.next().is_none().then_some(key),
            b'\\' => match bytes.next()? {
                escaped @ (b'"' | b'\\') => key.push(escaped),
                _ => return None,
            },
            byte => key.push(byte),
        }
    }
}

/// Names one logical call, or an action on the server: 1 to 255 visible ASCII characters, sent as
/// `X-Request-Id`.
///
/// The ids that this crate mints are UUIDs. A client sends the same id with every attempt of a call,
/// so a server can tell the call's own retry from a duplicate.
#[derive(Clone)]
pub struct RequestId(HeaderValue);

identifier!(RequestId, "request id", MAX_LEN, sensitive: false);
compare_as_text!(RequestId);

impl RequestId {
    /// Mints an id, a UUIDv7 with 74 random bits from a cryptographically secure generator.
    ///
    /// Ids minted one after the other are neighbours in an index. An id reveals when it was minted,
    /// to the millisecond.
    pub fn mint() -> Self {
        Self(uuid_value(uuid_v7(), false, false))
    }

    /// Returns the value of the `X-Request-Id` header.
    pub fn header_value(&self) -> HeaderValue {
        self.0.clone()
    }

    /// Returns the id as a UUID of any version, or `None` if it is not one.
    pub fn as_uuid(&self) -> Option<Uuid> {
        Uuid::try_parse(self.as_str()).ok()
    }
}

/// Mints a UUIDv7. All of its 74 free bits are random; `Uuid::now_v7` uses 42 of them as a counter.
pub(crate) fn uuid_v7() -> Uuid {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let now = Timestamp::from_unix(NoContext, now.as_secs(), now.subsec_nanos());
    Uuid::new_v7(now)
}

impl From<Uuid> for RequestId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid_value(uuid, false, false))
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RequestId").field(&self.as_str()).finish()
    }
}

/// A credential, sent as `Authorization: Bearer …`: 1 to 4096 visible ASCII characters.
///
/// It is never shown: `Debug` is redacted, there is no `Display`, and the header value is marked
/// sensitive.
#[derive(Clone)]
pub struct ApiKey(HeaderValue);

identifier!(ApiKey, "API key", MAX_API_KEY_LEN, sensitive: true);

impl ApiKey {
    /// Returns the value of the `Authorization` header.
    pub fn header_value(&self) -> HeaderValue {
        shared_value(format!("Bearer {}", self.as_str()), true)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// Formats a UUID as a header value, in one allocation that clones share. With `quoted` it is a
/// structured-field string.
pub(crate) fn uuid_value(uuid: Uuid, quoted: bool, sensitive: bool) -> HeaderValue {
    const LENGTH: usize = uuid::fmt::Hyphenated::LENGTH;
    if quoted {
        let mut text = [b'"'; LENGTH + 2];
        uuid.hyphenated().encode_lower(&mut text[1..=LENGTH]);
        shared_value(text, sensitive)
    } else {
        let mut text = [0; LENGTH];
        uuid.hyphenated().encode_lower(&mut text);
        shared_value(text, sensitive)
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// Reads 32 bytes in hexadecimal, in either case.
#[cfg(any(feature = "client", feature = "server"))]
pub(crate) fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = [digits[0], digits[1]].map(|digit| char::from(digit).to_digit(16));
        *byte = u8::try_from(high? * 16 + low?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_by_ids_is_asked_by_text_and_sorts_as_text_does() {
        use std::collections::{BTreeSet, HashMap};

        let name = String::from("t-1");
        let tenant = TenantId::try_from(&name).unwrap();
        assert_eq!(tenant.as_ref() as &str, "t-1");
        let by_tenant = HashMap::from([(tenant, 1)]);
        assert_eq!(by_tenant.get("t-1"), Some(&1));
        let threads = ["b", "a", "B"].map(|name| ThreadId::new(name).unwrap());
        let sorted: Vec<_> = BTreeSet::from(threads).into_iter().collect();
        assert_eq!(
            sorted.iter().map(ThreadId::as_str).collect::<Vec<_>>(),
            ["B", "a", "b"]
        );
        assert!(ApiKey::try_from(&name).is_ok() && IdempotencyKey::try_from(&name).is_ok());
    }

    #[test]
    fn a_value_of_1_to_255_visible_ascii_characters_is_kept() {
        for text in ["t", "tenant/1:x~!", &"k".repeat(255)] {
            assert_eq!(TenantId::new(text).unwrap().as_str(), text);
            assert_eq!(ThreadId::new(text).unwrap().as_str(), text);
            assert_eq!(IdempotencyKey::new(text).unwrap().as_str(), text);
            assert_eq!(RequestId::new(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn an_error_names_the_value_the_fault_and_what_is_allowed() {
        let cases = [
            (
                String::new(),
                "the tenant id is empty; allowed are 1 to 255 visible ASCII characters",
            ),
            (
                "k".repeat(256),
                "the tenant id has 256 characters; allowed are 1 to 255 visible ASCII characters",
            ),
            (
                "a b".to_owned(),
                "the tenant id has a space, control or non-ASCII character at byte 1; allowed are 1 to 255 visible ASCII characters",
            ),
            (
                "ü".to_owned(),
                "the tenant id has a space, control or non-ASCII character at byte 0; allowed are 1 to 255 visible ASCII characters",
            ),
        ];
        for (text, message) in cases {
            assert_eq!(TenantId::new(text).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn a_quoted_key_is_the_same_key() {
        let bare = HeaderValue::from_static("k-1");
        let quoted = HeaderValue::from_static("\"k-1\"");
        assert_eq!(
            IdempotencyKey::from_header(&bare).unwrap(),
            IdempotencyKey::from_header(&quoted).unwrap()
        );
    }

    #[test]
    fn broken_quoting_is_refused() {
        for text in ["\"", "\"k", "\"k\"x", "\"k\\x\"", "\"k\\"] {
            let value = HeaderValue::from_str(text).unwrap();
            assert!(IdempotencyKey::from_header(&value).is_err(), "{text}");
        }
        let empty = HeaderValue::from_static("\"\"");
        assert_eq!(
            IdempotencyKey::from_header(&empty).unwrap_err().to_string(),
            "the idempotency key is empty; allowed are 1 to 255 visible ASCII characters"
        );
    }

    #[test]
    fn every_key_survives_both_header_forms() {
        for text in [
            "k",
            "\"",
            "\"k\"",
            "a\"b",
            "a\\b",
            "\\\"",
            &"\"".repeat(255),
        ] {
            let key = IdempotencyKey::new(text).unwrap();
            assert_eq!(
                IdempotencyKey::from_header(&key.header_value()).unwrap(),
                key,
                "{text}"
            );
            assert_eq!(
                IdempotencyKey::from_header(&key.quoted_header_value()).unwrap(),
                key,
                "{text}"
            );
        }
    }

    #[test]
    fn parts_that_join_to_the_same_text_derive_different_keys() {
        let lists: [&[&str]; 6] = [
            &["ab", "c"],
            &["a", "bc"],
            &["abc"],
            &["abc", ""],
            &["", "abc"],
            &[],
        ];
        for (i, left) in lists.iter().enumerate() {
            for (j, right) in lists.iter().enumerate() {
                let same = IdempotencyKey::derive(*left) == IdempotencyKey::derive(*right);
                assert_eq!(same, i == j, "{left:?} {right:?}");
            }
        }
    }

    #[test]
    fn a_derived_key_never_changes_between_versions() {
        assert_eq!(
            IdempotencyKey::derive(["run-7", "send-email", "a@b.c"]).as_str(),
            "ec9d458d58f384d294e6cda20312dcb039110452241e31f8e1aeae54908eb46f"
        );
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!(
            "{:?} {:?} {:?}",
            ApiKey::new("sk_live_1").unwrap(),
            TenantId::new("acme").unwrap(),
            IdempotencyKey::new("k-1").unwrap(),
        );
        assert_eq!(shown, "ApiKey(..) TenantId(..) IdempotencyKey(..)");
        assert!(
            ApiKey::new("sk_live_1")
                .unwrap()
                .header_value()
                .is_sensitive()
        );
        assert!(TenantId::new("acme").unwrap().header_value().is_sensitive());
        assert!(IdempotencyKey::mint().header_value().is_sensitive());
    }

    #[test]
    fn a_minted_id_is_a_uuid_v7_of_now_with_74_random_bits() {
        let ids: Vec<_> = (0..2000)
            .map(|_| RequestId::mint().as_uuid().unwrap())
            .collect();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        for id in &ids {
            assert_eq!(id.get_version_num(), 7);
            let (seconds, _) = id.get_timestamp().unwrap().to_unix();
            assert!(now.abs_diff(seconds) < 60);
        }
        // Every bit below the time, but for the version and the variant, is set in about half of them.
        for bit in 0..80 {
            let set = ids.iter().filter(|id| id.as_u128() >> bit & 1 == 1).count();
            match bit {
                62 | 76..80 => assert!(set == 0 || set == ids.len(), "{bit}: {set}"),
                63 => assert_eq!(set, ids.len()),
                _ => assert!((800..1200).contains(&set), "{bit}: {set}"),
            }
        }
    }
}
