//! `troth status` and `troth ring`: how the cluster is.

use std::collections::BTreeMap;

use serde_json::json;
use troth_protocol::{Node, NodeId};
use troth_sdk::operator::{ClusterStatus, CoordinatorStatus, OperatorError, ParticipantStatus, ShardStatus};

use crate::Context;
use crate::output::{EXIT_FAILED, Failure, line, table};

/// Shows how the servers are. Fails if a server does not answer.
pub async fn status(context: &Context) -> Result<(), Failure> {
    let client = context.connect().await?;
    let answers = client.operator().status().await;
    client.close().await;
    if context.json {
        line(json_status(&answers))?;
    } else {
        print_status(&answers)?;
    }
    match answers.down() {
        0 => Ok(()),
        down => Err(Failure::new(EXIT_FAILED, format!("{down} servers do not answer"))),
    }
}

fn json_status(answers: &ClusterStatus) -> serde_json::Value {
    let coordinators: Vec<_> = answers
        .coordinators
        .iter()
        .map(|(node, told)| match told {
            Ok(status) => json!({
                "id": node.id.0, "address": node.address, "up": true, "version": status.version,
                "leader": status.leader.map(|leader| leader.0), "epoch": status.epoch.map(|epoch| epoch.0),
                "map_epoch": status.map_epoch.0, "in_flight": status.in_flight,
                "unfinished": status.unfinished, "committed": status.committed, "aborted": status.aborted,
            }),
            Err(error) => {
                json!({ "id": node.id.0, "address": node.address, "up": false, "error": error.to_string() })
            }
        })
        .collect();
    let shard = |shard: &ShardStatus| {
        json!({
            "shard": shard.shard.0, "leader": shard.leader.map(|leader| leader.0), "serving": shard.serving,
            "lead": shard.lead, "applied": shard.applied, "prepared": shard.prepared, "locks": shard.locks, "waiting": shard.waiting,
        })
    };
    let participants: Vec<_> = answers
        .participants
        .iter()
        .map(|(node, told)| match told {
            Ok(status) => json!({
                "id": node.id.0, "address": node.address, "zone": node.zone, "weight": node.weight, "up": true,
                "version": status.version, "map_epoch": status.map_epoch.0,
                "shards": status.shards.iter().map(shard).collect::<Vec<_>>(),
            }),
            Err(error) => {
                json!({ "id": node.id.0, "address": node.address, "up": false, "error": error.to_string() })
            }
        })
        .collect();
    json!({ "coordinators": coordinators, "participants": participants })
}

fn print_status(answers: &ClusterStatus) -> Result<(), Failure> {
    let seen: BTreeMap<NodeId, Option<u64>> =
        answers.up_coordinators().flat_map(|status| status.nodes_seen.clone()).collect();
    let coordinator = |(node, told): &(Node, Result<CoordinatorStatus, OperatorError>)| {
        let mut row = vec![node.id.to_string(), node.address.clone()];
        match told {
            Ok(status) => {
                let role = if status.epoch.is_some() { "leader" } else { "standby" };
                row.extend([
                    role.to_owned(),
                    status.epoch.map_or("-".into(), |epoch| epoch.to_string()),
                    status.in_flight.to_string(),
                    status.unfinished.to_string(),
                    format!("{} / {}", status.committed, status.aborted),
                ]);
            }
            Err(error) => row.push(format!("DOWN: {error}")),
        }
        row
    };
    let rows: Vec<_> = answers.coordinators.iter().map(coordinator).collect();
    table(
        &["COORDINATOR", "ADDRESS", "ROLE", "EPOCH", "IN FLIGHT", "UNFINISHED", "COMMITTED / ABORTED"],
        &rows,
    )?;
    line("")?;
    let participant = |(node, told): &(Node, Result<ParticipantStatus, OperatorError>)| {
        let mut row = vec![node.id.to_string(), node.address.clone()];
        match told {
            Ok(status) => {
                let sum = |of: fn(&ShardStatus) -> u64| status.shards.iter().map(of).sum::<u64>().to_string();
                let serving = status.shards.iter().filter(|shard| shard.serving).count();
                let seen = seen.get(&node.id).copied().flatten();
                row.extend([
                    format!("{serving} of {}", status.shards.len()),
                    sum(|shard| shard.prepared),
                    sum(|shard| shard.locks),
                    sum(|shard| shard.waiting),
                    seen.map_or("-".into(), |millis| format!("{:.1} s", millis as f64 / 1e3)),
                ]);
            }
            Err(error) => row.push(format!("DOWN: {error}")),
        }
        row
    };
    let rows: Vec<_> = answers.participants.iter().map(participant).collect();
    table(&["PARTICIPANT", "ADDRESS", "SHARDS LED", "PREPARED", "LOCKS", "WAITING", "LAST SEEN"], &rows)
}

/// Shows which nodes hold which shards, and who leads them.
pub async fn ring(context: &Context) -> Result<(), Failure> {
    let client = context.connect().await?;
    let answers = client.operator().status().await;
    let map = client.map();
    client.close().await;
    let leaders: BTreeMap<u16, NodeId> =
        answers.serving().into_iter().map(|(shard, node)| (shard.0, node)).collect();
    if context.json {
        let shards: Vec<_> = (0..map.shards)
            .map(|shard| {
                let replicas = map.placement.get(usize::from(shard)).cloned().unwrap_or_default();
                json!({
                    "shard": shard,
                    "replicas": replicas.iter().map(|node| node.0).collect::<Vec<_>>(),
                    "leader": leaders.get(&shard).map(|leader| leader.0),
                })
            })
            .collect();
        let nodes: Vec<_> = map
            .nodes
            .iter()
            .map(|node| json!({ "id": node.id.0, "address": node.address, "zone": node.zone, "weight": node.weight }))
            .collect();
        return line(json!({
            "cluster": map.cluster.to_string(), "map_epoch": map.epoch.0, "replicas": map.replicas,
            "nodes": nodes, "shards": shards,
        }));
    }
    line(format!(
        "cluster {}, map {}: {} shards, {} replicas",
        map.cluster, map.epoch, map.shards, map.replicas
    ))?;
    line("")?;
    let held = |node: NodeId| map.placement.iter().filter(|replicas| replicas.contains(&node)).count();
    let led = |node: NodeId| leaders.values().filter(|leader| **leader == node).count();
    let nodes: Vec<_> = map
        .nodes
        .iter()
        .map(|node| {
            let zone = if node.zone.is_empty() { "-" } else { &node.zone };
            vec![
                node.id.to_string(),
                node.address.clone(),
                zone.to_owned(),
                node.weight.to_string(),
                held(node.id).to_string(),
                led(node.id).to_string(),
            ]
        })
        .collect();
    table(&["NODE", "ADDRESS", "ZONE", "WEIGHT", "SHARDS", "LEADS"], &nodes)?;
    line("")?;
    let shards: Vec<_> = (0..map.shards)
        .map(|shard| {
            let replicas = map.placement.get(usize::from(shard)).cloned().unwrap_or_default();
            let replicas: Vec<String> = replicas.iter().map(NodeId::to_string).collect();
            let leader = leaders.get(&shard).map_or("none".into(), NodeId::to_string);
            vec![shard.to_string(), replicas.join(" "), leader]
        })
        .collect();
    table(&["SHARD", "REPLICAS", "LEADER"], &shards)
}
