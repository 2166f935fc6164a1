//! What happened to transactions lately, for operators who ask.
//!
//! Each server remembers a bounded number of moments, the newest of all transactions together. It
//! is memory only: what must survive is in logs and stores.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::clock::Clock;
use crate::id::{ShardId, TxnId};
use crate::message::admin::Moment;

/// Moments that a server remembers.
const MOMENTS_MAX: usize = 1 << 15;

/// The memory of one server.
pub struct Timeline {
    clock: Clock,
    moments: Mutex<VecDeque<Noted>>,
}

struct Noted {
    txn: TxnId,
    at_ms: u64,
    shard: Option<ShardId>,
    what: &'static str,
}

impl Timeline {
    /// An empty one.
    pub fn new(clock: &Clock) -> Timeline {
        Timeline { clock: clock.clone(), moments: Mutex::default() }
    }

    /// Notes what happens to a transaction now, at a shard or with one, if it is about one.
    pub fn note(&self, txn: TxnId, shard: Option<ShardId>, what: &'static str) {
        let moment = Noted { txn, at_ms: self.clock.millis(), shard, what };
        let mut moments = self.moments.lock();
        if moments.len() == MOMENTS_MAX {
            moments.pop_front();
        }
        moments.push_back(moment);
    }

    /// What is remembered of a transaction, oldest first.
    pub fn of(&self, txn: TxnId) -> Vec<Moment> {
        let moments = self.moments.lock();
        let of_it = moments.iter().filter(|moment| moment.txn == txn);
        of_it
            .map(|noted| Moment { at_ms: noted.at_ms, shard: noted.shard, what: noted.what.into() })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ClientId, Timestamp};

    #[test]
    fn the_newest_moments_are_remembered() {
        let timeline = Timeline::new(&Clock::system());
        let txn = |start| TxnId { start: Timestamp(start), client: ClientId(1) };
        timeline.note(txn(1), None, "first");
        timeline.note(txn(2), Some(ShardId(3)), "other");
        timeline.note(txn(1), None, "second");
        let what = |start| timeline.of(txn(start)).into_iter().map(|moment| moment.what).collect::<Vec<_>>();
        assert_eq!(what(1), ["first", "second"]);
        assert_eq!(timeline.of(txn(2))[0].shard, Some(ShardId(3)));
        for _ in 0..MOMENTS_MAX - 1 {
            timeline.note(txn(9), None, "more");
        }
        assert_eq!((what(1), what(2)), (vec!["second".to_owned()], vec![]));
    }
}
