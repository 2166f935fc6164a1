//! The replicated state of a shard.
//!
//! ```text
//!              Prepare: checked, all locks free               Finish(commit): versions written
//!   (nothing) ─────────────────────────────────► prepared ───────────────────────────────────► (done)
//!       │                                           │          Finish(abort)
//!       └─ otherwise: No, and nothing changes       └────────────────────────────────────────► (gone)
//! ```
//!
//! Why a check here is enough for strict serializability: a transaction that is prepared has read
//! nothing that changed since, and holds locks on all it read and writes until its end. So at the
//! moment of its commit timestamp, which is drawn while the locks of all participants stand, all
//! its reads are still true.
//!
//! `apply` is deterministic. What it asks of the store is insensitive to garbage collection: it
//! never looks at or below the safe point.

use std::collections::BTreeMap;
use std::io;

use troth_protocol::message::shard::{Decision, Prepare};
use troth_protocol::message::txn::{Cause, Outcome, Work, Write};
use troth_protocol::mutation::{self, Bug};
use troth_protocol::{Epoch, Key, KeyRange, ParticipantId, Timestamp, TxnId};

use super::command::{Command, Output};
use crate::locks;

/// What the state asks of the store: versions and outcomes as of the last applied command.
pub trait View {
    /// When a key was last written or deleted; [`Timestamp::ZERO`]: never.
    fn newest(&self, key: &Key) -> io::Result<Timestamp>;
    /// A key of a range with a version after a moment, if there is one.
    fn newer_in_range(&self, range: &KeyRange, after: Timestamp) -> io::Result<Option<(Key, Timestamp)>>;
    /// The outcome of a one-shard transaction, if it has one.
    fn outcome(&self, txn: TxnId) -> io::Result<Option<Outcome>>;
}

/// What a command changes in the store.
#[derive(Clone, PartialEq, Debug)]
pub enum Mutation {
    /// A version of a key.
    Version {
        /// What was written.
        write: Write,
        /// When.
        version: Timestamp,
    },
    /// A transaction is prepared now.
    Prepared(Prepared),
    /// A transaction is not prepared any more.
    Unprepared(TxnId),
    /// The outcome of a transaction is on record now: of a one-shard transaction, which has it nowhere
    /// else, and of others that committed, as evidence for the day when the coordinators are lost.
    Outcome(TxnId, Outcome),
    /// Outcomes of transactions that began before this are gone.
    OutcomesBefore(Timestamp),
}

/// A transaction that this shard has promised to be able to commit.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Prepared {
    /// The transaction.
    pub txn: TxnId,
    /// The newest coordinator leader that it was promised to.
    pub epoch: Epoch,
    /// If it commits, then later than this.
    pub floor: Timestamp,
    /// Everybody who votes.
    pub participants: Vec<ParticipantId>,
    /// What it read and writes here.
    pub work: Work,
}

/// The small part of the state that is stored as one record.
#[derive(Clone, Copy, PartialEq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Marks {
    /// The leadership: the index of the last `Lead`.
    pub lead: u64,
    /// The newest coordinator leader that this shard has heard of.
    pub epoch: Epoch,
    /// The largest commit timestamp of a transaction that took part here.
    pub last_commit: Timestamp,
    /// No snapshot before this is read any more.
    pub safe_point: Timestamp,
    /// No outcome of a transaction that began before this is kept.
    pub outcomes_before: Timestamp,
}

/// The state, but for versions and outcomes, which stay in the store.
#[derive(Clone, Default, Debug)]
pub struct State {
    marks: Marks,
    prepared: BTreeMap<TxnId, Prepared>,
    locks: locks::Table,
}

impl State {
    /// Rebuilds the state from what is stored: the locks follow from the prepared transactions.
    pub fn restore(marks: Marks, prepared: impl IntoIterator<Item = Prepared>) -> State {
        let mut state = State { marks, ..State::default() };
        for record in prepared {
            if !mutation::on(Bug::LocksNotRebuilt) {
                state.locks.acquire(record.txn, record.floor, &record.work);
            }
            state.prepared.insert(record.txn, record);
        }
        state
    }

    /// The small part.
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// The locks.
    pub fn locks(&self) -> &locks::Table {
        &self.locks
    }

    /// The prepared transactions, by age.
    pub fn prepared(&self) -> &BTreeMap<TxnId, Prepared> {
        &self.prepared
    }

    /// Applies the command at an index of the log. What it changes in the store is added to
    /// `mutations`.
    ///
    /// # Errors
    /// Only if the store fails.
    pub fn apply(
        &mut self,
        index: u64,
        command: Command,
        view: &impl View,
        mutations: &mut Vec<Mutation>,
    ) -> io::Result<Output> {
        Ok(match command {
            Command::Lead => {
                self.marks.lead = index;
                Output::Leads(index)
            }
            Command::Prepare(prepare) => Output::Vote(self.prepare(prepare, view, mutations)?),
            Command::CommitOnePhase { lead, txn, commit_ts, work } => match self.settled(txn, view)? {
                Some(settled) => settled,
                None => {
                    let outcome = self.commit_one_phase(lead, txn, commit_ts, work, view, mutations)?;
                    mutations.push(Mutation::Outcome(txn, outcome.clone()));
                    Output::Outcome(outcome)
                }
            },
            Command::Finish { epoch, decisions } => {
                self.marks.epoch = self.marks.epoch.max(epoch);
                for (txn, decision) in decisions {
                    self.finish(epoch, txn, decision, mutations);
                }
                Output::Done
            }
            Command::Follow { epoch } => {
                self.marks.epoch = self.marks.epoch.max(epoch);
                Output::Done
            }
            Command::Fence { txn, cause } => match self.settled(txn, view)? {
                Some(settled) => settled,
                None => {
                    let outcome = Outcome::Aborted { cause };
                    mutations.push(Mutation::Outcome(txn, outcome.clone()));
                    Output::Outcome(outcome)
                }
            },
            Command::Retire { safe_point, outcomes_before } => {
                // A prepared transaction may still add a version just above its start.
                let oldest = self.prepared.keys().next().map_or(Timestamp::MAX, |txn| txn.start);
                self.marks.safe_point = self.marks.safe_point.max(safe_point.min(oldest));
                self.marks.outcomes_before = self.marks.outcomes_before.max(outcomes_before);
                mutations.push(Mutation::OutcomesBefore(self.marks.outcomes_before));
                Output::Done
            }
        })
    }

    fn prepare(
        &mut self,
        prepare: Prepare,
        view: &impl View,
        mutations: &mut Vec<Mutation>,
    ) -> io::Result<Result<(), Cause>> {
        if prepare.epoch < self.marks.epoch {
            return Ok(Err(Cause::Superseded));
        }
        self.marks.epoch = prepare.epoch;
        if let Some(record) = self.prepared.get_mut(&prepare.txn) {
            // Asked again: the promise stands, to whoever asked last.
            record.epoch = prepare.epoch;
            mutations.push(Mutation::Prepared(record.clone()));
            return Ok(Ok(()));
        }
        if let Some(cause) = self.objection(prepare.txn, &prepare.work, view)? {
            return Ok(Err(cause));
        }
        let Prepare { txn, epoch, floor, participants, work } = prepare;
        let record = Prepared { txn, epoch, floor, participants, work };
        self.locks.acquire(txn, floor, &record.work);
        mutations.push(Mutation::Prepared(record.clone()));
        self.prepared.insert(txn, record);
        Ok(Ok(()))
    }

    fn commit_one_phase(
        &mut self,
        lead: u64,
        txn: TxnId,
        commit_ts: Timestamp,
        work: Work,
        view: &impl View,
        mutations: &mut Vec<Mutation>,
    ) -> io::Result<Outcome> {
        let aborted = |cause| Ok(Outcome::Aborted { cause });
        if lead != self.marks.lead {
            // The timestamp may lie below what a later leader has served.
            return aborted(Cause::Superseded);
        }
        if let Some(cause) = self.objection(txn, &work, view)? {
            return aborted(cause);
        }
        assert!(
            commit_ts > self.marks.last_commit && commit_ts > txn.start,
            "one leader proposes increasing timestamps: {txn} at {commit_ts} after {}",
            self.marks.last_commit
        );
        self.write(work.writes, commit_ts, mutations);
        Ok(Outcome::Committed { commit_ts })
    }

    fn finish(&mut self, epoch: Epoch, txn: TxnId, decision: Decision, mutations: &mut Vec<Mutation>) {
        let Some(record) = self.prepared.get(&txn) else {
            return;
        };
        match decision {
            // A decision to commit is durable and final, whoever brings it.
            Decision::Commit { commit_ts } => {
                assert!(
                    commit_ts > record.floor,
                    "{txn} commits at {commit_ts}, not after its floor {}",
                    record.floor
                );
                let record = self.unprepare(txn, mutations);
                mutations.push(Mutation::Outcome(txn, Outcome::Committed { commit_ts }));
                self.write(record.work.writes, commit_ts, mutations);
            }
            // An abort is only the word of a leader; a newer one may have been promised more.
            Decision::Abort if epoch >= record.epoch || mutation::on(Bug::DeposedAborts) => {
                drop(self.unprepare(txn, mutations))
            }
            Decision::Abort => {}
        }
    }

    fn unprepare(&mut self, txn: TxnId, mutations: &mut Vec<Mutation>) -> Prepared {
        let record = self.prepared.remove(&txn).expect("looked at just now");
        self.locks.release(txn, &record.work);
        mutations.push(Mutation::Unprepared(txn));
        record
    }

    fn write(&mut self, writes: Vec<Write>, version: Timestamp, mutations: &mut Vec<Mutation>) {
        self.marks.last_commit = self.marks.last_commit.max(version);
        mutations.extend(writes.into_iter().map(|write| Mutation::Version { write, version }));
    }

    /// The outcome that a one-shard transaction has already, or had so long ago that it is not kept.
    pub fn settled(&self, txn: TxnId, view: &impl View) -> io::Result<Option<Output>> {
        if txn.start < self.marks.outcomes_before {
            return Ok(Some(Output::Expired));
        }
        Ok(view.outcome(txn)?.map(Output::Outcome))
    }

    /// Why a transaction cannot be promised or committed now, if so.
    pub fn objection(&self, txn: TxnId, work: &Work, view: &impl View) -> io::Result<Option<Cause>> {
        if txn.start < self.marks.safe_point {
            return Ok(Some(Cause::TooOld));
        }
        if let Some(conflict) = self.locks.conflict(txn, work) {
            return Ok(Some(Cause::Locked { key: conflict.key, by: conflict.by }));
        }
        self.outdated(work, view)
    }

    /// What of a transaction's reads is not true any more, if anything.
    fn outdated(&self, work: &Work, view: &impl View) -> io::Result<Option<Cause>> {
        let (reads, ranges) = (&work.reads[..], &work.ranges[..]);
        let reads = if mutation::on(Bug::SkipReadValidation) { &[] } else { reads };
        let ranges = if mutation::on(Bug::SkipRangeValidation) { &[] } else { ranges };
        for read in reads {
            let version = view.newest(&read.key)?;
            if version > read.version.max(self.marks.safe_point) {
                return Ok(Some(Cause::ReadConflict { key: read.key.clone(), version }));
            }
        }
        for check in ranges {
            let after = check.snapshot.max(self.marks.safe_point);
            if let Some((key, version)) = view.newer_in_range(&check.range, after)? {
                return Ok(Some(Cause::RangeConflict { range: check.range.clone(), key, version }));
            }
        }
        Ok(None)
    }
}
