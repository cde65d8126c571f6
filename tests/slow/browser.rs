//! The pages in a real browser: Chromium, driven by ChromeDriver over the WebDriver protocol, at the widths of a desk and
//! of a phone, light and dark. Needs `chromium` and `chromedriver` (Debian: `apt-get install chromium chromium-driver`).
//! Pictures of every page go to the directory for temporary files of the build.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use medtune::stage::report::{html, numbers};
use serde_json::{Value, json};

/// A running browser with its driver; both end with it.
struct Browser {
    driver: Child,
    http: reqwest::blocking::Client,
    session: String,
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.http.delete(&self.session).send();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

impl Browser {
    fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let program = std::env::var("CHROMEDRIVER").unwrap_or_else(|_| "chromedriver".into());
        let mut driver = Command::new(&program)
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{program}: {e}; install chromium-driver or name it in CHROMEDRIVER"));
        let lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = lines
            .map_while(Result::ok)
            .find_map(|l| l.split_once("successfully on port ")?.1.trim_end_matches('.').parse::<u16>().ok())
            .expect("the driver says its port");
        let http = reqwest::blocking::Client::builder().no_proxy().timeout(None).build().unwrap();
        let mut browser = Self { driver, http, session: format!("http://127.0.0.1:{port}") };
        let started = browser.post(
            "session",
            &json!({"capabilities": {"alwaysMatch": {
                "browserName": "chrome",
                "goog:chromeOptions": {"args": [
                    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"
                ]},
                "goog:loggingPrefs": {"browser": "ALL"},
            }}}),
        );
        browser.session = format!("{}/session/{}", browser.session, started["sessionId"].as_str().unwrap());
        browser
    }

    fn post(&self, what: &str, body: &Value) -> Value {
        let answer: Value =
            self.http.post(format!("{}/{what}", self.session)).json(body).send().unwrap().json().unwrap();
        assert!(answer["value"]["error"].is_null(), "{what}: {}", answer["value"]);
        answer["value"].clone()
    }

    fn run(&self, script: &str) -> Value {
        self.post("execute/sync", &json!({"script": script, "args": []}))
    }

    fn devtools(&self, command: &str, parameters: Value) {
        self.post("goog/cdp/execute", &json!({"cmd": command, "params": parameters}));
    }

    fn open(&self, page: &Path, width: u32, dark: bool) {
        let scheme = if dark { "dark" } else { "light" };
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}),
        );
        self.devtools(
            "Emulation.setEmulatedMedia",
            json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
        );
        self.post("url", &json!({"url": format!("file://{}", page.display())}));
    }

    fn picture(&self, to: &Path) {
        let height = self.run("return document.documentElement.scrollHeight").as_f64().unwrap();
        let width = self.run("return innerWidth").as_f64().unwrap();
        let picture = self.post(
            "goog/cdp/execute",
            &json!({"cmd": "Page.captureScreenshot", "params": {
                "captureBeyondViewport": true,
                "clip": {"x": 0, "y": 0, "width": width, "height": height.min(9000.0), "scale": 1}
            }}),
        );
        std::fs::write(to, STANDARD.decode(picture["data"].as_str().unwrap()).unwrap()).unwrap();
    }
}

/// What sticks out of the page, is broken, or can hardly be read. Tables and code may scroll in their own box.
const PROBLEMS: &str = r##"
const problems = [];
const wide = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > wide + 1) problems.push(`page is ${document.documentElement.scrollWidth} wide, window ${wide}`);
const boxed = e => e.closest(".scroll, pre, svg, .stack");
const shown = e => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
for (const e of document.querySelectorAll("main *")) {
  if (!shown(e) || boxed(e)) continue;
  const r = e.getBoundingClientRect();
  if (r.right > wide + 1 || r.left < -1) problems.push(`sticks out: ${e.tagName} ${e.className} ${Math.round(r.right)}`);
}
for (const i of document.images) if (shown(i) && !(i.complete && i.naturalWidth > 0)) problems.push(`broken image ${i.alt}`);
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.getBoundingClientRect();
  if (box.width < 40 || box.height < 40) problems.push("empty figure");
  for (const t of svg.querySelectorAll("text")) {
    const r = t.getBoundingClientRect();
    if (r.left < box.left - 2 || r.right > box.right + 2 || r.bottom > box.bottom + 3) problems.push(`figure cuts off: ${t.textContent}`);
  }
}
const said = document.body.innerText;
for (const word of ["undefined", "NaN", "[object", "{{", "{%"]) if (said.includes(word)) problems.push(`says ${word}`);
const parse = c => (c.match(/[\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => { const f = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
const paper = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > .9) return c; } return [255, 255, 255]; };
for (const e of document.querySelectorAll("main *")) {
  if (!shown(e) || e.closest("svg") || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
  const [a, b] = [light(parse(getComputedStyle(e).color)), light(paper(e))].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) problems.push(`contrast ${((a + .05) / (b + .05)).toFixed(2)}: ${e.tagName}.${e.className} ${e.textContent.slice(0, 30)}`);
}
return [...new Set(problems)].slice(0, 20);
"##;

/// Types into the search box and says which cards are left.
const SEARCH: &str = r##"
const search = document.getElementById("search");
const type = words => { search.value = words; search.dispatchEvent(new Event("input", {bubbles: true})); };
const visible = () => [...document.querySelectorAll(".card")].filter(c => c.getClientRects().length > 0);
const cards = [...document.querySelectorAll(".card")];
const word = cards[cards.length - 1].querySelector(".q").textContent.trim().split(/\s+/).pop();
const before = visible().length;
type(word);
const found = visible();
const all = cards.filter(c => c.textContent.toLowerCase().includes(word.toLowerCase())).length;
const right = found.every(c => c.textContent.toLowerCase().includes(word.toLowerCase()));
type("zzz no such words");
const none = visible().length, nothing = !document.getElementById("nothing").hidden;
type("");
const button = [...document.querySelectorAll("#controls button")].find(b => b.dataset.filter && !b.hidden);
button.click();
const filtered = visible().every(c => c.dataset.class === button.dataset.filter) && visible().length > 0;
document.querySelector("#controls button[data-filter='']").click();
return {before, found: found.length, all, right, none, nothing, filtered, after: visible().length};
"##;

fn pages(dir: &Path) -> Vec<(String, PathBuf, bool)> {
    let mut pages = Vec::new();
    let mut add = |name: &str, text: String, cards: bool| {
        let path = dir.join(format!("{name}.html"));
        std::fs::write(&path, text).unwrap();
        pages.push((name.to_string(), path, cards));
    };
    let images = dir.join("images");
    std::fs::create_dir_all(&images).unwrap();
    let inputs = crate::report::phantom_run(&images, 40);
    add("report", html(&inputs, &numbers(&inputs).unwrap()).unwrap(), true);
    let inputs = crate::report::vqa_run(60);
    add("report-vqa", html(&inputs, &numbers(&inputs).unwrap()).unwrap(), true);
    add("ablation", medtune::ablate::html(&crate::report::ablation()).unwrap(), false);
    let out = crate::score::scored_page(dir);
    add("score", std::fs::read_to_string(out).unwrap(), true);
    pages
}

#[test]
fn pages_are_whole_and_legible_in_a_browser() {
    let dir = tempfile::tempdir().unwrap();
    let pictures = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("pages");
    std::fs::create_dir_all(&pictures).unwrap();
    let browser = Browser::start();
    let mut bad = Vec::new();
    for (name, page, cards) in pages(dir.path()) {
        for (width, dark) in [(1280, false), (1280, true), (390, false), (390, true)] {
            browser.open(&page, width, dark);
            let scheme = if dark { "dark" } else { "light" };
            let here = format!("{name} at {width}, {scheme}");
            browser.picture(&pictures.join(format!("{name}-{width}-{scheme}.png")));
            let problems = browser.run(PROBLEMS);
            bad.extend(problems.as_array().unwrap().iter().map(|p| format!("{here}: {p}")));
            let paper = browser.run("return getComputedStyle(document.body).backgroundColor");
            let first: u32 =
                paper.as_str().unwrap().split(|c: char| !c.is_ascii_digit()).find_map(|d| d.parse().ok()).unwrap();
            assert_eq!(first < 128, dark, "{here}: {paper}");
            if cards {
                let s = browser.run(SEARCH);
                let searches = s["right"] == true && s["found"] == s["all"] && s["none"] == 0 && s["nothing"] == true;
                assert!(searches && s["filtered"] == true && s["before"] == s["after"], "{here}: {s}");
            }
        }
        let log = browser.post("se/log", &json!({"type": "browser"}));
        bad.extend(log.as_array().unwrap().iter().filter(|l| l["level"] == "SEVERE").map(|l| format!("{name}: {l}")));
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
