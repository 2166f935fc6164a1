//! What only the leader of a shard knows, and forgets when it is deposed.
//!
//! - Up to when the shard has been read: a one-shard transaction commits later than that.
//! - One-shard transactions on their way through the log: readers treat their writes like locks.
//! - Aborts that have overtaken what they abort, so that it is not left prepared.
//! - Reads that wait for a transaction to end, and whom to ask when it does not end by itself.
//!
//! ```text
//! Read ──► nothing in the way ─────────────────────────────► Serve
//!      └─► a prepared transaction may have written before ─► wait ── Applied: it ended ─► look again
//!                                                             └── 20 ms later ─► Ask the coordinator
//! ```
//!
//! Pure: time is an argument, effects are handed out by [`Leader::poll_effect`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use troth_protocol::message::coordinator::Resolution;
use troth_protocol::message::shard::Decision;
use troth_protocol::message::txn::{Cause, Work};
use troth_protocol::mutation::{self, Bug};
use troth_protocol::{Epoch, Key, KeyRange, Timestamp, TxnId};

use super::state::State;
use crate::locks::Conflict;

/// A transaction that a reader waits for is asked about after this long.
pub const ASK_FOR_READER: Duration = Duration::from_millis(20);

/// A prepared transaction that nobody waits for is asked about after this long.
pub const ASK_AFTER: Duration = Duration::from_secs(1);

/// Transactions that one question names.
const ASK_MAX: usize = 256;

/// Reads that may wait at one shard.
pub const WAITING_MAX: usize = 16 << 10;

/// Aborts that are remembered because what they abort is not prepared here.
pub const EARLY_ABORTS_MAX: usize = 4096;

/// What a read looks at.
#[derive(Clone, PartialEq, Debug)]
pub enum Target {
    /// Keys.
    Keys(Vec<Key>),
    /// A range.
    Range(KeyRange),
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// Somebody wants to read.
    Read {
        /// Names the read.
        id: u64,
        /// The snapshot.
        at: Timestamp,
        /// What it looks at.
        target: Target,
    },
    /// A one-shard transaction was not proposed after all.
    NotProposed {
        /// The transaction.
        txn: TxnId,
    },
    /// A read does not wait any longer.
    GaveUp {
        /// The read.
        id: u64,
    },
    /// Commands were applied, and their effect is visible.
    Applied {
        /// Transactions that are prepared now.
        prepared: Vec<TxnId>,
        /// Transactions that hold nothing here any more.
        ended: Vec<TxnId>,
    },
    /// The coordinator has answered.
    Resolved {
        /// Its epoch.
        epoch: Epoch,
        /// What it says.
        resolutions: Vec<(TxnId, Resolution)>,
    },
    /// The coordinator could not be asked; or what it said has been tried, whatever came of it.
    NotResolved {
        /// What it is asked about again, if that has not ended.
        txns: Vec<TxnId>,
    },
}

/// What is to be done.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// A read may look now.
    Serve {
        /// The read.
        id: u64,
    },
    /// A read cannot be kept waiting.
    Refuse {
        /// The read.
        id: u64,
    },
    /// Ask the coordinator about these.
    Ask {
        /// The transactions.
        txns: Vec<TxnId>,
    },
    /// Propose what the coordinator said, now or before it could be done.
    Finish {
        /// Its epoch.
        epoch: Epoch,
        /// What it decided.
        decisions: Vec<(TxnId, Decision)>,
    },
}

#[derive(Clone, Debug)]
struct WaitingRead {
    at: Timestamp,
    target: Target,
    blocker: Conflict,
}

#[derive(Clone, Debug)]
struct OnePhase {
    /// The earliest moment at which it may commit, if it is on its way more than once.
    commit_ts: Timestamp,
    writes: BTreeSet<Key>,
    /// How often it is on its way.
    proposals: usize,
}

#[derive(Clone, Copy, Debug)]
enum Doubt {
    /// To be asked about at this moment.
    AskAt(Instant),
    /// Asked, and not answered yet.
    Asked,
}

/// The volatile side of a shard's leader.
#[derive(Clone, Debug)]
pub struct Leader {
    lead: u64,
    max_read: Timestamp,
    /// The largest commit timestamp that this leader has proposed, applied or not.
    max_proposed: Timestamp,
    one_phase: BTreeMap<TxnId, OnePhase>,
    /// Transactions that were aborted before they were prepared here, and the epoch of who said so.
    early_aborts: BTreeMap<TxnId, Epoch>,
    waiting: BTreeMap<u64, WaitingRead>,
    waiting_for: BTreeMap<TxnId, BTreeSet<u64>>,
    doubts: BTreeMap<TxnId, Doubt>,
    /// The doubts that are to be asked about, by when.
    asks: BTreeSet<(Instant, TxnId)>,
    effects: VecDeque<Effect>,
}

impl Leader {
    /// A new leader, named by its entry in the log, and a timestamp that the oracle gave out after
    /// the last one that any earlier leader can have served a read at.
    pub fn new(lead: u64, fresh: Timestamp, now: Instant, state: &State) -> Leader {
        let fresh = if mutation::on(Bug::ShardLeaderWithoutFreshTime) { Timestamp::ZERO } else { fresh };
        let mut leader = Leader {
            lead,
            max_read: fresh,
            max_proposed: Timestamp::ZERO,
            one_phase: BTreeMap::new(),
            early_aborts: BTreeMap::new(),
            waiting: BTreeMap::new(),
            waiting_for: BTreeMap::new(),
            doubts: BTreeMap::new(),
            asks: BTreeSet::new(),
            effects: VecDeque::new(),
        };
        for txn in state.prepared().keys() {
            leader.ask_at(*txn, now + ASK_FOR_READER);
        }
        leader
    }

    /// Which leadership this is.
    pub fn lead(&self) -> u64 {
        self.lead
    }

    /// A vote of now holds for commits after this moment.
    pub fn vote_above(&self, state: &State) -> Timestamp {
        self.max_read.max(state.marks().last_commit)
    }

    /// Reads that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Reads that wait for a transaction.
    pub fn waiting_for(&self, txn: TxnId) -> impl ExactSizeIterator<Item = (Timestamp, &Key)> {
        static NONE: BTreeSet<u64> = BTreeSet::new();
        let reads = self.waiting_for.get(&txn).unwrap_or(&NONE).iter();
        reads.map(|id| &self.waiting[id]).map(|read| (read.at, &read.blocker.key))
    }

    /// The prepared transaction that a read waits for.
    pub fn blocker(&self, id: u64) -> Option<&Conflict> {
        self.waiting.get(&id).map(|read| &read.blocker)
    }

    /// Chooses the moment at which a one-shard transaction commits if its check succeeds, and from
    /// here on keeps readers of later moments from its writes. The caller proposes it at once.
    ///
    /// # Errors
    /// If it meets a lock: there is no use in proposing it.
    pub fn begin_one_phase(
        &mut self,
        state: &State,
        txn: TxnId,
        floor: Timestamp,
        work: &Work,
    ) -> Result<Timestamp, Cause> {
        if let Some(conflict) = state.locks().conflict(txn, work) {
            return Err(Cause::Locked { key: conflict.key, by: conflict.by });
        }
        let mut earliest = floor.max(txn.start).max(self.vote_above(state)).max(self.max_proposed);
        if mutation::on(Bug::OnePhaseIgnoresReads) {
            earliest = floor.max(txn.start).max(state.marks().last_commit).max(self.max_proposed);
        }
        let commit_ts = earliest.next();
        self.max_proposed = commit_ts;
        let pending = self.one_phase.entry(txn).or_insert_with(|| OnePhase {
            commit_ts,
            writes: BTreeSet::new(),
            proposals: 0,
        });
        pending.writes.extend(work.writes.iter().map(|write| write.key.clone()));
        pending.proposals += 1;
        Ok(commit_ts)
    }

    /// Notes decisions that have come. An abort of what is not prepared here may have overtaken the question
    /// for the vote, or the promise on its way through the log.
    pub fn note_early_aborts(&mut self, state: &State, epoch: Epoch, decisions: &[(TxnId, Decision)]) {
        for (txn, decision) in decisions {
            if *decision == Decision::Abort && !state.prepared().contains_key(txn) {
                self.early_aborts.insert(*txn, epoch);
            }
        }
        while self.early_aborts.len() > EARLY_ABORTS_MAX {
            // The oldest: nobody asks for its vote any more.
            self.early_aborts.pop_first();
        }
    }

    /// Whether a coordinator that asks for a vote, or a newer one, has said already that it is aborted.
    pub fn is_aborted_early(&self, txn: TxnId, epoch: Epoch) -> bool {
        self.early_aborts.get(&txn).is_some_and(|by| *by >= epoch)
    }

    /// Notes decisions that are about to be proposed.
    pub fn begin_finish(&mut self, decisions: &[(TxnId, Decision)]) {
        for (_, decision) in decisions {
            if let Decision::Commit { commit_ts } = decision {
                self.max_proposed = self.max_proposed.max(*commit_ts);
            }
        }
    }

    /// Takes in what happened.
    pub fn handle_event(&mut self, now: Instant, event: Event, state: &State) {
        match event {
            Event::Read { id, at, target } => self.read(now, id, at, target, state),
            Event::GaveUp { id } => {
                if let Some(read) = self.waiting.remove(&id) {
                    self.stop_waiting(read.blocker.by, id);
                }
            }
            Event::NotProposed { txn } => {
                if let Some(pending) = self.one_phase.get_mut(&txn) {
                    pending.proposals -= 1;
                    if pending.proposals == 0 {
                        self.ended(now, txn, state);
                    }
                }
            }
            Event::Applied { prepared, ended } => {
                for txn in prepared {
                    self.ask_at(txn, now + ASK_AFTER);
                    let promised = state.prepared().get(&txn).map(|record| record.epoch);
                    if let Some(epoch) = self.early_aborts.remove(&txn)
                        && promised.is_some_and(|promised| promised <= epoch)
                    {
                        let decisions = vec![(txn, Decision::Abort)];
                        self.effects.push_back(Effect::Finish { epoch, decisions });
                    }
                }
                for txn in ended {
                    self.ended(now, txn, state);
                }
            }
            Event::Resolved { epoch, resolutions } => {
                let mut decisions = Vec::new();
                for (txn, resolution) in resolutions {
                    match resolution {
                        Resolution::Committed { commit_ts } => {
                            decisions.push((txn, Decision::Commit { commit_ts }));
                        }
                        Resolution::Aborted => decisions.push((txn, Decision::Abort)),
                        Resolution::InFlight => self.ask_again(now, txn),
                    }
                }
                if !decisions.is_empty() {
                    self.effects.push_back(Effect::Finish { epoch, decisions });
                }
            }
            Event::NotResolved { txns } => {
                for txn in txns {
                    self.ask_again(now, txn);
                }
            }
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut txns = Vec::new();
        while let Some(&(at, txn)) = self.asks.first()
            && at <= now
            && txns.len() < ASK_MAX
        {
            self.asks.pop_first();
            self.doubts.insert(txn, Doubt::Asked);
            txns.push(txn);
        }
        if !txns.is_empty() {
            self.effects.push_back(Effect::Ask { txns });
        }
    }

    /// When [`Leader::handle_timeout`] is due next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.asks.first().map(|(at, _)| *at)
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// A transaction holds nothing here any more: whoever waited for it looks again. If it is prepared all
    /// the same, it was only fenced off as a one-shard transaction, and is still to be asked about.
    fn ended(&mut self, now: Instant, txn: TxnId, state: &State) {
        self.one_phase.remove(&txn);
        if !state.prepared().contains_key(&txn)
            && let Some(Doubt::AskAt(at)) = self.doubts.remove(&txn)
        {
            self.asks.remove(&(at, txn));
        }
        for id in self.waiting_for.remove(&txn).unwrap_or_default() {
            if let Some(read) = self.waiting.remove(&id) {
                self.read(now, id, read.at, read.target, state);
            }
        }
    }

    fn read(&mut self, now: Instant, id: u64, at: Timestamp, target: Target, state: &State) {
        match self.obstacle(at, &target, state) {
            None => {
                self.max_read = self.max_read.max(at);
                self.effects.push_back(Effect::Serve { id });
            }
            Some(_) if self.waiting.len() >= WAITING_MAX => self.effects.push_back(Effect::Refuse { id }),
            Some(blocker) => {
                if state.prepared().contains_key(&blocker.by) {
                    self.hurry(blocker.by, now + ASK_FOR_READER);
                }
                self.waiting_for.entry(blocker.by).or_default().insert(id);
                self.waiting.insert(id, WaitingRead { at, target, blocker });
            }
        }
    }

    /// The transaction that may have written what a read wants to see, and has not ended.
    fn obstacle(&self, at: Timestamp, target: &Target, state: &State) -> Option<Conflict> {
        if mutation::on(Bug::ReadIgnoresLock) {
            return None;
        }
        let writes_by = |txn: &TxnId, key: &Key| Conflict { key: key.clone(), by: *txn };
        let early = || self.one_phase.iter().filter(|(_, pending)| pending.commit_ts <= at);
        match target {
            Target::Keys(keys) => keys.iter().find_map(|key| {
                let pending = || {
                    early()
                        .find(|(_, pending)| pending.writes.contains(key))
                        .map(|(txn, _)| writes_by(txn, key))
                };
                state.locks().blocks_read(key, at).or_else(pending)
            }),
            Target::Range(range) => state.locks().blocks_scan(range, at).or_else(|| {
                early().find_map(|(txn, pending)| {
                    pending.writes.iter().find(|key| range.contains(key)).map(|key| writes_by(txn, key))
                })
            }),
        }
    }

    fn stop_waiting(&mut self, blocker: TxnId, id: u64) {
        if let Some(ids) = self.waiting_for.get_mut(&blocker) {
            ids.remove(&id);
            if ids.is_empty() {
                self.waiting_for.remove(&blocker);
            }
        }
    }

    fn ask_at(&mut self, txn: TxnId, at: Instant) {
        if let Some(Doubt::AskAt(before)) = self.doubts.insert(txn, Doubt::AskAt(at)) {
            self.asks.remove(&(before, txn));
        }
        self.asks.insert((at, txn));
    }

    /// Asks earlier than planned, if it is not asked about already.
    fn hurry(&mut self, txn: TxnId, at: Instant) {
        match self.doubts.get(&txn) {
            Some(Doubt::AskAt(planned)) if *planned <= at => {}
            Some(Doubt::Asked) => {}
            Some(Doubt::AskAt(_)) | None => self.ask_at(txn, at),
        }
    }

    fn ask_again(&mut self, now: Instant, txn: TxnId) {
        // Not if it has ended meanwhile.
        if self.doubts.contains_key(&txn) {
            let wait = if self.waiting_for.contains_key(&txn) { ASK_FOR_READER } else { ASK_AFTER };
            self.ask_at(txn, now + wait);
        }
    }
}
