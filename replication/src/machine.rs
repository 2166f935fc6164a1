//! What a group replicates.

use std::io;

use rocksdb::WriteBatch;

use crate::rocks::{Family, Store, StoreError};

/// A replicated state machine. It lives in the process's [`Store`], and may keep in memory whatever
/// it can rebuild from there.
///
/// `apply` is deterministic: given the same state and commands, it does the same on every replica,
/// today and after a restart. It reads no clock and draws no random numbers.
pub trait Machine: Send + Sync + 'static {
    /// The answer to a command, for whoever proposed it.
    type Output: Send + Sync + 'static;

    /// Applies committed commands, in order, and writes their effect with `batch`, which already
    /// holds the mark of the last of them. Returns one output for each command, and the proof that
    /// the batch was written.
    ///
    /// Effects must not be visible to readers before the batch is written.
    ///
    /// # Errors
    /// Only if the store fails or holds what it cannot hold. The group then stops.
    fn apply(
        &mut self,
        commands: &[(u64, &[u8])],
        batch: Batch<'_>,
    ) -> io::Result<(Vec<Self::Output>, Committed)>;

    /// The parts of the store that are this machine's state: what a snapshot contains.
    fn spans(&self) -> Vec<Span>;

    /// The state in the store is about to be replaced by a snapshot: who looks at it from now on sees a mixture.
    fn unload(&mut self);

    /// Rebuilds from the store what is kept in memory, after the state was replaced by a snapshot.
    ///
    /// # Errors
    /// If the store fails or holds what it cannot hold. The group then stops.
    fn reload(&mut self) -> io::Result<()>;
}

/// The keys from `start` up to but not including `end` of a column family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Span {
    /// The column family.
    pub family: Family,
    /// The first key.
    pub start: Vec<u8>,
    /// The first key after the last.
    pub end: Vec<u8>,
}

/// Writes that happen together, or not at all.
pub struct Batch<'a> {
    store: &'a Store,
    inner: WriteBatch,
}

/// The proof that a [`Batch`] was written: nobody else can make one.
pub struct Committed(());

impl<'a> Batch<'a> {
    pub(crate) fn new(store: &'a Store) -> Batch<'a> {
        Batch { store, inner: WriteBatch::default() }
    }

    /// Sets a key.
    pub fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        self.store.put(&mut self.inner, family, key, value);
    }

    /// Deletes a key.
    pub fn delete(&mut self, family: Family, key: &[u8]) {
        self.store.delete(&mut self.inner, family, key);
    }

    /// Deletes the keys from `start` up to but not including `end`.
    pub fn delete_range(&mut self, family: Family, start: &[u8], end: &[u8]) {
        self.store.delete_range(&mut self.inner, family, start, end);
    }

    /// Bytes in the batch so far.
    pub fn bytes(&self) -> usize {
        self.inner.size_in_bytes()
    }

    /// Writes the batch.
    ///
    /// # Errors
    /// If the database cannot be written. Nothing of the batch is visible then.
    pub fn commit(self) -> Result<Committed, StoreError> {
        self.store.write(self.inner)?;
        Ok(Committed(()))
    }
}
