//! What servers show over HTTP: asked for, and looked at in a browser.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use fantoccini::wd::Capabilities;
use fantoccini::{Client as Session, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::{PATIENCE, in_time, programs};

/// Asks a server for a page, with a token if there is one; `None`: it does not answer.
pub async fn get(url: &str, token: Option<&str>) -> Option<(u16, String)> {
    let (url, token) = (url.to_owned(), token.map(|token| format!("Bearer {token}")));
    let ask = move || {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(5)))
            .build()
            .into();
        let request = agent.get(&url);
        let request = match token {
            Some(token) => request.header("Authorization", token),
            None => request,
        };
        let mut answer = request.call().ok()?;
        Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))
    };
    tokio::task::spawn_blocking(ask).await.expect("no panic")
}

/// A headless Chromium, driven by its WebDriver. Both end with this.
pub struct Browser {
    session: Session,
    driver: Child,
    /// Chromium's process.
    process: Pid,
    _profile: tempfile::TempDir,
}

/// A window.
#[derive(Clone, Copy, Debug)]
pub enum Window {
    /// On a desk.
    Desk,
    /// In a hand: 390 by 844 points, three pixels each.
    Phone,
}

impl Browser {
    /// Starts one.
    pub async fn start(window: Window) -> Browser {
        let missing = "chromedriver starts; scripts/setup tests installs it";
        let profile = tempfile::tempdir().expect("a folder");
        // Whatever it leaves lying goes with the folder.
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .envs(["HOME", "TMPDIR"].map(|name| (name, profile.path())))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect(missing);
        let mut lines = BufReader::new(driver.stdout.take().expect("piped")).lines();
        let port = loop {
            let line = in_time(lines.next_line()).await.expect("readable").expect("it says its port");
            let port = line.split("started successfully on port ").nth(1);
            if let Some(port) = port.and_then(|rest| rest.trim_end_matches('.').parse::<u16>().ok()) {
                break port;
            }
        };
        let mut options = json!({ "args": [
            "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1400,1400",
            // The pages are our own, and who runs the tests may be root.
            "--no-sandbox",
            format!("--user-data-dir={}", profile.path().display()),
        ] });
        if let Window::Phone = window {
            let metrics = json!({ "width": 390, "height": 844, "pixelRatio": 3.0 });
            options["mobileEmulation"] = json!({ "deviceMetrics": metrics });
        }
        let capabilities: Capabilities = [("goog:chromeOptions".to_owned(), options)].into_iter().collect();
        let mut builder = ClientBuilder::new(HttpConnector::new());
        let url = format!("http://127.0.0.1:{port}");
        let session = in_time(builder.capabilities(capabilities).connect(&url)).await.expect("a session");
        let process = session.capabilities().and_then(|all| all.get("goog:processID")?.as_i64());
        let process = process.and_then(|id| Pid::from_raw(id as i32)).expect("it says its process id");
        Browser { session, driver, process, _profile: profile }
    }

    /// Opens a page.
    pub async fn open(&self, url: &str) {
        in_time(self.session.goto(url)).await.expect("the page is there");
    }

    /// What a script returns.
    pub async fn run(&self, script: &str) -> Value {
        in_time(self.session.execute(script, Vec::new())).await.expect("the script runs")
    }

    /// Waits until an expression is true.
    pub async fn until(&self, expression: &str) {
        let script = format!("return Boolean({expression})");
        let deadline = Instant::now() + PATIENCE;
        while self.run(&script).await != Value::Bool(true) {
            if Instant::now() > deadline {
                let text = self.run("return document.body.innerText").await;
                panic!("not in time: {expression}; the page says {text}");
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Types a text into a field, and Enter.
    pub async fn enter(&self, selector: &str, text: &str) {
        let field = in_time(self.session.find(Locator::Css(selector))).await.expect("the field is there");
        in_time(field.send_keys(&format!("{text}\n"))).await.expect("it takes the text");
    }

    /// Takes a picture of an element, and of the whole page for people to look at.
    pub async fn picture(&self, selector: &str, name: &str) -> Picture {
        let whole = in_time(self.session.screenshot()).await.expect("a picture");
        std::fs::write(pictures().join(format!("{name}.png")), whole).expect("writable");
        let element = in_time(self.session.find(Locator::Css(selector))).await.expect("it is there");
        Picture::read(&in_time(element.screenshot()).await.expect("a picture"))
    }

    /// Ends it.
    pub async fn end(mut self) {
        in_time(self.session.clone().close()).await.expect("it ends");
        in_time(self.driver.kill()).await.expect("it ends");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // A driver that is killed leaves Chromium behind. After `end` there is none.
        if matches!(self.driver.try_wait(), Ok(None)) {
            let _ = kill_process(self.process, Signal::KILL);
        }
    }
}

/// Where pictures are kept: beside the programs.
fn pictures() -> PathBuf {
    let folder = programs().join("pictures");
    std::fs::create_dir_all(&folder).expect("writable");
    folder
}

/// Pixels.
pub struct Picture {
    pixels: Vec<[u8; 3]>,
}

impl Picture {
    fn read(bytes: &[u8]) -> Picture {
        let mut decoder = png::Decoder::new(std::io::Cursor::new(bytes));
        decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
        let mut reader = decoder.read_info().expect("a picture");
        let mut buffer = vec![0; reader.output_buffer_size().expect("a sensible size")];
        let info = reader.next_frame(&mut buffer).expect("a picture");
        let samples = info.color_type.samples();
        assert!(samples >= 3, "a picture in colours: {:?}", info.color_type);
        let pixels = buffer[..info.buffer_size()].chunks_exact(samples).map(|p| [p[0], p[1], p[2]]).collect();
        Picture { pixels }
    }

    /// The share of the pixels that have this colour.
    pub fn share(&self, colour: [u8; 3]) -> f64 {
        let count = self.pixels.iter().filter(|pixel| **pixel == colour).count();
        count as f64 / self.pixels.len().max(1) as f64
    }
}
