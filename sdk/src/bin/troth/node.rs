//! `troth node`: which participants there are, and where they stand.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::json;
use troth_protocol::ring::WEIGHT_MAX;
use troth_protocol::ring::diff;
use troth_protocol::{NodeId, NodeState};
use troth_sdk::ClientConfig;
use troth_sdk::layout::{Layout, Newcomer};
use troth_sdk::operator::{NodeChange, Operator, OperatorError, Overview};

use crate::Context;
use crate::output::{EXIT_FAILED, EXIT_USAGE, Failure, bytes_text, line, table};
use crate::setup::HostingOptions;

/// How often it is looked whether shards have moved.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// What `troth node` does.
#[derive(Subcommand)]
pub enum NodeCommand {
    /// Show all participants, where they stand, and what they hold.
    List,
    /// Make the files of one more participant: its configuration and its certificate.
    Init(InitOptions),
    /// Put a participant on the ring, so that it gets its share of the shards; or give one that is on it
    /// another weight or zone, or take back that it is drained. It must run already.
    Add(AddOptions),
    /// Let a participant hand over all that it holds. Then it may stop for good.
    Drain(DrainOptions),
    /// Forget a participant that holds nothing any more. Its id is never used again.
    Remove(RemoveOptions),
}

/// Options of `troth node init`.
#[derive(Args)]
pub struct InitOptions {
    /// Its number: 1 or more, and never used before.
    id: u64,
    /// The folder that `troth init` made, with ca.pem and ca-key.pem.
    #[arg(long, default_value = "troth-cluster")]
    dir: PathBuf,
    /// Where it will listen.
    #[arg(long, value_name = "HOST:PORT")]
    listen: String,
    /// What fails together with it: a rack, a building.
    #[arg(long, default_value = "")]
    zone: String,
    /// Its share of the shards, relative to others: 1 to 100.
    #[arg(long, default_value_t = 1)]
    weight: u32,
    #[command(flatten)]
    hosting: HostingOptions,
}

/// Makes the files of one more participant.
fn init(context: &Context, options: InitOptions) -> Result<(), Failure> {
    let InitOptions { id, dir, listen, zone, weight, hosting } = options;
    if id == 0 || !(1..=WEIGHT_MAX).contains(&weight) || !listen.contains(':') {
        let reason = format!("an id is 1 or more, a weight from 1 to {WEIGHT_MAX}, an address host:port");
        return Err(Failure::new(EXIT_USAGE, reason));
    }
    let coordinators = ClientConfig::load(dir.join("client.toml"))?.coordinators;
    let newcomer = Newcomer { id, listen, coordinators, zone, weight, hosting: hosting.hosting(false) };
    let made = Layout::at(&dir).add_participant(&newcomer);
    let config = made.map_err(|error| Failure::new(EXIT_FAILED, error))?;
    if context.json {
        return line(json!({ "node": id, "config": config }));
    }
    line(format!("Start it: troth-participant --config {}", config.display()))?;
    line(format!("Then put it on the ring: troth --cluster {} node add {id}", dir.display()))
}

/// Options of `troth node add`.
#[derive(Args)]
pub struct AddOptions {
    /// Its number, as its configuration has it.
    id: u64,
    /// Its share of the shards, relative to others: 1 to 100. As it says itself if left out.
    #[arg(long)]
    weight: Option<u32>,
    /// What fails together with it: a rack, a building. As it says itself if left out.
    #[arg(long)]
    zone: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

/// Options of `troth node drain`.
#[derive(Args)]
pub struct DrainOptions {
    /// Its number.
    id: u64,
    #[command(flatten)]
    wait: Wait,
}

/// Options of `troth node remove`.
#[derive(Args)]
pub struct RemoveOptions {
    /// Its number.
    id: u64,
}

#[derive(Args)]
struct Wait {
    /// Wait until all shards are where they should be then, for as long as something moves; --timeout says
    /// how long nothing may.
    #[arg(long)]
    wait: bool,
}

/// `troth node`.
pub async fn run(context: &Context, command: NodeCommand) -> Result<(), Failure> {
    let command = match command {
        NodeCommand::Init(options) => return init(context, options),
        command => command,
    };
    let operator = Operator::new(&context.admin_config()?)?;
    operator.refresh_map().await;
    let result = match command {
        NodeCommand::Init(_) => unreachable!("done above, without a cluster"),
        NodeCommand::List => list(context, &operator).await,
        NodeCommand::Add(AddOptions { id, weight, zone, wait }) => {
            let change = NodeChange::Admit { weight, zone };
            change_node(context, &operator, id, change, wait.wait, "is on the ring").await
        }
        NodeCommand::Drain(DrainOptions { id, wait }) => {
            change_node(context, &operator, id, NodeChange::Drain, wait.wait, "is being drained").await
        }
        NodeCommand::Remove(RemoveOptions { id }) => {
            change_node(context, &operator, id, NodeChange::Remove, false, "is removed").await
        }
    };
    operator.close().await;
    result
}

async fn change_node(
    context: &Context,
    operator: &Operator,
    id: u64,
    change: NodeChange,
    wait: bool,
    done: &str,
) -> Result<(), Failure> {
    let before = operator.overview().await?;
    operator.change_node(NodeId(id), change).await?;
    let mut deadline = Instant::now() + context.timeout;
    let mut best = (usize::MAX, 0);
    let after = loop {
        let overview = match operator.overview().await {
            Ok(overview) => {
                let (ways, sent) = position(&overview);
                if ways < best.0 || sent > best.1 {
                    best = (best.0.min(ways), best.1.max(sent));
                    deadline = Instant::now() + context.timeout;
                }
                overview
            }
            // The leader may change while shards move.
            Err(_) if wait && Instant::now() < deadline => {
                tokio::time::sleep(LOOK_INTERVAL).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let ways = ways_to_go(&overview);
        if !wait || ways == 0 {
            break overview;
        }
        if Instant::now() >= deadline {
            let reason = format!(
                "{ways} shards are still on their way, and nothing has moved for {:.0} s; `troth moves` shows how far \
                 they are",
                context.timeout.as_secs_f64()
            );
            return Err(Failure::new(EXIT_FAILED, reason));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    };
    let moved = after.moved_shards - before.moved_shards.min(after.moved_shards);
    if context.json {
        return line(json!({
            "node": id, "waited": wait, "moved_shards": moved, "to_move": ways_to_go(&after),
            "moved_bytes": after.moved_bytes - before.moved_bytes.min(after.moved_bytes),
        }));
    }
    line(format!("node {id} {done}"))?;
    match ways_to_go(&after) {
        0 if wait => line(format!("{moved} shards have moved")),
        0 => Ok(()),
        ways => line(format!("{ways} shards move; `troth moves --watch` shows them")),
    }
}

/// Shards that are not where they should be.
fn ways_to_go(overview: &Overview) -> usize {
    let map = &overview.map;
    diff(&map.placement, &overview.target).len().max(map.moves.len())
}

/// How far all moves are together: shards on their way, and the bytes that were sent for them.
fn position(overview: &Overview) -> (usize, u64) {
    let moving = overview.nodes.iter().flat_map(|view| &view.report.shards).filter_map(|shard| shard.moving);
    (ways_to_go(overview), overview.moved_bytes + moving.map(|moving| moving.sent).sum::<u64>())
}

async fn list(context: &Context, operator: &Operator) -> Result<(), Failure> {
    let overview = operator.overview().await?;
    let map = &overview.map;
    let view = |id: NodeId| overview.nodes.iter().find(|view| view.id == id);
    let seen = |id: NodeId| view(id).and_then(|view| view.seen_ms);
    let bytes = |id: NodeId| {
        view(id).map_or(0, |view| view.report.shards.iter().map(|shard| shard.bytes).sum::<u64>())
    };
    let leads = |id: NodeId| {
        view(id).map_or(0, |view| view.report.shards.iter().filter(|shard| shard.serving).count())
    };
    if context.json {
        let nodes: Vec<_> = map
            .nodes
            .iter()
            .map(|node| {
                json!({
                    "id": node.id.0, "address": node.address, "zone": node.zone, "weight": node.weight,
                    "state": node.state.name(), "shards": map.shards_on(node.id), "leads": leads(node.id),
                    "bytes": bytes(node.id), "seen_ms": seen(node.id),
                })
            })
            .collect();
        return line(json!({ "nodes": nodes }));
    }
    let rows: Vec<_> = map
        .nodes
        .iter()
        .map(|node| {
            let held = map.shards_on(node.id);
            let state = match node.state {
                NodeState::Draining if held == 0 => "drained: may stop".to_owned(),
                state => state.to_string(),
            };
            let zone = if node.zone.is_empty() { "-" } else { &node.zone };
            vec![
                node.id.to_string(),
                node.address.clone(),
                zone.to_owned(),
                node.weight.to_string(),
                state,
                held.to_string(),
                leads(node.id).to_string(),
                bytes_text(bytes(node.id)),
                seen(node.id).map_or("-".into(), |millis| format!("{:.1} s", millis as f64 / 1e3)),
            ]
        })
        .collect();
    table(&["NODE", "ADDRESS", "ZONE", "WEIGHT", "STATE", "SHARDS", "LEADS", "BYTES", "LAST SEEN"], &rows)
}

impl From<OperatorError> for Failure {
    fn from(error: OperatorError) -> Failure {
        match error {
            // The words of the leader say it all.
            OperatorError::Refused { reject: troth_protocol::Reject::Malformed { reason }, .. } => {
                Failure::new(EXIT_FAILED, reason)
            }
            error => Failure::new(EXIT_FAILED, error),
        }
    }
}
