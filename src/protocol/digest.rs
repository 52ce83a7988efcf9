//! The digest of a payload.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::id::{hex, unhex};
use super::{Escaped, Fingerprint, Payload};

/// The SHA-256 of a payload's canonical form (RFC 8785, with integers of up to 64 bits kept
/// exactly). On the wire it is 64 lower-case hexadecimal digits.
///
/// What a reviewer saw, what was approved and what is run have the same digest, or they are
/// different payloads.
///
/// ```
/// use aegis_hitl::Payload;
/// use aegis_hitl::protocol::Digest;
///
/// let one = Payload::from_json(r#"{"to": "a@b.c", "amount": 12.50}"#)?;
/// let other = Payload::from_json(r#"{"amount":12.5,"to":"a@b.c"}"#)?;
/// assert_eq!(Digest::of(&one)?, Digest::of(&other)?);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Computes the digest of `payload`. The payload `{}` has one, although a request with it has
    /// no payload.
    ///
    /// # Errors
    ///
    /// If an object in the payload repeats a member name, or the payload is nested more than 128
    /// levels deep.
    pub fn of(payload: &Payload) -> Result<Self, serde_json::Error> {
        Fingerprint::of_payload(payload).map(|fingerprint| Self(fingerprint.0))
    }

    /// Returns the 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

/// A text that is no [`Digest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidDigest(String);

impl fmt::Display for InvalidDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = self.0.chars().take(80).collect();
        write!(
            f,
            "'{}' is not a digest; allowed are 64 hexadecimal digits",
            Escaped::line(&text)
        )
    }
}

impl std::error::Error for InvalidDigest {}

impl FromStr for Digest {
    type Err = InvalidDigest;

    /// Takes the digits in either case.
    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let bytes = unhex(text).ok_or_else(|| InvalidDigest(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex(&self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_it_is_written() {
        let payload = Payload::from_json(r#"{"n":1}"#).unwrap();
        let digest = Digest::of(&payload).unwrap();
        let text = digest.to_string();
        assert_eq!(text.len(), 64);
        assert_eq!(text.parse(), Ok(digest));
        assert_eq!(text.to_uppercase().parse(), Ok(digest));
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), digest);
        for wrong in ["", "00", &"g".repeat(64), &"é".repeat(32), &"0".repeat(66)] {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
    }
}
