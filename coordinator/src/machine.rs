//! The state of the coordinators in RocksDB.
//!
//! The state and the leader's memory share one lock, which is held while commands are applied and
//! written: a decision becomes visible, durable in the log and known to the leader in one step.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, oneshot, watch};
use troth_protocol::clock::{Clock, monotonic};
use troth_protocol::message::shard::{Decision as Word, Vote};
use troth_protocol::timeline::Timeline;
use troth_protocol::wire::{decode, encode};
use troth_protocol::{MapEpoch, NodeId, TxnId};
use troth_replication::{Batch, Committed, Family, Machine, Span, Store};

use crate::command::{Command, Decision, Output, Record, Verdict};
use crate::leader::{Answer, Effect, Event, Leader, Now, RequestId};
use crate::state::{Catalog, Marks, Mutation, State, View};

/// Records of transactions: `txn → record`.
pub const RECORD: Family = Family("record");
/// Decisions that somebody has not heard of: `txn → decision`.
pub const UNFINISHED: Family = Family("unfinished");
/// The rest of the state, under names.
pub const CATALOG: Family = Family("catalog");

/// All column families of a coordinator.
pub const FAMILIES: [Family; 3] = [RECORD, UNFINISHED, CATALOG];

const MARKS_KEY: &[u8] = b"marks";
const CATALOG_KEY: &[u8] = b"catalog";
const PROGRESS_KEY: &[u8] = b"progress";

/// Above every key that is used.
const END: [u8; 17] = [0xff; 17];

/// State and leader of a coordinator, behind one lock.
pub struct Core {
    inner: Mutex<Inner>,
    store: Store,
    clock: Clock,
    /// Effects wait for the driver's task, or a timeout has changed.
    pub changed: Notify,
    /// The version of the cluster map.
    pub map_epoch: watch::Sender<MapEpoch>,
    /// What happened to transactions lately.
    pub timeline: Timeline,
    /// The last entry that was in the log when this process was started.
    began_at: u64,
    /// Whether what is here is known to be no older copy: the log has gone on in this life, which it does only under
    /// a leader of whom participants have confirmed that.
    pub trusted: watch::Sender<bool>,
}

/// What the lock protects.
pub struct Inner {
    /// What the log leads to.
    pub state: State,
    /// Present while this coordinator leads.
    pub leader: Option<Leader>,
    /// Who is answered.
    pub requests: HashMap<RequestId, oneshot::Sender<Answer>>,
    /// For the driver's task.
    pub todo: Vec<Effect>,
}

impl Inner {
    /// Whoever leads does not any more, and who waits hears of it.
    pub fn depose(&mut self) {
        self.leader = None;
        self.requests.clear();
        self.todo.clear();
    }
}

impl Core {
    /// A core without a state. `doubt`: what was the last entry of the log at the start, if it may be an older copy.
    pub fn new(store: &Store, clock: &Clock, doubt: Option<u64>) -> Arc<Core> {
        let inner =
            Inner { state: State::default(), leader: None, requests: HashMap::new(), todo: Vec::new() };
        Arc::new(Core {
            inner: Mutex::new(inner),
            store: store.clone(),
            clock: clock.clone(),
            changed: Notify::new(),
            map_epoch: watch::channel(MapEpoch(0)).0,
            timeline: Timeline::new(clock),
            began_at: doubt.unwrap_or(0),
            trusted: watch::channel(doubt.is_none()).0,
        })
    }

    /// Locks it. Nobody waits for anything else while holding the lock.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// The moment, by both clocks.
    pub fn now(&self) -> Now {
        Now { instant: monotonic(), millis: self.clock.millis() }
    }

    /// What is on record, as stored.
    pub fn view(&self) -> StoredView<'_> {
        StoredView { store: &self.store, recorded: BTreeMap::new() }
    }

    /// Tells the leader of an event, if there is one, and performs what it wants done.
    pub fn handle(&self, inner: &mut Inner, event: Event) {
        let Inner { state, leader: Some(leader), .. } = inner else {
            return;
        };
        self.note_event(&event);
        leader.handle_event(self.now(), event, state, &self.view());
        self.perform(inner);
    }

    fn note_event(&self, event: &Event) {
        let note = |txn: &TxnId, shard, what| self.timeline.note(*txn, shard, what);
        match event {
            Event::Commit { commit, .. } if commit.resubmission => {
                note(&commit.txn, None, "commit asked about again")
            }
            Event::Commit { commit, .. } => note(&commit.txn, None, "commit received"),
            Event::Outcome { txn, .. } => note(txn, None, "outcome asked for"),
            Event::Voted { txn, participant, vote } => {
                let what = match vote {
                    Some(Vote::Yes { .. }) => "voted yes",
                    Some(Vote::No { .. }) => "voted no",
                    None => "did not vote",
                };
                note(txn, participant.shard(), what);
            }
            Event::OnePhase { txn, shard, .. } => note(txn, Some(*shard), "answered"),
            Event::Applied { verdicts } => {
                for (txn, verdict) in verdicts {
                    let what = match verdict {
                        Verdict::Recorded(Record::Committed { .. }) => "decided: committed",
                        Verdict::Recorded(Record::Refused) => "fenced off: it never commits",
                        Verdict::Superseded => "a newer leader has taken over",
                        Verdict::Expired => "too old to be decided",
                    };
                    note(txn, None, what);
                }
            }
            Event::Delivered { shard, decisions, ok: true } => {
                for (txn, _) in decisions {
                    note(txn, Some(*shard), "finished");
                }
            }
            Event::Page { shard, txns, .. } => {
                for txn in txns {
                    note(txn, Some(*shard), "found in doubt");
                }
            }
            Event::Delivered { ok: false, .. }
            | Event::NotProposed { .. }
            | Event::NotForgotten { .. }
            | Event::GaveUp { .. }
            | Event::Seen { .. }
            | Event::Ceiling(_)
            | Event::NoCeiling => {}
        }
    }

    fn note_effect(&self, effect: &Effect) {
        let note = |txn: &TxnId, shard, what| self.timeline.note(*txn, shard, what);
        match effect {
            Effect::Prepare { shard, prepare, .. } => note(&prepare.txn, Some(*shard), "asked to prepare"),
            Effect::CommitOnePhase { shard, commit, .. } => {
                note(&commit.txn, Some(*shard), "asked to commit")
            }
            Effect::AskShard { shard, txn } => note(txn, Some(*shard), "asked for the outcome"),
            Effect::Decide(decisions) => {
                for decision in decisions {
                    note(&decision.txn, None, "all voted yes, decision proposed");
                }
            }
            Effect::Finish { shard, decisions } => {
                for (txn, word) in decisions {
                    let what = match word {
                        Word::Commit { .. } => "told to finish: committed",
                        Word::Abort => "told to finish: aborted",
                    };
                    note(txn, Some(*shard), what);
                }
            }
            Effect::Refuse(_)
            | Effect::Forget(_)
            | Effect::Ceiling(_)
            | Effect::Retire(_)
            | Effect::Place(_)
            | Effect::Collect { .. }
            | Effect::Answer { .. } => {}
        }
    }

    /// Performs what the leader wants done, and wakes the driver's task for the rest.
    pub fn perform(&self, inner: &mut Inner) {
        let Some(leader) = &mut inner.leader else { return };
        while let Some(effect) = leader.poll_effect() {
            match effect {
                Effect::Answer { id, answer } => {
                    if let Some(request) = inner.requests.remove(&id) {
                        // Whoever asked may have given up just now.
                        let _ = request.send(answer);
                    }
                }
                other => {
                    self.note_effect(&other);
                    inner.todo.push(other);
                }
            }
        }
        if !inner.todo.is_empty() {
            self.changed.notify_one();
        }
    }
}

/// Applies the coordinators' log.
pub struct CoordinatorMachine {
    store: Store,
    core: Arc<Core>,
}

impl CoordinatorMachine {
    /// The machine around a core.
    pub fn new(store: &Store, core: &Arc<Core>) -> CoordinatorMachine {
        CoordinatorMachine { store: store.clone(), core: core.clone() }
    }

    fn write(batch: &mut Batch<'_>, mutation: &Mutation, state: &State) {
        match mutation {
            Mutation::Record(txn, record) => batch.put(RECORD, &txn.to_bytes(), &encode(record)),
            Mutation::Unfinished(decision) => {
                batch.put(UNFINISHED, &decision.txn.to_bytes(), &encode(decision));
            }
            Mutation::Finished(txn) => batch.delete(UNFINISHED, &txn.to_bytes()),
            Mutation::RecordsBefore(before) => {
                let end = TxnId { start: *before, client: Default::default() };
                batch.delete_range(RECORD, &[], &end.to_bytes());
            }
            Mutation::Catalog => {
                let catalog = state.catalog().expect("it has changed, so there is one");
                batch.put(CATALOG, CATALOG_KEY, &encode(catalog));
            }
            Mutation::Progress => {
                let progress: Vec<(NodeId, u64)> =
                    state.progress().iter().map(|(node, progress)| (*node, *progress)).collect();
                batch.put(CATALOG, PROGRESS_KEY, &encode(&progress));
            }
        }
    }
}

impl Machine for CoordinatorMachine {
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
        let mut view = self.core.view();
        let mut mutations = Vec::new();
        let mut events = Vec::new();
        for (index, bytes) in commands {
            let command: Command = decode(bytes).map_err(damaged)?;
            let named = named(&command);
            if let Command::Lead { .. } = command {
                // Whoever led before in this process does not any more.
                inner.depose();
            }
            let output = inner.state.apply(*index, command, &view, &mut mutations)?;
            for mutation in mutations.drain(..) {
                CoordinatorMachine::write(&mut batch, &mutation, &inner.state);
                if let Mutation::Record(txn, record) = mutation {
                    view.recorded.insert(txn, record);
                }
            }
            match (&output, named) {
                (Output::Verdicts(verdicts), Named::Txns(txns)) => {
                    let verdicts = txns.into_iter().zip(verdicts.iter().copied()).collect();
                    events.push(Event::Applied { verdicts });
                }
                (_, Named::Ceiling) => events.push(Event::Ceiling(inner.state.marks().ceiling)),
                _ => {}
            }
            outputs.push(output);
        }
        if commands.last().is_some_and(|(index, _)| *index > self.core.began_at) {
            self.core.trusted.send_if_modified(|trusted| !std::mem::replace(trusted, true));
        }
        batch.put(CATALOG, MARKS_KEY, &encode(inner.state.marks()));
        let committed = batch.commit()?;
        for event in events {
            self.core.handle(&mut inner, event);
        }
        publish_map(&self.core, &inner.state);
        Ok((outputs, committed))
    }

    fn spans(&self) -> Vec<Span> {
        spans()
    }

    fn unload(&mut self) {
        self.core.lock().depose();
    }

    fn reload(&mut self) -> io::Result<()> {
        let marks: Marks = match self.store.get(CATALOG, MARKS_KEY)? {
            Some(record) => decode(&record).map_err(damaged)?,
            None => Marks::default(),
        };
        let catalog = stored_catalog(&self.store)?;
        let progress: Vec<(NodeId, u64)> = match self.store.get(CATALOG, PROGRESS_KEY)? {
            Some(record) => decode(&record).map_err(damaged)?,
            None => Vec::new(),
        };
        let mut unfinished = Vec::new();
        self.store.scan(UNFINISHED, &[], &END, |_, record| {
            unfinished.push(decode::<Decision>(record));
            true
        })?;
        let unfinished: Vec<Decision> = unfinished.into_iter().collect::<Result<_, _>>().map_err(damaged)?;
        let mut inner = self.core.lock();
        inner.state = State::restore(marks, catalog, progress, unfinished);
        // Whoever led knows nothing of this state.
        inner.depose();
        publish_map(&self.core, &inner.state);
        Ok(())
    }
}

/// What the cluster is, as far as it is applied; `None` before the first leader.
///
/// # Errors
/// If the store cannot be read, or what it holds is damaged.
pub fn stored_catalog(store: &Store) -> io::Result<Option<Catalog>> {
    match store.get(CATALOG, CATALOG_KEY)? {
        Some(record) => decode(&record).map(Some).map_err(damaged),
        None => Ok(None),
    }
}

/// What a command names that its output says something about.
enum Named {
    Txns(Vec<TxnId>),
    Ceiling,
    Nothing,
}

fn named(command: &Command) -> Named {
    match command {
        Command::Decide { decisions, .. } => {
            Named::Txns(decisions.iter().map(|decision| decision.txn).collect())
        }
        Command::Refuse { txns } => Named::Txns(txns.clone()),
        Command::Ceiling { .. } => Named::Ceiling,
        Command::Lead { .. }
        | Command::Register { .. }
        | Command::Progress { .. }
        | Command::Coordinators(_)
        | Command::Seated { .. }
        | Command::Found { .. }
        | Command::Node { .. }
        | Command::Lose { .. }
        | Command::Move { .. }
        | Command::Moved { .. }
        | Command::Carried { .. }
        | Command::Forget { .. }
        | Command::Retire { .. } => Named::Nothing,
    }
}

fn publish_map(core: &Core, state: &State) {
    let epoch = state.catalog().map_or(MapEpoch(0), |catalog| catalog.map.epoch);
    core.map_epoch.send_if_modified(|current| std::mem::replace(current, epoch) != epoch);
}

/// All that the coordinators have in the store.
pub fn spans() -> Vec<Span> {
    FAMILIES.into_iter().map(|family| Span { family, start: Vec::new(), end: END.to_vec() }).collect()
}

fn damaged(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the state of the coordinators is damaged: {error}"))
}

/// The store, and on top of it what the current batch has not written yet.
pub struct StoredView<'a> {
    store: &'a Store,
    recorded: BTreeMap<TxnId, Record>,
}

impl View for StoredView<'_> {
    fn record(&self, txn: TxnId) -> io::Result<Option<Record>> {
        if let Some(record) = self.recorded.get(&txn) {
            return Ok(Some(*record));
        }
        match self.store.get(RECORD, &txn.to_bytes())? {
            Some(record) => Ok(Some(decode(&record).map_err(damaged)?)),
            None => Ok(None),
        }
    }
}
