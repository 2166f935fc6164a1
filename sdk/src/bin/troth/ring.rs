//! `troth ring` and `troth moves`: where the shards are, and which of them are on their way.

use std::io::IsTerminal;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use troth_protocol::ring::diff;
use troth_protocol::{ClusterMap, Node, NodeId, NodeState, ShardId};
use troth_sdk::operator::{Moving, Operator, Overview};

use crate::Context;
use crate::output::{EXIT_USAGE, Failure, bytes_text, line, table};

/// How often `--watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// Options of `troth ring`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    /// Look again and again, until Ctrl-C.
    #[arg(long)]
    watch: bool,
    #[command(subcommand)]
    command: Option<RingCommand>,
}

/// What `troth ring` does besides showing.
#[derive(Subcommand)]
pub enum RingCommand {
    /// Show what would move, and change nothing.
    #[command(subcommand)]
    Plan(PlanCommand),
}

/// A change that is only thought of.
#[derive(Subcommand)]
pub enum PlanCommand {
    /// If a participant were added, or had another weight or zone.
    Add {
        /// Its number; it need not run yet.
        id: u64,
        /// Its share of the shards, relative to others.
        #[arg(long, default_value_t = 1)]
        weight: u32,
        /// What fails together with it.
        #[arg(long, default_value = "")]
        zone: String,
    },
    /// If a participant were drained.
    Drain {
        /// Its number.
        id: u64,
    },
}

/// Options of `troth moves`.
#[derive(Args)]
pub struct MovesOptions {
    /// Look again and again, until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

/// Shows which nodes hold which shards, and who leads them; or what would move.
pub async fn ring(context: &Context, options: Options) -> Result<(), Failure> {
    match options.command {
        Some(RingCommand::Plan(change)) => plan(context, change).await,
        None => {
            show(
                context,
                options.watch,
                |overview, json| if json { ring_json(overview) } else { ring_table(overview) },
            )
            .await
        }
    }
}

/// Shows the shards that are on their way.
pub async fn moves(context: &Context, options: MovesOptions) -> Result<(), Failure> {
    show(
        context,
        options.watch,
        |overview, json| if json { moves_json(overview) } else { moves_table(overview) },
    )
    .await
}

async fn operator(context: &Context) -> Result<Operator, Failure> {
    let operator = Operator::new(&context.client_config()?)?;
    operator.refresh_map().await;
    Ok(operator)
}

/// Shows something once, or again and again.
async fn show(
    context: &Context,
    watch: bool,
    print: impl Fn(&Overview, bool) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let operator = operator(context).await?;
    let stop = troth_protocol::process::asked_to_stop(false);
    tokio::pin!(stop);
    let redraw = watch && !context.json && std::io::stdout().is_terminal();
    loop {
        match operator.overview().await {
            Ok(overview) => {
                if redraw {
                    // Home, and clear.
                    line("\x1b[H\x1b[2J")?;
                }
                print(&overview, context.json)?;
            }
            Err(error) if !watch => return Err(error.into()),
            Err(error) => eprintln!("troth: {error}"),
        }
        if !watch {
            break;
        }
        tokio::select! {
            _ = &mut stop => break,
            () = tokio::time::sleep(WATCH_INTERVAL) => {}
        }
    }
    operator.close().await;
    Ok(())
}

fn ids(nodes: &[NodeId]) -> Vec<u64> {
    nodes.iter().map(|node| node.0).collect()
}

fn words(nodes: &[NodeId]) -> String {
    nodes.iter().map(NodeId::to_string).collect::<Vec<_>>().join(" ")
}

fn moves_value(overview: &Overview) -> Vec<Value> {
    let sizes = overview.sizes();
    let value = |step: &troth_protocol::Move| {
        let progress = overview.progress(step.shard);
        let moving = progress.map(|(_, moving)| moving);
        json!({
            "shard": step.shard.0,
            "from": ids(overview.map.replicas_of(step.shard)),
            "to": ids(&step.to),
            "leader": progress.map(|(node, _)| node.0),
            "stage": moving.map_or("waiting", |moving| moving.stage.name()),
            "bytes_sent": moving.map(|moving| moving.sent),
            "bytes_known": moving.map(|moving| moving.known),
            "bytes_on_disk": sizes.get(&step.shard),
            "percent": moving.and_then(|moving| moving.permille).map(|permille| f64::from(permille) / 10.0),
            "left_ms": moving.as_ref().and_then(Moving::left_ms),
            "age_ms": overview.move_age_ms(step.shard),
        })
    };
    overview.map.moves.iter().map(value).collect()
}

fn moves_json(overview: &Overview) -> Result<(), Failure> {
    line(json!({
        "moves": moves_value(overview), "waiting": overview.moves_waiting(),
        "moved_shards": overview.moved_shards, "moved_bytes": overview.moved_bytes,
    }))
}

fn moves_table(overview: &Overview) -> Result<(), Failure> {
    let sizes = overview.sizes();
    let row = |step: &troth_protocol::Move| {
        let moving = overview.progress(step.shard).map(|(_, moving)| moving);
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        vec![
            step.shard.to_string(),
            words(overview.map.replicas_of(step.shard)),
            words(&step.to),
            moving.map_or("waiting", |moving| moving.stage.name()).to_owned(),
            or_dash(moving.map(|moving| bytes_text(moving.sent))),
            sizes.get(&step.shard).map_or("-".into(), |bytes| bytes_text(*bytes)),
            or_dash(
                moving
                    .and_then(|moving| moving.permille)
                    .map(|permille| format!("{:.1} %", f64::from(permille) / 10.0)),
            ),
            or_dash(
                moving.as_ref().and_then(Moving::left_ms).map(|left| format!("{:.0} s", left as f64 / 1e3)),
            ),
            format!("{:.0} s", overview.move_age_ms(step.shard) as f64 / 1e3),
        ]
    };
    let rows: Vec<_> = overview.map.moves.iter().map(row).collect();
    if !rows.is_empty() {
        table(&["SHARD", "FROM", "TO", "STAGE", "SENT", "ON DISK", "DONE", "LEFT", "AGE"], &rows)?;
        line("")?;
    }
    line(format!(
        "{} shards move, {} wait to; {} have moved since the cluster was made, {} were sent for that",
        overview.map.moves.len(),
        overview.moves_waiting(),
        overview.moved_shards,
        bytes_text(overview.moved_bytes),
    ))
}

fn ring_json(overview: &Overview) -> Result<(), Failure> {
    let (map, leaders) = (&overview.map, overview.leaders());
    let shard = |shard: u16| {
        let shard = ShardId(shard);
        json!({
            "shard": shard.0,
            "replicas": ids(map.replicas_of(shard)),
            "to": map.move_of(shard).map(|step| ids(&step.to)),
            "leader": leaders.get(&shard).map(|leader| leader.0),
        })
    };
    let node = |node: &Node| {
        json!({
            "id": node.id.0, "address": node.address, "zone": node.zone, "weight": node.weight,
            "state": node.state.name(), "shards": map.shards_on(node.id),
        })
    };
    line(json!({
        "cluster": map.cluster.to_string(), "map_epoch": map.epoch.0, "replicas": map.replicas,
        "nodes": map.nodes.iter().map(node).collect::<Vec<_>>(),
        "shards": (0..map.shards).map(shard).collect::<Vec<_>>(),
        "moves": moves_value(overview),
    }))
}

fn ring_table(overview: &Overview) -> Result<(), Failure> {
    let (map, leaders) = (&overview.map, overview.leaders());
    line(format!(
        "cluster {}, map {}: {} shards, {} replicas",
        map.cluster, map.epoch, map.shards, map.replicas
    ))?;
    line("")?;
    let led = |node: NodeId| leaders.values().filter(|leader| **leader == node).count();
    let node = |node: &Node| {
        let zone = if node.zone.is_empty() { "-" } else { &node.zone };
        vec![
            node.id.to_string(),
            node.address.clone(),
            zone.to_owned(),
            node.weight.to_string(),
            node.state.to_string(),
            map.shards_on(node.id).to_string(),
            led(node.id).to_string(),
        ]
    };
    let nodes: Vec<_> = map.nodes.iter().map(node).collect();
    table(&["NODE", "ADDRESS", "ZONE", "WEIGHT", "STATE", "SHARDS", "LEADS"], &nodes)?;
    line("")?;
    let shard = |shard: u16| {
        let shard = ShardId(shard);
        let leader = leaders.get(&shard).map_or("none".into(), NodeId::to_string);
        let mut row = vec![shard.to_string(), words(map.replicas_of(shard)), leader];
        row.extend(map.move_of(shard).map(|step| format!("moves to {}", words(&step.to))));
        row
    };
    let shards: Vec<_> = (0..map.shards).map(shard).collect();
    table(&["SHARD", "REPLICAS", "LEADER", ""], &shards)?;
    line("")?;
    moves_table(overview)
}

/// The map as it would be after a change.
fn changed(map: &ClusterMap, change: &PlanCommand) -> Result<ClusterMap, Failure> {
    let mut map = map.clone();
    match change {
        PlanCommand::Add { id, weight, zone } => {
            let address = map.node(NodeId(*id)).map_or(String::new(), |node| node.address.clone());
            map.nodes.retain(|node| node.id != NodeId(*id));
            map.nodes.push(Node {
                id: NodeId(*id),
                address,
                zone: zone.clone(),
                weight: *weight,
                state: NodeState::Active,
                incarnation: Default::default(),
            });
            map.nodes.sort_by_key(|node| node.id);
        }
        PlanCommand::Drain { id } => {
            let node = map.nodes.iter_mut().find(|node| node.id == NodeId(*id));
            let node = node.ok_or_else(|| Failure::new(EXIT_USAGE, format!("there is no node {id}")))?;
            node.state = NodeState::Draining;
            let left = map.nodes.iter().filter(|node| node.state == NodeState::Active).count();
            if left < usize::from(map.replicas) {
                let reason = format!(
                    "without node {id} there are {left} active nodes, too few for {} replicas; add one first",
                    map.replicas
                );
                return Err(Failure::new(EXIT_USAGE, reason));
            }
        }
    }
    Ok(map)
}

async fn plan(context: &Context, change: PlanCommand) -> Result<(), Failure> {
    let operator = operator(context).await?;
    let overview = operator.overview().await?;
    operator.close().await;
    let (map, sizes) = (&overview.map, overview.sizes());
    let steps = diff(&map.placement, &changed(map, &change)?.target());
    let bytes = |step: &troth_protocol::ring::Move| {
        sizes.get(&step.shard).copied().unwrap_or(0) * step.add.len() as u64
    };
    let replicas: usize = map.placement.iter().map(Vec::len).sum();
    let moving: usize = steps.iter().map(|step| step.add.len()).sum();
    let total: u64 = steps.iter().map(bytes).sum();
    let percent = 100.0 * moving as f64 / replicas.max(1) as f64;
    if context.json {
        let step = |step: &troth_protocol::ring::Move| json!({ "shard": step.shard.0, "add": ids(&step.add), "remove": ids(&step.remove), "bytes": bytes(step) });
        return line(json!({
            "moves": steps.iter().map(step).collect::<Vec<_>>(), "replicas": replicas,
            "replicas_moving": moving, "percent": percent, "bytes": total,
        }));
    }
    let row = |step: &troth_protocol::ring::Move| {
        vec![step.shard.to_string(), words(&step.add), words(&step.remove), bytes_text(bytes(step))]
    };
    if !steps.is_empty() {
        table(&["SHARD", "COMES TO", "LEAVES", "ABOUT"], &steps.iter().map(row).collect::<Vec<_>>())?;
        line("")?;
    }
    line(format!(
        "{moving} of {replicas} replicas would move ({percent:.0} %), about {}; nothing was changed",
        bytes_text(total)
    ))
}
