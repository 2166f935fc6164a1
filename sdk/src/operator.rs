//! The operator's side of a cluster: how its servers are, which transactions are in doubt, and what
//! only a human may decide.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;
pub use troth_protocol::message::admin::{
    CoordinatorChange, CoordinatorStatus, Fault, FaultAction, FaultPoint, FaultStatus, InDoubt, NodeChange,
    Notice, ParticipantStatus, ShardStatus, TxnAtShard, TxnKnowledge,
};
use troth_protocol::message::admin::{Request as Ask, Response as Told};
pub use troth_protocol::message::overview::{
    Election, MoveStage, Moving, NodeReport, NodeView, Overview, Second, ShardReport,
};
pub use troth_protocol::message::shard::Decision;
use troth_protocol::message::{Request, Response};
pub use troth_protocol::net::Peer;
use troth_protocol::net::quic::Quic;
use troth_protocol::net::{CallError, Transport};
use troth_protocol::routing::Router;
use troth_protocol::{ClusterMap, CoordinatorMember, Node, NodeId, NodeState, Reject, ShardId, TxnId};

use crate::client::bind;
use crate::config::ClientConfig;
use crate::error::Error;

/// How long a server may take to answer an operator.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// An operator of a cluster. What only looks works with a client's certificate; the rest needs one of
/// role `admin`. Needs no leader, and where participants are named by hand no coordinator either.
#[derive(Clone)]
pub struct Operator {
    router: Arc<Router>,
    quic: Arc<Quic>,
    /// Those that were named by hand, instead of those of the map.
    named: Vec<Peer>,
}

/// A server did not do what an operator asked.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// It cannot be reached, or does not answer.
    #[error("{0}")]
    Call(#[from] CallError),
    /// It refuses.
    #[error("{peer}: {reject}")]
    Refused {
        /// Who refuses.
        peer: Peer,
        /// Why.
        reject: Reject,
    },
    /// It answered something else.
    #[error("{peer} answered something else")]
    WrongAnswer {
        /// Who did.
        peer: Peer,
    },
    /// No coordinator says that it leads.
    #[error("no coordinator leads")]
    NoLeader,
}

/// How all servers of a cluster are, or why they do not say.
#[derive(Debug)]
pub struct ClusterStatus {
    /// The coordinators of the map.
    pub coordinators: Vec<(Node, Result<CoordinatorStatus, OperatorError>)>,
    /// The participants of the map.
    pub participants: Vec<(Node, Result<ParticipantStatus, OperatorError>)>,
    /// The map that names them.
    pub map: Arc<ClusterMap>,
}

impl ClusterStatus {
    /// Coordinators that answered.
    pub fn up_coordinators(&self) -> impl Iterator<Item = &CoordinatorStatus> {
        self.coordinators.iter().filter_map(|(_, told)| told.as_ref().ok())
    }

    /// Participants that answered.
    pub fn up_participants(&self) -> impl Iterator<Item = &ParticipantStatus> {
        self.participants.iter().filter_map(|(_, told)| told.as_ref().ok())
    }

    /// How many servers did not answer.
    pub fn down(&self) -> usize {
        self.coordinators.iter().filter(|(_, told)| told.is_err()).count()
            + self.participants.iter().filter(|(_, told)| told.is_err()).count()
    }

    /// The coordinator that leads; the newest, if an older one has not noticed yet that it does not.
    pub fn leader(&self) -> Option<NodeId> {
        let leading = self.up_coordinators().filter_map(|status| Some((status.epoch?, status.id)));
        leading.max().map(|(_, id)| id)
    }

    /// Which participant serves each shard. Shards that nobody serves are not in it.
    pub fn serving(&self) -> BTreeMap<ShardId, NodeId> {
        let served = |status: &ParticipantStatus| {
            let shards = status.shards.iter().filter(|shard| shard.serving);
            shards.map(|shard| (shard.shard, status.id)).collect::<Vec<_>>()
        };
        self.up_participants().flat_map(served).collect()
    }

    /// Whether a coordinator leads, and every shard is placed, and served by the node that should lead it.
    pub fn is_settled(&self) -> bool {
        let (serving, preferred) = (self.serving(), self.map.preferred_leaders());
        let at_home = |(shard, node): (&ShardId, &NodeId)| preferred[usize::from(shard.0)] == *node;
        let all_served = self.map.is_placed() && serving.len() == preferred.len();
        self.leader().is_some() && all_served && serving.iter().all(at_home)
    }

    /// Transactions that are prepared and keys that they lock, on all replicas. `None` if a participant
    /// does not answer or a shard is not served: who knows what is held there.
    pub fn held(&self) -> Option<(u64, u64)> {
        let all_answer = self.participants.iter().all(|(_, told)| told.is_ok());
        if !all_answer || self.serving().len() < usize::from(self.map.shards) {
            return None;
        }
        let shards = || self.up_participants().flat_map(|status| &status.shards);
        Some((shards().map(|shard| shard.prepared).sum(), shards().map(|shard| shard.locks).sum()))
    }
}

impl Operator {
    /// Prepares to talk to a cluster, and waits for nobody.
    ///
    /// # Errors
    /// [`Error::Config`] if the certificates cannot be used.
    pub fn new(config: &ClientConfig) -> Result<Operator, Error> {
        let (quic, router) = bind(config)?;
        Ok(Operator::with(router, quic))
    }

    pub(crate) fn with(router: Arc<Router>, quic: Arc<Quic>) -> Operator {
        Operator { router, quic, named: Vec::new() }
    }

    /// Talks to these participants, and not to those of the map.
    #[must_use]
    pub fn with_participants(self, named: Vec<Peer>) -> Operator {
        Operator { named, ..self }
    }

    /// The cluster map as far as it is known; see [`Operator::refresh_map`].
    pub fn map(&self) -> Arc<ClusterMap> {
        self.router.map()
    }

    /// Fetches the newest map, if a coordinator has one.
    pub async fn refresh_map(&self) {
        self.router.refresh_map(Instant::now() + ANSWER_TIMEOUT).await;
    }

    /// The coordinators, of the configuration and of the map.
    pub fn coordinators(&self) -> Vec<Peer> {
        self.router.coordinators()
    }

    /// The participants: those that were named by hand, else those of the map.
    pub fn participants(&self) -> Vec<Peer> {
        if !self.named.is_empty() {
            return self.named.clone();
        }
        self.map().nodes.iter().map(|node| Peer::participant(&node.address)).collect()
    }

    /// How a coordinator is.
    ///
    /// # Errors
    /// If it does not answer within two seconds.
    pub async fn coordinator(&self, peer: &Peer) -> Result<CoordinatorStatus, OperatorError> {
        match self.ask(peer, Ask::Status).await? {
            Told::Coordinator(status) => Ok(status),
            _ => Err(OperatorError::WrongAnswer { peer: peer.clone() }),
        }
    }

    /// How a participant is.
    ///
    /// # Errors
    /// If it does not answer within two seconds.
    pub async fn participant(&self, peer: &Peer) -> Result<ParticipantStatus, OperatorError> {
        match self.ask(peer, Ask::Status).await? {
            Told::Participant(status) => Ok(status),
            _ => Err(OperatorError::WrongAnswer { peer: peer.clone() }),
        }
    }

    /// How all servers of the newest map are; they are asked at the same time.
    pub async fn status(&self) -> ClusterStatus {
        self.refresh_map().await;
        let map = self.map();
        let mut known = map.coordinators.clone();
        if known.is_empty() {
            // Nobody has told a map: those of the configuration, whoever they are.
            let unknown = |peer: &Peer| Node {
                id: NodeId(0),
                address: peer.address.to_string(),
                zone: String::new(),
                weight: 0,
                state: NodeState::Active,
                incarnation: Default::default(),
            };
            known = self.coordinators().iter().map(unknown).collect();
        }
        let coordinators = known.into_iter().map(async |mut node| {
            let told = self.coordinator(&Peer::coordinator(&node.address)).await;
            node.id = told.as_ref().map_or(node.id, |status| status.id);
            (node, told)
        });
        let participants = map
            .nodes
            .iter()
            .map(async |node| (node.clone(), self.participant(&Peer::participant(&node.address)).await));
        let (coordinators, participants) = tokio::join!(join_all(coordinators), join_all(participants));
        ClusterStatus { coordinators, participants, map }
    }

    /// Transactions that are prepared at the leaders of shards, one record for each shard.
    ///
    /// # Errors
    /// If a participant does not answer within two seconds.
    pub async fn in_doubt(&self) -> Result<Vec<InDoubt>, OperatorError> {
        let participants = self.participants();
        let answers =
            join_all(participants.iter().map(async |peer| match self.ask(peer, Ask::InDoubt).await? {
                Told::InDoubt(records) => Ok(records),
                _ => Err(OperatorError::WrongAnswer { peer: peer.clone() }),
            }));
        let records: Result<Vec<_>, OperatorError> = answers.await.into_iter().collect();
        Ok(records?.into_iter().flatten().collect())
    }

    /// What every server knows of a transaction; those that do not answer are left out.
    pub async fn knowledge(&self, txn: TxnId) -> Vec<(Peer, TxnKnowledge)> {
        let all = self.coordinators().into_iter().chain(self.participants());
        let answers = all.map(async |peer| match self.ask(&peer, Ask::Txn { txn }).await {
            Ok(Told::Txn(known)) => Some((peer, known)),
            Ok(_) | Err(_) => None,
        });
        join_all(answers).await.into_iter().flatten().collect()
    }

    /// Ends a transaction that is prepared at a shard, because the coordinators are lost for good. The
    /// note is for the audit record. Whoever calls this has made sure that no other shard ends it
    /// otherwise.
    ///
    /// # Errors
    /// If the participant does not lead the shard, knows better, or does not answer.
    pub async fn resolve(
        &self,
        leader: &Peer,
        shard: ShardId,
        txn: TxnId,
        decision: Decision,
        note: &str,
    ) -> Result<(), OperatorError> {
        match self.ask(leader, Ask::Resolve { shard, txn, decision, note: note.to_owned() }).await? {
            Told::Resolved => Ok(()),
            _ => Err(OperatorError::WrongAnswer { peer: leader.clone() }),
        }
    }

    /// Hands the leadership of the coordinators to another one, to the one that is fit best if `to` is
    /// `None`, and tells who leads now. Transactions wait meanwhile, and none fails by it.
    ///
    /// # Errors
    /// If nobody leads, or the leader refuses or calls it off.
    pub async fn switchover(&self, to: Option<NodeId>, patience: Duration) -> Result<NodeId, OperatorError> {
        match self.ask_leader(Ask::Switchover { to }, Instant::now() + patience).await? {
            (_, Told::Switched { to }) => Ok(to),
            (peer, _) => Err(OperatorError::WrongAnswer { peer }),
        }
    }

    /// How the cluster is, as the coordinators' leader sees it.
    ///
    /// # Errors
    /// If nobody leads.
    pub async fn overview(&self) -> Result<Overview, OperatorError> {
        match self.ask_leader(Ask::Overview, Instant::now() + ANSWER_TIMEOUT).await? {
            (_, Told::Overview(overview)) => Ok(overview),
            (peer, _) => Err(OperatorError::WrongAnswer { peer }),
        }
    }

    /// Changes where a participant stands. Its shards move afterwards: [`Operator::overview`] tells how
    /// far that is.
    ///
    /// # Errors
    /// If nobody leads, or the leader refuses; the reason says what would be right.
    pub async fn change_node(&self, node: NodeId, change: NodeChange) -> Result<(), OperatorError> {
        match self.ask_leader(Ask::Node { node, change }, Instant::now() + ANSWER_TIMEOUT).await? {
            (_, Told::NodeChanged) => Ok(()),
            (peer, _) => Err(OperatorError::WrongAnswer { peer }),
        }
    }

    /// Changes who belongs to the coordinators. It is done later: [`Operator::members`] tells when.
    ///
    /// # Errors
    /// If nobody leads, or the leader refuses; the reason says what would be right.
    pub async fn change_coordinators(&self, change: CoordinatorChange) -> Result<(), OperatorError> {
        match self.ask_leader(Ask::Coordinators(change), Instant::now() + ANSWER_TIMEOUT).await? {
            (_, Told::CoordinatorsChanged) => Ok(()),
            (peer, _) => Err(OperatorError::WrongAnswer { peer }),
        }
    }

    /// Who belongs to the coordinators, in the words of their leader.
    ///
    /// # Errors
    /// If nobody leads.
    pub async fn members(&self) -> Result<Vec<CoordinatorMember>, OperatorError> {
        self.refresh_map().await;
        let answers = self.coordinators().into_iter().map(async |peer| self.coordinator(&peer).await);
        let answers = join_all(answers).await.into_iter().flatten();
        let leading = answers.filter(|status| status.epoch.is_some()).max_by_key(|status| status.epoch);
        leading.map(|status| status.members).ok_or(OperatorError::NoLeader)
    }

    /// Asks each coordinator until one says that it leads.
    async fn ask_leader(&self, request: Ask, deadline: Instant) -> Result<(Peer, Told), OperatorError> {
        let mut last = OperatorError::NoLeader;
        for peer in self.coordinators() {
            match self.ask_until(&peer, request.clone(), deadline).await {
                Ok(told) => return Ok((peer, told)),
                Err(OperatorError::Refused { reject: Reject::NotLeader { .. }, .. }) => {}
                Err(error @ OperatorError::Refused { .. }) => return Err(error),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Arms, disarms or lists fault points of a server, for a test.
    ///
    /// # Errors
    /// If it refuses, as it does without an operator's certificate, or does not answer.
    pub async fn fault(&self, peer: &Peer, fault: Fault) -> Result<Vec<FaultStatus>, OperatorError> {
        match self.ask(peer, Ask::Fault(fault)).await? {
            Told::Faults(faults) => Ok(faults),
            _ => Err(OperatorError::WrongAnswer { peer: peer.clone() }),
        }
    }

    /// Says goodbye to the servers.
    pub async fn close(&self) {
        self.quic.close().await;
    }

    async fn ask(&self, peer: &Peer, request: Ask) -> Result<Told, OperatorError> {
        self.ask_until(peer, request, Instant::now() + ANSWER_TIMEOUT).await
    }

    async fn ask_until(&self, peer: &Peer, request: Ask, deadline: Instant) -> Result<Told, OperatorError> {
        let transport: &Arc<dyn Transport> = self.router.transport();
        match transport.call(peer, Request::Admin(request), deadline).await? {
            Response::Admin(told) => Ok(told),
            Response::Rejected(reject) => Err(OperatorError::Refused { peer: peer.clone(), reject }),
            _ => Err(OperatorError::WrongAnswer { peer: peer.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use troth_protocol::{ClusterId, Epoch, MapEpoch};

    use super::*;

    fn map(placement: Vec<Vec<NodeId>>) -> ClusterMap {
        let (coordinators, nodes, formed) = (Vec::new(), Vec::new(), vec![None; placement.len()]);
        let (cluster, epoch) = (ClusterId::default(), MapEpoch(1));
        ClusterMap {
            cluster,
            lineage: Default::default(),
            epoch,
            shards: 1,
            replicas: 1,
            coordinators,
            nodes,
            placement,
            formed,
            moves: Vec::new(),
        }
    }

    #[test]
    fn a_cluster_without_placed_shards_is_not_settled() {
        let id = NodeId(1);
        let leading = CoordinatorStatus {
            cluster: ClusterId::default(),
            id,
            version: String::new(),
            leader: Some(id),
            epoch: Some(Epoch(1)),
            map_epoch: MapEpoch(1),
            in_flight: 0,
            unfinished: 0,
            committed: 0,
            aborted: 0,
            nodes_seen: Vec::new(),
            members: Vec::new(),
            notices: Vec::new(),
        };
        let node = Node {
            id,
            address: String::new(),
            weight: 1,
            zone: String::new(),
            state: NodeState::Active,
            incarnation: Default::default(),
        };
        let status = |placement| ClusterStatus {
            coordinators: vec![(node.clone(), Ok(leading.clone()))],
            participants: Vec::new(),
            map: Arc::new(map(placement)),
        };
        assert_eq!(status(Vec::new()).leader(), Some(id));
        assert!(!status(Vec::new()).is_settled(), "nothing is served, as nothing is placed");
        assert!(!status(vec![vec![id]]).is_settled(), "the shard is not served");
    }
}
