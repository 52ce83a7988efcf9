//! The path before `/hitl/…`, parsed by one parser for both sides.

use std::fmt;
use std::str::FromStr;

use super::DEFAULT_PREFIX;

/// The path before `/hitl/…`: empty, or segments that each follow one slash. The default is
/// `/api/v1`.
///
/// Server and client share this parser, so a client can reach every prefix that a server accepts.
/// Paths are matched byte by byte, so segments consist of RFC 3986's `pchar` without escapes. `.`
/// and `..` are not allowed, because proxies and clients remove them.
///
/// ```
/// use aegis_hitl::protocol::Prefix;
///
/// assert_eq!(Prefix::default().as_str(), "/api/v1");
/// assert_eq!("/base/v2/".parse::<Prefix>()?.as_str(), "/base/v2");
/// assert!("api".parse::<Prefix>().is_err());
/// # Ok::<_, aegis_hitl::protocol::InvalidPrefix>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Prefix(String);

impl Prefix {
    /// Parses a prefix and removes trailing slashes.
    ///
    /// # Errors
    ///
    /// If `prefix` is not such a path.
    pub fn new(prefix: &str) -> Result<Self, InvalidPrefix> {
        let prefix = prefix.trim_end_matches('/');
        let is_allowed =
            |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte);
        let is_segment =
            |segment: &str| !matches!(segment, "" | "." | "..") && segment.bytes().all(is_allowed);
        let is_path = match prefix.strip_prefix('/') {
            Some(segments) => segments.split('/').all(is_segment),
            None => prefix.is_empty(),
        };
        if is_path {
            Ok(Self(prefix.to_owned()))
        } else {
            Err(InvalidPrefix(()))
        }
    }

    /// Returns the path, without a trailing slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self(DEFAULT_PREFIX.to_owned())
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Prefix {
    type Err = InvalidPrefix;

    fn from_str(prefix: &str) -> Result<Self, Self::Err> {
        Self::new(prefix)
    }
}

impl TryFrom<&str> for Prefix {
    type Error = InvalidPrefix;

    fn try_from(prefix: &str) -> Result<Self, Self::Error> {
        Self::new(prefix)
    }
}

impl TryFrom<String> for Prefix {
    type Error = InvalidPrefix;

    fn try_from(prefix: String) -> Result<Self, Self::Error> {
        Self::new(&prefix)
    }
}

/// The error for text that is not a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidPrefix(());

impl fmt::Display for InvalidPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the prefix is not a path; allowed are an empty one, or segments of unescaped URL characters, each with one \
             slash before it, and none of them '.' or '..'",
        )
    }
}

impl std::error::Error for InvalidPrefix {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_nothing_or_a_path_without_a_slash_at_its_end() {
        for (text, prefix) in [
            ("", ""),
            ("/", ""),
            ("//", ""),
            ("/api/v1", "/api/v1"),
            ("/api/v1/", "/api/v1"),
            ("/a-._~!$&'()*+,;=:@b", "/a-._~!$&'()*+,;=:@b"),
            ("/...", "/..."),
        ] {
            assert_eq!(Prefix::new(text).unwrap().as_str(), prefix);
        }
        for text in [
            "api",
            "/a//b",
            "/a?b",
            "/a#b",
            "/a b",
            "/%61",
            "/é",
            "/.",
            "/a/../b",
            "/\u{0}",
            "http://host/a",
        ] {
            assert!(Prefix::new(text).is_err(), "{text}");
        }
    }
}
