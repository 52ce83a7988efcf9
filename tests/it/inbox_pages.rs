//! Pages of the inbox that take long to render, approvals that are sent together, and cookies that
//! sign nobody in.

use std::convert::Infallible;
use std::sync::mpsc::{self, RecvError, Sender};
use std::task::Poll;

use aegis_hitl::server::{Auth, HitlService, Inbox, Keys, ResponseBody, Server};
use aegis_hitl::store::MemoryStore;
use bytes::Bytes;
use futures_util::future;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking, yield_now};
use tokio_test::{assert_pending, assert_ready, task};
use tower::Service;

use super::inbox::{AGENT, desk_with, follow, hidden, html, key_file, keyed, keyless};
use super::support::{Call, Disk, Faulty, HANG, Mood, Reply, ends};

/// Runs a test on one worker, and one thread for what blocks.
fn on_one_thread_each(test: impl Future<Output = ()>) {
    let mut builder = Builder::new_current_thread();
    let builder = builder.max_blocking_threads(1).enable_all();
    builder.build().unwrap().block_on(test);
}

/// Holds the thread for what blocks until the sender is dropped, so that nothing that is rendered
/// beside the worker ends before. The task then ends with an error.
fn hold_thread() -> (Sender<()>, JoinHandle<Result<(), RecvError>>) {
    let (gate, opened) = mpsc::channel();
    (gate, spawn_blocking(move || opened.recv()))
}

/// A service without connections. Its store answers at once.
struct Local {
    service: HitlService<MemoryStore>,
    cookie: String,
}

type Answer = Result<Response<ResponseBody>, Infallible>;

impl Local {
    async fn new() -> Self {
        let service = HitlService::builder(MemoryStore::new()).inbox(Inbox::new());
        let service = service.build().unwrap();
        let path = service.issue_sign_in_path().unwrap();
        let mut local = Self {
            service,
            cookie: String::new(),
        };
        let code = path.split_once('?').unwrap().1.to_owned();
        let signed_in = local.post("/sign-in", &code).await.unwrap();
        let cookie = signed_in.headers()["set-cookie"].to_str().unwrap();
        local.cookie = cookie.split(';').next().unwrap().to_owned();
        local
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        media_type: &str,
        body: &str,
    ) -> impl Future<Output = Answer> + use<> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Origin", "http://localhost")
            .header("Cookie", &self.cookie)
            .header("Tenant-Id", "acme")
            .header("Thread-Id", "run-7")
            .header("Idempotency-Key", uuid::Uuid::new_v4().to_string())
            .header("Content-Type", media_type)
            .body(Full::<Bytes>::from(body.to_owned()))
            .unwrap();
        self.service.clone().call(request)
    }

    fn get(&self, path: &str) -> impl Future<Output = Answer> + use<> {
        self.send("GET", path, "text/plain", "")
    }

    fn post(&self, path: &str, form: &str) -> impl Future<Output = Answer> + use<> {
        self.send("POST", path, "application/x-www-form-urlencoded", form)
    }

    /// Submits an action, and returns the path of its page.
    async fn submit(&self, body: &Value) -> String {
        let path = "/api/v1/hitl/actions";
        let body = body.to_string();
        let answer = self.send("POST", path, "application/json", &body).await;
        let action: Value = serde_json::from_str(&text(answer).await).unwrap();
        format!("/actions/{}", action["request_id"].as_str().unwrap())
    }
}

async fn text(answer: Answer) -> String {
    let body = answer.unwrap().into_body().collect().await.unwrap();
    String::from_utf8(body.to_bytes().to_vec()).unwrap()
}

#[test]
fn decisions_go_on_while_a_large_page_is_rendered() {
    on_one_thread_each(async {
        let local = Local::new().await;
        let large = local.submit(&json!({"a": vec![7; 20_000]})).await;
        let small = local.submit(&json!({"a": 7})).await;
        let (gate, other) = hold_thread();
        let mut page = task::spawn(local.get(&large));
        assert_pending!(page.poll());

        let answer = assert_ready!(task::spawn(local.get(&small)).poll());
        let shown = text(answer).await;
        let form = format!(
            "decision=approve&call=c&digest={}",
            hidden(&shown, "digest")
        );
        let decided = local.post(&small, &form).await.unwrap();
        assert_eq!(decided.status(), 303);
        let to = decided.headers()["location"].to_str().unwrap();
        assert!(to.ends_with("=recorded"), "{to}");

        assert_pending!(page.poll());
        drop(gate);
        let shown = text(ends(page).await).await;
        assert_eq!(shown.matches("7,\n").count(), 19_999);
        assert_eq!(hidden(&shown, "digest").len(), 64);
        assert!(other.await.unwrap().is_err());
    });
}

#[test]
fn a_large_draft_is_rendered_beside_the_worker_too() {
    on_one_thread_each(async {
        let local = Local::new().await;
        let path = local.submit(&json!({"aegis": {"allow_edit": true}})).await;
        let (gate, other) = hold_thread();
        let payload = "x".repeat(20_000);
        let form = format!("decision=approve&call=c&digest=&payload={payload}");
        let mut draft = task::spawn(local.post(&path, &form));
        assert_pending!(draft.poll());
        drop(gate);
        let answer = ends(draft).await;
        assert_eq!(answer.as_ref().unwrap().status(), 422);
        let shown = text(answer).await;
        assert!(shown.contains("nothing was recorded"), "{shown}");
        assert!(other.await.unwrap().is_err());
    });
}

#[test]
fn a_comment_that_is_too_long_comes_back_by_a_page_that_is_rendered_beside_the_worker() {
    on_one_thread_each(async {
        let local = Local::new().await;
        let path = local.submit(&json!({"a": 7})).await;
        let (gate, other) = hold_thread();
        let form = format!(
            "decision=approve&call=c&digest=&comment={}",
            "x".repeat(500_000)
        );
        let mut draft = task::spawn(local.post(&path, &form));
        assert_pending!(draft.poll());
        drop(gate);
        let answer = ends(draft).await;
        assert_eq!(answer.as_ref().unwrap().status(), 422);
        let shown = text(answer).await;
        assert!(shown.contains(&"x".repeat(16_384)), "{}", shown.len());
        assert!(shown.len() < 30_000, "{}", shown.len());
        assert!(shown.contains("was cut"), "{shown}");
        assert!(other.await.unwrap().is_err());
    });
}

#[test]
fn what_was_typed_comes_back_however_many_large_pages_are_waited_for() {
    on_one_thread_each(async {
        let local = Local::new().await;
        let large = local.submit(&json!({"a": vec![7; 20_000]})).await;
        let small = local.submit(&json!({"aegis": {"allow_edit": true}})).await;
        let (gate, other) = hold_thread();
        let mut pages = Vec::new();
        let refused = loop {
            let mut page = task::spawn(local.get(&large));
            match page.poll() {
                Poll::Pending => pages.push(page),
                Poll::Ready(answer) => break answer.unwrap(),
            }
        };
        assert_eq!((pages.len(), refused.status().as_u16()), (16, 503));
        let payload = format!("TYPED{}", "x".repeat(9_000));
        let form = format!("decision=approve&call=c&digest=&comment=Mine&payload={payload}");
        let mut draft = task::spawn(local.post(&small, &form));
        assert_pending!(draft.poll());
        drop(gate);
        let (answer, shown) = ends(future::join(draft, future::join_all(pages))).await;
        assert!(shown.into_iter().all(|page| page.unwrap().status() == 200));
        assert_eq!(answer.as_ref().unwrap().status(), 503);
        assert!(
            answer
                .as_ref()
                .unwrap()
                .headers()
                .contains_key("retry-after")
        );
        let shown = text(answer).await;
        assert!(shown.contains("Your decision was not recorded"), "{shown}");
        assert_eq!(hidden(&shown, "payload"), payload);
        assert_eq!(hidden(&shown, "comment"), "Mine");
        assert!(other.await.unwrap().is_err());
    });
}

#[test]
fn a_page_that_is_being_rendered_is_answered_before_the_server_stops() {
    on_one_thread_each(async {
        let store = Faulty::new(MemoryStore::new(), Mood::Well);
        let service = HitlService::builder(store.clone()).inbox(Inbox::new());
        let service = service.build().unwrap();
        let server = Server::bind("127.0.0.1:0").await.unwrap();
        let addr = server.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let link = service.issue_sign_in_path().unwrap();
        let ended = tokio::spawn(server.serve(service, async move { _ = stopped.await }));
        let code = link.split_once('?').unwrap().1.to_owned();
        let signed_in = Call::new(addr, "POST", "/sign-in")
            .body(code)
            .header("Content-Type", "application/x-www-form-urlencoded");
        let signed_in = signed_in.send().await;
        let cookie = signed_in.header("set-cookie").unwrap().to_owned();
        let cookie = cookie.split(';').next().unwrap();
        let submitted =
            Call::post(addr, "actions", "k").json(json!({"a": vec![7; 20_000]}).to_string());
        let id = submitted.send().await.request_id();

        let (gate, other) = hold_thread();
        let before = store.asked();
        let page = Call::new(addr, "GET", format!("/actions/{id}")).header("Cookie", cookie);
        let page = tokio::spawn(page.send());
        // One looks for the tenant, and one for the action.
        ends(async {
            while store.asked() < before + 2 {
                yield_now().await;
            }
        })
        .await;
        stop.send(()).unwrap();
        drop(gate);
        let page = html(&ends(page).await.unwrap());
        assert_eq!(page.matches("7,\n").count(), 19_999);
        assert!(ends(ended).await.unwrap().unwrap().is_drained());
        assert!(other.await.unwrap().is_err());
    });
}

#[tokio::test]
async fn several_approvals_reach_the_store_together_and_are_answered_in_their_order() {
    let store = Faulty::new(Disk::default(), Mood::Well);
    let desk = desk_with(store.clone(), |service| {
        let keys = Keys::parse(&key_file()).unwrap();
        service.auth(Auth::keys(keys)).store_timeout(HANG)
    });
    let desk = desk.await;
    let mut ids = Vec::new();
    for number in 0..20 {
        let key = format!("k-{number}");
        ids.push(desk.submit(&key, &json!({}), AGENT).await);
    }
    ids.reverse();
    let cookie = desk.sign_in("reviewer-key").await;
    let picked: Vec<String> = ids.iter().map(|id| format!("{id}:")).collect();
    let mut fields = vec![("call", "c")];
    fields.extend(picked.iter().map(|action| ("action", action.as_str())));
    store.set(Mood::Hangs);
    let before = store.asked();
    let several = desk.post("/", &fields).header("Cookie", &cookie);
    let several = tokio::spawn(several.send());
    ends(async {
        while store.asked() < before + 16 {
            yield_now().await;
        }
    })
    .await;
    store.set(Mood::Well);
    for _ in 0..16 {
        store.release();
    }
    let reply = ends(several).await.unwrap();
    let answers: Vec<_> = ids.iter().map(|id| format!("a={id}.recorded")).collect();
    let expected = format!("/decided?{}", answers.join("&"));
    assert_eq!(reply.header("location"), Some(&*expected));
    let told = follow(&desk, &reply, &cookie).await;
    assert!(told.contains("20 of 20 recorded"), "{told}");
}

/// The cookies that an answer sets, each of which is expired.
fn expired(reply: &Reply) -> Vec<String> {
    let set = reply.headers.get_all("set-cookie").iter();
    set.map(|cookie| cookie.to_str().unwrap().to_owned())
        .inspect(|cookie| assert!(cookie.starts_with("aegis=; Max-Age=0; Path=/"), "{cookie}"))
        .collect()
}

#[tokio::test]
async fn who_is_signed_out_by_another_pages_cookie_is_told_and_rid_of_it() {
    let (desk, _keys) = keyed().await;
    let own = desk.sign_in("reviewer-key").await;
    let others = desk.sign_in("reader-key").await;
    let get = |path: &str, cookie: &str| {
        let call = desk.get(path).host("aegis.team.example:8000");
        call.header("Cookie", cookie)
    };
    let both = format!("{own}; {others}");
    let reply = get("/actions/x", &both).send().await;
    let to = reply.header("location").unwrap();
    assert_eq!(
        (reply.status, to),
        (303, "/sign-in?next=%2Factions%2Fx&why=several")
    );
    let expired = expired(&reply);
    for part in [
        "Path=/; HttpOnly",
        "Path=/actions",
        "Path=/actions/x",
        "Path=/; Domain=aegis.team.example",
        "Path=/actions; Domain=team.example",
    ] {
        let is_there = expired.iter().any(|cookie| cookie.contains(part));
        assert!(is_there, "{part} {expired:?}");
    }
    assert!(
        !expired
            .iter()
            .any(|cookie| cookie.ends_with("Domain=example"))
    );
    let page = html(&desk.get(to).send().await);
    assert!(page.contains("sent several session cookies"), "{page}");
    // Who opens the page itself is told too.
    let reply = get("/sign-in", &both).send().await;
    assert!(html(&reply).contains("sent several session cookies"));
    assert!(reply.headers.get_all("set-cookie").iter().count() > 1);
    // One that stands alone may be of another domain, and would stand beside the new one.
    let reply = desk.post("/sign-in", &[("key", "reviewer-key")]);
    let reply = reply.header("Cookie", "aegis=00").send().await;
    let mut set = reply.headers.get_all("set-cookie").iter();
    let first = set.next().unwrap().to_str().unwrap();
    assert!(first.starts_with("aegis=") && !first.contains("Max-Age=0"));
    assert!(set.all(|cookie| {
        cookie
            .to_str()
            .unwrap()
            .starts_with("aegis=; Max-Age=0; Path=/sign-in")
    }));
}

#[tokio::test]
async fn who_has_a_session_that_is_over_is_told_and_nobody_else() {
    let desk = keyless().await;
    let get = |path: &str, cookie: &str| desk.get(path).header("Cookie", cookie);
    let reply = get("/", "aegis=00").send().await;
    let to = reply.header("location").unwrap();
    assert_eq!(to, "/sign-in?next=%2F&why=over");
    // It may be the session of a server on another port.
    assert_eq!(reply.header("set-cookie"), None);
    for told in [get(to, "a=b"), get("/sign-in", "aegis=00")] {
        let page = html(&told.send().await);
        assert!(page.contains("Your session is over"), "{page}");
    }
    let own = desk.open().await;
    for cookie in [&*own, "a=b", "aegis="] {
        let page = html(&get("/sign-in", cookie).send().await);
        assert!(!page.contains("class=\"notice"), "{cookie} {page}");
    }
    let reply = get("/", "aegis=").send().await;
    assert_eq!(reply.header("location"), Some("/sign-in?next=%2F"));
    let page = html(&get("/sign-in?why=%3Cb%3E", "a=b").send().await);
    assert!(!page.contains("class=\"notice"), "{page}");
}
