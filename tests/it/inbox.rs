//! The inbox over HTTP: what a browser sends, and what somebody sends who is none.

use std::net::SocketAddr;

use aegis_hitl::ApiKey;
use aegis_hitl::server::{Auth, HitlService, HitlServiceBuilder, Inbox, Keys, Server};
use aegis_hitl::store::Store;
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};

use super::support::{Call, Disk, Faulty, Mood, Reply};

/// A server with an inbox.
pub struct Desk<St> {
    pub addr: SocketAddr,
    pub service: HitlService<St>,
    _stop: oneshot::Sender<()>,
}

pub async fn desk_with<St: Store>(
    store: St,
    settings: impl FnOnce(HitlServiceBuilder<St>) -> HitlServiceBuilder<St>,
) -> Desk<St> {
    let service = HitlService::builder(store).inbox(Inbox::new());
    let service = settings(service).build().unwrap();
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let addr = server.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(server.serve(service.clone(), async move { _ = stopped.await }));
    Desk {
        addr,
        service,
        _stop: stop,
    }
}

/// A server without keys.
pub async fn keyless() -> Desk<Disk> {
    desk_with(Disk::default(), |service| service).await
}

/// A key file: `reviewer` decides and reads, `reader` reads, `agent` submits, all for `acme`;
/// `other` decides for another tenant, `own` submits and decides.
pub fn key_file() -> String {
    let line = |key: &str, rest: &str| {
        let digest = Keys::digest(&ApiKey::new(key).unwrap());
        format!("{digest} {rest}\n")
    };
    [
        line("reviewer-key", "acme alice decide,read"),
        line("reader-key", "acme rob read"),
        line("agent-key", "acme agent submit,claim"),
        line("other-key", "other oscar decide,read"),
        line("own-key", "acme otto submit,decide,read"),
    ]
    .concat()
}

pub async fn keyed() -> (Desk<Disk>, watch::Sender<Keys>) {
    let (sender, keys) = watch::channel(Keys::parse(&key_file()).unwrap());
    let desk = desk_with(Disk::default(), |service| {
        service.auth(Auth::watched_keys(keys))
    });
    (desk.await, sender)
}

fn form(fields: &[(&str, &str)]) -> String {
    let mut form = form_urlencoded::Serializer::new(String::new());
    for (name, value) in fields {
        form.append_pair(name, value);
    }
    form.finish()
}

impl<St: Store> Desk<St> {
    pub fn get(&self, path: &str) -> Call {
        Call::new(self.addr, "GET", path)
    }

    pub fn post(&self, path: &str, fields: &[(&str, &str)]) -> Call {
        Call::new(self.addr, "POST", path)
            .body(form(fields))
            .header("Content-Type", "application/x-www-form-urlencoded")
            .header("Origin", format!("http://{}", self.addr))
            .header("Sec-Fetch-Site", "same-origin")
    }

    /// Signs in by a key, and returns the cookie.
    pub async fn sign_in(&self, key: &str) -> String {
        let reply = self.post("/sign-in", &[("key", key)]).send().await;
        assert_eq!((reply.status, reply.header("location")), (303, Some("/")));
        cookie(&reply)
    }

    /// Opens the one-time link, and returns the cookie.
    pub async fn open(&self) -> String {
        let path = self.service.issue_sign_in_path().unwrap();
        let code = path.split_once("code=").unwrap().1;
        let page = self.get(&path).send().await;
        assert_eq!(page.status, 200);
        assert!(html(&page).contains(code));
        cookie(&self.post("/sign-in", &[("code", code)]).send().await)
    }

    /// Submits an action, and returns its id.
    pub async fn submit(&self, key: &str, body: &Value, credential: (&str, &str)) -> String {
        let call = Call::new(self.addr, "POST", "/api/v1/hitl/actions")
            .header("Thread-Id", "run-7")
            .header("Idempotency-Key", key)
            .header(credential.0, credential.1);
        let reply = call.json(body.to_string()).send().await;
        assert_eq!(reply.status, 201, "{reply:?}");
        reply.request_id()
    }
}

pub const AGENT: (&str, &str) = ("Authorization", "Bearer agent-key");
pub const ACME: (&str, &str) = ("Tenant-Id", "acme");

fn cookie(reply: &Reply) -> String {
    let set = reply.header("set-cookie").unwrap();
    set.split(';').next().unwrap().to_owned()
}

pub fn html(reply: &Reply) -> String {
    assert_eq!(
        reply.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    String::from_utf8(reply.body.to_vec()).unwrap()
}

/// What a browser sends back of a payload that nobody has edited.
pub fn editor(page: &str) -> String {
    let text = page.split_once("<textarea id=\"payload\"").unwrap().1;
    let text = text.split_once(">\n").unwrap().1;
    let text = text.split_once("</textarea>").unwrap().0;
    text.replace("&#34;", "\"").replace('\n', "\r\n")
}

/// The value of a hidden field.
pub fn hidden(page: &str, name: &str) -> String {
    let field = format!("name=\"{name}\" value=\"");
    let rest = page.split_once(&field).expect("the field is there").1;
    rest.split_once('"').unwrap().0.to_owned()
}

/// Follows a 303.
pub async fn follow<St: Store>(desk: &Desk<St>, reply: &Reply, cookie: &str) -> String {
    assert_eq!(reply.status, 303, "{reply:?}");
    let next = desk.get(reply.header("location").unwrap());
    let page = next.header("Cookie", cookie).send().await;
    assert_eq!(page.status, 200);
    html(&page)
}

#[tokio::test]
async fn a_reviewer_signs_in_sees_what_waits_and_decides_on_it() {
    let (desk, _keys) = keyed().await;
    let body = json!({"to": "a@b.c", "aegis": {"title": "Pay a"}});
    let id = desk.submit("k", &body, AGENT).await;
    let path = format!("/actions/{id}");
    let cookie = desk.sign_in("reviewer-key").await;
    let list = html(&desk.get("/").header("Cookie", &cookie).send().await);
    assert!(list.contains("Pay a") && list.contains(&path), "{list}");
    assert!(list.contains(r#"{"to":"a@b.c"}"#), "{list}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    assert!(page.contains("a@b.c"), "{page}");
    let fields = [
        ("digest", &*hidden(&page, "digest")),
        ("call", &*hidden(&page, "call")),
        ("comment", "Good."),
        ("decision", "approve"),
    ];
    // A double click.
    for _ in 0..2 {
        let decide = desk.post(&path, &fields).header("Cookie", &cookie);
        let told = follow(&desk, &decide.send().await, &cookie).await;
        assert!(told.contains("Your approval is on record."), "{told}");
        assert!(told.contains("Approved by <b>alice</b>"), "{told}");
        assert!(told.contains("Good.") && told.contains("Approved, not picked up"));
    }
    // Another tab, and another reviewer's mind.
    let later = [fields[0], ("call", "another"), ("decision", "approve")];
    let told = desk.post(&path, &later).header("Cookie", &cookie);
    let told = follow(&desk, &told.send().await, &cookie).await;
    assert!(told.contains("on record before"), "{told}");
    let against = [fields[0], ("call", "third"), ("decision", "reject")];
    let told = desk.post(&path, &against).header("Cookie", &cookie);
    let told = follow(&desk, &told.send().await, &cookie).await;
    assert!(told.contains("Your rejection was not recorded"), "{told}");
    assert!(told.contains("Approved by <b>alice</b>"), "{told}");
}

#[tokio::test]
async fn no_link_says_what_is_not_on_record() {
    let desk = keyless().await;
    let id = desk.submit("k", &json!({"a": 1}), ACME).await;
    let cookie = desk.open().await;
    for answer in ["recorded", "duplicate", "conflict", "closed", "gone", "x"] {
        let link = format!("/actions/{id}?asked=approve&answer={answer}");
        let page = html(&desk.get(&link).header("Cookie", &cookie).send().await);
        assert!(!page.contains("class=\"notice"), "{page}");
        let link = format!("/decided?a={id}.{answer}");
        let page = html(&desk.get(&link).header("Cookie", &cookie).send().await);
        assert!(!page.contains("class=\"good\""), "{page}");
    }
}

#[tokio::test]
async fn nobody_sees_anything_without_a_session_or_of_another_tenant() {
    let (desk, _keys) = keyed().await;
    let id = desk.submit("k", &json!({"secret": "tulip"}), AGENT).await;
    let path = format!("/actions/{id}");
    let strangers = [None, Some("aegis=".to_owned()), Some("aegis=00".to_owned())];
    for cookie in strangers {
        for path in ["/", "/tenants", &path, "/live", "/decided"] {
            let call = desk.get(path);
            let call = match &cookie {
                Some(cookie) => call.header("Cookie", cookie),
                None => call,
            };
            let reply = call.send().await;
            let to = reply.header("location").unwrap();
            assert!(reply.status == 303 && to.starts_with("/sign-in?next="));
        }
    }
    let other = desk.sign_in("other-key").await;
    let reply = desk.get(&path).header("Cookie", &other).send().await;
    assert_eq!(reply.status, 404);
    let list = desk.get("/?tenant=acme").header("Cookie", &other);
    assert!(!html(&list.send().await).contains("tulip"));
    let fields = [("decision", "reject"), ("digest", ""), ("call", "c")];
    let reply = desk.post(&path, &fields).header("Cookie", &other);
    assert_eq!(reply.send().await.status, 404);
    let several = [("action", &*format!("{id}:")), ("call", "c")];
    let reply = desk.post("/", &several).header("Cookie", &other);
    let told = follow(&desk, &reply.send().await, &other).await;
    assert!(told.contains("0 of 0 recorded"), "{told}");
}

#[tokio::test]
async fn a_session_ends_with_its_key_and_when_its_reviewer_signs_out() {
    let (desk, keys) = keyed().await;
    let [first, second] = [
        desk.sign_in("reviewer-key").await,
        desk.sign_in("reviewer-key").await,
    ];
    let status = async |cookie: &str| {
        let reply = desk.get("/").header("Cookie", cookie).send().await;
        reply.status
    };
    assert_eq!((status(&first).await, status(&second).await), (200, 200));
    let out = desk.post("/sign-out", &[]).header("Cookie", &first);
    let out = out.send().await;
    assert!(out.header("set-cookie").unwrap().contains("Max-Age=0"));
    // A copy of the cookie is of no use.
    assert_eq!((status(&first).await, status(&second).await), (303, 200));
    keys.send_replace(Keys::parse("").unwrap());
    assert_eq!(status(&second).await, 303);
    keys.send_replace(Keys::parse(&key_file()).unwrap());
    assert_eq!(status(&second).await, 200);
}

#[tokio::test]
async fn a_key_allows_in_the_inbox_what_it_allows_elsewhere() {
    let (desk, _keys) = keyed().await;
    let id = desk.submit("k", &json!({"a": 1}), AGENT).await;
    let path = format!("/actions/{id}");
    for key in ["agent-key", "unknown-key", "", "reviewer-key x"] {
        let reply = desk.post("/sign-in", &[("key", key)]).send().await;
        assert_eq!(reply.status, 403, "{key}");
        assert_eq!(reply.header("set-cookie"), None);
    }
    let reader = desk.sign_in("reader-key").await;
    let page = html(&desk.get(&path).header("Cookie", &reader).send().await);
    assert!(!page.contains("value=\"approve\""), "{page}");
    let list = html(&desk.get("/").header("Cookie", &reader).send().await);
    assert!(!list.contains("value=\"approve\""), "{list}");
    let fields = [("decision", "reject"), ("call", "c")];
    for path in [&*path, "/"] {
        let reply = desk.post(path, &fields).header("Cookie", &reader);
        assert_eq!(reply.send().await.status, 403);
    }
    // Who submitted does not decide.
    let own = ("Authorization", "Bearer own-key");
    let id = desk.submit("own", &json!({}), own).await;
    let otto = desk.sign_in("own-key").await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &otto).send().await);
    assert!(page.contains("somebody else decides"), "{page}");
    let fields = [("decision", "approve"), ("call", "c")];
    let reply = desk.post(&path, &fields).header("Cookie", &otto);
    let told = follow(&desk, &reply.send().await, &otto).await;
    assert!(told.contains("you submitted this"), "{told}");
    assert!(!told.contains("Approved by"), "{told}");
}

#[tokio::test]
async fn a_one_time_link_works_once_and_opening_it_uses_up_nothing() {
    let desk = keyless().await;
    let old = desk.service.issue_sign_in_path().unwrap();
    let path = desk.service.issue_sign_in_path().unwrap();
    let code = |path: &str| path.split_once("code=").unwrap().1.to_owned();
    // A mail scanner, a preview, the browser's own prefetch.
    for _ in 0..3 {
        let reply = desk.get(&path).send().await;
        assert_eq!((reply.status, reply.header("set-cookie")), (200, None));
    }
    let sign_in = async |code: &str| {
        let call = desk.post("/sign-in", &[("code", code), ("next", "/?view=all")]);
        call.send().await
    };
    for wrong in [&*code(&old), "", "x"] {
        let reply = sign_in(wrong).await;
        assert_eq!((reply.status, reply.header("set-cookie")), (403, None));
    }
    let reply = sign_in(&code(&path)).await;
    assert_eq!(reply.header("location"), Some("/?view=all"));
    let set = reply.header("set-cookie").unwrap();
    assert!(set.contains("HttpOnly") && set.contains("SameSite=Strict"));
    let again = sign_in(&code(&path)).await;
    assert_eq!(again.status, 403);
    assert!(html(&again).contains("was used before"));
    // An API key opens nothing here, nor does the header of a tenant.
    let reply = desk.post("/sign-in", &[("key", "reviewer-key")]);
    assert_eq!(reply.send().await.status, 403);
    let reply = desk.get("/").header("Tenant-Id", "acme").send().await;
    assert_eq!(reply.status, 303);
}

#[tokio::test]
async fn the_local_reviewer_sees_all_tenants() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let get = async |path: &str| {
        let reply = desk.get(path).header("Cookie", &cookie).send().await;
        if reply.status == 303 {
            follow(&desk, &reply, &cookie).await
        } else {
            html(&reply)
        }
    };
    assert!(get("/").await.contains("No agent has submitted anything"));
    let title = json!({"aegis": {"title": "First of acme"}});
    desk.submit("k", &title, ACME).await;
    assert!(get("/").await.contains("First of acme"));
    let title = json!({"aegis": {"title": "First of zeta"}});
    let id = desk.submit("k", &title, ("Tenant-Id", "zeta/<b>")).await;
    let tenants = get("/").await;
    assert!(tenants.contains("acme") && tenants.contains("zeta/&lt;b&gt;"));
    assert!(tenants.contains("1 waiting"), "{tenants}");
    let zeta = get("/?tenant=zeta%2F%3Cb%3E").await;
    assert!(zeta.contains("First of zeta") && !zeta.contains("First of acme"));
    let page = get(&format!("/actions/{id}")).await;
    let fields = [
        ("decision", "reject"),
        ("call", &*hidden(&page, "call")),
        ("comment", "No."),
    ];
    let decide = desk.post(&format!("/actions/{id}"), &fields);
    let reply = decide.header("Cookie", &cookie).send().await;
    let told = follow(&desk, &reply, &cookie).await;
    assert!(told.contains("Rejected by <b>local</b>"), "{told}");
}

#[tokio::test]
async fn foreign_pages_change_nothing_and_get_change_nothing() {
    for keyed_server in [false, true] {
        let (sender, keys) = watch::channel(Keys::parse(&key_file()).unwrap());
        let desk = desk_with(Disk::default(), |service| match keyed_server {
            true => service.auth(Auth::watched_keys(keys)),
            false => service,
        })
        .await;
        let (cookie, credential) = match keyed_server {
            true => (desk.sign_in("reviewer-key").await, AGENT),
            false => (desk.open().await, ACME),
        };
        let id = desk.submit("k", &json!({}), credential).await;
        let path = format!("/actions/{id}");
        let fields = form(&[("decision", "approve"), ("call", "c")]);
        let plain = |headers: &[(&str, &str)]| {
            let mut call = Call::new(desk.addr, "POST", path.as_str())
                .body(fields.clone())
                .header("Content-Type", "application/x-www-form-urlencoded")
                .header("Cookie", &cookie);
            for (name, value) in headers {
                call = call.header(name, value);
            }
            call
        };
        let own = format!("http://{}", desk.addr);
        for foreign in [
            &[("Origin", "https://evil.example")][..],
            &[("Origin", "null")],
            &[("Origin", "http://127.0.0.1:1")],
            &[("Sec-Fetch-Site", "cross-site")],
            &[("Sec-Fetch-Site", "same-site"), ("Origin", &own)],
            &[("Origin", &own), ("Origin", "https://evil.example")],
        ] {
            let reply = plain(foreign).send().await;
            assert_eq!(reply.status, 403, "{foreign:?}");
        }
        // A page at a name that was made to resolve to this server.
        let rebound = plain(&[("Origin", "http://evil.example")]).host("evil.example");
        let status = rebound.send().await.status;
        // With keys the cookie is the wall: a browser sends it to its own host alone.
        assert!(keyed_server || status == 421, "{status}");
        for path in [
            format!("{path}?decision=approve&call=c&digest="),
            format!("/?action={id}:&decision=approve&call=c"),
            format!("/sign-out?{fields}"),
        ] {
            let reply = desk.get(&path).header("Cookie", &cookie).send().await;
            assert!([200, 405].contains(&reply.status), "{path}");
        }
        let reply = Call::new(desk.addr, "GET", format!("/api/v1/hitl/status/{id}"));
        let expected = if keyed_server && status == 303 {
            "COMMITTED"
        } else {
            "PENDING"
        };
        assert_eq!(reply.send().await.text("status"), expected);
        drop(sender);
    }
}

#[tokio::test]
async fn several_are_approved_at_once_and_each_has_its_answer() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let mut ids = Vec::new();
    for key in ["a", "b", "c", "d"] {
        let body = json!({"key": key, "aegis": {"title": format!("Action {key}")}});
        ids.push(desk.submit(key, &body, ACME).await);
    }
    let list = html(&desk.get("/").header("Cookie", &cookie).send().await);
    let picked: Vec<String> = ids
        .iter()
        .map(|id| {
            let field = format!("name=\"action\" value=\"{id}:");
            let digest = list.split_once(&field).unwrap().1;
            format!("{id}:{}", digest.split_once('"').unwrap().0)
        })
        .collect();
    let reject = Call::post(desk.addr, "reject", "b").without("Tenant-Id");
    let reject = reject.without("Thread-Id").header("Tenant-Id", "acme");
    let reply = reject
        .header("Thread-Id", "run-7")
        .json(r#"{"key":"b"}"#)
        .send()
        .await;
    assert_eq!(reply.status, 202);
    // One with the digest of another, and one twice.
    let wrong = format!("{}:{}", ids[2], picked[0].split_once(':').unwrap().1);
    let fields = [
        ("call", "call-1"),
        ("action", &*picked[0]),
        ("action", &*picked[1]),
        ("action", &*wrong),
        ("action", &*picked[3]),
        ("action", &*picked[3]),
    ];
    for _ in 0..2 {
        let several = desk.post("/", &fields).header("Cookie", &cookie);
        let told = follow(&desk, &several.send().await, &cookie).await;
        assert!(told.contains("2 of 4 recorded"), "{told}");
        assert!(told.contains("rejected before"), "{told}");
        assert!(told.contains("another payload"), "{told}");
    }
    let many: Vec<String> = (0..101)
        .map(|_| format!("{}:", uuid::Uuid::new_v4()))
        .collect();
    let mut fields = vec![("call", "c")];
    fields.extend(many.iter().map(|action| ("action", action.as_str())));
    let reply = desk.post("/", &fields).header("Cookie", &cookie);
    assert_eq!(reply.send().await.status, 400);
    let none = desk.post("/", &[("call", "c")]).header("Cookie", &cookie);
    assert_eq!(none.send().await.status, 303);
}

#[tokio::test]
async fn an_edited_payload_is_shown_with_its_changes_and_a_bad_one_loses_nothing() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let body = json!({"to": "a", "n": 1, "aegis": {"allow_edit": true}});
    let id = desk.submit("k", &body, ACME).await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    let send = async |payload: &str, decision: &str, call: &str| {
        let fields = [
            ("digest", &*hidden(&page, "digest")),
            ("call", call),
            ("comment", "My comment"),
            ("payload", payload),
            ("decision", decision),
        ];
        let call = desk.post(&path, &fields).header("Cookie", &cookie);
        call.send().await
    };
    let reserved = "{\"aegis\":{}}";
    for bad in ["", "{\"to\": ", "[]", "{\"a\":1,\"a\":2}", "7", reserved] {
        let reply = send(bad, "approve", "c").await;
        assert_eq!(reply.status, 422, "{bad}");
        let page = html(&reply);
        assert!(page.contains("nothing was recorded"), "{page}");
        assert!(page.contains("My comment"));
        let shown = bad.replace('"', "&#34;");
        assert!(page.contains(&shown), "{page}");
    }
    let reply = send("{\r\n  \"n\": 1,\r\n  \"to\": \"b\"\r\n}", "approve", "c2").await;
    let told = follow(&desk, &reply, &cookie).await;
    assert!(told.contains("Payload, as edited"), "{told}");
    assert!(told.contains("<del>- \t\"to\": \"a\"\n</del>"));
    assert!(told.contains("<ins>+ \t\"to\": \"b\"\n</ins>"));
    let look = desk.get(&format!("/api/v1/hitl/actions/{id}"));
    let action = look.header("Tenant-Id", "acme").send().await.json();
    assert_eq!(action["edited_payload"], json!({"to": "b", "n": 1}));
    assert_eq!(action["payload"], json!({"to": "a", "n": 1}));
}

#[tokio::test]
async fn a_payload_that_is_sent_back_unchanged_is_no_edit() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let body = json!({"to": "\u{202e}a", "n": 1, "aegis": {"allow_edit": true}});
    let id = desk.submit("k", &body, ACME).await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    let text = editor(&page);
    let fields = [
        ("digest", &*hidden(&page, "digest")),
        ("call", "c"),
        ("payload", &*text),
        ("decision", "approve"),
    ];
    let reply = desk.post(&path, &fields).header("Cookie", &cookie);
    let told = follow(&desk, &reply.send().await, &cookie).await;
    assert!(told.contains("Your approval is on record."), "{told}");
    assert!(!told.contains("as edited"), "{told}");
}

#[tokio::test]
async fn a_decision_of_unknown_outcome_can_be_sent_again() {
    let disk = Disk::default();
    let store = Faulty::new(disk, Mood::Well);
    let desk = desk_with(store.clone(), |service| service).await;
    let cookie = desk.open().await;
    let id = desk.submit("k", &json!({"a": 1}), ACME).await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    let fields = [
        ("digest", &*hidden(&page, "digest")),
        ("call", &*hidden(&page, "call")),
        ("comment", "A <b>comment</b>"),
        ("decision", "approve"),
    ];
    store.set(Mood::Fails);
    let reply = desk.post(&path, &fields).header("Cookie", &cookie);
    let reply = reply.send().await;
    assert_eq!(reply.status, 503);
    assert!(reply.header("retry-after").is_some());
    let again = html(&reply);
    assert!(again.contains("It is not known"), "{again}");
    store.set(Mood::Well);
    for (name, value) in fields {
        let sent = hidden(&again, name);
        let sent = sent.replace("&#60;", "<").replace("&#62;", ">");
        assert_eq!(sent, value);
    }
    let reply = desk.post(&path, &fields).header("Cookie", &cookie);
    let told = follow(&desk, &reply.send().await, &cookie).await;
    assert!(told.contains("Your approval is on record."), "{told}");
}

#[tokio::test]
async fn a_form_that_is_sent_again_with_another_edit_is_not_told_that_it_is_on_record() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let body = json!({"n": 1, "aegis": {"allow_edit": true}});
    let id = desk.submit("k", &body, ACME).await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    let send = async |payload: &str| {
        let fields = [
            ("digest", &*hidden(&page, "digest")),
            ("call", &*hidden(&page, "call")),
            ("payload", payload),
            ("decision", "approve"),
        ];
        let call = desk.post(&path, &fields).header("Cookie", &cookie);
        follow(&desk, &call.send().await, &cookie).await
    };
    let act = async |verb: &str, body: Value| {
        let call = Call::new(desk.addr, "POST", format!("/api/v1/hitl{path}/{verb}"));
        let call = call.header("Tenant-Id", "acme").json(body.to_string());
        call.send().await.json()
    };
    for _ in 0..2 {
        let told = send("{\"n\":5}").await;
        assert!(told.contains("Your approval is on record."), "{told}");
    }
    let told = send("{\"n\":666}").await;
    assert!(told.contains("was not recorded"), "{told}");
    assert!(!told.contains("Your approval is on record"), "{told}");

    let look = desk.get(&format!("/api/v1/hitl{path}"));
    let action = look.header("Tenant-Id", "acme").send().await.json();
    assert_eq!(action["edited_payload"], json!({"n": 5}));
    let claimed = act("claim", json!({"digest": action["digest"]})).await;
    let failed = act("fail", json!({"token": claimed["claim"]["token"]})).await;
    assert_eq!(failed["status"], "FAILED");
    let told = send("{\"n\":5}").await;
    assert!(
        told.contains("is on record from before it failed. It was not decided again."),
        "{told}"
    );
    let told = send("{\"n\":6}").await;
    assert!(told.contains("was not recorded"), "{told}");
    assert!(told.contains("decision\" value=\"approve"), "{told}");
}

#[tokio::test]
async fn a_form_to_sign_in_is_short() {
    let (desk, _keys) = keyed().await;
    for (len, status) in [(8_000, 403), (9_000, 413), (800_000, 413)] {
        let reply = desk.post("/sign-in", &[("key", &"a".repeat(len))]);
        assert_eq!(reply.send().await.status, status, "{len}");
    }
}

#[tokio::test]
async fn a_proxy_that_signs_people_in_is_trusted_and_nobody_else() {
    let with_proxy = |address: &str| {
        let address = address.parse().unwrap();
        let user = "x-forwarded-user".parse().unwrap();
        let inbox = Inbox::new()
            .behind_tls(true)
            .trust_user_header(user, [address]);
        desk_with(Disk::default(), |service| {
            let keys = Keys::parse(&key_file()).unwrap();
            service.auth(Auth::keys(keys)).inbox(inbox)
        })
    };
    let desk = with_proxy("127.0.0.1").await;
    let id = desk.submit("k", &json!({"a": 1}), AGENT).await;
    let path = format!("/actions/{id}");
    let page = desk.get(&path).header("X-Forwarded-User", "alice");
    let page = html(&page.send().await);
    assert!(page.contains("alice") && !page.contains("Sign out"));
    let tenants = desk.get("/tenants").header("X-Forwarded-User", "alice");
    assert!(html(&tenants.send().await).contains("acme"));
    let other = desk.get(&path).header("X-Forwarded-User", "alice");
    let other = other.header("Tenant-Id", "other").send().await;
    assert_eq!(other.status, 404);
    let long = "a".repeat(256);
    for wrong in [
        "",
        " ",
        "caf\u{e9}",
        "alice\tbob",
        &long,
        "system:expiry",
        "local",
        "anonymous",
    ] {
        let reply = desk.get("/").header("X-Forwarded-User", wrong);
        assert_eq!(reply.send().await.status, 400, "{wrong}");
    }
    // The proxy's own header behind one of its client's.
    let added = desk.get(&path).header("X-Forwarded-User", "alice");
    let added = added.header("Tenant-Id", "acme");
    let added = added.header("Tenant-Id", "other").send().await;
    assert_eq!(added.status, 400);
    let twice = desk.get("/").header("X-Forwarded-User", "alice");
    let twice = twice.header("X-Forwarded-User", "bob").send().await;
    assert_eq!(twice.status, 400);
    // A name that is an agent's may not decide on what that agent submitted.
    let fields = [
        ("decision", "reject"),
        ("digest", &*hidden(&page, "digest")),
        ("call", "c"),
    ];
    let reply = desk.post(&path, &fields);
    let reply = reply.header("X-Forwarded-User", "agent").send().await;
    assert!(reply.header("location").unwrap().ends_with("answer=own"));
    let reply = desk.post(&path, &fields);
    let reply = reply.header("X-Forwarded-User", "alice").send().await;
    assert!(reply.header("location").unwrap().ends_with("=recorded"));

    let desk = with_proxy("192.0.2.1").await;
    let reply = desk.get("/").header("X-Forwarded-User", "alice");
    assert_eq!(reply.send().await.status, 303);
    let reply = desk.post("/sign-in", &[("key", "reviewer-key")]);
    let set = reply.send().await;
    let set = set.header("set-cookie").unwrap();
    assert!(set.starts_with("__Host-aegis=") && set.contains("; Secure"));
}

#[tokio::test]
async fn a_link_from_another_site_opens_the_page_that_it_names() {
    let (desk, _keys) = keyed().await;
    let reply = desk
        .get("/actions/x")
        .header("Sec-Fetch-Site", "cross-site");
    let reply = reply.send().await;
    assert_eq!(reply.status, 200);
    assert!(html(&reply).contains("http-equiv=\"refresh\""));
    let reply = desk.get("/actions/x?y=z").send().await;
    let to = reply.header("location").unwrap();
    assert_eq!(to, "/sign-in?next=%2Factions%2Fx%3Fy%3Dz");
}

#[tokio::test]
async fn no_page_can_be_framed_cached_or_made_to_load_anything() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    for path in ["/", "/tenants", "/sign-in", "/actions/x", "/nothing"] {
        let reply = desk.get(path).header("Cookie", &cookie).send().await;
        if path == "/nothing" {
            assert_eq!(reply.status, 404);
            continue;
        }
        let policy = reply.header("content-security-policy").unwrap();
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"));
        assert!(policy.contains("frame-ancestors 'none'"));
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    }
    for path in ["/style.css", "/inbox.js"] {
        let reply = desk.get(path).send().await;
        assert_eq!(reply.status, 200);
        assert!(reply.body.len() > 1000);
    }
    for (method, path) in [("DELETE", "/"), ("POST", "/tenants"), ("GET", "/sign-out")] {
        let reply = desk.get(path).method(method).send().await;
        assert_eq!(reply.status, 405, "{method} {path}");
        assert!(reply.header("allow").is_some());
    }
}

#[tokio::test]
async fn what_an_agent_wrote_is_never_markup() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let hostile = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>\u{202e}";
    let body = json!({
        hostile: hostile,
        "aegis": {"title": hostile, "allow_edit": true},
    });
    let id = desk.submit("k", &body, ACME).await;
    for path in ["/", "/?view=all", &format!("/actions/{id}")] {
        let page = html(&desk.get(path).header("Cookie", &cookie).send().await);
        assert!(page.contains("&lt;script&gt;") || page.contains("&#60;script&#62;"));
        assert!(
            !page.contains("<script>") && !page.contains("<img"),
            "{page}"
        );
        assert!(!page.contains('\u{202e}'), "{page}");
    }
}
