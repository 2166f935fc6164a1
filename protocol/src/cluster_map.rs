//! The cluster map: who is there, and which nodes hold which shard.

use std::collections::BTreeMap;
use std::fmt;

use crate::id::{ClusterId, Incarnation, Lineage, MapEpoch, NodeId, ShardId};
use crate::message::raft::LogId;
use crate::ring::{Member, Placement, Ring};

/// Where a participant stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum NodeState {
    /// It has made itself known, and holds nothing before an operator admits it.
    #[default]
    Waiting,
    /// It is on the ring.
    Active,
    /// It hands over all that it holds, and gets nothing.
    Draining,
    /// It has not been heard of for so long that others replace it. It is active again when it is back.
    Lost,
}

impl NodeState {
    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            NodeState::Waiting => "waiting",
            NodeState::Active => "active",
            NodeState::Draining => "draining",
            NodeState::Lost => "lost",
        }
    }
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A coordinator or a participant, as others find it.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Node {
    /// Its number, given by its configuration; unique among participants, and among coordinators.
    pub id: NodeId,
    /// Where it listens: `host:port`.
    pub address: String,
    /// What fails together with it; empty where nobody said.
    pub zone: String,
    /// Its share of the shards, relative to others. Coordinators have 0.
    pub weight: u32,
    /// Where it stands. Set by the coordinators; a node that makes itself known says *waiting*.
    pub state: NodeState,
    /// Which of its starts is admitted: others listen to no other one. Coordinators have 0: they tell each other.
    pub incarnation: Incarnation,
}

/// Where a member of the coordinator group stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum MemberState {
    /// An operator has let it in; it has no vote yet.
    Joining,
    /// It votes.
    Voting,
    /// An operator has sent it away; it may have a vote still.
    Leaving,
    /// Its folder is lost: it loses its vote, and joins with an empty folder then.
    Replacing,
}

impl MemberState {
    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            MemberState::Joining => "joining",
            MemberState::Voting => "voting",
            MemberState::Leaving => "leaving",
            MemberState::Replacing => "replacing",
        }
    }
}

/// A member of the coordinator group.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct CoordinatorMember {
    /// Its number among coordinators.
    pub id: NodeId,
    /// Where it listens: `host:port`.
    pub address: String,
    /// The entry of the coordinators' log that let it in; 0: it has founded the group. Whoever joined earlier
    /// under this number has lost its place.
    pub since: u64,
    /// Where it stands.
    pub state: MemberState,
}

/// A shard that is on its way to other nodes.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Move {
    /// The shard.
    pub shard: ShardId,
    /// The replicas that it shall have, the first on the ring first. Set by the coordinators' leader.
    pub to: Vec<NodeId>,
}

/// A version of the map. The coordinators agree on it; everybody else keeps a copy and refreshes it
/// when told that it is stale.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct ClusterMap {
    /// The installation.
    pub cluster: ClusterId,
    /// The coordinators that speak: those of another lineage were founded anew, and know nothing of this one.
    pub lineage: Lineage,
    /// Grows with every change; 0: nothing is placed yet.
    pub epoch: MapEpoch,
    /// The number of shards, fixed at `init`.
    pub shards: u16,
    /// How many replicas a shard should have, fixed at `init`.
    pub replicas: u16,
    /// The coordinators, ascending by id.
    pub coordinators: Vec<Node>,
    /// The participants, ascending by id.
    pub nodes: Vec<Node>,
    /// For each shard its replicas; empty while too few nodes have registered.
    pub placement: Placement,
    /// For each shard the entry of its own log that made these its replicas; `None`: its first ones. A
    /// replica that lacks it cannot lead.
    pub formed: Vec<Option<LogId>>,
    /// Shards that are on their way, ascending, each once.
    pub moves: Vec<Move>,
}

impl ClusterMap {
    /// Whether every shard has a home.
    pub fn is_placed(&self) -> bool {
        self.shards > 0 && self.placement.len() == usize::from(self.shards)
    }

    /// A participant by its id.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// The move of a shard that is under way.
    pub fn move_of(&self, shard: ShardId) -> Option<&Move> {
        self.moves.iter().find(|step| step.shard == shard)
    }

    /// The nodes that may hold a replica of a shard now: those that it has, and those that it is on its
    /// way to.
    pub fn members_of(&self, shard: ShardId) -> Vec<NodeId> {
        let mut members = self.replicas_of(shard).to_vec();
        let coming = self.move_of(shard).map_or(&[][..], |step| &step.to);
        members.extend(coming.iter().filter(|node| !self.replicas_of(shard).contains(node)));
        members
    }

    /// How many shards a node may hold a replica of.
    pub fn shards_on(&self, node: NodeId) -> usize {
        (0..self.shards).map(ShardId).filter(|shard| self.members_of(*shard).contains(&node)).count()
    }

    /// Where the shards should be: what the ring says, except where it has too few nodes for all replicas.
    pub fn target(&self) -> Placement {
        let wanted = self.ring().placement(self.shards, self.replicas.into());
        let choose = |(now, wanted): (&Vec<NodeId>, Vec<NodeId>)| {
            if wanted.len() < now.len() { now.clone() } else { wanted }
        };
        self.placement.iter().zip(wanted).map(choose).collect()
    }

    /// The replicas of a shard; empty while nothing is placed.
    pub fn replicas_of(&self, shard: ShardId) -> &[NodeId] {
        self.placement.get(usize::from(shard.0)).map_or(&[], Vec::as_slice)
    }

    /// Which replica of each shard should lead it, so that each node leads its share: shard by shard
    /// the replica whose node has the least to lead for its weight, the first of them if there are
    /// several; one that goes away only if there is no other. Empty while nothing is placed.
    pub fn preferred_leaders(&self) -> Vec<NodeId> {
        let mut leads: BTreeMap<NodeId, u64> = BTreeMap::new();
        let weight = |node: NodeId| u64::from(self.node(node).map_or(1, |node| node.weight).max(1));
        let stays = |node: &&NodeId| self.node(**node).is_some_and(|node| node.state == NodeState::Active);
        let choose = |replicas: &Vec<NodeId>| {
            // The shares are compared as fractions, without dividing.
            let lighter = |a: &&NodeId, b: &&NodeId| {
                let led = |node: &NodeId| leads.get(node).copied().unwrap_or(0) + 1;
                (led(a) * weight(**b)).cmp(&(led(b) * weight(**a)))
            };
            let best =
                replicas.iter().filter(stays).min_by(lighter).or_else(|| replicas.iter().min_by(lighter));
            let node = *best.expect("a placed shard has replicas");
            *leads.entry(node).or_default() += 1;
            node
        };
        self.placement.iter().map(choose).collect()
    }

    /// The ring of the participants that are active.
    pub fn ring(&self) -> Ring {
        Ring::new(self.nodes.iter().filter(|node| node.state == NodeState::Active).map(|node| Member {
            node: node.id,
            weight: node.weight,
            zone: node.zone.clone(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(weights: &[u32], placement: &[&[u64]], expected: &[u64]) {
        let node = |(at, weight): (usize, &u32)| Node {
            id: NodeId(at as u64 + 1),
            address: String::new(),
            zone: String::new(),
            weight: *weight,
            state: if *weight == 0 { NodeState::Draining } else { NodeState::Active },
            incarnation: Incarnation::default(),
        };
        let map = ClusterMap {
            cluster: ClusterId::default(),
            lineage: Lineage::default(),
            epoch: MapEpoch(1),
            shards: placement.len() as u16,
            replicas: 3,
            coordinators: Vec::new(),
            nodes: weights.iter().enumerate().map(node).collect(),
            placement: placement
                .iter()
                .map(|nodes| nodes.iter().map(|node| NodeId(*node)).collect())
                .collect(),
            formed: vec![None; placement.len()],
            moves: Vec::new(),
        };
        let leaders: Vec<u64> = map.preferred_leaders().into_iter().map(|node| node.0).collect();
        assert_eq!(leaders, expected, "{weights:?} {placement:?}");
    }

    #[test]
    fn every_node_leads_its_share() {
        check(&[1, 1, 1], &[], &[]);
        check(&[1, 1, 1], &[&[2, 1, 3][..]; 6], &[2, 1, 3, 2, 1, 3]);
        // Twice the weight, twice the share.
        check(&[2, 1, 1], &[&[3, 2, 1][..]; 8], &[1, 3, 2, 1, 1, 3, 2, 1]);
        // Only a replica can lead.
        check(&[1, 1, 1, 1], &[&[1, 2, 3], &[1, 2, 3], &[1, 2, 4], &[1, 2, 4]], &[1, 2, 4, 1]);
        // One that goes away leads only what nobody else can.
        check(&[0, 1, 1], &[&[1, 2, 3], &[1, 2, 3], &[1]], &[2, 3, 1]);
    }
}
