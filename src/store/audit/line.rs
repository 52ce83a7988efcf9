//! The lines of an export. Each is canonical JSON.

use super::{AuditHead, Hash};
use crate::protocol::{hex, write_json_string};

/// The line with which a tenant's part begins: the hash on which the next link follows.
pub(crate) fn from(tenant: &str, seq: u64, hash: &Hash) -> String {
    format!(
        r#"{{"from":"{}","seq":{seq},"tenant_id":{}}}"#,
        hex(hash),
        json(tenant)
    )
}

/// The line of a link.
pub(crate) fn event(entry: &str, hash: &Hash) -> String {
    format!(r#"{{"event":{entry},"hash":"{}"}}"#, hex(hash))
}

/// The line of a link whose event was removed.
pub(crate) fn removed(seq: u64, leaf: &Hash, hash: &Hash) -> String {
    let (leaf, hash) = (hex(leaf), hex(hash));
    format!(r#"{{"hash":"{hash}","leaf":"{leaf}","seq":{seq}}}"#)
}

/// The line of a link whose event is missing, though no sweep removed it.
pub(crate) fn missing(seq: u64, leaf: &Hash, hash: &Hash) -> String {
    let (leaf, hash) = (hex(leaf), hex(hash));
    format!(r#"{{"hash":"{hash}","leaf":"{leaf}","missing":true,"seq":{seq}}}"#)
}

/// The line with which a tenant's part ends.
pub(crate) fn head(head: &AuditHead) -> String {
    format!(
        r#"{{"head":"{}","seq":{},"tenant_id":{},"unchained":{}}}"#,
        hex(&head.hash),
        head.seq,
        json(&head.tenant_id),
        head.unchained
    )
}

fn json(text: &str) -> String {
    let mut out = String::new();
    write_json_string(text, &mut out);
    out
}
