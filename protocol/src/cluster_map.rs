//! The cluster map: who is there, and which nodes hold which shard.

use crate::id::{ClusterId, MapEpoch, NodeId, ShardId};
use crate::ring::{Member, Placement, Ring};

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
}

/// A version of the map. The coordinators agree on it; everybody else keeps a copy and refreshes it
/// when told that it is stale.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct ClusterMap {
    /// The installation.
    pub cluster: ClusterId,
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

    /// The replicas of a shard; empty while nothing is placed.
    pub fn replicas_of(&self, shard: ShardId) -> &[NodeId] {
        self.placement.get(usize::from(shard.0)).map_or(&[], Vec::as_slice)
    }

    /// The ring of the participants.
    pub fn ring(&self) -> Ring {
        Ring::new(self.nodes.iter().map(|node| Member {
            node: node.id,
            weight: node.weight,
            zone: node.zone.clone(),
        }))
    }
}
