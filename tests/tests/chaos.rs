//! A short slice of chaos for two workloads; `make chaos` runs the long ones.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, sleep};
use troth_sdk::Client;
use troth_sdk::harness::processes::{Shape, free_ports};
use troth_tests::chaos::nemesis::Nemesis;
use troth_tests::chaos::servers::{Equipment, Servers};
use troth_tests::chaos::{Plan, run};
use troth_tests::drill::Server;
use troth_tests::history::{Workload, edn};
use troth_tests::{PATIENCE, logging, programs, seed};

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
    assert!(outcome.history.operations().iter().all(|operation| operation.completed.is_some()));
}

/// Timestamps follow the wall clock of the coordinator that leads, so they tell what it shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_moved_is_the_one_that_a_server_goes_by() {
    const FORWARD: Duration = Duration::from_secs(3_600);
    logging();
    let folder = tempfile::tempdir().expect("a folder");
    let equipment = Equipment { disks: false, clocks: true };
    let shape = Shape { coordinators: 1, nodes: 1, replicas: 1, shards: 2 };
    let mut servers =
        Servers::create(folder.path(), programs(), shape, equipment, 1).await.expect("it is laid out");
    for server in servers.all().collect::<Vec<_>>() {
        servers.start(server).expect("it starts");
    }
    let port = free_ports(1).expect("there are ports")[0];
    let mut config = servers.client_config(([127, 0, 0, 1], port).into()).expect("a configuration");
    config.timeout = PATIENCE;
    let client = Client::connect(config).await.expect("it connects");
    let ahead = async || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        let begun = client.begin().await.expect("it begins").id().start.millis();
        Duration::from_millis(begun).saturating_sub(now)
    };
    let patience = Instant::now() + PATIENCE;
    assert!(ahead().await < FORWARD / 2, "the clock is right at first");
    servers.set_clock(Server::Coordinator(1), FORWARD.as_millis() as i64).expect("it is set");
    while ahead().await < FORWARD / 2 {
        assert!(Instant::now() < patience, "the server has not seen its clock move");
        sleep(Duration::from_millis(50)).await;
    }
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_survive_everything_that_can_go_wrong() {
    chaos(Workload::Append).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bank_survives_everything_that_can_go_wrong() {
    chaos(Workload::Bank).await;
}
