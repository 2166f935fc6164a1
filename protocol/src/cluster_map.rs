//! The cluster map: who is there, and which nodes hold which shard.

use std::collections::BTreeMap;

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

    /// Which replica of each shard should lead it, so that each node leads its share: shard by shard
    /// the replica whose node has the least to lead for its weight, the first of them if there are
    /// several. Empty while nothing is placed.
    pub fn preferred_leaders(&self) -> Vec<NodeId> {
        let mut leads: BTreeMap<NodeId, u64> = BTreeMap::new();
        let weight = |node: NodeId| u64::from(self.node(node).map_or(1, |node| node.weight).max(1));
        let choose = |replicas: &Vec<NodeId>| {
            // The shares are compared as fractions, without dividing.
            let lighter = |a: &&NodeId, b: &&NodeId| {
                let led = |node: &NodeId| leads.get(node).copied().unwrap_or(0) + 1;
                (led(a) * weight(**b)).cmp(&(led(b) * weight(**a)))
            };
            let node = *replicas.iter().min_by(lighter).expect("a placed shard has replicas");
            *leads.entry(node).or_default() += 1;
            node
        };
        self.placement.iter().map(choose).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(weights: &[u32], placement: &[&[u64]], expected: &[u64]) {
        let node = |(at, weight): (usize, &u32)| Node {
            id: NodeId(at as u64 + 1),
            address: String::new(),
            zone: String::new(),
            weight: *weight,
        };
        let map = ClusterMap {
            cluster: ClusterId::default(),
            epoch: MapEpoch(1),
            shards: placement.len() as u16,
            replicas: 3,
            coordinators: Vec::new(),
            nodes: weights.iter().enumerate().map(node).collect(),
            placement: placement
                .iter()
                .map(|nodes| nodes.iter().map(|node| NodeId(*node)).collect())
                .collect(),
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
    }
}
