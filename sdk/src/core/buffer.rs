//! What a transaction has read and wants to write, and what each shard has to check of it.

use std::collections::BTreeMap;

use bytes::Bytes;
use troth_protocol::limits::{KEY_BYTES_MAX, TXN_BYTES_MAX, TXN_KEYS_MAX};
use troth_protocol::message::shard::Version;
use troth_protocol::message::txn::{Part, RangeCheck, ReadCheck, Work, Write};
use troth_protocol::{Key, KeyRange, ParticipantId, ShardId, Timestamp};

use crate::scan::shards_of;

/// The memory of a transaction. Nothing is sent before the commit.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Buffer {
    /// Versions that were read.
    reads: BTreeMap<Key, Version>,
    /// Ranges that were read.
    ranges: Vec<KeyRange>,
    writes: BTreeMap<Key, Option<Bytes>>,
    bytes: usize,
}

/// A transaction has more than may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooMuch {
    /// How much it has.
    pub actual: usize,
    /// How much may be.
    pub limit: usize,
    /// What is counted.
    pub unit: &'static str,
}

impl Buffer {
    /// Whether it is known what the transaction sees at a key.
    pub fn knows(&self, key: &Key) -> bool {
        self.writes.contains_key(key) || self.reads.contains_key(key)
    }

    /// What the transaction sees at a key that it knows: its own write, or what it has read.
    pub fn value(&self, key: &Key) -> Option<Bytes> {
        match self.writes.get(key) {
            Some(written) => written.clone(),
            None => self.reads.get(key).and_then(|version| version.value.clone()),
        }
    }

    /// What it wants to write in a range; `None` deletes.
    pub fn writes_in(&self, range: &KeyRange) -> BTreeMap<Key, Option<Bytes>> {
        let writes = self.writes.iter().filter(|(key, _)| range.contains(key));
        writes.map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Whether it wants to write nothing.
    pub fn is_read_only(&self) -> bool {
        self.writes.is_empty()
    }

    /// Notes what was read. The first reading of a key counts: all are at one moment.
    pub fn note_read(&mut self, key: Key, version: Version) {
        self.bytes += key.as_bytes().len();
        self.reads.entry(key).or_insert(version);
    }

    /// Notes a range all of whose keys were seen.
    pub fn note_range(&mut self, range: KeyRange) {
        if !range.is_empty() && !self.ranges.contains(&range) {
            self.bytes += range.start.as_bytes().len() + KEY_BYTES_MAX;
            self.ranges.push(range);
        }
    }

    /// Notes a write; `None` deletes.
    pub fn write(&mut self, key: Key, value: Option<Bytes>) {
        let size = |value: &Option<Bytes>| value.as_ref().map_or(0, Bytes::len);
        let added = key.as_bytes().len() + size(&value);
        let removed = self.writes.get(&key).map_or(0, |old| key.as_bytes().len() + size(old));
        self.bytes = self.bytes + added - removed;
        self.writes.insert(key, value);
    }

    /// Whether it is small enough.
    ///
    /// # Errors
    /// If it is not.
    pub fn check_size(&self) -> Result<(), TooMuch> {
        let keys = self.reads.len() + self.writes.len() + self.ranges.len();
        if keys > TXN_KEYS_MAX {
            return Err(TooMuch { actual: keys, limit: TXN_KEYS_MAX, unit: "keys" });
        }
        if self.bytes > TXN_BYTES_MAX {
            return Err(TooMuch { actual: self.bytes, limit: TXN_BYTES_MAX, unit: "bytes" });
        }
        Ok(())
    }

    /// What each shard has to check and write, for a transaction that read at this moment.
    pub fn parts(&self, snapshot: Timestamp, shards: u16) -> Vec<Part> {
        let mut work: BTreeMap<ShardId, Work> = BTreeMap::new();
        for (key, version) in &self.reads {
            let check = ReadCheck { key: key.clone(), version: version.version };
            work.entry(key.shard(shards)).or_default().reads.push(check);
        }
        for range in &self.ranges {
            for shard in shards_of(range, shards) {
                let check = RangeCheck { range: range.clone(), snapshot };
                work.entry(shard).or_default().ranges.push(check);
            }
        }
        for (key, value) in &self.writes {
            let write = Write { key: key.clone(), value: value.clone() };
            work.entry(key.shard(shards)).or_default().writes.push(write);
        }
        let part = |(shard, work)| Part { participant: ParticipantId::Shard(shard), work };
        work.into_iter().map(part).collect()
    }
}
