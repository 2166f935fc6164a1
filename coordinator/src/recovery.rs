//! What earlier leaders left behind: transactions that are prepared somewhere and decided nowhere.
//!
//! A new leader asks every shard for its prepared transactions, page by page, all shards at once.
//! What it finds without a decision it settles: nobody else can decide it any more.

use std::collections::BTreeMap;

use troth_protocol::{ShardId, TxnId};

/// Prepared transactions that one page names.
pub const PAGE: u32 = 1024;

/// Which shards have been asked.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// Shards that are still to be asked, and after which transaction.
    asking: BTreeMap<ShardId, Option<TxnId>>,
    settled: usize,
}

impl Recovery {
    /// Asks all shards from the beginning.
    pub fn new(shards: u16) -> Recovery {
        Recovery { asking: (0..shards).map(|shard| (ShardId(shard), None)).collect(), settled: 0 }
    }

    /// The shards to ask, and after which transaction.
    pub fn questions(&self) -> impl Iterator<Item = (ShardId, Option<TxnId>)> {
        self.asking.iter().map(|(shard, after)| (*shard, *after))
    }

    /// A shard has answered with a page. Returns the next question to it, if there is one.
    pub fn page(&mut self, shard: ShardId, txns: &[TxnId], more: bool) -> Option<(ShardId, Option<TxnId>)> {
        self.settled += txns.len();
        match txns.last() {
            Some(last) if more => {
                self.asking.insert(shard, Some(*last));
                Some((shard, Some(*last)))
            }
            _ => {
                self.asking.remove(&shard);
                None
            }
        }
    }

    /// Whether all shards have answered.
    pub fn is_done(&self) -> bool {
        self.asking.is_empty()
    }

    /// Prepared transactions that were found.
    pub fn found(&self) -> usize {
        self.settled
    }
}
