//! Checkers of histories, one for each property.
//!
//! A checker is given what clients saw, and looks for something that they cannot have seen if
//! transactions take place one after another, each between its question and its answer (strict
//! serializability). What it finds is wrong for sure. What it does not find may still be wrong, but for
//! the [`witness`], which knows the order in which the system itself says that they took place.

mod append;
mod bank;
#[cfg(test)]
mod brute;
mod counter;
mod cycles;
mod graph;
mod long_fork;
#[cfg(test)]
mod planted;
mod register;
mod report;
mod set;
#[cfg(test)]
mod tests;
pub mod witness;

use std::collections::BTreeMap;

pub use report::{Anomaly, Class, Report};

use crate::history::{History, UnknownWorkload, Workload};

/// How to check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// Anomalies of a class that are explained; all are counted.
    pub explained_max: usize,
    /// What the accounts of the bank held at first. If it is empty, the first read says which accounts
    /// there are and how much they hold together, and final balances are not checked.
    pub opening: BTreeMap<i64, i64>,
    /// Whether accounts may be overdrawn.
    pub negative_balances: bool,
    /// Whether to check the order of commit timestamps too, if every acknowledged operation has one.
    pub witness: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { explained_max: 10, opening: BTreeMap::new(), negative_balances: false, witness: true }
    }
}

/// Checks a history of a workload.
///
/// # Errors
/// If there is no such workload.
pub fn run(workload: &str, history: &History, options: &Options) -> Result<Report, UnknownWorkload> {
    Ok(check(history, workload.parse()?, options))
}

/// The same, for a workload that is known by its type.
pub fn check(history: &History, workload: Workload, options: &Options) -> Report {
    let explained_max = options.explained_max;
    let foreign = history.events.iter().find(|event| !event.op.is_of(workload));
    let problem = match (history.validate(), foreign) {
        (Err(problem), _) => Some(problem.to_string()),
        (Ok(()), Some(event)) => Some(format!("event {}: {} is not of this workload", event.index, event.op)),
        (Ok(()), None) => None,
    };
    if let Some(problem) = problem {
        let mut report = Report::new(workload, explained_max);
        report.add(Class::Malformed, || problem);
        return report;
    }
    let mut report = match workload {
        Workload::Append | Workload::WriteSkew => append::check(history, workload, explained_max),
        Workload::Register => register::check(history, explained_max),
        Workload::Bank => bank::check(history, options),
        Workload::Set => set::check(history, explained_max),
        Workload::LongFork => {
            let mut report = long_fork::check(history, explained_max);
            if report.valid() || report.found.contains_key(&Class::LongFork) {
                report.merge(register::check(history, explained_max));
            }
            report
        }
        Workload::Counter => counter::check(history, explained_max),
    };
    report.count_operations(history);
    if options.witness && !report.found.contains_key(&Class::Malformed) && witness::applies(history) {
        report.merge(witness::check(history, workload, options));
    }
    report
}
