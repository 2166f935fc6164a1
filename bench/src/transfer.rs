//! Bank transfers, closed loop: each client waits for one transfer before it begins the next.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use troth_protocol::ShardId;
use troth_sdk::Client;
use troth_sdk::harness::bank::{Audit, Bank};
use troth_sdk::harness::load::Load;
use troth_sdk::harness::processes::{Processes, Shape, binaries, cpu_of};
use troth_sdk::harness::until_settled;
use troth_sdk::operator::ClusterStatus;

use crate::report::Report;

/// How long the last transfers and the audit may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options of the transfer benchmark.
#[derive(Args)]
pub struct Options {
    /// Coordinators: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    pub coordinators: u16,
    /// Participants.
    #[arg(long, default_value_t = 3)]
    pub nodes: u16,
    /// Replicas of each shard: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    pub replicas: u16,
    /// Shards.
    #[arg(long, default_value_t = 16)]
    pub shards: u16,
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
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let shape = Shape {
        coordinators: options.coordinators,
        nodes: options.nodes,
        replicas: options.replicas,
        shards: options.shards,
    };
    let mut processes = Processes::create(folder.path(), &binaries()?, shape)?;
    processes.start()?;
    let client = Client::connect(processes.client_config()?).await?;
    let bank = Bank::new(&client, options.accounts);
    let opened = bank.open().await?;

    let operator = client.operator();
    let calm = until_settled(&operator, PATIENCE).await?;
    let load = Load::start(&bank, options.clients, 1);
    tokio::time::sleep(Duration::from_secs(options.warmup_seconds)).await;
    let (servers_before, client_before) = (processes.cpu(), cpu_of(std::process::id()));
    drop(load.take_latencies());
    let (begin, before) = (Instant::now(), load.counts());
    tokio::time::sleep(Duration::from_secs(options.seconds)).await;
    let (elapsed, after, histogram) = (begin.elapsed().as_secs_f64(), load.counts(), load.take_latencies());
    let client_cpu = cpu_of(std::process::id()) - client_before;
    let servers_cpu = processes.cpu() - servers_before;
    let committed = after.committed - before.committed;
    let leader_changes = leader_changes(&calm, &operator.status().await);

    let ended = load.stop(PATIENCE).await?;
    if let Some(error) = ended.counts.error {
        eprintln!("a transfer failed: {error}");
    }
    let audit = bank.audit_within(PATIENCE).await?;
    let expected = Audit { accounts: options.accounts as usize, total: opened.total };
    ensure!(audit == expected, "the books do not balance: {audit:?} instead of {expected:?}");

    let per_txn = |cpu: Duration| cpu.as_secs_f64() * 1e6 / committed.max(1) as f64;
    let mut report = Report {
        workload: "transfer",
        coordinators: options.coordinators,
        nodes: options.nodes,
        replicas: options.replicas,
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
    client.close().await;
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
