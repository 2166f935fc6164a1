//! Who belongs to a group, and changing that while it works.
//!
//! A change is a few entries of the log. A newcomer is a *learner* first: it receives everything and
//! votes on nothing. When it has caught up, the voters are changed: to a joint configuration, in which
//! both the old and the new voters must agree, and from there to the new one (Ongaro, "Consensus:
//! Bridging Theory and Practice", 2014, section 4.3). Each step may be asked for again, by whoever leads
//! then, until it is done.

use std::collections::BTreeSet;

use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::ClientWriteResponse;
use troth_protocol::NodeId;
use troth_protocol::message::raft as wire;

use super::{Group, ProposeError};
use crate::machine::Machine;
use crate::types::{self, Types};

/// Who belongs to a group, as one of its members sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Members {
    /// Who votes; in a joint configuration those of both sides.
    pub voters: BTreeSet<NodeId>,
    /// Who receives everything and does not vote.
    pub learners: BTreeSet<NodeId>,
    /// A change of voters has begun and is not finished.
    pub joint: bool,
    /// The entry that set this; `None`: none has yet.
    pub set_by: Option<wire::LogId>,
    /// That entry is committed.
    pub committed: bool,
}

impl<M: Machine> Group<M> {
    /// Who belongs to the group now, committed or not.
    pub fn members(&self) -> Members {
        let metrics = self.inner.raft.server_metrics();
        let now = metrics.borrow_watched();
        let membership = &now.membership_config;
        let nodes = |ids: &mut dyn Iterator<Item = u64>| ids.map(NodeId).collect::<BTreeSet<_>>();
        Members {
            voters: nodes(&mut membership.voter_ids()),
            learners: nodes(&mut membership.membership().learner_ids()),
            joint: membership.membership().get_joint_config().len() > 1,
            set_by: membership.log_id().as_ref().map(types::log_id_to_wire),
            committed: now.committed_membership_config.log_id() == membership.log_id(),
        }
    }

    /// Lets a node receive everything, without a vote. Returns when that is committed, not when the node
    /// has caught up. Does nothing if it belongs to the group already.
    ///
    /// # Errors
    /// [`ProposeError::Overloaded`] if another change is under way.
    pub async fn add_learner(&self, node: NodeId) -> Result<(), ProposeError> {
        self.change(ChangeMembers::AddNodes([(node.0, ())].into())).await.map(drop)
    }

    /// Sends learners away.
    ///
    /// # Errors
    /// [`ProposeError::Overloaded`] if another change is under way.
    pub async fn remove_learners(&self, nodes: &BTreeSet<NodeId>) -> Result<(), ProposeError> {
        let nodes = nodes.iter().map(|node| node.0).collect();
        self.change(ChangeMembers::RemoveNodes(nodes)).await.map(drop)
    }

    /// Makes these the voters, all of them members already, and sends those away that were voters before.
    /// Returns the entry that set this, when it is committed.
    ///
    /// # Errors
    /// [`ProposeError::Overloaded`] if another change is under way.
    pub async fn change_voters(&self, voters: &BTreeSet<NodeId>) -> Result<wire::LogId, ProposeError> {
        let voters = voters.iter().map(|node| node.0).collect();
        let done = self.change(ChangeMembers::ReplaceAllVoters(voters)).await?;
        Ok(types::log_id_to_wire(&done.log_id))
    }

    /// Finishes a change of voters that has begun.
    ///
    /// # Errors
    /// [`ProposeError::Overloaded`] if another change is under way.
    pub async fn finish_change(&self) -> Result<(), ProposeError> {
        self.change(ChangeMembers::AddVoterIds(BTreeSet::new())).await.map(drop)
    }

    async fn change(
        &self,
        changes: ChangeMembers<u64, ()>,
    ) -> Result<ClientWriteResponse<Types>, ProposeError> {
        self.inner.sole.end();
        let error = match self.inner.raft.change_membership(changes, false).await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        Err(match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
                ProposeError::NotLeader { leader: self.hint(&forward) }
            }
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => ProposeError::Unknown,
            RaftError::APIError(
                error
                @ (ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)),
            ) => {
                tracing::debug!(group = %self.inner.group, %error, "members cannot be changed now");
                ProposeError::Overloaded
            }
            RaftError::Fatal(error) => ProposeError::Stopped(error.to_string()),
        })
    }
}
