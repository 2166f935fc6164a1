//! What the death of a leader costs: it is killed again and again under a load of transfers, and the
//! time is taken until transfers of the shards that it concerns are committed again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use parking_lot::Mutex;
use rand::RngExt;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::sleep;
use troth_protocol::message::admin::{Request as Ask, Response as Told};
use troth_protocol::message::{Request, Response};
use troth_protocol::net::Peer;
use troth_protocol::{NodeId, ShardId};
use troth_sdk::harness::bank::{Audit, Bank};
use troth_sdk::harness::processes::{Processes, Shape, binaries};
use troth_sdk::{Client, Error, Outcome};

/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

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

#[derive(Default)]
struct Load {
    stop: AtomicBool,
    committed: AtomicU64,
    failed: AtomicU64,
    unknown: AtomicU64,
    attempts: AtomicU64,
    /// For each shard, when the newest transfer began that was committed there, and when that was.
    commits: Mutex<BTreeMap<ShardId, (Instant, Instant)>>,
}

async fn move_money(bank: Bank, client: Client, load: Arc<Load>) {
    while !load.stop.load(Ordering::Relaxed) {
        let (from, to) = bank.pick();
        let began = Instant::now();
        let done = match bank.transfer_counting(from, to, 1, &load.attempts).await {
            Ok(_) => true,
            Err(Error::Unknown(handle)) => match handle.resolve(PATIENCE).await {
                Ok(Outcome::Committed { .. }) => true,
                Ok(Outcome::Aborted { .. }) => false,
                Ok(Outcome::Expired) | Err(_) => {
                    load.unknown.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
            },
            Err(error) => {
                eprintln!("a transfer failed: {error}");
                load.failed.fetch_add(1, Ordering::Relaxed);
                continue;
            }
        };
        if done {
            load.committed.fetch_add(1, Ordering::Relaxed);
            let shards = client.map().shards;
            let mut commits = load.commits.lock();
            for account in [from, to] {
                let newest = commits.entry(bank.shard(account, shards)).or_insert((began, Instant::now()));
                if began >= newest.0 {
                    *newest = (began, Instant::now());
                }
            }
        }
    }
}

/// Asks all servers of a kind how they are; those that do not answer are left out.
async fn ask(client: &Client, peers: impl IntoIterator<Item = (NodeId, Peer)>) -> Vec<(NodeId, Told)> {
    let mut told = Vec::new();
    for (id, peer) in peers {
        let deadline = tokio::time::Instant::now() + Duration::from_millis(500);
        if let Ok(Response::Admin(answer)) =
            client.transport().call(&peer, Request::Admin(Ask::Status), deadline).await
        {
            told.push((id, answer));
        }
    }
    told
}

/// The coordinator that leads; the newest epoch, if two think that they do.
async fn leader(client: &Client) -> Option<NodeId> {
    let map = client.map();
    let peers = map.coordinators.iter().map(|node| (node.id, Peer::coordinator(&node.address)));
    let told = ask(client, peers.collect::<Vec<_>>()).await;
    let leads = |(id, told): &(NodeId, Told)| match told {
        Told::Coordinator(status) => status.epoch.map(|epoch| (epoch, *id)),
        _ => None,
    };
    told.iter().filter_map(leads).max().map(|(_, id)| id)
}

/// Which participant serves each shard.
async fn servers(client: &Client) -> BTreeMap<ShardId, NodeId> {
    let map = client.map();
    let peers = map.nodes.iter().map(|node| (node.id, Peer::participant(&node.address)));
    let mut serving = BTreeMap::new();
    for (id, told) in ask(client, peers.collect::<Vec<_>>()).await {
        if let Told::Participant(status) = told {
            let served = status.shards.iter().filter(|shard| shard.serving);
            serving.extend(served.map(|shard| (shard.shard, id)));
        }
    }
    serving
}

/// Runs it, and checks that no money appeared or vanished.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let shape = Shape { coordinators: 3, nodes: 3, replicas: 3, shards: options.shards };
    let mut processes = Processes::create(folder.path(), &binaries()?, shape)?;
    processes.start()?;
    let mut config = processes.client_config()?;
    config.timeout = PATIENCE;
    let client = Client::connect(config).await?;
    let bank = Bank::new(&client, options.accounts);
    let opened = bank.open().await?;
    let load = Arc::new(Load::default());
    let mut clients = JoinSet::new();
    for _ in 0..options.clients {
        clients.spawn(move_money(bank.clone(), client.clone(), load.clone()));
    }

    let preferred = client.map().preferred_leaders();
    let mut times: Vec<Duration> = Vec::new();
    for kill in 0..options.kills {
        // Only a cluster in which everything is as it should be is struck.
        let calm = Instant::now() + PATIENCE;
        let (leading, serving) = loop {
            let (leading, serving) = (leader(&client).await, servers(&client).await);
            let at_home = serving.iter().all(|(shard, node)| preferred[usize::from(shard.0)] == *node);
            match leading {
                Some(leading) if serving.len() == usize::from(options.shards) && at_home => {
                    break (leading, serving);
                }
                _ if Instant::now() > calm => bail!("the cluster does not calm down: {serving:?}"),
                _ => sleep(Duration::from_millis(50)).await,
            }
        };
        sleep(Duration::from_millis(rand::rng().random_range(200..1000))).await;
        let (victim, concerned): (_, Vec<ShardId>) = match options.victim {
            Victim::Coordinator => {
                (&mut processes.coordinators[leading.0 as usize - 1], serving.keys().copied().collect())
            }
            Victim::Participant => {
                let node = NodeId(rand::rng().random_range(1..=processes.participants.len() as u64));
                let led = serving.iter().filter(|(_, leader)| **leader == node).map(|(shard, _)| *shard);
                (&mut processes.participants[node.0 as usize - 1], led.collect())
            }
        };
        victim.kill()?;
        let killed = Instant::now();
        let back = loop {
            let commits = load.commits.lock().clone();
            // What began before may have been decided before.
            let after =
                |shard: &ShardId| commits.get(shard).filter(|(began, _)| *began > killed).map(|(_, at)| *at);
            let first: Option<Vec<Instant>> = concerned.iter().map(after).collect();
            if let Some(back) = first {
                break back.into_iter().max().unwrap_or(killed);
            }
            ensure!(
                killed.elapsed() < PATIENCE,
                "after kill {kill} of {} transfers do not go on",
                victim.name
            );
            sleep(Duration::from_millis(5)).await;
        };
        times.push(back.duration_since(killed));
        if !options.json {
            println!("{:>3} {} {:>6} ms", kill + 1, victim.name, times[kill].as_millis());
        }
        sleep(Duration::from_millis(options.dead_ms)).await;
        victim.start()?;
    }

    load.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = tokio::time::timeout(PATIENCE, clients.join_next()).await? {
        ended?;
    }
    let audit = bank.audit_within(PATIENCE).await?;
    let expected = Audit { accounts: options.accounts as usize, total: opened.total };
    ensure!(audit == expected, "the books do not balance: {audit:?} instead of {expected:?}");
    client.close().await;

    times.sort();
    let millis = |at: usize| times[at.min(times.len() - 1)].as_millis() as u64;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let report = json!({
        "workload": "failover",
        "victim": format!("{:?}", options.victim).to_lowercase(),
        "kills": times.len(),
        "clients": options.clients,
        "median_ms": millis(times.len() / 2),
        "min_ms": millis(0),
        "max_ms": millis(times.len() - 1),
        "all_ms": times.iter().map(|time| time.as_millis() as u64).collect::<Vec<_>>(),
        "committed": count(&load.committed),
        "unknown": count(&load.unknown),
        "failed": count(&load.failed),
        "total_before": opened.total,
        "total_after": audit.total,
    });
    if options.json {
        println!("{report}");
    } else {
        println!("{report:#}");
    }
    Ok(())
}
