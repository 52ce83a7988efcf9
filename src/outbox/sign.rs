//! The signatures of Standard Webhooks (<https://www.standardwebhooks.com>).

use std::error::Error as StdError;
use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// The beginning of a secret.
const PREFIX: &str = "whsec_";

/// The allowed lengths of a secret, in bytes.
const LENGTHS: std::ops::RangeInclusive<usize> = 24..=64;

/// The secret that an endpoint shares with its receiver: `whsec_` and the base64 of 24 to 64 bytes.
///
/// It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Signs a message of this id at this time, in seconds since 1970.
    pub(super) fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> Option<String> {
        // HMAC takes keys of any length.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        mac.update(format!("{id}.{timestamp}.").as_bytes());
        mac.update(body);
        let signature = STANDARD.encode(mac.finalize().into_bytes());
        Some(format!("v1,{signature}"))
    }
}

impl FromStr for Secret {
    type Err = InvalidSecret;

    fn from_str(text: &str) -> Result<Self, InvalidSecret> {
        let bytes = text
            .strip_prefix(PREFIX)
            .and_then(|base64| STANDARD.decode(base64).ok());
        match bytes.filter(|bytes| LENGTHS.contains(&bytes.len())) {
            Some(bytes) => Ok(Self(bytes)),
            None => Err(InvalidSecret),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The error of a text that is no [`Secret`]. It repeats nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct InvalidSecret;

impl fmt::Display for InvalidSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the secret is malformed; allowed is whsec_ with the base64 of 24 to 64 bytes behind it",
        )
    }
}

impl StdError for InvalidSecret {}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use http::{HeaderMap, HeaderValue};

    use super::*;

    fn secret(bytes: &[u8]) -> String {
        format!("whsec_{}", STANDARD.encode(bytes))
    }

    /// The example of the specification's own libraries.
    #[test]
    fn the_signature_is_that_of_the_published_example() {
        let secret: Secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse().unwrap();
        let body = br#"{"test": 2432232314}"#;
        let signature = secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body);
        assert_eq!(
            signature.unwrap(),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
    }

    #[test]
    fn the_reference_library_takes_signatures_of_keys_of_every_length() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        for length in LENGTHS {
            let text = secret(&vec![0xa5; length]);
            let body = "{\"title\":\"Gr\u{f6}\u{df}e\"}".as_bytes();
            let ours: Secret = text.parse().unwrap();
            let signature = ours.sign("e-1", now.as_secs(), body).unwrap();
            let mut headers = HeaderMap::new();
            headers.insert("webhook-id", HeaderValue::from_static("e-1"));
            headers.insert("webhook-timestamp", now.as_secs().into());
            headers.insert("webhook-signature", signature.parse().unwrap());
            let theirs = standardwebhooks::Webhook::new(&text).unwrap();
            theirs.verify(body, &headers).unwrap();
            assert!(theirs.verify(b"{}", &headers).is_err());
        }
    }

    #[test]
    fn a_secret_has_its_form_and_length_and_is_not_shown() {
        for wrong in [
            String::new(),
            "whsec_".to_owned(),
            STANDARD.encode([1; 32]),
            secret(&[1; 23]),
            secret(&[1; 65]),
            format!("{} ", secret(&[1; 32])),
            "whsec_!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!".to_owned(),
        ] {
            let error = wrong.parse::<Secret>().unwrap_err().to_string();
            assert!(wrong.len() < 8 || !error.contains(&wrong), "{error}");
        }
        let shown = format!("{:?}", secret(&[0x41; 32]).parse::<Secret>().unwrap());
        assert_eq!(shown, "Secret(..)");
    }
}
