//! The simulation must find deliberate bugs: a slice of `make mutations`, which tries all bugs on all layers.

use troth_protocol::mutation::{Bug, switch};
use troth_tests::sim::run::first_failing;

/// Those for which it needs hundreds of seeds, or which the pure hearts cannot have. The last two are found by the tests
/// of an operator's slips.
const FOUND_LATE: [Bug; 5] = [
    Bug::AppliedIndexNotAtomic,
    Bug::DeposedAborts,
    Bug::ShardLeaderWithoutFreshTime,
    Bug::FormsAGroupFromAnEmptyFolder,
    Bug::AcceptsAnOlderCopy,
];

#[test]
fn the_simulation_finds_bugs_that_were_put_in() {
    // An assertion of the product is a finding, and not worth a word here.
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for bug in Bug::ALL.into_iter().filter(|bug| !FOUND_LATE.contains(bug)) {
        switch(Some(bug));
        if first_failing(0..100, 200).is_none() {
            missed.push(bug.name());
        }
    }
    switch(None);
    drop(std::panic::take_hook());
    assert_eq!(missed, Vec::<&str>::new(), "nobody has found these");
    assert_eq!(first_failing(0..3, 200), None, "without a bug nothing is found");
}
