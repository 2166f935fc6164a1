//! Transactions: reads at one moment, writes in memory until the commit.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tracing::Instrument;
use troth_protocol::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use troth_protocol::message::coordinator::{Request, Response};
use troth_protocol::message::txn::{self, Cause};
use troth_protocol::routing::{Resend, Router, pauses};
use troth_protocol::{Epoch, Key, KeyRange, ParticipantId, Timestamp, TxnId, txn_span};

use crate::core::buffer::TooMuch;
use crate::core::{Buffer, Step, Submission};
use crate::error::Error;
use crate::reader::{Reader, after};
use crate::scan::{Scan, successor};

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
    attempt: u32,
    reader: Reader,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    buffer: Buffer,
    ended: Option<End>,
    /// The first error that a read met.
    failure: Option<Error>,
}

impl State {
    fn check_open(&self) -> Result<(), Error> {
        if self.ended.is_some() { Err(Error::Ended) } else { Ok(()) }
    }

    fn check_size(&self) -> Result<(), Error> {
        let too_much =
            |TooMuch { actual, limit, unit }| Error::Limit { what: "the transaction", actual, limit, unit };
        self.buffer.check_size().map_err(too_much)
    }
}

/// How a transaction has ended, as far as this process knows.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// It was rolled back.
    RolledBack,
    /// Its commit was begun, and its caller has not waited for what came of it.
    Sent(Handle),
    /// Its commit was answered.
    Answered(Result<Commit, Error>),
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
        let answer = self.router.coordinator(request, Resend::Idempotent, after(timeout)).await;
        match answer.map_err(Error::routed)? {
            Response::Outcome(txn::Outcome::Committed { commit_ts }) => Ok(Outcome::Committed { commit_ts }),
            Response::Outcome(txn::Outcome::Aborted { cause }) => Ok(Outcome::Aborted { cause }),
            Response::Expired => Ok(Outcome::Expired),
            _ => Err(Error::unavailable("the coordinator answered something else")),
        }
    }
}

impl Transaction {
    pub(crate) fn new(id: TxnId, epoch: Epoch, attempt: u32, reader: Reader) -> Transaction {
        Transaction { inner: Arc::new(Inner { id, epoch, attempt, reader, state: Mutex::default() }) }
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
            keys.iter().filter(|key| !state.buffer.knows(key)).cloned().collect()
        };
        unknown.sort();
        unknown.dedup();
        let versions = self.note(self.inner.reader.read(&unknown).await)?;
        let mut state = self.inner.state.lock();
        for (key, version) in unknown.into_iter().zip(versions) {
            state.buffer.note_read(key, version);
        }
        state.check_size()?;
        Ok(keys.iter().map(|key| state.buffer.value(key)).collect())
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
            state.buffer.writes_in(&range)
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
        state.buffer.note_range(seen);
        state.check_size()?;
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
        state.buffer.write(key, value);
        state.check_size()
    }

    /// Forgets everything that was written. The transaction has ended then.
    pub fn rollback(self) {
        self.inner.state.lock().ended = Some(End::RolledBack);
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
        let submission = match self.begin_commit()? {
            Begun::Ended(answer) => return answer,
            Begun::Submission(submission) => submission,
        };
        let answer = submit(submission, &inner.reader.router, inner.reader.patience.deadline())
            .instrument(txn_span!("submit", inner.id))
            .await;
        inner.state.lock().ended = Some(End::Answered(answer.clone()));
        answer
    }

    /// From now on the transaction has ended, whatever becomes of its commit.
    fn begin_commit(&self) -> Result<Begun, Error> {
        let inner = &self.inner;
        let mut state = inner.state.lock();
        state.check_open()?;
        let ended = match state.failure.take() {
            Some(failure) => Err(failure),
            None => state.check_size().map(|()| state.buffer.is_read_only()),
        };
        let answer = match ended {
            Err(error) => Err(error),
            Ok(true) => Ok(Commit::Committed { commit_ts: inner.id.start }),
            Ok(false) => {
                let parts = state.buffer.parts(inner.id.start, inner.reader.shards());
                let submission = Submission::new(inner.id, inner.epoch, parts);
                let participants = submission.participants().to_vec();
                let handle = Handle::new(inner.id, participants, inner.reader.router.clone());
                state.ended = Some(End::Sent(handle));
                return Ok(Begun::Submission(submission));
            }
        };
        state.ended = Some(End::Answered(answer.clone()));
        Ok(Begun::Ended(answer))
    }

    /// How it has ended, if it has.
    pub(crate) fn ended(&self) -> Option<End> {
        self.inner.state.lock().ended.clone()
    }

    /// The how many-th run of a closure of [`Client::transact`](crate::Client::transact) this is, from 1; 1 for a
    /// transaction that was begun by hand.
    pub fn attempt(&self) -> u32 {
        self.inner.attempt
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

/// What a commit begins with.
enum Begun {
    /// There is nothing to send.
    Ended(Result<Commit, Error>),
    Submission(Submission),
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

/// Sends a commit until it is known how it ended, or the deadline has passed.
async fn submit(
    mut submission: Submission,
    router: &Arc<Router>,
    deadline: Instant,
) -> Result<Commit, Error> {
    let mut pauses = pauses();
    loop {
        if Instant::now() >= deadline && submission.is_unsent() {
            return Err(Error::unavailable("the deadline passed before the commit was sent"));
        }
        let (request, resend) = submission.request();
        let attempt = match resend {
            Resend::OnlyUnsent => deadline.min(Instant::now() + ATTEMPT_TIMEOUT),
            Resend::Idempotent => deadline,
        };
        let step = submission.answered(router.coordinator(request, resend, attempt).await);
        match step {
            Step::Ended(txn::Outcome::Committed { commit_ts }) => return Ok(Commit::Committed { commit_ts }),
            Step::Ended(txn::Outcome::Aborted { cause }) => return Ok(Commit::Aborted { cause }),
            Step::Failed(error) => return Err(Error::routed(error)),
            Step::Send | Step::Pause if Instant::now() >= deadline && !submission.is_unsent() => {
                let participants = submission.participants().to_vec();
                return Ok(Commit::Unknown {
                    handle: Handle::new(submission.txn(), participants, router.clone()),
                });
            }
            Step::Send => {}
            Step::Pause => sleep(pauses.next().unwrap_or_default()).await,
        }
    }
}
