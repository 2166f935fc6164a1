//! Histories for the tests of checkers, written by hand.
//!
//! A line is an event: the process, the type, and the rest as EDN, from the function to the value. An
//! answer to a process that has asked nothing stands for its question too, just before it:
//!
//! ```text
//! 0 invoke :txn [[:append 1 1]]
//! 1 ok :txn [[:r 1 [1]]]
//! 0 ok :txn [[:append 1 1]], :commit-ts 3
//! ```

use std::collections::HashSet;

use super::{Class, Options, Report, run};
use crate::history::{Event, History, Kind, Workload, edn};

/// The history of some lines.
pub(super) fn history(workload: Workload, text: &str) -> History {
    let line = |line: &str| {
        let mut words = line.trim().splitn(4, ' ').map(str::trim);
        let mut word = || words.next().unwrap_or_else(|| panic!("{line:?} has too few words"));
        format!("{{:process {}, :type :{}, :f {}, :value {}}}\n", word(), word(), word(), word())
    };
    let lines: String = text.lines().filter(|text| !text.trim().is_empty()).map(line).collect();
    let read = edn::read(lines.as_bytes(), workload).expect("it is a history");
    let mut history = History::default();
    let mut waiting = HashSet::new();
    for event in read.events {
        if event.kind == Kind::Invoke {
            waiting.insert(event.process);
        } else if !waiting.remove(&event.process) {
            let op = event.op.question();
            let (kind, error, commit_ts) = (Kind::Invoke, None, None);
            history.events.push(Event { kind, op, error, commit_ts, ..event.clone() });
        }
        history.events.push(event);
    }
    for (index, event) in (0..).zip(&mut history.events) {
        (event.index, event.time_nanos) = (index, index);
    }
    assert_eq!(history.validate(), Ok(()));
    history
}

/// Checks that a checker finds exactly these classes.
pub(super) fn check(workload: Workload, text: &str, expected: &[Class]) -> Report {
    check_with(workload, text, &Options::default(), expected)
}

/// The same, with options.
pub(super) fn check_with(workload: Workload, text: &str, options: &Options, expected: &[Class]) -> Report {
    let report = run(workload.name(), &history(workload, text), options).expect("the workload is known");
    assert_eq!(report.classes(), expected, "{report}");
    report
}
