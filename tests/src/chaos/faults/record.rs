//! What is written down about a run.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::chaos::nemesis::Nemesis;

/// What is written about a run while it goes on.
pub struct Journal {
    began: Instant,
    loud: bool,
    lines: Mutex<Vec<String>>,
}

impl Journal {
    /// An empty one that begins now; a loud one also writes to standard error.
    pub fn new(loud: bool) -> Journal {
        Journal { began: Instant::now(), loud, lines: Mutex::default() }
    }

    /// Writes a line.
    pub fn note(&self, text: impl AsRef<str>) {
        let line = format!("{:7.1} s  {}", self.began.elapsed().as_secs_f64(), text.as_ref());
        if self.loud {
            eprintln!("{line}");
        }
        self.lines.lock().push(line);
    }

    /// What was written.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().clone()
    }
}

/// What was done to a cluster.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Faults of each kind.
    pub faults: BTreeMap<Nemesis, u64>,
    /// Processes that got SIGKILL.
    pub sigkills: u64,
    /// Processes that were stopped with SIGSTOP.
    pub pauses: u64,
    /// Disks whose power was cut.
    pub power_cuts: u64,
    /// Changes of the ring that have ended: a participant that joined, or one that left.
    pub ring_changes: u64,
    /// When there was a fault: from and to, in nanoseconds since the history began.
    pub times: Vec<(u64, u64)>,
    /// Servers that ended by themselves, why, and how often.
    pub ended: BTreeMap<String, u64>,
    /// Of these, those that had no reason to.
    pub crashed: Vec<String>,
    /// Changes of the ring that have not ended in time.
    pub stuck: Vec<String>,
    /// Bits that were flipped, and what the server made of it.
    pub flips: Vec<String>,
}
