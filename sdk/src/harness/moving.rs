//! Nodes that come and go, and shards that follow them.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use troth_protocol::NodeId;
use troth_protocol::ring::diff;

use crate::operator::{NodeChange, Operator, OperatorError, Overview};

/// Shards did not come to where they should be.
#[derive(Debug, thiserror::Error)]
pub enum NotPlaced {
    /// They are still on their way.
    #[error("shards stay on their way: {:?}", .0.map.moves)]
    Moving(Box<Overview>),
    /// Nobody says where they are.
    #[error("nobody says where the shards are: {0}")]
    Silent(#[from] OperatorError),
}

/// Changes the standing of a node, and asks again while nobody can: it has not made itself known yet, or
/// no coordinator leads.
///
/// # Errors
/// Why it could not be done within `patience`.
pub async fn change_node(
    operator: &Operator,
    node: NodeId,
    change: NodeChange,
    patience: Duration,
) -> Result<(), OperatorError> {
    let deadline = Instant::now() + patience;
    loop {
        match operator.change_node(node, change.clone()).await {
            Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
            ended => return ended,
        }
    }
}

/// Waits until no shard is on its way, and all are where the ring wants them.
///
/// # Errors
/// If that is not so within `patience`.
pub async fn until_placed(operator: &Operator, patience: Duration) -> Result<Overview, NotPlaced> {
    let deadline = Instant::now() + patience;
    loop {
        let late = Instant::now() > deadline;
        match operator.overview().await {
            Ok(overview)
                if overview.map.moves.is_empty()
                    && diff(&overview.map.placement, &overview.target).is_empty() =>
            {
                return Ok(overview);
            }
            Ok(overview) if late => return Err(NotPlaced::Moving(Box::new(overview))),
            Err(error) if late => return Err(error.into()),
            Ok(_) | Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}
