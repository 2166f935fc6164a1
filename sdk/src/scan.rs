//! A range, in order, merged over the shards that may hold a part of it.

use std::collections::VecDeque;

use futures_util::future::try_join_all;
use troth_protocol::message::shard::Row;
use troth_protocol::{Key, KeyRange, ShardId};

use crate::error::Error;
use crate::reader::Reader;

/// Rows that one page asks for, if the application wants more in all.
const PAGE_ROWS: usize = 2_000;

/// A scan under way: for each shard, what has arrived and what is left.
pub(crate) struct Scan {
    reader: Reader,
    parts: Vec<Part>,
    page_rows: u32,
}

struct Part {
    shard: ShardId,
    rows: VecDeque<Row>,
    /// What has not been asked for yet.
    rest: Option<KeyRange>,
}

/// The shards that may hold keys of a range: one if it lies inside a hash tag, else all.
pub(crate) fn shards_of(range: &KeyRange, shards: u16) -> Vec<ShardId> {
    match range.shard(shards) {
        Some(shard) => vec![shard],
        None => (0..shards).map(ShardId).collect(),
    }
}

/// The first key after a key.
pub(crate) fn successor(key: &Key) -> Key {
    Key([key.as_bytes(), &[0]].concat().into())
}

impl Scan {
    /// A scan of which the application wants at most `limit` rows.
    pub(crate) fn new(reader: Reader, range: KeyRange, limit: usize) -> Scan {
        let shards = if range.is_empty() { Vec::new() } else { shards_of(&range, reader.shards()) };
        let part = |shard| Part { shard, rows: VecDeque::new(), rest: Some(range.clone()) };
        let parts = shards.into_iter().map(part).collect();
        Scan { reader, parts, page_rows: limit.clamp(1, PAGE_ROWS) as u32 }
    }

    /// The next row; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Row>, Error> {
        // Before the smallest can be known, every shard must show its next row.
        let hungry = self.parts.iter_mut().filter(|part| part.rows.is_empty() && part.rest.is_some());
        let (reader, page_rows) = (&self.reader, self.page_rows);
        try_join_all(hungry.map(async |part| part.fetch(reader, page_rows).await)).await?;
        let heads = self.parts.iter_mut().filter(|part| !part.rows.is_empty());
        let smallest = heads.min_by(|a, b| a.rows[0].key.cmp(&b.rows[0].key));
        Ok(smallest.and_then(|part| part.rows.pop_front()))
    }
}

impl Part {
    async fn fetch(&mut self, reader: &Reader, page_rows: u32) -> Result<(), Error> {
        let Some(range) = self.rest.clone() else {
            return Ok(());
        };
        let (rows, more) = reader.page(self.shard, range.clone(), page_rows).await?;
        self.rest = match rows.last() {
            Some(last) if more => Some(KeyRange::new(successor(&last.key), range.end)),
            _ => None,
        };
        self.rows = rows.into();
        Ok(())
    }
}
