//! What replicas keep on disk, modelled: what was flushed survives a crash, together with how far the log
//! was applied.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io;

use troth_coordinator::command::{Decision, Record};
use troth_coordinator::state as coordinator;
use troth_participant::families;
use troth_participant::shard::machine::spans;
use troth_participant::shard::state as shard;
use troth_protocol::message::shard::{Row, Version};
use troth_protocol::message::txn::Outcome;
use troth_protocol::{Key, KeyRange, ShardId, Timestamp, TxnId, Value};

/// What a coordinator keeps.
#[derive(Clone, Debug, Default)]
pub struct CoordinatorDisk {
    records: BTreeMap<TxnId, Record>,
    unfinished: BTreeMap<TxnId, Decision>,
    catalog: Option<coordinator::Catalog>,
    marks: coordinator::Marks,
}

impl coordinator::View for CoordinatorDisk {
    fn record(&self, txn: TxnId) -> io::Result<Option<Record>> {
        Ok(self.records.get(&txn).copied())
    }
}

impl CoordinatorDisk {
    /// Writes what a command has changed.
    pub fn write(&mut self, mutations: Vec<coordinator::Mutation>, state: &coordinator::State) {
        for mutation in mutations {
            match mutation {
                coordinator::Mutation::Record(txn, record) => drop(self.records.insert(txn, record)),
                coordinator::Mutation::Unfinished(decision) => {
                    self.unfinished.insert(decision.txn, decision);
                }
                coordinator::Mutation::Finished(txn) => drop(self.unfinished.remove(&txn)),
                coordinator::Mutation::RecordsBefore(before) => {
                    self.records.retain(|txn, _| txn.start >= before);
                }
                coordinator::Mutation::Progress => {}
                coordinator::Mutation::Catalog => self.catalog = state.catalog().cloned(),
            }
        }
        self.marks = *state.marks();
    }

    /// The state that a process rebuilds from this.
    pub fn restore(&self) -> coordinator::State {
        coordinator::State::restore(self.marks, self.catalog.clone(), [], self.unfinished.values().cloned())
    }
}

/// What a replica of a shard keeps.
#[derive(Clone, Debug, Default)]
pub struct ShardDisk {
    versions: BTreeMap<(Key, Reverse<Timestamp>), Option<Value>>,
    prepared: BTreeMap<TxnId, shard::Prepared>,
    outcomes: BTreeMap<TxnId, Outcome>,
    marks: shard::Marks,
}

impl shard::View for ShardDisk {
    fn newest(&self, key: &Key) -> io::Result<Timestamp> {
        Ok(self.version(key, Timestamp::MAX).version)
    }

    fn newer_in_range(&self, range: &KeyRange, after: Timestamp) -> io::Result<Option<(Key, Timestamp)>> {
        let newer = |(key, version): &(&Key, Timestamp)| *version > after && range.contains(key);
        let found = self.versions.keys().map(|(key, version)| (key, version.0)).find(newer);
        Ok(found.map(|(key, version)| (key.clone(), version)))
    }

    fn outcome(&self, txn: TxnId) -> io::Result<Option<Outcome>> {
        Ok(self.outcomes.get(&txn).cloned())
    }
}

impl ShardDisk {
    /// Writes what a command has changed.
    pub fn write(&mut self, mutations: Vec<shard::Mutation>, state: &shard::State) {
        for mutation in mutations {
            match mutation {
                shard::Mutation::Version { write, version } => {
                    self.versions.insert((write.key, Reverse(version)), write.value);
                }
                shard::Mutation::Prepared(record) => drop(self.prepared.insert(record.txn, record)),
                shard::Mutation::Unprepared(txn) => drop(self.prepared.remove(&txn)),
                shard::Mutation::Outcome(txn, outcome) => drop(self.outcomes.insert(txn, outcome)),
                shard::Mutation::OutcomesBefore(before) => {
                    self.outcomes.retain(|txn, _| txn.start >= before);
                }
            }
        }
        if self.marks.safe_point != state.marks().safe_point {
            self.collect(state.marks().safe_point);
        }
        self.marks = *state.marks();
    }

    /// Gives up versions that no snapshot at or after the safe point sees.
    fn collect(&mut self, safe_point: Timestamp) {
        let mut last: Option<Key> = None;
        self.versions.retain(|(key, version), _| {
            // The newest one at or below the safe point stays; what is older of the same key goes.
            if version.0 > safe_point {
                return true;
            }
            let first = last.as_ref() != Some(key);
            last = Some(key.clone());
            first
        });
    }

    /// What a snapshot takes to another node: the families that production sends, and no other.
    pub fn snapshot(&self, shard: ShardId) -> ShardDisk {
        let mut sent = ShardDisk::default();
        for span in spans(shard) {
            match span.family {
                families::DATA => sent.versions = self.versions.clone(),
                families::PREPARED => sent.prepared = self.prepared.clone(),
                families::OUTCOME => sent.outcomes = self.outcomes.clone(),
                families::SHARD => sent.marks = self.marks,
                other => unreachable!("a family that is not modelled: {other:?}"),
            }
        }
        sent
    }

    /// The state that a process rebuilds from this.
    pub fn restore(&self) -> shard::State {
        shard::State::restore(self.marks, self.prepared.values().cloned())
    }

    /// The newest version of a key at a moment.
    pub fn version(&self, key: &Key, at: Timestamp) -> Version {
        let mut versions = self.versions.range((key.clone(), Reverse(at))..);
        let found = versions.next().filter(|((found, _), _)| found == key);
        let version = |((_, version), value): (&(Key, Reverse<Timestamp>), &Option<Value>)| Version {
            version: version.0,
            value: value.clone(),
        };
        found.map_or(Version { version: Timestamp::ZERO, value: None }, version)
    }

    /// The rows of a range at a moment.
    pub fn rows(&self, range: &KeyRange, at: Timestamp) -> Vec<Row> {
        let mut keys: Vec<&Key> =
            self.versions.keys().map(|(key, _)| key).filter(|key| range.contains(key)).collect();
        keys.dedup();
        let row = |key: &Key| {
            let Version { version, value } = self.version(key, at);
            value.map(|value| Row { key: key.clone(), version, value })
        };
        keys.into_iter().filter_map(row).collect()
    }
}
