//! Which start of a server this is, and which were before.
//!
//! A data folder may be copied: a machine is restored from an image, or a clone of it is started beside it. The copy
//! bears the same name, and has forgotten what the original promised since. So each start of a server draws a random
//! number, its incarnation, and writes it into the folder before the server says anything to anybody; the folder
//! keeps those of its starts. Others remember the last one that they heard of, and how many batches it had synced.
//! Whoever comes after that one can be told from a copy:
//!
//! ```text
//!   starts in this folder   others remember   it is
//!   a b c [d]               c                 what comes after c
//!   a b [e]                 c                 a copy that was made before c
//!   a b c [f]               c, 4711 batches   a copy of a running c, if it has synced fewer than that
//! ```

use std::io;

use troth_protocol::Incarnation;
use troth_protocol::wire::{decode, encode};

use crate::log::LogWriter;
use crate::rocks::{Store, families};

/// Where a folder keeps them: in [`families::META`], after the keys of all groups.
const KEY: &[u8] = b"\xff\xff\xff\xffincarnations";

/// How many starts a folder remembers. Whoever was away for longer takes it for a copy.
const STARTS_MAX: usize = 10_000;

/// The starts of a server from one data folder.
#[derive(Clone, Debug)]
pub struct Incarnations {
    /// The last one is this.
    starts: Vec<Incarnation>,
}

impl Incarnations {
    /// Begins another one. It is durable then.
    ///
    /// # Errors
    /// If the store cannot be read or written, or what is stored is damaged.
    pub async fn begin(store: &Store, writer: &LogWriter) -> io::Result<Incarnations> {
        let damaged = |error| {
            let reason = format!("the stored incarnations of the server are damaged: {error}");
            io::Error::new(io::ErrorKind::InvalidData, reason)
        };
        let stored = store.get(families::META, KEY)?.map(|record| decode::<Vec<u64>>(&record));
        let mut starts = stored.transpose().map_err(damaged)?.unwrap_or_default();
        starts.drain(..starts.len().saturating_sub(STARTS_MAX - 1));
        starts.push(rand::random());
        writer.put_durably(families::META, KEY, encode(&starts)).await?;
        Ok(Incarnations { starts: starts.into_iter().map(Incarnation).collect() })
    }

    /// This start.
    pub fn current(&self) -> Incarnation {
        *self.starts.last().expect("one has begun")
    }

    /// The start before this one, if there was one.
    pub fn previous(&self) -> Option<Incarnation> {
        self.starts.iter().rev().nth(1).copied()
    }

    /// Whether one of the starts before this one was that.
    pub fn follows(&self, incarnation: Incarnation) -> bool {
        self.starts.split_last().is_some_and(|(_, before)| before.contains(&incarnation))
    }
}

#[cfg(test)]
mod tests {
    use troth_protocol::process::Memory;

    use super::*;

    #[tokio::test]
    async fn a_folder_remembers_its_starts_and_not_those_of_a_copy() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut before: Vec<Incarnation> = Vec::new();
        for _ in 0..3 {
            let store = Store::open(folder.path(), "a test", &[], Memory::default()).expect("it opens");
            let writer = LogWriter::start(&store);
            let synced = store.progress();
            let starts = Incarnations::begin(&store, &writer).await.expect("written");
            assert!(store.progress() > synced, "it is durable");
            assert!(before.iter().all(|start| starts.follows(*start)));
            assert!(!starts.follows(starts.current()) && !starts.follows(Incarnation(7)));
            before.push(starts.current());
            drop(writer);
            store.closed().await;
        }
        let store = Store::open(folder.path(), "a test", &[], Memory::default()).expect("it opens");
        let writer = LogWriter::start(&store);
        let many: Vec<u64> = (0..STARTS_MAX as u64).collect();
        writer.put_durably(families::META, KEY, encode(&many)).await.expect("written");
        let starts = Incarnations::begin(&store, &writer).await.expect("written");
        assert!(
            starts.follows(Incarnation(1)) && !starts.follows(Incarnation(0)),
            "the oldest one is forgotten"
        );
    }
}
