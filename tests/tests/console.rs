//! The console: whom it shows the cluster to, and what a browser makes of it.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use troth_sdk::harness::processes::Processes;
use troth_sdk::operator::FaultPoint;
use troth_tests::drill::{Drill, Server, THREE};
use troth_tests::page::{Browser, Picture, Window, get};
use troth_tests::{eventually, in_time};

const TOKEN: &str = "0123456789abcdefABCDEF";

/// The colours of the first three nodes.
const COLOURS: [[u8; 3]; 3] = [[0x00, 0x72, 0xb2], [0xe6, 0x9f, 0x00], [0x00, 0x9e, 0x73]];

/// Each of three nodes leads a part of the ring. What a node leads is known when it has said so.
const LED: &str = "document.querySelectorAll('#ring .node:has(path.lead)').length === 3";

async fn start(folder: &tempfile::TempDir) -> Drill {
    let drill = Drill::start_with(folder.path(), THREE, async |cluster: &mut Processes| {
        for (process, id) in cluster.coordinators.iter().zip(1..) {
            let token = process.config().with_file_name(format!("token-{id}"));
            fs::write(&token, format!("{TOKEN}\n")).expect("writable");
            let text = fs::read_to_string(process.config()).expect("a configuration");
            let http = format!("{text}\n[http]\nlisten = \"127.0.0.1:0\"\nconsole_token = \"token-{id}\"\n");
            fs::write(process.config(), http).expect("writable");
        }
    })
    .await;
    drill.until_shared().await;
    drill
}

fn address(drill: &Drill, coordinator: u64) -> String {
    let data = drill.cluster.layout().folder().join(format!("data/coordinator-{coordinator}"));
    let address = fs::read_to_string(data.join("http-address")).expect("it says where it listens");
    format!("http://{}", address.trim())
}

async fn overview(drill: &Drill, coordinator: u64) -> Option<Value> {
    let url = address(drill, coordinator) + "/console/overview";
    match get(&url, Some(TOKEN)).await {
        Some((200, body)) => Some(serde_json::from_str(&body).expect("JSON")),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_console_shows_the_cluster_to_whoever_knows_the_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = start(&folder).await;
    let Server::Coordinator(leader) = drill.leading_coordinator().await else {
        unreachable!("a coordinator")
    };
    let cluster = drill.client.map().cluster.to_string();
    for id in 1..=3 {
        let at = address(&drill, id);
        let (status, page) = get(&format!("{at}/console"), None).await.expect("it answers");
        assert!(status == 200 && page.contains("<title>Troth</title>") && !page.contains(&cluster));
        assert_eq!(get(&format!("{at}/nothing"), None).await.expect("it answers").0, 404);
        for token in [None, Some(""), Some("0123456789abcdefABCDEG"), Some("0123456789abcdef")] {
            for path in ["overview", "events"] {
                let (status, body) = get(&format!("{at}/console/{path}"), token).await.expect("it answers");
                assert!(status == 401 && !body.contains(&cluster), "{token:?} {path}: {status} {body}");
            }
        }
        let now = overview(&drill, id).await.expect("it knows the leader");
        assert_eq!((&now["leader"], &now["shown_by"]), (&Value::from(leader), &Value::from(id)));
        assert_eq!(now["cluster"], Value::from(cluster.clone()));
        let shards = now["shards"].as_array().expect("shards");
        assert_eq!(shards.len(), usize::from(THREE.shards));
    }
    // Who follows it must not keep a server from stopping.
    let url = address(&drill, leader) + "/console/events";
    let follower = tokio::task::spawn_blocking(move || follow(&url));
    let mut lines = follower.await.expect("no panic");
    let mut events = 0;
    while events < 3 {
        events += usize::from(lines.next().expect("it goes on").expect("readable").starts_with("data:"));
    }
    // Nor must who has not even said what it wants.
    let mut mute = std::net::TcpStream::connect(address(&drill, leader).trim_start_matches("http://"));
    std::io::Write::write_all(mute.as_mut().expect("connected"), b"GET /heal").expect("sent");
    let began = Instant::now();
    let patience = Duration::from_secs(20);
    let status = drill.process(Server::Coordinator(leader)).stop(patience).expect("it stops");
    assert!(status.success() && began.elapsed() < patience, "{status}");
    // Another one leads, and shows it.
    let other = leader % 3 + 1;
    eventually("another one shows the cluster", async || {
        overview(&drill, other).await.is_some_and(|now| now["leader"] != leader)
    })
    .await;
    drill.end().await;
}

/// The lines of what a server sends, as they come.
fn follow(url: &str) -> impl Iterator<Item = std::io::Result<String>> + Send + use<> {
    use std::io::BufRead;
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_connect(Some(Duration::from_secs(5))).build().into();
    let answer =
        agent.get(url).header("Authorization", format!("Bearer {TOKEN}")).call().expect("it answers");
    std::io::BufReader::new(answer.into_body().into_reader()).lines()
}

/// Whether a picture shows a ring of which each of three nodes leads a part.
fn shows_a_ring(picture: &Picture) -> bool {
    COLOURS.iter().all(|colour| picture.share(*colour) > 0.01)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browser_draws_the_ring_and_what_happens_to_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = start(&folder).await;
    let browser = Browser::start(Window::Desk).await;
    let url = address(&drill, 1) + "/console";

    // Without the token it asks for it; a wrong one is refused.
    browser.open(&url).await;
    browser.until("!document.getElementById('ask').hidden").await;
    browser.enter("#token", "not the token of it").await;
    browser.until("document.getElementById('refused').textContent.includes('not the token')").await;
    browser.enter("#token", TOKEN).await;
    browser.until(LED).await;
    browser.until("document.querySelectorAll('#ring path.lead').length === 6").await;
    let cells = "return [...document.querySelectorAll('#ring path.lead')].map((c) => +c.dataset.shard).sort((a, b) => a - b)";
    let every: Vec<u16> = (0..THREE.shards).collect();
    assert_eq!(browser.run(cells).await, Value::from(every), "each shard has one leader");
    assert!(shows_a_ring(&browser.picture("#ring", "console").await), "the ring is drawn");

    // The check can fail: without the ring it does.
    browser.run("window.ring = () => {}; document.getElementById('ring').replaceChildren()").await;
    assert!(!shows_a_ring(&browser.picture("#ring", "console-without-ring").await));

    // The token in the address works as well, and does not stay there.
    browser.run("sessionStorage.clear()").await;
    browser.open(&format!("{url}#token={TOKEN}")).await;
    browser.until(LED).await;
    assert_eq!(browser.run("return location.hash").await, Value::from(""));

    // A transaction in doubt, and who waits for it.
    let leader = drill.leading_coordinator().await;
    let [(first, _), (second, _)] = drill.two_keys("doubt").await;
    drill.hold_at(leader, FaultPoint::BeforeDecide, 0).await;
    let (client, keys) = (drill.client.clone(), [first.clone(), second]);
    let writer = tokio::spawn(async move {
        let write = client.transact(async |tx| {
            for key in &keys {
                tx.get(key).await?;
                tx.put(key, "1")?;
            }
            Ok::<_, troth_sdk::Error>(())
        });
        in_time(write).await
    });
    let (client, key) = (drill.client.clone(), first.clone());
    eventually("the transaction is prepared", async || {
        drill.operator.in_doubt().await.is_ok_and(|records| !records.is_empty())
    })
    .await;
    let reader = tokio::spawn(async move { in_time(client.begin()).await?.get(key).await });
    browser
        .until(&format!("document.getElementById('doubt').textContent.includes('1 read') && document.getElementById('doubt').textContent.includes('{first}')"))
        .await;
    browser.picture("#doubt", "console-doubt").await;
    drill.release(leader).await;
    writer.await.expect("no panic").expect("it commits");
    let read = reader.await.expect("no panic").expect("it is answered");
    assert!(read.is_none_or(|value| value == "1"));

    // A node joins, and its shards are on their way.
    for id in 1..=3 {
        drill.hold_at(Server::Participant(id), FaultPoint::BeforeChange, 0).await;
    }
    drill.join().await;
    browser.until("document.querySelectorAll('#ring path.arriving').length > 0").await;
    browser.until("document.querySelectorAll('#moves progress, #moves tbody tr').length > 0").await;
    browser.picture("#ring", "console-moving").await;
    for id in 1..=3 {
        drill.release(Server::Participant(id)).await;
    }
    drill.until_placed().await;
    browser.until("document.querySelectorAll('#ring .node').length === 4 && !document.querySelector('#ring path.arriving')").await;

    // One dies.
    drill.process(Server::Participant(2)).kill().expect("it runs");
    browser.until("document.getElementById('ring').textContent.includes('✕ n2')").await;
    browser.until("document.querySelectorAll('#elections tbody tr').length > 0").await;
    let client = drill.client.clone();
    let writer = tokio::spawn(async move {
        loop {
            in_time(client.transact(async |tx| tx.put("chart", "1"))).await.expect("it commits");
        }
    });
    for chart in ["tps", "latency"] {
        let drawn = "some((line) => line.points.numberOfItems > 2)";
        browser.until(&format!("[...document.querySelectorAll('#{chart} polyline')].{drawn}")).await;
    }
    writer.abort();
    browser.end().await;
    drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_fits_a_phone() {
    let folder = tempfile::tempdir().expect("a folder");
    let drill = start(&folder).await;
    let browser = Browser::start(Window::Phone).await;
    browser.open(&format!("{}/console#token={TOKEN}", address(&drill, 2))).await;
    browser.until(LED).await;
    assert!(shows_a_ring(&browser.picture("#ring", "console-phone").await), "the ring is drawn");
    let wide = browser.run("return [document.documentElement.scrollWidth, window.innerWidth]").await;
    assert_eq!(wide, serde_json::json!([390, 390]), "nothing sticks out");
    browser.end().await;
    drill.end().await;
}
