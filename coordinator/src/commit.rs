//! The first phase of one transaction: who has voted, and what follows.
//!
//! ```text
//!            vote Yes, others are missing
//!              ┌────┐
//!              │    ▼      last vote is Yes
//!   begin ──► Voting ──────────────────────────► Agreed: draw a timestamp, decide
//!              │
//!              └── a vote is No, or one is missing at the deadline ──► Failed: presumed abort
//! ```
//!
//! Pure, and small on purpose: this is where "all have voted Yes" is decided.

use std::collections::BTreeSet;

use troth_protocol::message::shard::Vote;
use troth_protocol::message::txn::Cause;
use troth_protocol::mutation::{self, Bug};
use troth_protocol::{ParticipantId, Timestamp};

/// The votes of one transaction.
#[derive(Clone, PartialEq, Debug)]
pub struct Ballot {
    /// Everybody who votes.
    participants: Vec<ParticipantId>,
    /// Who has not voted yet.
    missing: BTreeSet<ParticipantId>,
    /// The commit timestamp must be larger.
    above: Timestamp,
}

/// What a vote led to.
#[derive(Clone, PartialEq, Debug)]
pub enum Step {
    /// Votes are missing.
    Wait,
    /// Everybody has voted Yes; it may be decided, at a moment after this.
    Agreed {
        /// The commit timestamp must be larger.
        above: Timestamp,
    },
    /// It cannot commit.
    Failed {
        /// Why.
        cause: Cause,
    },
}

impl Ballot {
    /// Asks these participants.
    ///
    /// # Panics
    /// If there are none, or one twice: such a transaction must have been refused.
    pub fn new(participants: Vec<ParticipantId>) -> Ballot {
        let missing: BTreeSet<ParticipantId> = participants.iter().cloned().collect();
        assert!(!missing.is_empty() && missing.len() == participants.len(), "each participant votes once");
        Ballot { participants, missing, above: Timestamp::ZERO }
    }

    /// Everybody who votes.
    pub fn participants(&self) -> &[ParticipantId] {
        &self.participants
    }

    /// Counts a vote. One that comes again changes nothing.
    pub fn vote(&mut self, by: &ParticipantId, vote: Vote) -> Step {
        match vote {
            Vote::No { cause } => Step::Failed { cause },
            Vote::Yes { above } => {
                self.above = self.above.max(above);
                let removed = self.missing.remove(by);
                let agreed = self.missing.is_empty()
                    || (mutation::on(Bug::CommitBeforeLastVote) && self.missing.len() == 1);
                if removed && agreed { Step::Agreed { above: self.above } } else { Step::Wait }
            }
        }
    }

    /// No more votes are waited for.
    pub fn expire(&self) -> Cause {
        let participant = self.missing.first().cloned().expect("a ballot that waits misses a vote");
        Cause::Unreachable { participant }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use troth_protocol::ShardId;

    fn shard(number: u16) -> ParticipantId {
        ParticipantId::Shard(ShardId(number))
    }

    fn yes(above: u64) -> Vote {
        Vote::Yes { above: Timestamp(above) }
    }

    #[test]
    fn all_must_agree_and_the_largest_floor_counts() {
        let mut ballot = Ballot::new(vec![shard(1), shard(2), shard(3)]);
        assert_eq!(ballot.vote(&shard(2), yes(7)), Step::Wait);
        assert_eq!(ballot.vote(&shard(2), yes(7)), Step::Wait, "twice is once");
        assert_eq!(ballot.vote(&shard(9), yes(7)), Step::Wait, "a stranger does not count");
        assert_eq!(ballot.vote(&shard(1), yes(9)), Step::Wait);
        assert_eq!(ballot.expire(), Cause::Unreachable { participant: shard(3) });
        assert_eq!(ballot.vote(&shard(3), yes(8)), Step::Agreed { above: Timestamp(9) });
        assert_eq!(ballot.vote(&shard(3), yes(8)), Step::Wait, "it is agreed once");
    }

    #[test]
    fn one_no_is_enough() {
        let mut ballot = Ballot::new(vec![shard(1), shard(2)]);
        assert_eq!(ballot.vote(&shard(1), yes(7)), Step::Wait);
        let failed = ballot.vote(&shard(2), Vote::No { cause: Cause::TooOld });
        assert_eq!(failed, Step::Failed { cause: Cause::TooOld });
    }

    #[test]
    #[should_panic(expected = "votes once")]
    fn nobody_votes_twice() {
        Ballot::new(vec![shard(1), shard(1)]);
    }
}
