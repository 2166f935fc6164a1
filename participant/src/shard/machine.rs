//! The state of a shard in RocksDB.
//!
//! The state and the leader's memory share one lock, which is held while commands are applied and
//! written: so a reader sees locks and versions that belong together.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, oneshot};
use troth_protocol::clock::monotonic;
use troth_protocol::message::shard::Decision;
use troth_protocol::message::txn::Outcome;
use troth_protocol::mutation::{self, Bug};
use troth_protocol::timeline::Timeline;
use troth_protocol::wire::{decode, encode};
use troth_protocol::{Key, KeyRange, ShardId, Timestamp, TxnId};
use troth_replication::{Batch, Committed, Machine, Reach, Span, Store, StoreError};

use super::command::{Command, Output};
use super::leader::{Effect, Event, Leader};
use super::state::{Marks, Mutation, Prepared, State, View};
use crate::families::{ALL, OUTCOME, PREPARED, SHARD};
use crate::mvcc::{Mvcc, key};

/// Why a read stopped waiting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wake {
    /// It may look now.
    Serve,
    /// Too many wait.
    Refuse,
}

/// State and leader of a replica, behind one lock.
pub struct Core {
    inner: Mutex<Inner>,
    /// Effects wait for the driver's task, or a timeout has changed.
    pub changed: Notify,
    shard: ShardId,
    /// What happened to transactions lately, at all shards of the node.
    pub timeline: Arc<Timeline>,
}

/// What the lock protects.
pub struct Inner {
    /// What the log leads to.
    pub state: State,
    /// Present while this replica leads and serves.
    pub leader: Option<Leader>,
    /// Who is told when a read may look.
    pub readers: HashMap<u64, oneshot::Sender<Wake>>,
    /// For the driver's task: questions to ask, decisions to propose.
    pub todo: Vec<Effect>,
}

impl Core {
    /// A core around a state.
    pub fn new(shard: ShardId, timeline: &Arc<Timeline>) -> Arc<Core> {
        let inner =
            Inner { state: State::default(), leader: None, readers: HashMap::new(), todo: Vec::new() };
        let timeline = timeline.clone();
        Arc::new(Core { inner: Mutex::new(inner), changed: Notify::new(), shard, timeline })
    }

    /// Notes what happens to a transaction here.
    pub fn note(&self, txn: TxnId, what: &'static str) {
        self.timeline.note(txn, Some(self.shard), what);
    }

    /// Locks it. Nobody waits for anything else while holding the lock.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// Tells the leader of an event, if there is one, and performs what it wants done.
    pub fn handle(&self, inner: &mut Inner, event: Event) {
        let Inner { state, leader: Some(leader), .. } = inner else {
            return;
        };
        let before = leader.poll_timeout();
        leader.handle_event(monotonic(), event, state);
        let timeout_changed = leader.poll_timeout() != before;
        if inner.perform() || timeout_changed {
            self.changed.notify_one();
        }
    }
}

impl Inner {
    /// Whoever leads does not any more, and who waits hears of it.
    pub fn depose(&mut self) {
        self.leader = None;
        self.readers.clear();
        self.todo.clear();
    }

    /// Performs what the leader wants done; true if something is left for the driver's task.
    pub fn perform(&mut self) -> bool {
        let Some(leader) = &mut self.leader else {
            return false;
        };
        while let Some(effect) = leader.poll_effect() {
            let (id, wake) = match effect {
                Effect::Serve { id } => (id, Wake::Serve),
                Effect::Refuse { id } => (id, Wake::Refuse),
                Effect::Ask { .. } | Effect::Finish { .. } => {
                    self.todo.push(effect);
                    continue;
                }
            };
            if let Some(reader) = self.readers.remove(&id) {
                // The reader may have given up just now.
                let _ = reader.send(wake);
            }
        }
        !self.todo.is_empty()
    }
}

/// Applies a shard's log.
pub struct ShardMachine {
    shard: ShardId,
    store: Store,
    mvcc: Mvcc,
    core: Arc<Core>,
}

impl ShardMachine {
    /// The machine of a shard.
    pub fn new(store: &Store, shard: ShardId, core: &Arc<Core>) -> ShardMachine {
        ShardMachine { shard, store: store.clone(), mvcc: Mvcc::new(store, shard), core: core.clone() }
    }

    fn write(&self, batch: &mut Batch<'_>, mutation: &Mutation) -> io::Result<()> {
        match mutation {
            Mutation::Version { write, version } => {
                self.mvcc.put(batch, &write.key, *version, write.value.as_ref());
            }
            Mutation::Prepared(record) => {
                batch.put(PREPARED, &key::txn(self.shard, record.txn), &encode(record));
            }
            Mutation::Unprepared(txn) => batch.delete(PREPARED, &key::txn(self.shard, *txn)),
            Mutation::Outcome(txn, outcome) => {
                batch.put(OUTCOME, &key::txn(self.shard, *txn), &encode(outcome));
            }
            Mutation::OutcomesBefore(before) => {
                let end = key::txn(self.shard, TxnId { start: *before, client: Default::default() });
                let start = key::shard_start(self.shard);
                let mut rows = self.store.iterate(OUTCOME, &start, &end, Reach::Disk);
                rows.seek(&start);
                rows.status().map_err(StoreError::from)?;
                // Where there is none, the mark of a deletion would only be in the way of reads.
                if rows.item().is_some() {
                    batch.delete_range(OUTCOME, &start, &end);
                }
            }
        }
        Ok(())
    }
}

impl Machine for ShardMachine {
    type Output = Output;

    fn apply(
        &mut self,
        commands: &[(u64, &[u8])],
        mut batch: Batch<'_>,
    ) -> io::Result<(Vec<Output>, Committed)> {
        if commands.is_empty() {
            return Ok((Vec::new(), batch.commit()?));
        }
        let mut inner = self.core.lock();
        let mut outputs = Vec::with_capacity(commands.len());
        let mut view = StoredView::new(&self.store, self.shard);
        let (mut prepared, mut ended) = (Vec::new(), Vec::new());
        let mut mutations = Vec::new();
        for (index, bytes) in commands {
            let command: Command = decode(bytes).map_err(|error| damaged(self.shard, error))?;
            match &command {
                Command::CommitOnePhase { txn, .. } | Command::Fence { txn, .. } => ended.push(*txn),
                Command::Lead => {
                    // Whoever led before in this process does not any more.
                    inner.depose();
                }
                Command::Finish { decisions, .. } => {
                    for (txn, decision) in
                        decisions.iter().filter(|(txn, _)| inner.state.prepared().contains_key(txn))
                    {
                        let what = match decision {
                            Decision::Commit { .. } => "finished: committed",
                            Decision::Abort => "finished: aborted",
                        };
                        self.core.note(*txn, what);
                    }
                }
                Command::Prepare(_) | Command::Follow { .. } | Command::Retire { .. } => {}
            }
            outputs.push(inner.state.apply(*index, command, &view, &mut mutations)?);
            for mutation in mutations.drain(..) {
                self.write(&mut batch, &mutation)?;
                match mutation {
                    Mutation::Version { write, version } => view.wrote(write.key, version),
                    Mutation::Prepared(record) => {
                        self.core.note(record.txn, "prepared");
                        prepared.push(record.txn);
                    }
                    Mutation::Unprepared(txn) => ended.push(txn),
                    Mutation::Outcome(txn, outcome) => view.ended(txn, outcome),
                    Mutation::OutcomesBefore(_) => {}
                }
            }
        }
        batch.put(SHARD, &key::shard_start(self.shard), &encode(inner.state.marks()));
        let committed = batch.commit()?;
        self.core.handle(&mut inner, Event::Applied { prepared, ended });
        Ok((outputs, committed))
    }

    fn spans(&self) -> Vec<Span> {
        spans(self.shard)
    }

    fn unload(&mut self) {
        self.core.lock().depose();
    }

    fn reload(&mut self) -> io::Result<()> {
        let damaged = |error| damaged(self.shard, error);
        let marks = match self.store.get(SHARD, &key::shard_start(self.shard))? {
            Some(record) => decode(&record).map_err(damaged)?,
            None => Marks::default(),
        };
        let mut records = Vec::new();
        let (start, end) = (key::shard_start(self.shard), key::shard_end(self.shard));
        self.store.scan(PREPARED, &start, &end, |_, record| {
            records.push(decode::<Prepared>(record));
            true
        })?;
        let records: Vec<Prepared> = records.into_iter().collect::<Result<_, _>>().map_err(damaged)?;
        let mut inner = self.core.lock();
        inner.state = State::restore(marks, records);
        // Whoever led knows nothing of this state.
        inner.depose();
        Ok(())
    }
}

/// All that a shard has in the store.
pub fn spans(shard: ShardId) -> Vec<Span> {
    let span = |family| Span {
        family,
        start: key::shard_start(shard).to_vec(),
        end: key::shard_end(shard).to_vec(),
    };
    let left_out = mutation::on(Bug::SnapshotForgetsPrepared).then_some(PREPARED);
    ALL.into_iter().filter(|family| Some(*family) != left_out).map(span).collect()
}

fn damaged(shard: ShardId, error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the state of shard {shard} is damaged: {error}"))
}

/// The store, and on top of it what the current batch has not written yet.
pub struct StoredView<'a> {
    store: &'a Store,
    shard: ShardId,
    mvcc: Mvcc,
    reach: Reach,
    written: BTreeMap<Key, Timestamp>,
    outcomes: BTreeMap<TxnId, Outcome>,
}

impl<'a> StoredView<'a> {
    /// The store as it is.
    pub fn new(store: &'a Store, shard: ShardId) -> StoredView<'a> {
        StoredView::reaching(store, shard, Reach::Disk)
    }

    /// What of the store can be seen without waiting for a disk. What cannot is
    /// [`io::ErrorKind::WouldBlock`].
    pub fn in_memory(store: &'a Store, shard: ShardId) -> StoredView<'a> {
        StoredView::reaching(store, shard, Reach::Memory)
    }

    fn reaching(store: &'a Store, shard: ShardId, reach: Reach) -> StoredView<'a> {
        StoredView {
            store,
            shard,
            mvcc: Mvcc::new(store, shard),
            reach,
            written: BTreeMap::new(),
            outcomes: BTreeMap::new(),
        }
    }

    fn wrote(&mut self, key: Key, version: Timestamp) {
        let newest = self.written.entry(key).or_default();
        *newest = version.max(*newest);
    }

    fn ended(&mut self, txn: TxnId, outcome: Outcome) {
        self.outcomes.insert(txn, outcome);
    }
}

impl View for StoredView<'_> {
    fn newest(&self, key: &Key) -> io::Result<Timestamp> {
        // What this batch writes is newer than all that is stored.
        match self.written.get(key) {
            Some(version) => Ok(*version),
            None => self.mvcc.newest(key, self.reach),
        }
    }

    fn newer_in_range(&self, range: &KeyRange, after: Timestamp) -> io::Result<Option<(Key, Timestamp)>> {
        let written = self.written.iter().find(|(key, version)| **version > after && range.contains(key));
        match written {
            Some((key, version)) => Ok(Some((key.clone(), *version))),
            None => self.mvcc.newer_in_range(range, after, self.reach),
        }
    }

    fn outcome(&self, txn: TxnId) -> io::Result<Option<Outcome>> {
        if let Some(outcome) = self.outcomes.get(&txn) {
            return Ok(Some(outcome.clone()));
        }
        match self.store.get(OUTCOME, &key::txn(self.shard, txn))? {
            Some(record) => Ok(Some(decode(&record).map_err(|error| damaged(self.shard, error))?)),
            None => Ok(None),
        }
    }
}
