//! The OpenAPI document.

use std::collections::BTreeMap;

use http::StatusCode;
use utoipa::openapi::header::Header;
use utoipa::openapi::link::LinkBuilder;
use utoipa::openapi::path::{
    HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItemBuilder, PathsBuilder,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::schema::{AllOfBuilder, ObjectBuilder, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::server::Server;
use utoipa::openapi::{
    ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Required,
};

use super::endpoints::{Access, ENDPOINTS, Endpoint, Parameter, Success};
use super::schemas::{self, identifier, named, of, string};
use crate::protocol::Code;
use crate::server::api::{LIMIT, MAX_LIMIT};
use crate::server::http::Rejection;

const API_KEY: &str = "apiKey";

/// The statuses of the heads that are refused, which have the code of a malformed request.
const HEAD_STATUSES: [StatusCode; 2] = [
    StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
    StatusCode::NOT_IMPLEMENTED,
];

pub(super) fn text(prefix: &str, has_keys: bool) -> String {
    // Nothing in the document is a number that JSON cannot express.
    document(prefix, has_keys).to_json().unwrap_or_default()
}

pub(super) fn document(prefix: &str, has_keys: bool) -> OpenApi {
    let mut items: BTreeMap<String, PathItemBuilder> = BTreeMap::new();
    for endpoint in &ENDPOINTS {
        let before = if endpoint.is_under_prefix { prefix } else { "" };
        let path = format!("{before}{}", endpoint.path);
        let method = match endpoint.method {
            "POST" => HttpMethod::Post,
            _ => HttpMethod::Get,
        };
        let item = items.remove(&path).unwrap_or_default();
        items.insert(path, item.operation(method, operation(endpoint, has_keys)));
    }
    let paths = items
        .into_iter()
        .fold(PathsBuilder::new(), |paths, (path, item)| {
            paths.path(path, item.build())
        });
    let mut components = schemas::components();
    if has_keys {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some(
                "An API key. It names the tenant and carries the scopes.",
            ))
            .build();
        components = components.security_scheme(API_KEY, SecurityScheme::Http(scheme));
    }
    let info = InfoBuilder::new()
        .title("AEGIS")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Human decisions on what agents want to do, recorded once. Every path is served with \
             and without a slash at its end, and every GET but the one of events as HEAD too.",
        ))
        .license(Some(
            LicenseBuilder::new()
                .name("MIT")
                .identifier(Some("MIT"))
                .build(),
        ));
    OpenApiBuilder::new()
        .info(info.build())
        .servers(Some([Server::new("/")]))
        .paths(paths.build())
        .components(Some(components.build()))
        .build()
}

fn operation(endpoint: &Endpoint, has_keys: bool) -> OperationBuilder {
    let mut operation = OperationBuilder::new()
        .operation_id(Some(endpoint.id))
        .summary(Some(endpoint.summary));
    let text = description(endpoint, has_keys);
    if !text.is_empty() {
        operation = operation.description(Some(text));
    }
    for asked in endpoint.parameters {
        operation = operation.parameter(parameter(*asked, endpoint, has_keys));
    }
    if let Some((schema, is_required)) = endpoint.body {
        let required = if is_required {
            Required::True
        } else {
            Required::False
        };
        let content = ContentBuilder::new().schema(Some(named(schema))).build();
        operation = operation.request_body(Some(
            RequestBodyBuilder::new()
                .content("application/json", content)
                .required(Some(required))
                .build(),
        ));
    }
    if has_keys && endpoint.access != Access::Open {
        operation = operation.security(SecurityRequirement::new(API_KEY, [""; 0]));
        if endpoint.access == Access::Optional {
            operation = operation.security(SecurityRequirement::default());
        }
    }
    for success in endpoint.successes {
        operation = operation.response(success.status.to_string(), answer(success));
    }
    for (status, codes) in problems(endpoint) {
        operation = operation.response(status.as_str(), problem(status, &codes));
    }
    operation
}

pub(super) fn description(endpoint: &Endpoint, has_keys: bool) -> String {
    let scope = match endpoint.access {
        Access::Needs(scope) if has_keys => format!("Needs the scope `{scope}`."),
        _ => String::new(),
    };
    [endpoint.text, &scope]
        .into_iter()
        .filter(|text| !text.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The problems of an endpoint, by status.
pub(super) fn problems(endpoint: &Endpoint) -> BTreeMap<StatusCode, Vec<Code>> {
    let mut found: BTreeMap<StatusCode, Vec<Code>> = BTreeMap::new();
    for code in endpoint.problems() {
        let status = Rejection::new(code, "").status();
        found.entry(status).or_default().push(code);
    }
    for status in HEAD_STATUSES {
        found.insert(status, vec![Code::InvalidRequest]);
    }
    found
}

pub(super) fn is_required(parameter: Parameter, endpoint: &Endpoint, has_keys: bool) -> bool {
    match parameter {
        Parameter::TenantId => !has_keys && matches!(endpoint.access, Access::Needs(_)),
        Parameter::ThreadId | Parameter::IdempotencyKey | Parameter::Id(_) => true,
        _ => false,
    }
}

fn parameter(parameter: Parameter, endpoint: &Endpoint, has_keys: bool) -> ParameterBuilder {
    let schema = match parameter {
        Parameter::Prefer => string().pattern(Some("^wait=[0-9]{1,9}$")),
        Parameter::LastEventId => string().pattern(Some("^[0-9]{1,19}$")),
        Parameter::Status => schemas::statuses(),
        Parameter::Decision => schemas::decisions(),
        Parameter::Execution => schemas::executions(),
        Parameter::Cursor => string(),
        Parameter::Limit => of(Type::Integer)
            .minimum(Some(1_usize))
            .maximum(Some(MAX_LIMIT))
            .default(Some(LIMIT.into())),
        _ => identifier(),
    };
    let place = match parameter.place() {
        "path" => ParameterIn::Path,
        "query" => ParameterIn::Query,
        _ => ParameterIn::Header,
    };
    let required = if is_required(parameter, endpoint, has_keys) {
        Required::True
    } else {
        Required::False
    };
    ParameterBuilder::new()
        .name(parameter.name())
        .parameter_in(place)
        .required(required)
        .description(Some(parameter.text(has_keys)))
        .schema(Some(schema))
}

fn header(name: &str) -> Header {
    let (schema, text) = match name {
        "Retry-After" => (of(Type::Integer), "Seconds."),
        "Idempotency-Replayed" => (
            string().enum_values(Some(["true"])),
            "The answer is that of an earlier attempt of the same call.",
        ),
        "Location" => (string(), "The path of the action's status."),
        "Preference-Applied" => (string(), "The wait that was applied, in seconds."),
        "WWW-Authenticate" => (string(), "The scheme of the credentials."),
        "Allow" => (string(), "The methods that the path takes."),
        _ => (identifier(), "The one of the request."),
    };
    let mut header = Header::new(schema);
    header.description = Some(text.to_owned());
    header
}

fn answer(success: &Success) -> Response {
    let content = ContentBuilder::new().schema(Some(named(success.schema)));
    let mut response = ResponseBuilder::new()
        .description(success.text)
        .content(success.media_type, content.build())
        .header("X-Request-Id", header("X-Request-Id"));
    for name in success.headers {
        response = response.header(*name, header(name));
    }
    if success.headers.contains(&"Location") {
        response = links(response);
    }
    response.build()
}

/// Adds what can be done with the action of an answer.
fn links(mut response: ResponseBuilder) -> ResponseBuilder {
    for endpoint in &ENDPOINTS {
        let id = endpoint.parameters.iter().find_map(|asked| match asked {
            Parameter::Id(name) => Some(*name),
            _ => None,
        });
        if let Some(name) = id {
            let link = LinkBuilder::new()
                .operation_id(endpoint.id)
                .parameter(name, "$response.body#/request_id");
            response = response.link(endpoint.id, link.build());
        }
    }
    response
}

/// The header that a problem of this status may have.
fn problem_header(status: StatusCode) -> Option<&'static str> {
    match status {
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Some("Retry-After"),
        StatusCode::UNAUTHORIZED => Some("WWW-Authenticate"),
        StatusCode::METHOD_NOT_ALLOWED => Some("Allow"),
        // Where the action on record is shown.
        StatusCode::CONFLICT
        | StatusCode::UNPROCESSABLE_ENTITY
        | StatusCode::BAD_REQUEST
        | StatusCode::FORBIDDEN => Some("Location"),
        _ => None,
    }
}

fn problem(status: StatusCode, codes: &[Code]) -> Response {
    let words: Vec<&str> = codes.iter().map(|code| code.as_str()).collect();
    let text = words.join(", ");
    let mut members = ObjectBuilder::new().property("code", string().enum_values(Some(words)));
    if matches!(
        status,
        StatusCode::CONFLICT | StatusCode::UNPROCESSABLE_ENTITY
    ) {
        members = members.required("action");
    }
    let schema = AllOfBuilder::new().item(named("Problem")).item(members);
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let mut response = ResponseBuilder::new()
        .description(text)
        .content("application/problem+json", content)
        .header("X-Request-Id", header("X-Request-Id"));
    if let Some(name) = problem_header(status) {
        response = response.header(name, header(name));
    }
    response.build()
}
