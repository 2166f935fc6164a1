//! Names of things. Every id is a type of its own, so that none is taken for another.

use std::fmt;
use std::str::FromStr;

use crate::timestamp::Timestamp;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug,
            rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
        )]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number_id! {
    /// A process with a disk: a participant, or (in a namespace of its own) a coordinator.
    NodeId(u64)
}
number_id! {
    /// One of the equal arcs of the hash space.
    ShardId(u16)
}
number_id! {
    /// The term of a coordinator leader. A message from an older epoch than one already seen is
    /// ignored.
    Epoch(u64)
}
number_id! {
    /// The version of a cluster map.
    MapEpoch(u64)
}

/// A running SDK client: random, so that no client can speak for another's transaction by accident.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct ClientId(pub u64);

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A transaction: its start timestamp, and the client that began it. Ordered by age.
///
/// Written as `<start>-<client>`, for example `462352148324352001-00c0ffee00c0ffee`.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct TxnId {
    /// The oracle's value when the transaction began; all its reads are at this moment.
    pub start: Timestamp,
    /// Who began it.
    pub client: ClientId,
}

impl TxnId {
    /// `[start u64 | client u64]`, big-endian: sorts by age. The form on disk.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.start.0.to_be_bytes());
        bytes[8..].copy_from_slice(&self.client.0.to_be_bytes());
        bytes
    }

    /// Reads what [`TxnId::to_bytes`] wrote; `None` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Option<TxnId> {
        let (start, client) = bytes.split_at_checked(8)?;
        Some(TxnId {
            start: Timestamp(u64::from_be_bytes(start.try_into().ok()?)),
            client: ClientId(u64::from_be_bytes(client.try_into().ok()?)),
        })
    }
}

impl fmt::Display for TxnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.start, self.client)
    }
}

impl fmt::Debug for TxnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A data folder: random, made together with the folder. A node that comes back with another folder
/// has lost what it promised.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Debug,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct FolderId(pub u64);

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default,
            rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
        )]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

random_id! {
    /// One start of a server from its data folder: random, and written there before the server says anything
    /// to anybody. The folder keeps those of all its starts, so that a copy of it can be told from it.
    Incarnation
}
random_id! {
    /// The line of decisions that a coordinator group continues: random, drawn when the group was founded.
    Lineage
}
random_id! {
    /// The word by which servers are told to found a coordinator group together: random, in the configuration
    /// of each of them.
    FoundingId
}

/// The text is not a founding word.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no founding word: 16 hexadecimal digits; `troth init` draws one")]
pub struct FoundingIdError(String);

impl FromStr for FoundingId {
    type Err = FoundingIdError;

    fn from_str(text: &str) -> Result<FoundingId, FoundingIdError> {
        let well_formed = text.len() == 16 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        let parsed = well_formed.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        parsed.map(FoundingId).ok_or_else(|| FoundingIdError(text.to_owned()))
    }
}

/// The text is not a transaction id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a transaction id; one looks like 462352148324352001-00c0ffee00c0ffee")]
pub struct TxnIdError(String);

impl FromStr for TxnId {
    type Err = TxnIdError;

    fn from_str(text: &str) -> Result<TxnId, TxnIdError> {
        let parse = || {
            let (start, client) = text.split_once('-')?;
            Some(TxnId {
                start: start.parse().ok()?,
                client: ClientId(u64::from_str_radix(client, 16).ok()?),
            })
        };
        parse().ok_or_else(|| TxnIdError(text.to_owned()))
    }
}

/// One installation of Troth: 128 random bits, written as 32 hexadecimal digits.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a cluster id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a cluster id: 32 hexadecimal digits")]
pub struct ClusterIdError(String);

impl FromStr for ClusterId {
    type Err = ClusterIdError;

    fn from_str(text: &str) -> Result<ClusterId, ClusterIdError> {
        let mut id = [0; 16];
        let well_formed = text.len() == 32 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !well_formed {
            return Err(ClusterIdError(text.to_owned()));
        }
        for (byte, digits) in id.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).expect("hexadecimal digits are ASCII");
            *byte = u8::from_str_radix(digits, 16).expect("checked to be hexadecimal");
        }
        Ok(ClusterId(id))
    }
}

/// A Raft group: the coordinators, or the replicas of one shard.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub enum GroupId {
    /// The coordinators.
    Coordinator,
    /// The replicas of a shard.
    Shard(ShardId),
}

impl GroupId {
    /// The form on disk: 0 for the coordinators, shard number plus one for a shard.
    pub fn to_u32(self) -> u32 {
        match self {
            GroupId::Coordinator => 0,
            GroupId::Shard(shard) => u32::from(shard.0) + 1,
        }
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupId::Coordinator => write!(f, "coordinator group"),
            GroupId::Shard(shard) => write!(f, "shard {shard}"),
        }
    }
}

/// Somebody who votes on a transaction.
#[derive(
    Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
pub enum ParticipantId {
    /// A shard of this cluster.
    Shard(ShardId),
    /// An outside database that can prepare, by its configured name. The format has room for it;
    /// no server drives one yet.
    Resource(String),
}

impl ParticipantId {
    /// The shard, if it is one.
    pub fn shard(&self) -> Option<ShardId> {
        match self {
            ParticipantId::Shard(shard) => Some(*shard),
            ParticipantId::Resource(_) => None,
        }
    }
}

impl fmt::Display for ParticipantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParticipantId::Shard(shard) => write!(f, "shard {shard}"),
            ParticipantId::Resource(name) => write!(f, "resource {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn txn_ids_sort_by_age_as_bytes_and_read_back() {
        let old = TxnId { start: Timestamp(255), client: ClientId(u64::MAX) };
        let young = TxnId { start: Timestamp(256), client: ClientId(0) };
        assert!(old < young);
        assert!(old.to_bytes() < young.to_bytes());
        assert_eq!(TxnId::from_bytes(&old.to_bytes()), Some(old));
        assert_eq!(TxnId::from_bytes(b"short"), None);
        assert_eq!(young.to_string(), "256-0000000000000000");
        assert_eq!(old.to_string().parse(), Ok(old));
    }

    #[test]
    fn malformed_ids_are_refused_with_the_expected_form() {
        for text in ["", "12", "12-", "-ff", "12-xyz", "twelve-ff"] {
            let error = text.parse::<TxnId>().expect_err(text).to_string();
            assert!(error.contains("looks like"), "{error}");
        }
        for text in ["", "00", "zz000000000000000000000000000000", "+1000000000000000000000000000000"] {
            text.parse::<ClusterId>().expect_err(text);
        }
    }

    #[test]
    fn cluster_ids_read_back() {
        let id = ClusterId([0xab; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn group_numbers_are_a_format() {
        assert_eq!(GroupId::Coordinator.to_u32(), 0);
        assert_eq!(GroupId::Shard(ShardId(0)).to_u32(), 1);
        assert_eq!(GroupId::Shard(ShardId(u16::MAX)).to_u32(), 65_536);
    }
}
