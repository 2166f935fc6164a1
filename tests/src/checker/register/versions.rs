//! The order of the values of a register, as far as it can be known.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::registers::{Key, Use};
use crate::checker::cycles;
use crate::checker::graph::{Basis, Edge, Graph, realtime};
use crate::history::Operation;

/// A value that a register had; `None` is that it had none yet.
pub(super) type Version = Option<i64>;

/// Which versions of a register are followed by which, not always at once. What follows from other pairs
/// may be missing.
pub(super) struct Versions {
    pub pairs: Vec<(Version, i64, Basis)>,
    /// If versions that were found and left contradict one another: a story of how. The pairs then come
    /// from writes alone.
    pub contradiction: Option<String>,
}

/// Finds the order of the versions of a key.
///
/// Without contradictions there are three sources. A register has no value at first. A transaction that
/// finds one value and leaves another puts the other later. And if one transaction had ended before
/// another began, what the one left, or found and let stand, is not later than what the other found, or
/// left without looking.
pub(super) fn order(key: i64, register: &Key, operations: &[Operation], took_place: &[bool]) -> Versions {
    let uses: Vec<_> = register.uses.iter().copied().filter(|used| took_place[used.by]).collect();
    let left: BTreeSet<i64> = uses.iter().filter_map(|used| used.left).collect();
    let is_version = |version: Version| version.is_none_or(|value| left.contains(&value));
    let known: Vec<Use> = uses.into_iter().filter(|used| used.found.is_none_or(is_version)).collect();
    let everything = pairs(&known, operations, true);
    let Some(contradiction) = contradiction(key, &everything) else {
        return Versions { pairs: forwards(everything), contradiction: None };
    };
    let writes = pairs(&known, operations, false);
    let agree = self::contradiction(key, &writes).is_none();
    let pairs = if agree { forwards(writes) } else { Vec::new() };
    Versions { pairs, contradiction: Some(contradiction) }
}

type Pairs = BTreeMap<(Version, Version), Basis>;

/// All pairs of versions; reads count for the order of real time, or not.
fn pairs(uses: &[Use], operations: &[Operation], reads: bool) -> Pairs {
    let mut pairs = Pairs::new();
    for used in uses {
        if let (Some(Some(found)), Some(left)) = (used.found, used.left) {
            pairs.insert((Some(found), Some(left)), Basis::Followed);
        }
    }
    let used_by: HashMap<usize, &Use> = uses.iter().map(|used| (used.by, used)).collect();
    let counts = uses.iter().filter(|used| reads || used.left.is_some());
    let in_time: Vec<_> = counts.map(|used| (used.by, &operations[used.by])).collect();
    realtime(&in_time, |from, to| {
        let (from, to) = (used_by[&from], used_by[&to]);
        let before = from.left.or_else(|| from.found.flatten());
        let after = match to.found {
            Some(found) if reads => found,
            Some(_) | None => to.left,
        };
        if before != after {
            pairs.entry((before, after)).or_insert(Basis::Realtime);
        }
    });
    let followed: BTreeSet<_> =
        pairs.keys().filter(|(before, _)| before.is_some()).map(|(_, after)| *after).collect();
    for left in uses.iter().filter_map(|used| used.left).filter(|left| !followed.contains(&Some(*left))) {
        pairs.entry((None, Some(left))).or_insert(Basis::Initial);
    }
    pairs
}

fn forwards(pairs: Pairs) -> Vec<(Version, i64, Basis)> {
    pairs.into_iter().filter_map(|((before, after), basis)| Some((before, after?, basis))).collect()
}

/// A story of versions of which each is older than the next, and the last is older than the first.
fn contradiction(key: i64, pairs: &Pairs) -> Option<String> {
    let versions: BTreeSet<Version> = pairs.keys().flat_map(|(before, after)| [*before, *after]).collect();
    let versions: Vec<Version> = versions.into_iter().collect();
    let number = |version: &Version| versions.binary_search(version).expect("it is one of the versions");
    let mut graph = Graph::new(versions.len());
    for ((before, after), basis) in pairs {
        // The search for cycles does not care what edges say; the story below does not tell it.
        let edge = Edge::Ww { key, before: 0, after: 0, basis: *basis };
        graph.add(number(before), number(after), edge);
    }
    let cycle = cycles::find(&graph).into_iter().next()?;
    let text = |version: Version| version.map_or("nothing".to_owned(), |value| value.to_string());
    let mut story = format!("key {key} would have had these values in a circle:");
    for (place, (number, _)) in cycle.steps.iter().enumerate() {
        let (next, _) = cycle.steps[(place + 1) % cycle.steps.len()];
        let (before, after) = (versions[*number], versions[next]);
        let basis = match pairs.get(&(before, after)) {
            Some(Basis::Followed) => "a transaction found the one and left the other",
            Some(Basis::Initial) => "it has no value at first",
            Some(Basis::Realtime | Basis::Listed | Basis::NotYetListed) | None => "by real time",
        };
        story += &format!("\n{} before {}: {basis}", text(before), text(after));
    }
    Some(story)
}
