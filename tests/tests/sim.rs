//! A slice of the simulation. The long ones are `make sim`.

use std::collections::BTreeSet;

use troth_tests::sim::faults::Kind;
use troth_tests::sim::run::{Options, run, tell_of_panics};
use troth_tests::sim::schedule::Tracing;

fn check(options: &Options) {
    tell_of_panics();
    let (report, _) = run(options, Tracing::Number);
    assert_eq!(report.violations, Vec::<String>::new(), "run again: {} --trace", options.command());
    assert!(report.counts.ok > 0, "nothing happened at all: {}", options.command());
}

#[test]
fn a_hundred_seeds_break_no_promise() {
    for seed in 0..100 {
        check(&Options::new(seed, 100));
    }
}

#[test]
fn without_faults_everything_goes_well() {
    for seed in 0..10 {
        let without = BTreeSet::from(Kind::ALL);
        let options = Options { without, ..Options::new(seed, 100) };
        check(&options);
        let (report, _) = run(&options, Tracing::Number);
        assert!(report.faults.is_empty() && report.counts.unknown <= 2, "{report:?}");
    }
}

#[test]
fn a_seed_is_a_run_word_by_word() {
    for seed in 0..3 {
        let options = Options::new(seed, 60);
        let (first, second) = (run(&options, Tracing::Words), run(&options, Tracing::Words));
        assert_eq!(first.0, second.0);
        assert!(first.1 == second.1, "seed {seed} has two traces");
        assert!(first.1.lines().count() > 1_000, "there is a trace");
    }
}

/// Seeds that have failed once. What they meant then they may not mean any more; each bug has a test of
/// its own beside the code.
#[test]
fn seeds_that_have_failed_before() {
    for seed in [19, 103, 703, 791, 878, 1102, 1154, 1452, 2933, 3235] {
        check(&Options::new(seed, 200));
    }
}
