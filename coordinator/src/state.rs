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

use troth_protocol::{ClusterMap, Epoch, FolderId, Node, NodeId, Timestamp, TxnId};

use crate::command::{Command, Decision, Output, Record, Settings, Verdict};

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
    /// The data folder of each participant, in the order of the map.
    pub folders: Vec<FolderId>,
}

impl Catalog {
    /// What is known of a participant.
    pub fn registered(&self, id: NodeId) -> Option<(&Node, FolderId)> {
        let at = self.map.nodes.binary_search_by_key(&id, |node| node.id).ok()?;
        Some((&self.map.nodes[at], self.folders[at]))
    }
}

/// The state, but for the records of finished transactions, which stay in the store.
#[derive(Default, Debug)]
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
            },
            folders: Vec::new(),
        });
        if catalog.map.coordinators != coordinators {
            catalog.map.coordinators = coordinators;
            catalog.map.epoch.0 += 1;
            mutations.push(Mutation::Catalog);
        }
    }

    fn register(&mut self, node: Node, folder: FolderId, mutations: &mut Vec<Mutation>) -> Output {
        let Some(Catalog { settings, map, folders }) = &mut self.catalog else {
            return Output::Done;
        };
        match map.nodes.binary_search_by_key(&node.id, |known| known.id) {
            // What the shards of this node were promised lies in the other folder.
            Ok(at) if folders[at] != folder => return Output::Taken,
            Ok(at) if map.nodes[at] == node => return Output::Done,
            Ok(at) => map.nodes[at] = node,
            Err(at) => {
                map.nodes.insert(at, node);
                folders.insert(at, folder);
            }
        }
        if !map.is_placed() && map.nodes.len() >= usize::from(settings.nodes) {
            map.placement = map.ring().placement(settings.shards, settings.replicas.into());
        }
        map.epoch.0 += 1;
        mutations.push(Mutation::Catalog);
        Output::Done
    }
}
