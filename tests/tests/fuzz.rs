//! What a fuzzer has found before, what things were made for, and mutations of both: a slice of `make fuzz` that
//! needs nothing but time.

use std::fs;
use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use troth_tests::fuzz::{TARGETS, Target};

const MUTATIONS: usize = 3_000;

/// What was kept for a target.
fn kept(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(target.name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("readable")).collect()
}

/// Changes a few things, as a disk, a network or a stranger might.
fn mutated(seeds: &[Vec<u8>], rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = seeds.choose(rng).expect("there are some").clone();
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..=bytes.len());
        match rng.random_range(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = *[0, 1, 0x7f, 0x80, 0xff].choose(rng).expect("five"),
            2 => bytes.truncate(at),
            3 => bytes.insert(at, rng.random()),
            _ => {
                let other = seeds.choose(rng).expect("there are some");
                let from = rng.random_range(0..=other.len());
                let to = rng.random_range(from..=other.len());
                bytes.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
    bytes
}

#[test]
fn everything_that_takes_bytes_takes_any() {
    for target in TARGETS {
        let mut seeds = kept(&target);
        assert!(!seeds.is_empty(), "{}: nothing is kept", target.name);
        seeds.extend((target.samples)());
        seeds.iter().for_each(|bytes| (target.run)(bytes));
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..MUTATIONS {
            (target.run)(&mutated(&seeds, &mut rng));
        }
    }
}

#[test]
fn samples_are_understood() {
    use troth_protocol::message::{Request, Response};
    use troth_protocol::wire::decode;
    use troth_tests::history::{Workload, edn};
    let of = |name| (troth_tests::fuzz::target(name).expect("it is there").samples)();
    assert!(of("request").iter().all(|bytes| decode::<Request>(bytes).is_ok()));
    assert!(of("response").iter().all(|bytes| decode::<Response>(bytes).is_ok()));
    for (sample, workload) in of("history").iter().zip(Workload::ALL) {
        edn::read(&sample[1..], workload).expect("it is a history");
    }
}
