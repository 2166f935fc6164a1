//! What the leader sees of the cluster: what participants say with their signs of life, who began to
//! lead what, and what became of transactions in the last minutes. For operators; nothing depends on it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hdrhistogram::Histogram;
use tokio::time::{Duration, Instant};
use troth_protocol::message::overview::{Election, NodeReport, NodeView, SILENT_MS, Second};
use troth_protocol::{NodeId, ShardId};

/// Seconds that are remembered.
const SECONDS_MAX: usize = 300;

/// Elections that are remembered.
const ELECTIONS_MAX: usize = 100;

/// The longest latency that is told apart from longer ones, in microseconds.
const LATENCY_MAX: u64 = 60_000_000;

/// How a request for a commit ended, as its client saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// Committed.
    Committed,
    /// Aborted.
    Aborted,
    /// Refused, since there was too much to do.
    Shed,
    /// Anything else: nobody knows yet, or it made no sense.
    Otherwise,
}

/// What a leader sees.
#[derive(Default)]
pub struct Eyes {
    nodes: BTreeMap<NodeId, (Instant, NodeReport)>,
    leads: BTreeMap<ShardId, (NodeId, u64)>,
    elections: VecDeque<Election>,
    seconds: VecDeque<Pulse>,
}

struct Pulse {
    second: Second,
    latencies: Histogram<u64>,
}

impl Eyes {
    /// A participant has given a sign of life.
    pub fn saw(&mut self, node: NodeId, report: NodeReport, at_ms: u64) {
        for shard in report.shards.iter().filter(|shard| shard.serving) {
            // Of two that both say so, the one with the later entry is right.
            let newer = self.leads.get(&shard.shard).is_none_or(|(_, lead)| *lead < shard.lead);
            if newer {
                self.leads.insert(shard.shard, (node, shard.lead));
                self.elected(Election { at_ms, shard: Some(shard.shard), node });
            }
        }
        self.nodes.insert(node, (Instant::now(), report));
    }

    /// Somebody leads now.
    pub fn elected(&mut self, election: Election) {
        if self.elections.len() == ELECTIONS_MAX {
            self.elections.pop_front();
        }
        self.elections.push_back(election);
    }

    /// A request for a commit was answered.
    pub fn ended(&mut self, how: Ended, took: Duration, at_ms: u64) {
        let at_ms = at_ms - at_ms % 1000;
        if self.seconds.back().is_none_or(|last| last.second.at_ms < at_ms) {
            if self.seconds.len() == SECONDS_MAX {
                self.seconds.pop_front();
            }
            let latencies = Histogram::new_with_bounds(1, LATENCY_MAX, 2).expect("sensible bounds");
            self.seconds.push_back(Pulse { second: Second { at_ms, ..Second::default() }, latencies });
        }
        // After the clock was set back, what happens counts for the last second there was.
        let pulse = self.seconds.back_mut().expect("made just now");
        match how {
            Ended::Committed => {
                pulse.second.committed += 1;
                pulse.latencies.saturating_record(took.as_micros() as u64);
            }
            Ended::Aborted => pulse.second.aborted += 1,
            Ended::Shed => pulse.second.shed += 1,
            Ended::Otherwise => {}
        }
    }

    /// Each participant that has given a sign of life, and what it said last.
    pub fn nodes(&self) -> Vec<NodeView> {
        let view = |(id, (at, report)): (&NodeId, &(Instant, NodeReport))| NodeView {
            id: *id,
            seen_ms: Some(at.elapsed().as_millis() as u64),
            report: report.clone(),
        };
        self.nodes.iter().map(view).collect()
    }

    /// How many shards somebody has said lately that it serves.
    pub fn served(&self) -> usize {
        let lately = self.nodes.values().filter(|(at, _)| at.elapsed().as_millis() <= u128::from(SILENT_MS));
        let shards = lately.flat_map(|(_, report)| &report.shards).filter(|shard| shard.serving);
        shards.map(|shard| shard.shard).collect::<BTreeSet<_>>().len()
    }

    /// Milliseconds since a participant's last sign of life.
    pub fn since(&self, node: NodeId) -> Option<u64> {
        self.nodes.get(&node).map(|(at, _)| at.elapsed().as_millis() as u64)
    }

    /// Leaderships that began lately, oldest first.
    pub fn elections(&self) -> Vec<Election> {
        self.elections.iter().copied().collect()
    }

    /// What happened in the last minutes. A second in which nothing did is left out.
    pub fn history(&self) -> Vec<Second> {
        let second = |pulse: &Pulse| Second {
            p50_us: pulse.latencies.value_at_quantile(0.5),
            p99_us: pulse.latencies.value_at_quantile(0.99),
            ..pulse.second
        };
        self.seconds.iter().map(second).collect()
    }
}

#[cfg(test)]
mod tests {
    use troth_protocol::message::overview::ShardReport;

    use super::*;

    fn leads(shard: u16, lead: u64) -> NodeReport {
        let shard = ShardReport {
            shard: ShardId(shard),
            serving: true,
            lead,
            prepared: 0,
            locks: 0,
            waiting: 0,
            bytes: 0,
            moving: None,
        };
        NodeReport { shards: vec![shard], in_doubt: Vec::new() }
    }

    #[test]
    fn an_election_is_seen_once_and_an_old_leader_is_not_believed() {
        let mut eyes = Eyes::default();
        for (node, lead) in [(1, 5), (1, 5), (2, 9), (1, 5), (2, 9)] {
            eyes.saw(NodeId(node), leads(3, lead), 77);
        }
        let seen: Vec<u64> = eyes.elections().iter().map(|election| election.node.0).collect();
        assert_eq!(seen, [1, 2]);
        assert_eq!(eyes.nodes().len(), 2);
    }

    #[test]
    fn what_happens_is_counted_by_the_second_and_forgotten_after_some_minutes() {
        let mut eyes = Eyes::default();
        for second in 0..SECONDS_MAX as u64 + 10 {
            eyes.ended(Ended::Committed, Duration::from_micros(1500), second * 1000 + 1);
            eyes.ended(Ended::Aborted, Duration::ZERO, second * 1000 + 999);
        }
        eyes.ended(Ended::Shed, Duration::ZERO, 5);
        let history = eyes.history();
        assert_eq!(history.len(), SECONDS_MAX);
        let last = history.last().expect("some");
        assert_eq!((last.committed, last.aborted, last.shed), (1, 1, 1));
        assert!((1480..=1520).contains(&last.p50_us), "{}", last.p50_us);
    }
}
