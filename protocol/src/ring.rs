//! The consistent-hash ring: which nodes hold which shard.
//!
//! Every node stands on the 64-bit circle at `weight × 128` points, its virtual nodes, at
//! `xxh3_64(node id | index)`. Every shard owns an arc of equal length and stands at its beginning.
//! A shard's replicas are the first distinct nodes clockwise from there, one per zone first, and
//! only then from zones already used. So a node that comes or goes changes only the shards that it
//! gains or gives up: Karger et al., "Consistent Hashing and Random Trees" (1997).
//!
//! ```text
//!            0
//!         n2 · n1            shard 0 at the top: n1, then n3 (n1 again is skipped)
//!      n3       n3
//!     n1         n2
//!      n2       n1
//!         n3 · n2
//! ```
//!
//! Everything here is pure, and what is hashed is a format: golden values stand in the tests.

use std::collections::BTreeSet;

use xxhash_rust::xxh3::xxh3_64;

use crate::id::{NodeId, ShardId};

/// Points on the ring for each unit of weight.
pub const VIRTUAL_NODES_PER_WEIGHT: u32 = 128;

/// The largest weight of a node.
pub const WEIGHT_MAX: u32 = 100;

/// A node as the ring sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// Who it is.
    pub node: NodeId,
    /// Its share of the shards, relative to others; 0: it holds none.
    pub weight: u32,
    /// What fails together with it: a rack, a building. Replicas spread over zones first.
    pub zone: String,
}

/// For each shard, in order, its replicas: the preferred leader first.
pub type Placement = Vec<Vec<NodeId>>;

/// Members on the circle.
#[derive(Clone, Debug)]
pub struct Ring {
    members: Vec<Member>,
    /// (point, index into `members`), ascending.
    tokens: Vec<(u64, usize)>,
}

impl Ring {
    /// Puts members on the ring. Their order does not matter; a weight above [`WEIGHT_MAX`] counts
    /// as that.
    pub fn new(members: impl IntoIterator<Item = Member>) -> Ring {
        let mut members: Vec<Member> = members.into_iter().collect();
        members.sort_by_key(|member| member.node);
        members.dedup_by_key(|member| member.node);
        let mut tokens: Vec<(u64, usize)> = members
            .iter()
            .enumerate()
            .flat_map(|(index, member)| {
                let points = member.weight.min(WEIGHT_MAX) * VIRTUAL_NODES_PER_WEIGHT;
                (0..points).map(move |point| (token(member.node, point), index))
            })
            .collect();
        tokens.sort_unstable();
        Ring { members, tokens }
    }

    /// The first `count` distinct nodes clockwise from a point, distinct zones first. Fewer if the
    /// ring has fewer nodes.
    pub fn replicas(&self, position: u64, count: usize) -> Vec<NodeId> {
        let clockwise = self.clockwise(position);
        let mut zones = BTreeSet::new();
        let (first_of_zone, others): (Vec<&Member>, Vec<&Member>) =
            clockwise.into_iter().partition(|member| zones.insert(&member.zone));
        first_of_zone.into_iter().chain(others).take(count).map(|member| member.node).collect()
    }

    /// The replicas of every shard.
    pub fn placement(&self, shards: u16, replicas: usize) -> Placement {
        (0..shards).map(|shard| self.replicas(position(ShardId(shard), shards), replicas)).collect()
    }

    /// All members with weight, each once, in the order in which a walk from `position` meets them.
    fn clockwise(&self, position: u64) -> Vec<&Member> {
        let start = self.tokens.partition_point(|&(point, _)| point < position);
        let (before, after) = self.tokens.split_at(start);
        let mut seen = vec![false; self.members.len()];
        after
            .iter()
            .chain(before)
            .filter(|&&(_, index)| !std::mem::replace(&mut seen[index], true))
            .map(|&(_, index)| &self.members[index])
            .collect()
    }
}

/// Where a shard stands: the beginning of its arc, `shard × 2^64 / shards`.
pub fn position(shard: ShardId, shards: u16) -> u64 {
    ((u128::from(shard.0) << 64) / u128::from(shards)) as u64
}

/// Where a virtual node stands: xxh3 with seed 0 of `[node id u64 | index u32]`, big-endian.
fn token(node: NodeId, index: u32) -> u64 {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&node.0.to_be_bytes());
    bytes[8..].copy_from_slice(&index.to_be_bytes());
    xxh3_64(&bytes)
}

/// What must happen to one shard to come from one placement to another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    /// The shard.
    pub shard: ShardId,
    /// Nodes that get a new replica.
    pub add: Vec<NodeId>,
    /// Nodes whose replica goes.
    pub remove: Vec<NodeId>,
}

/// The shards whose replicas differ, in order of shard.
///
/// # Panics
/// If the placements have different numbers of shards: that number never changes in a cluster.
pub fn diff(from: &Placement, to: &Placement) -> Vec<Move> {
    assert_eq!(from.len(), to.len(), "a cluster keeps its number of shards");
    let without = |these: &[NodeId], those: &[NodeId]| -> Vec<NodeId> {
        these.iter().filter(|node| !those.contains(node)).copied().collect()
    };
    from.iter()
        .zip(to)
        .enumerate()
        .map(|(shard, (old, new))| Move {
            shard: ShardId(shard as u16),
            add: without(new, old),
            remove: without(old, new),
        })
        .filter(|step| !step.add.is_empty() || !step.remove.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member(node: u64, weight: u32, zone: &str) -> Member {
        Member { node: NodeId(node), weight, zone: zone.to_owned() }
    }

    fn ring_of(nodes: impl IntoIterator<Item = u64>) -> Ring {
        Ring::new(nodes.into_iter().map(|node| member(node, 1, "")))
    }

    #[test]
    fn the_ring_is_a_format() {
        assert_eq!(token(NodeId(1), 0), 0xaf8a_366c_0b48_c68b);
        assert_eq!(token(NodeId(3), 127), 0x7b3e_8386_5719_4ad9);
        let placement = ring_of([1, 2, 3]).placement(16, 1);
        let owners: Vec<u64> = placement.iter().map(|replicas| replicas[0].0).collect();
        assert_eq!(owners, [2, 1, 3, 2, 1, 1, 2, 2, 1, 3, 1, 1, 3, 2, 1, 3]);
    }

    #[test]
    fn positions_divide_the_circle() {
        assert_eq!(position(ShardId(0), 16), 0);
        assert_eq!(position(ShardId(8), 16), 1 << 63);
        assert_eq!(position(ShardId(2), 3), 0xaaaa_aaaa_aaaa_aaaa);
    }

    #[test]
    fn a_small_ring_gives_what_it_has() {
        assert_eq!(ring_of([]).replicas(0, 3), []);
        assert_eq!(ring_of([7]).replicas(99, 3), [NodeId(7)]);
        let weightless = Ring::new([member(1, 0, ""), member(2, 1, "")]);
        assert_eq!(weightless.replicas(0, 2), [NodeId(2)]);
    }

    #[test]
    fn diff_names_who_gains_and_who_loses() {
        let n = NodeId;
        let from = vec![vec![n(1), n(2)], vec![n(2), n(3)], vec![n(3), n(1)]];
        let to = vec![vec![n(2), n(1)], vec![n(2), n(4)], vec![n(3), n(1)]];
        let step = Move { shard: ShardId(1), add: vec![n(4)], remove: vec![n(3)] };
        assert_eq!(diff(&from, &to), [step], "a new order of the same replicas moves nothing");
    }

    fn members() -> impl Strategy<Value = Vec<Member>> {
        proptest::collection::btree_map(0u64..1000, (1u32..4, 0u8..4), 1..12).prop_map(|nodes| {
            nodes
                .into_iter()
                .map(|(node, (weight, zone))| member(node, weight, &format!("z{zone}")))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn a_node_that_joins_takes_and_nobody_else_gains(members in members(), replicas in 1usize..4) {
            let before = Ring::new(members.clone()).placement(64, replicas);
            let newcomer = member(5_000, 1, "z0");
            let after = Ring::new(members.into_iter().chain([newcomer.clone()])).placement(64, replicas);
            for step in diff(&before, &after) {
                prop_assert_eq!(&step.add, &[newcomer.node], "only the newcomer gains");
                prop_assert!(step.remove.len() <= 1);
            }
        }

        #[test]
        fn replicas_are_distinct_and_spread_over_zones(members in members(), at: u64, replicas in 1usize..6) {
            let zone_of = |node: &NodeId| members.iter().find(|m| m.node == *node).map(|m| m.zone.clone());
            let zones: BTreeSet<_> = members.iter().map(|m| &m.zone).collect();
            let chosen = Ring::new(members.clone()).replicas(at, replicas);
            let distinct: BTreeSet<_> = chosen.iter().collect();
            prop_assert_eq!(distinct.len(), replicas.min(members.len()));
            let spread: BTreeSet<_> = chosen.iter().filter_map(zone_of).collect();
            prop_assert_eq!(spread.len(), chosen.len().min(zones.len()));
        }

        #[test]
        fn the_order_of_members_does_not_matter(members in members()) {
            let forward = Ring::new(members.clone()).placement(16, 3);
            prop_assert_eq!(forward, Ring::new(members.into_iter().rev()).placement(16, 3));
        }

        #[test]
        fn shares_follow_weights(first in 0u64..10_000, weights in proptest::collection::vec(1u32..4, 2..8)) {
            let members = weights.iter().zip(first..).map(|(&weight, node)| member(node, weight, ""));
            let shards = 4096;
            let placement = Ring::new(members).placement(shards, 1);
            let total: u32 = weights.iter().sum();
            for (&weight, node) in weights.iter().zip(first..) {
                let share = placement.iter().filter(|replicas| replicas[0] == NodeId(node)).count();
                let fair = f64::from(shards) * f64::from(weight) / f64::from(total);
                // 128 points per weight: the standard deviation of a share is about 9 % of it.
                prop_assert!((share as f64 / fair - 1.0).abs() < 0.5, "{share} of a fair {fair}");
            }
        }
    }
}
