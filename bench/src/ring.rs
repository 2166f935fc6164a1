//! What the ring moves when a node comes or goes, and how evenly it divides: on rings without a cluster,
//! of nodes with random numbers.

use std::collections::BTreeMap;

use anyhow::ensure;
use clap::Args;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use troth_protocol::NodeId;
use troth_protocol::ring::{Member, Placement, Ring, diff};

/// Zones of the clusters that have some.
const ZONES: usize = 3;

/// Options of the ring figures.
#[derive(Args)]
pub struct Options {
    /// Random clusters for each line.
    #[arg(long, default_value_t = 100)]
    pub clusters: u32,
    /// Shards of each cluster.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 128, 1024])]
    pub shards: Vec<u16>,
    /// Replicas of each shard.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3])]
    pub replicas: Vec<usize>,
    /// Where the random numbers begin.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// A node that comes, or one that goes.
#[derive(Clone, Copy, Serialize)]
struct Change {
    from: usize,
    to: usize,
    zones: bool,
}

const fn change(from: usize, to: usize) -> Change {
    Change { from, to, zones: false }
}

const fn in_zones(from: usize, to: usize) -> Change {
    Change { from, to, zones: true }
}

const CHANGES: [Change; 7] =
    [change(3, 4), change(4, 3), change(8, 9), change(9, 8), change(32, 33), in_zones(8, 9), in_zones(9, 8)];

/// A share of all replicas, over many clusters.
#[derive(Serialize)]
struct Spread {
    mean: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Spread {
        Spread {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(0.0, f64::max),
        }
    }

    fn percent(&self) -> String {
        format!("{:.1} % ({:.1} to {:.1})", 100.0 * self.mean, 100.0 * self.min, 100.0 * self.max)
    }
}

/// What became of one kind of change.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    change: Change,
    shards: u16,
    replicas: usize,
    /// The share that the node has that comes or goes if all have the same: 1 of the larger number.
    fair: f64,
    /// The share of all replicas that moved.
    moved: Spread,
    /// Shares that the nodes have after it, to the mean: the largest of each cluster.
    fullest: Spread,
    /// The same: the smallest of each cluster.
    emptiest: Spread,
}

/// Prints them.
pub fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(options.clusters > 0, "--clusters must be at least 1");
    ensure!(options.shards.iter().all(|shards| *shards > 0), "--shards must be at least 1");
    ensure!(options.replicas.iter().all(|replicas| (1..=3).contains(replicas)), "--replicas must be 1 to 3");
    let mut rng = StdRng::seed_from_u64(options.seed);
    let mut rows = Vec::new();
    for &replicas in &options.replicas {
        for &shards in &options.shards {
            rows.extend(CHANGES.map(|change| measured(&mut rng, options.clusters, change, shards, replicas)));
        }
    }
    if options.json {
        println!(
            "{}",
            serde_json::json!({ "clusters": options.clusters, "seed": options.seed, "rows": rows })
        );
        return Ok(());
    }
    println!("{} random clusters for each line", options.clusters);
    println!(
        "| nodes | replicas | shards | fair | moved: mean (least to most) | fullest node | emptiest node |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        println!(
            "| {} → {}{} | {} | {} | {:.1} % | {} | {:.2} × ({:.2}) | {:.2} × ({:.2}) |",
            row.change.from,
            row.change.to,
            if row.change.zones { ", 3 zones" } else { "" },
            row.replicas,
            row.shards,
            100.0 * row.fair,
            row.moved.percent(),
            row.fullest.mean,
            row.fullest.max,
            row.emptiest.mean,
            row.emptiest.min
        );
    }
    Ok(())
}

fn measured(rng: &mut StdRng, clusters: u32, change: Change, shards: u16, replicas: usize) -> Row {
    let (mut moved, mut fullest, mut emptiest) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..clusters {
        let members = members(rng, change);
        let placement =
            |nodes: usize| Ring::new(members[..nodes].iter().cloned()).placement(shards, replicas);
        let (before, after) = (placement(change.from), placement(change.to));
        let all = f64::from(shards) * replicas as f64;
        let gained: usize = diff(&before, &after).iter().map(|step| step.add.len()).sum();
        moved.push(gained as f64 / all);
        let loads = loads(&members[..change.to], &after);
        let mean = all / change.to as f64;
        fullest.push(loads.iter().copied().max().unwrap_or(0) as f64 / mean);
        emptiest.push(loads.iter().copied().min().unwrap_or(0) as f64 / mean);
    }
    Row {
        change,
        shards,
        replicas,
        fair: 1.0 / change.from.max(change.to) as f64,
        moved: Spread::of(&moved),
        fullest: Spread::of(&fullest),
        emptiest: Spread::of(&emptiest),
    }
}

/// Nodes with random numbers; the last is the one that comes or goes.
fn members(rng: &mut StdRng, change: Change) -> Vec<Member> {
    let mut members: Vec<Member> = Vec::new();
    while members.len() < change.from.max(change.to) {
        let node = NodeId(rng.random_range(1..=u64::MAX));
        if members.iter().all(|member| member.node != node) {
            let zone = if change.zones { format!("zone {}", members.len() % ZONES) } else { String::new() };
            members.push(Member { node, weight: 1, zone });
        }
    }
    members
}

fn loads(members: &[Member], placement: &Placement) -> Vec<usize> {
    let mut loads: BTreeMap<NodeId, usize> = members.iter().map(|member| (member.node, 0)).collect();
    for node in placement.iter().flatten() {
        *loads.entry(*node).or_default() += 1;
    }
    loads.into_values().collect()
}
