//! What servers show over HTTP: metrics, and whether they are well.

use std::fs;

use serde_json::Value;
use troth_sdk::harness::processes::{Process, Processes};
use troth_tests::drill::{Drill, Server, THREE};
use troth_tests::{eventually, in_time, page};

/// Asks a server for a page; `None`: it does not answer.
async fn get(drill: &Drill, name: &str, path: &str) -> Option<(u16, String)> {
    let data = drill.cluster.layout().folder().join("data").join(name);
    let address = fs::read_to_string(data.join("http-address")).expect("it says where it listens");
    page::get(&format!("http://{}{path}", address.trim()), None).await
}

async fn ready(drill: &Drill, name: &str) -> (u16, Value) {
    let (status, body) = get(drill, name, "/readyz").await.expect("it answers");
    (status, serde_json::from_str(&body).expect("JSON"))
}

fn shows_itself(process: &Process) {
    let text = fs::read_to_string(process.config()).expect("a configuration");
    fs::write(process.config(), text + "\n[http]\nlisten = \"127.0.0.1:0\"\n").expect("writable");
}

/// The sum of all series of a metric.
fn value(metrics: &str, name: &str) -> Option<f64> {
    let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    let values: Vec<f64> = metrics
        .lines()
        .filter(of_name)
        .map(|line| line.rsplit(' ').next().expect("a value").parse().expect("a number"))
        .collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_server_shows_what_it_counts_and_whether_it_is_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start_with(folder.path(), THREE, async |cluster: &mut Processes| {
        cluster.all_mut().for_each(|process| shows_itself(process));
    })
    .await;
    drill.until_shared().await;
    for number in 0..20 {
        let write = drill.client.transact(async |tx| {
            tx.get(format!("a/{number}")).await?;
            tx.put(format!("a/{number}"), "1")?;
            tx.put(format!("b/{number}"), "1")
        });
        in_time(write).await.expect("it commits");
    }
    let Server::Coordinator(leader) = drill.leading_coordinator().await else {
        unreachable!("a coordinator")
    };

    let mut led = 0.0;
    for id in 1..=3 {
        let name = format!("coordinator-{id}");
        let (status, health) = get(&drill, &name, "/healthz").await.expect("it answers");
        assert_eq!((status, health.as_str()), (200, "ok\n"), "{name}");
        let (status, told) = ready(&drill, &name).await;
        assert_eq!(
            (status, &told["ready"], &told["caught_up"]),
            (200, &Value::from(true), &Value::from(true))
        );
        let role = if id == leader { "leader" } else { "standby" };
        assert_eq!((&told["role"], &told["leader"]), (&Value::from(role), &Value::from(leader)), "{told}");
        let (_, metrics) = get(&drill, &name, "/metrics").await.expect("it answers");
        led += value(&metrics, "troth_leads").expect("it is there");
        assert!(value(&metrics, "troth_log_sync_seconds_count").is_some_and(|count| count > 0.0));
        assert!(value(&metrics, "troth_rocksdb_memtables_bytes").is_some_and(|bytes| bytes > 0.0));
        let expiry = value(&metrics, "troth_certificate_expiry_seconds").expect("it is there");
        assert!(expiry > 1.7e9, "{expiry}");
        if id == leader {
            let committed = "troth_transactions_total{outcome=\"committed\"";
            let line = metrics.lines().find(|line| line.starts_with(committed)).expect("it has committed");
            let count: f64 = line.rsplit(' ').next().and_then(|count| count.parse().ok()).expect("a number");
            assert!(count >= 20.0, "{line}");
            for phase in ["prepare", "decide", "finish"] {
                let count = format!("troth_phase_seconds_count{{phase=\"{phase}\"}}");
                assert!(metrics.contains(&count), "{count}");
            }
            assert_eq!(value(&metrics, "troth_nodes"), Some(3.0));
        }
    }
    assert_eq!(led, 1.0, "one leads");

    let mut shards_led = 0.0;
    for id in 1..=3 {
        let name = format!("participant-{id}");
        let (status, told) = ready(&drill, &name).await;
        assert_eq!((status, &told["state"]), (200, &Value::from("active")), "{told}");
        let (_, metrics) = get(&drill, &name, "/metrics").await.expect("it answers");
        shards_led += value(&metrics, "troth_shards_led").expect("it is there");
        assert_eq!(value(&metrics, "troth_shards"), Some(f64::from(THREE.shards)));
        assert!(value(&metrics, "troth_shard_request_seconds_count").is_some_and(|count| count > 0.0));
    }
    assert_eq!(shards_led, f64::from(THREE.shards), "each shard has one leader");

    // Two of three participants are gone: the third one lives, and cannot do what it is there for.
    for id in [1, 2] {
        drill.process(Server::Participant(id)).kill().expect("it runs");
    }
    eventually("it is not ready any more", async || ready(&drill, "participant-3").await.0 == 503).await;
    let (_, told) = ready(&drill, "participant-3").await;
    assert!(told["leaderless"].as_array().is_some_and(|shards| !shards.is_empty()), "{told}");
    assert_eq!(get(&drill, "participant-3", "/healthz").await.expect("it answers").0, 200);
    drill.end().await;
}
