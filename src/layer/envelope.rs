//! What the stack writes into each attempt of a call and reads off the last answer.
//!
//! [`AegisLayer`](super::AegisLayer) consists of the header layers, the confirmation and the retry.
//! The retry does the work of the outer ones through an [`Envelope`]: it opens one for each call,
//! has it write the names into each further attempt, and closes it with the answer. Nothing is
//! looked up or kept twice.

use http::{Extensions, HeaderName, HeaderValue, Request, Response, StatusCode};

use super::confirm::SentHead;
use super::set::MintedKey;
use super::{
    ConfirmDuplicateLayer, Delivery, SetIdempotencyKeyLayer, SetRequestIdLayer, SetTenantLayer,
    SetThreadLayer, carries_key, is_blank,
};

/// The layers around a retry.
#[derive(Debug, Clone)]
pub(super) struct Envelope {
    names: Names,
    confirm: ConfirmDuplicateLayer,
    /// Whether the names are distinct and all layers agree on the header for the key.
    is_usual: bool,
}

/// The layers that name a call.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) tenant: SetTenantLayer,
    pub(super) thread: SetThreadLayer,
    pub(super) key: SetIdempotencyKeyLayer,
    pub(super) request_id: SetRequestIdLayer,
}

/// What an envelope keeps for one call.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// The names that the request already had.
    own: Own,
    minted: Minted,
    /// Whether the request carries the key that a confirmation needs.
    is_keyed: bool,
    /// The head of the request as it was sent, if the confirmation needs it.
    head: Option<Box<SentHead>>,
}

/// What was minted for a call, so that all of its attempts carry the same values.
///
/// Stored as numbers, which are loaded in the halves in which they were stored. Bytes would be
/// loaded whole, and the load would wait for both stores.
#[derive(Debug, Default)]
struct Minted {
    key: Option<u128>,
    request_id: Option<u128>,
}

/// Which names a request already has when it arrives.
#[derive(Debug, Clone, Copy, Default)]
struct Own {
    tenant: bool,
    thread: bool,
    key: bool,
    request_id: bool,
    /// Whether its key is not blank.
    is_keyed: bool,
}

impl Envelope {
    /// Makes the envelope of a retry that expects keys in `key_header`.
    pub(super) fn new(
        names: Names,
        confirm: ConfirmDuplicateLayer,
        key_header: &HeaderName,
    ) -> Self {
        let is_usual = names.are_distinct()
            && names.key.header_name() == key_header
            && confirm.key_header() == key_header;
        Self {
            names,
            confirm,
            is_usual,
        }
    }

    /// Returns the header that carries the request id.
    pub(super) fn request_id_header(&self) -> &HeaderName {
        self.names.request_id.header_name()
    }

    /// Passes each header of a call's request to `keep` as it arrived, then names the request.
    /// Returns whether it carries a key in `key_header`.
    #[inline]
    pub(super) fn open<B>(
        &self,
        contents: &mut Contents,
        request: &mut Request<B>,
        key_header: &HeaderName,
        mut keep: impl FnMut(&HeaderName, &HeaderValue),
    ) -> bool {
        let is_keyed = if self.is_usual {
            // Looks at each header once.
            for (name, value) in request.headers() {
                contents.own.note(&self.names, name, value);
                keep(name, value);
            }
            let is_written = self.names.fill(request, contents.own, &mut contents.minted);
            // A key written here is never blank.
            contents.is_keyed = is_written || contents.own.is_keyed;
            contents.is_keyed
        } else {
            self.open_unusual(contents, request, key_header, keep)
        };
        if self.confirm.looks_at_the_request() {
            contents.head = Some(Box::new(SentHead::of(request)));
        }
        is_keyed
    }

    fn open_unusual<B>(
        &self,
        contents: &mut Contents,
        request: &mut Request<B>,
        key_header: &HeaderName,
        mut keep: impl FnMut(&HeaderName, &HeaderValue),
    ) -> bool {
        for (name, value) in request.headers() {
            keep(name, value);
        }
        self.names.set(request, &mut contents.minted);
        contents.is_keyed = carries_key(request.headers(), self.confirm.key_header());
        carries_key(request.headers(), key_header)
    }

    /// Names a request that is the same as the call's first one when it arrived.
    pub(super) fn reopen<B>(&self, contents: &mut Contents, request: &mut Request<B>) {
        if self.is_usual {
            self.names.fill(request, contents.own, &mut contents.minted);
        } else {
            self.names.set(request, &mut contents.minted);
        }
    }

    /// Confirms the answer, if it can be confirmed. `sent` are the extensions of the request, and
    /// `earlier` is what is known about the attempts before the one that was answered.
    #[inline]
    pub(super) fn close<R>(
        &self,
        contents: &Contents,
        response: &mut Response<R>,
        sent: &Extensions,
        earlier: Delivery,
    ) {
        if !contents.is_keyed || response.status() != StatusCode::CONFLICT {
            return;
        }
        // If no earlier attempt can have reached the service, nobody can have used a key that was
        // minted for this call, here or in a layer above.
        let is_minted_here = contents.minted.key.is_some()
            && self.names.key.header_name() == self.confirm.key_header();
        let is_minted = is_minted_here || sent.get::<MintedKey>().is_some();
        if !(is_minted && earlier == Delivery::NeverSent) {
            self.confirm.confirm(response, contents.head.as_deref());
        }
    }
}

impl Own {
    /// Records one header. Of several keys, the first counts.
    #[inline]
    fn note(&mut self, names: &Names, name: &HeaderName, value: &HeaderValue) {
        if name == names.key.header_name() && !self.key {
            self.key = true;
            self.is_keyed = !is_blank(value);
        }
        self.tenant |= name == names.tenant.header_name();
        self.thread |= name == names.thread.header_name();
        self.request_id |= name == names.request_id.header_name();
    }
}

impl Names {
    /// Writes the names that the request lacks, as the layers do one after the other.
    fn set<B>(&self, request: &mut Request<B>, minted: &mut Minted) {
        // Only ids are ever minted.
        self.tenant.set(request, &mut None);
        self.thread.set(request, &mut None);
        self.key.set(request, &mut minted.key);
        self.request_id.set(request, &mut minted.request_id);
    }

    /// Like [`set`](Self::set), for names that are all different and a request whose headers were
    /// already looked at. Returns whether the key was written.
    #[inline]
    fn fill<B>(&self, request: &mut Request<B>, own: Own, minted: &mut Minted) -> bool {
        if !own.tenant {
            self.tenant.fill(request, &mut None);
        }
        if !own.thread {
            self.thread.fill(request, &mut None);
        }
        let keyed = !own.key && self.key.fill(request, &mut minted.key);
        if !own.request_id {
            self.request_id.fill(request, &mut minted.request_id);
        }
        keyed
    }

    /// Whether no two names share a header. If two do, the second layer finds what the first one
    /// wrote.
    fn are_distinct(&self) -> bool {
        let all: [&HeaderName; 4] = [
            self.tenant.header_name(),
            self.thread.header_name(),
            self.key.header_name(),
            self.request_id.header_name(),
        ];
        (1..all.len()).all(|at| !all[..at].contains(&all[at]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{IDEMPOTENCY_KEY, TENANT_ID, X_REQUEST_ID};

    fn names() -> Names {
        Names {
            tenant: SetTenantLayer::from_extension(),
            thread: SetThreadLayer::from_extension(),
            key: SetIdempotencyKeyLayer::mint(),
            request_id: SetRequestIdLayer::mint(),
        }
    }

    #[test]
    fn names_are_distinct_if_no_two_share_a_header() {
        assert!(names().are_distinct());
        let mut two = names();
        two.thread = two.thread.header(TENANT_ID);
        assert!(!two.are_distinct());
        let mut last = names();
        last.key = last.key.header(X_REQUEST_ID);
        assert!(!last.are_distinct());
        let mut all = names();
        all.tenant = all.tenant.header(IDEMPOTENCY_KEY);
        all.thread = all.thread.header(IDEMPOTENCY_KEY);
        all.request_id = all.request_id.header(IDEMPOTENCY_KEY);
        assert!(!all.are_distinct());
    }
}
