//! A slice of the second layer of simulation. The long ones are `make stack`.

use std::time::Duration;

use troth_tests::logging;
use troth_tests::stack::{Plan, folder, run};

#[test]
fn real_servers_on_a_held_clock_keep_their_promises() {
    logging();
    for seed in 0..2 {
        let plan = Plan { seed, workload: None, time: Duration::from_secs(20), loud: false };
        let folder = folder().expect("a temporary folder");
        let outcome = run(&plan, folder.path()).expect("the cluster starts");
        let again = format!("run again: stack --seed {seed} --seconds 20; {}", outcome.workload);
        assert_eq!(outcome.violations, Vec::<String>::new(), "{again}: {:#?}", outcome.journal);
        let (ok, ..) = outcome.counts();
        assert!(ok > 50 && outcome.faults.len() > 2, "{again}: {ok} operations, {:?}", outcome.faults);
    }
}
