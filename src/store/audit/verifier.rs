//! Verification of an export, which needs nothing but its lines.

use std::collections::HashSet;
use std::fmt;

use serde_json::{Map, Value};

use super::{AuditHead, Hash, leaf, link, origin};
use crate::protocol::{Escaped, canonical_json, hex, unhex};

/// Verifies an export of audit trails line by line, in little memory.
///
/// ```
/// use aegis_hitl::store::AuditVerifier;
///
/// fn verify(export: &str) -> Result<(), aegis_hitl::store::AuditFault> {
///     let mut verifier = AuditVerifier::new();
///     for line in export.lines() {
///         verifier.line(line)?;
///     }
///     for chain in verifier.finish()? {
///         println!("{}: {} events", chain.head.tenant_id, chain.head.seq);
///     }
///     Ok(())
/// }
///
/// assert!(verify("{}").is_err());
/// ```
#[derive(Debug, Default)]
pub struct AuditVerifier {
    /// The number of lines so far.
    lines: u64,
    current: Option<Current>,
    verified: Vec<VerifiedChain>,
    /// The tenants that came.
    tenants: HashSet<String>,
    /// The hashes that must come up.
    noted: Vec<Hash>,
}

/// The chain that is being read.
#[derive(Debug)]
struct Current {
    tenant: String,
    after: u64,
    seq: u64,
    hash: Hash,
    removed: u64,
}

/// A tenant's part of an export, which is whole and unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedChain {
    /// The end of the part.
    pub head: AuditHead,
    /// The number of the link before the first one of the part. Unless it is 0, nothing is known of
    /// that link and those before it.
    pub after: u64,
    /// The number of events of which only the leaves are left.
    pub removed: u64,
}

/// A line of an export that is not as it was written, or what the export lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditFault(String);

impl fmt::Display for AuditFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for AuditFault {}

impl AuditVerifier {
    /// Makes a verifier that has read nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Requires that a chain has this hash: a head that was noted earlier, elsewhere.
    ///
    /// Without one, a chain that was written anew from its first link, or cut off at its end, looks
    /// right.
    #[must_use]
    pub fn noted(mut self, head: [u8; 32]) -> Self {
        self.noted.push(head);
        self
    }

    /// Reads the next line, without its line feed.
    ///
    /// # Errors
    ///
    /// If the line is not as it was exported, or does not follow on the one before it. The error
    /// says where. What comes after it has no meaning any more.
    pub fn line(&mut self, line: impl AsRef<[u8]>) -> Result<(), AuditFault> {
        self.lines += 1;
        let read = match str::from_utf8(line.as_ref()) {
            Ok(line) => self.read(line),
            Err(_) => Err("it is not UTF-8".to_owned()),
        };
        read.map_err(|fault| {
            let place = match &self.current {
                Some(current) => format!(
                    "line {}, seq {} of tenant {}",
                    self.lines,
                    current.seq + 1,
                    Escaped::line(&current.tenant)
                ),
                None => format!("line {}", self.lines),
            };
            AuditFault(format!("{place}: {fault}"))
        })
    }

    /// Ends the export.
    ///
    /// # Errors
    ///
    /// If it is empty, cut off, or has not all of the hashes that were noted.
    pub fn finish(self) -> Result<Vec<VerifiedChain>, AuditFault> {
        if let Some(current) = self.current {
            return Err(AuditFault(format!(
                "the export is cut off behind seq {} of tenant {}: the line of its head is missing",
                current.seq,
                Escaped::line(&current.tenant)
            )));
        }
        if self.lines == 0 {
            return Err(AuditFault("the export is empty".to_owned()));
        }
        if let Some(missing) = self.noted.first() {
            return Err(AuditFault(format!(
                "no chain has the head {} that was noted: it was cut off or written anew",
                hex(missing)
            )));
        }
        Ok(self.verified)
    }

    fn read(&mut self, line: &str) -> Result<(), String> {
        let canonical = canonical_json(line);
        let canonical = canonical.map_err(|error| format!("it is not a line of JSON: {error}"))?;
        // Two readers could take another spelling for two different things.
        if canonical != line {
            return Err("it is not spelled as it was exported".to_owned());
        }
        let Ok(Value::Object(item)) = serde_json::from_str(line) else {
            return Err("it is not an object of JSON".to_owned());
        };
        let mut members: Vec<&str> = item.keys().map(String::as_str).collect();
        members.sort_unstable();
        // A member that no hash covers could say anything.
        let is_head = match *members {
            ["from", "seq", "tenant_id"] => return self.begin(&item),
            ["head", "seq", "tenant_id", "unchained"] => true,
            ["event", "hash"] | ["hash", "leaf", "seq"] => false,
            // Whatever its hash.
            ["hash", "leaf", "missing", "seq"] => {
                return Err("its event is missing, and retention did not remove it".to_owned());
            }
            _ => return Err("it has not the members of a line of an export".to_owned()),
        };
        let Some(current) = &mut self.current else {
            return Err("it belongs to no chain: the line with which one begins is missing".into());
        };
        if is_head {
            let verified = current.end(&item)?;
            self.verified.push(verified);
            self.current = None;
            return Ok(());
        }
        current.link(line, &item)?;
        let hash = current.hash;
        self.noted.retain(|noted| *noted != hash);
        Ok(())
    }

    fn begin(&mut self, item: &Map<String, Value>) -> Result<(), String> {
        if self.current.is_some() {
            return Err("another chain begins before the line of this one's head".to_owned());
        }
        let tenant = text(item, "tenant_id")?.to_owned();
        let (seq, hash) = (number(item, "seq")?, hash(item, "from")?);
        if seq == 0 && hash != origin(&tenant) {
            return Err("the chain does not begin as its tenant's must".to_owned());
        }
        if !self.tenants.insert(tenant.clone()) {
            return Err("a chain of the same tenant came before".to_owned());
        }
        self.noted.retain(|noted| *noted != hash);
        self.current = Some(Current {
            tenant,
            after: seq,
            seq,
            hash,
            removed: 0,
        });
        Ok(())
    }
}

impl Current {
    fn link(&mut self, line: &str, item: &Map<String, Value>) -> Result<(), String> {
        let told = hash(item, "hash")?;
        let (seq, leaf) = match item.get("event") {
            Some(Value::Object(event)) => {
                if text(event, "tenant_id")? != self.tenant {
                    return Err("it is an event of another tenant".to_owned());
                }
                (number(event, "seq")?, leaf(entry(line)?))
            }
            Some(_) => return Err("its event is not an object".to_owned()),
            None => (number(item, "seq")?, hash(item, "leaf")?),
        };
        let expected = self.seq + 1;
        if seq > expected {
            return Err(match seq - expected {
                1 => format!("the line of seq {expected} is missing"),
                _ => format!("the lines of seq {expected} to {} are missing", seq - 1),
            });
        }
        if seq < expected {
            return Err(format!("seq {seq} comes a second time, or out of order"));
        }
        let hash = link(&self.hash, &leaf);
        if hash != told {
            return Err("its hash is not that of its event behind the hash before it".to_owned());
        }
        self.hash = hash;
        self.seq = seq;
        self.removed += u64::from(!item.contains_key("event"));
        Ok(())
    }

    fn end(&self, item: &Map<String, Value>) -> Result<VerifiedChain, String> {
        if text(item, "tenant_id")? != self.tenant {
            return Err("it is the head of another tenant".to_owned());
        }
        let seq = number(item, "seq")?;
        if seq != self.seq {
            return Err(format!("the head is that of seq {seq}: lines are missing"));
        }
        if hash(item, "head")? != self.hash {
            return Err("the head is not the hash of the last line".to_owned());
        }
        let unchained = number(item, "unchained")?;
        Ok(VerifiedChain {
            head: AuditHead::new(self.tenant.clone(), seq, self.hash, unchained),
            after: self.after,
            removed: self.removed,
        })
    }
}

/// The text of the entry in a line that is canonical.
fn entry(line: &str) -> Result<&str, String> {
    const END: usize = r#","hash":""}"#.len() + 64;
    let entry = line.strip_prefix(r#"{"event":"#);
    entry
        .and_then(|entry| entry.get(..entry.len().checked_sub(END)?))
        .ok_or_else(|| "it has not the members of a line of an export".to_owned())
}

fn text<'a>(item: &'a Map<String, Value>, name: &str) -> Result<&'a str, String> {
    let value = item.get(name).and_then(Value::as_str);
    value.ok_or_else(|| format!("it has no text '{name}'"))
}

fn number(item: &Map<String, Value>, name: &str) -> Result<u64, String> {
    // No chain has as many links; the number after the largest must not overflow.
    let value = item.get(name).and_then(Value::as_u64);
    value
        .filter(|number| *number < u64::MAX)
        .ok_or_else(|| format!("it has no number '{name}'"))
}

fn hash(item: &Map<String, Value>, name: &str) -> Result<Hash, String> {
    let text = text(item, name)?;
    // A hash has one spelling.
    let hash = unhex(text).filter(|hash| hex(hash) == text);
    hash.ok_or_else(|| format!("its '{name}' is not a hash of 64 lower-case hexadecimal digits"))
}

#[cfg(test)]
mod tests;
