//! Participants in the replicated state: which start of which folder is admitted, where each stands on the ring, and
//! where the shards are.

use troth_protocol::message::admin::NodeChange;
use troth_protocol::message::raft::LogId;
use troth_protocol::mutation::{self, Bug};
use troth_protocol::ring::WEIGHT_MAX;
use troth_protocol::{Epoch, FolderId, Incarnation, Move, Node, NodeId, NodeState, ShardId};

use super::{Catalog, Membership, Mutation, State};
use crate::command::Output;
use crate::steward::same;

impl State {
    pub(super) fn register(
        &mut self,
        node: Node,
        folder: FolderId,
        previous: Option<Incarnation>,
        progress: u64,
        mutations: &mut Vec<Mutation>,
    ) -> Output {
        let Some(Catalog { settings, map, records, removed, .. }) = &mut self.catalog else {
            return Output::Done;
        };
        if removed.contains(&node.id) {
            return Output::Removed;
        }
        let (id, placed) = (node.id, map.is_placed());
        match map.nodes.binary_search_by_key(&node.id, |known| known.id) {
            // What the shards of this node were promised lies in the other folder.
            Ok(at) if records[at].folder != folder => return Output::Taken,
            Ok(at) => {
                let known = &mut map.nodes[at];
                let before = self.progress.get(&id).copied().unwrap_or(0);
                let follows = node.incarnation == known.incarnation || previous == Some(known.incarnation);
                // A copy of the folder lacks what was promised since it was made.
                if (!follows || progress < before) && !mutation::on(Bug::AcceptsAnOlderCopy) {
                    let (incarnation, address) = (known.incarnation, known.address.clone());
                    return Output::Passed { incarnation, progress: before, address };
                }
                let state = if known.state == NodeState::Lost { NodeState::Active } else { known.state };
                let node = records[at].node(&node, state);
                if *known == node {
                    self.note_progress(id, progress, mutations);
                    return Output::Done;
                }
                *known = node;
            }
            Err(at) => {
                let state = if placed { NodeState::Waiting } else { NodeState::Active };
                map.nodes.insert(at, Node { state, ..node });
                records.insert(at, Membership { folder, weight: None, zone: None });
            }
        }
        if !placed && map.nodes.len() >= usize::from(settings.nodes) {
            map.placement = map.ring().placement(settings.shards, settings.replicas.into());
            map.formed = vec![None; map.placement.len()];
        }
        map.epoch.0 += 1;
        mutations.push(Mutation::Catalog);
        self.note_progress(id, progress, mutations);
        Output::Done
    }

    /// A participant has synced so much, at least.
    pub(super) fn note_progress(&mut self, id: NodeId, progress: u64, mutations: &mut Vec<Mutation>) {
        let is_known = self.catalog.as_ref().is_some_and(|catalog| catalog.map.node(id).is_some());
        if is_known && self.progress.get(&id).is_none_or(|before| *before < progress) {
            self.progress.insert(id, progress);
            mutations.push(Mutation::Progress);
        }
    }

    pub(super) fn change_node(&mut self, id: NodeId, change: NodeChange) -> Result<(), String> {
        let no_cluster = || "there is no cluster yet".to_owned();
        let Catalog { map, records, removed, .. } = self.catalog.as_mut().ok_or_else(no_cluster)?;
        if removed.contains(&id) {
            // Whoever asks once more, because the answer was lost, has what was asked for.
            return match change {
                NodeChange::Remove => Ok(()),
                NodeChange::Admit { .. } | NodeChange::Drain => {
                    Err(format!("node {id} was removed; an id is never used again"))
                }
            };
        }
        let unknown = |_| format!("node {id} has not made itself known; start it first");
        let at = map.nodes.binary_search_by_key(&id, |known| known.id).map_err(unknown)?;
        match change {
            NodeChange::Admit { weight, zone } => {
                if weight.is_some_and(|weight| weight == 0 || weight > WEIGHT_MAX) {
                    return Err(format!("a weight is from 1 to {WEIGHT_MAX}"));
                }
                let (node, record) = (&mut map.nodes[at], &mut records[at]);
                record.weight = weight.or(record.weight);
                record.zone = zone.or_else(|| record.zone.clone());
                *node = record.node(node, NodeState::Active);
            }
            NodeChange::Drain => {
                let stay = map.nodes.iter().filter(|node| node.id != id && node.state == NodeState::Active);
                let (stay, replicas) = (stay.count(), map.replicas);
                if !map.is_placed() {
                    return Err("the shards are not placed yet".into());
                }
                if stay < usize::from(replicas) {
                    return Err(format!(
                        "without node {id} there are {stay} active nodes, too few for {replicas} replicas; add one first"
                    ));
                }
                map.nodes[at].state = NodeState::Draining;
            }
            NodeChange::Remove => {
                let held = map.shards_on(id);
                if map.nodes[at].state == NodeState::Active {
                    return Err(format!("node {id} is active; drain it first"));
                }
                if held > 0 {
                    return Err(format!("node {id} still holds {held} shards; wait until it holds none"));
                }
                map.nodes.remove(at);
                records.remove(at);
                removed.push(id);
            }
        }
        map.epoch.0 += 1;
        Ok(())
    }

    pub(super) fn lose(&mut self, epoch: Epoch, id: NodeId, mutations: &mut Vec<Mutation>) {
        let Some(Catalog { map, .. }) = self.catalog.as_mut().filter(|_| epoch == self.marks.epoch) else {
            return;
        };
        let active = |node: &&mut Node| node.id == id && node.state == NodeState::Active;
        if let Some(node) = map.nodes.iter_mut().find(active) {
            node.state = NodeState::Lost;
            map.epoch.0 += 1;
            mutations.push(Mutation::Catalog);
        }
    }

    pub(super) fn begin_moves(&mut self, epoch: Epoch, moves: Vec<Move>, mutations: &mut Vec<Mutation>) {
        let Some(Catalog { map, .. }) = self.catalog.as_mut().filter(|_| epoch == self.marks.epoch) else {
            return;
        };
        for step in moves {
            let known = |node: &NodeId| map.node(*node).is_some();
            if step.shard.0 >= map.shards || step.to.is_empty() || !step.to.iter().all(known) {
                continue;
            }
            match map.moves.binary_search_by_key(&step.shard, |known| known.shard) {
                Ok(at) => map.moves[at] = step,
                Err(_) if same(map.replicas_of(step.shard), &step.to) => continue,
                Err(at) => map.moves.insert(at, step),
            }
            map.epoch.0 += 1;
            mutations.push(Mutation::Catalog);
        }
    }

    pub(super) fn end_move(
        &mut self,
        shard: ShardId,
        voters: Vec<NodeId>,
        formed: LogId,
        mutations: &mut Vec<Mutation>,
    ) {
        let Some(Catalog { map, moved_shards, .. }) = &mut self.catalog else {
            return;
        };
        let place = usize::from(shard.0);
        let before = map.formed.get(place).copied().flatten();
        let Ok(at) = map.moves.binary_search_by_key(&shard, |step| step.shard) else {
            // Nothing moves, but the group was formed again as it should be.
            if before < Some(formed) && map.placement.get(place).is_some_and(|now| same(now, &voters)) {
                map.formed[place] = Some(formed);
                map.epoch.0 += 1;
                mutations.push(Mutation::Catalog);
            }
            return;
        };
        // It may have been sent elsewhere meanwhile. And who leads the shard no more may not know with whom its
        // successor has formed the group since.
        if !same(&map.moves[at].to, &voters) || Some(formed) < before {
            return;
        }
        let step = map.moves.remove(at);
        if !same(&map.placement[place], &step.to) {
            *moved_shards += 1;
        }
        map.placement[place] = step.to;
        map.formed[place] = Some(formed);
        map.epoch.0 += 1;
        mutations.push(Mutation::Catalog);
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use troth_protocol::{Epoch, TxnId};

    use super::*;
    use crate::command::{Command, Founding, Record, Settings};
    use crate::state::View;

    struct Empty;

    impl View for Empty {
        fn record(&self, _: TxnId) -> io::Result<Option<Record>> {
            Ok(None)
        }
    }

    /// Four nodes, of which the shard is on the first three.
    fn placed() -> State {
        let node = |id| Node {
            id: NodeId(id),
            address: format!("node-{id}"),
            zone: String::new(),
            weight: 1,
            state: NodeState::Active,
            incarnation: Incarnation::default(),
        };
        let settings = Settings { shards: 1, replicas: 3, nodes: 3, ..Settings::default() };
        let mut state = State::default();
        let founding = Founding { settings, ..Founding::default() };
        apply(&mut state, Command::Lead { leader: Incarnation(1), founding });
        for id in 1..=4 {
            apply(&mut state, registering(node(id), None, 0));
        }
        state
    }

    fn apply(state: &mut State, command: Command) -> Output {
        state.apply(1, command, &Empty, &mut Vec::new()).expect("nothing is stored")
    }

    fn registering(node: Node, previous: Option<Incarnation>, progress: u64) -> Command {
        Command::Register { node, folder: FolderId::default(), previous, progress }
    }

    fn send(state: &mut State, to: [u64; 3]) {
        let moves = vec![Move { shard: ShardId(0), to: to.map(NodeId).to_vec() }];
        apply(state, Command::Move { epoch: Epoch(1), moves });
    }

    fn arrived(state: &mut State, at: [u64; 3], index: u64) -> bool {
        let formed = LogId { term: 1, index };
        apply(state, Command::Moved { shard: ShardId(0), voters: at.map(NodeId).to_vec(), formed });
        state.catalog().expect("configured").map.moves.is_empty()
    }

    #[test]
    fn a_leader_that_has_missed_a_move_does_not_end_the_next_one() {
        let mut state = placed();
        send(&mut state, [1, 2, 4]);
        assert!(!arrived(&mut state, [1, 2, 3], 7), "it shall be elsewhere");
        assert!(arrived(&mut state, [1, 2, 4], 20));
        send(&mut state, [1, 2, 3]);
        // Whoever led before the first move has seen these members, long ago.
        assert!(!arrived(&mut state, [1, 2, 3], 7));
        assert!(arrived(&mut state, [1, 2, 3], 31));
        // Said again, as an answer may be lost, it changes nothing.
        assert!(arrived(&mut state, [1, 2, 3], 31));
        assert_eq!(state.catalog().expect("configured").moved_shards, 2);
        // One that turns around before anything has changed ends as it was.
        send(&mut state, [1, 2, 4]);
        send(&mut state, [1, 2, 3]);
        assert!(arrived(&mut state, [1, 2, 3], 31));
        assert_eq!(state.catalog().expect("configured").moved_shards, 2);
    }

    #[test]
    fn a_group_that_was_formed_again_as_it_should_be_is_noted() {
        let mut state = placed();
        let formed = |state: &State| state.catalog().expect("configured").map.formed[0].map(|id| id.index);
        assert!(arrived(&mut state, [1, 2, 3], 9));
        assert_eq!(formed(&state), Some(9));
        assert!(arrived(&mut state, [1, 2, 4], 12), "nobody has sent it there");
        assert!(arrived(&mut state, [1, 2, 3], 5), "it was formed again since");
        assert_eq!(formed(&state), Some(9));
    }

    #[test]
    fn a_start_of_a_node_is_admitted_if_it_comes_after_the_one_before() {
        let mut state = placed();
        let known = state.catalog().expect("configured").map.node(NodeId(1)).expect("registered").clone();
        let start = |incarnation| Node { incarnation: Incarnation(incarnation), ..known.clone() };
        let mut register = |incarnation, previous: Option<u64>, progress| {
            let command = registering(start(incarnation), previous.map(Incarnation), progress);
            match apply(&mut state, command) {
                Output::Done => None,
                Output::Passed { incarnation, progress, .. } => Some((incarnation.0, progress)),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(register(7, None, 100), Some((0, 0)), "it has to say what it comes after");
        assert_eq!(register(7, Some(0), 100), None);
        assert_eq!(register(7, Some(0), 150), None, "said again, as a sign of life");
        assert_eq!(register(8, Some(0), 200), Some((7, 150)), "a copy from before that start");
        assert_eq!(register(9, Some(7), 149), Some((7, 150)), "a copy of that start while it ran");
        assert_eq!(register(7, None, 149), Some((7, 150)), "a machine that was set back while it ran");
        assert_eq!(register(9, Some(7), 150), None);
        assert_eq!(register(7, Some(0), 160), Some((9, 150)), "the original has been passed by");
        apply(&mut state, Command::Progress { nodes: vec![(NodeId(1), 300), (NodeId(9), 1)] });
        assert_eq!(state.progress().get(&NodeId(1)), Some(&300));
        assert_eq!(state.progress().get(&NodeId(9)), None, "nobody knows that one");
    }
}
