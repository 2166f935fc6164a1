//! What must have come before what, as lists show it.

use std::collections::HashSet;

use super::lists::{Key, Lists};
use crate::checker::graph::{Basis, Edge, Graph};
use crate::history::Operation;

/// The graph of all that took place. An acknowledged append that nobody has seen comes after all that
/// anybody has seen, unless it is lost.
pub(super) fn graph(
    operations: &[Operation],
    lists: &Lists,
    took_place: &[bool],
    lost: &HashSet<(i64, i64)>,
) -> Graph {
    let mut graph = Graph::new(operations.len());
    for (key, list) in lists.keys.iter().filter(|(_, list)| list.is_order) {
        // By the place in the list: who appended it, if it took place.
        let writer = |value: &i64| lists.writes.get(&(*key, *value)).map(|write| write.by);
        let writers = list.order.iter().map(|value| writer(value).filter(|by| took_place[*by]));
        let mut edges = Edges { graph: &mut graph, key: *key, list, writers: writers.collect() };
        edges.between_seen();
        let unseen = list.appends.iter().filter(|(value, by)| {
            took_place[*by] && !list.seen.contains(value) && !lost.contains(&(*key, *value))
        });
        edges.beyond_seen(unseen.copied());
    }
    let took_place = operations.iter().enumerate().filter(|(number, _)| took_place[*number]);
    graph.add_realtime(&took_place.collect::<Vec<_>>());
    graph
}

struct Edges<'g> {
    graph: &'g mut Graph,
    key: i64,
    list: &'g Key<'g>,
    writers: Vec<Option<usize>>,
}

impl Edges<'_> {
    fn between_seen(&mut self) {
        let (key, order) = (self.key, self.list.order);
        let mut before: Option<(i64, usize)> = None;
        for (place, by) in self.writers.iter().enumerate() {
            let Some(by) = *by else { continue };
            if let Some((before, writer)) = before {
                let edge = Edge::Ww { key, before, after: order[place], basis: Basis::Listed };
                self.graph.add(writer, by, edge);
            }
            before = Some((order[place], by));
        }
        // By the length of a list: the place of the next element that took place.
        let mut next = vec![None; order.len() + 1];
        for place in (0..order.len()).rev() {
            next[place] = self.writers[place].map_or(next[place + 1], |_| Some(place));
        }
        for read in self.list.reads.iter().filter(|read| read.first) {
            let found = read.found();
            if let Some(value) = found.last()
                && let Some(by) = self.writers[found.len() - 1]
            {
                self.graph.add(by, read.by, Edge::Wr { key, value: *value });
            }
            if let Some(place) = next[found.len()]
                && let Some(by) = self.writers[place]
            {
                let after = order[place];
                let edge = Edge::Rw { key, read: found.last().copied(), after, basis: Basis::Listed };
                self.graph.add(read.by, by, edge);
            }
        }
    }

    fn beyond_seen(&mut self, unseen: impl Iterator<Item = (i64, usize)>) {
        let (key, order) = (self.key, self.list.order);
        let newest = self.writers.iter().rposition(Option::is_some);
        for (after, by) in unseen {
            if let Some(place) = newest
                && let Some(writer) = self.writers[place]
            {
                let edge = Edge::Ww { key, before: order[place], after, basis: Basis::NotYetListed };
                self.graph.add(writer, by, edge);
            }
            for read in self.list.reads.iter().filter(|read| read.first) {
                let found = read.found();
                if found.len() == order.len() {
                    let read_value = found.last().copied();
                    let edge = Edge::Rw { key, read: read_value, after, basis: Basis::NotYetListed };
                    self.graph.add(read.by, by, edge);
                }
            }
        }
    }
}
