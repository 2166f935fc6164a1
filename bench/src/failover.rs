//! What the death of a leader costs: it is killed again and again under a load of transfers, and the
//! time is taken until transfers of the shards that it concerns are committed again.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use rand::RngExt;
use serde_json::json;
use tokio::time::sleep;
use troth_protocol::{NodeId, ShardId};
use troth_sdk::harness::load::Load;
use troth_sdk::harness::until_settled;

use crate::scene::{ClusterOptions, PATIENCE, Scene};

/// Who is killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Victim {
    /// The coordinators' leader.
    Coordinator,
    /// A participant that leads shards.
    Participant,
}

/// Options of the failover benchmark.
#[derive(Args)]
pub struct Options {
    /// Who is killed.
    #[arg(long, value_enum, default_value_t = Victim::Coordinator)]
    victim: Victim,
    /// How often.
    #[arg(long, default_value_t = 20)]
    kills: usize,
    /// Clients that each wait for one transfer after the other.
    #[arg(long, default_value_t = 32)]
    clients: usize,
    /// Shards.
    #[arg(long, default_value_t = 16)]
    shards: u16,
    /// Accounts.
    #[arg(long, default_value_t = 5_000)]
    accounts: u32,
    /// How long the killed process stays dead, once transfers go on.
    #[arg(long, default_value_t = 500)]
    dead_ms: u64,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Runs it, and checks that no money appeared or vanished.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let cluster = ClusterOptions { coordinators: 3, nodes: 3, replicas: 3, shards: options.shards };
    let mut scene = Scene::start(cluster, options.accounts, |_| Ok(())).await?;
    let Scene { processes, operator, bank, opened, .. } = &mut scene;
    let before = bank.balances().await?;
    let load = Load::start(bank, options.clients, 1);

    let mut times: Vec<Duration> = Vec::new();
    for kill in 0..options.kills {
        // Only a cluster in which everything is as it should be is struck.
        let status = until_settled(operator, PATIENCE).await?;
        let (leading, serving) = (status.leader().context("it is settled")?, status.serving());
        sleep(Duration::from_millis(rand::rng().random_range(200..1000))).await;
        let (victim, concerned): (_, Vec<ShardId>) = match options.victim {
            Victim::Coordinator => {
                (&mut processes.coordinators[leading.0 as usize - 1], bank.shards().into_iter().collect())
            }
            Victim::Participant => {
                let node = NodeId(rand::rng().random_range(1..=processes.participants.len() as u64));
                let accounts = bank.shards();
                let led = serving.iter().filter(|(_, leader)| **leader == node).map(|(shard, _)| *shard);
                let led = led.filter(|shard| accounts.contains(shard));
                (&mut processes.participants[node.0 as usize - 1], led.collect())
            }
        };
        victim.kill()?;
        let killed = Instant::now();
        let over = loop {
            if let Some(outage) = load.outage(killed, concerned.iter().copied()) {
                break outage.over;
            }
            ensure!(
                killed.elapsed() < PATIENCE,
                "after kill {kill} of {} transfers do not go on",
                victim.name
            );
            sleep(Duration::from_millis(5)).await;
        };
        times.push(over.duration_since(killed));
        if !options.json {
            println!("{:>3} {} {:>6} ms", kill + 1, victim.name, times[kill].as_millis());
        }
        sleep(Duration::from_millis(options.dead_ms)).await;
        victim.start()?;
    }

    let ended = load.stop(PATIENCE).await?;
    let counts = &ended.counts;
    let calm = Instant::now() + PATIENCE;
    let (prepared, locks) = loop {
        match operator.status().await.held() {
            Some((0, 0)) => break (0, 0),
            held if Instant::now() > calm => {
                break held.with_context(|| "not all servers say what they hold")?;
            }
            _ => sleep(Duration::from_millis(50)).await,
        }
    };
    let after = bank.balances_within(PATIENCE).await?;
    let (audit, wrong) = (after.audit(), ended.wrong_accounts(&before, &after));
    let opened = *opened;
    ensure!(audit == opened, "the books do not balance: {audit:?} instead of {opened:?}");
    scene.end().await;

    times.sort();
    let millis = |at: usize| times[at.min(times.len() - 1)].as_millis() as u64;
    let report = json!({
        "workload": "failover",
        "victim": format!("{:?}", options.victim).to_lowercase(),
        "kills": times.len(),
        "clients": options.clients,
        "median_ms": millis(times.len() / 2),
        "min_ms": millis(0),
        "max_ms": millis(times.len() - 1),
        "all_ms": times.iter().map(|time| time.as_millis() as u64).collect::<Vec<_>>(),
        "committed": counts.committed,
        "unknown": counts.unknown,
        "failed": counts.failed,
        "error": counts.error,
        "wrong_accounts": wrong,
        "prepared_left": prepared,
        "locks_left": locks,
        "total_before": opened.total,
        "total_after": audit.total,
    });
    if options.json {
        println!("{report}");
    } else {
        println!("{report:#}");
    }
    ensure!(counts.unknown > 0 || wrong == 0, "{wrong} accounts hold something else than was acknowledged");
    ensure!((prepared, locks) == (0, 0), "{prepared} transactions stay prepared, {locks} keys locked");
    Ok(())
}
