//! Cycles of a graph of transactions: finding them, naming them, telling them.
//!
//! Cycles are looked for from the fewest sorts of edges to the most: first of writes alone, then with
//! reads of what was written, then with one read of what was overwritten, then with any number; each
//! first without real time, then with it. A component in which a simpler cycle was found is not searched
//! for a less simple one. So whatever is found needs all the sorts that it has.

use std::collections::{HashMap, HashSet, VecDeque};

use petgraph::algo::kosaraju_scc;
use petgraph::graph::{DiGraph, EdgeIndex, NodeIndex};
use petgraph::visit::{EdgeFiltered, EdgeRef};

use super::graph::{Edge, Graph, Sorts};
use super::report::{Class, Report, describe};
use crate::history::Operation;

/// Edges that are looked at for the shortest cycle of a component; when they are used up, the shortest
/// until then has to do.
const LOOKS_MAX: u64 = 4_000_000;

/// Transactions of which each must have come before the next, and the last before the first.
pub(super) struct Cycle {
    pub class: Class,
    /// Transactions, by number, each with why it comes before the next.
    pub steps: Vec<(usize, Edge)>,
}

/// Finds the cycles of a graph, and tells them.
pub(super) fn report(graph: &Graph, transactions: &[Operation], wrote: &str, report: &mut Report) {
    report.count("edges", graph.edges.edge_count());
    for cycle in find(graph) {
        report.add(cycle.class, || story(&cycle, transactions, wrote));
    }
}

fn story(cycle: &Cycle, transactions: &[Operation], wrote: &str) -> String {
    let mut story = format!("{} transactions, each before the next:", cycle.steps.len());
    for (number, _) in &cycle.steps {
        story += &format!("\n{}", describe(&transactions[*number]));
    }
    for (place, (number, edge)) in cycle.steps.iter().enumerate() {
        let (next, _) = &cycle.steps[(place + 1) % cycle.steps.len()];
        story += &format!("\n{}", edge.story(&transactions[*number], &transactions[*next], wrote));
    }
    story
}

const DATA: [Sorts; 3] = [Sorts::WW, Sorts::WR, Sorts::RW];

/// Finds a shortest cycle of each component and class.
pub(super) fn find(graph: &Graph) -> Vec<Cycle> {
    // Most graphs have no cycle at all, and of most others only a small part has.
    let mut cyclic = vec![false; graph.edges.node_count()];
    for component in kosaraju_scc(&graph.edges).into_iter().filter(|component| component.len() > 1) {
        component.iter().for_each(|node| cyclic[node.index()] = true);
    }
    if !cyclic.contains(&true) {
        return Vec::new();
    }
    let number = |node: NodeIndex, number: &usize| cyclic[node.index()].then_some(*number);
    let mut search =
        Search { edges: graph.edges.filter_map(number, |_, edge| Some(*edge)), found: Vec::new() };
    let mut sorts = Sorts::WW;
    for (added, rw_max) in [(Sorts::WW, 0), (Sorts::WR, 0), (Sorts::RW, 1), (Sorts::RW, usize::MAX)] {
        sorts = sorts | added;
        search.components(sorts, rw_max);
        search.components(sorts | Sorts::RT, rw_max);
    }
    search.found.into_iter().map(|found| found.cycle).collect()
}

struct Search {
    edges: DiGraph<usize, Edge>,
    found: Vec<Found>,
}

struct Found {
    sorts: Sorts,
    /// A node of the cycle.
    node: NodeIndex,
    cycle: Cycle,
}

impl Search {
    /// Looks for cycles that have these sorts of edges, and at most so many of the sort `rw`.
    fn components(&mut self, sorts: Sorts, rw_max: usize) {
        let allowed = EdgeFiltered::from_fn(&self.edges, |edge| sorts.contains(edge.weight().sort()));
        let mut component_of = vec![usize::MAX; self.edges.node_count()];
        let mut components = kosaraju_scc(&allowed);
        components.retain(|component| component.len() > 1);
        for (number, component) in components.iter().enumerate() {
            component.iter().for_each(|node| component_of[node.index()] = number);
        }
        let mut simpler = vec![false; components.len()];
        for found in self.found.iter().filter(|found| sorts.contains(found.sorts)) {
            simpler[component_of[found.node.index()]] = true;
        }
        for (number, component) in components.iter().enumerate().filter(|(number, _)| !simpler[*number]) {
            let inside = |node: NodeIndex| component_of[node.index()] == number;
            let shortest = Shortest::new(&self.edges, sorts, &inside);
            let path = if rw_max == 1 { shortest.with_one_rw(component) } else { shortest.cycle(component) };
            if let Some(path) = path {
                let node = self.edges.edge_endpoints(path[0]).expect("it is an edge of this graph").0;
                let cycle = self.cycle(path);
                self.found.push(Found { sorts, node, cycle });
            }
        }
    }

    /// A cycle of edges. Several steps of real time after one another are as good as one.
    fn cycle(&self, mut path: Vec<EdgeIndex>) -> Cycle {
        let is_realtime = |edge: &EdgeIndex| self.edges[*edge] == Edge::Realtime;
        let data = path.iter().position(|edge| !is_realtime(edge)).expect("real time has no cycle");
        path.rotate_left(data);
        path.dedup_by(|edge, before| is_realtime(edge) && is_realtime(before));
        let step = |edge: &EdgeIndex| {
            let (from, _) = self.edges.edge_endpoints(*edge).expect("it is an edge of this graph");
            (self.edges[from], self.edges[*edge])
        };
        let steps: Vec<_> = path.iter().map(step).collect();
        let has = |sort| steps.iter().filter(|(_, edge)| edge.sort() == sort).count();
        let class = match (DATA.map(has), has(Sorts::RT) > 0) {
            ([_, 0, 0], false) => Class::G0,
            ([_, 0, 0], true) => Class::G0Realtime,
            ([_, _, 0], false) => Class::G1c,
            ([_, _, 0], true) => Class::G1cRealtime,
            ([_, _, 1], false) => Class::GSingle,
            ([_, _, 1], true) => Class::GSingleRealtime,
            ([_, _, _], false) => Class::G2Item,
            ([_, _, _], true) => Class::G2ItemRealtime,
        };
        Cycle { class, steps }
    }
}

/// The search for a shortest cycle of a component.
struct Shortest<'g, F> {
    edges: &'g DiGraph<usize, Edge>,
    sorts: Sorts,
    inside: &'g F,
    best: Option<Vec<EdgeIndex>>,
    length: usize,
    looks: u64,
}

/// A node, and whether it was reached by real time: if so, one more step of real time costs nothing.
type Place = (NodeIndex, bool);

impl<'g, F: Fn(NodeIndex) -> bool> Shortest<'g, F> {
    fn new(edges: &'g DiGraph<usize, Edge>, sorts: Sorts, inside: &'g F) -> Self {
        Shortest { edges, sorts, inside, best: None, length: usize::MAX, looks: 0 }
    }

    fn cycle(mut self, component: &[NodeIndex]) -> Option<Vec<EdgeIndex>> {
        let mut tried = HashSet::new();
        for edge in self.backwards_first(component, self.sorts) {
            let (node, _) = self.edges.edge_endpoints(edge).expect("it is an edge of this graph");
            if tried.insert(node) {
                self.path(node, node, None);
            }
            if self.is_done() {
                break;
            }
        }
        self.best
    }

    fn with_one_rw(mut self, component: &[NodeIndex]) -> Option<Vec<EdgeIndex>> {
        for edge in self.backwards_first(component, Sorts::RW) {
            let (from, to) = self.edges.edge_endpoints(edge).expect("it is an edge of this graph");
            self.path(to, from, Some(edge));
            if self.is_done() {
                break;
            }
        }
        self.best
    }

    /// The edges of a component. First come those that lead furthest back: transactions are numbered as
    /// they began, and no cycle has only edges that lead forwards.
    fn backwards_first(&self, component: &[NodeIndex], sorts: Sorts) -> Vec<EdgeIndex> {
        let edges = component.iter().flat_map(|node| self.edges.edges(*node));
        let edges = edges.filter(|edge| sorts.contains(edge.weight().sort()) && (self.inside)(edge.target()));
        let back = |from: NodeIndex, to: NodeIndex| self.edges[from] as i64 - self.edges[to] as i64;
        let mut edges: Vec<_> = edges.map(|edge| (back(edge.source(), edge.target()), edge.id())).collect();
        edges.sort_by_key(|(back, _)| -back);
        edges.into_iter().map(|(_, edge)| edge).collect()
    }

    /// No cycle has less than two steps.
    fn is_done(&self) -> bool {
        self.length == 2 || self.looks >= LOOKS_MAX
    }

    /// Looks for a path that makes a shorter cycle; with an edge of the sort `rw` to close it, for one
    /// that has no other such edge.
    fn path(&mut self, from: NodeIndex, to: NodeIndex, close: Option<EdgeIndex>) {
        let is_allowed =
            |edge: &Edge| self.sorts.contains(edge.sort()) && (close.is_none() || edge.sort() != Sorts::RW);
        let closing = usize::from(close.is_some());
        let mut reached: HashMap<Place, (usize, Option<(Place, EdgeIndex)>)> = HashMap::new();
        let mut waiting = VecDeque::from([((from, false), 0)]);
        let mut end: Option<(Place, EdgeIndex)> = None;
        reached.insert((from, false), (0, None));
        while let Some((place, length)) = waiting.pop_front() {
            if length + closing >= self.length {
                break;
            }
            for edge in self.edges.edges(place.0) {
                self.looks += 1;
                if !is_allowed(edge.weight()) || !(self.inside)(edge.target()) {
                    continue;
                }
                let realtime = *edge.weight() == Edge::Realtime;
                let next = ((edge.target(), realtime), length + usize::from(!(realtime && place.1)));
                if edge.target() == to {
                    if next.1 + closing < self.length {
                        self.length = next.1 + closing;
                        end = Some((place, edge.id()));
                    }
                } else if reached.get(&next.0).is_none_or(|(before, _)| next.1 < *before) {
                    reached.insert(next.0, (next.1, Some((place, edge.id()))));
                    if next.1 == length { waiting.push_front(next) } else { waiting.push_back(next) }
                }
            }
        }
        let Some((mut place, last)) = end else { return };
        let mut path = vec![last];
        while let Some((before, edge)) = reached.get(&place).and_then(|(_, before)| *before) {
            path.push(edge);
            place = before;
        }
        path.reverse();
        path.extend(close);
        self.best = Some(path);
    }
}

#[cfg(test)]
mod tests;
