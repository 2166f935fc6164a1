//! The parts of a transaction that travel: what was read, what is written, how it ended.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use std::fmt;

use crate::id::{ParticipantId, ShardId, TxnId};
use crate::key::{Key, KeyRange, Value};
use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::timestamp::Timestamp;

/// A key that a transaction read. The shard votes No if the key has a newer version by now.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct ReadCheck {
    /// The key.
    pub key: Key,
    /// The version that was seen; [`Timestamp::ZERO`]: the key had none.
    pub version: Timestamp,
}

/// A range that a transaction read. The shard votes No if it holds a version newer than the
/// snapshot by now, so a key that was inserted counts too.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct RangeCheck {
    /// The keys that were looked at: no more than what the application was shown.
    pub range: KeyRange,
    /// The snapshot it was read at.
    pub snapshot: Timestamp,
}

/// A key that a transaction writes.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Write {
    /// The key.
    pub key: Key,
    /// Its new value; `None`: it is deleted.
    pub value: Option<Value>,
}

/// What a transaction did at one participant.
#[derive(Clone, PartialEq, Eq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Work {
    /// Keys read, each once.
    pub reads: Vec<ReadCheck>,
    /// Ranges read.
    pub ranges: Vec<RangeCheck>,
    /// Keys written, each once.
    pub writes: Vec<Write>,
}

impl Work {
    /// Bytes of keys and values in it, for admission.
    pub fn bytes(&self) -> usize {
        let key = |key: &Key| key.as_bytes().len();
        let reads: usize = self.reads.iter().map(|read| key(&read.key)).sum();
        let range = |range: &KeyRange| key(&range.start) + range.end.as_ref().map_or(0, key);
        let ranges: usize = self.ranges.iter().map(|check| range(&check.range)).sum();
        let value = |value: &Option<Value>| value.as_ref().map_or(0, |value| value.len());
        let writes: usize = self.writes.iter().map(|write| key(&write.key) + value(&write.value)).sum();
        reads + ranges + writes
    }

    /// Keys and ranges in it, for admission.
    pub fn keys(&self) -> usize {
        self.reads.len() + self.ranges.len() + self.writes.len()
    }

    /// Whether a shard of so many may be asked to do this.
    ///
    /// # Errors
    /// What is wrong: a key or value that is too large, or a key that belongs to another shard, where
    /// nobody would ever look for it.
    pub fn check(&self, shard: ShardId, shards: u16) -> Result<(), String> {
        let reads = self.reads.iter().map(|read| &read.key);
        for key in reads.chain(self.writes.iter().map(|write| &write.key)) {
            key.check(shard, shards)?;
        }
        // Just after the longest key a range may begin or end.
        let bounds =
            self.ranges.iter().flat_map(|check| [Some(&check.range.start), check.range.end.as_ref()]);
        if let Some(bound) = bounds.flatten().find(|bound| bound.as_bytes().len() > KEY_BYTES_MAX + 1) {
            return Err(format!("a range is bounded by a key of {} bytes", bound.as_bytes().len()));
        }
        let values = self.writes.iter().filter_map(|write| write.value.as_ref());
        match values.map(|value| value.len()).find(|bytes| *bytes > VALUE_BYTES_MAX) {
            Some(bytes) => Err(format!("a value has {bytes} bytes; at most {VALUE_BYTES_MAX} may be")),
            None => Ok(()),
        }
    }
}

/// The work of one participant, addressed.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Part {
    /// Who must vote on it.
    pub participant: ParticipantId,
    /// What is voted on.
    pub work: Work,
}

/// How a transaction ended, for ever.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Outcome {
    /// All of it happened, at this moment in the serial order.
    Committed {
        /// The place in the serial order.
        commit_ts: Timestamp,
    },
    /// None of it happened, and none of it can happen later.
    Aborted {
        /// Why.
        cause: Cause,
    },
}

/// Why a transaction was aborted.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Cause {
    /// A key that it read was written since, at `version`.
    ReadConflict {
        /// The key.
        key: Key,
        /// The newer version.
        version: Timestamp,
    },
    /// A range that it read was written since.
    RangeConflict {
        /// The range.
        range: KeyRange,
        /// The key in the range that was written.
        key: Key,
        /// The newer version.
        version: Timestamp,
    },
    /// Another transaction holds a lock on a key or range that it needs.
    Locked {
        /// The key, or the start of the range.
        key: Key,
        /// Who holds the lock.
        by: TxnId,
    },
    /// It is older than a transaction may be.
    TooOld,
    /// A participant did not vote before the deadline.
    Unreachable {
        /// Who did not vote.
        participant: ParticipantId,
    },
    /// The coordinator leader that ran it is gone, and its successor found no decision.
    CoordinatorChanged,
    /// A participant has seen a newer coordinator leader than the one that asked it, or its own leader
    /// changed before the check.
    Superseded,
    /// Its outcome was asked for before it was decided, and settled as aborted.
    Settled,
}

impl Cause {
    /// Whether running the transaction again from its beginning may succeed. All causes of today
    /// are of that kind.
    pub fn is_retriable(&self) -> bool {
        match self {
            Cause::ReadConflict { .. }
            | Cause::RangeConflict { .. }
            | Cause::Locked { .. }
            | Cause::TooOld
            | Cause::Unreachable { .. }
            | Cause::CoordinatorChanged
            | Cause::Superseded
            | Cause::Settled => true,
        }
    }

    /// A short name for counters and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Cause::ReadConflict { .. } => "read_conflict",
            Cause::RangeConflict { .. } => "range_conflict",
            Cause::Locked { .. } => "locked",
            Cause::TooOld => "too_old",
            Cause::Unreachable { .. } => "unreachable",
            Cause::CoordinatorChanged => "coordinator_changed",
            Cause::Superseded => "superseded",
            Cause::Settled => "settled",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::ReadConflict { key, version } => {
                write!(f, "key {key} was written at {version}, after it was read")
            }
            Cause::RangeConflict { range, key, version } => {
                write!(f, "key {key} in range {range} was written at {version}, after the range was read")
            }
            Cause::Locked { key, by } => write!(f, "key {key} is locked by transaction {by}"),
            Cause::TooOld => write!(f, "the transaction is older than transactions may be"),
            Cause::Unreachable { participant } => write!(f, "{participant} did not vote before the deadline"),
            Cause::CoordinatorChanged => write!(f, "the coordinator leader changed before the decision"),
            Cause::Superseded => {
                write!(f, "a newer leader, of the coordinators or of a shard, has taken over")
            }
            Cause::Settled => write!(f, "its outcome was asked for before it was decided"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(work: &Work, expected: Result<(), &str>) {
        let shards = 16;
        let (home, other) = (Key::from("a").shard(shards), Key::from("b").shard(shards));
        assert_ne!(home, other);
        assert_eq!(work.check(home, shards), expected.map_err(|reason| reason.to_owned()));
    }

    fn writing(key: Key, value: Option<Value>) -> Work {
        Work { writes: vec![Write { key, value }], ..Work::default() }
    }

    #[test]
    fn a_shard_is_asked_only_for_what_is_its_own_and_fits() {
        check(&writing("a".into(), None), Ok(()));
        check(&writing("b".into(), None), Err("key b belongs to shard 5, not to shard 14"));
        let read = ReadCheck { key: "b".into(), version: Timestamp::ZERO };
        let work = Work { reads: vec![read], ..Work::default() };
        check(&work, Err("key b belongs to shard 5, not to shard 14"));
        let long = Key::copy_from(&[b'x'; KEY_BYTES_MAX + 1]);
        check(&writing(long.clone(), None), Err("a key has 4097 bytes; at most 4096 may be"));
        let large = Value::from(vec![0; VALUE_BYTES_MAX + 1]);
        let error = "a value has 1048577 bytes; at most 1048576 may be";
        check(&writing("a".into(), Some(large)), Err(error));
        let range = |end: Key| {
            let range = KeyRange::new("a".into(), Some(end));
            Work { ranges: vec![RangeCheck { range, snapshot: Timestamp::ZERO }], ..Work::default() }
        };
        check(&range(long), Ok(()));
        let longer = Key::copy_from(&[b'x'; KEY_BYTES_MAX + 2]);
        check(&range(longer), Err("a range is bounded by a key of 4098 bytes"));
    }
}
