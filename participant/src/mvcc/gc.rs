//! Forgetting versions that nobody can read any more.
//!
//! A shard's safe point is part of its replicated state: reads below it are refused on every
//! replica, and no check of a transaction looks below it. So each replica may remove, in its own
//! time, all versions at or before the safe point but the newest one, and that one too if it is a
//! deletion: what is answered stays the same.

use std::io;

use troth_protocol::{Key, ShardId, Timestamp};
use troth_replication::{Batch, Reach, Store, StoreError};

use super::key;
use super::store::damaged;
use crate::families::DATA;

/// Removes versions of a shard that no snapshot at or after the safe point can read. Looks at no
/// more than `versions_max` versions, beginning at `from`; returns where to go on, or `None` at the
/// end of the shard, and how many versions were removed.
///
/// # Errors
/// If the store cannot be read or written, or holds what it cannot hold.
pub fn collect(
    store: &Store,
    shard: ShardId,
    safe_point: Timestamp,
    from: Option<Key>,
    versions_max: usize,
    batch: &mut Batch<'_>,
) -> io::Result<(Option<Key>, usize)> {
    let start = from.map_or_else(|| key::shard_start(shard), |from| key::versions(shard, &from));
    let mut rows = store.iterate(DATA, &start, &key::shard_end(shard), Reach::Disk);
    rows.seek(&start);
    let (mut seen, mut removed) = (0, 0);
    let mut previous: Option<Key> = None;
    // Whether the newest version at the safe point of the current key has been passed.
    let mut covered = false;
    while let Some((row, stored)) = rows.item() {
        let (_, current, version) = key::parse_version(row).ok_or_else(|| damaged(row))?;
        if previous.as_ref() != Some(&current) {
            // Between keys only: what is removed of a key is removed at once.
            if seen >= versions_max {
                return Ok((Some(current), removed));
            }
            covered = false;
            previous = Some(current);
        }
        seen += 1;
        if version <= safe_point {
            let deletion = stored == [0];
            if covered || deletion {
                batch.delete(DATA, row);
                removed += 1;
            }
            covered = true;
        }
        rows.next();
    }
    rows.status().map_err(StoreError::from)?;
    Ok((None, removed))
}
