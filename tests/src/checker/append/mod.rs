//! Lists that transactions append to and read: whether all transactions can have taken place one after
//! another, each between its question and its answer.
//!
//! After "Elle: Inferring Isolation Anomalies from Experimental Observations" (Kingsbury and Alvaro, VLDB
//! 2020). A list shows the order of all its versions: a read of `[1 2 3]` says that 1 was appended before
//! 2, and 2 before 3. So the longest read of a key gives the order of its writers, and every other read
//! must be a beginning of it. The rest is a search for cycles.
//!
//! An operation without an acknowledgment may have taken place. If anybody has read what it appended, it
//! has, at some time after its question.

mod edges;
pub(super) mod lists;

use std::collections::{BTreeMap, HashMap, HashSet};

use super::cycles;
use super::report::{Class, Report, describe, name};
use crate::history::{History, Kind, Mop, Op, Operation, Workload};
use lists::{Key, Lists, Read};

/// Checks a history of transactions on lists. At most so many anomalies of a class are explained.
pub(super) fn check(history: &History, workload: Workload, explained_max: usize) -> Report {
    let mut report = Report::new(workload, explained_max);
    let operations = history.operations();
    let lists = Lists::new(&operations);
    for (key, value, one, other) in &lists.twice {
        report.add(Class::Malformed, || {
            let (one, other) = (name(&operations[*one]), name(&operations[*other]));
            format!("{one} and {other} both append {value} to key {key}, and appends must be unique")
        });
    }
    if !lists.twice.is_empty() {
        return report;
    }
    let took_place = took_place(&operations, &lists);
    let mut check = Check { operations: &operations, lists: &lists, took_place, report };
    check.inside_of_transactions();
    check.lists();
    check.values();
    check.updates();
    let lost = check.lost();
    let graph = edges::graph(&operations, &lists, &check.took_place, &lost);
    let mut report = check.report;
    cycles::report(&graph, &operations, "appended", &mut report);
    report.count("keys", lists.keys.len());
    report.count("reads", lists.keys.values().map(|key| key.reads.len() + key.odd.len()).sum());
    report
}

/// Which operations have taken place as far as is known: those that were acknowledged, and those of which
/// something was read.
pub(super) fn took_place(operations: &[Operation], lists: &Lists) -> Vec<bool> {
    let mut took_place: Vec<_> = operations.iter().map(|operation| operation.outcome() == Kind::Ok).collect();
    for key in lists.keys.values() {
        for (_, by) in key.appends.iter().filter(|(value, _)| key.seen.contains(value)) {
            took_place[*by] |= operations[*by].outcome() == Kind::Info;
        }
    }
    took_place
}

struct Check<'c> {
    operations: &'c [Operation<'c>],
    lists: &'c Lists<'c>,
    took_place: Vec<bool>,
    report: Report,
}

impl<'c> Check<'c> {
    /// A transaction must find its own appends, and must not see its lists change otherwise.
    fn inside_of_transactions(&mut self) {
        for operation in self.operations {
            let (Op::Txn(mops), Kind::Ok) = (operation.op(), operation.outcome()) else { continue };
            // For each key: whether the whole list is known, or its end only.
            let mut known: BTreeMap<i64, (bool, Vec<i64>)> = BTreeMap::new();
            for mop in mops {
                match mop {
                    Mop::Append { key, value } => known.entry(*key).or_default().1.push(*value),
                    Mop::Read { key, list } => {
                        let list = list.as_deref().unwrap_or_default();
                        if let Some((whole, end)) = known.get(key)
                            && (!list.ends_with(end) || *whole && list.len() != end.len())
                        {
                            self.report.add(Class::Internal, || {
                                let expected = if *whole { "exactly" } else { "a list that ends with" };
                                format!(
                                    "{}\nreads key {key} when it holds {expected} {end:?}",
                                    describe(operation)
                                )
                            });
                        }
                        known.insert(*key, (true, list.to_vec()));
                    }
                }
            }
        }
    }

    /// Lists must hold each element once, and be beginnings of one another.
    fn lists(&mut self) {
        for (key, reads) in &self.lists.keys {
            for read in &reads.odd {
                let longest = reads.longest().expect("there is a longest list where one does not fit");
                let (one, other) = (&self.operations[read.by], &self.operations[longest.by]);
                let differs =
                    read.list.iter().zip(longest.list).take_while(|(one, other)| one == other).count();
                self.report.add(Class::IncompatibleOrder, || {
                    let (one_has, other_has) = (read.list[differs], longest.list[differs]);
                    let (one_name, other_name) = (name(one), name(other));
                    let story = format!(
                        "key {key} has {one_has} at {differs} in {one_name}, and {other_has} in {other_name}"
                    );
                    format!("{story}\n{}\n{}", describe(one), describe(other))
                });
            }
            let mut told = HashSet::new();
            for read in reads.witnesses() {
                let mut elements = HashSet::new();
                for value in read.list.iter().filter(|value| !elements.insert(**value)) {
                    if told.insert(value) {
                        let reader = &self.operations[read.by];
                        self.report.add(Class::DuplicateElements, || {
                            format!("{value} is in key {key} more than once\n{}", describe(reader))
                        });
                    }
                }
            }
        }
    }

    /// Every value must have been appended, by somebody who has not failed, and be the last of its
    /// transaction if another one sees it at the end of a list.
    fn values(&mut self) {
        for (key, reads) in &self.lists.keys {
            let mut told = HashSet::new();
            for read in reads.witnesses() {
                let mut on_failed = false;
                for value in read.list {
                    let Some(write) = self.lists.writes.get(&(*key, *value)) else {
                        if told.insert(*value) {
                            self.story(Class::GarbageRead, *key, *value, read, None);
                        }
                        continue;
                    };
                    if self.operations[write.by].outcome() == Kind::Fail {
                        on_failed = true;
                        if told.insert(*value) {
                            self.story(Class::G1a, *key, *value, read, Some(write.by));
                        }
                    } else if std::mem::take(&mut on_failed) {
                        self.story(Class::DirtyUpdate, *key, *value, read, Some(write.by));
                    }
                }
            }
            for read in reads.reads.iter().chain(&reads.odd) {
                let Some(value) = read.found().last() else { continue };
                let Some(write) = self.lists.writes.get(&(*key, *value)) else { continue };
                if !write.last && write.by != read.by {
                    self.story(Class::G1b, *key, *value, read, Some(write.by));
                }
            }
        }
    }

    fn story(&mut self, class: Class, key: i64, value: i64, read: &Read, by: Option<usize>) {
        let reader = &self.operations[read.by];
        let writer = by.map(|by| &self.operations[by]);
        self.report.add(class, || {
            let found = match writer {
                Some(writer) => format!("{} appended {value} to key {key}", name(writer)),
                None => format!("nobody appended {value} to key {key}"),
            };
            let story = format!("{found}, and {} read it\n{}", name(reader), describe(reader));
            writer.map_or(story.clone(), |writer| format!("{story}\n{}", describe(writer)))
        });
    }

    /// Of all who find the same version of a list and append to it, only one can succeed.
    fn updates(&mut self) {
        for (key, reads) in &self.lists.keys {
            let mut updates: BTreeMap<(usize, Option<&i64>), Vec<usize>> = BTreeMap::new();
            for read in
                reads.reads.iter().chain(&reads.odd).filter(|read| read.first && read.update.is_some())
            {
                updates.entry((read.list.len(), read.list.last())).or_default().push(read.by);
            }
            for ((length, last), by) in updates.into_iter().filter(|(_, by)| by.len() > 1) {
                let updaters: Vec<_> = by.iter().map(|by| describe(&self.operations[*by])).collect();
                self.report.add(Class::LostUpdate, || {
                    let version =
                        last.map_or("empty".to_owned(), |last| format!("{length} long, up to {last}"));
                    format!(
                        "key {key} was {version} when all of these appended to it\n{}",
                        updaters.join("\n")
                    )
                });
            }
        }
    }

    /// Acknowledged appends that nobody has seen, though somebody has read the list since; and those that
    /// were seen, but by nobody who began after all those had ended. Returns the first sort, by key and
    /// value.
    fn lost(&mut self) -> HashSet<(i64, i64)> {
        let mut never_seen = HashSet::new();
        for (key, list) in &self.lists.keys {
            let begun = |read: &&Read| self.operations[read.by].begun();
            let Some(latest) = list.reads.iter().chain(&list.odd).max_by_key(begun) else { continue };
            let last_seen = last_seen(list, self.operations);
            for (value, by) in &list.appends {
                let seen = last_seen.get(value).copied();
                let acknowledged = self.operations[*by].acknowledged();
                let Some(known) = acknowledged.map(|end| end.max(seen.unwrap_or(0))) else { continue };
                if begun(&latest) <= known {
                    continue;
                }
                if seen.is_none() {
                    never_seen.insert((*key, *value));
                }
                let (writer, reader) = (&self.operations[*by], &self.operations[latest.by]);
                self.report.add(Class::LostAppend, || {
                    let seen =
                        if seen.is_some() { "was seen, and is gone at the end" } else { "was never seen" };
                    let story = format!("{} appended {value} to key {key}, which {seen}", name(writer));
                    let read = format!("{} began after that, and read", name(reader));
                    format!("{story}\n{}\n{read}\n{}", describe(writer), describe(reader))
                });
            }
        }
        never_seen
    }
}

/// For each element that was read, when the last read that has it ended.
fn last_seen(list: &Key, operations: &[Operation]) -> HashMap<i64, u64> {
    let ended = |read: &Read| operations[read.by].acknowledged().unwrap_or(0);
    let mut by_length = vec![0; list.order.len() + 1];
    for read in &list.reads {
        let latest = &mut by_length[read.list.len()];
        *latest = ended(read).max(*latest);
    }
    let mut last_seen = HashMap::new();
    let mut latest = 0;
    for (place, value) in list.order.iter().enumerate().rev() {
        latest = by_length[place + 1].max(latest);
        last_seen.insert(*value, latest);
    }
    for read in &list.odd {
        for value in read.list {
            let latest = last_seen.entry(*value).or_default();
            *latest = ended(read).max(*latest);
        }
    }
    last_seen
}

#[cfg(test)]
mod tests;
