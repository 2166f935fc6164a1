//! `troth demo`: money moves between accounts on different machines, one of them dies, and not a
//! coin is lost.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use rand::RngExt;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use troth_protocol::NodeId;
use troth_sdk::harness::bank::{Audit, Bank};
use troth_sdk::harness::processes::{Processes, Shape, binaries};
use troth_sdk::{Client, Error, Outcome};

use crate::Context;
use crate::output::{EXIT_FAILED, Failure, line};

/// How long the killed process stays dead.
const DEAD_FOR: Duration = Duration::from_millis(1500);

/// How long the cluster may take to get ready, and to settle afterwards.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options of `troth demo`.
#[derive(Args)]
pub struct Options {
    /// How long transfers run.
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    /// Clients that move money at the same time.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Accounts.
    #[arg(long, default_value_t = 1000)]
    accounts: u32,
    /// Keep the folder with data and logs, and say where it is.
    #[arg(long)]
    keep: bool,
}

/// What the clients saw.
struct Seen {
    began: Instant,
    committed: AtomicU64,
    attempts: AtomicU64,
    failed: AtomicU64,
    unknown: AtomicU64,
    stop: AtomicBool,
    latencies: Mutex<Histogram<u64>>,
    /// When transfers that concern the victim's shards were committed.
    victims_commits: Mutex<Vec<Instant>>,
}

/// What was killed, and how long that hurt.
struct Kill {
    name: String,
    pid: u32,
    killed: Instant,
    restarted: Instant,
}

/// Runs the demo.
pub async fn run(context: &Context, options: Options) -> Result<(), Failure> {
    let folder = tempfile::Builder::new().prefix("troth-demo-").tempdir()?;
    let result = play(context, &options, folder.path().to_owned()).await;
    if options.keep {
        let kept = folder.keep();
        eprintln!("data and logs are in {}", kept.display());
    }
    let (report, ok) = result?;
    if context.json {
        line(&report)?;
    } else {
        print(&report)?;
    }
    if ok { Ok(()) } else { Err(Failure::new(EXIT_FAILED, "something is wrong; the report says what")) }
}

async fn play(context: &Context, options: &Options, folder: PathBuf) -> anyhow::Result<(Value, bool)> {
    let bar = progress(context.json);
    let shape = Shape { coordinators: 1, nodes: 3, replicas: 1, shards: 16 };
    bar.set_message("starting 1 coordinator and 3 participants");
    let mut processes = Processes::create(&folder, &binaries()?, shape)?;
    processes.start()?;
    let mut config = processes.client_config()?;
    config.timeout = PATIENCE;
    let client = Client::connect(config).await.context("the cluster does not get ready")?;
    bar.set_message("opening accounts");
    let bank = Bank::new(&client, options.accounts);
    let before = bank.open().await.context("cannot open the accounts")?;

    let victim_at = rand::rng().random_range(0..processes.participants.len());
    let victim = NodeId(victim_at as u64 + 1);
    let seen = Arc::new(Seen {
        began: Instant::now(),
        committed: AtomicU64::new(0),
        attempts: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        unknown: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        latencies: Mutex::new(Histogram::new_with_bounds(1, 600_000_000, 3)?),
        victims_commits: Mutex::default(),
    });
    let mut clients = JoinSet::new();
    for _ in 0..options.clients {
        clients.spawn(move_money(bank.clone(), seen.clone(), victim));
    }

    let end = seen.began + Duration::from_secs(options.seconds);
    let kill_at = seen.began + Duration::from_secs(options.seconds).mul_f64(0.4);
    show_until(&bar, &seen, kill_at.min(end), "transferring").await;
    let process = &mut processes.participants[victim_at];
    let pid = process.kill()?;
    let killed = Instant::now();
    let text = format!("{} is dead (SIGKILL)", process.name);
    show_until(&bar, &seen, killed + DEAD_FOR, &text).await;
    process.start()?;
    let kill = Kill { name: process.name.clone(), pid, killed, restarted: Instant::now() };
    show_until(&bar, &seen, end.max(Instant::now()), &format!("{} is back", kill.name)).await;

    seen.stop.store(true, Ordering::Relaxed);
    bar.set_message("waiting for the last transfers");
    let last = async {
        while let Some(client) = clients.join_next().await {
            client?;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, last).await.context("transfers do not end")??;
    bar.set_message("counting all money in one snapshot");
    let after = bank.audit_within(PATIENCE).await.context("the accounts cannot be read")?;
    bar.finish_and_clear();
    client.close().await;
    Ok(report(&seen, &[kill], before, after))
}

async fn move_money(bank: Bank, seen: Arc<Seen>, victim: NodeId) {
    while !seen.stop.load(Ordering::Relaxed) {
        let (from, to) = bank.pick();
        let amount = rand::rng().random_range(1..=20);
        let concerns_victim = bank.touches(from, victim) || bank.touches(to, victim);
        let begin = Instant::now();
        let done = match bank.transfer_counting(from, to, amount, &seen.attempts).await {
            Ok(_) => true,
            Err(Error::Unknown(handle)) => match handle.resolve(PATIENCE).await {
                Ok(Outcome::Committed { .. }) => true,
                Ok(Outcome::Aborted { .. }) => false,
                Ok(Outcome::Expired) | Err(_) => {
                    seen.unknown.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
            },
            Err(_) => {
                seen.failed.fetch_add(1, Ordering::Relaxed);
                continue;
            }
        };
        if done {
            seen.committed.fetch_add(1, Ordering::Relaxed);
            seen.latencies.lock().saturating_record(begin.elapsed().as_micros() as u64);
            if concerns_victim {
                seen.victims_commits.lock().push(Instant::now());
            }
        }
    }
}

fn progress(hidden: bool) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if hidden {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Shows how many transfers a second there are, until a moment.
async fn show_until(bar: &ProgressBar, seen: &Seen, until: Instant, what: &str) {
    let mut last = (Instant::now(), seen.committed.load(Ordering::Relaxed));
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(Duration::from_millis(250))).await;
        let now = (Instant::now(), seen.committed.load(Ordering::Relaxed));
        let rate = (now.1 - last.1) as f64 / now.0.duration_since(last.0).as_secs_f64().max(0.001);
        last = now;
        bar.set_message(format!("{what}: {} transfers, {rate:.0} a second", now.1));
    }
}

/// What is printed, and whether all is well.
fn report(seen: &Seen, kills: &[Kill], before: Audit, after: Audit) -> (Value, bool) {
    let latencies = seen.latencies.lock();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (committed, unknown, failed) = (count(&seen.committed), count(&seen.unknown), count(&seen.failed));
    let aborted = count(&seen.attempts).saturating_sub(committed + unknown);
    let mut commits = seen.victims_commits.lock().clone();
    commits.sort();
    let millis = |from: Instant, to: Instant| to.duration_since(from).as_millis() as u64;
    let killed: Vec<Value> = kills
        .iter()
        .map(|kill| {
            let last = commits.iter().rev().find(|at| **at < kill.killed);
            let next = commits.iter().find(|at| **at > kill.restarted);
            let hurt = last.zip(next).map(|(last, next)| millis(*last, *next));
            json!({
                "process": kill.name,
                "pid": kill.pid,
                "signal": "SIGKILL",
                "at_ms": millis(seen.began, kill.killed),
                "dead_ms": millis(kill.killed, kill.restarted),
                "hurt_ms": hurt,
            })
        })
        .collect();
    let healed = killed.iter().all(|kill| !kill["hurt_ms"].is_null());
    let ok = before == after && healed && unknown == 0 && failed == 0 && committed > 0;
    let report = json!({
        "ok": ok,
        "seconds": seen.began.elapsed().as_secs_f64(),
        "committed": committed,
        "aborted": aborted,
        "unknown": unknown,
        "failed": failed,
        "accounts": after.accounts,
        "total_before": before.total,
        "total_after": after.total,
        "p50_us": latencies.value_at_quantile(0.5),
        "p99_us": latencies.value_at_quantile(0.99),
        "killed": killed,
    });
    (report, ok)
}

fn print(report: &Value) -> Result<(), Failure> {
    let number = |key: &str| report[key].as_u64().unwrap_or(0);
    let millis = |key: &str| number(key) as f64 / 1e3;
    line("Bank transfers between accounts on different shards, each one transaction")?;
    line(format!("  committed   {:>8}", number("committed")))?;
    line(format!(
        "  aborted     {:>8}  attempts that met another transfer or a dead server, made again",
        number("aborted")
    ))?;
    line(format!("  unknown     {:>8}  nobody could say how they ended", number("unknown")))?;
    line(format!("  failed      {:>8}  given up", number("failed")))?;
    line(format!(
        "  latency     {:>8.1}  ms for half of them, {:.1} ms for 99 of 100",
        millis("p50_us"),
        millis("p99_us")
    ))?;
    for kill in report["killed"].as_array().into_iter().flatten() {
        line(format!(
            "  killed      {} (pid {}) after {:.1} s, started again {:.1} s later",
            kill["process"].as_str().unwrap_or_default(),
            kill["pid"],
            kill["at_ms"].as_u64().unwrap_or(0) as f64 / 1e3,
            kill["dead_ms"].as_u64().unwrap_or(0) as f64 / 1e3,
        ))?;
        match kill["hurt_ms"].as_u64() {
            Some(hurt) => line(format!(
                "  it hurt for {:.1} s: that long no transfer with its accounts was committed",
                hurt as f64 / 1e3
            ))?,
            None => line("  its accounts did not come back")?,
        }
    }
    line(format!(
        "  money       {:>8} before, {} after, in {} accounts",
        number("total_before"),
        number("total_after"),
        number("accounts")
    ))?;
    let verdict = if report["ok"] == json!(true) { "All of it is there." } else { "SOMETHING IS WRONG." };
    line(verdict)
}
