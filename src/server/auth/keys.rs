//! API keys: their tenants, holders and scopes. Only digests of the keys are stored.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::{RESERVED, is_reserved};
use crate::protocol::{ApiKey, TenantId, UnknownName, hex, unhex};
use crate::store::Actor;

/// What an API key allows. A key has one or more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// To submit actions, and to cancel one's own: `submit`.
    Submit,
    /// To approve and reject: `decide`.
    Decide,
    /// To claim approved actions and report their outcome: `claim`.
    Claim,
    /// To list actions, look at them, and follow events: `read`.
    Read,
    /// All of these, and to cancel what others submitted: `admin`.
    Admin,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 5] = [
        Self::Submit,
        Self::Decide,
        Self::Claim,
        Self::Read,
        Self::Admin,
    ];

    /// Returns the word in a key file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Submit => "submit",
            Self::Decide => "decide",
            Self::Claim => "claim",
            Self::Read => "read",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for Scope {
    type Err = UnknownName;

    fn from_str(word: &str) -> Result<Self, UnknownName> {
        let known = Self::ALL.into_iter().find(|scope| scope.as_str() == word);
        known.ok_or_else(|| {
            let allowed = "'submit', 'decide', 'claim', 'read' and 'admin'";
            UnknownName::new("scope", word, allowed)
        })
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A set of scopes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scopes(u8);

impl Scopes {
    pub(crate) const ALL: Self = Self(u8::MAX);

    pub(crate) fn contains(self, scope: Scope) -> bool {
        let bit = |scope: Scope| 1 << scope as u8;
        self.0 & (bit(scope) | bit(Scope::Admin)) != 0
    }

    /// The words of the scopes, for people.
    pub(crate) fn words(self) -> String {
        let set = Scope::ALL.into_iter();
        let set = set.filter(|scope| self.0 & (1 << *scope as u8) != 0);
        set.map(Scope::as_str).collect::<Vec<_>>().join(",")
    }

    fn parse(words: &str) -> Option<Self> {
        let mut scopes = Self(0);
        for word in words.split(',') {
            scopes.0 |= 1 << word.parse::<Scope>().ok()? as u8;
        }
        Some(scopes)
    }
}

/// The API keys that a server accepts, by their SHA-256 digests. Cheap to clone.
///
/// A key file has one line for each key. White space separates the fields, and comments have lines
/// of their own:
///
/// ```text
/// # SHA-256 of the key  tenant  name       scopes             expiry
/// 0f5a…64 digits…c1     acme    alice      decide,read
/// 77be…64 digits…09     acme    agent-7    submit,claim,read  2027-01-01T00:00:00Z
/// ```
///
/// The name is the owner of the key: the actor in the audit trail, and who may not decide on what
/// it submitted. `anonymous`, `local` and what begins with `system:` are the server's own names.
/// Two keys may share an owner, such as while one replaces the other. A key without an expiry lasts
/// until its line is removed.
#[derive(Clone, Default)]
pub struct Keys(Arc<HashMap<[u8; 32], Owner>>);

/// The holder of a key.
pub(super) struct Owner {
    pub(super) tenant_id: TenantId,
    pub(super) actor: Actor,
    pub(super) scopes: Scopes,
    pub(super) expires_at: Option<SystemTime>,
    line: usize,
}

impl Owner {
    pub(super) fn has_expired(&self) -> bool {
        self.expires_at.is_some_and(|end| end <= SystemTime::now())
    }
}

impl Keys {
    /// Parses a key file. A file without keys lets nobody in.
    ///
    /// # Errors
    ///
    /// If a line is malformed or repeats a digest. The error names the line and quotes nothing of
    /// it, since a line may hold a secret by mistake.
    pub fn parse(text: &str) -> Result<Self, KeysError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut keys = HashMap::new();
        for (line, content) in (1..).zip(text.lines()) {
            let content = content.trim();
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            let error = |reason: String| KeysError { line, reason };
            let (digest, owner) = parse_line(line, content).map_err(error)?;
            match keys.entry(digest) {
                Entry::Vacant(entry) => {
                    entry.insert(owner);
                }
                Entry::Occupied(entry) => {
                    let first = entry.get().line;
                    return Err(error(format!("the digest is on line {first} already")));
                }
            }
        }
        Ok(Self(Arc::new(keys)))
    }

    /// Returns the digest that a key file holds for `key`: 64 hexadecimal digits.
    ///
    /// ```
    /// use aegis_hitl::ApiKey;
    /// use aegis_hitl::server::Keys;
    ///
    /// let line = format!("{} acme alice decide", Keys::digest(&ApiKey::new("sk_live_1")?));
    /// assert_eq!(Keys::parse(&line)?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn digest(key: &ApiKey) -> String {
        hex(&digest(key))
    }

    /// Returns the number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there are no keys, so that nobody is let in.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the holder of the key with a digest.
    ///
    /// The lookup compares digests, not secrets. Its timing does not help an attacker: coming close
    /// to a stored digest takes a preimage of a similar one, and the hash of the map has a random
    /// key.
    pub(super) fn owner(&self, digest: &[u8; 32]) -> Option<&Owner> {
        self.0.get(digest)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("len", &self.len()).finish()
    }
}

pub(super) fn digest(key: &ApiKey) -> [u8; 32] {
    Sha256::digest(key.as_str().as_bytes()).into()
}

fn parse_line(line: usize, content: &str) -> Result<([u8; 32], Owner), String> {
    let mut fields = content.split_whitespace();
    let (Some(digest), Some(tenant), Some(name)) = (fields.next(), fields.next(), fields.next())
    else {
        return Err("allowed are a SHA-256 digest, a tenant, a name and a scope".to_owned());
    };
    let digest = unhex(digest)
        .ok_or("the first field is not 64 hexadecimal digits, the SHA-256 digest of a key")?;
    let tenant_id = TenantId::new(tenant).map_err(|error| error.to_string())?;
    if is_reserved(name) {
        return Err(format!("the name is reserved, as {RESERVED} are"));
    }
    // No default: a line that is cut off would get more than it was meant to.
    let allowed =
        "allowed are 'submit', 'decide', 'claim', 'read' and 'admin', with commas between";
    let scopes = fields
        .next()
        .ok_or_else(|| format!("there is no scope; {allowed}"))?;
    let scopes = Scopes::parse(scopes).ok_or_else(|| format!("a scope is unknown; {allowed}"))?;
    let expires_at = match fields.next() {
        Some(text) => Some(
            text.parse::<jiff::Timestamp>()
                .ok()
                .and_then(|time| time.try_into().ok())
                .ok_or("the fifth field is not an RFC 3339 time, the expiry of the key")?,
        ),
        None => None,
    };
    if fields.next().is_some() {
        return Err("there are more than five fields".to_owned());
    }
    let owner = Owner {
        tenant_id,
        actor: Actor::new(name),
        scopes,
        expires_at,
        line,
    };
    Ok((digest, owner))
}

/// The error of parsing a key file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeysError {
    line: usize,
    reason: String,
}

impl KeysError {
    /// Returns the number of the line, starting at 1.
    pub fn line(&self) -> usize {
        self.line
    }
}

impl fmt::Display for KeysError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} of the keys: {}", self.line, self.reason)
    }
}

impl std::error::Error for KeysError {}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn key(text: &str) -> ApiKey {
        ApiKey::new(text).unwrap()
    }

    #[test]
    fn a_digest_is_sha_256_in_hexadecimal() {
        assert_eq!(Keys::digest(&key("abc")), ABC);
        assert_eq!(unhex(ABC).map(|bytes| hex(&bytes)).as_deref(), Some(ABC));
    }

    #[test]
    fn a_line_says_whose_key_it_is_and_what_it_allows() {
        let text = format!(
            "\u{feff}# keys\r\n\r\n  {}\tacme  alice decide \r\n{} acme bot read,submit 2030-01-01T00:00:00Z",
            ABC.to_uppercase(),
            Keys::digest(&key("two"))
        );
        let keys = Keys::parse(&text).unwrap();
        assert_eq!(keys.len(), 2);
        let alice = keys.owner(&digest(&key("abc"))).unwrap();
        assert_eq!(alice.tenant_id.as_str(), "acme");
        assert_eq!(alice.actor.as_str(), "alice");
        assert_eq!(alice.scopes.words(), "decide");
        let bot = keys.owner(&digest(&key("two"))).unwrap();
        assert_eq!(bot.scopes.words(), "submit,read");
        assert!(bot.scopes.contains(Scope::Submit) && !bot.scopes.contains(Scope::Decide));
        assert!(bot.expires_at.is_some() && alice.expires_at.is_none());
        assert!(keys.owner(&digest(&key("three"))).is_none());
    }

    #[test]
    fn an_error_names_the_line_and_repeats_nothing_of_it() {
        let cases = [
            ("sk_live_1 acme alice".to_owned(), "the first field is not"),
            (format!("{ABC} acme"), "allowed are"),
            (format!("{ABC} acme alice"), "there is no scope"),
            (format!("{ABC} acme alice write"), "a scope is unknown"),
            (format!("{ABC} acme alice read,"), "a scope is unknown"),
            (format!("{ABC} acme alice read x"), "not an RFC 3339 time"),
            (
                format!("{ABC} acme alice read 2030-01-01T00:00:00Z x"),
                "more than five fields",
            ),
            (format!("{ABC} akmé alice"), "the tenant id has"),
            (format!("{ABC}é acme alice"), "the first field is not"),
            (
                format!("{} acme alice", "é".repeat(32)),
                "the first field is not",
            ),
            (format!("{ABC} acme local read"), "the name is reserved"),
            (format!("{ABC} acme anonymous read"), "the name is reserved"),
            (
                format!("{ABC} acme system:expiry read"),
                "the name is reserved",
            ),
            (
                format!("{ABC} a b read\n{ABC} c d read"),
                "on line 2 already",
            ),
        ];
        for (content, what) in cases {
            let error = Keys::parse(&format!("# first\n{content}")).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(what), "{text}");
            assert!(!text.contains("sk_live_1") && !text.contains(ABC), "{text}");
            assert!(error.line() >= 2);
        }
    }

    #[test]
    fn admin_includes_every_scope_and_decide_no_other() {
        let [admin, decide] = ["admin", "decide"].map(|words| Scopes::parse(words).unwrap());
        for scope in Scope::ALL {
            assert!(admin.contains(scope));
            assert_eq!(decide.contains(scope), scope == Scope::Decide, "{scope}");
        }
    }

    #[test]
    fn debug_shows_no_digest() {
        let keys = Keys::parse(&format!("{ABC} acme alice decide")).unwrap();
        assert_eq!(format!("{keys:?}"), "Keys { len: 1 }");
    }
}
