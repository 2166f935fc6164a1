//! Bank transfers, closed loop: each client waits for one transfer before it begins the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use troth_sdk::Client;
use troth_sdk::harness::bank::{Audit, Bank};
use troth_sdk::harness::processes::{Processes, Shape, binaries, cpu_of};

use crate::report::Report;

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

#[derive(Default)]
struct Counters {
    attempts: AtomicU64,
    committed: AtomicU64,
    errors: AtomicU64,
    stop: AtomicBool,
    measuring: AtomicBool,
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

    let counters = Arc::new(Counters::default());
    let mut clients: JoinSet<Histogram<u64>> = JoinSet::new();
    for _ in 0..options.clients {
        clients.spawn(client_loop(bank.clone(), counters.clone()));
    }
    tokio::time::sleep(Duration::from_secs(options.warmup_seconds)).await;
    let (servers_before, client_before) = (processes.cpu(), cpu_of(std::process::id()));
    let aborts_before = aborts(&counters);
    counters.measuring.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    let committed_before = counters.committed.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(options.seconds)).await;
    counters.measuring.store(false, Ordering::Relaxed);
    let elapsed = begin.elapsed().as_secs_f64();
    let committed = counters.committed.load(Ordering::Relaxed) - committed_before;
    let aborts = aborts(&counters).saturating_sub(aborts_before);
    let client_cpu = cpu_of(std::process::id()) - client_before;
    let servers_cpu = processes.cpu() - servers_before;

    counters.stop.store(true, Ordering::Relaxed);
    let mut histogram = latencies();
    while let Some(latencies) = clients.join_next().await {
        histogram.add(latencies?)?;
    }
    let audit = bank.audit_within(Duration::from_secs(30)).await?;
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
        aborts,
        errors: counters.errors.load(Ordering::Relaxed),
        cpu_us_per_txn: per_txn(client_cpu + servers_cpu),
        client_cpu_us_per_txn: per_txn(client_cpu),
    };
    report.latencies(&histogram);
    client.close().await;
    Ok(report)
}

/// Attempts beyond the first of each transfer.
fn aborts(counters: &Counters) -> u64 {
    let finished = counters.committed.load(Ordering::Relaxed) + counters.errors.load(Ordering::Relaxed);
    counters.attempts.load(Ordering::Relaxed).saturating_sub(finished)
}

async fn client_loop(bank: Bank, counters: Arc<Counters>) -> Histogram<u64> {
    let mut seen = latencies();
    while !counters.stop.load(Ordering::Relaxed) {
        let (from, to) = bank.pick();
        let begin = Instant::now();
        let result = bank.transfer_counting(from, to, 1, &counters.attempts).await;
        let micros = begin.elapsed().as_micros() as u64;
        match result {
            Ok(_) => {
                counters.committed.fetch_add(1, Ordering::Relaxed);
                if counters.measuring.load(Ordering::Relaxed) {
                    seen.saturating_record(micros);
                }
            }
            Err(error) => {
                counters.errors.fetch_add(1, Ordering::Relaxed);
                eprintln!("a transfer failed: {error}");
            }
        }
    }
    seen
}

/// Microseconds up to ten minutes, to three digits.
fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("these bounds are in order")
}
