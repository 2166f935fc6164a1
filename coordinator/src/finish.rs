//! The second phase: decisions on their way to the participants, until all have applied them.
//!
//! Each shard has a queue. What waits in it when a message may go out goes out as one, and a shard
//! that is slow or dead holds up nobody else. A commit is repeated until it is acknowledged. An
//! abort is a courtesy, since a participant in doubt asks: it is given up after one attempt.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use troth_protocol::message::shard::Decision;
use troth_protocol::mutation::{self, Bug};
use troth_protocol::{ParticipantId, ShardId, TxnId};

/// Decisions that one message carries.
const BATCH_MAX: usize = 256;

/// Messages to one shard that may be under way at once.
const SENDING_MAX: usize = 4;

/// Aborts that may wait for one shard.
const ABORTS_MAX: usize = 4096;

/// Decisions on their way.
#[derive(Clone, Default, Debug)]
pub struct Courier {
    queues: BTreeMap<ShardId, Queue>,
    /// For each commit, who has not applied it yet.
    missing: BTreeMap<TxnId, BTreeSet<ShardId>>,
}

#[derive(Clone, Default, Debug)]
struct Queue {
    waiting: VecDeque<(TxnId, Decision)>,
    sending: usize,
    aborts: usize,
}

impl Courier {
    /// Takes a decision to its participants.
    pub fn dispatch(&mut self, txn: TxnId, decision: Decision, participants: &[ParticipantId]) {
        let shards: BTreeSet<ShardId> = participants.iter().filter_map(ParticipantId::shard).collect();
        for shard in &shards {
            let full = self.queues.get(shard).is_some_and(|queue| queue.aborts >= ABORTS_MAX);
            if decision != Decision::Abort || !full {
                self.enqueue(*shard, txn, decision);
            }
        }
        if decision != Decision::Abort {
            self.missing.insert(txn, shards);
        }
    }

    /// Tells one shard what became of a transaction that it asked about, without waiting for others.
    pub fn enqueue(&mut self, shard: ShardId, txn: TxnId, decision: Decision) {
        let queue = self.queues.entry(shard).or_default();
        if decision == Decision::Abort {
            queue.aborts += 1;
        }
        queue.waiting.push_back((txn, decision));
    }

    /// The next message that may go out.
    pub fn poll_message(&mut self) -> Option<(ShardId, Vec<(TxnId, Decision)>)> {
        let ready = |queue: &Queue| queue.sending < SENDING_MAX && !queue.waiting.is_empty();
        let (shard, queue) = self.queues.iter_mut().find(|(_, queue)| ready(queue))?;
        queue.sending += 1;
        let count = queue.waiting.len().min(BATCH_MAX);
        let decisions: Vec<_> = queue.waiting.drain(..count).collect();
        queue.aborts -= aborts(&decisions);
        Some((*shard, decisions))
    }

    /// A message was answered: all of it is applied. Returns the transactions that nobody misses
    /// any more.
    pub fn delivered(&mut self, shard: ShardId, decisions: &[(TxnId, Decision)]) -> Vec<TxnId> {
        self.sent(shard);
        let mut done = Vec::new();
        for (txn, _) in decisions {
            if let Some(missing) = self.missing.get_mut(txn) {
                missing.remove(&shard);
                if missing.is_empty() || mutation::on(Bug::ForgetBeforeAll) {
                    self.missing.remove(txn);
                    done.push(*txn);
                }
            }
        }
        done
    }

    /// A message was not answered: its commits wait again, before all others.
    pub fn failed(&mut self, shard: ShardId, decisions: Vec<(TxnId, Decision)>) {
        self.sent(shard);
        let queue = self.queues.entry(shard).or_default();
        for (txn, decision) in decisions.into_iter().rev() {
            if decision != Decision::Abort {
                queue.waiting.push_front((txn, decision));
            }
        }
    }

    /// Commits that somebody has not applied.
    pub fn unfinished(&self) -> usize {
        self.missing.len()
    }

    fn sent(&mut self, shard: ShardId) {
        let queue = self.queues.get_mut(&shard).expect("a message was sent to this shard");
        queue.sending -= 1;
    }
}

fn aborts(decisions: &[(TxnId, Decision)]) -> usize {
    decisions.iter().filter(|(_, decision)| *decision == Decision::Abort).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use troth_protocol::{ClientId, Timestamp};

    fn txn(number: u64) -> TxnId {
        TxnId { start: Timestamp(number), client: ClientId(0) }
    }

    fn shards(numbers: &[u16]) -> Vec<ParticipantId> {
        numbers.iter().map(|number| ParticipantId::Shard(ShardId(*number))).collect()
    }

    const COMMIT: Decision = Decision::Commit { commit_ts: Timestamp(99) };

    #[test]
    fn a_commit_is_done_when_all_have_applied_it() {
        let mut courier = Courier::default();
        courier.dispatch(txn(1), COMMIT, &shards(&[1, 2]));
        let (first, to_first) = courier.poll_message().expect("one for shard 1");
        let (second, to_second) = courier.poll_message().expect("one for shard 2");
        assert_eq!((first, second), (ShardId(1), ShardId(2)));
        assert_eq!(courier.poll_message(), None);
        assert_eq!(courier.delivered(first, &to_first), []);
        assert_eq!(courier.unfinished(), 1);
        courier.failed(second, to_second.clone());
        assert_eq!(courier.poll_message(), Some((second, to_second.clone())), "it is repeated");
        assert_eq!(courier.delivered(second, &to_second), [txn(1)]);
        assert_eq!(courier.unfinished(), 0);
    }

    #[test]
    fn what_waits_shares_a_message_and_a_shard_that_is_slow_holds_up_nobody() {
        let mut courier = Courier::default();
        for number in 0..SENDING_MAX as u64 {
            courier.dispatch(txn(number), COMMIT, &shards(&[1]));
            assert!(courier.poll_message().is_some());
        }
        courier.dispatch(txn(100), COMMIT, &shards(&[1]));
        courier.dispatch(txn(101), COMMIT, &shards(&[1]));
        courier.dispatch(txn(102), COMMIT, &shards(&[2]));
        assert_eq!(courier.poll_message(), Some((ShardId(2), vec![(txn(102), COMMIT)])));
        assert_eq!(courier.poll_message(), None, "shard 1 has enough under way");
        courier.delivered(ShardId(1), &[(txn(0), COMMIT)]);
        let together = vec![(txn(100), COMMIT), (txn(101), COMMIT)];
        assert_eq!(courier.poll_message(), Some((ShardId(1), together)));
    }

    #[test]
    fn an_abort_is_sent_once() {
        let mut courier = Courier::default();
        courier.dispatch(txn(1), Decision::Abort, &shards(&[1]));
        let (shard, message) = courier.poll_message().expect("it is sent");
        courier.failed(shard, message);
        assert_eq!(courier.poll_message(), None);
        assert_eq!(courier.unfinished(), 0);
    }

    #[test]
    fn aborts_for_a_dead_shard_do_not_pile_up() {
        let mut courier = Courier::default();
        for number in 0..2 * ABORTS_MAX as u64 {
            courier.dispatch(txn(number), Decision::Abort, &shards(&[1]));
        }
        assert_eq!(courier.queues[&ShardId(1)].waiting.len(), ABORTS_MAX);
        courier.dispatch(txn(0), COMMIT, &shards(&[1]));
        assert_eq!(courier.queues[&ShardId(1)].waiting.len(), ABORTS_MAX + 1, "commits always find a place");
    }
}
