//! Reading and writing versions.

use std::io;

use bytes::Bytes;
use troth_protocol::message::shard::{Row, Version};
use troth_protocol::{Key, KeyRange, ShardId, Timestamp, Value};
use troth_replication::{Batch, Reach, Store, StoreError};

use super::key;
use crate::families::DATA;

/// The versions of one shard.
#[derive(Clone)]
pub struct Mvcc {
    store: Store,
    shard: ShardId,
}

/// A part of a scan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// In order of keys.
    pub rows: Vec<Row>,
    /// There may be more after the last row.
    pub more: bool,
}

impl Mvcc {
    /// The versions of a shard in a store.
    pub fn new(store: &Store, shard: ShardId) -> Mvcc {
        Mvcc { store: store.clone(), shard }
    }

    /// The newest version of a key at a moment.
    ///
    /// # Errors
    /// If the store cannot be read, or holds what it cannot hold; [`io::ErrorKind::WouldBlock`] if
    /// it is out of reach.
    pub fn read(&self, wanted: &Key, at: Timestamp, reach: Reach) -> io::Result<Version> {
        let (start, end) = (key::version(self.shard, wanted, at), self.after_versions(wanted));
        let mut rows = self.store.iterate(DATA, &start, &end, reach);
        rows.seek(&start);
        rows.status().map_err(StoreError::from)?;
        Ok(match rows.item() {
            Some((row, stored)) => {
                Version { version: timestamp(row)?, value: value(stored)?.map(Bytes::copy_from_slice) }
            }
            None => Version { version: Timestamp::ZERO, value: None },
        })
    }

    /// When a key was last written or deleted; [`Timestamp::ZERO`]: never.
    ///
    /// # Errors
    /// If the store cannot be read, or holds what it cannot hold.
    pub fn newest(&self, wanted: &Key, reach: Reach) -> io::Result<Timestamp> {
        let (start, end) = (key::versions(self.shard, wanted), self.after_versions(wanted));
        let mut rows = self.store.iterate(DATA, &start, &end, reach);
        rows.seek(&start);
        rows.status().map_err(StoreError::from)?;
        rows.key().map_or(Ok(Timestamp::ZERO), timestamp)
    }

    /// A key of a range with a version after a moment, if there is one.
    ///
    /// # Errors
    /// If the store cannot be read, or holds what it cannot hold.
    pub fn newer_in_range(
        &self,
        range: &KeyRange,
        after: Timestamp,
        reach: Reach,
    ) -> io::Result<Option<(Key, Timestamp)>> {
        if range.is_empty() {
            return Ok(None);
        }
        let (start, end) = key::range(self.shard, range);
        let mut rows = self.store.iterate(DATA, &start, &end, reach);
        rows.seek(&start);
        while let Some(row) = rows.key() {
            if timestamp(row)? > after {
                let (_, key, version) = key::parse_version(row).ok_or_else(|| damaged(row))?;
                return Ok(Some((key, version)));
            }
            rows.next();
        }
        rows.status().map_err(StoreError::from)?;
        Ok(None)
    }

    /// The keys of a range that have a value at a moment, in order, up to `rows_max` of them and
    /// little more than `bytes_max` bytes.
    ///
    /// # Errors
    /// If the store cannot be read, or holds what it cannot hold.
    pub fn scan(
        &self,
        range: &KeyRange,
        at: Timestamp,
        rows_max: usize,
        bytes_max: usize,
    ) -> io::Result<Page> {
        let mut page = Page { rows: Vec::new(), more: false };
        if range.is_empty() {
            return Ok(page);
        }
        let (start, end) = key::range(self.shard, range);
        let mut bytes = 0;
        let mut rows = self.store.iterate(DATA, &start, &end, Reach::Disk);
        rows.seek(&start);
        while let Some((row, stored)) = rows.item() {
            let (_, key, version) = key::parse_version(row).ok_or_else(|| damaged(row))?;
            if version > at {
                // Skips the versions that are too new, however many there are.
                rows.seek(key::version(self.shard, &key, at));
                continue;
            }
            if let Some(value) = value(stored)? {
                if page.rows.len() == rows_max || bytes >= bytes_max {
                    page.more = true;
                    break;
                }
                bytes += key.as_bytes().len() + value.len();
                page.rows.push(Row { key: key.clone(), version, value: Bytes::copy_from_slice(value) });
            }
            rows.seek(self.after_versions(&key));
        }
        rows.status().map_err(StoreError::from)?;
        Ok(page)
    }

    /// Adds a version to a batch.
    pub fn put(&self, batch: &mut Batch<'_>, wanted: &Key, version: Timestamp, value: Option<&Value>) {
        let stored = match value {
            Some(value) => {
                let mut stored = Vec::with_capacity(1 + value.len());
                stored.push(1);
                stored.extend_from_slice(value);
                stored
            }
            None => vec![0],
        };
        batch.put(DATA, &key::version(self.shard, wanted, version), &stored);
    }

    /// The first key on disk after all versions of a key.
    fn after_versions(&self, wanted: &Key) -> Vec<u8> {
        let mut bytes = key::versions(self.shard, wanted);
        // The terminator `00 01` becomes `00 02`, which no key contains.
        *bytes.last_mut().expect("it has a terminator") += 1;
        bytes
    }
}

fn timestamp(row: &[u8]) -> io::Result<Timestamp> {
    key::timestamp(row).ok_or_else(|| damaged(row))
}

fn value(stored: &[u8]) -> io::Result<Option<&[u8]>> {
    match stored.split_first() {
        Some((1, value)) => Ok(Some(value)),
        Some((0, [])) => Ok(None),
        _ => Err(damaged(stored)),
    }
}

pub(super) fn damaged(bytes: &[u8]) -> io::Error {
    let shown = &bytes[..bytes.len().min(64)];
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the store holds a malformed version: {}", shown.escape_ascii()),
    )
}
