//! `troth demo`: money moves between accounts on different machines, servers die, come and go in the
//! middle of it, and not a coin is lost.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use tokio::time::sleep;
use troth_protocol::process::asked_to_stop;
use troth_protocol::{NodeId, ShardId, TxnId};
use troth_sdk::harness::bank::{Audit, Bank};
use troth_sdk::harness::load::{Counts, Load};
use troth_sdk::harness::moving::{change_node, until_placed};
use troth_sdk::harness::processes::{Process, Processes, Shape, binaries};
use troth_sdk::harness::until_settled;
use troth_sdk::layout::{Hosting, HttpPlan};
use troth_sdk::operator::{Fault, FaultAction, FaultPoint, NodeChange, Operator, Overview, Peer};
use troth_sdk::{Client, Outcome};

use crate::Context;
use crate::output::{EXIT_FAILED, Failure, bytes_text, line};

/// What is started.
const SHAPE: Shape = Shape { coordinators: 3, nodes: 3, replicas: 3, shards: 16 };

/// The participant that comes, and the one that goes.
const NEWCOMER: NodeId = NodeId(4);
const LEAVER: NodeId = NodeId(1);

/// How long a killed process stays dead once transfers go on without it.
const DEAD_FOR: Duration = Duration::from_millis(1500);

/// How long anything may take that must happen: to get ready, to recover, to settle.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options of `troth demo`.
#[derive(Args)]
pub struct Options {
    /// How long transfers run.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Clients that move money at the same time.
    #[arg(long, default_value_t = 16, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1000))]
    clients: usize,
    /// Accounts.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=100_000))]
    accounts: u32,
    /// Keep the folder with data and logs, and say where it is.
    #[arg(long)]
    keep: bool,
    /// Say where a page shows the cluster, and keep the cluster until Ctrl-C.
    #[arg(long)]
    console: bool,
}

/// A cluster under load, and whoever looks at it.
struct Stage {
    processes: Processes,
    client: Client,
    operator: Operator,
    bank: Bank,
    load: Load,
    bar: ProgressBar,
}

/// A server that was killed, and how long that hurt.
struct Kill {
    process: String,
    what: &'static str,
    pid: u32,
    struck: Instant,
    restarted: Instant,
    /// The shards that it concerns.
    shards: usize,
    /// The longest time between the last commit before and the first commit after, of one of them.
    gap: Duration,
}

/// What a leader left in doubt between the votes and its decision.
struct InDoubt {
    committed: usize,
    aborted: usize,
    /// From its death until the last of them was settled.
    settled_after: Duration,
}

/// A participant that came or went, and what that moved.
struct Change {
    process: String,
    what: &'static str,
    began: Instant,
    took: Duration,
    shards: u64,
    bytes: u64,
}

/// Runs the demo.
pub async fn run(context: &Context, options: Options) -> Result<(), Failure> {
    let folder = tempfile::Builder::new().prefix("troth-demo-").tempdir()?;
    let result = play(context, &options, folder.path()).await;
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

async fn play(context: &Context, options: &Options, folder: &Path) -> anyhow::Result<(Value, bool)> {
    let bar = progress(context.json);
    bar.set_message("starting 3 coordinators and 3 participants");
    let http = if options.console { HttpPlan::Loopback } else { HttpPlan::Off };
    let hosting = Hosting { http, console: options.console, ..Hosting::default() };
    let mut processes = Processes::create_hosted(folder, &binaries()?, SHAPE, hosting)?;
    processes.start()?;
    let mut config = processes.client_config()?;
    config.timeout = PATIENCE;
    let client = Client::connect(config).await.context("the cluster does not get ready")?;
    let operator = processes.operator()?;
    if let Some(console) = processes.layout().console(1)? {
        bar.suspend(|| eprintln!("Look at it: {console}"));
    }
    bar.set_message("opening accounts");
    let bank = Bank::new(&client, options.accounts);
    bank.open().await.context("cannot open the accounts")?;
    let before = bank.balances().await.context("cannot read the accounts")?;
    // What is measured is the death of a server, not the birth of the cluster.
    until_settled(&operator, PATIENCE).await?;

    let load = Load::start(&bank, options.clients, 20);
    let mut stage = Stage { processes, client, operator, bank: bank.clone(), load, bar };
    let part = |part: f64| stage.load.began() + Duration::from_secs(options.seconds).mul_f64(part);
    let moments = [part(0.15), part(0.35), part(0.55), part(0.75), part(1.0)];
    let [leader_dies, one_joins, one_dies, one_leaves, end] = moments;
    stage.show_until(leader_dies, "transferring").await;
    let (leader, in_doubt) = stage.kill_the_leader().await?;
    stage.show_until(one_joins, "transferring").await;
    let joined = stage.join().await?;
    stage.show_until(one_dies, "transferring").await;
    let participant = stage.kill_a_participant().await?;
    stage.show_until(one_leaves, "transferring").await;
    let drained = stage.drain().await?;
    stage.show_until(end, "transferring").await;

    let Stage { processes, client, operator, load, bar, .. } = stage;
    bar.set_message("waiting for the last transfers");
    let (began, latencies) = (load.began(), load.take_latencies());
    let ended = load.stop(PATIENCE).await?;
    bar.set_message("counting all money in one snapshot");
    let after = bank.balances_within(PATIENCE).await.context("the accounts cannot be read")?;
    bar.finish_and_clear();
    if options.console {
        eprintln!("All is done; the page goes on until Ctrl-C.");
        asked_to_stop(false).await?;
    }
    operator.close().await;
    client.close().await;
    drop(processes);
    Ok(report(&Seen {
        began,
        counts: &ended.counts,
        latencies: &latencies,
        kills: &[leader, participant],
        changes: &[joined, drained],
        in_doubt: &in_doubt,
        before: before.audit(),
        after: after.audit(),
        wrong_accounts: ended.wrong_accounts(&before, &after),
    }))
}

impl Stage {
    /// Kills the coordinators' leader at the instant when a transaction has all its votes and no
    /// decision, and watches the next leader settle what was left in doubt.
    async fn kill_the_leader(&mut self) -> anyhow::Result<(Kill, InDoubt)> {
        let leader = self.operator.status().await.leader().context("no coordinator leads")?;
        let map = self.operator.map();
        let node = map.coordinators.iter().find(|node| node.id == leader).context("it is in no map")?;
        let at = usize::try_from(leader.0 - 1)?;
        let pid = self.processes.coordinators[at].pid().context("it does not run")?;
        let arm = Fault::Arm { point: FaultPoint::BeforeDecide, action: FaultAction::Kill, skip: 0 };
        let (operator, peer) = (self.operator.clone(), Peer::coordinator(&node.address));
        // It may be dead before it can answer.
        let armed = tokio::spawn(async move { operator.fault(&peer, arm).await });
        let process = &mut self.processes.coordinators[at];
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = process.ended()? {
                break status;
            }
            if Instant::now() > deadline {
                armed.await??;
                bail!("no transaction came to its decision");
            }
            sleep(Duration::from_millis(1)).await;
        };
        let struck = Instant::now();
        ensure!(status.signal() == Some(9), "{} ended by itself: {status}", process.name);

        let what = format!("{} is dead (SIGKILL, between the votes and a decision)", process.name);
        self.bar.set_message(what.clone());
        // Nobody can add to them before there is another leader.
        let left: Vec<TxnId> = self.in_doubt().await?;
        self.bar.set_message(format!("{what}: {} transactions in doubt", left.len()));
        let deadline = struck + PATIENCE;
        while self.in_doubt().await?.iter().any(|txn| left.contains(txn)) {
            ensure!(Instant::now() < deadline, "transactions stay in doubt");
            sleep(Duration::from_millis(10)).await;
        }
        let mut in_doubt = InDoubt { committed: 0, aborted: 0, settled_after: struck.elapsed() };
        for txn in left {
            match self.client.outcome(txn).await? {
                Outcome::Committed { .. } => in_doubt.committed += 1,
                Outcome::Aborted { .. } => in_doubt.aborted += 1,
                Outcome::Expired => bail!("{txn} is too old"),
            }
        }
        let shards: Vec<ShardId> = self.bank.shards().into_iter().collect();
        let gap = self.recovery(struck, &shards, "a standby leads").await?;
        let process = &mut self.processes.coordinators[at];
        let what = "the coordinators' leader, between the votes of a transaction and its decision";
        Ok((revive(process, what, pid, struck, shards.len(), gap)?, in_doubt))
    }

    /// Transactions that are prepared at the shards' leaders.
    async fn in_doubt(&self) -> anyhow::Result<Vec<TxnId>> {
        let mut found: Vec<TxnId> = self.operator.in_doubt().await?.iter().map(|record| record.txn).collect();
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// Kills a participant that leads shards.
    async fn kill_a_participant(&mut self) -> anyhow::Result<Kill> {
        let serving = until_settled(&self.operator, PATIENCE).await?.serving();
        let victim = rand::random_range(0..self.processes.participants.len());
        let leads = |node: &NodeId| node.0 == victim as u64 + 1;
        let shards: Vec<ShardId> =
            serving.iter().filter(|(_, node)| leads(node)).map(|(shard, _)| *shard).collect();
        let shards: Vec<ShardId> =
            self.bank.shards().into_iter().filter(|shard| shards.contains(shard)).collect();
        let process = &mut self.processes.participants[victim];
        let (pid, struck) = (process.kill()?, Instant::now());
        let what = format!("{} is dead (SIGKILL), and led {} shards", process.name, shards.len());
        self.bar.set_message(what);
        let gap = self.recovery(struck, &shards, "others lead its shards").await?;
        let process = &mut self.processes.participants[victim];
        revive(process, "a participant that led shards", pid, struck, shards.len(), gap)
    }

    /// Starts one more participant and puts it on the ring, and watches it take over its shards.
    async fn join(&mut self) -> anyhow::Result<Change> {
        let before = until_placed(&self.operator, PATIENCE).await?;
        let began = Instant::now();
        let process = self.processes.add_participant()?;
        process.start()?;
        let process = process.name.clone();
        self.bar.set_message(format!("{process} joins"));
        let admit = NodeChange::Admit { weight: None, zone: None };
        change_node(&self.operator, NEWCOMER, admit, PATIENCE).await?;
        self.moved(process, "it joined, and took its shards over", began, &before).await
    }

    /// Lets a participant hand over all that it has, and stops it.
    async fn drain(&mut self) -> anyhow::Result<Change> {
        let before = until_placed(&self.operator, PATIENCE).await?;
        let began = Instant::now();
        let process = self.processes.participants[0].name.clone();
        self.bar.set_message(format!("{process} hands its shards over"));
        change_node(&self.operator, LEAVER, NodeChange::Drain, PATIENCE).await?;
        let change = self.moved(process, "it handed its shards over, and left", began, &before).await?;
        let status = self.processes.participants[0].stop(PATIENCE)?;
        ensure!(status.success(), "{} did not stop as it should: {status}", change.process);
        change_node(&self.operator, LEAVER, NodeChange::Remove, PATIENCE).await?;
        Ok(change)
    }

    /// Waits until all shards are where they should be, and tells what that moved.
    async fn moved(
        &self,
        process: String,
        what: &'static str,
        began: Instant,
        before: &Overview,
    ) -> anyhow::Result<Change> {
        let after = until_placed(&self.operator, PATIENCE).await?;
        Ok(Change {
            process,
            what,
            began,
            took: began.elapsed(),
            shards: after.moved_shards - before.moved_shards,
            bytes: after.moved_bytes - before.moved_bytes,
        })
    }

    /// Waits until transfers go on at all these shards, and then for as long as a process stays dead.
    /// Tells how long they did not.
    async fn recovery(&self, struck: Instant, shards: &[ShardId], then: &str) -> anyhow::Result<Duration> {
        let deadline = struck + PATIENCE;
        let outage = loop {
            if let Some(outage) = self.load.outage(struck, shards.iter().copied()) {
                break outage;
            }
            ensure!(Instant::now() < deadline, "transfers do not go on");
            sleep(Duration::from_millis(5)).await;
        };
        let text = format!("{then}, after {:.1} s", outage.gap.as_secs_f64());
        self.show_until(outage.over + DEAD_FOR, &text).await;
        Ok(outage.gap)
    }

    /// Shows how many transfers a second there are, until a moment.
    async fn show_until(&self, until: Instant, what: &str) {
        let mut last = (Instant::now(), self.load.counts().committed);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            sleep(left.min(Duration::from_millis(250))).await;
            let now = (Instant::now(), self.load.counts().committed);
            let rate = (now.1 - last.1) as f64 / now.0.duration_since(last.0).as_secs_f64().max(0.001);
            last = now;
            self.bar.set_message(format!("{what}: {} transfers, {rate:.0} a second", now.1));
        }
    }
}

/// Starts a dead process again.
fn revive(
    process: &mut Process,
    what: &'static str,
    pid: u32,
    struck: Instant,
    shards: usize,
    gap: Duration,
) -> anyhow::Result<Kill> {
    process.start()?;
    Ok(Kill { process: process.name.clone(), what, pid, struck, restarted: Instant::now(), shards, gap })
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

/// What there is to report.
struct Seen<'a> {
    began: Instant,
    counts: &'a Counts,
    latencies: &'a Histogram<u64>,
    kills: &'a [Kill],
    changes: &'a [Change],
    in_doubt: &'a InDoubt,
    before: Audit,
    after: Audit,
    wrong_accounts: usize,
}

/// What is printed, and whether all is well.
fn report(seen: &Seen) -> (Value, bool) {
    let Seen { counts, in_doubt, before, after, .. } = seen;
    let millis = |time: Duration| time.as_millis() as u64;
    let killed: Vec<Value> = seen
        .kills
        .iter()
        .map(|kill| {
            json!({
                "process": kill.process,
                "what": kill.what,
                "pid": kill.pid,
                "signal": "SIGKILL",
                "at_ms": millis(kill.struck - seen.began),
                "dead_ms": millis(kill.restarted - kill.struck),
                "shards": kill.shards,
                "hurt_ms": millis(kill.gap),
            })
        })
        .collect();
    let changed: Vec<Value> = seen
        .changes
        .iter()
        .map(|change| {
            json!({
                "process": change.process,
                "what": change.what,
                "at_ms": millis(change.began - seen.began),
                "took_ms": millis(change.took),
                "moved_shards": change.shards,
                "moved_bytes": change.bytes,
            })
        })
        .collect();
    let moved_shards: u64 = seen.changes.iter().map(|change| change.shards).sum();
    let moved_bytes: u64 = seen.changes.iter().map(|change| change.bytes).sum();
    let resolved = in_doubt.committed + in_doubt.aborted;
    let ok = before == after
        && seen.wrong_accounts == 0
        && counts.unknown == 0
        && counts.failed == 0
        && counts.committed > 0
        && resolved > 0
        && seen.changes.iter().all(|change| change.shards > 0);
    let report = json!({
        "ok": ok,
        "seconds": seen.began.elapsed().as_secs_f64(),
        "committed": counts.committed,
        "aborted": counts.aborted,
        "unknown": counts.unknown,
        "failed": counts.failed,
        "accounts": after.accounts,
        "wrong_accounts": seen.wrong_accounts,
        "total_before": before.total,
        "total_after": after.total,
        "p50_us": seen.latencies.value_at_quantile(0.5),
        "p99_us": seen.latencies.value_at_quantile(0.99),
        "killed": killed,
        "failover_ms": seen.kills.iter().map(|kill| millis(kill.gap)).collect::<Vec<_>>(),
        "changed": changed,
        "moved_shards": moved_shards,
        "moved_bytes": moved_bytes,
        "in_doubt_resolved": resolved,
        "in_doubt_committed": in_doubt.committed,
        "in_doubt_aborted": in_doubt.aborted,
        "in_doubt_settled_ms": millis(in_doubt.settled_after),
    });
    (report, ok)
}

fn print(report: &Value) -> Result<(), Failure> {
    let number = |key: &str| report[key].as_u64().unwrap_or(0);
    let millis = |key: &str| number(key) as f64 / 1e3;
    line("Bank transfers between accounts on different shards, each one transaction;")?;
    line("3 coordinators, 3 participants, 3 replicas of each shard, all of them processes of this machine;")?;
    line("servers are killed, one more participant joins, and one leaves")?;
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
        let seconds = |key: &str| kill[key].as_u64().unwrap_or(0) as f64 / 1e3;
        let text = |key: &str| kill[key].as_str().unwrap_or_default().to_owned();
        line(format!("  killed      {}: {}", text("process"), text("what")))?;
        line(format!(
            "              SIGKILL to pid {} after {:.1} s, started again {:.1} s later",
            kill["pid"],
            seconds("at_ms"),
            seconds("dead_ms"),
        ))?;
        line(format!(
            "              it hurt for {:.2} s: so long no new transfer was committed on the slowest of {} shards",
            seconds("hurt_ms"),
            kill["shards"],
        ))?;
    }
    for change in report["changed"].as_array().into_iter().flatten() {
        let seconds = |key: &str| change[key].as_u64().unwrap_or(0) as f64 / 1e3;
        let text = |key: &str| change[key].as_str().unwrap_or_default().to_owned();
        line(format!("  moved       {}: {}", text("process"), text("what")))?;
        line(format!(
            "              {} shards, {} were sent, from {:.1} s on for {:.1} s",
            change["moved_shards"],
            bytes_text(change["moved_bytes"].as_u64().unwrap_or(0)),
            seconds("at_ms"),
            seconds("took_ms"),
        ))?;
    }
    line(format!(
        "  in doubt    {:>8}  transactions left by the dead leader: {} committed, {} aborted, all settled {:.2} s \
         after its death",
        number("in_doubt_resolved"),
        number("in_doubt_committed"),
        number("in_doubt_aborted"),
        millis("in_doubt_settled_ms"),
    ))?;
    line(format!(
        "  money       {:>8} before, {} after, in {} accounts; {} of them hold another sum than was acknowledged",
        number("total_before"),
        number("total_after"),
        number("accounts"),
        number("wrong_accounts"),
    ))?;
    let verdict = if report["ok"] == json!(true) { "All of it is there." } else { "SOMETHING IS WRONG." };
    line(verdict)
}
