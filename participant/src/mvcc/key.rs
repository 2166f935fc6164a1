//! The form of keys on disk.

use troth_protocol::key::{decode_ordered, encode_ordered};
use troth_protocol::{Key, KeyRange, ShardId, Timestamp, TxnId};

/// `[shard | key | !version]`.
pub fn version(shard: ShardId, key: &Key, version: Timestamp) -> Vec<u8> {
    let mut bytes = versions(shard, key);
    bytes.extend_from_slice(&(!version.0).to_be_bytes());
    bytes
}

/// `[shard | key]`: what all versions of a key begin with, and nothing else does.
pub fn versions(shard: ShardId, key: &Key) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(2 + key.as_bytes().len() + 2 + 8);
    bytes.extend_from_slice(&shard.0.to_be_bytes());
    encode_ordered(key.as_bytes(), &mut bytes);
    bytes
}

/// Reads what [`version`] wrote.
pub fn parse_version(bytes: &[u8]) -> Option<(ShardId, Key, Timestamp)> {
    let (shard, rest) = bytes.split_at_checked(2)?;
    let (key, version) = decode_ordered(rest)?;
    let shard = ShardId(u16::from_be_bytes(shard.try_into().ok()?));
    Some((shard, Key(key.into()), Timestamp(!u64::from_be_bytes(version.try_into().ok()?))))
}

/// The timestamp at the end of a version's key.
pub fn timestamp(bytes: &[u8]) -> Option<Timestamp> {
    let (_, version) = bytes.split_last_chunk::<8>()?;
    Some(Timestamp(!u64::from_be_bytes(*version)))
}

/// The first and the last-plus-one key of all versions in a range.
pub fn range(shard: ShardId, range: &KeyRange) -> (Vec<u8>, Vec<u8>) {
    let start = versions(shard, &range.start);
    let end = range.end.as_ref().map_or_else(|| shard_end(shard), |end| versions(shard, end));
    (start, end)
}

/// What all of a shard's keys begin with, in every column family.
pub fn shard_start(shard: ShardId) -> Vec<u8> {
    shard.0.to_be_bytes().to_vec()
}

/// The first key after those of a shard.
pub fn shard_end(shard: ShardId) -> Vec<u8> {
    match shard.0.checked_add(1) {
        Some(next) => next.to_be_bytes().to_vec(),
        None => vec![0xff; 3],
    }
}

/// `[shard | start | client]`: a transaction at a shard.
pub fn txn(shard: ShardId, txn: TxnId) -> Vec<u8> {
    [&shard.0.to_be_bytes()[..], &txn.to_bytes()].concat()
}

/// Reads what [`txn`] wrote.
pub fn parse_txn(bytes: &[u8]) -> Option<TxnId> {
    TxnId::from_bytes(bytes.get(2..18)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_versions_come_first_and_longer_keys_after_shorter_ones() {
        let at = |key: &'static str, ts: u64| version(ShardId(3), &key.into(), Timestamp(ts));
        assert!(at("a", 9) < at("a", 8));
        assert!(at("a", 0) < at("a\0", u64::MAX));
        assert!(at("a\0", 0) < at("ab", u64::MAX));
        assert!(at("z", 0) < version(ShardId(4), &"a".into(), Timestamp::MAX));
        assert_eq!(parse_version(&at("a\0b", 7)), Some((ShardId(3), "a\0b".into(), Timestamp(7))));
        assert_eq!(timestamp(&at("a", 7)), Some(Timestamp(7)));
        assert_eq!(parse_version(b"x"), None);
    }

    #[test]
    fn a_shard_ends_where_the_next_begins() {
        assert_eq!(shard_end(ShardId(3)), shard_start(ShardId(4)));
        assert!(shard_end(ShardId(u16::MAX)) > version(ShardId(u16::MAX), &"\u{ff}".into(), Timestamp::ZERO));
        let (start, end) = range(ShardId(3), &KeyRange::new("b".into(), None));
        assert!(start < end && end == shard_start(ShardId(4)));
    }

    #[test]
    fn the_form_is_a_format() {
        let bytes = version(ShardId(258), &"a\0".into(), Timestamp(1));
        assert_eq!(bytes, [1, 2, b'a', 0, 0xff, 0, 1, 255, 255, 255, 255, 255, 255, 255, 254]);
    }
}
