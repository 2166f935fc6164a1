//! Where one replica stands in the log of its group: what it believes, what it knows, what it has applied.

use troth_protocol::Reject;

use super::calls::node_id;
use super::group::{Command, Entry, ProposalId};
use super::shared::Shared;
use super::{Item, Pace, Seat};

/// The log as one replica sees it. What waits for the log is a `T`.
#[derive(Clone, Debug)]
pub struct Log<T> {
    seat: Seat,
    /// The term in which it believes to lead.
    term: Option<u64>,
    /// The newest term that it has heard of.
    heard: u64,
    /// How far the log is committed, as far as it knows, and applied.
    commit: u64,
    applied: u64,
    applying: bool,
    /// Its own first entry, on its way.
    lead: Option<ProposalId>,
    /// What is done when it is proven that it leads.
    barriers: std::collections::BTreeMap<u64, T>,
    /// The same, once this much is applied.
    passing: Vec<(u64, T)>,
}

impl<T: std::fmt::Debug> Log<T> {
    /// The log of a replica that has applied so much of it.
    pub fn new(seat: Seat, applied: u64) -> Log<T> {
        Log {
            seat,
            term: None,
            heard: 0,
            commit: applied,
            applied,
            applying: false,
            lead: None,
            barriers: Default::default(),
            passing: Vec::new(),
        }
    }

    /// How far it is applied.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Whether it knows already that the log is committed so far.
    pub fn knows(&self, upto: u64) -> bool {
        self.commit >= upto
    }

    /// Whether it has heard of a term, or of a later one.
    pub fn has_heard(&self, term: u64) -> bool {
        self.heard >= term
    }

    /// Whether something waits for a barrier.
    pub fn awaits(&self, barrier: u64) -> bool {
        self.barriers.contains_key(&barrier)
    }

    /// Whether the replica believes to lead.
    pub fn believes_to_lead(&self) -> bool {
        self.term.is_some()
    }

    /// What is told to those who take the replica for the leader.
    pub fn not_leader(&self, shared: &Shared) -> Reject {
        let leader = shared.groups[&self.seat.group].leader.filter(|leader| *leader != self.seat.at);
        Reject::NotLeader { leader: leader.map(node_id) }
    }

    /// Proposes a command, if the replica believes to lead.
    pub fn propose(&self, shared: &mut Shared, command: Command) -> Option<ProposalId> {
        Some(shared.propose(self.seat, self.term?, command))
    }

    /// Hears that it leads in a term, or that its own has ended. Returns whether that is news.
    pub fn role(&mut self, term: u64, leads: bool) -> bool {
        let news = term > self.heard;
        if news {
            self.heard = term;
            self.term = leads.then_some(term);
            self.lead = None;
        }
        news
    }

    /// Proposes the first entry of a leader.
    pub fn take_lead(&mut self, shared: &mut Shared, command: Command) {
        self.lead = self.propose(shared, command);
    }

    /// Whether an entry is its own first one.
    pub fn is_lead(&mut self, entry: &Entry) -> bool {
        self.lead.take_if(|lead| *lead == entry.proposal).is_some()
    }

    /// Begins to ask a majority whether it leads, and keeps what is to be done then.
    ///
    /// # Errors
    /// If it does not believe so itself: then nothing is kept.
    pub fn ask_barrier(&mut self, shared: &mut Shared, then: T) -> Result<(), T> {
        if self.term.is_none() {
            return Err(then);
        }
        let barrier = shared.barrier(self.seat, &then);
        self.barriers.insert(barrier, then);
        Ok(())
    }

    /// A majority has answered. What may be done now is returned, or what may not.
    pub fn barrier(&mut self, shared: &Shared, barrier: u64, majority: bool) -> Option<Result<T, T>> {
        let then = self.barriers.remove(&barrier)?;
        let group = &shared.groups[&self.seat.group];
        let led = self.term.is_some_and(|term| group.is_led(self.seat.at, term));
        if !majority || !led {
            return Some(Err(then));
        }
        if self.applied >= group.committed() {
            return Some(Ok(then));
        }
        self.passing.push((group.committed(), then));
        None
    }

    /// All that waited for proof, of one who does not lead any more.
    pub fn give_up(&mut self) -> Vec<T> {
        let passing = std::mem::take(&mut self.passing).into_iter().map(|(_, then)| then);
        std::mem::take(&mut self.barriers).into_values().chain(passing).collect()
    }

    /// Hears how far the log is committed.
    pub fn learn(&mut self, shared: &mut Shared, upto: u64) {
        self.commit = self.commit.max(upto);
        self.apply_on(shared);
    }

    fn apply_on(&mut self, shared: &mut Shared) {
        if self.applied < self.commit && !self.applying {
            self.applying = true;
            shared.emit(Pace::Local, Item::Apply { seat: self.seat });
        }
    }

    /// The next entry to apply, and its index.
    pub fn next(&mut self, shared: &Shared) -> Option<(u64, Entry)> {
        self.applying = false;
        let index = self.applied + 1;
        Some((index, shared.groups[&self.seat.group].entry(index)?.clone()))
    }

    /// The next entry is applied.
    pub fn applied_next(&mut self) {
        self.applied += 1;
    }

    /// Goes on to the next entry. What waited for this much is returned.
    pub fn go_on(&mut self, shared: &mut Shared) -> Vec<T> {
        let passing = std::mem::take(&mut self.passing);
        let (passed, passing): (Vec<_>, Vec<_>) =
            passing.into_iter().partition(|(at, _)| *at <= self.applied);
        self.passing = passing;
        self.apply_on(shared);
        passed.into_iter().map(|(_, then)| then).collect()
    }
}
