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

mod members;
mod nodes;

use std::collections::BTreeMap;
use std::io;

use troth_protocol::{
    ClusterMap, CoordinatorMember, Epoch, FolderId, Incarnation, MemberState, Node, NodeId, NodeState,
    Timestamp, TxnId,
};

use crate::command::{Command, Decision, Founding, Output, Record, Settings, Verdict};

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
    /// How far participants are has changed.
    Progress,
}

/// The small part of the state that is stored as one record.
#[derive(Clone, Copy, PartialEq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Marks {
    /// The epoch of the last leader: the index of its `Lead`.
    pub epoch: Epoch,
    /// Which start of a coordinator that is.
    pub leader: Incarnation,
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
    /// The coordinators, ascending by id, also those that the map does not show.
    pub coordinators: Vec<CoordinatorMember>,
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
    /// That of a new cluster.
    fn new(founding: Founding) -> Catalog {
        let Founding { founders, lineage, settings } = founding;
        let member = |(id, address)| CoordinatorMember { id, address, since: 0, state: MemberState::Voting };
        let mut coordinators: Vec<CoordinatorMember> = founders.into_iter().map(member).collect();
        coordinators.sort_by_key(|member| member.id);
        let mut catalog = Catalog {
            settings,
            map: ClusterMap {
                cluster: settings.cluster,
                lineage,
                epoch: Default::default(),
                shards: settings.shards,
                replicas: settings.replicas,
                coordinators: Vec::new(),
                nodes: Vec::new(),
                placement: Vec::new(),
                formed: Vec::new(),
                moves: Vec::new(),
            },
            coordinators,
            records: Vec::new(),
            removed: Vec::new(),
            moved_shards: 0,
            moved_bytes: 0,
        };
        catalog.show_coordinators();
        catalog
    }

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
            incarnation: said.incarnation,
        }
    }
}

/// The state, but for the records of finished transactions, which stay in the store.
#[derive(Clone, Default, Debug)]
pub struct State {
    marks: Marks,
    catalog: Option<Catalog>,
    /// How many batches each participant has synced, at least.
    progress: BTreeMap<NodeId, u64>,
    unfinished: BTreeMap<TxnId, Decision>,
}

impl State {
    /// Rebuilds the state from what is stored.
    pub fn restore(
        marks: Marks,
        catalog: Option<Catalog>,
        progress: impl IntoIterator<Item = (NodeId, u64)>,
        unfinished: impl IntoIterator<Item = Decision>,
    ) -> State {
        let unfinished = unfinished.into_iter().map(|decision| (decision.txn, decision)).collect();
        State { marks, catalog, progress: progress.into_iter().collect(), unfinished }
    }

    /// The small part.
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// What the cluster is; `None` before its first leader.
    pub fn catalog(&self) -> Option<&Catalog> {
        self.catalog.as_ref()
    }

    /// How many batches each participant has synced, at least.
    pub fn progress(&self) -> &BTreeMap<NodeId, u64> {
        &self.progress
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
            Command::Lead { leader, founding } => {
                self.marks.epoch = Epoch(index);
                self.marks.leader = leader;
                if self.catalog.is_none() {
                    self.catalog = Some(Catalog::new(founding));
                    mutations.push(Mutation::Catalog);
                }
                Output::Leads(self.marks.epoch)
            }
            Command::Register { node, folder, previous, progress } => {
                self.register(node, folder, previous, progress, mutations)
            }
            Command::Progress { nodes } => {
                for (node, progress) in nodes {
                    self.note_progress(node, progress, mutations);
                }
                Output::Done
            }
            Command::Node { node, change } => done_or_refused(self.change_node(node, change), mutations),
            Command::Coordinators(change) => {
                done_or_refused(self.change_coordinators(index, change), mutations)
            }
            Command::Seated { voters } => {
                self.seat(index, &voters, mutations);
                Output::Done
            }
            Command::Found { id, address } => {
                self.find(id, address, mutations);
                Output::Done
            }
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
}

/// What came of an operator's change of the catalog.
fn done_or_refused(result: Result<(), String>, mutations: &mut Vec<Mutation>) -> Output {
    match result {
        Ok(()) => {
            mutations.push(Mutation::Catalog);
            Output::Done
        }
        Err(reason) => Output::Refused(reason),
    }
}
