//! What a checker has to say about a history.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

use crate::history::{History, Kind, Mop, Op, Operation, Workload};

/// The name under which it is counted what could not be judged, since too few were told what they did.
pub(super) const UNCHECKED: &str = "unchecked";

/// A verdict, and why.
#[derive(Clone, Debug)]
pub struct Report {
    /// What the clients did.
    pub workload: Workload,
    /// What should not have happened. Of each class only the first few, as many as
    /// [`Options::explained_max`](super::Options::explained_max) says.
    pub anomalies: Vec<Anomaly>,
    /// How often each class was found, if ever.
    pub found: BTreeMap<Class, u64>,
    /// How much was looked at, by the name of what was counted.
    pub counts: BTreeMap<&'static str, u64>,
    explained_max: usize,
}

/// Something that should not have happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Anomaly {
    /// Of which kind it is.
    pub class: Class,
    /// How it happened, for people to read; it may have several lines.
    pub explanation: String,
}

/// Kinds of anomalies. The cycles are those of Adya's thesis and of "Elle: Inferring Isolation Anomalies
/// from Experimental Observations"; one that needs the order of real time has `Realtime` in its name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Class {
    /// This is not a history that can be checked.
    Malformed,
    /// A transaction disagrees with itself.
    Internal,
    /// A value was read that nobody wrote.
    GarbageRead,
    /// A value was read whose writer had failed.
    G1a,
    /// A value was read that its writer had overwritten at once.
    G1b,
    /// A committed write is on top of one that had failed.
    DirtyUpdate,
    /// A list holds an element twice.
    DuplicateElements,
    /// Two reads of a list disagree on its order.
    IncompatibleOrder,
    /// Values of a key are each older than the other.
    CyclicVersions,
    /// An acknowledged append is gone.
    LostAppend,
    /// Two transactions updated the same version of a key.
    LostUpdate,
    /// A cycle of writes.
    G0,
    /// A cycle of writes and real time.
    G0Realtime,
    /// A cycle of writes and reads of what was written.
    G1c,
    /// A cycle of writes, reads of them, and real time.
    G1cRealtime,
    /// A cycle with one read of what was overwritten.
    GSingle,
    /// A cycle with one read of what was overwritten, and real time.
    GSingleRealtime,
    /// A cycle with several reads of what was overwritten.
    G2Item,
    /// A cycle with several reads of what was overwritten, and real time.
    G2ItemRealtime,
    /// The balances do not add up.
    WrongTotal,
    /// Accounts are missing, or there are others.
    WrongAccounts,
    /// An account is overdrawn.
    NegativeBalance,
    /// No set of transfers leads to the final balances.
    WrongFinalBalances,
    /// An acknowledged element was never seen.
    LostElement,
    /// An acknowledged element was seen too late.
    StaleElement,
    /// An element was seen, and then it was not.
    VanishedElement,
    /// Two reads saw two writes in opposite orders.
    LongFork,
    /// No set of increments leads to a count.
    CountOutOfBounds,
    /// A count is less than an earlier one.
    CountBackwards,
    /// Two increments reached the same count.
    DuplicateCount,
    /// An acknowledged operation has no commit timestamp.
    NoTimestamp,
    /// Two writers that meet have the same commit timestamp.
    DuplicateTimestamp,
    /// Timestamps contradict real time.
    TimestampBackwards,
    /// A read contradicts the order of commit timestamps.
    WitnessMismatch,
}

impl Class {
    /// What reports call it.
    pub fn name(self) -> &'static str {
        self.described().0
    }

    /// What it means, in a sentence.
    pub fn meaning(self) -> &'static str {
        self.described().1
    }

    fn described(self) -> (&'static str, &'static str) {
        match self {
            Class::Malformed => ("malformed", "this is not a history that can be checked"),
            Class::Internal => ("internal", "a transaction disagrees with itself"),
            Class::GarbageRead => ("garbage-read", "a value was read that nobody wrote"),
            Class::G1a => ("G1a", "a value was read whose writer had failed"),
            Class::G1b => ("G1b", "a value was read that its writer had overwritten at once"),
            Class::DirtyUpdate => ("dirty-update", "a committed write is on top of one that had failed"),
            Class::DuplicateElements => ("duplicate-elements", "a list holds an element twice"),
            Class::IncompatibleOrder => ("incompatible-order", "two reads of a list disagree on its order"),
            Class::CyclicVersions => ("cyclic-versions", "values of a key are each older than the other"),
            Class::LostAppend => ("lost-append", "an acknowledged append is gone"),
            Class::LostUpdate => ("lost-update", "two transactions updated the same version of a key"),
            Class::G0 => ("G0", "a cycle of writes"),
            Class::G0Realtime => ("G0-realtime", "a cycle of writes and real time"),
            Class::G1c => ("G1c", "a cycle of writes and reads of what was written"),
            Class::G1cRealtime => ("G1c-realtime", "a cycle of writes, reads of them, and real time"),
            Class::GSingle => ("G-single", "a cycle with one read of what was overwritten"),
            Class::GSingleRealtime => {
                ("G-single-realtime", "a cycle with one read of what was overwritten, and real time")
            }
            Class::G2Item => ("G2-item", "a cycle with several reads of what was overwritten"),
            Class::G2ItemRealtime => {
                ("G2-item-realtime", "a cycle with several reads of what was overwritten, and real time")
            }
            Class::WrongTotal => ("wrong-total", "the balances do not add up"),
            Class::WrongAccounts => ("wrong-accounts", "accounts are missing, or there are others"),
            Class::NegativeBalance => ("negative-balance", "an account is overdrawn"),
            Class::WrongFinalBalances => {
                ("wrong-final-balances", "no set of transfers leads to the final balances")
            }
            Class::LostElement => ("lost-element", "an acknowledged element was never seen"),
            Class::StaleElement => ("stale-element", "an acknowledged element was seen too late"),
            Class::VanishedElement => ("vanished-element", "an element was seen, and then it was not"),
            Class::LongFork => ("long-fork", "two reads saw two writes in opposite orders"),
            Class::CountOutOfBounds => ("count-out-of-bounds", "no set of increments leads to a count"),
            Class::CountBackwards => ("count-backwards", "a count is less than an earlier one"),
            Class::DuplicateCount => ("duplicate-count", "two increments reached the same count"),
            Class::NoTimestamp => ("no-timestamp", "an acknowledged operation has no commit timestamp"),
            Class::DuplicateTimestamp => {
                ("duplicate-timestamp", "two writers that meet have the same commit timestamp")
            }
            Class::TimestampBackwards => ("timestamp-backwards", "timestamps contradict real time"),
            Class::WitnessMismatch => {
                ("witness-mismatch", "a read contradicts the order of commit timestamps")
            }
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Report {
    /// Nothing was found yet. The arguments are the workload and how many anomalies of a class are explained.
    pub(super) fn new(workload: Workload, explained_max: usize) -> Report {
        let (anomalies, found, counts) = Default::default();
        Report { workload, anomalies, found, counts, explained_max }
    }

    /// Whether a system that keeps its promises can have answered so, as far as was checked.
    pub fn valid(&self) -> bool {
        self.found.is_empty()
    }

    /// How much could not be judged, since too many clients were not told how their operation ended.
    pub fn unchecked(&self) -> u64 {
        self.counts.get(UNCHECKED).copied().unwrap_or(0)
    }

    /// The classes that were found.
    pub fn classes(&self) -> Vec<Class> {
        self.found.keys().copied().collect()
    }

    /// Notes an anomaly, and explains it unless enough of its class are explained.
    pub(super) fn add(&mut self, class: Class, explanation: impl FnOnce() -> String) {
        let found = self.found.entry(class).or_default();
        *found += 1;
        if *found <= self.explained_max as u64 {
            self.anomalies.push(Anomaly { class, explanation: explanation() });
        }
    }

    /// Counts some more of something.
    pub(super) fn count(&mut self, name: &'static str, more: usize) {
        *self.counts.entry(name).or_default() += more as u64;
    }

    /// Counts the operations of a history by what became of them.
    pub(super) fn count_operations(&mut self, history: &History) {
        for operation in history.operations() {
            match operation.outcome() {
                Kind::Ok => self.count("ok", 1),
                Kind::Fail => self.count("fail", 1),
                Kind::Info | Kind::Invoke => self.count("info", 1),
            }
        }
    }

    /// Adds what another checker has to say about the same history.
    pub(super) fn merge(&mut self, other: Report) {
        self.anomalies.extend(other.anomalies);
        for (class, times) in other.found {
            *self.found.entry(class).or_default() += times;
        }
        for (name, count) in other.counts {
            *self.counts.entry(name).or_default() += count;
        }
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        let anomaly = |anomaly: &Anomaly| {
            json!({
                "class": anomaly.class.name(),
                "meaning": anomaly.class.meaning(),
                "explanation": anomaly.explanation,
            })
        };
        let found: BTreeMap<_, _> = self.found.iter().map(|(class, times)| (class.name(), times)).collect();
        json!({
            "workload": self.workload.name(),
            "valid": self.valid(),
            "found": found,
            "counts": self.counts,
            "anomalies": self.anomalies.iter().map(anomaly).collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.workload, if self.valid() { "valid" } else { "INVALID" })?;
        let counts: Vec<_> = self.counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
        writeln!(f, "looked at {}", counts.join(", "))?;
        for (class, times) in &self.found {
            writeln!(f, "\n{class}, {times} times: {}", class.meaning())?;
            for anomaly in self.anomalies.iter().filter(|anomaly| anomaly.class == *class) {
                writeln!(f, "- {}", anomaly.explanation.replace('\n', "\n  "))?;
            }
        }
        Ok(())
    }
}

/// The name of an operation in stories: its last event.
pub(super) fn name(operation: &Operation) -> String {
    format!("T{}", operation.index())
}

/// An operation in stories, with long lists cut in the middle.
pub(super) fn describe(operation: &Operation) -> String {
    let op = match operation.op() {
        Op::Txn(mops) => format!("[{}]", mops.iter().map(step).collect::<Vec<_>>().join(" ")),
        Op::Increment(Some(count)) => format!("1, count {count}"),
        other => other.to_string(),
    };
    let (name, process) = (name(operation), operation.invoked.process);
    match (operation.acknowledged(), operation.commit_ts()) {
        (Some(_), Some(commit_ts)) => format!("{name} = {op}, process {process}, ok at {commit_ts}"),
        (Some(_), None) => format!("{name} = {op}, process {process}, ok"),
        (None, _) => format!("{name} = {op}, process {process}, not acknowledged"),
    }
}

fn step(mop: &Mop) -> String {
    match mop {
        Mop::Read { key, list: Some(elements) } => format!("[:r {key} {}]", list(elements)),
        Mop::Read { list: None, .. } | Mop::Append { .. } => mop.to_string(),
    }
}

/// A list in stories, cut in the middle if it is long.
pub(super) fn list(elements: &[i64]) -> String {
    let text = |part: &[i64]| part.iter().map(i64::to_string).collect::<Vec<_>>().join(" ");
    if elements.len() <= 12 {
        return format!("[{}]", text(elements));
    }
    let (head, tail) = (&elements[..2], &elements[elements.len() - 8..]);
    format!("[{} ... {}]", text(head), text(tail))
}
