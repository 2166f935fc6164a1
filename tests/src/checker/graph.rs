//! What must have come before what: a graph of transactions.
//!
//! ```text
//! ww   the one wrote a version of a key, the other a later version
//! wr   the one wrote a version, the other read it
//! rw   the one read a version, the other wrote a later version
//! rt   the one had ended before the other began
//! ```
//!
//! If transactions take place one after another, each between its question and its answer, there is no
//! cycle. The edges of one process are among those of real time.

use std::ops::BitOr;

use petgraph::graph::{DiGraph, NodeIndex};

use crate::history::Operation;

/// Sorts of edges, as a set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sorts(u8);

impl Sorts {
    pub const WW: Sorts = Sorts(1);
    pub const WR: Sorts = Sorts(2);
    pub const RW: Sorts = Sorts(4);
    pub const RT: Sorts = Sorts(8);

    pub fn contains(self, other: Sorts) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Sorts {
    type Output = Sorts;

    fn bitor(self, other: Sorts) -> Sorts {
        Sorts(self.0 | other.0)
    }
}

/// Why one transaction must have come before another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Edge {
    /// The other wrote a later version.
    Ww { key: i64, before: i64, after: i64, basis: Basis },
    /// The other read what the one wrote.
    Wr { key: i64, value: i64 },
    /// The one read a version, or that there was none; the other wrote a later one.
    Rw { key: i64, read: Option<i64>, after: i64, basis: Basis },
    /// The one had ended before the other began.
    Realtime,
}

/// Why one version of a key is later than another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Basis {
    /// Both are in a list, in this order.
    Listed,
    /// The one is in a list, and the other is not yet in the longest.
    NotYetListed,
    /// A register has no value at first.
    Initial,
    /// A transaction found the one and wrote the other.
    Followed,
    /// Somebody was done with the one before somebody began who found or wrote the other.
    Realtime,
}

impl Basis {
    fn story(self) -> &'static str {
        match self {
            Basis::Listed => "which is later in the list",
            Basis::NotYetListed => "which is not in the longest list that was read, so it is later",
            Basis::Initial => "and at first there is no value",
            Basis::Followed => "which is later, for a transaction found the one and wrote the other",
            Basis::Realtime => "which is later by real time",
        }
    }
}

impl Edge {
    pub fn sort(&self) -> Sorts {
        match self {
            Edge::Ww { .. } => Sorts::WW,
            Edge::Wr { .. } => Sorts::WR,
            Edge::Rw { .. } => Sorts::RW,
            Edge::Realtime => Sorts::RT,
        }
    }

    /// A sentence of a story about two transactions.
    pub fn story(&self, from: &Operation, to: &Operation, wrote: &str) -> String {
        let (one, other) = (super::report::name(from), super::report::name(to));
        match self {
            Edge::Ww { key, before, after, basis } => {
                let basis = basis.story();
                format!("ww: {one} {wrote} {before} to key {key}, and {other} {wrote} {after}, {basis}")
            }
            Edge::Wr { key, value } => format!("wr: {one} {wrote} {value} to key {key}, and {other} read it"),
            Edge::Rw { key, read, after, basis } => {
                let read = read.map_or("nothing in".to_owned(), |value| format!("{value} in"));
                let basis = basis.story();
                format!("rw: {one} read {read} key {key}, and {other} {wrote} {after}, {basis}")
            }
            Edge::Realtime => {
                let (end, begin) = (from.acknowledged().unwrap_or(from.index()), to.begun());
                format!("rt: {one} ended (event {end}) before {other} began (event {begin})")
            }
        }
    }
}

/// Transactions, by number, and why some must have come before others.
pub(super) struct Graph {
    pub edges: DiGraph<usize, Edge>,
}

impl Graph {
    /// A graph without edges.
    pub fn new(transactions: usize) -> Graph {
        let mut edges = DiGraph::with_capacity(transactions, 8 * transactions);
        for number in 0..transactions {
            edges.add_node(number);
        }
        Graph { edges }
    }

    /// Says that one transaction must have come before another. No transaction comes before itself.
    pub fn add(&mut self, from: usize, to: usize, edge: Edge) {
        if from != to {
            self.edges.add_edge(NodeIndex::new(from), NodeIndex::new(to), edge);
        }
    }

    /// Adds the order of real time. See [`realtime`].
    pub fn add_realtime(&mut self, transactions: &[(usize, &Operation)]) {
        realtime(transactions, |from, to| self.add(from, to, Edge::Realtime));
    }
}

/// Tells of pairs of operations of which the one had ended before the other began. What follows from
/// other pairs is left out, so that there are no more pairs for each operation than clients at a time.
///
/// At each instant there is a frontier: those that have ended, without those that had ended before another
/// of the frontier began. Whoever begins comes after the frontier, and through it after all before. An
/// operation that was not acknowledged may begin after others, but nobody begins after it.
pub(super) fn realtime(operations: &[(usize, &Operation)], mut before: impl FnMut(usize, usize)) {
    let begins = operations.iter().map(|(number, operation)| (operation.begun(), *number, operation));
    let ends = operations.iter().filter_map(|(number, operation)| {
        let end = operation.acknowledged()?;
        Some((end, *number, operation))
    });
    let mut instants: Vec<_> = begins.chain(ends).collect();
    instants.sort_unstable_by_key(|(index, _, _)| *index);
    let mut frontier: Vec<(u64, usize)> = Vec::new();
    for (index, number, operation) in instants {
        if index == operation.begun() {
            frontier.iter().for_each(|(_, ended)| before(*ended, number));
        } else {
            frontier.retain(|(end, _)| *end > operation.begun());
            frontier.push((index, number));
        }
    }
}
