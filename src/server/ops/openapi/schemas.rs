//! The schemas of bodies and answers.

use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, ComponentsBuilder, ObjectBuilder, Schema, SchemaFormat,
    SchemaType, Type,
};
use utoipa::openapi::{Ref, RefOr};

use crate::protocol::{
    Closed, Code, Decision, EventKind, Execution, MAX_COMMENT_LEN, MAX_LEN, MAX_TITLE_LEN, Status,
};
use crate::server::api::{LEASE, MAX_LEASE, MAX_REASON};

/// Every code of a problem that this server sends.
pub(super) const CODES: [Code; 20] = [
    Code::Duplicate,
    Code::DecisionConflict,
    Code::PayloadMismatch,
    Code::ActionClosed,
    Code::NotApproved,
    Code::AlreadyClaimed,
    Code::ClaimLost,
    Code::SelfApproval,
    Code::EditNotAllowed,
    Code::InvalidRequest,
    Code::Unauthorized,
    Code::Forbidden,
    Code::NotFound,
    Code::MethodNotAllowed,
    Code::RequestTimeout,
    Code::PayloadTooLarge,
    Code::UnsupportedMediaType,
    Code::MisdirectedRequest,
    Code::QuotaExceeded,
    Code::Unavailable,
];

const STATUSES: [Status; 3] = [Status::Pending, Status::Committed, Status::Failed];
const DECISIONS: [Decision; 2] = [Decision::Approve, Decision::Reject];
const EXECUTIONS: [Execution; 4] = [
    Execution::Claimed,
    Execution::Completed,
    Execution::Failed,
    Execution::Unknown,
];
const REASONS: [Closed; 2] = [Closed::Expired, Closed::Cancelled];
const EVENTS: [EventKind; 9] = [
    EventKind::Submitted,
    EventKind::Approved,
    EventKind::Rejected,
    EventKind::Expired,
    EventKind::Cancelled,
    EventKind::Claimed,
    EventKind::Completed,
    EventKind::Failed,
    EventKind::ClaimLost,
];

pub(super) fn of(kind: Type) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(kind)
}

pub(super) fn string() -> ObjectBuilder {
    of(Type::String)
}

fn nullable(kind: Type) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(SchemaType::from_iter([kind, Type::Null]))
}

/// A tenant, a thread, a key or the id of a call.
pub(super) fn identifier() -> ObjectBuilder {
    string()
        .min_length(Some(1))
        .max_length(Some(MAX_LEN))
        .pattern(Some("^[!-~]+$"))
}

pub(super) fn statuses() -> ObjectBuilder {
    string().enum_values(Some(STATUSES.map(Status::as_str)))
}

pub(super) fn decisions() -> ObjectBuilder {
    string().enum_values(Some(DECISIONS.map(Decision::as_str)))
}

pub(super) fn executions() -> ObjectBuilder {
    string().enum_values(Some(EXECUTIONS.map(Execution::as_str)))
}

/// One of these words, or null.
fn word_or_null(words: &[&str]) -> ObjectBuilder {
    let words = words.iter().map(|word| serde_json::Value::from(*word));
    nullable(Type::String).enum_values(Some(words.chain([serde_json::Value::Null])))
}

fn format(name: &str) -> Option<SchemaFormat> {
    Some(SchemaFormat::Custom(name.to_owned()))
}

fn time() -> ObjectBuilder {
    string().format(format("date-time"))
}

fn time_or_null() -> ObjectBuilder {
    nullable(Type::String).format(format("date-time"))
}

fn digest() -> ObjectBuilder {
    nullable(Type::String)
        .pattern(Some("^[0-9a-f]{64}$"))
        .description(Some("SHA-256 of the canonical JSON of what is to be run."))
}

fn short_text(max: usize) -> ObjectBuilder {
    nullable(Type::String).max_length(Some(max))
}

fn token() -> ObjectBuilder {
    identifier().description(Some("The token of the claim."))
}

fn lease() -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([Type::Integer, Type::Null]))
        .minimum(Some(1_usize))
        .maximum(usize::try_from(MAX_LEASE).ok())
        .default(Some(LEASE.into()))
        .description(Some("Seconds."))
}

fn object() -> ObjectBuilder {
    of(Type::Object)
}

/// An object without other members.
fn closed() -> ObjectBuilder {
    object().additional_properties(Some(AdditionalProperties::FreeForm(false)))
}

pub(super) fn named(name: &str) -> RefOr<Schema> {
    Ref::from_schema_name(name).into()
}

fn payload(text: &str) -> ObjectBuilder {
    object().description(Some(text))
}

fn with_required(mut schema: ObjectBuilder, names: &[&str]) -> ObjectBuilder {
    for name in names {
        schema = schema.required(*name);
    }
    schema
}

/// What anyone who has the id may see.
fn in_part() -> ObjectBuilder {
    let schema = object()
        .property("request_id", identifier())
        .property("status", statuses())
        .property("decision", word_or_null(&DECISIONS.map(Decision::as_str)))
        .property("closed", word_or_null(&REASONS.map(Closed::as_str)))
        .property(
            "execution",
            word_or_null(&EXECUTIONS.map(Execution::as_str)),
        )
        .property("created_at", time())
        .property("decided_at", time_or_null());
    with_required(
        schema,
        &[
            "request_id",
            "status",
            "decision",
            "closed",
            "execution",
            "decided_at",
        ],
    )
}

fn action() -> ObjectBuilder {
    let schema = in_part()
        .property("tenant_id", identifier())
        .property("thread_id", identifier())
        .property("idempotency_key", identifier())
        .property("digest", digest())
        .property("decided_by", nullable(Type::String))
        .property("replayed", of(Type::Boolean))
        .property("title", string())
        .property("payload", payload("What was submitted."))
        .property(
            "edited_payload",
            payload("What is to be run, as the reviewer edited it."),
        )
        .property("comment", string())
        .property(
            "result",
            ObjectBuilder::new().schema_type(SchemaType::AnyValue),
        )
        .property("reason", string())
        .property("expires_at", time())
        .property("allow_edit", of(Type::Boolean))
        .property("history", ArrayBuilder::new().items(named("Event")));
    with_required(schema, &["digest", "decided_by", "replayed"]).description(Some(
        "An action. Readers ignore members and words that they do not know.",
    ))
}

fn event() -> ObjectBuilder {
    let kinds = EVENTS.map(|kind| format!("action.{}", kind.as_str()));
    let schema = object()
        .property("id", identifier())
        .property("type", string().enum_values(Some(kinds)))
        .property("at", time())
        .property("actor", string())
        .property("action", named("Action"));
    with_required(schema, &["id", "type", "at", "actor"])
}

fn problem() -> ObjectBuilder {
    let schema = object()
        .property("type", string())
        .property("title", string())
        .property("status", of(Type::Integer))
        .property("detail", string())
        .property("code", named("Code"))
        .property("action", named("Action"));
    with_required(schema, &["type", "title", "status", "detail", "code"])
        .description(Some("A problem (RFC 9457)."))
}

/// A payload with the reserved member.
fn with_metadata(metadata: ObjectBuilder) -> ObjectBuilder {
    object().property("aegis", metadata).description(Some(
        "The payload: any JSON object, or no body. The reserved member `aegis` is metadata and \
             no part of it.",
    ))
}

fn seen() -> ObjectBuilder {
    closed()
        .property("digest", digest())
        .property("comment", short_text(MAX_COMMENT_LEN))
}

fn claim() -> ObjectBuilder {
    let schema = object()
        .property("token", token())
        .property(
            "fence",
            of(Type::Integer).description(Some("Grows with every claim of the action.")),
        )
        .property("expires_at", time());
    with_required(schema, &["token", "fence", "expires_at"])
}

pub(super) fn components() -> ComponentsBuilder {
    let decision = closed().property("comment", string().max_length(Some(MAX_COMMENT_LEN)));
    let submission = closed()
        .property(
            "title",
            string().min_length(Some(1)).max_length(Some(MAX_TITLE_LEN)),
        )
        .property("expires_at", time().description(Some("In the future.")))
        .property("allow_edit", of(Type::Boolean));
    let any = || ObjectBuilder::new().schema_type(SchemaType::AnyValue);
    let actions = object()
        .property("actions", ArrayBuilder::new().items(named("Action")))
        .property("next_cursor", nullable(Type::String));
    let claimed = object()
        .property("action", named("Action"))
        .property("claim", named("Claim"));
    let edited = nullable(Type::Object)
        .description(Some("The edited payload, if the submission allows it."));
    ComponentsBuilder::new()
        .schema("Action", action())
        .schema("ActionInPart", in_part())
        .schema(
            "Actions",
            with_required(actions, &["actions", "next_cursor"]),
        )
        .schema("ApprovalById", seen().property("payload", edited))
        .schema("Claim", claim())
        .schema(
            "ClaimRequest",
            closed()
                .property("digest", digest())
                .property("lease", lease()),
        )
        .schema("Claimed", with_required(claimed, &["action", "claim"]))
        .schema("Code", string().enum_values(Some(CODES.map(Code::as_str))))
        .schema(
            "Completion",
            closed()
                .property("token", token())
                .property("result", any())
                .required("token"),
        )
        .schema("Decision", with_metadata(decision))
        .schema("Document", object())
        .schema("Empty", closed())
        .schema("Event", event())
        .schema("EventStream", string())
        .schema(
            "Failure",
            closed()
                .property("token", token())
                .property("reason", short_text(MAX_REASON))
                .required("token"),
        )
        .schema(
            "Health",
            object()
                .property("status", string().enum_values(Some(["ok"])))
                .required("status"),
        )
        .schema("Page", string())
        .schema("Problem", problem())
        .schema("RejectionById", seen())
        .schema(
            "Renewal",
            closed()
                .property("token", token())
                .property("lease", lease())
                .required("token"),
        )
        .schema(
            "Renewed",
            object().property("claim", named("Claim")).required("claim"),
        )
        .schema("Submission", with_metadata(submission))
}
