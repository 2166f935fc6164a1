//! The whole way, on the embedded cluster: real QUIC, real Raft logs, real RocksDB.

use std::time::Duration;

use tokio::time::timeout;
use troth_sdk::embedded::{Cluster, ClusterConfig};
use troth_sdk::{Client, Commit, Error};

const PATIENCE: Duration = Duration::from_secs(60);

async fn cluster(dir: &std::path::Path) -> (Cluster, Client) {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .try_init();
    let config = ClusterConfig { dir: dir.to_owned(), ..ClusterConfig::default() };
    let cluster = timeout(PATIENCE, Cluster::start(config)).await.expect("in time").expect("a cluster");
    let client = timeout(PATIENCE, cluster.client()).await.expect("in time").expect("a client");
    (cluster, client)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_is_read_and_survives_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let (first, client) = cluster(dir.path()).await;
    client
        .transact(async |tx| {
            for number in 0..100 {
                tx.put(format!("key-{number}"), format!("value-{number}"))?;
            }
            Ok::<_, Error>(())
        })
        .await
        .expect("a commit over all shards");
    let tx = client.begin().await.expect("begins");
    tx.put("one", "shard").expect("small");
    assert!(matches!(tx.commit().await, Ok(Commit::Committed { .. })));
    client.close().await;
    timeout(PATIENCE, first.shutdown()).await.expect("stops in time");

    let (second, client) = cluster(dir.path()).await;
    let snapshot = client.snapshot().await.expect("a snapshot");
    for number in 0..100 {
        let value = snapshot.get(format!("key-{number}")).await.expect("readable");
        assert_eq!(value.as_deref(), Some(format!("value-{number}").as_bytes()));
    }
    assert_eq!(snapshot.get("one").await.expect("readable").as_deref(), Some(&b"shard"[..]));
    client.close().await;
    second.shutdown().await;
}
