//! Forms and cookies that no page of the inbox sends, payloads that its forms cannot hold, and
//! sessions that end while they are used.

use aegis_hitl::server::Keys;
use aegis_hitl::store::Store;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::inbox::{
    ACME, AGENT, Desk, desk_with, editor, follow, hidden, html, key_file, keyed, keyless,
};
use super::support::{Call, Disk, Faulty, Mood, read_until};

/// The action on record.
async fn look<St: Store>(desk: &Desk<St>, id: &str) -> Value {
    let path = format!("/api/v1/hitl/actions/{id}");
    let call = Call::new(desk.addr, "GET", path).header("Tenant-Id", "acme");
    call.send().await.json()
}

#[tokio::test]
async fn a_form_with_two_decisions_records_none() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let id = desk.submit("k", &json!({"a": 1}), ACME).await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    let digest = hidden(&page, "digest");
    let fields = [("digest", &*digest), ("call", "c"), ("decision", "approve")];
    for twice in [
        ("decision", "reject"),
        ("decision", ""),
        ("digest", "x"),
        ("call", "d"),
        ("comment", "a"),
    ] {
        let mut fields = fields.to_vec();
        fields.insert(0, twice);
        if twice.0 == "comment" {
            fields.push(("comment", "b"));
        }
        let reply = desk.post(&path, &fields).header("Cookie", &cookie);
        assert_eq!(reply.send().await.status, 400, "{twice:?}");
    }
    assert_eq!(look(&desk, &id).await["decision"], Value::Null);
}

#[tokio::test]
async fn several_actions_are_never_approved_by_a_form_that_says_reject() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let id = desk.submit("k", &json!({}), ACME).await;
    let action = format!("{id}:");
    for decisions in [&["reject"][..], &["x"], &["approve", "reject"]] {
        let mut fields = vec![("call", "c"), ("action", &*action)];
        fields.extend(decisions.iter().map(|decision| ("decision", *decision)));
        let reply = desk.post("/", &fields).header("Cookie", &cookie);
        assert_eq!(reply.send().await.status, 400, "{decisions:?}");
    }
    assert_eq!(look(&desk, &id).await["decision"], Value::Null);
}

#[tokio::test]
async fn an_action_counts_once_among_the_answers() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let id = desk.submit("k", &json!({}), ACME).await;
    let fields = [("call", "c"), ("action", &*format!("{id}:"))];
    let reply = desk.post("/", &fields).header("Cookie", &cookie);
    follow(&desk, &reply.send().await, &cookie).await;
    let link = format!("/decided?{}", format!("a={id}.recorded&").repeat(3));
    let page = html(&desk.get(&link).header("Cookie", &cookie).send().await);
    assert!(page.contains("1 of 1 recorded"), "{page}");
}

#[tokio::test]
async fn what_the_list_does_not_show_whole_is_not_approved_from_it() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    let short = desk.submit("short", &json!({"to": "a"}), ACME).await;
    let long = json!({"note": "x".repeat(120), "to": "somebody else"});
    let long = desk.submit("long", &long, ACME).await;
    let none = desk.submit("none", &json!({}), ACME).await;
    let list = html(&desk.get("/").header("Cookie", &cookie).send().await);
    let can_pick = |id: &str| {
        let end = list.split_once(&format!("id=\"pick-{id}\"")).unwrap().1;
        !end.split_once('>').unwrap().0.contains("disabled")
    };
    assert!(can_pick(&short) && can_pick(&none) && !can_pick(&long));
}

#[tokio::test]
async fn a_payload_too_large_to_be_edited_is_still_decided_on() {
    let desk = keyless().await;
    let cookie = desk.open().await;
    // On lines of their own, in a form, the elements take more than a form may have.
    let elements = vec![1; 100_000];
    for decision in ["reject", "approve"] {
        let body = json!({"a": elements, "aegis": {"allow_edit": true}});
        let id = desk.submit(decision, &body, ACME).await;
        let path = format!("/actions/{id}");
        let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
        assert!(!page.contains("name=\"payload\""));
        assert!(page.contains("too large to be edited"));
        let fields = [
            ("digest", &*hidden(&page, "digest")),
            ("call", "c"),
            ("decision", decision),
        ];
        let reply = desk.post(&path, &fields).header("Cookie", &cookie);
        follow(&desk, &reply.send().await, &cookie).await;
        assert_eq!(look(&desk, &id).await["decision"], decision);
    }
    // A form that just holds it is taken as it is, whatever space it has to edit it.
    let body = json!({"a": vec![1; 50_000], "aegis": {"allow_edit": true}});
    let id = desk.submit("middle", &body, ACME).await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    let text = editor(&page);
    assert!(text.len() > 262_144);
    let fields = [
        ("digest", &*hidden(&page, "digest")),
        ("call", "c"),
        ("payload", &*text),
        ("decision", "approve"),
    ];
    let reply = desk.post(&path, &fields).header("Cookie", &cookie);
    follow(&desk, &reply.send().await, &cookie).await;
    assert_eq!(look(&desk, &id).await["edited_payload"], Value::Null);
    assert_eq!(look(&desk, &id).await["decision"], "approve");
}

#[tokio::test]
async fn an_edit_that_is_too_large_is_refused_and_shown_again() {
    let desk = desk_with(Disk::default(), |service| service.body_limit(1000)).await;
    let cookie = desk.open().await;
    let body = json!({"a": 1, "aegis": {"allow_edit": true}});
    let id = desk.submit("k", &body, ACME).await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    let edit = json!({"a": "x".repeat(1000)}).to_string();
    let fields = [
        ("digest", &*hidden(&page, "digest")),
        ("call", "c"),
        ("payload", &*edit),
        ("decision", "approve"),
    ];
    let reply = desk.post(&path, &fields).header("Cookie", &cookie);
    let reply = reply.send().await;
    assert_eq!(reply.status, 422);
    let page = html(&reply);
    assert!(page.contains("more than 1000 bytes") && page.contains(&"x".repeat(1000)));
    assert_eq!(look(&desk, &id).await["decision"], Value::Null);
}

#[tokio::test]
async fn the_offer_to_send_a_decision_again_stays_and_holds_the_form_alone() {
    let store = Faulty::new(Disk::default(), Mood::Well);
    let desk = desk_with(store.clone(), |service| service).await;
    let cookie = desk.open().await;
    let id = desk.submit("k", &json!({"a": 1}), ACME).await;
    let path = format!("/actions/{id}");
    let page = html(&desk.get(&path).header("Cookie", &cookie).send().await);
    let mut fields = vec![
        ("digest", &*hidden(&page, "digest")),
        ("call", "c"),
        ("comment", "Typed"),
        ("decision", "approve"),
    ]
    .into_iter()
    .map(|(name, value)| (name, value.to_owned()))
    .collect::<Vec<_>>();
    fields.extend((0..1000).map(|number| ("other", number.to_string())));
    let fields: Vec<_> = fields
        .iter()
        .map(|(name, value)| (*name, &**value))
        .collect();
    store.set(Mood::Fails);
    let reply = desk.post(&path, &fields).header("Cookie", &cookie);
    let again = html(&reply.send().await);
    assert!(
        again.contains("Typed") && !again.contains("\"other\""),
        "{again}"
    );
    // The script would put the page of the action in its place, without what was typed.
    assert!(!again.contains("data-live"), "{again}");
}

#[tokio::test]
async fn a_cookie_that_another_page_added_opens_no_session() {
    let (desk, _keys) = keyed().await;
    let id = desk.submit("k", &json!({"a": 1}), AGENT).await;
    let [own, others] = [
        desk.sign_in("reviewer-key").await,
        desk.sign_in("reader-key").await,
    ];
    let path = format!("/actions/{id}");
    for cookies in [
        format!("{others}; {own}"),
        format!("{own}; {others}"),
        format!("aegis=; {own}"),
    ] {
        let reply = desk.get(&path).header("Cookie", &cookies).send().await;
        assert_eq!(reply.status, 303, "{cookies}");
    }
    let reply = desk.get(&path).header("Cookie", &others);
    assert_eq!(reply.header("Cookie", &own).send().await.status, 303);
    for cookies in [format!("a=b; {own}; aegis2=x"), format!("{own}; {own}")] {
        let reply = desk.get(&path).header("Cookie", &cookies).send().await;
        assert_eq!(reply.status, 200, "{cookies}");
    }
}

#[tokio::test]
async fn news_end_once_the_key_of_their_reader_is_gone_or_anothers() {
    let without = |key_file: &str| {
        let lines = key_file.lines().filter(|line| !line.contains(" alice "));
        lines.collect::<Vec<_>>().join("\n")
    };
    let moved = |key_file: &str| key_file.replace(" acme alice ", " other alice ");
    let changes: [&dyn Fn(&str) -> String; 2] = [&without, &moved];
    for (key, change) in ["first", "second"].into_iter().zip(changes) {
        let (desk, keys) = keyed().await;
        let cookie = desk.sign_in("reviewer-key").await;
        let mut stream = TcpStream::connect(desk.addr).await.unwrap();
        let head = format!("GET /live HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let head = read_until(&mut stream, "\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        keys.send_replace(Keys::parse(&change(&key_file())).unwrap());
        desk.submit(key, &json!({"a": 1}), AGENT).await;
        let news = read_until(&mut stream, "0\r\n\r\n").await;
        assert!(!news.contains("changed"), "{news}");
    }
}
