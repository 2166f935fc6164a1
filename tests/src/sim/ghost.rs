//! Sees everything at once, which nobody in a real cluster can, and knows what must never happen.
//!
//! While a run goes on it holds the invariants of the protocol against each step: one decision, all votes, in
//! the epoch of the decision and before its timestamp, presumed abort, locks for all that is promised, time that
//! only grows, nothing forgotten too early, replicas that agree. At the end it replays all that was committed in
//! the order of commit timestamps, and compares every read that was ever answered with what it should have seen:
//! that is snapshot isolation and strict serializability, decided, not sampled.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use troth_coordinator::command as coordinator;
use troth_participant::locks::Table;
use troth_participant::shard::command as shard;
use troth_participant::shard::state::{Mutation, Prepared, State};
use troth_protocol::message::coordinator::Resolution;
use troth_protocol::message::shard::{Decision, Row, Version};
use troth_protocol::message::txn::{Outcome, Part};
use troth_protocol::{Epoch, Key, KeyRange, ParticipantId, ShardId, Timestamp, TxnId, Value};

use super::Seat;

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Ghost {
    /// What went wrong, in words.
    pub violations: Vec<String>,
    decided: BTreeMap<TxnId, Timestamp>,
    one_phase: BTreeMap<TxnId, Timestamp>,
    /// Transactions of which somebody was told that they never happen.
    aborted: BTreeSet<TxnId>,
    prepared: BTreeMap<(ShardId, TxnId), Promise>,
    /// Who takes part in a decided transaction.
    participants: BTreeMap<TxnId, Vec<ShardId>>,
    /// Shards that have written what a transaction wanted.
    applied: BTreeSet<(ShardId, TxnId)>,
    submitted: BTreeMap<TxnId, Vec<Part>>,
    coordinator_outputs: Vec<coordinator::Output>,
    shard_outputs: BTreeMap<ShardId, Vec<shard::Output>>,
    /// What each transaction has read, in its own order.
    reads: BTreeMap<TxnId, Vec<(Key, Version)>>,
    scans: BTreeMap<TxnId, Vec<(KeyRange, Vec<Row>)>>,
    /// The largest timestamp that anybody has got.
    newest: Timestamp,
    /// Outcomes of transactions that began before this need not be known any more.
    outcomes_before: Timestamp,
    /// Operations that ended well: when they were begun and over, and their moment in the serial order.
    operations: BTreeSet<(Duration, Duration, TxnId, Timestamp)>,
}

/// What a shard has promised.
#[derive(Clone, Copy, Debug)]
struct Promise {
    /// To whom.
    epoch: Epoch,
    /// The largest timestamp that anybody had got by then.
    newest: Timestamp,
}

impl Ghost {
    fn violated(&mut self, what: String) {
        self.violations.push(what);
    }

    // --- what clients see -----------------------------------------------------------------------

    /// The largest timestamp that anybody has got: whoever asks now must get a larger one.
    pub fn newest(&self) -> Timestamp {
        self.newest
    }

    /// Somebody got a timestamp, who asked for it when this was the largest one.
    pub fn got_timestamp(&mut self, timestamp: Timestamp, newest_before: Timestamp) {
        if timestamp <= newest_before {
            self.violated(format!("timestamp {timestamp} was handed out after {newest_before}"));
        }
        self.newest = self.newest.max(timestamp);
    }

    /// A client is told that nobody knows any more how its transaction ended.
    pub fn expired(&mut self, txn: TxnId) {
        if txn.start >= self.outcomes_before {
            let before = self.outcomes_before;
            self.violated(format!("{txn} is said to be too old, and only those before {before} are"));
        }
    }

    /// A group gives up the outcomes of transactions that began before this; those since `kept` it must know.
    pub fn gives_up_outcomes(&mut self, before: Timestamp, kept: Timestamp) {
        if before > kept {
            self.violated(format!("outcomes before {before} are given up, and those since {kept} are kept"));
        }
        self.outcomes_before = self.outcomes_before.max(before);
    }

    /// A client has read a key at the start of its transaction.
    pub fn read(&mut self, txn: TxnId, key: Key, version: Version) {
        self.reads.entry(txn).or_default().push((key, version));
    }

    /// A client has read a range of one shard at the start of its transaction.
    pub fn scanned(&mut self, txn: TxnId, range: KeyRange, rows: Vec<Row>) {
        self.scans.entry(txn).or_default().push((range, rows));
    }

    /// A client sends a commit.
    pub fn submitted(&mut self, txn: TxnId, parts: Vec<Part>) {
        self.submitted.insert(txn, parts);
    }

    /// A client knows that its transaction happened, at this moment of the serial order.
    pub fn committed(&mut self, begun: Duration, over: Duration, txn: TxnId, at: Timestamp) {
        if self.submitted.contains_key(&txn) && self.commit_ts(txn) != Some(at) {
            let really = self.commit_ts(txn);
            self.violated(format!("{txn} was acknowledged at {at}, and is committed at {really:?}"));
        }
        self.newest = self.newest.max(at);
        self.operations.insert((begun, over, txn, at));
    }

    /// A client knows that its transaction did not happen, and never will.
    pub fn failed(&mut self, txn: TxnId) {
        if let Some(at) = self.commit_ts(txn) {
            self.violated(format!("{txn} is committed at {at}, and its client was told that it failed"));
        }
        self.aborted.insert(txn);
    }

    /// When a transaction was committed.
    pub fn commit_ts(&self, txn: TxnId) -> Option<Timestamp> {
        self.decided.get(&txn).or_else(|| self.one_phase.get(&txn)).copied()
    }

    /// How many transactions were committed.
    pub fn commits(&self) -> usize {
        self.decided.len() + self.one_phase.len()
    }

    /// All that was seen, but for how long it took.
    pub fn timeless(&self) -> Ghost {
        let timeless =
            |(_, _, txn, at): &(_, _, TxnId, Timestamp)| (Duration::ZERO, Duration::ZERO, *txn, *at);
        Ghost { operations: self.operations.iter().map(timeless).collect(), ..self.clone() }
    }

    /// How many operations ended well.
    pub fn acknowledged(&self) -> usize {
        self.operations.len()
    }

    // --- what coordinators say and apply ----------------------------------------------------------

    /// A coordinator answers how a transaction ended.
    pub fn answered(&mut self, txn: TxnId, outcome: &Outcome) {
        match outcome {
            Outcome::Committed { commit_ts } => {
                if self.commit_ts(txn) != Some(*commit_ts) {
                    let really = self.commit_ts(txn);
                    self.violated(format!(
                        "{txn} is answered committed at {commit_ts}, and is at {really:?}"
                    ));
                }
            }
            Outcome::Aborted { cause } => {
                if let Some(at) = self.commit_ts(txn) {
                    self.violated(format!("{txn} is answered aborted ({cause}), and is committed at {at}"));
                }
                self.aborted.insert(txn);
            }
        }
    }

    /// A coordinator tells a shard what became of transactions.
    pub fn resolved(&mut self, txns: &[TxnId], resolutions: &[Resolution]) {
        for (txn, resolution) in txns.iter().zip(resolutions) {
            match resolution {
                Resolution::Committed { commit_ts } if self.decided.get(txn) != Some(commit_ts) => {
                    self.violated(format!("{txn} is resolved as committed at {commit_ts}, and is not"));
                }
                Resolution::Aborted if self.decided.contains_key(txn) => {
                    self.violated(format!("{txn} is resolved as aborted, and is committed"));
                }
                Resolution::Aborted => drop(self.aborted.insert(*txn)),
                Resolution::Committed { .. } | Resolution::InFlight => {}
            }
        }
    }

    /// A coordinator has applied an entry.
    pub fn coordinator_applied(
        &mut self,
        index: u64,
        command: &coordinator::Command,
        output: &coordinator::Output,
    ) {
        if let Some(first) = self.coordinator_outputs.get(index as usize - 1) {
            if first != output {
                self.violated(format!("coordinators disagree about entry {index}: {first:?}, {output:?}"));
            }
            return;
        }
        self.coordinator_outputs.push(output.clone());
        match (command, output) {
            (coordinator::Command::Decide { epoch, decisions }, coordinator::Output::Verdicts(verdicts)) => {
                for (decision, verdict) in decisions.iter().zip(verdicts) {
                    if let coordinator::Verdict::Recorded(coordinator::Record::Committed { commit_ts }) =
                        verdict
                    {
                        self.decides(*epoch, decision, *commit_ts);
                    }
                }
            }
            (coordinator::Command::Forget { txns }, _) => {
                for txn in txns {
                    let participants = self.participants.get(txn).into_iter().flatten();
                    let missing = participants.copied().find(|shard| !self.applied.contains(&(*shard, *txn)));
                    if let Some(shard) = missing {
                        self.violated(format!("{txn} is forgotten, and shard {shard} has not applied it"));
                    }
                }
            }
            _ => {}
        }
    }

    fn decides(&mut self, epoch: Epoch, decision: &coordinator::Decision, commit_ts: Timestamp) {
        let txn = decision.txn;
        match self.decided.get(&txn) {
            Some(before) if *before == commit_ts => return,
            Some(before) => {
                return self.violated(format!("{txn} is decided at {before} and again at {commit_ts}"));
            }
            None => {}
        }
        if self.aborted.contains(&txn) {
            self.violated(format!("{txn} is decided after somebody was told that it never happens"));
        }
        for shard in decision.participants.iter().filter_map(ParticipantId::shard) {
            match self.prepared.get(&(shard, txn)).copied() {
                None => self.violated(format!("{txn} is decided, and shard {shard} has not promised it")),
                Some(promise) if promise.epoch != epoch => self.violated(format!(
                    "{txn} is decided in epoch {epoch}, and shard {shard} has promised it to {}",
                    promise.epoch
                )),
                Some(promise) if commit_ts <= promise.newest => self.violated(format!(
                    "{txn} is decided at {commit_ts}, and when shard {shard} promised it there was {}",
                    promise.newest
                )),
                Some(_) => {}
            }
        }
        self.decided.insert(txn, commit_ts);
        let shards = decision.participants.iter().filter_map(ParticipantId::shard).collect();
        self.participants.insert(txn, shards);
    }

    // --- what shards apply ------------------------------------------------------------------------

    /// A replica of a shard has applied an entry.
    pub fn shard_applied(
        &mut self,
        shard: ShardId,
        index: u64,
        command: &shard::Command,
        output: &shard::Output,
        mutations: &[Mutation],
    ) {
        let outputs = self.shard_outputs.entry(shard).or_default();
        if let Some(first) = outputs.get(index as usize - 1) {
            if first != output {
                let text = format!("replicas of shard {shard} disagree about {index}: {first:?}, {output:?}");
                self.violated(text);
            }
            return;
        }
        outputs.push(output.clone());
        for mutation in mutations {
            match mutation {
                Mutation::Prepared(record) => self.promises(shard, record),
                Mutation::Unprepared(txn) => {
                    self.prepared.remove(&(shard, *txn));
                    self.finished(shard, *txn, command);
                }
                Mutation::Outcome(txn, Outcome::Committed { commit_ts })
                    if matches!(command, shard::Command::CommitOnePhase { .. }) =>
                {
                    if self.aborted.contains(txn) {
                        self.violated(format!("{txn} commits after somebody was told that it never happens"));
                    }
                    self.one_phase.insert(*txn, *commit_ts);
                }
                Mutation::Version { .. } | Mutation::Outcome(..) | Mutation::OutcomesBefore(_) => {}
            }
        }
    }

    fn promises(&mut self, shard: ShardId, record: &Prepared) {
        let promise = Promise { epoch: record.epoch, newest: self.newest };
        // Asked again by the same leader: the vote that counts may be the first one.
        let before = self.prepared.get(&(shard, record.txn));
        if before.is_none_or(|before| before.epoch != promise.epoch) {
            self.prepared.insert((shard, record.txn), promise);
        }
    }

    fn finished(&mut self, shard: ShardId, txn: TxnId, command: &shard::Command) {
        let shard::Command::Finish { decisions, .. } = command else { return };
        let word = decisions.iter().find(|(finished, _)| *finished == txn).map(|(_, word)| *word);
        match (word, self.decided.get(&txn)) {
            (Some(Decision::Commit { commit_ts }), decided) if decided != Some(&commit_ts) => {
                let text =
                    format!("shard {shard} commits {txn} at {commit_ts}, and the decision is {decided:?}");
                self.violated(text);
            }
            (Some(Decision::Commit { .. }), _) => drop(self.applied.insert((shard, txn))),
            (Some(Decision::Abort), Some(at)) => {
                let text = format!("shard {shard} aborts {txn}, which is committed at {at}");
                self.violated(text);
            }
            _ => {}
        }
    }

    /// What a replica has promised must be locked there, and nothing else.
    pub fn locked(&mut self, seat: Seat, state: &State) {
        let mut locks = Table::default();
        for (txn, record) in state.prepared() {
            locks.acquire(*txn, record.floor, &record.work);
        }
        if *state.locks() != locks {
            self.violated(format!("{seat:?} has promised {locks:?}, and has locked {:?}", state.locks()));
        }
    }

    // --- the last judgement -------------------------------------------------------------------------

    /// Replays everything, and says what was not as it should be.
    pub fn judge(&mut self) {
        let mut history: BTreeMap<Key, BTreeMap<Timestamp, Option<Value>>> = BTreeMap::new();
        let commits: Vec<(TxnId, Timestamp)> =
            self.decided.iter().chain(&self.one_phase).map(|(txn, at)| (*txn, *at)).collect();
        for (txn, at) in &commits {
            if self.aborted.contains(txn) {
                self.violated(format!("{txn} is committed at {at}, and somebody was told otherwise"));
            }
            let parts = self.submitted.get(txn).cloned().unwrap_or_default();
            for write in parts.into_iter().flat_map(|part| part.work.writes) {
                let before = history.entry(write.key.clone()).or_default().insert(*at, write.value);
                if before.is_some() {
                    self.violated(format!("two transactions wrote {} at {at}; one is {txn}", write.key));
                }
            }
        }
        self.judge_reads(&history);
        self.judge_scans(&history);
        self.judge_order();
    }

    fn judge_reads(&mut self, history: &BTreeMap<Key, BTreeMap<Timestamp, Option<Value>>>) {
        let reads = std::mem::take(&mut self.reads).into_iter();
        let reads = reads.flat_map(|(txn, all)| all.into_iter().map(move |(key, seen)| (txn, key, seen)));
        for (txn, key, seen) in reads {
            let newest = |upto: Timestamp| {
                let found = history.get(&key).and_then(|versions| versions.range(..=upto).next_back());
                found.map_or((Timestamp::ZERO, None), |(at, value)| (*at, value.clone()))
            };
            let (at, value) = newest(txn.start);
            if (seen.version, &seen.value) != (at, &value) {
                self.violated(format!(
                    "{txn} read {key} as {:?} of {}; at its start it was {value:?} of {at}",
                    seen.value, seen.version
                ));
            }
            if let Some(commit_ts) = self.commit_ts(txn) {
                let (at, _) = newest(Timestamp(commit_ts.0 - 1));
                if at != seen.version {
                    self.violated(format!(
                        "{txn} committed at {commit_ts} on {key} of {}; then it was of {at}",
                        seen.version
                    ));
                }
            }
        }
    }

    fn judge_scans(&mut self, history: &BTreeMap<Key, BTreeMap<Timestamp, Option<Value>>>) {
        let scans = std::mem::take(&mut self.scans).into_iter();
        let scans = scans.flat_map(|(txn, all)| all.into_iter().map(move |(range, seen)| (txn, range, seen)));
        for (txn, range, seen) in scans {
            let rows = |upto: Timestamp| -> Vec<(Key, Timestamp)> {
                let keys = history.iter().filter(|(key, _)| range.contains(key));
                let row = |(key, versions): (&Key, &BTreeMap<Timestamp, Option<Value>>)| {
                    let (at, value) = versions.range(..=upto).next_back()?;
                    value.as_ref().map(|_| (key.clone(), *at))
                };
                keys.filter_map(row).collect()
            };
            let seen: Vec<(Key, Timestamp)> = seen.into_iter().map(|row| (row.key, row.version)).collect();
            let moments = [Some(txn.start), self.commit_ts(txn).map(|at| Timestamp(at.0 - 1))];
            for moment in moments.into_iter().flatten() {
                let should = rows(moment);
                if seen != should {
                    self.violated(format!(
                        "{txn} scanned {range:?} as {seen:?}; at {moment} it was {should:?}"
                    ));
                }
            }
        }
    }

    /// Whoever began after somebody else's end comes after him.
    fn judge_order(&mut self) {
        let mut by_end: Vec<_> = self.operations.iter().copied().collect();
        by_end.sort_by_key(|(_, over, txn, _)| (*over, *txn));
        let by_begin = self.operations.clone();
        let mut ended = by_end.into_iter().peekable();
        let mut newest = (Timestamp::ZERO, None);
        for (begun, _, txn, moment) in by_begin {
            while let Some((_, _, earlier, at)) = ended.next_if(|(_, over, _, _)| *over < begun) {
                newest = newest.max((at, Some(earlier)));
            }
            if txn.start.min(moment) <= newest.0 {
                let (at, earlier) = newest;
                self.violated(format!("{txn} began after {earlier:?} had ended, and that is at {at}"));
            }
        }
    }
}
