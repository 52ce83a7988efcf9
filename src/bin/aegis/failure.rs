//! The failure of a command, and its exit code.

use std::error::Error as StdError;
use std::process::ExitCode;

use aegis_hitl::protocol::{Code, ErrorChain};

/// A failure with its exit code: 1 other, 2 usage, 3 refused, 4 outcome unknown.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self {
            code: 1,
            message: message.into(),
        }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            code: 2,
            message: message.into(),
        }
    }

    pub(crate) fn with_code(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// Adds the cause.
    pub(crate) fn because(mut self, cause: impl StdError + 'static) -> Self {
        self.message.push_str(": ");
        self.message.push_str(&ErrorChain(&cause).to_string());
        self
    }

    /// The same failure, of what came after a call that did what it was for.
    pub(crate) fn on_record(mut self) -> Self {
        self.message.insert_str(0, "on record; ");
        self
    }

    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }
}

/// Whether what is on record rules the request out.
fn is_refused(error: &aegis_hitl::Error) -> bool {
    error.is_conflict()
        || error.is_closed()
        || error.is_payload_mismatch()
        || error.is_already_claimed()
        || error.is_not_approved()
        || error.is_claim_lost()
        || error.problem().is_some_and(|problem| {
            matches!(problem.code, Code::SelfApproval | Code::EditNotAllowed)
        })
}

impl Failure {
    /// The failure of a request that changes nothing, which leaves no outcome unknown.
    pub(crate) fn of_reading(error: aegis_hitl::Error) -> Self {
        if error.is_config() || error.is_request() {
            Self::from(error)
        } else {
            Self::other(ErrorChain(&error).to_string())
        }
    }
}

impl From<aegis_hitl::Error> for Failure {
    fn from(error: aegis_hitl::Error) -> Self {
        let code = if error.is_config() || error.is_request() {
            2
        } else if is_refused(&error) && !error.is_outcome_unknown() {
            3
        } else if error.is_outcome_unknown() {
            4
        } else {
            1
        };
        let mut message = ErrorChain(&error).to_string();
        if code == 4 {
            message.push_str(
                "; the outcome is unknown, ask again with the same key, --call-id or token",
            );
        }
        Self { code, message }
    }
}
