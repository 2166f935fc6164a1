//! The replicated log, modelled: a log of entries that are committed, and some that a leader has on their
//! way.
//!
//! ```text
//!   committed: the same for all, applied by each at its own pace     flying: of the leader of this term
//!   ┌────┬────┬────┬────┬────┐                                       ┌────┬────┬────┐
//!   │ 1  │ 2  │ 3  │ 4  │ 5  │ ◄── replicated, one after another ─── │    │    │    │ ◄── proposed
//!   └────┴────┴────┴────┴────┘                                       └────┴────┴────┘
//! ```
//!
//! An election ends the term. Of what was flying, the first so many turn out to be in the new leader's
//! log, and the rest never was: the fate of each is open until then. Whoever led may not know for long
//! that it does not any more. What it proposes goes nowhere, and its barriers fail.
//!
//! That a real log is like this, openraft is trusted with; the real one is tested one layer up.

use std::collections::VecDeque;
use std::sync::Arc;

use troth_coordinator::command as coordinator;
use troth_participant::shard::command as shard;

use super::Address;

/// Names a proposal, for ever.
pub type ProposalId = u64;

/// What a log holds.
#[derive(Clone, PartialEq, Debug)]
pub enum Command {
    /// An entry of the coordinators' log.
    Coordinator(coordinator::Command),
    /// An entry of a shard's log.
    Shard(shard::Command),
}

/// An entry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Which proposal it was.
    pub proposal: ProposalId,
    /// What it says.
    pub command: Arc<Command>,
}

/// A group of replicas with one log.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// Those who have a vote.
    pub members: Vec<Address>,
    /// Counts elections.
    pub term: u64,
    /// Who was elected last.
    pub leader: Option<Address>,
    /// What is committed; the first entry has index 1.
    log: Vec<Entry>,
    /// What the leader of this term has proposed, and no majority has yet.
    flying: VecDeque<Entry>,
}

impl Group {
    /// A group of these, without a leader.
    pub fn new(members: Vec<Address>) -> Group {
        Group { members, ..Group::default() }
    }

    /// The index of the last entry that is committed.
    pub fn committed(&self) -> u64 {
        self.log.len() as u64
    }

    /// The entry at an index.
    pub fn entry(&self, index: u64) -> Option<&Entry> {
        self.log.get(index.checked_sub(1)? as usize)
    }

    /// How many entries are on their way.
    pub fn flying(&self) -> usize {
        self.flying.len()
    }

    /// Whether this proposal is on its way in this term.
    pub fn is_flying(&self, term: u64, proposal: ProposalId) -> bool {
        term == self.term && self.flying.iter().any(|entry| entry.proposal == proposal)
    }

    /// Whether somebody is the leader of this term.
    pub fn is_led(&self, by: Address, term: u64) -> bool {
        self.leader == Some(by) && self.term == term
    }

    /// Takes a proposal of somebody who believes to lead. Returns whether it is on its way.
    pub fn propose(&mut self, by: Address, term: u64, entry: Entry) -> bool {
        let leads = self.is_led(by, term);
        if leads {
            self.flying.push_back(entry);
        }
        leads
    }

    /// A majority has everything up to this proposal. Returns whether anything is committed by that.
    pub fn replicated(&mut self, term: u64, proposal: ProposalId) -> bool {
        let found = self.flying.iter().position(|entry| entry.proposal == proposal);
        let Some(last) = found.filter(|_| term == self.term) else {
            return false;
        };
        self.log.extend(self.flying.drain(..=last));
        true
    }

    /// Another term begins, with another leader or the same; what is on its way and not among the first
    /// `survive` is lost. Returns who led.
    pub fn elect(&mut self, leader: Address, survive: usize) -> Option<Address> {
        self.term += 1;
        self.log.extend(self.flying.drain(..).take(survive));
        self.leader.replace(leader)
    }
}
