//! What goes wrong between parties: which links, and how.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, RngExt};

use crate::network::{Link, Way};

/// A server or an application, and where it talks from.
pub type Party = (String, SocketAddr);

/// Something is wrong with some links.
pub struct Impaired {
    /// What, in words.
    pub story: String,
    /// The links.
    pub ways: Vec<Way>,
    /// What is wrong with them.
    pub link: Link,
    /// Whether it comes and goes.
    pub flaps: bool,
}

/// Shapes of partitions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shape {
    /// One neither hears nor is heard.
    Alone,
    /// One hears nothing.
    Deaf,
    /// One is not heard.
    Mute,
    /// Two halves do not hear each other.
    Halves,
    /// One half does not reach the other.
    HalfReach,
    /// Everybody sees a majority, and no two see the same.
    Ring,
    /// One is cut off, and is not, and is.
    Flapping,
}

impl Shape {
    const ALL: [Shape; 7] = [
        Shape::Alone,
        Shape::Deaf,
        Shape::Mute,
        Shape::Halves,
        Shape::HalfReach,
        Shape::Ring,
        Shape::Flapping,
    ];
}

/// Links that are cut, between parties, at least two. The leader is hit more often than others.
pub fn partition(mut parties: Vec<Party>, leader: Option<Party>, rng: &mut StdRng) -> Impaired {
    parties.shuffle(rng);
    if let Some(leader) = leader
        && rng.random_bool(0.4)
    {
        parties.retain(|party| *party != leader);
        parties.insert(0, leader);
    }
    let shape = *Shape::ALL.choose(rng).expect("there are some");
    let (story, ways) = cut(shape, &parties);
    Impaired { story, ways, link: Link::CUT, flaps: shape == Shape::Flapping }
}

fn cut(shape: Shape, parties: &[Party]) -> (String, Vec<Way>) {
    let one = &parties[0];
    let names =
        |parties: &[Party]| parties.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    let from_one = parties[1..].iter().map(|other| (one.1, other.1));
    let (left, right) = parties.split_at(parties.len() / 2);
    let to_the_right = left.iter().flat_map(|one| right.iter().map(|other| (one.1, other.1)));
    match shape {
        Shape::Alone => (format!("{} is alone", one.0), both_ways(from_one)),
        Shape::Deaf => (format!("{} hears nothing", one.0), from_one.map(turned).collect()),
        Shape::Mute => (format!("{} is not heard", one.0), from_one.collect()),
        Shape::Halves => (format!("{} | {}", names(left), names(right)), both_ways(to_the_right)),
        Shape::HalfReach => {
            (format!("{} do not reach {}", names(left), names(right)), to_the_right.collect())
        }
        Shape::Ring => {
            let count = parties.len();
            // To either side.
            let reach = count / 4 + 1;
            let far = |one: usize, other: usize| {
                let distance = one.abs_diff(other);
                distance.min(count - distance) > reach
            };
            let others = |one: usize| (0..count).filter(move |other| far(one, *other));
            let ways = (0..count).flat_map(|one| others(one).map(move |other| (one, other)));
            let ways = ways.map(|(one, other)| (parties[one].1, parties[other].1));
            (format!("a ring of majorities: {}", names(parties)), ways.collect())
        }
        Shape::Flapping => (format!("{} is cut off now and then", one.0), both_ways(from_one)),
    }
}

fn turned((from, to): Way) -> Way {
    (to, from)
}

fn both_ways(ways: impl Iterator<Item = Way>) -> Vec<Way> {
    ways.flat_map(|way| [way, turned(way)]).collect()
}

/// Links between parties that are slow, lossy, or worse: of one of them, or all.
pub fn spoil(parties: &[Party], rng: &mut StdRng) -> Impaired {
    let (link, mut story) = bad(rng);
    let everywhere = rng.random_bool(0.3);
    let from = if everywhere {
        story += "everywhere";
        parties
    } else {
        let one = rng.random_range(0..parties.len());
        let _ = write!(story, "from and to {}", parties[one].0);
        &parties[one..=one]
    };
    let pairs = from.iter().flat_map(|from| parties.iter().map(|to| (from.1, to.1)));
    let ways: BTreeSet<Way> = both_ways(pairs.filter(|(from, to)| from != to)).into_iter().collect();
    Impaired { story, ways: ways.into_iter().collect(), link, flaps: false }
}

/// A link with one fault or several, and what they are.
fn bad(rng: &mut StdRng) -> (Link, String) {
    let mut link = Link::default();
    let mut story = String::new();
    let parts: [(&mut f64, f64, &str); 4] = [
        (&mut link.loss, 0.3, "lost"),
        (&mut link.duplicated, 0.3, "doubled"),
        (&mut link.reordered, 0.3, "overtaken"),
        (&mut link.corrupted, 0.1, "damaged"),
    ];
    for (part, most, what) in parts {
        if rng.random_bool(0.4) {
            *part = rng.random_range(0.01..most);
            let _ = write!(story, "{:.0} % {what}, ", 100.0 * *part);
        }
    }
    if story.is_empty() || rng.random_bool(0.4) {
        link.delay = millis(rng, 1..150);
        link.jitter = millis(rng, 0..100);
        let (delay, jitter) = (link.delay.as_millis(), link.jitter.as_millis());
        let _ = write!(story, "{delay} to {} ms late, ", delay + jitter);
    }
    (link, story)
}

fn millis(rng: &mut impl Rng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(rng.random_range(range))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn parties(count: u16) -> Vec<Party> {
        (1..=count).map(|at| (format!("p{at}"), SocketAddr::from(([127, 0, 0, 1], at)))).collect()
    }

    /// Whom each party hears, itself too.
    fn heard(count: u16, ways: &[Way]) -> Vec<BTreeSet<u16>> {
        let hears = |to: u16| {
            let cut = |from: u16| ways.iter().any(|way| (way.0.port(), way.1.port()) == (from, to));
            (1..=count).filter(|from| !cut(*from)).collect()
        };
        (1..=count).map(hears).collect()
    }

    #[test]
    fn partitions_are_what_they_are_called() {
        let heard = |shape| heard(4, &cut(shape, &parties(4)).1);
        let all: BTreeSet<u16> = (1..=4).collect();
        let rest: BTreeSet<u16> = (2..=4).collect();
        let only = BTreeSet::from([1]);
        for shape in [Shape::Alone, Shape::Flapping] {
            assert_eq!(heard(shape), [&only, &rest, &rest, &rest].map(Clone::clone));
        }
        assert_eq!(heard(Shape::Deaf), [&only, &all, &all, &all].map(Clone::clone));
        assert_eq!(heard(Shape::Mute), [&all, &rest, &rest, &rest].map(Clone::clone));
        let (left, right) = (BTreeSet::from([1, 2]), BTreeSet::from([3, 4]));
        assert_eq!(heard(Shape::Halves), [&left, &left, &right, &right].map(Clone::clone));
        assert_eq!(heard(Shape::HalfReach), [&all, &all, &right, &right].map(Clone::clone));
    }

    #[test]
    fn in_a_ring_everybody_hears_a_majority_and_no_two_the_same() {
        for count in 6..=16 {
            let heard = heard(count, &cut(Shape::Ring, &parties(count)).1);
            assert!(heard.iter().all(|hears| hears.len() > usize::from(count) / 2), "{heard:?}");
            let distinct: BTreeSet<_> = heard.iter().collect();
            assert_eq!(distinct.len(), heard.len(), "{heard:?}");
        }
    }

    #[test]
    fn whatever_is_spoilt_is_spoilt_both_ways_and_somehow() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..100 {
            let Impaired { story, ways, link, flaps } = spoil(&parties(5), &mut rng);
            assert!([8, 20].contains(&ways.len()), "{story}: {ways:?}");
            assert!(ways.iter().all(|way| ways.contains(&turned(*way))));
            assert!(link != Link::default() && !link.cut && !flaps, "{story}");
        }
    }
}
