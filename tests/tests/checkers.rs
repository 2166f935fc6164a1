//! The checkers on histories of the size of a long run. What each of them finds is proven beside it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use troth_tests::checker::{Options, check};
use troth_tests::history::generate::{Flaw, OPENING, Plan, history};
use troth_tests::history::{Workload, edn};

/// How long a history of ten thousand transactions may take.
const CHECKED_WITHIN: Duration = Duration::from_secs(10);

fn long(workload: Workload) -> Plan {
    let plan = Plan::new(workload, 5, 10_000);
    Plan { clients: 20, keys: 10, writes_per_key: 200, infos: 0.02, fails: 0.02, ..plan }
}

fn options(plan: &Plan, witness: bool) -> Options {
    let opening: BTreeMap<i64, i64> = (0..plan.keys as i64).map(|account| (account, OPENING)).collect();
    Options { opening, witness, ..Options::default() }
}

#[test]
fn ten_thousand_transactions_are_checked_in_seconds() {
    for workload in Workload::ALL {
        let plan = long(workload);
        let made = history(&plan);
        let mut text = Vec::new();
        edn::write(&made, &mut text).expect("written to memory");
        for witness in [false, true] {
            let began = Instant::now();
            let read = edn::read(&text[..], workload).expect("what was written is a history");
            let report = check(&read, workload, &options(&plan, witness));
            let elapsed = began.elapsed();
            assert!(report.valid(), "{report}");
            assert!(elapsed < CHECKED_WITHIN, "{workload}: {elapsed:?}");
        }
    }
}

#[test]
fn a_flawed_store_is_found_without_timestamps() {
    for workload in Workload::ALL {
        let flaw = match workload {
            Workload::Append | Workload::WriteSkew | Workload::Register => Flaw::Snapshot,
            Workload::Bank | Workload::Counter => Flaw::Unchecked,
            // Where nobody writes what he has read, only old reads can be wrong.
            Workload::Set | Workload::LongFork => Flaw::Stale,
        };
        let plan = Plan { flaw, ..long(workload) };
        let report = check(&history(&plan), workload, &options(&plan, false));
        assert!(!report.valid(), "{report}");
    }
}
