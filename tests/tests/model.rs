//! A slice of the model checker: the smallest cases. All of them are `make model`.

use std::time::Duration;

use troth_tests::model::{Case, Explorer, cases};

/// Far more than the small ones need.
const LIMIT: Duration = Duration::from_secs(300);

fn case(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).expect("there is such a case")
}

#[test]
fn small_cases_are_explored_to_the_end_and_break_no_promise() {
    for name in ["reader", "lost", "double", "early", "one-deposed", "one-crash"] {
        let explored = Explorer::new(case(name)).explore(LIMIT);
        assert!(explored.failures.is_empty(), "{name}: {:?}", explored.failures);
        assert!(explored.complete && explored.states > 100, "{name}: {explored:?}");
    }
}

/// What is known to make no difference is left out; so it must make none.
#[test]
fn orders_that_are_left_out_lead_nowhere_else() {
    for name in ["reader", "lost", "double", "early", "one-deposed", "one-crash"] {
        let few = Explorer::new(case(name)).endings();
        let all = Explorer::of_every_order(case(name)).endings();
        let missed: Vec<_> = all.difference(&few).take(3).collect();
        assert!(few == all, "{name}: {} endings of {}, and not {missed:#?}", few.len(), all.len());
        assert!(!few.is_empty(), "{name} ends");
    }
}
