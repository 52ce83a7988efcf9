//! The table of endpoints.

use crate::protocol::Code;
use crate::server::api::{LIMIT, MAX_LIMIT, MAX_WAIT};
use crate::server::auth::Scope;

/// Who may call an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Anyone, and no header changes the answer.
    Open,
    /// Anyone; a caller with credentials sees more.
    Optional,
    /// A caller with this scope.
    Needs(Scope),
}

/// A header, or a value in the query or in the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parameter {
    TenantId,
    ThreadId,
    IdempotencyKey,
    RequestId,
    Prefer,
    LastEventId,
    /// `{id}` or `{request_id}` in the path.
    Id(&'static str),
    Status,
    Decision,
    Execution,
    Thread,
    Cursor,
    Limit,
}

impl Parameter {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::TenantId => "Tenant-Id",
            Self::ThreadId => "Thread-Id",
            Self::IdempotencyKey => "Idempotency-Key",
            Self::RequestId => "X-Request-Id",
            Self::Prefer => "Prefer",
            Self::LastEventId => "Last-Event-ID",
            Self::Id(name) => name,
            Self::Status => "status",
            Self::Decision => "decision",
            Self::Execution => "execution",
            Self::Thread => "thread_id",
            Self::Cursor => "cursor",
            Self::Limit => "limit",
        }
    }

    pub(super) fn place(self) -> &'static str {
        match self {
            Self::Id(_) => "path",
            Self::Status
            | Self::Decision
            | Self::Execution
            | Self::Thread
            | Self::Cursor
            | Self::Limit => "query",
            _ => "header",
        }
    }

    pub(super) fn text(self, has_keys: bool) -> String {
        match self {
            Self::TenantId if has_keys => {
                "The tenant. It is that of the API key; another one is refused.".into()
            }
            Self::TenantId => "The tenant. This server trusts the header.".into(),
            Self::ThreadId => "The thread, run or conversation that the action belongs to.".into(),
            Self::IdempotencyKey => "Names the action within its thread. Bare, or as a quoted \
                                     structured-field string."
                .into(),
            Self::RequestId => "Names the call, and is the same on its own retries. A UUIDv4 is \
                                best. It is repeated in the answer."
                .into(),
            Self::Prefer => format!(
                "`wait=25` answers as soon as the action is decided, or when the seconds are over \
                 (RFC 7240). At most {MAX_WAIT}."
            ),
            Self::LastEventId => "Where to resume: the `id` of an event that was received, or `0` \
                                  for the oldest. Without it the stream begins now."
                .into(),
            Self::Id("request_id") => {
                "The `request_id` of the action, or an `X-Request-Id` that names one action only."
                    .into()
            }
            Self::Id(_) => "The `request_id` of the action.".into(),
            Self::Status => "`PENDING` lists the oldest first; all else the newest first.".into(),
            Self::Decision => "Only actions with this decision.".into(),
            Self::Execution => "Only actions with this execution.".into(),
            Self::Thread => "Only actions of this thread.".into(),
            Self::Cursor => "The `next_cursor` of the page before.".into(),
            Self::Limit => {
                format!("The most actions of the page: 1 to {MAX_LIMIT}, {LIMIT} by default.")
            }
        }
    }
}

/// What an answer without a problem carries.
#[derive(Debug, Clone, Copy)]
pub(super) struct Success {
    pub(super) status: u16,
    pub(super) text: &'static str,
    pub(super) media_type: &'static str,
    /// The name of the schema.
    pub(super) schema: &'static str,
    pub(super) headers: &'static [&'static str],
}

impl Success {
    const fn json(status: u16, text: &'static str, schema: &'static str) -> Self {
        Self {
            status,
            text,
            media_type: "application/json",
            schema,
            headers: &[],
        }
    }

    const fn with(mut self, headers: &'static [&'static str]) -> Self {
        self.headers = headers;
        self
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Endpoint {
    /// The name of the endpoint in the access log.
    pub(super) id: &'static str,
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    pub(super) is_under_prefix: bool,
    pub(super) summary: &'static str,
    pub(super) text: &'static str,
    pub(super) access: Access,
    pub(super) parameters: &'static [Parameter],
    /// The name of the body's schema, and whether a body is required.
    pub(super) body: Option<(&'static str, bool)>,
    pub(super) successes: &'static [Success],
    /// The problems beyond those of every endpoint.
    pub(super) codes: &'static [Code],
}

impl Endpoint {
    /// The problems of the endpoint, those of every endpoint included.
    pub(super) fn problems(&self) -> Vec<Code> {
        let mut codes = vec![
            Code::InvalidRequest,
            Code::MethodNotAllowed,
            Code::MisdirectedRequest,
            Code::Forbidden,
            Code::Unavailable,
        ];
        match self.path {
            "/livez" => codes = vec![Code::InvalidRequest, Code::MethodNotAllowed],
            "/readyz" => {}
            _ => codes.push(Code::QuotaExceeded),
        }
        if self.access != Access::Open {
            codes.push(Code::Unauthorized);
        }
        if self.method == "POST" {
            codes.extend([
                Code::RequestTimeout,
                Code::PayloadTooLarge,
                Code::UnsupportedMediaType,
            ]);
        }
        codes.extend(self.codes);
        codes
    }
}

const LOCATION: &[&str] = &["Location"];
const REPLAYED: &[&str] = &["Idempotency-Replayed"];
const LOCATION_REPLAYED: &[&str] = &["Location", "Idempotency-Replayed"];

const BY_KEY: &[Parameter] = &[
    Parameter::TenantId,
    Parameter::ThreadId,
    Parameter::IdempotencyKey,
    Parameter::RequestId,
];
const BY_ID: &[Parameter] = &[
    Parameter::Id("id"),
    Parameter::TenantId,
    Parameter::RequestId,
];

const DECIDED: &[Success] = &[Success::json(
    202,
    "The decision is on record. A call's own retry is answered the same, with \
     `Idempotency-Replayed: true`.",
    "Action",
)
.with(LOCATION_REPLAYED)];

const DECISION: &[Code] = &[
    Code::Duplicate,
    Code::DecisionConflict,
    Code::PayloadMismatch,
    Code::ActionClosed,
    Code::SelfApproval,
    Code::NotFound,
];
const DECISION_BY_ID: &[Code] = &[
    Code::Duplicate,
    Code::DecisionConflict,
    Code::PayloadMismatch,
    Code::ActionClosed,
    Code::SelfApproval,
    Code::EditNotAllowed,
    Code::NotFound,
];

const ABOUT_DECISIONS: &str = "A 409 means that the decision is the one on record: another call \
                               had it recorded before. Nothing else answers 409 here.";

const fn post(id: &'static str, path: &'static str, scope: Scope) -> Endpoint {
    Endpoint {
        id,
        method: "POST",
        path,
        is_under_prefix: true,
        summary: "",
        text: "",
        access: Access::Needs(scope),
        parameters: BY_ID,
        body: None,
        successes: &[],
        codes: &[Code::NotFound],
    }
}

const fn get(id: &'static str, path: &'static str, access: Access) -> Endpoint {
    Endpoint {
        method: "GET",
        access,
        ..post(id, path, Scope::Read)
    }
}

pub(super) const ENDPOINTS: [Endpoint; 18] = [
    Endpoint {
        summary: "Approve an action",
        text: ABOUT_DECISIONS,
        parameters: BY_KEY,
        body: Some(("Decision", false)),
        successes: DECIDED,
        codes: DECISION,
        ..post("approve", "/hitl/approve", Scope::Decide)
    },
    Endpoint {
        summary: "Reject an action",
        text: ABOUT_DECISIONS,
        parameters: BY_KEY,
        body: Some(("Decision", false)),
        successes: DECIDED,
        codes: DECISION,
        ..post("reject", "/hitl/reject", Scope::Decide)
    },
    Endpoint {
        summary: "See how an action stands, or wait for its decision",
        text: "Without credentials the answer is in part: no tenant, no payload, no comment.",
        parameters: &[
            Parameter::Id("request_id"),
            Parameter::TenantId,
            Parameter::RequestId,
            Parameter::Prefer,
        ],
        successes: &[Success::json(200, "How the action stands.", "ActionInPart")
            .with(&["Preference-Applied"])],
        ..get("status", "/hitl/status/{request_id}", Access::Optional)
    },
    Endpoint {
        summary: "Submit an action for a decision",
        text: "The same key and payload find the same action, whatever became of it.",
        parameters: BY_KEY,
        body: Some(("Submission", false)),
        successes: &[
            Success::json(201, "The action is on record.", "Action").with(LOCATION),
            Success::json(200, "The action was on record already.", "Action").with(LOCATION),
        ],
        codes: &[Code::PayloadMismatch],
        ..post("submit", "/hitl/actions", Scope::Submit)
    },
    Endpoint {
        summary: "List actions",
        text: "A parameter that is unknown, repeated or not allowed is refused.",
        parameters: &[
            Parameter::TenantId,
            Parameter::RequestId,
            Parameter::Status,
            Parameter::Decision,
            Parameter::Execution,
            Parameter::Thread,
            Parameter::Cursor,
            Parameter::Limit,
        ],
        successes: &[Success::json(200, "A page of actions.", "Actions")],
        codes: &[Code::NotFound],
        ..get("list", "/hitl/actions", Access::Needs(Scope::Read))
    },
    Endpoint {
        summary: "Look at an action with its payload and history",
        parameters: BY_ID,
        successes: &[Success::json(200, "The whole action.", "Action")],
        ..get("look-up", "/hitl/actions/{id}", Access::Needs(Scope::Read))
    },
    Endpoint {
        summary: "Approve what was seen",
        text: ABOUT_DECISIONS,
        body: Some(("ApprovalById", false)),
        successes: DECIDED,
        codes: DECISION_BY_ID,
        ..post("approve-by-id", "/hitl/actions/{id}/approve", Scope::Decide)
    },
    Endpoint {
        summary: "Reject what was seen",
        text: ABOUT_DECISIONS,
        body: Some(("RejectionById", false)),
        successes: DECIDED,
        codes: DECISION_BY_ID,
        ..post("reject-by-id", "/hitl/actions/{id}/reject", Scope::Decide)
    },
    Endpoint {
        summary: "Cancel a pending action",
        text: "For the owner of the API key that submitted it, or with the scope `admin`.",
        body: Some(("Empty", false)),
        successes: DECIDED,
        codes: &[Code::Duplicate, Code::ActionClosed, Code::NotFound],
        ..post("cancel", "/hitl/actions/{id}/cancel", Scope::Submit)
    },
    Endpoint {
        summary: "Claim an approved action, to run it once",
        text: "The same `X-Request-Id` is the claim's own retry and gets the same token while the \
               lease lasts.",
        body: Some(("ClaimRequest", false)),
        successes: &[
            Success::json(200, "The claim, with what is to be run.", "Claimed").with(REPLAYED),
        ],
        codes: &[
            Code::AlreadyClaimed,
            Code::NotApproved,
            Code::PayloadMismatch,
            Code::ClaimLost,
            Code::NotFound,
        ],
        ..post("claim", "/hitl/actions/{id}/claim", Scope::Claim)
    },
    Endpoint {
        summary: "Renew the lease of a claim",
        body: Some(("Renewal", true)),
        successes: &[Success::json(
            200,
            "The claim, with its new end.",
            "Renewed",
        )],
        codes: &[Code::ClaimLost, Code::NotFound],
        ..post("renew", "/hitl/actions/{id}/renew", Scope::Claim)
    },
    Endpoint {
        summary: "Report that a claimed action was run",
        body: Some(("Completion", true)),
        successes: &[
            Success::json(200, "The outcome is on record.", "Action").with(LOCATION_REPLAYED)
        ],
        codes: &[Code::ClaimLost, Code::NotFound],
        ..post("complete", "/hitl/actions/{id}/complete", Scope::Claim)
    },
    Endpoint {
        summary: "Report that a claimed action failed",
        body: Some(("Failure", true)),
        successes: &[
            Success::json(200, "The outcome is on record.", "Action").with(LOCATION_REPLAYED)
        ],
        codes: &[Code::ClaimLost, Code::NotFound],
        ..post("fail", "/hitl/actions/{id}/fail", Scope::Claim)
    },
    Endpoint {
        summary: "Follow the transitions of the tenant's actions",
        text: "Server-sent events. `id` is the cursor to resume at, `event` the transition, and \
               `data` an `Event`. A comment line comes every 15 s.",
        parameters: &[
            Parameter::TenantId,
            Parameter::RequestId,
            Parameter::LastEventId,
        ],
        successes: &[Success {
            media_type: "text/event-stream",
            ..Success::json(200, "The stream.", "EventStream")
        }],
        codes: &[],
        ..get("events", "/hitl/events", Access::Needs(Scope::Read))
    },
    Endpoint {
        is_under_prefix: false,
        summary: "Whether the process answers",
        parameters: &[],
        successes: &[Success::json(200, "The process answers.", "Health")],
        codes: &[],
        ..get("livez", "/livez", Access::Open)
    },
    Endpoint {
        is_under_prefix: false,
        summary: "Whether the store takes a durable write",
        parameters: &[],
        successes: &[Success::json(200, "Requests are served.", "Health")],
        codes: &[],
        ..get("readyz", "/readyz", Access::Open)
    },
    Endpoint {
        is_under_prefix: false,
        summary: "This description, for programs",
        parameters: &[],
        successes: &[Success::json(200, "An OpenAPI 3.1 document.", "Document")],
        codes: &[],
        ..get("openapi", "/openapi.json", Access::Open)
    },
    Endpoint {
        is_under_prefix: false,
        summary: "This description, for people",
        parameters: &[],
        successes: &[Success {
            media_type: "text/html",
            ..Success::json(200, "A page.", "Page")
        }],
        codes: &[],
        ..get("docs", "/docs", Access::Open)
    },
];
