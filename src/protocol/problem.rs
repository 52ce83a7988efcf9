//! The body of an error answer: an RFC 9457 problem, `application/problem+json`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::Action;

/// The kind of error, as a word that programs can match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Code {
    /// 409: the decision asked for is the one on record.
    Duplicate,
    /// 422: the opposite decision is on record.
    DecisionConflict,
    /// 422: the key was used with another payload.
    PayloadMismatch,
    /// 422: the action expired or was cancelled, or it is decided and cannot be cancelled.
    ActionClosed,
    /// 422: the action is not approved, so it cannot be claimed.
    NotApproved,
    /// 409: the approval is spent: another call has claimed the action.
    AlreadyClaimed,
    /// 422: the token is not that of a live claim on this action.
    ClaimLost,
    /// 403: the credential's owner submitted the action, and so may not decide on it.
    SelfApproval,
    /// 403: the submission does not allow the reviewer to edit the payload.
    EditNotAllowed,
    /// 400: a header or the body is missing, repeated or malformed.
    InvalidRequest,
    /// 401: the credential is missing or unknown.
    Unauthorized,
    /// 403: the credential, or the web page that sent the request, may not do this.
    Forbidden,
    /// 404: the path or the action does not exist.
    NotFound,
    /// 405: the path does not support this method.
    MethodNotAllowed,
    /// 408: the request did not arrive in time.
    RequestTimeout,
    /// 413: the body is too large.
    PayloadTooLarge,
    /// 415: the body is not declared as JSON.
    UnsupportedMediaType,
    /// 421: the server does not serve the host that the request names.
    MisdirectedRequest,
    /// 429: a quota or a rate limit is used up.
    QuotaExceeded,
    /// 503: nothing was acknowledged. Retry with the same key.
    Unavailable,
    /// A code that this version does not know.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// Returns the word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Duplicate => "duplicate",
            Self::DecisionConflict => "decision-conflict",
            Self::PayloadMismatch => "payload-mismatch",
            Self::ActionClosed => "action-closed",
            Self::NotApproved => "not-approved",
            Self::AlreadyClaimed => "already-claimed",
            Self::ClaimLost => "claim-lost",
            Self::SelfApproval => "self-approval",
            Self::EditNotAllowed => "edit-not-allowed",
            Self::InvalidRequest => "invalid-request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not-found",
            Self::MethodNotAllowed => "method-not-allowed",
            Self::RequestTimeout => "request-timeout",
            Self::PayloadTooLarge => "payload-too-large",
            Self::UnsupportedMediaType => "unsupported-media-type",
            Self::MisdirectedRequest => "misdirected-request",
            Self::QuotaExceeded => "quota-exceeded",
            Self::Unavailable => "unavailable",
            Self::Unknown => "unknown",
        }
    }
}

/// An RFC 9457 problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Problem {
    /// A URI that names the kind of problem: `urn:aegis:problem:` followed by the code.
    #[serde(rename = "type", default = "about_blank")]
    pub kind: Cow<'static, str>,
    /// The kind of problem in a few words, the same for every occurrence.
    #[serde(default)]
    pub title: Cow<'static, str>,
    /// The HTTP status of the answer.
    #[serde(default)]
    pub status: u16,
    /// What is wrong with this request and what is allowed.
    #[serde(default)]
    pub detail: Cow<'static, str>,
    /// The kind of problem as a word.
    #[serde(default = "unknown")]
    pub code: Code,
    /// The action on record, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<Box<Action>>,
}

impl Problem {
    /// Makes a problem of kind `code`.
    pub fn new(
        code: Code,
        status: u16,
        title: &'static str,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            kind: format!("urn:aegis:problem:{}", code.as_str()).into(),
            title: Cow::Borrowed(title),
            status,
            detail: detail.into(),
            code,
            action: None,
        }
    }

    /// Adds the action on record.
    #[must_use]
    pub fn with_action(mut self, action: Action) -> Self {
        self.action = Some(Box::new(action));
        self
    }
}

fn about_blank() -> Cow<'static, str> {
    Cow::Borrowed("about:blank")
}

fn unknown() -> Code {
    Code::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_written_as_its_word() {
        for code in [
            Code::Duplicate,
            Code::DecisionConflict,
            Code::QuotaExceeded,
            Code::Unavailable,
            Code::NotApproved,
            Code::AlreadyClaimed,
            Code::ClaimLost,
            Code::SelfApproval,
            Code::EditNotAllowed,
        ] {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
        assert_eq!(
            serde_json::from_str::<Code>("\"new-code\"").unwrap(),
            Code::Unknown
        );
    }

    #[test]
    fn a_foreign_problem_is_read_as_far_as_it_goes() {
        let problem: Problem = serde_json::from_str(r#"{"detail":"no"}"#).unwrap();
        assert_eq!(
            (problem.code, &*problem.kind),
            (Code::Unknown, "about:blank")
        );
    }
}
