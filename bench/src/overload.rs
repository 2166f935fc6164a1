//! More work than there is time for: transfers arrive at a fixed rate, whatever becomes of those before
//! them (an open loop), at several multiples of what the cluster can do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use troth_sdk::harness::bank::Bank;
use troth_sdk::harness::load::Load;
use troth_sdk::{Client, Commit, Error};

use crate::scene::{ClusterOptions, PATIENCE, Scene};

/// Transfers that may be under way in the benchmark itself; beyond that they count as late.
const UNDER_WAY_MAX: usize = 100_000;

/// Options of the overload benchmark.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    pub cluster: ClusterOptions,
    /// Clients of the closed loop that finds out what the cluster can do.
    #[arg(long, default_value_t = 64)]
    pub clients: usize,
    /// What the cluster can do, in transfers a second; found out if left out.
    #[arg(long)]
    pub peak: Option<f64>,
    /// Multiples of that.
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0])]
    pub factors: Vec<f64>,
    /// How long each is measured, after a second that is not.
    #[arg(long, default_value_t = 8)]
    pub seconds: u64,
    /// A transfer that takes longer is of no use to anybody any more.
    #[arg(long, default_value_t = 1000)]
    pub patience_ms: u64,
    /// Accounts.
    #[arg(long, default_value_t = 20_000)]
    pub accounts: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// What became of one rate.
#[derive(Serialize)]
struct Row {
    factor: f64,
    /// Transfers that arrived in a second.
    offered: f64,
    /// Those that were committed in time, in a second.
    goodput: f64,
    /// Those that were refused as overload, in a second.
    shed: f64,
    /// Those that came too late or failed otherwise, in a second.
    late: f64,
    /// From the moment when a transfer should have begun to its answer, of those committed in time:
    /// microseconds.
    p50_us: u64,
    p99_us: u64,
}

struct Seen {
    begun: AtomicU64,
    committed: AtomicU64,
    shed: AtomicU64,
    late: AtomicU64,
    latencies: Mutex<Histogram<u64>>,
}

impl Seen {
    fn new() -> Seen {
        let latencies = Histogram::new_with_bounds(1, 60_000_000, 3).expect("sensible bounds");
        let zero = || AtomicU64::new(0);
        Seen {
            begun: zero(),
            committed: zero(),
            shed: zero(),
            late: zero(),
            latencies: Mutex::new(latencies),
        }
    }
}

/// Runs it, and checks that no money appeared or vanished.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let scene = Scene::start(options.cluster, options.accounts, |_| Ok(())).await?;
    let Scene { client, bank, .. } = &scene;
    let peak = match options.peak {
        Some(peak) => peak,
        None => closed_loop(bank, options).await?,
    };
    if !options.json {
        println!("the cluster can do {peak:.0} transfers a second");
        println!(
            "{:>7} {:>9} {:>9} {:>9} {:>8} {:>10} {:>10}",
            "factor", "offered", "goodput", "shed", "late", "p50 ms", "p99 ms"
        );
    }
    let mut rows = Vec::new();
    for factor in &options.factors {
        let row = open_loop(client, bank, options, *factor, peak * factor).await;
        if !options.json {
            println!(
                "{:>7.1} {:>9.0} {:>9.0} {:>9.0} {:>8.0} {:>10.1} {:>10.1}",
                row.factor,
                row.offered,
                row.goodput,
                row.shed,
                row.late,
                row.p50_us as f64 / 1e3,
                row.p99_us as f64 / 1e3
            );
        }
        rows.push(row);
    }
    scene.check_the_books().await?;
    scene.end().await;
    let best = rows.iter().map(|row| row.goodput).fold(0.0, f64::max);
    let last = rows.last().map_or(0.0, |row| row.goodput);
    let report = serde_json::json!({
        "workload": "overload", "coordinators": options.cluster.coordinators,
        "nodes": options.cluster.nodes, "replicas": options.cluster.replicas, "peak": peak, "rows": rows, "kept": last / best.max(1.0),
    });
    if options.json {
        println!("{report}");
    } else {
        println!("at the end {:.0} % of the best", 100.0 * last / best.max(1.0));
    }
    Ok(())
}

/// What clients get done that wait for one transfer before they begin the next.
async fn closed_loop(bank: &Bank, options: &Options) -> anyhow::Result<f64> {
    let load = Load::start(bank, options.clients, 1);
    sleep(Duration::from_secs(2)).await;
    let (began, before) = (Instant::now(), load.counts().committed);
    sleep(Duration::from_secs(options.seconds)).await;
    let done = load.counts().committed - before;
    let took = began.elapsed().as_secs_f64();
    load.stop(PATIENCE).await?;
    Ok(done as f64 / took)
}

async fn open_loop(client: &Client, bank: &Bank, options: &Options, factor: f64, rate: f64) -> Row {
    let seen = Arc::new(Seen::new());
    let places = Arc::new(Semaphore::new(UNDER_WAY_MAX));
    let patience = Duration::from_millis(options.patience_ms);
    let warm_up = Duration::from_secs(1);
    let end = warm_up + Duration::from_secs(options.seconds);
    let mut transfers = JoinSet::new();
    let mut tick = interval(Duration::from_millis(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let began = Instant::now();
    let mut arrived = 0_u64;
    while began.elapsed() < end {
        tick.tick().await;
        while (arrived as f64) < rate * began.elapsed().as_secs_f64() {
            let due = began + Duration::from_secs_f64(arrived as f64 / rate);
            arrived += 1;
            let counts = due.duration_since(began) >= warm_up;
            if counts {
                seen.begun.fetch_add(1, Ordering::Relaxed);
            }
            let Ok(place) = places.clone().try_acquire_owned() else {
                seen.late.fetch_add(u64::from(counts), Ordering::Relaxed);
                continue;
            };
            let (client, bank, seen) = (client.clone(), bank.clone(), seen.clone());
            transfers.spawn(async move {
                let ended = tokio::time::timeout_at((due + patience).into(), transfer(&client, &bank)).await;
                drop(place);
                if !counts {
                    return;
                }
                let counter = match ended {
                    Ok(Ok(())) => {
                        seen.latencies.lock().saturating_record(due.elapsed().as_micros() as u64);
                        &seen.committed
                    }
                    Ok(Err(Error::Overloaded { .. })) => &seen.shed,
                    Ok(Err(_)) | Err(_) => &seen.late,
                };
                counter.fetch_add(1, Ordering::Relaxed);
            });
        }
        while transfers.try_join_next().is_some() {}
    }
    while transfers.join_next().await.is_some() {}
    let seconds = options.seconds as f64;
    let each = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64 / seconds;
    let latencies = seen.latencies.lock();
    Row {
        factor,
        offered: each(&seen.begun),
        goodput: each(&seen.committed),
        shed: each(&seen.shed),
        late: each(&seen.late),
        p50_us: latencies.value_at_quantile(0.5),
        p99_us: latencies.value_at_quantile(0.99),
    }
}

/// One transfer: made again if it meets another one, but not if there is too much to do.
async fn transfer(client: &Client, bank: &Bank) -> Result<(), Error> {
    let (from, to) = bank.pick();
    loop {
        let tx = client.begin().await?;
        bank.transfer_in(&tx, from, to, 1).await?;
        match tx.commit().await? {
            Commit::Committed { .. } => return Ok(()),
            Commit::Aborted { cause } if cause.is_retriable() => {}
            Commit::Aborted { cause } => return Err(Error::Aborted { cause }),
            Commit::Unknown { handle } => return Err(Error::Unknown(handle)),
        }
    }
}
