//! What a benchmark saw.

use hdrhistogram::Histogram;
use serde::Serialize;

/// What a benchmark saw.
#[derive(Serialize)]
pub struct Report {
    /// What was measured.
    pub workload: &'static str,
    /// Coordinators.
    pub coordinators: u16,
    /// Participants.
    pub nodes: u16,
    /// Replicas of each shard.
    pub replicas: u16,
    /// Clients that each wait for one transaction after the other.
    pub clients: usize,
    /// How long it was measured.
    pub seconds: f64,
    /// Committed transactions.
    pub committed: u64,
    /// Committed transactions per second.
    pub tps: f64,
    /// Latency of a transaction from begin to the answer, with its retries: microseconds.
    pub mean_us: f64,
    /// Half of the transactions took at most this: microseconds.
    pub p50_us: u64,
    /// 99 of 100 transactions took at most this: microseconds.
    pub p99_us: u64,
    /// The slowest transaction: microseconds.
    pub max_us: u64,
    /// Attempts that met another transaction and were made again.
    pub aborts: u64,
    /// Leaderships that began from the start of the load to its end: elections that nothing called for.
    pub leader_changes: u64,
    /// Transactions that ended with an error.
    pub errors: u64,
    /// Processor time per committed transaction, of all processes with the clients: microseconds.
    pub cpu_us_per_txn: f64,
    /// The share of it that is the clients': microseconds.
    pub client_cpu_us_per_txn: f64,
}

impl Report {
    /// Fills in what a histogram of microseconds says.
    pub fn latencies(&mut self, histogram: &Histogram<u64>) {
        self.mean_us = histogram.mean();
        self.p50_us = histogram.value_at_quantile(0.5);
        self.p99_us = histogram.value_at_quantile(0.99);
        self.max_us = histogram.max();
    }

    /// Prints it, for people or as one JSON object.
    pub fn print(&self, json: bool) {
        if json {
            println!("{}", serde_json::to_string(self).expect("a plain struct"));
            return;
        }
        println!(
            "{} on {} coordinators, {} nodes, {} replicas, {} clients, {:.1} s",
            self.workload, self.coordinators, self.nodes, self.replicas, self.clients, self.seconds
        );
        println!("  {:>10.0} transactions per second ({} committed)", self.tps, self.committed);
        println!("  {:>10} µs p50   {} µs p99   {} µs max", self.p50_us, self.p99_us, self.max_us);
        println!(
            "  {:>10} attempts repeated, {} errors, {} elections",
            self.aborts, self.errors, self.leader_changes
        );
        println!(
            "  {:>10.0} µs of processor time per transaction, {:.0} of them in the clients",
            self.cpu_us_per_txn, self.client_cpu_us_per_txn
        );
    }
}
