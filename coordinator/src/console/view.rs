//! What the page draws, as JSON.

use serde_json::{Value, json};
use troth_protocol::message::admin::InDoubt;
use troth_protocol::message::overview::{NodeReport, NodeView, Overview};
use troth_protocol::{Move, Node, NodeId, ShardId};

/// The cluster, as coordinator `shown_by` shows it.
pub fn view(overview: &Overview, shown_by: NodeId) -> Value {
    let map = &overview.map;
    let leaders = overview.leaders();
    let sizes = overview.sizes();
    let none = NodeReport::default();
    let node = |node: &Node| {
        let view = overview.nodes.iter().find(|view| view.id == node.id);
        let silent = view.is_none_or(NodeView::is_silent);
        let report = view.filter(|_| !silent).map_or(&none, |view| &view.report);
        let seen_ms = view.and_then(|view| view.seen_ms);
        let serving = || report.shards.iter().filter(|shard| shard.serving);
        json!({
            "id": node.id.0, "address": node.address, "zone": node.zone, "weight": node.weight,
            "state": node.state.name(), "seen_ms": seen_ms,
            "silent": silent,
            "holds": map.shards_on(node.id),
            "leads": leaders.values().filter(|leader| **leader == node.id).count(),
            "prepared": serving().map(|shard| shard.prepared).sum::<u64>(),
            "waiting": serving().map(|shard| shard.waiting).sum::<u64>(),
        })
    };
    let shard = |shard: ShardId| {
        json!({
            "shard": shard.0, "replicas": ids(map.replicas_of(shard)),
            "leader": leaders.get(&shard).map(|leader| leader.0),
            "to": map.move_of(shard).map(|step| ids(&step.to)),
            "bytes": sizes.get(&shard),
        })
    };
    let step = |step: &Move| {
        let moving = overview.progress(step.shard).map(|(_, moving)| moving);
        json!({
            "shard": step.shard.0, "from": ids(map.replicas_of(step.shard)), "to": ids(&step.to),
            "stage": moving.map_or("waiting", |moving| moving.stage.name()),
            "sent": moving.map(|moving| moving.sent),
            "permille": moving.and_then(|moving| moving.permille),
            "left_ms": moving.and_then(|moving| moving.left_ms()),
            "age_ms": overview.move_age_ms(step.shard),
        })
    };
    let second = |second: &troth_protocol::message::overview::Second| {
        json!({
            "at_ms": second.at_ms, "committed": second.committed, "aborted": second.aborted,
            "shed": second.shed, "p50_us": second.p50_us, "p99_us": second.p99_us,
        })
    };
    let election = |election: &troth_protocol::message::overview::Election| {
        let shard = election.shard.map(|shard| shard.0);
        json!({ "at_ms": election.at_ms, "shard": shard, "node": election.node.0 })
    };
    // What a former leader of a shard said of it counts no more.
    let leads = |view: &NodeView, record: &InDoubt| leaders.get(&record.shard) == Some(&view.id);
    let told = overview.nodes.iter().flat_map(|view| view.report.in_doubt.iter().map(move |it| (view, it)));
    let mut in_doubt: Vec<&InDoubt> =
        told.filter(|(view, record)| leads(view, record)).map(|(_, record)| record).collect();
    in_doubt.sort_by_key(|record| (record.txn, record.shard));
    json!({
        "at_ms": overview.at_ms, "shown_by": shown_by.0, "leader": overview.leader.0,
        "epoch": overview.epoch.0, "cluster": map.cluster.to_string(), "map_epoch": map.epoch.0,
        "replicas": map.replicas,
        "coordinators": map.coordinators.iter().map(|node| json!({
            "id": node.id.0, "address": node.address,
        })).collect::<Vec<_>>(),
        "nodes": map.nodes.iter().map(node).collect::<Vec<_>>(),
        "shards": (0..map.shards).map(ShardId).map(shard).collect::<Vec<_>>(),
        "moves": map.moves.iter().map(step).collect::<Vec<_>>(),
        "moves_waiting": overview.moves_waiting(),
        "moved_shards": overview.moved_shards, "moved_bytes": overview.moved_bytes,
        "in_flight": overview.in_flight, "unfinished": overview.unfinished,
        "history": overview.history.iter().map(second).collect::<Vec<_>>(),
        "in_doubt": in_doubt.into_iter().map(doubt).collect::<Vec<_>>(),
        "elections": overview.elections.iter().map(election).collect::<Vec<_>>(),
    })
}

fn ids(nodes: &[NodeId]) -> Vec<u64> {
    nodes.iter().map(|node| node.0).collect()
}

fn doubt(record: &InDoubt) -> Value {
    json!({
        "txn": record.txn.to_string(), "shard": record.shard.0, "age_ms": record.age_ms,
        "epoch": record.epoch.0,
        "participants": record.participants.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "writes": record.writes, "locks": record.locks, "waiting": record.waiting,
        "blocked": record.blocked.iter().map(|read| json!({
            "at": read.at.to_string(), "key": read.key.to_string(),
        })).collect::<Vec<_>>(),
    })
}
