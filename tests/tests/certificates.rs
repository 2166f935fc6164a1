//! Certificates and their authority are renewed while servers serve and clients work; a client that is revoked is sent
//! away.

use std::fs;
use std::time::{Duration, Instant};

use troth_protocol::net::tls::CERTIFICATE_VALIDITY;
use troth_sdk::harness::processes::{Processes, Shape};
use troth_sdk::{Client, ClientConfig, Role};
use troth_tests::ledger::{Findings, Writers};
use troth_tests::{PATIENCE, eventually, in_time, processes};

const SHAPE: Shape = Shape { coordinators: 3, nodes: 3, replicas: 3, shards: 6 };

/// How many transactions are acknowledged between two changes.
const BETWEEN: usize = 100;

/// Within this a revoked client is refused.
const REVOKED_WITHIN: Duration = Duration::from_secs(10);

/// Waits until all servers have renewed what they show and believe so often.
async fn until_renewed(cluster: &mut Processes, times: u32) {
    let logs: Vec<_> = cluster.all_mut().map(|process| process.log().to_owned()).collect();
    let word = format!("times={times}");
    eventually("all servers have renewed their certificates", async || {
        let renewed = |log: &std::path::PathBuf| {
            let text = fs::read_to_string(log).unwrap_or_default();
            text.lines().any(|line| line.contains("the certificates were renewed") && line.ends_with(&word))
        };
        logs.iter().all(renewed)
    })
    .await;
}

/// Every server and client gets another certificate by the authority that issues now.
fn renew_all(cluster: &Processes) {
    let layout = cluster.layout();
    let authority = layout.authority().expect("it is there");
    let servers =
        [Role::Coordinator, Role::Participant].into_iter().flat_map(|role| (1..=3).map(move |id| (role, id)));
    let names = servers.map(|(role, id)| (role, format!("{role}-{id}")));
    let clients = [Role::Client, Role::Admin].map(|role| (role, role.name().to_owned()));
    for (role, name) in names.chain(clients) {
        layout.renew(&authority, role, &name, CERTIFICATE_VALIDITY).expect("issued");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_and_their_authority_are_renewed_under_load() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut cluster, client) = processes(folder.path(), SHAPE).await;
    let writers = Writers::start(&client, 4);
    let more = async || {
        let before = writers.count();
        eventually("transactions go on", async || writers.count() >= before + BETWEEN).await;
    };
    more().await;
    for times in [1, 2] {
        renew_all(&cluster);
        until_renewed(&mut cluster, times).await;
        more().await;
    }
    cluster.layout().renew_authority().expect("written");
    until_renewed(&mut cluster, 3).await;
    more().await;
    renew_all(&cluster);
    until_renewed(&mut cluster, 4).await;
    // The clients of this process look as often as servers do, and once more is enough for all of them.
    more().await;
    let fresh = async |cluster: &Processes| {
        let mut config = cluster.client_config().expect("certificates");
        config.timeout = PATIENCE / 2;
        in_time(Client::connect(config)).await.expect("it connects")
    };
    let renewed = fresh(&cluster).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    cluster.layout().retire_authorities().expect("written");
    until_renewed(&mut cluster, 5).await;
    more().await;
    // New connections are made with what counts now.
    let stranger = fresh(&cluster).await;
    for process in &mut cluster.coordinators {
        assert!(process.stop(PATIENCE).expect("it stops").success());
        process.start().expect("started");
        more().await;
    }
    let ledger = writers.stop().await;
    assert_eq!(ledger.failed, 0, "no transaction fails");
    assert_eq!(ledger.audit(&stranger).await, Findings::default());
    for client in [client, renewed, stranger] {
        client.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_client_is_sent_away_and_others_stay() {
    let folder = tempfile::tempdir().expect("a folder");
    let (cluster, client) = processes(folder.path(), SHAPE).await;
    let layout = cluster.layout();
    let authority = layout.authority().expect("it is there");
    layout.issue(&authority, Role::Client, "leaver", CERTIFICATE_VALIDITY).expect("issued");
    let credentials = layout.credentials("leaver").load().expect("well-formed");
    let mut config = ClientConfig::new(cluster.addresses().to_vec(), credentials);
    config.timeout = Duration::from_secs(2);
    let leaver = in_time(Client::connect(config.clone())).await.expect("it connects");
    in_time(leaver.transact(async |tx| tx.put("key", "value"))).await.expect("it may");
    let revoked = Instant::now();
    layout.revoke(&authority, "leaver").expect("written");
    eventually("it is refused", async || leaver.transact(async |tx| tx.put("key", "other")).await.is_err())
        .await;
    assert!(revoked.elapsed() < REVOKED_WITHIN, "{:?}", revoked.elapsed());
    let refused = in_time(Client::connect(config)).await.map(drop).expect_err("it is refused");
    println!("{refused}");
    assert!(refused.to_string().contains("revoked"), "{refused}");
    in_time(client.transact(async |tx| tx.put("key", "mine"))).await.expect("the others may");
    for client in [client, leaver] {
        client.close().await;
    }
}
