//! A ring that changes while everything else goes wrong.

use std::time::Duration;

use troth_protocol::NodeId;
use troth_sdk::harness::moving::{change_node, until_placed};
use troth_sdk::operator::{NodeChange, Operator};

use crate::drill::Server;

/// How long a change may take.
const MOVE_PATIENCE: Duration = Duration::from_secs(600);

/// Lets a participant join or leave, and waits until its shards have moved.
///
/// # Errors
/// What has not happened in time.
pub async fn change_ring(operator: Operator, node: Server, leaves: bool) -> Result<(), String> {
    let Server::Participant(id) = node else { return Err(format!("{node} has no shards")) };
    let change = if leaves { NodeChange::Drain } else { NodeChange::Admit { weight: None, zone: None } };
    let asked = change_node(&operator, NodeId(id), change, MOVE_PATIENCE).await;
    asked.map_err(|error| error.to_string())?;
    until_placed(&operator, MOVE_PATIENCE).await.map_err(|error| error.to_string())?;
    if leaves {
        let removed = change_node(&operator, NodeId(id), NodeChange::Remove, MOVE_PATIENCE).await;
        removed.map_err(|error| error.to_string())?;
    }
    Ok(())
}
