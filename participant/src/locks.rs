//! Which keys and ranges prepared transactions hold.
//!
//! A transaction locks what it read shared and what it writes exclusively, from its vote until its
//! end. Nobody ever waits for a lock to be granted: a prepare that meets one is voted down, and a
//! read that meets one waits for the transaction to end, not for the lock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use troth_protocol::message::txn::Work;
use troth_protocol::{Key, KeyRange, Timestamp, TxnId};

/// The locks of one shard.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Table {
    keys: BTreeMap<Key, Holders>,
    /// Ranges that were read, by who read them.
    ranges: BTreeMap<TxnId, Vec<KeyRange>>,
}

#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Holders {
    /// Who writes the key, and after when at the earliest.
    writer: Option<(TxnId, Timestamp)>,
    readers: BTreeSet<TxnId>,
}

/// A lock in the way, and whose it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conflict {
    /// The key that both want.
    pub key: Key,
    /// Who holds the lock.
    pub by: TxnId,
}

impl Table {
    /// Whether a transaction meets a lock of another one.
    pub fn conflict(&self, txn: TxnId, work: &Work) -> Option<Conflict> {
        let foreign = |by: &TxnId| *by != txn;
        let on_write = work.writes.iter().find_map(|write| {
            let holders = self.keys.get(&write.key);
            let writer = holders.and_then(|holders| holders.writer).map(|(by, _)| by);
            let reader = || holders.and_then(|holders| holders.readers.iter().copied().find(foreign));
            let by = writer.filter(foreign).or_else(reader).or_else(|| self.range_reader(txn, &write.key))?;
            Some(Conflict { key: write.key.clone(), by })
        });
        let on_read = || {
            work.reads.iter().find_map(|read| {
                let (by, _) = self.keys.get(&read.key)?.writer.filter(|(by, _)| foreign(by))?;
                Some(Conflict { key: read.key.clone(), by })
            })
        };
        let on_range = || {
            let mut writers = work.ranges.iter().flat_map(|check| self.writers_in(&check.range));
            writers.find(|(_, by, _)| foreign(by)).map(|(key, by, _)| Conflict { key: key.clone(), by })
        };
        on_write.or_else(on_read).or_else(on_range)
    }

    /// Takes all locks of a transaction, which writes after `floor` if at all.
    ///
    /// # Panics
    /// If one of them conflicts: [`Table::conflict`] must have been asked.
    pub fn acquire(&mut self, txn: TxnId, floor: Timestamp, work: &Work) {
        let conflict = self.conflict(txn, work);
        assert_eq!(conflict, None, "transaction {txn} must not be granted a lock that another holds");
        for write in &work.writes {
            self.keys.entry(write.key.clone()).or_default().writer = Some((txn, floor));
        }
        for read in &work.reads {
            self.keys.entry(read.key.clone()).or_default().readers.insert(txn);
        }
        if !work.ranges.is_empty() {
            self.ranges.insert(txn, work.ranges.iter().map(|check| check.range.clone()).collect());
        }
    }

    /// Gives all locks of a transaction back.
    pub fn release(&mut self, txn: TxnId, work: &Work) {
        let keys = work.writes.iter().map(|write| &write.key).chain(work.reads.iter().map(|read| &read.key));
        for key in keys {
            if let Some(holders) = self.keys.get_mut(key) {
                holders.readers.remove(&txn);
                if holders.writer.is_some_and(|(by, _)| by == txn) {
                    holders.writer = None;
                }
                if holders.writer.is_none() && holders.readers.is_empty() {
                    self.keys.remove(key);
                }
            }
        }
        self.ranges.remove(&txn);
    }

    /// The prepared transaction that may have written a key at or before a moment.
    pub fn blocks_read(&self, key: &Key, at: Timestamp) -> Option<Conflict> {
        let (by, floor) = self.keys.get(key)?.writer?;
        (floor <= at).then(|| Conflict { key: key.clone(), by })
    }

    /// The prepared transaction that may have written in a range at or before a moment.
    pub fn blocks_scan(&self, range: &KeyRange, at: Timestamp) -> Option<Conflict> {
        let mut writers = self.writers_in(range);
        writers.find(|(_, _, floor)| *floor <= at).map(|(key, by, _)| Conflict { key: key.clone(), by })
    }

    /// Keys and ranges that are locked.
    pub fn len(&self) -> usize {
        self.keys.len() + self.ranges.values().map(Vec::len).sum::<usize>()
    }

    /// Whether nothing is locked.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn range_reader(&self, txn: TxnId, key: &Key) -> Option<TxnId> {
        let holds = |ranges: &[KeyRange]| ranges.iter().any(|range| range.contains(key));
        let mut others = self.ranges.iter().filter(|(by, _)| **by != txn);
        others.find(|(_, ranges)| holds(ranges)).map(|(by, _)| *by)
    }

    fn writers_in(&self, range: &KeyRange) -> impl Iterator<Item = (&Key, TxnId, Timestamp)> {
        let end = match &range.end {
            _ if range.is_empty() => Bound::Excluded(&range.start),
            Some(end) => Bound::Excluded(end),
            None => Bound::Unbounded,
        };
        let keys = self.keys.range((Bound::Included(&range.start), end));
        keys.filter_map(|(key, holders)| holders.writer.map(|(by, floor)| (key, by, floor)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use troth_protocol::ClientId;
    use troth_protocol::message::txn::{RangeCheck, ReadCheck, Write};

    fn txn(number: u64) -> TxnId {
        TxnId { start: Timestamp(number), client: ClientId(0) }
    }

    /// `r:a w:b s:c-e` reads a, writes b, scans from c up to e.
    fn work(text: &str) -> Work {
        let mut work = Work::default();
        for item in text.split_whitespace() {
            let (kind, what) = item.split_once(':').expect("kind:what");
            let key = |text: &str| Key::copy_from(text.as_bytes());
            match kind {
                "r" => work.reads.push(ReadCheck { key: key(what), version: Timestamp::ZERO }),
                "w" => work.writes.push(Write { key: key(what), value: None }),
                "s" => {
                    let (start, end) = what.split_once('-').expect("start-end");
                    let end = (!end.is_empty()).then(|| key(end));
                    let range = KeyRange::new(key(start), end);
                    work.ranges.push(RangeCheck { range, snapshot: Timestamp::ZERO });
                }
                other => panic!("unknown kind {other}"),
            }
        }
        work
    }

    /// What transaction 1 holds, what transaction 2 wants, and on which key they collide.
    fn check(held: &str, wanted: &str, collision: Option<&str>) {
        let mut table = Table::default();
        table.acquire(txn(1), Timestamp(10), &work(held));
        let found = table.conflict(txn(2), &work(wanted));
        let expected = collision.map(|key| Conflict { key: Key::copy_from(key.as_bytes()), by: txn(1) });
        assert_eq!(found, expected, "held {held}, wanted {wanted}");
        assert_eq!(table.conflict(txn(1), &work(held)), None, "nobody is in their own way");
        table.release(txn(1), &work(held));
        assert!(table.is_empty(), "released: {table:?}");
        assert_eq!(table.conflict(txn(2), &work(wanted)), None);
    }

    #[test]
    fn reads_are_shared_and_writes_exclusive() {
        check("r:a", "r:a", None);
        check("r:a", "w:a", Some("a"));
        check("w:a", "r:a", Some("a"));
        check("w:a", "w:a", Some("a"));
        check("w:a", "w:b r:c", None);
        check("r:a w:a", "r:a", Some("a"));
    }

    #[test]
    fn ranges_lock_also_keys_that_do_not_exist() {
        check("s:b-d", "w:c", Some("c"));
        check("s:b-d", "w:b", Some("b"));
        check("s:b-d", "w:d", None);
        check("s:b-", "w:z", Some("z"));
        check("s:b-d", "r:c", None);
        check("s:b-d", "s:a-z", None);
        check("w:c", "s:b-d", Some("c"));
        check("w:d", "s:b-d", None);
        check("r:c", "s:b-d", None);
        check("w:c", "s:d-b", None);
    }

    #[test]
    fn two_readers_are_both_in_the_way_until_both_have_gone() {
        let mut table = Table::default();
        table.acquire(txn(1), Timestamp(10), &work("r:a"));
        table.acquire(txn(2), Timestamp(11), &work("r:a"));
        table.release(txn(1), &work("r:a"));
        assert_eq!(table.conflict(txn(3), &work("w:a")).map(|conflict| conflict.by), Some(txn(2)));
        table.release(txn(2), &work("r:a"));
        assert_eq!(table.conflict(txn(3), &work("w:a")), None);
    }

    #[test]
    fn only_reads_from_the_floor_on_are_blocked() {
        let mut table = Table::default();
        table.acquire(txn(1), Timestamp(10), &work("w:c r:d"));
        let blocked = Some(Conflict { key: "c".into(), by: txn(1) });
        assert_eq!(table.blocks_read(&"c".into(), Timestamp(9)), None);
        assert_eq!(table.blocks_read(&"c".into(), Timestamp(10)), blocked);
        assert_eq!(table.blocks_read(&"d".into(), Timestamp(10)), None);
        let range = KeyRange::new("a".into(), None);
        assert_eq!(table.blocks_scan(&range, Timestamp(9)), None);
        assert_eq!(table.blocks_scan(&range, Timestamp(10)), blocked);
    }

    #[test]
    #[should_panic(expected = "must not be granted")]
    fn a_conflicting_grant_is_a_bug() {
        let mut table = Table::default();
        table.acquire(txn(1), Timestamp(10), &work("w:a"));
        table.acquire(txn(2), Timestamp(10), &work("w:a"));
    }
}
