//! `troth status`: how the servers are.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;
use troth_protocol::{Node, NodeId};
use troth_sdk::operator::{
    ClusterStatus, CoordinatorStatus, Operator, OperatorError, ParticipantStatus, ShardStatus,
};

use crate::Context;
use crate::output::{EXIT_FAILED, Failure, line, table};

/// Shows how the servers are. Fails if a server does not answer.
pub async fn status(context: &Context) -> Result<(), Failure> {
    // Not as a client, which would wait until somebody leads.
    let operator = Operator::new(&context.client_config()?)?;
    let answers = operator.status().await;
    operator.close().await;
    if context.json {
        line(json_status(&answers))?;
    } else {
        print_status(&answers)?;
    }
    match answers.down() {
        0 => Ok(()),
        _ if answers.up_coordinators().count() + answers.up_participants().count() == 0 => {
            let reasons: Vec<String> = answers
                .coordinators
                .iter()
                .filter_map(|(_, told)| told.as_ref().err())
                .map(ToString::to_string)
                .collect();
            Err(Failure::new(EXIT_FAILED, format!("no server answers: {}", reasons.join("; "))))
        }
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
                "notices": status.notices.iter().map(|notice| json!({ "at_ms": notice.at_ms, "what": notice.what }))
                    .collect::<Vec<_>>(),
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
                "id": node.id.0, "address": node.address, "zone": node.zone, "weight": node.weight,
                "state": node.state.name(), "up": true,
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
    if !rows.is_empty() {
        table(&["PARTICIPANT", "ADDRESS", "SHARDS LED", "PREPARED", "LOCKS", "WAITING", "LAST SEEN"], &rows)?;
    }
    print_notices(answers)
}

/// What operators should know, the latest last.
fn print_notices(answers: &ClusterStatus) -> Result<(), Failure> {
    let of = |status: &CoordinatorStatus| {
        let id = status.id;
        status.notices.clone().into_iter().map(move |notice| (notice.at_ms, id, notice.what))
    };
    let mut notices: Vec<(u64, NodeId, String)> = answers.up_coordinators().flat_map(of).collect();
    notices.sort();
    for (at_ms, id, what) in notices {
        let ago = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let ago = ago.saturating_sub(at_ms) / 1000;
        line(format!("\n{ago} s ago, coordinator {id}: {what}"))?;
    }
    Ok(())
}
