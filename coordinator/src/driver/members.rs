//! Coordinators that come and go: the leader changes the members of the group until they are what the state says.
//!
//! ```text
//!   who leaves loses its vote ─► newcomers become learners ─► all of them have caught up ─► they vote
//!        │ the leader itself? it hands leadership over first
//! ```
//!
//! As with shards, every step looks at the group as it is and does what is missing, so that whoever leads goes on
//! where another one has stopped.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use troth_protocol::message::admin::CoordinatorChange;
use troth_protocol::{CoordinatorMember, NodeId, Reject};
use troth_replication::{Follower, Leadership, ProposeError};

use super::{Coordinator, HAND_OVER_PATIENCE, Inner};
use crate::command::{Command, Output};

/// How often it is looked at what is missing.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// A newcomer that is this many entries behind at most has caught up.
const BEHIND_MAX: u64 = 200;

impl Coordinator {
    /// Changes who belongs to the coordinators. Returns when it is decided; it is done when the status says so.
    ///
    /// # Errors
    /// If this one does not lead, or the change makes no sense; the reason says what would.
    pub async fn change_coordinators(&self, change: CoordinatorChange) -> Result<(), Reject> {
        self.inner.group.read_barrier().await?;
        if self.inner.core.lock().leader.is_none() {
            return Err(self.inner.not_leader());
        }
        tracing::info!(?change, "an operator changes who belongs to the coordinators");
        match self.inner.propose(&Command::Coordinators(change)).await? {
            Output::Refused(reason) => Err(Reject::malformed(reason)),
            _ => Ok(()),
        }
    }
}

impl Inner {
    /// Tells the others who this one is, for as long as it may take part.
    pub(super) async fn stay_known(self: Arc<Inner>) {
        if let Some(reason) = self.stop.run_until_cancelled(self.door.stay()).await {
            self.door.say_farewell(&reason).await;
            self.fail(reason);
        }
    }

    /// Sees to it that the group has the members that it should, whenever this one leads.
    pub(super) async fn keep_members(self: Arc<Inner>) {
        let lead = || async {
            tokio::select! {
                () = self.note_progress() => {}
                () = self.follow_members() => {}
            }
        };
        let follow = self.group.follow_leadership(|| {}, lead);
        self.stop.run_until_cancelled(follow).await;
    }

    async fn follow_members(&self) {
        loop {
            sleep(LOOK_INTERVAL).await;
            if self.core.lock().leader.is_none() {
                continue;
            }
            if let Err(error) = self.advance_members().await {
                tracing::debug!(%error, "the members of the coordinators have to wait");
            }
        }
    }

    /// Does the next step, if one is missing.
    async fn advance_members(&self) -> Result<(), ProposeError> {
        let Some(wanted) = self.wanted_members() else { return Ok(()) };
        let (group, members) = (&self.group, self.group.members());
        if !members.committed {
            return Ok(());
        }
        if members.joint {
            return group.finish_change().await;
        }
        let ids: BTreeSet<NodeId> = wanted.coordinators.iter().map(|member| member.id).collect();
        let stay: BTreeSet<NodeId> = ids.intersection(&wanted.voters).copied().collect();
        let gone: BTreeSet<NodeId> = members.learners.difference(&stay).copied().collect();
        if !gone.is_empty() {
            return group.remove_learners(&gone).await;
        }
        let left: BTreeSet<NodeId> = members.voters.intersection(&stay).copied().collect();
        if left != members.voters && !left.is_empty() {
            return self.dismiss(&left).await;
        }
        let newcomers: Vec<NodeId> = stay.difference(&members.voters).copied().collect();
        if let Some(node) = newcomers.iter().find(|node| !members.learners.contains(node)) {
            tracing::info!(coordinator = %node, "a coordinator is let in");
            return group.add_learner(*node).await;
        }
        if newcomers.is_empty() {
            return self.note_seated(&wanted, &members.voters).await;
        }
        let (followers, taken_in) = (group.followers(), members.set_by.map(|id| id.index));
        let ready = |node: &NodeId| {
            let follower = followers.iter().find(|follower| follower.node == *node);
            let has_it_all = |follower: &Follower| {
                follower.answers() && follower.matched >= taken_in && follower.behind <= BEHIND_MAX
            };
            follower.is_some_and(has_it_all)
        };
        if newcomers.iter().all(ready) {
            tracing::info!(voters = ?stay, "the coordinators that vote change");
            group.change_voters(&stay).await?;
        }
        Ok(())
    }

    /// Takes the vote from all but these, which have one.
    async fn dismiss(&self, left: &BTreeSet<NodeId>) -> Result<(), ProposeError> {
        if left.contains(&self.id) {
            tracing::info!(voters = ?left, "the coordinators that vote change");
            return self.group.change_voters(left).await.map(drop);
        }
        // Somebody who stays shall lead, before this one loses its vote.
        let followers = self.group.followers();
        let fit = followers.iter().filter(|follower| left.contains(&follower.node) && follower.can_lead());
        let Some(successor) = fit.min_by_key(|follower| follower.behind).map(|follower| follower.node) else {
            return Ok(());
        };
        let deadline = Instant::now() + HAND_OVER_PATIENCE;
        if let Err(reject) = self.switchover(Some(successor), deadline, false).await {
            tracing::debug!(%reject, "leadership is not handed over yet");
        }
        Ok(())
    }

    /// Puts on record that the members are what they should be, and where they are.
    async fn note_seated(&self, wanted: &Wanted, voters: &BTreeSet<NodeId>) -> Result<(), ProposeError> {
        if !wanted.settled {
            self.propose(&Command::Seated { voters: voters.iter().copied().collect() }).await?;
        }
        for (id, address) in
            self.peers.heard_at().into_iter().chain([(self.id, self.door.address().to_owned())])
        {
            let elsewhere = |member: &&CoordinatorMember| member.id == id && member.address != address;
            if wanted.coordinators.iter().any(|member| elsewhere(&member)) {
                tracing::info!(coordinator = %id, address, "a coordinator listens elsewhere now");
                self.propose(&Command::Found { id, address }).await?;
            }
        }
        Ok(())
    }

    fn wanted_members(&self) -> Option<Wanted> {
        if !matches!(&*self.group.leadership().borrow(), Leadership::Leader { .. }) {
            return None;
        }
        let core = self.core.lock();
        let catalog = core.state.catalog()?;
        let voting = |member: &CoordinatorMember| member.state == troth_protocol::MemberState::Voting;
        Some(Wanted {
            voters: catalog.wanted_voters().map(|member| member.id).collect(),
            settled: catalog.coordinators.iter().all(voting),
            coordinators: catalog.coordinators.clone(),
        })
    }
}

/// What the state says of the coordinators.
struct Wanted {
    coordinators: Vec<CoordinatorMember>,
    /// Those that shall vote.
    voters: BTreeSet<NodeId>,
    /// Nobody is on the way in or out.
    settled: bool,
}
