//! Handing leadership over, so that no transaction fails by it.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use troth_protocol::{NodeId, Reject};

use super::{ATTEMPT_PAUSE, Inner};

/// How long what is under way may take to end before leadership is handed over, and how often that is
/// looked at.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);
const DRAIN_POLL: Duration = Duration::from_millis(1);

/// The same before a stop: as long as it may take to elect somebody.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(1);

impl Inner {
    /// `whatever_is_under_way`: hand over at the end of the time to drain, drained or not.
    pub(super) async fn switchover(
        &self,
        to: Option<NodeId>,
        deadline: Instant,
        whatever_is_under_way: bool,
    ) -> Result<NodeId, Reject> {
        self.group.read_barrier().await?;
        self.fit_to_lead(to)?;
        if self.handing_over.send_replace(true) {
            return Err(Reject::overloaded(ATTEMPT_PAUSE));
        }
        let _admits_again = scopeguard::guard(&self.handing_over, |handing_over| {
            handing_over.send_replace(false);
        });
        let patience = if whatever_is_under_way { RESIGN_TIMEOUT } else { DRAIN_TIMEOUT };
        let drained = deadline.min(Instant::now() + patience);
        let to = loop {
            let in_flight = match &self.core.lock().leader {
                Some(leader) => leader.in_flight(),
                None => return Err(self.not_leader()),
            };
            // Whoever was fit a second ago may not be now, and the other way round.
            let to = self.fit_to_lead(to)?;
            let followers = self.group.followers();
            let behind =
                followers.iter().find(|follower| follower.node == to).map(|follower| follower.behind);
            if in_flight == 0 && behind == Some(0) {
                break to;
            }
            if Instant::now() >= drained {
                if whatever_is_under_way {
                    break to;
                }
                tracing::warn!(in_flight, %to, ?behind, "the switchover is called off");
                return Err(Reject::overloaded(DRAIN_TIMEOUT));
            }
            sleep(DRAIN_POLL).await;
        };
        let leads = self.group.transfer_leader(to, DRAIN_TIMEOUT).await?;
        tracing::info!(%leads, "leadership is handed over");
        Ok(leads)
    }

    /// The coordinator that shall lead, if it can.
    fn fit_to_lead(&self, wanted: Option<NodeId>) -> Result<NodeId, Reject> {
        let successor =
            || self.group.successor().ok_or_else(|| Reject::malformed("no other coordinator can lead now"));
        let Some(wanted) = wanted else {
            return successor();
        };
        if wanted == self.id {
            return Err(Reject::malformed(format!("coordinator {wanted} leads already")));
        }
        let followers = self.group.followers();
        match followers.iter().find(|follower| follower.node == wanted) {
            None => Err(Reject::malformed(format!("there is no coordinator {wanted}"))),
            Some(follower) if !follower.answers() => {
                Err(Reject::malformed(format!("coordinator {wanted} does not answer")))
            }
            Some(_) => Ok(wanted),
        }
    }
}
