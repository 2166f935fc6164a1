//! Keys, values, ranges; which shard a key belongs to; and the order-preserving form on disk.

use std::fmt;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::id::ShardId;
use crate::limits::KEY_BYTES_MAX;

/// A key: up to [`KEY_BYTES_MAX`] bytes, ordered bytewise.
#[derive(
    Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct Key(pub Bytes);

/// A value: up to [`VALUE_BYTES_MAX`](crate::limits::VALUE_BYTES_MAX) bytes.
pub type Value = Bytes;

impl Key {
    /// Copies bytes into a key.
    pub fn copy_from(bytes: &[u8]) -> Key {
        Key(Bytes::copy_from_slice(bytes))
    }

    /// The bytes of the key.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The part that decides the shard; see [`routing_part`].
    pub fn routing_part(&self) -> &[u8] {
        routing_part(&self.0)
    }

    /// The shard that this key belongs to, for ever.
    pub fn shard(&self, shards: u16) -> ShardId {
        shard_of(self.routing_part(), shards)
    }

    /// Whether a shard of so many may be asked about this key.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, shard: ShardId, shards: u16) -> Result<(), String> {
        let bytes = self.as_bytes().len();
        if bytes > KEY_BYTES_MAX {
            return Err(format!("a key has {bytes} bytes; at most {KEY_BYTES_MAX} may be"));
        }
        match self.shard(shards) {
            home if home == shard => Ok(()),
            home => Err(format!("key {self} belongs to shard {home}, not to shard {shard}")),
        }
    }
}

impl From<&'static str> for Key {
    fn from(text: &'static str) -> Key {
        Key(Bytes::from_static(text.as_bytes()))
    }
}

impl fmt::Display for Key {
    /// Printable characters as they are, the others as `\x00`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// The text inside the first `{…}` of the key if that is not empty, else the whole key: the hash-tag
/// rule of Redis Cluster. Keys with the same routing part share a shard.
pub fn routing_part(key: &[u8]) -> &[u8] {
    hash_tag(key).unwrap_or(key)
}

/// The hash tag of a key, if it has one.
fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    let open = key.iter().position(|&byte| byte == b'{')?;
    let rest = &key[open + 1..];
    let close = rest.iter().position(|&byte| byte == b'}')?;
    (close > 0).then(|| &rest[..close])
}

/// Maps a routing part to its shard: `xxh3_64(routing part) × shards >> 64`.
///
/// # Panics
/// If there are no shards.
pub fn shard_of(routing_part: &[u8], shards: u16) -> ShardId {
    assert!(shards > 0, "a cluster has at least one shard");
    let hash = u128::from(xxh3_64(routing_part));
    ShardId(((hash * u128::from(shards)) >> 64) as u16)
}

/// The keys from `start` up to but not including `end`; without an `end`, all from `start` on.
#[derive(
    Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub struct KeyRange {
    /// The first key that may be in the range.
    pub start: Key,
    /// The first key after the range; `None`: the range has no end.
    pub end: Option<Key>,
}

impl KeyRange {
    /// The range `[start, end)`.
    pub fn new(start: Key, end: Option<Key>) -> KeyRange {
        KeyRange { start, end }
    }

    /// All keys that begin with a prefix.
    pub fn prefix(prefix: impl AsRef<[u8]>) -> KeyRange {
        let prefix = prefix.as_ref();
        KeyRange {
            start: Key::copy_from(prefix),
            end: successor_of_prefix(prefix).map(|end| Key(end.into())),
        }
    }

    /// The keys from `start` up to but not including `end`.
    pub fn between(start: impl AsRef<[u8]>, end: impl AsRef<[u8]>) -> KeyRange {
        KeyRange { start: Key::copy_from(start.as_ref()), end: Some(Key::copy_from(end.as_ref())) }
    }

    /// Whether a key lies in the range.
    pub fn contains(&self, key: &Key) -> bool {
        *key >= self.start && self.end.as_ref().is_none_or(|end| key < end)
    }

    /// Whether no key can lie in the range.
    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    /// The bytes that every key of the range begins with.
    pub fn shared_prefix(&self) -> &[u8] {
        let (start, Some(end)) = (self.start.as_bytes(), &self.end) else {
            return b"";
        };
        let end = end.as_bytes();
        let common = start.iter().zip(end).take_while(|(a, b)| a == b).count();
        // ["{a}", "{a~"): nothing between '}' and '~', so all of the range begins with "{a}".
        let adjacent = common + 1 == end.len()
            && start.get(common).is_some_and(|byte| byte.checked_add(1) == Some(end[common]));
        &start[..common + usize::from(adjacent)]
    }

    /// The one shard that holds all of the range, if the range lies inside a hash tag.
    pub fn shard(&self, shards: u16) -> Option<ShardId> {
        hash_tag(self.shared_prefix()).map(|tag| shard_of(tag, shards))
    }
}

impl fmt::Display for KeyRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.end {
            Some(end) => write!(f, "[{}, {end})", self.start),
            None => write!(f, "[{}, end)", self.start),
        }
    }
}

impl fmt::Debug for KeyRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The smallest byte string above everything that begins with `prefix`; `None` if there is none.
fn successor_of_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|&byte| byte < 0xff)?;
    let mut successor = prefix[..=last].to_vec();
    successor[last] += 1;
    Some(successor)
}

/// Appends the memcomparable form of a key: `00` becomes `00 ff`, and `00 01` ends it. Forms
/// compare as the keys do, also when more bytes follow.
pub fn encode_ordered(key: &[u8], out: &mut Vec<u8>) {
    out.reserve(key.len() + 2);
    for piece in key.split_inclusive(|&byte| byte == 0) {
        out.extend_from_slice(piece);
        if piece.ends_with(&[0]) {
            out.push(0xff);
        }
    }
    out.extend_from_slice(&[0, 1]);
}

/// Reads what [`encode_ordered`] wrote, and hands back what follows it; `None` if malformed.
pub fn decode_ordered(bytes: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut key = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    loop {
        let zero = rest.iter().position(|&byte| byte == 0)?;
        key.extend_from_slice(&rest[..zero]);
        match rest.get(zero + 1)? {
            0xff => key.push(0),
            1 => return Some((key, &rest[zero + 2..])),
            _ => return None,
        }
        rest = &rest[zero + 2..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(text: &str) -> Key {
        Key::copy_from(text.as_bytes())
    }

    #[test]
    fn hash_tags_follow_the_redis_cluster_rule() {
        let check =
            |key: &str, part: &str| assert_eq!(routing_part(key.as_bytes()), part.as_bytes(), "{key}");
        check("plain", "plain");
        check("{user1}.name", "user1");
        check("a{user1}{user2}", "user1");
        check("{}empty", "{}empty");
        check("{{nested}}", "{nested");
        check("open{only", "open{only");
        check("}close{first}", "first");
        check("", "");
    }

    #[test]
    fn shards_are_a_format() {
        let shards: Vec<u16> =
            ["", "a", "{user1}x", "user1", "account/42"].map(|text| key(text).shard(16).0).to_vec();
        assert_eq!(shards, [2, 14, 14, 14, 12]);
        assert_eq!(key("anything").shard(1), ShardId(0));
    }

    #[test]
    fn a_range_knows_whether_it_lies_inside_a_hash_tag() {
        let prefix = KeyRange::prefix(b"{user1}/orders/");
        assert_eq!(prefix.shared_prefix(), b"{user1}/orders/");
        assert_eq!(prefix.shard(16), Some(key("{user1}").shard(16)));
        assert_eq!(KeyRange::prefix(b"{user1}").shard(16), Some(key("{user1}").shard(16)));
        assert_eq!(KeyRange::prefix(b"{user1").shard(16), None);
        assert_eq!(KeyRange::prefix(b"").shard(16), None);
        assert_eq!(KeyRange::new(key("{u}a"), None).shard(16), None);
        let inside = KeyRange::new(key("{u}a"), Some(key("{u}b")));
        assert_eq!(inside.shard(16), Some(key("{u}").shard(16)));
        let across = KeyRange::new(key("{u}a"), Some(key("{v}a")));
        assert_eq!(across.shard(16), None);
    }

    #[test]
    fn prefixes_end_where_they_should() {
        assert_eq!(KeyRange::prefix(b"ab").end, Some(key("ac")));
        assert_eq!(KeyRange::prefix(b"a\xff").end, Some(key("b")));
        assert_eq!(KeyRange::prefix(b"\xff\xff").end, None);
        assert!(KeyRange::new(key("b"), Some(key("b"))).is_empty());
    }

    #[test]
    fn keys_print_readably() {
        assert_eq!(Key::copy_from(b"a\x00\"b").to_string(), "a\\x00\\\"b");
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        // Few distinct bytes, so that prefixes, zeros and 0xff meet often.
        proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xfe), Just(0xff), any::<u8>()], 0..12)
    }

    proptest! {
        #[test]
        fn the_ordered_form_reads_back_and_keeps_the_order(a in bytes(), b in bytes(), tail in bytes()) {
            let encode = |key: &[u8], tail: &[u8]| {
                let mut out = Vec::new();
                encode_ordered(key, &mut out);
                out.extend_from_slice(tail);
                out
            };
            let form = encode(&a, &tail);
            prop_assert_eq!(decode_ordered(&form), Some((a.clone(), &tail[..])));
            if a != b {
                prop_assert_eq!(a.cmp(&b), encode(&a, &tail).cmp(&encode(&b, &[])));
            }
        }

        #[test]
        fn malformed_ordered_forms_are_refused_not_panicked_on(form in bytes()) {
            if let Some((key, rest)) = decode_ordered(&form) {
                let mut again = Vec::new();
                encode_ordered(&key, &mut again);
                again.extend_from_slice(rest);
                prop_assert_eq!(again, form);
            }
        }

        #[test]
        fn every_key_of_a_range_has_its_shared_prefix(start in bytes(), end in bytes(), probe in bytes()) {
            let range = KeyRange::new(Key(start.into()), Some(Key(end.into())));
            let probe = Key(probe.into());
            if range.contains(&probe) {
                prop_assert!(probe.as_bytes().starts_with(range.shared_prefix()));
                prop_assert!(!range.is_empty());
            }
        }

        #[test]
        fn a_prefix_range_is_exactly_the_keys_with_the_prefix(prefix in bytes(), probe in bytes()) {
            let probe = Key(probe.into());
            prop_assert_eq!(KeyRange::prefix(&prefix).contains(&probe), probe.as_bytes().starts_with(&prefix));
        }
    }
}
