//! The timestamp oracle: strictly increasing timestamps, across leaders, restarts and clock jumps.
//!
//! ```text
//!                last              ceiling, committed in the log
//! ───────────────┼───────────────────────┼──────────────────────────►
//!   handed out   │  may be handed out    │  a new leader begins here
//! ```
//!
//! The ceiling is moved ahead long before it is reached, so that nobody waits for it. A wall clock
//! that jumps ahead takes the timestamps with it, no further than the ceiling at a time; one that
//! jumps back does nothing.

use std::time::Duration;

use troth_protocol::Timestamp;
use troth_protocol::mutation::{self, Bug};

/// How far ahead of the clock the ceiling is set.
pub const CEILING_AHEAD: Duration = Duration::from_secs(6);

/// The ceiling is moved when less than this is left below it.
const CEILING_MARGIN: Duration = Duration::from_secs(3);

/// The oracle of one leader. Pure: the clock is an argument.
#[derive(Clone, Debug)]
pub struct Oracle {
    /// The last timestamp that was handed out, or that must not be handed out any more.
    last: Timestamp,
    /// Only timestamps below this are handed out.
    ceiling: Timestamp,
    /// The ceiling that was asked for.
    wanted: Timestamp,
}

impl Oracle {
    /// The oracle of a leader that finds this ceiling in the log: all of its timestamps are above.
    pub fn new(found: Timestamp) -> Oracle {
        let last = if mutation::on(Bug::OracleForgetsCeiling) { Timestamp::ZERO } else { found };
        Oracle { last, ceiling: found, wanted: found }
    }

    /// Hands out `count` consecutive timestamps, and returns the first; `None` while the ceiling is
    /// too low for them.
    pub fn next(&mut self, now_millis: u64, count: u64) -> Option<Timestamp> {
        let first = self.last.next().max(Timestamp::from_millis(now_millis));
        let last = first.advance(count.saturating_sub(1));
        if last >= self.ceiling {
            return None;
        }
        self.last = last;
        Some(first)
    }

    /// Hands out nothing at or below this any more. Returns whether that is durable already: if
    /// not, nobody may be told of this timestamp before the ceiling is above it.
    pub fn observe(&mut self, seen: Timestamp) -> bool {
        self.last = self.last.max(seen);
        self.last < self.ceiling
    }

    /// Whether every later leader will begin above a timestamp.
    pub fn covers(&self, timestamp: Timestamp) -> bool {
        timestamp < self.ceiling
    }

    /// The newest timestamp that was handed out or observed.
    pub fn last(&self) -> Timestamp {
        self.last
    }

    /// The ceiling to propose now, if it is time to.
    pub fn poll_ceiling(&mut self, now_millis: u64) -> Option<Timestamp> {
        let now = Timestamp::from_millis(now_millis).max(self.last);
        if now.plus(CEILING_MARGIN) < self.wanted {
            return None;
        }
        self.wanted = now.plus(CEILING_AHEAD);
        Some(self.wanted)
    }

    /// A ceiling is committed.
    pub fn raise(&mut self, ceiling: Timestamp) {
        self.ceiling = self.ceiling.max(ceiling);
    }

    /// A ceiling that was proposed may not have been committed: propose it again.
    pub fn ceiling_failed(&mut self) {
        self.wanted = self.ceiling;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_handed_out_before_the_first_ceiling_is_committed() {
        let mut oracle = Oracle::new(Timestamp::ZERO);
        assert_eq!(oracle.next(1_000, 1), None);
        let ceiling = oracle.poll_ceiling(1_000).expect("it wants one at once");
        assert_eq!(oracle.poll_ceiling(1_000), None, "once is enough");
        assert_eq!(oracle.next(1_000, 1), None, "proposed is not committed");
        oracle.raise(ceiling);
        assert_eq!(oracle.next(1_000, 1), Some(Timestamp::from_millis(1_000)));
        assert_eq!(oracle.next(1_000, 5), Some(Timestamp::from_millis(1_000).next()));
        assert_eq!(oracle.next(1_000, 1), Some(Timestamp::from_millis(1_000).advance(6)));
    }

    #[test]
    fn the_ceiling_moves_before_it_is_reached() {
        let mut oracle = Oracle::new(Timestamp::ZERO);
        let ceiling = oracle.poll_ceiling(0).expect("at once");
        oracle.raise(ceiling);
        let half = (CEILING_AHEAD - CEILING_MARGIN).as_millis() as u64;
        assert_eq!(oracle.poll_ceiling(half - 1), None);
        assert!(oracle.poll_ceiling(half).is_some_and(|next| next > ceiling));
    }

    #[test]
    fn a_clock_that_jumps_back_changes_nothing_and_one_that_jumps_ahead_waits_for_its_ceiling() {
        let mut oracle = Oracle::new(Timestamp::ZERO);
        let ceiling = oracle.poll_ceiling(1_000_000).expect("it wants one");
        oracle.raise(ceiling);
        let before = oracle.next(1_000_000, 1).expect("below the ceiling");
        assert_eq!(oracle.next(5, 1), Some(before.next()));
        assert_eq!(oracle.next(9_000_000, 1), None);
        let ceiling = oracle.poll_ceiling(9_000_000).expect("it wants one");
        oracle.raise(ceiling);
        assert_eq!(oracle.next(9_000_000, 1), Some(Timestamp::from_millis(9_000_000)));
    }

    #[test]
    fn what_a_shard_chose_is_not_handed_out_again_and_not_told_before_it_is_covered() {
        let mut oracle = Oracle::new(Timestamp::ZERO);
        let ceiling = oracle.poll_ceiling(1_000).expect("at once");
        oracle.raise(ceiling);
        let chosen = Timestamp::from_millis(1_500);
        assert!(oracle.observe(chosen));
        assert_eq!(oracle.next(1_000, 1), Some(chosen.next()));
        assert!(!oracle.observe(ceiling.next()), "a new leader could hand it out again");
        let higher = oracle.poll_ceiling(1_000).expect("there is no room left");
        oracle.raise(higher);
        assert!(oracle.observe(ceiling.next()));
    }

    proptest! {
        /// Leaders come and go, each with a clock of its own; what was proposed last by one that is
        /// gone may or may not be committed.
        #[test]
        fn timestamps_increase_across_leaders_and_clocks(
            leaders in proptest::collection::vec(
                (proptest::collection::vec((0u64..100_000, 1u64..100, any::<bool>()), 1..20), any::<bool>()), 1..8)
        ) {
            let (mut newest, mut committed) = (Timestamp::ZERO, Timestamp::ZERO);
            for (steps, last_commits) in leaders {
                let mut oracle = Oracle::new(committed);
                let mut proposed = None;
                for (now, count, commit) in steps {
                    proposed = oracle.poll_ceiling(now).or(proposed);
                    if commit && let Some(ceiling) = proposed.take() {
                        committed = committed.max(ceiling);
                        oracle.raise(ceiling);
                    }
                    if let Some(first) = oracle.next(now, count) {
                        prop_assert!(first > newest, "{first} after {newest}");
                        newest = first.advance(count - 1);
                    }
                }
                if last_commits && let Some(ceiling) = proposed {
                    committed = committed.max(ceiling);
                }
            }
        }
    }
}
