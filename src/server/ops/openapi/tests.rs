use std::collections::BTreeSet;

use serde_json::Value;

use super::document;
use super::endpoints::ENDPOINTS;
use super::schemas::CODES;
use super::*;
use crate::protocol::{Action, Code, Event, EventKind, RequestId, Status};
use crate::server::api::Route;

fn read(prefix: &str, has_keys: bool) -> Value {
    serde_json::from_str(&document::text(prefix, has_keys)).unwrap()
}

/// The words that a `match` of a source file maps to, from the line of a function to the next.
fn words(source: &'static str, function: &str) -> BTreeSet<&'static str> {
    let body = source.split(function).nth(1).unwrap();
    let lines = body.lines().take_while(|line| *line != "    }");
    let words = lines.filter_map(|line| line.split("=> \"").nth(1)?.split('"').next());
    words.collect()
}

#[test]
fn every_route_is_described_where_it_is_served() {
    let mut routes = words(include_str!("../../api/route.rs"), "fn name(&self)");
    assert!(routes.len() > 12, "{routes:?}");
    for endpoint in ENDPOINTS.iter().filter(|endpoint| endpoint.is_under_prefix) {
        let path = format!("/p{}", endpoint.path.replace("{id}", "x"));
        let route = Route::of("/p", &endpoint.method.parse().unwrap(), &path).unwrap();
        assert_eq!(route.name(), endpoint.id);
        assert!(
            routes.remove(endpoint.id),
            "{} is described twice",
            endpoint.id
        );
    }
    assert!(routes.is_empty(), "not described: {routes:?}");
}

#[test]
fn every_code_is_described_and_sent_by_an_endpoint() {
    let mut codes = words(
        include_str!("../../../protocol/problem.rs"),
        "fn as_str(self)",
    );
    // What a client reads when it does not know the code.
    assert!(codes.remove(Code::Unknown.as_str()));
    assert_eq!(codes, CODES.map(Code::as_str).into());
    let sent = ENDPOINTS.iter().flat_map(|endpoint| endpoint.problems());
    assert_eq!(sent.map(Code::as_str).collect::<BTreeSet<_>>(), codes);
}

#[test]
fn every_member_of_an_action_and_of_an_event_is_described() {
    let id = RequestId::new("r-1").unwrap();
    let epoch = std::time::UNIX_EPOCH;
    let mut event = Event::new(id.clone(), EventKind::Submitted, epoch, "a");
    let mut action = Action::new(id, Status::Pending);
    action.history = Some(vec![event.clone()]);
    event.action = Some(Box::new(action.clone()));
    let source = include_str!("../../../protocol/action.rs");
    let members = source.split("pub struct Action {").nth(1).unwrap();
    let members = members.lines().take_while(|line| *line != "}");
    let members: BTreeSet<String> = members
        .filter_map(|line| line.trim().strip_prefix("pub ")?.split(':').next())
        .map(str::to_owned)
        .collect();
    let document = read("", false);
    let described = |name: &str| -> BTreeSet<String> {
        let schema = &document["components"]["schemas"][name]["properties"];
        schema.as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(described("Action"), members);
    let event = serde_json::to_value(&event).unwrap();
    assert_eq!(
        described("Event"),
        event.as_object().unwrap().keys().cloned().collect()
    );
}

#[test]
fn the_paths_follow_the_prefix() {
    for prefix in ["", "/api/v1", "/a/b"] {
        let paths = read(prefix, false)["paths"].clone();
        assert!(paths.get(format!("{prefix}/hitl/approve")).is_some());
        assert!(paths.get("/livez").is_some());
        assert!(page::html(prefix, false).contains(&format!("POST {prefix}/hitl/approve<")));
    }
}

#[test]
fn credentials_are_described_as_the_server_asks_for_them() {
    let approve = |document: &Value| document["paths"]["/hitl/approve"]["post"].clone();
    let tenant_is_required = |document: &Value| {
        let parameters = approve(document)["parameters"].clone();
        let mut parameters = parameters.as_array().unwrap().iter();
        parameters.find(|it| it["name"] == "Tenant-Id").unwrap()["required"].clone()
    };
    let keyless = read("", false);
    assert!(keyless["components"].get("securitySchemes").is_none());
    assert_eq!(tenant_is_required(&keyless), true);
    let keyed = read("", true);
    let scheme = &keyed["components"]["securitySchemes"]["apiKey"];
    assert_eq!(scheme["scheme"], "bearer");
    assert_eq!(tenant_is_required(&keyed), false);
    assert_eq!(
        approve(&keyed)["security"][0]["apiKey"],
        serde_json::json!([])
    );
    assert!(keyed["paths"]["/livez"]["get"].get("security").is_none());
}

#[test]
fn the_page_has_no_script_and_refers_to_no_file() {
    let page = page::html("/api/v1", true);
    assert!(!page.contains("<script") && !page.contains("src="));
    for endpoint in &ENDPOINTS {
        assert!(
            page.contains(&format!("id=\"{}\"", endpoint.id)),
            "{}",
            endpoint.id
        );
    }
}
