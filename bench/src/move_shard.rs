//! A large shard moves to a node that joins, under transfers: how long that takes, how much memory, and
//! what the transfers feel of it.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use futures_util::stream::{self, TryStreamExt};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use tokio::time::sleep;
use troth_protocol::{ClusterMap, Node, NodeId, NodeState, ShardId};
use troth_sdk::harness::load::Load;
use troth_sdk::harness::moving::{change_node, until_placed};
use troth_sdk::harness::processes::{Process, Processes};
use troth_sdk::operator::NodeChange;
use troth_sdk::{Client, Error};

use crate::scene::{ClusterOptions, PATIENCE, Scene};

/// How long the move may take.
const MOVE_PATIENCE: Duration = Duration::from_secs(30 * 60);

/// Bytes of each value that fills the shard.
const VALUE_BYTES: usize = 16 << 10;

/// Values that are written in one transaction.
const VALUES_AT_ONCE: u64 = 64;

/// Options of the move benchmark.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    pub cluster: ClusterOptions,
    /// MiB in the shard that moves.
    #[arg(long, default_value_t = 2048)]
    pub mib: u64,
    /// Bytes per second that leave a node with its shards; as the server has it if left out.
    #[arg(long)]
    pub bytes_per_second: Option<u64>,
    /// Clients that transfer meanwhile, each one transfer after the other.
    #[arg(long, default_value_t = 16)]
    pub clients: usize,
    /// How long to measure before the move, and after it.
    #[arg(long, default_value_t = 15)]
    pub seconds: u64,
    /// Accounts.
    #[arg(long, default_value_t = 20_000)]
    pub accounts: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// What transfers were like for a while.
#[derive(Serialize)]
struct Span {
    seconds: f64,
    tps: f64,
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
}

/// Memory of a server: MiB.
#[derive(Serialize)]
struct Memory {
    process: String,
    /// Resident before the move.
    before: f64,
    /// The most that was resident during the move.
    peak: f64,
}

#[derive(Serialize)]
struct Report {
    workload: &'static str,
    coordinators: u16,
    nodes: u16,
    replicas: u16,
    clients: usize,
    /// Bytes of keys and values of the shard that moved.
    shard_bytes: u64,
    /// Shards that moved, it and small ones.
    moved_shards: u64,
    moved_bytes: u64,
    quiet: Span,
    moving: Span,
    after: Span,
    /// The p99 of the move to that before it.
    p99_ratio: f64,
    memory: Vec<Memory>,
    errors: u64,
}

/// Runs it, and checks that no money and no value appeared or vanished.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let throttle_all = |processes: &Processes| {
        processes.participants.iter().try_for_each(|process| throttle(process.config(), options))
    };
    let mut scene = Scene::start(options.cluster, options.accounts, throttle_all).await?;
    let Scene { processes, client, operator, bank, .. } = &mut scene;
    let newcomer = NodeId(u64::from(options.cluster.nodes) + 1);
    let shard = gained(&client.map(), newcomer).context("the newcomer gains no shard; take more --shards")?;
    let filler =
        Filler { tag: tag(shard, options.cluster.shards), values: (options.mib << 20) / VALUE_BYTES as u64 };
    let began = Instant::now();
    filler.fill(client).await.context("cannot fill the shard")?;
    eprintln!("{} MiB are in shard {shard} after {:.0} s", options.mib, began.elapsed().as_secs_f64());
    let process = processes.add_participant()?;
    throttle(process.config(), options)?;
    process.start()?;
    until_known(client, newcomer).await?;

    let load = Load::start(bank, options.clients, 1);
    sleep(Duration::from_secs(2)).await;
    let quiet = Watch::start(&load);
    sleep(Duration::from_secs(options.seconds)).await;
    let quiet = quiet.end();
    let before: Vec<u64> = processes.participants.iter().map(|process| memory(process, "VmRSS:")).collect();
    processes.participants.iter().try_for_each(forget_peak)?;
    let moving = Watch::start(&load);
    change_node(operator, newcomer, NodeChange::Admit { weight: None, zone: None }, PATIENCE).await?;
    let placed = until_placed(operator, MOVE_PATIENCE).await?;
    let moving = moving.end();
    let peaks: Vec<u64> = processes.participants.iter().map(|process| memory(process, "VmHWM:")).collect();
    let after = Watch::start(&load);
    sleep(Duration::from_secs(options.seconds)).await;
    let after = after.end();

    let ended = load.stop(PATIENCE).await?;
    if let Some(error) = &ended.counts.error {
        eprintln!("a transfer failed: {error}");
    }
    ensure!(placed.map.replicas_of(shard).contains(&newcomer), "shard {shard} did not move");
    filler.check(client).await.context("what filled the shard has changed")?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let report = Report {
        workload: "move",
        coordinators: options.cluster.coordinators,
        nodes: options.cluster.nodes,
        replicas: options.cluster.replicas,
        clients: options.clients,
        shard_bytes: filler.values * VALUE_BYTES as u64,
        moved_shards: placed.moved_shards,
        moved_bytes: placed.moved_bytes,
        p99_ratio: moving.p99_us as f64 / quiet.p99_us as f64,
        quiet,
        moving,
        after,
        memory: processes
            .participants
            .iter()
            .zip(before.into_iter().zip(peaks))
            .map(|(process, (before, peak))| Memory {
                process: process.name.clone(),
                before: mib(before),
                peak: mib(peak),
            })
            .collect(),
        errors: ended.counts.failed + ended.counts.unknown,
    };
    scene.check_the_books().await?;
    scene.end().await;
    print(&report, options.json);
    Ok(())
}

fn print(report: &Report, json: bool) {
    if json {
        println!("{}", serde_json::to_string(report).expect("a plain struct"));
        return;
    }
    println!(
        "{} shards moved, {:.0} MiB were sent, {} transfers failed",
        report.moved_shards,
        report.moved_bytes as f64 / f64::from(1 << 20),
        report.errors
    );
    for (what, span) in [("before", &report.quiet), ("during", &report.moving), ("after", &report.after)] {
        println!(
            "  {what:<7} {:>6.1} s {:>7.0} transfers/s {:>8} µs p50 {:>8} µs p99 {:>8} µs max",
            span.seconds, span.tps, span.p50_us, span.p99_us, span.max_us
        );
    }
    println!("  the p99 during the move is {:.2} × that before it", report.p99_ratio);
    for memory in &report.memory {
        println!(
            "  {:<15} {:>6.0} MiB resident before, {:>6.0} MiB at most during the move",
            memory.process, memory.before, memory.peak
        );
    }
}

/// Transfers, watched for a while.
struct Watch<'a> {
    load: &'a Load,
    began: Instant,
    committed: u64,
}

impl Watch<'_> {
    fn start(load: &Load) -> Watch<'_> {
        drop(load.take_latencies());
        Watch { load, began: Instant::now(), committed: load.counts().committed }
    }

    fn end(self) -> Span {
        let (seconds, latencies) = (self.began.elapsed().as_secs_f64(), self.load.take_latencies());
        Span {
            seconds,
            tps: (self.load.counts().committed - self.committed) as f64 / seconds,
            p50_us: latencies.value_at_quantile(0.5),
            p99_us: latencies.value_at_quantile(0.99),
            max_us: latencies.max(),
        }
    }
}

/// Values that make a shard large.
struct Filler {
    tag: String,
    values: u64,
}

impl Filler {
    async fn fill(&self, client: &Client) -> Result<(), Error> {
        let batches = (0..self.values).step_by(VALUES_AT_ONCE as usize);
        stream::iter(batches.map(Ok))
            .try_for_each_concurrent(4, async |first| {
                let values = first..(first + VALUES_AT_ONCE).min(self.values);
                client
                    .transact(async |tx| {
                        for number in values.clone() {
                            tx.put(self.key(number), value(number))?;
                        }
                        Ok::<_, Error>(())
                    })
                    .await
            })
            .await
    }

    /// Whether each value is there and as it was written.
    async fn check(&self, client: &Client) -> anyhow::Result<()> {
        let snapshot = client.snapshot().await?;
        let numbers: Vec<u64> = (0..self.values).collect();
        for some in numbers.chunks(VALUES_AT_ONCE as usize) {
            let keys = some.iter().map(|number| self.key(*number));
            let found = snapshot.get_many(keys).await?;
            let is_there = |(number, found): (&u64, &Option<troth_sdk::Bytes>)| {
                found.as_deref() == Some(value(*number).as_slice())
            };
            ensure!(some.iter().zip(&found).all(is_there), "values from {} on differ", some[0]);
        }
        Ok(())
    }

    fn key(&self, number: u64) -> String {
        format!("{{{}}}/{number:08}", self.tag)
    }
}

/// Bytes that cannot be compressed, the same ones for the same number.
fn value(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; VALUE_BYTES];
    StdRng::seed_from_u64(number).fill_bytes(&mut bytes);
    bytes
}

/// A shard that a newcomer would get.
fn gained(map: &ClusterMap, newcomer: NodeId) -> Option<ShardId> {
    let mut with = map.clone();
    with.nodes.push(Node {
        id: newcomer,
        address: String::new(),
        zone: String::new(),
        weight: 1,
        state: NodeState::Active,
        incarnation: Default::default(),
    });
    let target = with.target();
    (0..map.shards).map(ShardId).find(|shard| target[usize::from(shard.0)].contains(&newcomer))
}

/// What keys must have between braces to lie on a shard.
fn tag(shard: ShardId, shards: u16) -> String {
    let is_there = |tag: &String| troth_protocol::key::shard_of(tag.as_bytes(), shards) == shard;
    (0_u64..).map(|number| format!("filler-{number}")).find(is_there).expect("hashes reach all shards")
}

async fn until_known(client: &Client, node: NodeId) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while client.map().nodes.iter().all(|known| known.id != node) {
        ensure!(Instant::now() < deadline, "{node} does not make itself known");
        sleep(Duration::from_millis(50)).await;
        client.refresh_map().await;
    }
    Ok(())
}

fn throttle(config: &Path, options: &Options) -> anyhow::Result<()> {
    if let Some(bytes) = options.bytes_per_second {
        let mut file = fs::File::options().append(true).open(config)?;
        writeln!(file, "\n[moves]\nbytes_per_second = {bytes}")?;
    }
    Ok(())
}

/// A line of what the system says about the memory of a process: bytes.
fn memory(process: &Process, line: &str) -> u64 {
    let status = process.pid().and_then(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok());
    let found = status.as_deref().and_then(|text| text.lines().find_map(|found| found.strip_prefix(line)));
    let kib = found.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Lets the system begin anew with the most that a process has resident: `clear_refs` in proc(5).
fn forget_peak(process: &Process) -> anyhow::Result<()> {
    let pid = process.pid().context("it does not run")?;
    fs::write(format!("/proc/{pid}/clear_refs"), "5").context("cannot reset the peak of memory")
}
