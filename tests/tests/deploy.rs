//! What `deploy/` holds fits what the servers show.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use troth_sdk::embedded::{Cluster, ClusterConfig};
use troth_tests::{in_time, logging, page, programs};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(path: &str) -> String {
    fs::read_to_string(deploy().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What promtool says of a file; it is on the path or where `scripts/setup tests` puts it.
fn promtool(what: [&str; 2], file: &Path) -> (bool, String) {
    let ours = programs().join("../tools/promtool");
    let tool = if ours.exists() { ours } else { "promtool".into() };
    let ended = Command::new(tool).args(what).arg(file).output();
    let ended = ended.expect("promtool starts; scripts/setup tests brings it");
    let told = [ended.stdout, ended.stderr].concat();
    (ended.status.success(), String::from_utf8_lossy(&told).into_owned())
}

#[test]
fn prometheus_accepts_the_rules_and_each_fires_in_its_own_illness() {
    let folder = deploy().join("prometheus");
    for (what, file) in [
        (["check", "rules"], "troth.rules.yml"),
        (["check", "config"], "prometheus.yml"),
        (["test", "rules"], "troth.rules.test.yml"),
    ] {
        let (accepted, told) = promtool(what, &folder.join(file));
        assert!(accepted, "{file}: {told}");
    }
    let (rules, tests) = (read("prometheus/troth.rules.yml"), read("prometheus/troth.rules.test.yml"));
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 10, "{alerts:?}");
    for alert in alerts {
        assert!(tests.contains(&format!("- name: {alert}\n")), "{alert} is never tested");
    }
}

/// The names of metrics in a text: words that begin as ours do.
fn names(text: &str) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let ours = text.split(word).filter(|word| word.starts_with("troth_") && word.len() > "troth_".len());
    ours.map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_that_rules_and_board_name_is_there() {
    logging();
    let folder = tempfile::tempdir().expect("a folder");
    let config = ClusterConfig { dir: folder.path().to_owned(), http: true, ..ClusterConfig::default() };
    let cluster = in_time(Cluster::start(config)).await.expect("the cluster starts");
    let client = in_time(cluster.client()).await.expect("it gets ready");
    // Some metrics have no series before something has happened.
    let [one, other] = ["a", "b"].map(|key| {
        let client = client.clone();
        async move {
            client
                .transact(async |tx| {
                    tx.get(key).await?;
                    tx.put(format!("{key}/1"), "1")?;
                    tx.put(format!("{key}/2"), "1")?;
                    tx.put(format!("{key}/3"), "1")
                })
                .await
        }
    });
    in_time(one).await.expect("it commits");
    in_time(other).await.expect("it commits");

    let mut shown = BTreeSet::new();
    for name in ["coordinator-1", "participant-1", "participant-2", "participant-3"] {
        let address = fs::read_to_string(folder.path().join(format!("data/{name}/http-address")));
        let address = address.expect("it says where it listens");
        let url = format!("http://{}/metrics", address.trim());
        let (status, text) = page::get(&url, None).await.expect("it answers");
        assert_eq!(status, 200);
        shown.extend(text.lines().filter(|line| !line.starts_with('#')).flat_map(names));
    }
    let rules = names(&read("prometheus/troth.rules.yml"));
    let board = read("grafana/troth.json");
    let named = names(&board);
    let known: Value = serde_json::from_str(&board).expect("JSON");
    assert!(known["panels"].as_array().is_some_and(|panels| panels.len() > 20));
    assert!(rules.len() > 15 && named.len() > 30, "they name many");
    let missing: Vec<&String> = rules.union(&named).filter(|name| !shown.contains(*name)).collect();
    assert!(missing.is_empty(), "no server shows {missing:?}");
    client.close().await;
    cluster.shutdown().await;
}

#[test]
fn prometheus_asks_where_the_servers_of_the_example_are() {
    let (example, asked) = (read("../docs/operations.md"), read("prometheus/prometheus.yml"));
    for (flag, own) in [("--coordinator", 7450), ("--participant", 7461)] {
        for machine in 1..=3 {
            assert!(example.contains(&format!("{flag} 10.0.0.{machine}:{own}")), "{flag} {machine}");
            let http = own + troth_sdk::layout::HTTP_PORT_DISTANCE;
            assert!(asked.contains(&format!("\"10.0.0.{machine}:{http}\"")), "{flag} {machine}");
        }
    }
}

#[test]
fn units_start_what_is_built_and_configured() {
    for role in ["coordinator", "participant"] {
        let unit = read(&format!("systemd/troth-{role}@.service"));
        let start = format!("ExecStart=/usr/local/bin/troth-{role} --config /etc/troth/%i.toml\n");
        assert!(unit.contains(&start), "{unit}");
    }
}
