//! What this crate reads from its disk, offered to those who feed it bytes that nobody meant.

use troth_protocol::message::raft;
use troth_protocol::wire::{decode, encode};
use xxhash_rust::xxh3::xxh3_64;

use crate::durable::{counted, sealed, understood};
use crate::log::{Change, numbered_key, read_entry, write_entry};
use crate::snapshot::Mark;
use crate::types;

/// Reads the bytes as all that this crate stores: nothing panics, and what is understood means the same when
/// it is written and read again.
pub fn take(bytes: &[u8]) {
    if let Ok(entry) = decode::<raft::Entry>(bytes) {
        take_entry(entry.id.index, bytes);
    }
    let unsealed = read_entry(7, &numbered_key(7, 1), bytes);
    assert!(unsealed.is_err(), "an entry whose checksum fits by chance");
    if let Ok(mark) = decode::<Mark>(bytes) {
        assert_eq!(decode::<Mark>(&encode(&mark)).as_ref(), Ok(&mark));
        let told = types::stored_membership_to_wire(&types::stored_membership(mark.membership));
        assert_eq!(types::stored_membership_to_wire(&types::stored_membership(told.clone())), told);
    }
    if let Some(count) = bytes.first_chunk().and_then(understood) {
        assert_eq!(sealed(count)[..], bytes[..16]);
    }
    counted(Some(bytes));
}

/// The checksum and the index are right, whatever else it says.
fn take_entry(index: u64, bytes: &[u8]) {
    let (key, stored) = (numbered_key(7, index), [&xxh3_64(bytes).to_be_bytes()[..], bytes].concat());
    let entry = read_entry(7, &key, &stored).expect("it is whole");
    let Change::Put(_, again, value) = write_entry(7, &entry) else { unreachable!("entries are put") };
    let read = read_entry(7, &again, &value).expect("it was written just now");
    assert_eq!((&again[..], types::entry_to_wire(&read)), (&key[..], types::entry_to_wire(&entry)));
    assert!(read_entry(7, &numbered_key(7, index ^ 1), &stored).is_err(), "it is another entry");
}

/// What a disk holds in good days.
pub fn samples() -> Vec<Vec<u8>> {
    vec![encode(&Mark::default()), sealed(3).to_vec()]
}
