//! A short slice of chaos for two workloads; `make chaos` runs the long ones.

use std::time::Duration;

use troth_sdk::harness::processes::Shape;
use troth_tests::chaos::nemesis::Nemesis;
use troth_tests::chaos::{Plan, run};
use troth_tests::history::{Workload, edn};
use troth_tests::{logging, programs, seed};

/// For how long things go wrong.
const TIME: Duration = Duration::from_secs(25);

async fn chaos(workload: Workload) {
    logging();
    let folder = tempfile::tempdir().expect("a folder");
    // Only root can mount disks that fail.
    let possible = |nemesis: &Nemesis| cfg!(feature = "root") || !nemesis.is_of_disks();
    let plan = Plan {
        workload,
        nemeses: Nemesis::ALL.into_iter().filter(possible).collect(),
        time: TIME,
        seed: seed(),
        shape: Shape { coordinators: 3, nodes: 4, replicas: 3, shards: 8 },
        clients: 3,
        processes: 3,
        rate: 50.0,
        folder: folder.path().to_owned(),
        binaries: programs().to_owned(),
        environment: Vec::new(),
        loud: false,
    };
    let outcome = run(&plan).await.expect("the run is made");
    let report = outcome.to_json();
    if !outcome.is_good() {
        let folder = folder.keep();
        println!("{}\n{report:#}", outcome.journal.join("\n"));
        panic!("{workload}: the cluster has not kept its promises; its files: {}", folder.display());
    }
    assert!(outcome.tally.faults.values().sum::<u64>() >= 5, "{report:#}");
    assert!(outcome.ok_during_faults.0 > 0, "{report:#}");
    let mut text = Vec::new();
    edn::write(&outcome.history, &mut text).expect("written to memory");
    assert_eq!(edn::read(&text[..], workload).expect("it is a history"), outcome.history);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_survive_everything_that_can_go_wrong() {
    chaos(Workload::Append).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bank_survives_everything_that_can_go_wrong() {
    chaos(Workload::Bank).await;
}
