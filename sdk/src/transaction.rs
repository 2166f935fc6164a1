//! Transactions: reads at one moment, writes in memory until the commit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tracing::Instrument;
use troth_protocol::limits::{KEY_BYTES_MAX, TXN_BYTES_MAX, TXN_KEYS_MAX, VALUE_BYTES_MAX};
use troth_protocol::message::coordinator::{self, Request, Response};
use troth_protocol::message::shard::Version;
use troth_protocol::message::txn::{self, Cause, Part, RangeCheck, ReadCheck, Work, Write};
use troth_protocol::routing::{Resend, RouteError, Router, pauses};
use troth_protocol::{Epoch, Key, KeyRange, ParticipantId, Reject, ShardId, Timestamp, TxnId, txn_span};

use crate::error::Error;
use crate::reader::Reader;
use crate::scan::{Scan, shards_of, successor};

/// How long one attempt to commit may take before the question becomes how it ended.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// A transaction. All its reads are at one moment, and see its own writes. Writes stay in memory
/// until the commit, and then happen together, on however many shards, or not at all.
///
/// Cheap to clone: clones are the same transaction, so reads may run at the same time. Dropping it
/// without commit leaves nothing behind.
#[derive(Clone)]
pub struct Transaction {
    inner: Arc<Inner>,
}

struct Inner {
    id: TxnId,
    epoch: Epoch,
    reader: Reader,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Versions that were read.
    reads: BTreeMap<Key, Version>,
    /// Ranges that were read.
    ranges: Vec<KeyRange>,
    writes: BTreeMap<Key, Option<Bytes>>,
    bytes: usize,
    ended: bool,
    /// The first error that a read met.
    failure: Option<Error>,
}

impl State {
    fn check_open(&self) -> Result<(), Error> {
        if self.ended { Err(Error::Ended) } else { Ok(()) }
    }
}

/// How a commit ended.
#[derive(Clone, Debug)]
#[must_use = "a commit may have been aborted, or nobody may know yet"]
pub enum Commit {
    /// All of it happened, at this moment in the serial order.
    Committed {
        /// The place in the serial order.
        commit_ts: Timestamp,
    },
    /// None of it happened, nor will it.
    Aborted {
        /// Why.
        cause: Cause,
    },
    /// Nobody could say before the deadline. The handle finds out.
    Unknown {
        /// Asks again.
        handle: Handle,
    },
}

/// How a transaction ended, as asked later.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All of it happened, at this moment in the serial order.
    Committed {
        /// The place in the serial order.
        commit_ts: Timestamp,
    },
    /// None of it happened, nor will it.
    Aborted {
        /// Why.
        cause: Cause,
    },
    /// It began longer ago than outcomes are kept (an hour by default).
    Expired,
}

/// Asks how a transaction ended whose commit was not answered.
#[derive(Clone)]
pub struct Handle {
    txn: TxnId,
    participants: Vec<ParticipantId>,
    router: Arc<Router>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handle({})", self.txn)
    }
}

impl Handle {
    pub(crate) fn new(txn: TxnId, participants: Vec<ParticipantId>, router: Arc<Router>) -> Handle {
        Handle { txn, participants, router }
    }

    /// The transaction.
    pub fn txn(&self) -> TxnId {
        self.txn
    }

    /// Finds out how it ended. The answer is the same for ever; where the transaction was not
    /// decided yet, asking makes sure that it never commits.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if no coordinator answers within `timeout`: ask again.
    pub async fn resolve(&self, timeout: Duration) -> Result<Outcome, Error> {
        let request = Request::Outcome { txn: self.txn, participants: self.participants.clone() };
        let deadline = Instant::now() + timeout;
        match self.router.coordinator(request, Resend::Idempotent, deadline).await? {
            Response::Outcome(txn::Outcome::Committed { commit_ts }) => Ok(Outcome::Committed { commit_ts }),
            Response::Outcome(txn::Outcome::Aborted { cause }) => Ok(Outcome::Aborted { cause }),
            Response::Expired => Ok(Outcome::Expired),
            _ => Err(Error::unavailable("the coordinator answered something else")),
        }
    }
}

impl Transaction {
    pub(crate) fn new(id: TxnId, epoch: Epoch, reader: Reader) -> Transaction {
        Transaction { inner: Arc::new(Inner { id, epoch, reader, state: Mutex::default() }) }
    }

    /// Names this transaction, in errors of others too.
    pub fn id(&self) -> TxnId {
        self.inner.id
    }

    /// The value of a key; `None` if it has none. Sees this transaction's own writes.
    ///
    /// # Errors
    /// [`Error::Blocked`] if a transaction in doubt is in the way until the deadline;
    /// [`Error::Unavailable`]; [`Error::TooOld`]; [`Error::Limit`] for a key that cannot be.
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, Error> {
        Ok(self.get_many([key]).await?.pop().flatten())
    }

    /// The values of keys, in their order. All shards are asked at the same time.
    ///
    /// # Errors
    /// As [`Transaction::get`].
    pub async fn get_many<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Vec<Option<Bytes>>, Error> {
        let keys =
            keys.into_iter().map(|key| checked_key(key.as_ref())).collect::<Result<Vec<Key>, Error>>()?;
        let mut unknown: Vec<Key> = {
            let state = self.inner.state.lock();
            state.check_open()?;
            let known = |key: &Key| state.writes.contains_key(key) || state.reads.contains_key(key);
            keys.iter().filter(|key| !known(key)).cloned().collect()
        };
        unknown.sort();
        unknown.dedup();
        let versions = self.note(self.inner.reader.read(&unknown).await)?;
        let mut state = self.inner.state.lock();
        for (key, version) in unknown.into_iter().zip(versions) {
            state.bytes += key.as_bytes().len();
            state.reads.entry(key).or_insert(version);
        }
        check_size(&state)?;
        let value = |key: &Key| match state.writes.get(key) {
            Some(written) => written.clone(),
            None => state.reads.get(key).and_then(|version| version.value.clone()),
        };
        Ok(keys.iter().map(value).collect())
    }

    /// The keys of a range that have a value, in order, with their values: at most `limit` of them.
    /// Sees this transaction's own writes. For the next page, begin just after the last key.
    ///
    /// The commit fails if anybody has written in the part of the range that was shown, also a key
    /// that was not there. A range inside a hash tag, like the prefix `{user1}`, concerns one shard
    /// only.
    ///
    /// # Errors
    /// As [`Transaction::get`].
    pub async fn scan(&self, range: KeyRange, limit: usize) -> Result<Vec<(Key, Bytes)>, Error> {
        let mut own = {
            let state = self.inner.state.lock();
            state.check_open()?;
            check_range(&range)?;
            if limit == 0 {
                return Ok(Vec::new());
            }
            let writes = state.writes.iter().filter(|(key, _)| range.contains(key));
            writes.map(|(key, value)| (key.clone(), value.clone())).collect::<BTreeMap<_, _>>()
        };
        let mut rows: Vec<(Key, Bytes)> = Vec::new();
        let mut scan = Scan::new(self.inner.reader.clone(), range.clone(), limit);
        let mut stored = self.note(scan.next().await)?;
        let end = loop {
            if rows.len() == limit {
                break rows.last().map(|(key, _)| successor(key));
            }
            let own_first = match (own.first_key_value(), &stored) {
                (None, None) => break range.end.clone(),
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (Some((key, _)), Some(row)) => *key <= row.key,
            };
            if own_first {
                let (key, value) = own.pop_first().expect("looked at just now");
                if stored.as_ref().is_some_and(|row| row.key == key) {
                    stored = self.note(scan.next().await)?;
                }
                rows.extend(value.map(|value| (key, value)));
            } else if let Some(row) = stored.take() {
                rows.push((row.key, row.value));
                stored = self.note(scan.next().await)?;
            }
        };
        let seen = KeyRange::new(range.start, end);
        let mut state = self.inner.state.lock();
        if !seen.is_empty() && !state.ranges.contains(&seen) {
            state.bytes += seen.start.as_bytes().len() + KEY_BYTES_MAX;
            state.ranges.push(seen);
        }
        check_size(&state)?;
        Ok(rows)
    }

    /// Writes a key. Nothing is sent before the commit.
    ///
    /// # Errors
    /// [`Error::Limit`] for a key longer than 4 KiB, a value longer than 1 MiB, or a transaction of
    /// more than 32 MiB or 100 000 keys; [`Error::Ended`].
    pub fn put(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Result<(), Error> {
        let value = value.as_ref();
        if value.len() > VALUE_BYTES_MAX {
            return Err(Error::Limit {
                what: "a value",
                actual: value.len(),
                limit: VALUE_BYTES_MAX,
                unit: "bytes",
            });
        }
        self.write(key.as_ref(), Some(Bytes::copy_from_slice(value)))
    }

    /// Deletes a key. Nothing is sent before the commit.
    ///
    /// # Errors
    /// As [`Transaction::put`].
    pub fn delete(&self, key: impl AsRef<[u8]>) -> Result<(), Error> {
        self.write(key.as_ref(), None)
    }

    fn write(&self, key: &[u8], value: Option<Bytes>) -> Result<(), Error> {
        let key = checked_key(key)?;
        let mut state = self.inner.state.lock();
        state.check_open()?;
        let size = |value: &Option<Bytes>| value.as_ref().map_or(0, Bytes::len);
        let added = key.as_bytes().len() + size(&value);
        let removed = state.writes.get(&key).map_or(0, |old| key.as_bytes().len() + size(old));
        state.bytes = state.bytes + added - removed;
        state.writes.insert(key, value);
        check_size(&state)
    }

    /// Forgets everything that was written. The transaction has ended then.
    pub fn rollback(self) {
        self.inner.state.lock().ended = true;
    }

    /// Commits. A transaction that wrote nothing commits at the moment of its reads, without asking
    /// anybody.
    ///
    /// Dropping the future does not stop a commit that was sent.
    ///
    /// # Errors
    /// If it certainly did not happen, and not because of another transaction: [`Error::Unavailable`],
    /// [`Error::Limit`], [`Error::Ended`]; and the error of an earlier read that failed.
    pub async fn commit(self) -> Result<Commit, Error> {
        let inner = &self.inner;
        let parts = {
            let mut state = inner.state.lock();
            state.check_open()?;
            state.ended = true;
            if let Some(failure) = state.failure.take() {
                return Err(failure);
            }
            if state.writes.is_empty() {
                return Ok(Commit::Committed { commit_ts: inner.id.start });
            }
            check_size(&state)?;
            parts(&state, inner.id.start, inner.reader.shards())
        };
        submit(inner.id, inner.epoch, parts, &inner.reader.router, inner.reader.patience.deadline())
            .instrument(txn_span!("submit", inner.id))
            .await
    }

    /// The first error that a read met, if one did.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.inner.state.lock().failure.clone()
    }

    /// Remembers a failed read: a transaction that missed something must not commit.
    fn note<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(error) = &result {
            self.inner.state.lock().failure.get_or_insert_with(|| error.clone());
        }
        result
    }
}

pub(crate) fn checked_key(key: &[u8]) -> Result<Key, Error> {
    if key.len() > KEY_BYTES_MAX {
        return Err(Error::Limit { what: "a key", actual: key.len(), limit: KEY_BYTES_MAX, unit: "bytes" });
    }
    Ok(Key::copy_from(key))
}

/// A range may begin or end just after the longest key.
fn check_range(range: &KeyRange) -> Result<(), Error> {
    let limit = KEY_BYTES_MAX + 1;
    let ends = [Some(&range.start), range.end.as_ref()].into_iter().flatten();
    match ends.map(|end| end.as_bytes().len()).find(|actual| *actual > limit) {
        Some(actual) => Err(Error::Limit { what: "the end of a range", actual, limit, unit: "bytes" }),
        None => Ok(()),
    }
}

fn check_size(state: &State) -> Result<(), Error> {
    let keys = state.reads.len() + state.writes.len() + state.ranges.len();
    let limit = |actual, limit, unit| Err(Error::Limit { what: "the transaction", actual, limit, unit });
    if keys > TXN_KEYS_MAX {
        return limit(keys, TXN_KEYS_MAX, "keys");
    }
    if state.bytes > TXN_BYTES_MAX {
        return limit(state.bytes, TXN_BYTES_MAX, "bytes");
    }
    Ok(())
}

/// What each shard has to check and write.
fn parts(state: &State, snapshot: Timestamp, shards: u16) -> Vec<Part> {
    let mut work: BTreeMap<ShardId, Work> = BTreeMap::new();
    for (key, version) in &state.reads {
        let check = ReadCheck { key: key.clone(), version: version.version };
        work.entry(key.shard(shards)).or_default().reads.push(check);
    }
    for range in &state.ranges {
        for shard in shards_of(range, shards) {
            let check = RangeCheck { range: range.clone(), snapshot };
            work.entry(shard).or_default().ranges.push(check);
        }
    }
    for (key, value) in &state.writes {
        let write = Write { key: key.clone(), value: value.clone() };
        work.entry(key.shard(shards)).or_default().writes.push(write);
    }
    work.into_iter().map(|(shard, work)| Part { participant: ParticipantId::Shard(shard), work }).collect()
}

/// Sends a commit until it is known how it ended, or the deadline has passed.
///
/// The first submission names the leader it is meant for. As long as leaders certainly refused it,
/// it goes to the next one, as a first submission. From the moment when one may have begun it, only
/// the question remains how it ended, and the words say so.
async fn submit(
    txn: TxnId,
    mut epoch: Epoch,
    parts: Vec<Part>,
    router: &Arc<Router>,
    deadline: Instant,
) -> Result<Commit, Error> {
    let participants: Vec<ParticipantId> = parts.iter().map(|part| part.participant.clone()).collect();
    let first = loop {
        let commit = coordinator::Commit { txn, epoch, resubmission: false, parts: parts.clone() };
        let attempt = deadline.min(Instant::now() + ATTEMPT_TIMEOUT);
        match router.coordinator(Request::Commit(commit), Resend::OnlyUnsent, attempt).await {
            Err(RouteError::Rejected(Reject::StaleEpoch { current })) if current != epoch => epoch = current,
            Err(error) if error.is_ambiguous() => break None,
            other => break Some(other),
        }
    };
    drop(parts);
    let mut answer = first;
    let mut pauses = pauses();
    loop {
        match answer {
            Some(Ok(Response::Outcome(txn::Outcome::Committed { commit_ts }))) => {
                return Ok(Commit::Committed { commit_ts });
            }
            Some(Ok(Response::Outcome(txn::Outcome::Aborted { cause }))) => {
                return Ok(Commit::Aborted { cause });
            }
            Some(Err(error)) if !error.is_ambiguous() => return Err(error.into()),
            // Expired cannot be said of a transaction that is younger than its deadline.
            Some(_) | None => {}
        }
        if Instant::now() >= deadline {
            return Ok(Commit::Unknown { handle: Handle::new(txn, participants, router.clone()) });
        }
        answer = ask_again(txn, epoch, &participants, router, deadline).await;
        if answer.is_none() {
            sleep(pauses.next().unwrap_or_default()).await;
        }
    }
}

/// Asks how a commit ended that may have begun. `None`: nobody can say yet.
async fn ask_again(
    txn: TxnId,
    epoch: Epoch,
    participants: &[ParticipantId],
    router: &Router,
    deadline: Instant,
) -> Option<Result<Response, RouteError>> {
    let part = |participant: &ParticipantId| Part { participant: participant.clone(), work: Work::default() };
    let parts = participants.iter().map(part).collect();
    let commit = coordinator::Commit { txn, epoch, resubmission: true, parts };
    // Whatever goes wrong here says nothing about the commit itself.
    router.coordinator(Request::Commit(commit), Resend::Idempotent, deadline).await.ok().map(Ok)
}
