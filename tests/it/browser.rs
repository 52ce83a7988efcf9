//! The inbox in a real browser: Chromium, driven through its driver.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use aegis_hitl::store::Store;
use fantoccini::elements::Element;
use fantoccini::key::Key;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::inbox::{ACME, AGENT, Desk, keyed, keyless};
use super::support::process::{Process, bound};
use super::support::{Disk, HANG};

const NO_BROWSER: &str =
    "this test needs Chromium and its driver: apt-get install chromium chromium-driver";

/// A browser of this test's own.
struct Browser {
    client: Client,
    // The browser ends with its driver: the pipe between them is closed.
    _driver: Process,
    _profile: TempDir,
}

impl std::ops::Deref for Browser {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

async fn browser() -> Browser {
    let mut driver = Command::new("chromedriver");
    driver.arg("--port=0");
    let mut driver = bound(&driver);
    driver.stdout(Stdio::piped()).stderr(Stdio::null());
    assert!(
        Command::new("chromedriver")
            .arg("--version")
            .output()
            .is_ok_and(|found| found.status.success()),
        "{NO_BROWSER}"
    );
    let mut driver = Process::start(driver);
    let mut port = None;
    for line in BufReader::new(driver.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some((_, found)) = line.split_once("started successfully on port ") {
            port = Some(found.trim_end_matches('.').parse::<u16>().unwrap());
            break;
        }
    }
    let port = port.expect("chromedriver says its port");
    let profile = TempDir::new().unwrap();
    let args = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
        "--host-resolver-rules=MAP evil.example 127.0.0.1",
        &format!("--user-data-dir={}", profile.path().display()),
    ];
    let capabilities = json!({ "goog:chromeOptions": { "args": args } });
    let client = ClientBuilder::new(HttpConnector::new())
        .capabilities(capabilities.as_object().unwrap().clone())
        .connect(&format!("http://127.0.0.1:{port}"))
        .await;
    let client = client.unwrap_or_else(|error| panic!("{NO_BROWSER}: {error}"));
    Browser {
        client,
        _driver: driver,
        _profile: profile,
    }
}

impl Browser {
    async fn open<St>(&self, desk: &Desk<St>, path: &str) {
        let url = format!("http://{}{path}", desk.addr);
        self.goto(&url).await.unwrap();
    }

    async fn one(&self, selector: &str) -> Element {
        let found = self.find(Locator::Css(selector)).await;
        found.unwrap_or_else(|error| panic!("{selector}: {error}"))
    }

    async fn main(&self) -> String {
        self.one("main").await.text().await.unwrap()
    }

    /// Waits until the page shows a text, without a reload of the test's own.
    async fn until_shown(&self, text: &str) {
        let since = Instant::now();
        loop {
            // The page may be on its way to the next one.
            let shown = match self.find(Locator::Css("main")).await {
                Ok(main) => main.text().await.unwrap_or_default(),
                Err(_) => String::new(),
            };
            if shown.contains(text) {
                return;
            }
            assert!(since.elapsed() < HANG, "no '{text}': {shown}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn sign_in<St>(&self, desk: &Desk<St>, key: &str) {
        self.open(desk, "/").await;
        self.one("#key").await.send_keys(key).await.unwrap();
        self.one("main button").await.click().await.unwrap();
        self.until_shown("Waiting for a decision").await;
    }

    async fn sign_in_locally<St: Store>(&self, desk: &Desk<St>) {
        let path = desk.service.issue_sign_in_path().unwrap();
        self.open(desk, &path).await;
        self.one("main button").await.click().await.unwrap();
    }

    async fn run(&self, script: &str) -> Value {
        self.execute(script, Vec::new()).await.unwrap()
    }

    /// Sets the width of the page, and whether the reader prefers dark colors.
    async fn emulate(&self, width: u32, height: u32, scheme: &str) {
        self.set_window_size(width, height).await.unwrap();
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
        });
        for (name, params) in [
            ("Emulation.setEmulatedMedia", media),
            ("Emulation.setDeviceMetricsOverride", metrics),
        ] {
            self.issue_cmd(Devtools { name, params }).await.unwrap();
        }
    }

    async fn screenshot_as(&self, name: &str) {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("inbox");
        fs::create_dir_all(&folder).unwrap();
        let png = self.screenshot().await.unwrap();
        fs::write(folder.join(name).with_extension("png"), png).unwrap();
    }
}

/// A command of Chromium's own protocol.
#[derive(Debug)]
struct Devtools {
    name: &'static str,
    params: Value,
}

impl fantoccini::wd::WebDriverCompatibleCommand for Devtools {
    fn endpoint(
        &self,
        base: &url::Url,
        session: Option<&str>,
    ) -> Result<url::Url, url::ParseError> {
        let session = session.unwrap_or_default();
        base.join(&format!("session/{session}/goog/cdp/execute"))
    }

    fn method_and_body(&self, _: &url::Url) -> (http::Method, Option<String>) {
        let body = json!({ "cmd": self.name, "params": self.params });
        (http::Method::POST, Some(body.to_string()))
    }
}

fn hostile() -> Value {
    json!({
        "to": "\u{202e}moc.elpmaxe@ecila",
        "subject": "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">",
        "body": "All work and no play. ".repeat(9_000),
        "aegis": {"title": "Send <b>mail</b> to everyone", "allow_edit": true},
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reviewer_reads_and_decides_with_nothing_but_a_keyboard() {
    let (desk, _keys) = keyed().await;
    let browser = browser().await;
    browser.sign_in(&desk, "reviewer-key").await;
    assert!(
        browser
            .main()
            .await
            .contains("Nothing waits for a decision.")
    );
    // It appears without a reload.
    let id = desk.submit("k", &hostile(), AGENT).await;
    browser.until_shown("Send <b>mail</b> to everyone").await;
    let press = async |key: Key| {
        let active = browser.active_element().await.unwrap();
        active.send_keys(&key.to_string()).await.unwrap();
    };
    let focus = async || {
        let script = "const it = document.activeElement; return it.id || it.value || it.pathname || it.tagName";
        browser.run(script).await.as_str().unwrap().to_owned()
    };
    let path = format!("/actions/{id}");
    browser.run("document.activeElement.blur()").await;
    let mut seen = Vec::new();
    while focus().await != path {
        press(Key::Tab).await;
        seen.push(focus().await);
        assert!(seen.len() < 30, "{seen:?}");
    }
    press(Key::Enter).await;
    browser.until_shown("About").await;
    let page = browser.main().await;
    assert!(page.contains("\\u{202E}moc.elpmaxe@ecila"), "{page}");
    assert!(page.contains("<script>document.title"));
    assert!(
        page.contains("198000 characters"),
        "the long text is folded"
    );
    assert!(!browser.title().await.unwrap().contains("owned"));
    let source = browser.source().await.unwrap();
    assert!(source.len() > 198_000);
    browser.run("document.activeElement.blur()").await;
    let mut seen = Vec::new();
    while focus().await != "comment" {
        press(Key::Tab).await;
        seen.push(focus().await);
        assert!(seen.len() < 30, "{seen:?}");
    }
    let comment = browser.active_element().await.unwrap();
    comment.send_keys("Fine by me.").await.unwrap();
    while focus().await != "approve" {
        press(Key::Tab).await;
        seen.push(focus().await);
        assert!(seen.len() < 40, "{seen:?}");
    }
    press(Key::Enter).await;
    browser.until_shown("Your approval is on record.").await;
    let page = browser.main().await;
    assert!(page.contains("Approved by alice"), "{page}");
    assert!(page.contains("Fine by me."), "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pressing_twice_going_back_and_another_tab_do_no_harm() {
    let desk = keyless().await;
    let browser = browser().await;
    browser.sign_in_locally(&desk).await;
    let id = desk.submit("k", &json!({"a": 1}), ACME).await;
    let path = format!("/actions/{id}");
    browser.open(&desk, &path).await;
    // A double click sends the form twice.
    let twice = "const button = document.querySelector('button[value=approve]'); button.click(); button.click();";
    browser.run(twice).await;
    browser.until_shown("Your approval is on record.").await;
    browser.back().await.unwrap();
    // The page of then is gone or shown again; either way, what it sends is answered.
    if let Ok(button) = browser.find(Locator::Css("button[value=approve]")).await {
        // Its own script may have taken it away by now.
        let _ = button.click().await;
    }
    browser.until_shown("Approved by local").await;
    let approvals = approvals(&desk, &id).await;
    assert_eq!(approvals, 1);

    // Another tab decides: this one says so, and offers nothing any more.
    let id = desk.submit("k-2", &json!({"a": 2}), ACME).await;
    let path = format!("/actions/{id}");
    browser.open(&desk, &path).await;
    let comment = browser.one("#comment").await;
    comment.send_keys("half a senten").await.unwrap();
    let first = browser.window().await.unwrap();
    let second = browser.new_window(true).await.unwrap().handle;
    browser.switch_to_window(second).await.unwrap();
    browser.open(&desk, &path).await;
    browser
        .one("button[value=reject]")
        .await
        .click()
        .await
        .unwrap();
    browser.until_shown("Your rejection is on record.").await;
    browser.switch_to_window(first).await.unwrap();
    browser.until_shown("Rejected by local").await;
    let left = browser.find_all(Locator::Css("main form")).await.unwrap();
    assert!(left.is_empty());
}

/// How often an approval is in the history of an action.
async fn approvals(desk: &Desk<Disk>, id: &str) -> usize {
    let path = format!("/api/v1/hitl/actions/{id}");
    let call = super::support::Call::new(desk.addr, "GET", path);
    let action = call.header("Tenant-Id", "acme").send().await.json();
    let history = action["history"].as_array().unwrap();
    let approved = |event: &&Value| event["type"] == "action.approved";
    history.iter().filter(approved).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_typed_outlives_news_of_other_actions() {
    let desk = keyless().await;
    let browser = browser().await;
    browser.sign_in_locally(&desk).await;
    let id = desk.submit("k", &hostile(), ACME).await;
    let other = desk.submit("k-2", &json!({"b": 1}), ACME).await;
    browser.open(&desk, &format!("/actions/{id}")).await;
    let comment = browser.one("#comment").await;
    comment.send_keys("half a sentence").await.unwrap();
    browser.one(".edit summary").await.click().await.unwrap();
    desk.submit("k-3", &json!({}), ACME).await;
    browser.open_list_in_another_tab(&desk).await;
    // In the list, what is picked stays picked while an action comes in.
    let pick = format!("#pick-{other}");
    browser.one(&pick).await.click().await.unwrap();
    let latest = json!({"aegis": {"title": "The latest"}});
    desk.submit("k-4", &latest, ACME).await;
    browser.until_shown("The latest").await;
    let checked = format!("return document.querySelector('{pick}').checked");
    assert_eq!(browser.run(&checked).await, json!(true));
    let first = browser.windows().await.unwrap().swap_remove(0);
    browser.switch_to_window(first).await.unwrap();
    let typed = browser.run("return document.getElementById('comment').value");
    assert_eq!(typed.await, json!("half a sentence"));
    let is_open = browser.run("return document.querySelector('.edit').open");
    assert_eq!(is_open.await, json!(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_approved_is_what_the_page_shows_by_then() {
    let desk = keyless().await;
    let browser = browser().await;
    browser.sign_in_locally(&desk).await;
    let body = json!({"to": "a", "aegis": {"allow_edit": true}});
    let id = desk.submit("k", &body, ACME).await;
    browser.open(&desk, &format!("/actions/{id}")).await;
    // The tab is in the background while somebody approves with an edit and the execution fails.
    let away = "dispatchEvent(new PageTransitionEvent('pagehide'))";
    browser.run(away).await;
    let call = async |what: &str, body: Value| {
        let path = format!("/api/v1/hitl/actions/{id}{what}");
        let call = super::support::Call::new(desk.addr, "POST", path);
        let call = call.header("Tenant-Id", "acme").json(body.to_string());
        let reply = call.send().await;
        assert!(reply.status < 300, "{reply:?}");
        reply.json()
    };
    let look = async || {
        let path = format!("/api/v1/hitl/actions/{id}");
        let call = super::support::Call::new(desk.addr, "GET", path);
        call.header("Tenant-Id", "acme").send().await.json()
    };
    let seen = look().await["digest"].clone();
    let edit = json!({"digest": seen, "payload": {"to": "b"}});
    call("/approve", edit).await;
    let claim = call("/claim", json!({"digest": look().await["digest"]})).await;
    let token = &claim["claim"]["token"];
    call("/fail", json!({"token": token, "reason": "No."})).await;
    let back = "dispatchEvent(new PageTransitionEvent('pageshow'))";
    browser.run(back).await;
    browser.until_shown("Payload, as edited").await;
    browser
        .one("button[value=approve]")
        .await
        .click()
        .await
        .unwrap();
    browser.until_shown("Your approval is on record.").await;
    assert_eq!(look().await["edited_payload"], json!({"to": "b"}));
}

impl Browser {
    async fn open_list_in_another_tab<St>(&self, desk: &Desk<St>) {
        let tab = self.new_window(true).await.unwrap().handle;
        self.switch_to_window(tab).await.unwrap();
        self.open(desk, "/?tenant=acme").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_one_time_link_opens_one_browser() {
    let desk = keyless().await;
    let (first, second) = tokio::join!(browser(), browser());
    let path = desk.service.issue_sign_in_path().unwrap();
    first.open(&desk, &path).await;
    second.open(&desk, &path).await;
    first.one("main button").await.click().await.unwrap();
    first
        .until_shown("No agent has submitted anything yet.")
        .await;
    second.one("main button").await.click().await.unwrap();
    second.until_shown("This link was used before").await;
    // The first action shows by itself, even where there was no tenant to follow.
    desk.submit("k", &json!({"aegis": {"title": "The first"}}), ACME)
        .await;
    first.until_shown("acme").await;
    // The cookie is out of reach of scripts.
    assert_eq!(first.run("return document.cookie").await, json!(""));
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_and_hosts_decide_nothing() {
    let desk = keyless().await;
    let browser = browser().await;
    browser.sign_in_locally(&desk).await;
    let id = desk.submit("k", &json!({}), ACME).await;
    let target = format!("http://{}/actions/{id}", desk.addr);
    let page = format!(
        "<!doctype html><title>foreign</title><form method=post action=\"{target}\">\
         <input name=decision value=approve><input name=call value=c><input name=digest>\
         <button>go</button></form>"
    );
    let foreign = serve_one_page(page).await;
    browser.goto(&foreign).await.unwrap();
    browser.one("button").await.click().await.unwrap();
    let since = Instant::now();
    while !browser.source().await.unwrap().contains("another origin") {
        assert!(since.elapsed() < HANG);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A name that was made to resolve to this machine.
    let port = desk.addr.port();
    let rebound = format!("http://evil.example:{port}/actions/{id}");
    browser.goto(&rebound).await.unwrap();
    let source = browser.source().await.unwrap();
    assert!(source.contains("does not answer for the host"), "{source}");
    assert_eq!(approvals(&desk, &id).await, 0);
    // A link on that page leads where it says, though the cookie is not sent along.
    let link = format!("<!doctype html><title>foreign</title><a href=\"{target}\">go</a>");
    let foreign = serve_one_page(link).await;
    browser.goto(&foreign).await.unwrap();
    browser.one("a").await.click().await.unwrap();
    browser.until_shown("About").await;
}

/// Serves a page from an origin of its own, and returns its URL.
async fn serve_one_page(page: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let page = page.clone();
            tokio::spawn(async move {
                let mut head = [0; 8192];
                let _ = stream.read(&mut head).await;
                let len = page.len();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len}\r\n\
                     Connection: close\r\n\r\n{page}"
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    // Another site than the server's, for a browser.
    format!("http://evil.example:{port}/")
}

/// The source of axe-core, the checker of accessibility. It is fetched once and kept with the build.
fn axe() -> &'static str {
    static AXE: LazyLock<String> = LazyLock::new(|| {
        let missing =
            "this test needs axe-core from the npm registry, and npm: apt-get install npm";
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let script = |folder: &Path| -> PathBuf { folder.join("node_modules/axe-core/axe.min.js") };
        let ready = kept.join("axe-4.10");
        if !script(&ready).exists() {
            let made = TempDir::new_in(kept).unwrap();
            let folder = made.path().join("axe");
            fs::create_dir(&folder).unwrap();
            let mut npm = Command::new("npm");
            npm.args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"]);
            npm.arg(&folder).arg("axe-core@4.10");
            let installed = npm.output();
            let installed = installed.unwrap_or_else(|error| panic!("{missing}: {error}"));
            assert!(installed.status.success(), "{missing}: {installed:?}");
            // Another run may have been first, and its copy is as good.
            let moved = fs::rename(&folder, &ready);
            assert!(moved.is_ok() || script(&ready).exists(), "{moved:?}");
        }
        fs::read_to_string(script(&ready)).unwrap()
    });
    &AXE
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_is_accessible_wide_and_narrow_light_and_dark() {
    let desk = keyless().await;
    let browser = browser().await;
    let sign_in = desk.service.issue_sign_in_path().unwrap();
    let hostile = desk.submit("hostile", &hostile(), ACME).await;
    let refund = json!({
        "order": "8841", "amount": 129.9, "currency": "EUR", "to": "maria.lindgren@example.com",
        "aegis": {"title": "Refund order 8841 to Maria Lindgren"},
    });
    desk.submit("refund-8841", &refund, ACME).await;
    let deploy = json!({
        "service": "billing", "version": "4.12.0", "regions": ["eu-west-1", "us-east-1"],
        "notes": "Adds a column to invoices.\nBackfills it in batches of 1,000 rows.",
        "aegis": {"title": "Deploy billing 4.12.0 to production", "allow_edit": true},
    });
    let deploy = desk.submit("deploy-412", &deploy, ACME).await;
    let plain = desk.submit("plain", &json!({}), ACME).await;
    browser.open(&desk, &sign_in).await;
    browser.check("sign-in").await;
    browser.one("main button").await.click().await.unwrap();
    browser.until_shown("Waiting for a decision").await;
    browser.check("list").await;
    browser.open(&desk, &format!("/actions/{hostile}")).await;
    browser.check("payload").await;
    browser.open(&desk, &format!("/actions/{deploy}")).await;
    browser.one(".edit summary").await.click().await.unwrap();
    browser.check("form").await;
    let edit = "const it = document.getElementById('payload'); it.value = it.value.replace('4.12.0', '4.12.1')";
    browser.run(edit).await;
    browser
        .one("button[value=approve]")
        .await
        .click()
        .await
        .unwrap();
    browser.until_shown("Your approval is on record.").await;
    browser.check("edited").await;
    browser.open(&desk, "/?view=not-picked-up").await;
    browser.check("not-picked-up").await;
    browser.open(&desk, "/tenants").await;
    browser.check("tenants").await;
    browser
        .open(
            &desk,
            &format!("/decided?a={plain}.conflict&a={deploy}.recorded"),
        )
        .await;
    browser.check("decided").await;
    browser.open(&desk, "/actions/none").await;
    browser.check("error").await;
}

impl Browser {
    /// Checks the page in each look, and keeps a picture of it.
    async fn check(&self, name: &str) {
        for (look, width, height) in [("wide", 1100, 800), ("phone", 390, 844)] {
            for scheme in ["light", "dark"] {
                self.emulate(width, height, scheme).await;
                self.screenshot_as(&format!("{name}-{look}-{scheme}")).await;
                self.run(axe()).await;
                let script = "const done = arguments[arguments.length - 1];
                    axe.run(document, {resultTypes: ['violations']}).then((found) => done(
                        found.violations
                            .filter((it) => ['serious', 'critical', 'moderate'].includes(it.impact))
                            .map((it) => it.id + ': ' + it.nodes.map((node) => node.html).join(' '))));";
                let found = self.execute_async(script, Vec::new()).await.unwrap();
                assert_eq!(found, json!([]), "{name}, {look}, {scheme}");
                let overflow = "return document.documentElement.scrollWidth - innerWidth";
                let overflow = self.run(overflow).await.as_i64().unwrap();
                assert!(overflow <= 0, "{name}, {look}: wider by {overflow} pixels");
            }
        }
        self.emulate(1100, 800, "light").await;
    }
}
