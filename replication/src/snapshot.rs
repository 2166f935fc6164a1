//! Snapshots: the state of a machine on its way to a member that is too far behind for the log.
//!
//! Nothing is copied to make one. The sender reads the machine's spans from a frozen view of the
//! database, a piece at a time, only as fast as the pieces go out. The receiver stages the pieces,
//! and puts them in place when they are complete: first a durable note that it began, then all of
//! it, then the mark. A crash in between is finished at the next start.

use std::io;

use bytes::Bytes;
use rocksdb::ReadOptions;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use troth_protocol::message::raft as wire;
use troth_protocol::wire::{decode, encode};

use crate::log::{Change, LogWriter, meta_key, numbered_key, tag};
use crate::machine::{Batch, Span};
use crate::rocks::{Family, Store, families, group_range};

/// A piece ends with the pair that brings it to this many bytes.
const PIECE_BYTES: usize = 512 << 10;

/// Pieces that are read ahead.
const PIECES_AHEAD: usize = 2;

/// What a machine's state is marked with: the last entry in it, and the membership.
#[derive(Clone, PartialEq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub(crate) struct Mark {
    pub applied: Option<wire::LogId>,
    pub membership: wire::StoredMembership,
}

/// A key and its value, and the column family, by its place in the machine's list of spans.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
struct Pair {
    span: u16,
    key: Bytes,
    value: Bytes,
}

/// The data of a snapshot, as the Raft library passes it around.
pub(crate) enum Transfer {
    /// Only its position matters: the log may be purged up to it.
    Position,
    /// To be sent.
    Outgoing(mpsc::Receiver<io::Result<Bytes>>),
    /// Arrived whole, in staging.
    Staged,
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

/// Freezes the state of a group, and begins to read it out.
pub(crate) async fn open(store: &Store, group: u32, spans: Vec<Span>) -> io::Result<(Mark, Transfer)> {
    let (mark_sender, mark) = oneshot::channel();
    let (pieces, receiver) = mpsc::channel(PIECES_AHEAD);
    let store = store.clone();
    // Ends when all is read, or when the receiver is dropped.
    spawn_blocking(move || {
        let database = store.database();
        let frozen = database.snapshot();
        let family = |family: Family| database.cf_handle(family.0).expect("opened with all families");
        let read_mark = || match frozen.get_cf(family(families::META), meta_key(group, tag::APPLIED)) {
            Ok(Some(record)) => decode(&record).map_err(|error| malformed(group, error)),
            Ok(None) => Ok(Mark::default()),
            Err(error) => Err(io::Error::other(error)),
        };
        if mark_sender.send(read_mark()).is_err() {
            return;
        }
        let mut piece: Vec<Pair> = Vec::new();
        let mut bytes = 0;
        for (number, span) in spans.iter().enumerate() {
            let mut options = ReadOptions::default();
            options.set_iterate_lower_bound(&span.start[..]);
            options.set_iterate_upper_bound(&span.end[..]);
            let mut rows = frozen.raw_iterator_cf_opt(family(span.family), options);
            rows.seek(&span.start);
            while let Some((key, value)) = rows.item() {
                bytes += key.len() + value.len();
                piece.push(Pair {
                    span: number as u16,
                    key: Bytes::copy_from_slice(key),
                    value: Bytes::copy_from_slice(value),
                });
                if bytes >= PIECE_BYTES {
                    bytes = 0;
                    if pieces.blocking_send(Ok(encode(&std::mem::take(&mut piece)).into())).is_err() {
                        return;
                    }
                }
                rows.next();
            }
            if let Err(error) = rows.status() {
                let _ = pieces.blocking_send(Err(io::Error::other(error)));
                return;
            }
        }
        let _ = pieces.blocking_send(Ok(encode(&piece).into()));
    });
    let mark = mark.await.map_err(|_| io::Error::other("the snapshot reader has ended"))??;
    Ok((mark, Transfer::Outgoing(receiver)))
}

/// Keeps a piece until the snapshot is complete. The first one replaces whatever was staged before.
pub(crate) async fn stage(writer: &LogWriter, group: u32, sequence: u64, piece: Bytes) -> io::Result<()> {
    let mut changes = Vec::new();
    if sequence == 0 {
        let (start, end) = group_range(group);
        changes.push(Change::delete_range(families::STAGING, &start, &end));
    }
    changes.push(Change::put(families::STAGING, &numbered_key(group, sequence), piece));
    writer.write_durably(changes).await
}

/// Puts the staged snapshot in place of the state of a group.
pub(crate) async fn install(
    store: &Store,
    writer: &LogWriter,
    group: u32,
    spans: &[Span],
    mark: &Mark,
) -> io::Result<()> {
    let note = Change::put(families::META, &meta_key(group, tag::INSTALLING), encode(mark));
    writer.write_durably(vec![note]).await?;
    let (store, spans) = (store.clone(), spans.to_vec());
    let finish = spawn_blocking(move || finish_install(&store, group, &spans));
    finish.await.map_err(io::Error::other)??;
    writer.write_durably(Vec::new()).await
}

/// Finishes an installation that a crash interrupted. Does nothing if none was.
pub(crate) fn finish_install(store: &Store, group: u32, spans: &[Span]) -> io::Result<()> {
    let note_key = meta_key(group, tag::INSTALLING);
    let Some(note) = store.get(families::META, &note_key)?.map(|note| note.to_vec()) else {
        return Ok(());
    };
    let mark: Mark = decode(&note).map_err(|error| malformed(group, error))?;

    let mut cleared = Batch::new(store);
    for span in spans {
        cleared.delete_range(span.family, &span.start, &span.end);
    }
    cleared.commit()?;
    let (start, end) = group_range(group);
    let mut problem = None;
    store.scan(families::STAGING, &start, &end, |_, piece| {
        let result = decode::<Vec<Pair>>(piece).map_err(|error| malformed(group, error)).and_then(|pairs| {
            let mut batch = Batch::new(store);
            for pair in pairs {
                let span = spans.get(usize::from(pair.span));
                let span = span.ok_or_else(|| malformed(group, "a snapshot names an unknown span"))?;
                batch.put(span.family, &pair.key, &pair.value);
            }
            batch.commit().map(drop).map_err(io::Error::from)
        });
        result.map_err(|error| problem = Some(error)).is_ok()
    })?;
    if let Some(problem) = problem {
        return Err(problem);
    }
    let mut last = Batch::new(store);
    put_mark(&mut last, group, &mark);
    last.delete(families::META, &note_key);
    last.delete_range(families::STAGING, &start, &end);
    last.commit()?;
    Ok(())
}
