//! Where the shards should be, and which of them moves next.
//!
//! ```text
//!   ring of the active nodes ──► target ──► differs from where a shard is? ──► Move ──► (its group
//!        ▲                                                                              changes members)
//!        └── a node is admitted, drained, lost, or back                                     │
//!                                              placement = target ◄── Moved ◄───────────────┘
//! ```
//!
//! Only some shards move at once. A shard moves only while a majority of its replicas answers, and only
//! to nodes that answer: nothing is made worse to make it better.
//!
//! Pure: time is an argument. What is decided here enters the coordinators' log, and is carried out by
//! the shard's own leader.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use troth_protocol::ring::Placement;
use troth_protocol::{ClusterMap, MapEpoch, Move, NodeId, NodeState, ShardId};

/// A node that was not heard of for this long is not counted on.
const SILENT_MAX: Duration = Duration::from_secs(3);

/// What was decided is decided again if it has not happened after this long.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// How placement follows the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// A node that was not heard of for this long is replaced.
    pub replace_after: Duration,
    /// How many shards move at once.
    pub moves_at_once: usize,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules { replace_after: Duration::from_secs(60), moves_at_once: 2 }
    }
}

/// What is to be proposed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Plan {
    /// Replace this node.
    Lose(NodeId),
    /// Take these shards there.
    Move(Vec<Move>),
}

/// Follows the ring, for one leader.
#[derive(Clone, Debug)]
pub struct Steward {
    rules: Rules,
    began: Instant,
    seen: BTreeMap<NodeId, Instant>,
    /// The target, and the map that it follows from.
    target: (MapEpoch, Placement),
    /// Since when each move of the map is known.
    moving: BTreeMap<ShardId, Instant>,
    /// When something was decided last, and by which map.
    decided: Option<(Instant, MapEpoch)>,
}

impl Steward {
    /// A new leader's: it has not heard of anybody yet.
    pub fn new(rules: Rules, now: Instant) -> Steward {
        Steward {
            rules,
            began: now,
            seen: BTreeMap::new(),
            target: Default::default(),
            moving: BTreeMap::new(),
            decided: None,
        }
    }

    /// A participant has given a sign of life.
    pub fn saw(&mut self, now: Instant, node: NodeId) {
        self.seen.insert(node, now);
    }

    /// Since when each move is under way.
    pub fn moving(&self) -> &BTreeMap<ShardId, Instant> {
        &self.moving
    }

    /// For how long nothing was heard of a node; a new leader counts from its beginning.
    fn silent(&self, now: Instant, node: NodeId) -> Duration {
        now.saturating_duration_since(*self.seen.get(&node).unwrap_or(&self.began))
    }

    fn answers(&self, now: Instant, node: NodeId) -> bool {
        self.seen.contains_key(&node) && self.silent(now, node) < SILENT_MAX
    }

    /// What is to be proposed now, if anything.
    pub fn poll(&mut self, now: Instant, map: &ClusterMap) -> Option<Plan> {
        if !map.is_placed() {
            return None;
        }
        if self.target.0 != map.epoch {
            self.target = (map.epoch, map.target());
            self.moving.retain(|shard, _| map.move_of(*shard).is_some());
            for step in &map.moves {
                self.moving.entry(step.shard).or_insert(now);
            }
        }
        let waits = |(at, epoch): (Instant, MapEpoch)| epoch == map.epoch && now < at + AGAIN_AFTER;
        if self.decided.is_some_and(waits) {
            return None;
        }
        let plan = self.lost(now, map).map(Plan::Lose).or_else(|| self.moves(now, map).map(Plan::Move))?;
        self.decided = Some((now, map.epoch));
        Some(plan)
    }

    /// A node that is to be replaced, if others can take its place.
    fn lost(&self, now: Instant, map: &ClusterMap) -> Option<NodeId> {
        let active = || map.nodes.iter().filter(|node| node.state == NodeState::Active);
        let others =
            |lost: NodeId| active().filter(|node| node.id != lost && self.answers(now, node.id)).count();
        let silent = active().find(|node| self.silent(now, node.id) >= self.rules.replace_after)?;
        (others(silent.id) >= usize::from(map.replicas)).then_some(silent.id)
    }

    fn moves(&self, now: Instant, map: &ClusterMap) -> Option<Vec<Move>> {
        let target = |shard: ShardId| &self.target.1[usize::from(shard.0)];
        let wanted = |shard: ShardId| Move { shard, to: target(shard).clone() };
        // Those under way to somewhere else than they should be come first: they are not new.
        let astray = map.moves.iter().filter(|step| !same(&step.to, target(step.shard)));
        let mut moves: Vec<Move> = astray
            .filter(|step| self.is_possible(now, map, step.shard, target(step.shard)))
            .map(|step| wanted(step.shard))
            .collect();
        let free = self.rules.moves_at_once.saturating_sub(map.moves.len());
        let mut others: Vec<ShardId> = (0..map.shards)
            .map(ShardId)
            .filter(|shard| map.move_of(*shard).is_none())
            .filter(|shard| !same(map.replicas_of(*shard), target(*shard)))
            .filter(|shard| self.is_possible(now, map, *shard, target(*shard)))
            .collect();
        // Shards that miss a replica are in more danger than the others.
        let is_whole = |shard: &ShardId| map.replicas_of(*shard).iter().all(|node| self.answers(now, *node));
        others.sort_by_key(is_whole);
        moves.extend(others.into_iter().take(free).map(wanted));
        (!moves.is_empty()).then_some(moves)
    }

    /// Whether a shard can go there: most of its replicas answer, and so do all newcomers.
    fn is_possible(&self, now: Instant, map: &ClusterMap, shard: ShardId, to: &[NodeId]) -> bool {
        let replicas = map.replicas_of(shard);
        let alive = replicas.iter().filter(|node| self.answers(now, **node)).count();
        let newcomers = to.iter().filter(|node| !replicas.contains(node));
        2 * alive > replicas.len() && newcomers.into_iter().all(|node| self.answers(now, *node))
    }
}

/// Whether these are the same nodes, in whatever order.
pub fn same(these: &[NodeId], those: &[NodeId]) -> bool {
    these.len() == those.len() && these.iter().collect::<BTreeSet<_>>() == those.iter().collect()
}

#[cfg(test)]
mod tests {
    use troth_protocol::Node;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn node(id: u64, state: NodeState) -> Node {
        Node {
            id: NodeId(id),
            address: String::new(),
            zone: String::new(),
            weight: 1,
            state,
            incarnation: Default::default(),
        }
    }

    /// Three active nodes, and shards where the ring wants them.
    fn map(replicas: u16) -> ClusterMap {
        let mut map = ClusterMap {
            cluster: Default::default(),
            lineage: Default::default(),
            epoch: MapEpoch(1),
            shards: 16,
            replicas,
            coordinators: Vec::new(),
            nodes: (1..=3).map(|id| node(id, NodeState::Active)).collect(),
            placement: Vec::new(),
            formed: vec![None; 16],
            moves: Vec::new(),
        };
        map.placement = map.ring().placement(16, replicas.into());
        map
    }

    fn join(map: &mut ClusterMap, id: u64) {
        map.nodes.push(node(id, NodeState::Active));
        map.epoch.0 += 1;
    }

    fn stand(map: &mut ClusterMap, id: u64, state: NodeState) {
        map.nodes.iter_mut().find(|node| node.id == NodeId(id)).expect("it is there").state = state;
        map.epoch.0 += 1;
    }

    fn everybody(steward: &mut Steward, map: &ClusterMap, now: Instant) {
        for node in &map.nodes {
            steward.saw(now, node.id);
        }
    }

    fn moves(plan: Option<Plan>) -> Vec<Move> {
        match plan {
            Some(Plan::Move(moves)) => moves,
            other => panic!("no moves: {other:?}"),
        }
    }

    /// Carries a plan out as the log would.
    fn note(map: &mut ClusterMap, moves: Vec<Move>) {
        for step in moves {
            map.moves.retain(|known| known.shard != step.shard);
            map.moves.push(step);
        }
        map.moves.sort_by_key(|step| step.shard);
        map.epoch.0 += 1;
    }

    fn arrive(map: &mut ClusterMap) {
        for step in std::mem::take(&mut map.moves) {
            map.placement[usize::from(step.shard.0)] = step.to;
        }
        map.epoch.0 += 1;
    }

    #[test]
    fn a_newcomer_gets_its_shards_some_at_a_time_and_then_there_is_peace() {
        let (mut map, now) = (map(3), Instant::now());
        let mut steward = Steward::new(Rules::default(), now);
        everybody(&mut steward, &map, now);
        assert_eq!(steward.poll(now, &map), None, "all is where it should be");
        join(&mut map, 4);
        everybody(&mut steward, &map, now);
        let (target, mut moved) = (map.target(), 0);
        while map.placement != target {
            let step = moves(steward.poll(now, &map));
            assert!(step.len() <= 2, "two at once");
            assert!(step.iter().all(|step| step.to.contains(&NodeId(4))), "only the newcomer gains");
            assert_eq!(steward.poll(now, &map), None, "once is enough");
            moved += step.len();
            note(&mut map, step);
            assert_eq!(steward.poll(now, &map), None, "they are under way");
            arrive(&mut map);
        }
        assert_eq!(steward.poll(now, &map), None);
        assert_eq!(moved, map.shards_on(NodeId(4)));
    }

    #[test]
    fn what_was_lost_on_the_way_to_the_log_is_decided_again() {
        let (mut map, now) = (map(1), Instant::now());
        let mut steward = Steward::new(Rules::default(), now);
        join(&mut map, 4);
        everybody(&mut steward, &map, now);
        let first = moves(steward.poll(now, &map));
        assert_eq!(steward.poll(now + SECOND, &map), None);
        everybody(&mut steward, &map, now + 2 * SECOND);
        assert_eq!(moves(steward.poll(now + 2 * SECOND, &map)), first);
    }

    #[test]
    fn a_silent_node_is_replaced_only_after_a_while_and_only_if_there_are_others() {
        let (mut map, now) = (map(3), Instant::now());
        let mut steward = Steward::new(Rules::default(), now);
        for second in 0..120 {
            for id in [1, 2] {
                steward.saw(now + second * SECOND, NodeId(id));
            }
            assert_eq!(steward.poll(now + second * SECOND, &map), None, "nobody could take its place");
        }
        join(&mut map, 4);
        let late = now + 121 * SECOND;
        for id in [1, 2, 4] {
            steward.saw(late, NodeId(id));
        }
        assert_eq!(steward.poll(late, &map), Some(Plan::Lose(NodeId(3))));
        stand(&mut map, 3, NodeState::Lost);
        let step = moves(steward.poll(late, &map));
        assert!(step.iter().all(|step| same(&step.to, &[NodeId(1), NodeId(2), NodeId(4)])));
        let fresh = Steward::new(Rules::default(), late);
        assert_eq!(fresh.lost(late + 59 * SECOND, &map), None, "a new leader waits anew");
    }

    #[test]
    fn a_shard_whose_majority_is_silent_stays_where_it_is() {
        let (mut map, now) = (map(1), Instant::now());
        let mut steward = Steward::new(Rules { moves_at_once: 100, ..Rules::default() }, now);
        let held_by_1 = map.shards_on(NodeId(1));
        stand(&mut map, 1, NodeState::Draining);
        for id in [2, 3] {
            steward.saw(now, NodeId(id));
        }
        assert_eq!(steward.poll(now, &map), None, "the only replica does not answer");
        steward.saw(now, NodeId(1));
        assert_eq!(moves(steward.poll(now, &map)).len(), held_by_1);
    }

    #[test]
    fn a_shard_on_its_way_is_sent_elsewhere_when_the_ring_has_changed() {
        let (mut map, now) = (map(3), Instant::now());
        let mut steward = Steward::new(Rules::default(), now);
        join(&mut map, 4);
        everybody(&mut steward, &map, now);
        let step = moves(steward.poll(now, &map));
        note(&mut map, step);
        stand(&mut map, 4, NodeState::Draining);
        let back = moves(steward.poll(now, &map));
        assert_eq!(back.len(), 2);
        assert!(
            back.iter().all(|step| same(&step.to, map.replicas_of(step.shard))),
            "back to where they were"
        );
    }
}
