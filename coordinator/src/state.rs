//! The replicated state of the coordinators.
//!
//! A transaction is committed if and only if a `Decide` that names it was applied here by the epoch
//! that proposed it, and no `Refuse` before. Everything else about a transaction is volatile.
//!
//! ```text
//!               Decide                    Forget                 Retire
//!   (nothing) ─────────► committed, unfinished ───► committed ──────────► (nothing, and expired)
//!       │       Refuse                                              ▲
//!       └──────────────► refused ───────────────────────────────────┘
//! ```

use std::collections::BTreeMap;
use std::io;

use troth_protocol::message::admin::NodeChange;
use troth_protocol::message::raft::LogId;
use troth_protocol::ring::WEIGHT_MAX;
use troth_protocol::{ClusterMap, Epoch, FolderId, Move, Node, NodeId, NodeState, ShardId, Timestamp, TxnId};

use crate::command::{Command, Decision, Output, Record, Settings, Verdict};
use crate::steward::same;

/// What the state asks of the store: records as of the last applied command.
pub trait View {
    /// What is on record about a transaction.
    fn record(&self, txn: TxnId) -> io::Result<Option<Record>>;
}

/// What a command changes in the store.
#[derive(Clone, PartialEq, Debug)]
pub enum Mutation {
    /// This is on record now.
    Record(TxnId, Record),
    /// A decision that participants must hear of.
    Unfinished(Decision),
    /// All participants have.
    Finished(TxnId),
    /// Records of transactions that began before this are gone.
    RecordsBefore(Timestamp),
    /// The catalog has changed.
    Catalog,
}

/// The small part of the state that is stored as one record.
#[derive(Clone, Copy, PartialEq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Marks {
    /// The epoch of the last leader: the index of its `Lead`.
    pub epoch: Epoch,
    /// No timestamp at or above this was handed out.
    pub ceiling: Timestamp,
    /// No record of a transaction that began before this is kept, unless it is unfinished.
    pub outcomes_before: Timestamp,
}

/// What the cluster is.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Catalog {
    /// What it was made to be.
    pub settings: Settings,
    /// Who is there, and where the shards are.
    pub map: ClusterMap,
    /// What the map does not say of each participant, in its order.
    pub records: Vec<Membership>,
    /// Participants that an operator has removed: their ids are never used again.
    pub removed: Vec<NodeId>,
    /// Shards that have moved.
    pub moved_shards: u64,
    /// Bytes that were sent for that.
    pub moved_bytes: u64,
}

/// What the coordinators know of a participant, besides what everybody does.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Membership {
    /// Its data folder: where it keeps what it promised.
    pub folder: FolderId,
    /// What an operator has said of its weight, whatever it says itself.
    pub weight: Option<u32>,
    /// The same of its zone.
    pub zone: Option<String>,
}

impl Catalog {
    /// Whether a participant that makes itself known like this is known like this already.
    pub fn is_registered(&self, node: &Node, folder: FolderId) -> bool {
        let Ok(at) = self.map.nodes.binary_search_by_key(&node.id, |node| node.id) else {
            return false;
        };
        let (known, record) = (&self.map.nodes[at], &self.records[at]);
        record.folder == folder && known.state != NodeState::Lost && *known == record.node(node, known.state)
    }
}

impl Membership {
    /// A participant as the map shows it, where it says this of itself.
    fn node(&self, said: &Node, state: NodeState) -> Node {
        Node {
            id: said.id,
            address: said.address.clone(),
            zone: self.zone.clone().unwrap_or_else(|| said.zone.clone()),
            weight: self.weight.unwrap_or(said.weight),
            state,
        }
    }
}

/// The state, but for the records of finished transactions, which stay in the store.
#[derive(Clone, Default, Debug)]
pub struct State {
    marks: Marks,
    catalog: Option<Catalog>,
    unfinished: BTreeMap<TxnId, Decision>,
}

impl State {
    /// Rebuilds the state from what is stored.
    pub fn restore(
        marks: Marks,
        catalog: Option<Catalog>,
        unfinished: impl IntoIterator<Item = Decision>,
    ) -> State {
        let unfinished = unfinished.into_iter().map(|decision| (decision.txn, decision)).collect();
        State { marks, catalog, unfinished }
    }

    /// The small part.
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// What the cluster is; `None` before its first leader.
    pub fn catalog(&self) -> Option<&Catalog> {
        self.catalog.as_ref()
    }

    /// Decisions that participants must hear of, by age.
    pub fn unfinished(&self) -> &BTreeMap<TxnId, Decision> {
        &self.unfinished
    }

    /// Applies the command at an index of the log. What it changes in the store is added to
    /// `mutations`.
    ///
    /// # Errors
    /// Only if the store fails.
    pub fn apply(
        &mut self,
        index: u64,
        command: Command,
        view: &impl View,
        mutations: &mut Vec<Mutation>,
    ) -> io::Result<Output> {
        Ok(match command {
            Command::Lead { coordinators, settings } => {
                self.marks.epoch = Epoch(index);
                self.configure(coordinators, settings, mutations);
                Output::Leads(self.marks.epoch)
            }
            Command::Register { node, folder } => self.register(node, folder, mutations),
            Command::Node { node, change } => match self.change_node(node, change) {
                Ok(()) => {
                    mutations.push(Mutation::Catalog);
                    Output::Done
                }
                Err(reason) => Output::Refused(reason),
            },
            Command::Lose { epoch, node } => {
                self.lose(epoch, node, mutations);
                Output::Done
            }
            Command::Move { epoch, moves } => {
                self.begin_moves(epoch, moves, mutations);
                Output::Done
            }
            Command::Moved { shard, voters, formed } => {
                self.end_move(shard, voters, formed, mutations);
                Output::Done
            }
            Command::Carried { bytes } => {
                if let Some(catalog) = &mut self.catalog {
                    catalog.moved_bytes = catalog.moved_bytes.saturating_add(bytes);
                    mutations.push(Mutation::Catalog);
                }
                Output::Done
            }
            Command::Ceiling { epoch, ceiling } => {
                if epoch == self.marks.epoch {
                    self.marks.ceiling = self.marks.ceiling.max(ceiling);
                }
                Output::Done
            }
            Command::Decide { epoch, decisions } => {
                let mut verdicts = Vec::with_capacity(decisions.len());
                for decision in decisions {
                    verdicts.push(self.decide(epoch, decision, view, mutations)?);
                }
                Output::Verdicts(verdicts)
            }
            Command::Forget { txns } => {
                for txn in txns {
                    if self.unfinished.remove(&txn).is_some() {
                        mutations.push(Mutation::Finished(txn));
                    }
                }
                Output::Done
            }
            Command::Refuse { txns } => {
                let mut verdicts = Vec::with_capacity(txns.len());
                for txn in txns {
                    verdicts.push(self.refuse(txn, view, mutations)?);
                }
                Output::Verdicts(verdicts)
            }
            Command::Retire { outcomes_before } => {
                // A decision that somebody has not heard of is kept, whatever its age.
                let oldest = self.unfinished.keys().next().map_or(Timestamp::MAX, |txn| txn.start);
                let before = outcomes_before.min(oldest);
                self.marks.outcomes_before = self.marks.outcomes_before.max(before);
                mutations.push(Mutation::RecordsBefore(self.marks.outcomes_before));
                Output::Done
            }
        })
    }

    fn decide(
        &mut self,
        epoch: Epoch,
        decision: Decision,
        view: &impl View,
        mutations: &mut Vec<Mutation>,
    ) -> io::Result<Verdict> {
        let Decision { txn, commit_ts, .. } = decision;
        if epoch != self.marks.epoch {
            return Ok(Verdict::Superseded);
        }
        assert!(
            commit_ts > txn.start && commit_ts < self.marks.ceiling,
            "{txn} commits at {commit_ts}, not between its start and the ceiling {}",
            self.marks.ceiling
        );
        // Refused, or decided before: then that decision stands.
        if let Some(record) = view.record(txn)? {
            return Ok(Verdict::Recorded(record));
        }
        if txn.start < self.marks.outcomes_before {
            return Ok(Verdict::Expired);
        }
        let record = Record::Committed { commit_ts };
        mutations.push(Mutation::Record(txn, record));
        mutations.push(Mutation::Unfinished(decision.clone()));
        self.unfinished.insert(txn, decision);
        Ok(Verdict::Recorded(record))
    }

    fn refuse(&mut self, txn: TxnId, view: &impl View, mutations: &mut Vec<Mutation>) -> io::Result<Verdict> {
        if let Some(record) = view.record(txn)? {
            return Ok(Verdict::Recorded(record));
        }
        if txn.start < self.marks.outcomes_before {
            return Ok(Verdict::Expired);
        }
        mutations.push(Mutation::Record(txn, Record::Refused));
        Ok(Verdict::Recorded(Record::Refused))
    }

    fn configure(&mut self, coordinators: Vec<Node>, settings: Settings, mutations: &mut Vec<Mutation>) {
        let catalog = self.catalog.get_or_insert_with(|| Catalog {
            settings,
            map: ClusterMap {
                cluster: settings.cluster,
                epoch: Default::default(),
                shards: settings.shards,
                replicas: settings.replicas,
                coordinators: Vec::new(),
                nodes: Vec::new(),
                placement: Vec::new(),
                formed: Vec::new(),
                moves: Vec::new(),
            },
            records: Vec::new(),
            removed: Vec::new(),
            moved_shards: 0,
            moved_bytes: 0,
        });
        if catalog.map.coordinators != coordinators {
            catalog.map.coordinators = coordinators;
            catalog.map.epoch.0 += 1;
            mutations.push(Mutation::Catalog);
        }
    }

    fn register(&mut self, node: Node, folder: FolderId, mutations: &mut Vec<Mutation>) -> Output {
        let Some(Catalog { settings, map, records, removed, .. }) = &mut self.catalog else {
            return Output::Done;
        };
        if removed.contains(&node.id) {
            return Output::Removed;
        }
        let placed = map.is_placed();
        match map.nodes.binary_search_by_key(&node.id, |known| known.id) {
            // What the shards of this node were promised lies in the other folder.
            Ok(at) if records[at].folder != folder => return Output::Taken,
            Ok(at) => {
                let known = &mut map.nodes[at];
                let state = if known.state == NodeState::Lost { NodeState::Active } else { known.state };
                let node = records[at].node(&node, state);
                if *known == node {
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
        Output::Done
    }

    fn change_node(&mut self, id: NodeId, change: NodeChange) -> Result<(), String> {
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

    fn lose(&mut self, epoch: Epoch, id: NodeId, mutations: &mut Vec<Mutation>) {
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

    fn begin_moves(&mut self, epoch: Epoch, moves: Vec<Move>, mutations: &mut Vec<Mutation>) {
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

    fn end_move(
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
    use super::*;

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
        };
        let settings = Settings { shards: 1, replicas: 3, nodes: 3, ..Settings::default() };
        let mut state = State::default();
        apply(&mut state, Command::Lead { coordinators: Vec::new(), settings });
        for id in 1..=4 {
            apply(&mut state, Command::Register { node: node(id), folder: FolderId::default() });
        }
        state
    }

    fn apply(state: &mut State, command: Command) {
        state.apply(1, command, &Empty, &mut Vec::new()).expect("nothing is stored");
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
}
