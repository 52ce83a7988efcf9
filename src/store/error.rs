//! The error of every store.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// The reason why a store could not be opened or could not answer.
///
/// It is cheap to clone, because one failed commit answers every request of its batch.
#[derive(Debug, Clone)]
pub struct StoreError {
    kind: Kind,
    detail: Arc<str>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Unavailable,
    InUse,
    Incompatible,
    Unsupported,
}

impl StoreError {
    /// Makes the error of a store that cannot take or answer requests now.
    ///
    /// The request may or may not be on record. It can be sent again.
    pub fn unavailable(detail: impl Into<Arc<str>>) -> Self {
        Self {
            kind: Kind::Unavailable,
            detail: detail.into(),
            source: None,
        }
    }

    /// Makes the error of a store that another process holds.
    pub fn in_use(detail: impl Into<Arc<str>>) -> Self {
        Self {
            kind: Kind::InUse,
            detail: detail.into(),
            source: None,
        }
    }

    /// Makes the error of a path or database that is not a store of this version.
    pub fn incompatible(detail: impl Into<Arc<str>>) -> Self {
        Self {
            kind: Kind::Incompatible,
            detail: detail.into(),
            source: None,
        }
    }

    /// Makes the error of an operation that this kind of store does not have.
    pub fn unsupported(detail: impl Into<Arc<str>>) -> Self {
        Self {
            kind: Kind::Unsupported,
            detail: detail.into(),
            source: None,
        }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// Whether the store cannot answer now. The request may or may not be on record, and can be
    /// sent again.
    pub fn is_unavailable(&self) -> bool {
        self.kind == Kind::Unavailable
    }

    /// Whether another process holds the store.
    pub fn is_in_use(&self) -> bool {
        self.kind == Kind::InUse
    }

    /// Whether the path or database is not a store, or is a store of another version.
    pub fn is_incompatible(&self) -> bool {
        self.kind == Kind::Incompatible
    }

    /// Whether this kind of store does not have the operation.
    pub fn is_unsupported(&self) -> bool {
        self.kind == Kind::Unsupported
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl StdError for StoreError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.source {
            Some(source) => Some(&**source),
            None => None,
        }
    }
}
