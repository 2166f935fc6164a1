//! Many versions of every key, in RocksDB.
//!
//! ```text
//! data      [shard u16 | key, memcomparable | !commit_ts u64] → [1 | value]   or [0]: deleted
//! ```
//!
//! All big-endian. Since the timestamp is inverted, the newest version of a key comes first, and a
//! read at a moment is a seek to the first version that is not newer. A version never changes; it
//! is only forgotten, by [`gc`], once no permitted snapshot can read it.

pub mod gc;
pub mod key;
pub mod store;

pub use store::{Mvcc, Page};

#[cfg(test)]
mod tests;
