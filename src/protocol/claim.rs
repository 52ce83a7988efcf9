//! Claims: the right to run an approved action, once.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use super::action::rfc3339;

/// The token of a claim. Whoever has it may renew the claim and report its outcome, so `Debug` does
/// not show it.
#[derive(Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct ClaimToken(String);

/// The most characters of a token.
const MAX_TOKEN_LEN: usize = 255;

/// A text that is no [`ClaimToken`]. It does not show the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidToken(());

impl fmt::Display for InvalidToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the token is not one of a claim; allowed are 1 to {MAX_TOKEN_LEN} visible ASCII characters"
        )
    }
}

impl std::error::Error for InvalidToken {}

impl ClaimToken {
    /// Returns the text of the token.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<Uuid> for ClaimToken {
    fn from(uuid: Uuid) -> Self {
        Self(uuid.to_string())
    }
}

impl FromStr for ClaimToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let is_allowed = (1..=MAX_TOKEN_LEN).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_graphic());
        is_allowed
            .then(|| Self(text.to_owned()))
            .ok_or(InvalidToken(()))
    }
}

impl<'de> Deserialize<'de> for ClaimToken {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Debug for ClaimToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClaimToken(..)")
    }
}

/// A live claim on an approved action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Claim {
    /// The secret that renews the claim and reports its outcome.
    pub token: ClaimToken,
    /// A number that grows with every claim of an action, for systems that can refuse an older one.
    #[serde(default)]
    pub fence: u64,
    /// When the lease ends.
    #[serde(default, with = "rfc3339")]
    pub expires_at: Option<SystemTime>,
}

impl Claim {
    /// Makes a claim without an end.
    pub fn new(token: ClaimToken, fence: u64) -> Self {
        Self {
            token,
            fence,
            expires_at: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_not_shown() {
        let token: ClaimToken = "secret".parse().unwrap();
        assert!(!format!("{token:?}").contains("secret"));
        for wrong in ["", "a b", "é", &"x".repeat(256)] {
            let error = wrong.parse::<ClaimToken>().unwrap_err();
            assert!(error.to_string().contains("1 to 255"), "{wrong}");
        }
    }
}
