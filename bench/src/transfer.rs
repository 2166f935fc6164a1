//! Bank transfers, closed loop: each client waits for one transfer before it begins the next.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clap::Args;
use troth_protocol::ShardId;
use troth_sdk::harness::load::Load;
use troth_sdk::harness::processes::cpu_of;
use troth_sdk::operator::ClusterStatus;

use crate::report::Report;
use crate::scene::{ClusterOptions, PATIENCE, Scene};

/// Options of the transfer benchmark.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    pub cluster: ClusterOptions,
    /// Clients that each wait for one transfer after the other.
    #[arg(long, default_value_t = 64)]
    pub clients: usize,
    /// How long to measure.
    #[arg(long, default_value_t = 10)]
    pub seconds: u64,
    /// How long to run before that.
    #[arg(long, default_value_t = 2)]
    pub warmup_seconds: u64,
    /// Accounts: the more, the less often two transfers meet.
    #[arg(long, default_value_t = 20_000)]
    pub accounts: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Runs it, and checks that no money appeared or vanished.
pub async fn run(options: &Options) -> anyhow::Result<Report> {
    let scene = Scene::start(options.cluster, options.accounts, |_| Ok(())).await?;
    let Scene { processes, operator, bank, calm, .. } = &scene;
    let load = Load::start(bank, options.clients, 1);
    tokio::time::sleep(Duration::from_secs(options.warmup_seconds)).await;
    let (servers_before, client_before) = (processes.cpu(), cpu_of(std::process::id()));
    drop(load.take_latencies());
    let (begin, before) = (Instant::now(), load.counts());
    tokio::time::sleep(Duration::from_secs(options.seconds)).await;
    let (elapsed, after, histogram) = (begin.elapsed().as_secs_f64(), load.counts(), load.take_latencies());
    let client_cpu = cpu_of(std::process::id()) - client_before;
    let servers_cpu = processes.cpu() - servers_before;
    let committed = after.committed - before.committed;
    let leader_changes = leader_changes(calm, &operator.status().await);

    let ended = load.stop(PATIENCE).await?;
    if let Some(error) = ended.counts.error {
        eprintln!("a transfer failed: {error}");
    }
    scene.check_the_books().await?;

    let per_txn = |cpu: Duration| cpu.as_secs_f64() * 1e6 / committed.max(1) as f64;
    let mut report = Report {
        workload: "transfer",
        coordinators: options.cluster.coordinators,
        nodes: options.cluster.nodes,
        replicas: options.cluster.replicas,
        clients: options.clients,
        seconds: elapsed,
        committed,
        tps: committed as f64 / elapsed,
        mean_us: 0.0,
        p50_us: 0,
        p99_us: 0,
        max_us: 0,
        aborts: after.aborted.saturating_sub(before.aborted),
        leader_changes,
        errors: ended.counts.failed + ended.counts.unknown,
        cpu_us_per_txn: per_txn(client_cpu + servers_cpu),
        client_cpu_us_per_txn: per_txn(client_cpu),
    };
    report.latencies(&histogram);
    scene.end().await;
    Ok(report)
}

/// How many leaderships began in between, of the coordinators and of each shard.
fn leader_changes(before: &ClusterStatus, after: &ClusterStatus) -> u64 {
    let count = |was: Option<u64>, is: Option<u64>| u64::from(was.is_none() || was != is);
    let epoch = |status: &ClusterStatus| status.up_coordinators().filter_map(|told| told.epoch).max();
    let leads = |status: &ClusterStatus| -> BTreeMap<ShardId, u64> {
        let shards = status.up_participants().flat_map(|told| &told.shards);
        shards.filter(|shard| shard.serving).map(|shard| (shard.shard, shard.lead)).collect()
    };
    let (was, is) = (leads(before), leads(after));
    let shards = was.iter().map(|(shard, lead)| count(Some(*lead), is.get(shard).copied())).sum::<u64>();
    count(epoch(before).map(|epoch| epoch.0), epoch(after).map(|epoch| epoch.0)) + shards
}
