//! Snapshots: the state of a machine on its way to a member that has too little of the log.
//!
//! Nothing is copied to make one. The sender reads the machine's spans from a frozen view of the
//! database, in *parts*: ranges of keys that follow each other without a gap, from the first key of the
//! first span to the end of the last.
//!
//! ```text
//! sender                                     receiver
//!   │ offer: bounds and checksums of parts      │ compares them with what it has
//!   ├──────────────────────────────────────────►│
//!   │◄── wanted: those that differ; is there ───┤
//!   │    anything at all after them?            │
//!   │ parts: those that were wanted             │
//!   ├──────────────────────────────────────────►│ replaces what lies within their bounds
//!   │ …, and from where the receiver has        │
//!   │ nothing, parts without an offer           │
//!   │ end                                       │
//!   ├──────────────────────────────────────────►│ all bounds were seen: this is its state now
//! ```
//!
//! So a transfer that broke off, because anybody crashed or the leader changed, goes on from what has
//! arrived, whoever sends the rest, and whatever has changed meanwhile: only what differs travels.
//!
//! A member that has never applied anything builds the snapshot in place ([`incoming::Site`]). One that
//! has a state keeps it until the new one is complete: parts are staged, and put in place under a
//! durable note, so that a crash in between is finished at the next start.

pub(crate) mod incoming;
pub(crate) mod outgoing;

use std::collections::BTreeSet;
use std::io;

use bytes::Bytes;
use openraft::EntryPayload;
use troth_protocol::message::raft as wire;
use troth_protocol::wire::{decode, encode};
use troth_protocol::{GroupId, NodeId};
use xxhash_rust::xxh3::Xxh3Default;

use self::incoming::Area;
use crate::log::{Change, LogWriter, meta_key, read_entry, tag};
use crate::machine::{Batch, Span};
use crate::rocks::{Store, families, group_range};
use crate::types;

/// What a machine's state is marked with: the last entry in it, and the membership.
#[derive(Clone, PartialEq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub(crate) struct Mark {
    pub applied: Option<wire::LogId>,
    pub membership: wire::StoredMembership,
}

/// The data of a snapshot, as the Raft library passes it around.
pub(crate) enum Transfer {
    /// Only its position matters: the log may be purged up to it.
    Position,
    /// To be sent.
    Outgoing(outgoing::Pieces),
    /// To be sent some other time: as many are on their way as may be.
    Postponed,
    /// Arrived whole.
    Arrived(Area),
}

/// Reads the mark of a group.
pub(crate) fn read_mark(store: &Store, group: u32) -> io::Result<Mark> {
    match store.get(families::META, &meta_key(group, tag::APPLIED))? {
        Some(record) => decode(&record).map_err(|error| malformed(group, error)),
        None => Ok(Mark::default()),
    }
}

/// Adds the mark of a group to a batch.
pub(crate) fn put_mark(batch: &mut Batch<'_>, group: u32, mark: &Mark) {
    batch.put(families::META, &meta_key(group, tag::APPLIED), &encode(mark));
}

fn malformed(group: u32, error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the state of group {group} is damaged: {error}"))
}

/// The checksum of a part: xxh3 (128 bits) over its keys and values in order, each with its length as
/// `u32` before it, little-endian.
#[derive(Default)]
struct PartHash(Xxh3Default);

impl PartHash {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        for bytes in [key, value] {
            self.0.update(&(bytes.len() as u32).to_le_bytes());
            self.0.update(bytes);
        }
    }

    fn finish(&self) -> [u8; 16] {
        self.0.digest128().to_be_bytes()
    }
}

/// Removes all that a group has in the store, but for its vote: the member has left the group, and must
/// not vote twice if it ever comes back. Nobody may use the group meanwhile.
///
/// # Errors
/// If the store cannot be written.
pub async fn erase(writer: &LogWriter, group: GroupId, spans: &[Span]) -> io::Result<()> {
    let group = group.to_u32();
    let (start, end) = group_range(group);
    let of_group =
        [families::LOG, families::STAGING].map(|family| Change::delete_range(family, &start, &end));
    let of_machine = spans.iter().map(|span| Change::delete_range(span.family, &span.start, &span.end));
    let marks = tag::FORGETTABLE.map(|tag| Change::delete(families::META, &meta_key(group, tag)));
    writer.write_durably(of_group.into_iter().chain(of_machine).chain(marks).collect()).await
}

/// The index of the last entry in the state of a group.
///
/// # Errors
/// If the store cannot be read.
pub fn applied(store: &Store, group: GroupId) -> io::Result<Option<u64>> {
    Ok(read_mark(store, group.to_u32())?.applied.map(|last| last.index))
}

/// Who votes in a group, by the newest membership that its store holds, applied or not; in a joint one those of both
/// sides. Empty if it holds none.
///
/// # Errors
/// If the store cannot be read, or a record is damaged.
pub fn stored_voters(store: &Store, group: GroupId) -> io::Result<BTreeSet<NodeId>> {
    let group = group.to_u32();
    let mut membership = read_mark(store, group)?.membership.membership;
    let (start, end) = group_range(group);
    let mut problem = None;
    store.scan(families::LOG, &start, &end, |key, value| match read_entry(group, key, value) {
        Ok(entry) => {
            if let EntryPayload::Membership(newer) = &entry.payload {
                membership = types::membership_to_wire(newer);
            }
            true
        }
        Err(error) => {
            problem = Some(error);
            false
        }
    })?;
    match problem {
        Some(problem) => Err(problem),
        None => Ok(membership.voters.into_iter().flatten().collect()),
    }
}

/// The index of the last entry that a group has in the store, applied or not; 0 if it has none.
///
/// # Errors
/// If the store cannot be read.
pub fn last_stored(store: &Store, group: GroupId) -> io::Result<u64> {
    let mut last = applied(store, group)?.unwrap_or(0);
    let (start, end) = group_range(group.to_u32());
    store.scan(families::LOG, &start, &end, |key, _| {
        let index = key.get(4..12).and_then(|index| index.try_into().ok()).map_or(0, u64::from_be_bytes);
        last = last.max(index);
        true
    })?;
    Ok(last)
}

/// Whether a group has anything in the store besides a vote.
///
/// # Errors
/// If the store cannot be read.
pub fn is_known(store: &Store, group: GroupId) -> io::Result<bool> {
    let group = group.to_u32();
    for tag in tag::FORGETTABLE {
        if store.get(families::META, &meta_key(group, tag))?.is_some() {
            return Ok(true);
        }
    }
    let (start, end) = group_range(group);
    let mut any = false;
    store.scan(families::LOG, &start, &end, |_, _| {
        any = true;
        false
    })?;
    Ok(any)
}

fn owned(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}
