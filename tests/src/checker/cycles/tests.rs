//! Cycles of small graphs: which are found, which are shortest, and what they are called.

use std::collections::HashSet;

use proptest::collection::vec;
use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

use super::{Cycle, find};
use crate::checker::graph::{Basis, Edge, Graph};
use crate::checker::report::Class;

const WW: Edge = Edge::Ww { key: 0, before: 0, after: 0, basis: Basis::Listed };
const WR: Edge = Edge::Wr { key: 0, value: 0 };
const RW: Edge = Edge::Rw { key: 0, read: None, after: 0, basis: Basis::Listed };
const RT: Edge = Edge::Realtime;

fn cycles(edges: &[(usize, Edge, usize)]) -> Vec<Cycle> {
    let mut graph = Graph::new(10);
    edges.iter().for_each(|(from, edge, to)| graph.add(*from, *to, *edge));
    find(&graph)
}

fn check(edges: &[(usize, Edge, usize)], expected: &[(Class, &[usize])]) {
    let found = cycles(edges).into_iter().map(|cycle| {
        let mut numbers: Vec<_> = cycle.steps.iter().map(|(number, _)| *number).collect();
        numbers.sort_unstable();
        (cycle.class, numbers)
    });
    let expected: Vec<_> = expected.iter().map(|(class, numbers)| (*class, numbers.to_vec())).collect();
    assert_eq!(found.collect::<Vec<_>>(), expected);
}

#[test]
fn every_class_is_recognized() {
    let pair = |one, other, class| check(&[(1, one, 2), (2, other, 1)], &[(class, &[1, 2])]);
    pair(WW, WW, Class::G0);
    pair(WW, RT, Class::G0Realtime);
    pair(WR, WW, Class::G1c);
    pair(WR, RT, Class::G1cRealtime);
    pair(RW, WW, Class::GSingle);
    pair(RW, RT, Class::GSingleRealtime);
    pair(RW, RW, Class::G2Item);
    check(&[(1, RW, 2), (2, RT, 3), (3, RW, 1)], &[(Class::G2ItemRealtime, &[1, 2, 3])]);
    check(&[(1, RW, 2), (2, WW, 3), (3, RT, 4)], &[]);
}

#[test]
fn the_shortest_of_a_component_is_found() {
    check(&[(1, WW, 2), (2, WW, 3), (3, WW, 4), (4, WW, 1), (3, WW, 1)], &[(Class::G0, &[1, 2, 3])]);
    check(&[(1, RW, 2), (2, WW, 3), (3, WW, 1), (2, WR, 1)], &[(Class::GSingle, &[1, 2])]);
}

#[test]
fn steps_of_real_time_after_one_another_are_as_good_as_one() {
    let longer = [(1, RT, 2), (2, RT, 3), (3, RT, 4), (4, WW, 1), (1, WW, 5), (5, WW, 6), (6, RT, 1)];
    check(&longer, &[(Class::G0Realtime, &[1, 4])]);
}

#[test]
fn a_simpler_cycle_hides_less_simple_ones_of_its_component() {
    check(&[(1, WW, 2), (2, WW, 1), (1, RW, 2), (2, RW, 1)], &[(Class::G0, &[1, 2])]);
    let apart = [(1, WW, 2), (2, WW, 1), (3, RW, 4), (4, RW, 3)];
    check(&apart, &[(Class::G0, &[1, 2]), (Class::G2Item, &[3, 4])]);
    let joined_by_time = [(1, WW, 2), (2, WW, 1), (3, RW, 4), (4, RW, 3), (2, RT, 3), (4, RT, 1)];
    check(&joined_by_time, &[(Class::G0, &[1, 2]), (Class::G2Item, &[3, 4])]);
    check(
        &[(1, WW, 2), (2, RT, 1), (1, RW, 2), (2, WR, 1)],
        &[(Class::G0Realtime, &[1, 2]), (Class::G1c, &[1, 2])],
    );
}

#[test]
fn a_long_chain_does_not_overflow_the_stack() {
    let mut graph = Graph::new(200_000);
    (1..200_000).for_each(|number| graph.add(number - 1, number, RT));
    assert!(find(&graph).is_empty());
    graph.add(199_999, 0, WW);
    let found = find(&graph);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].steps.len(), 2);
}

/// Whether there is a way from each node to each other, by brute force.
fn reaches(edges: &[(usize, Edge, usize)]) -> HashSet<(usize, usize)> {
    let mut reaches: HashSet<_> = edges.iter().map(|(from, _, to)| (*from, *to)).collect();
    for middle in 0..10 {
        for from in 0..10 {
            for to in 0..10 {
                if reaches.contains(&(from, middle)) && reaches.contains(&(middle, to)) {
                    reaches.insert((from, to));
                }
            }
        }
    }
    reaches
}

proptest! {
    #[test]
    fn cycles_are_found_if_there_are_any_and_are_cycles(
        edges in vec((0..10_usize, 0..3_usize, 0..10_usize), 0..25),
    ) {
        // Real time only forwards, as it runs.
        let edges = edges.iter().filter(|(from, _, to)| from != to);
        let edges: Vec<_> = edges.map(|(from, sort, to)| (*from, [WW, WR, RW][*sort], *to)).collect();
        let time = (1..10).map(|number| (number - 1, RT, number));
        let edges: Vec<_> = edges.into_iter().chain(time).collect();
        let reaches = reaches(&edges);
        let found = cycles(&edges);
        prop_assert_eq!(found.is_empty(), (0..10).all(|node| !reaches.contains(&(node, node))));
        for cycle in found {
            let numbers: HashSet<_> = cycle.steps.iter().map(|(number, _)| *number).collect();
            prop_assert_eq!(numbers.len(), cycle.steps.len(), "no transaction is in it twice");
            for (place, (number, edge)) in cycle.steps.iter().enumerate() {
                let (next, _) = cycle.steps[(place + 1) % cycle.steps.len()];
                let is_there = edges.contains(&(*number, *edge, next));
                prop_assert!(is_there || *edge == RT && *number < next, "{number} to {next}");
            }
        }
    }
}
