//! A cluster of real processes on this machine, and a workload for it: what the demo, the tests and
//! the benchmarks share.

pub mod bank;
pub mod load;
pub mod moving;
pub mod processes;

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::operator::{ClusterStatus, Operator};

/// A cluster is not as it should be, and does not get there.
#[derive(Debug, thiserror::Error)]
#[error("the cluster does not settle: leader {:?}, shards served by {:?}", .0.leader(), .0.serving())]
pub struct Unsettled(ClusterStatus);

/// Waits until a coordinator leads and every shard is served by the node that should lead it.
///
/// # Errors
/// If that is not so within `patience`.
pub async fn until_settled(operator: &Operator, patience: Duration) -> Result<ClusterStatus, Box<Unsettled>> {
    let deadline = Instant::now() + patience;
    loop {
        let status = operator.status().await;
        if status.is_settled() {
            return Ok(status);
        }
        if Instant::now() > deadline {
            return Err(Box::new(Unsettled(status)));
        }
        sleep(Duration::from_millis(50)).await;
    }
}
