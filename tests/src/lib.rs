//! What the end-to-end tests share: clusters, patience, and conditions to wait for.

pub mod chaos;
pub mod checker;
pub mod disk;
pub mod drill;
pub mod fuzz;
pub mod hands;
pub mod history;
pub mod ledger;
pub mod model;
pub mod network;
pub mod page;
pub mod rude;
pub mod seeds;
pub mod sim;
#[cfg(feature = "stack")]
pub mod stack;
pub mod witness;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};
use troth_sdk::Client;
use troth_sdk::embedded::{Cluster, ClusterConfig};
use troth_sdk::harness::processes::{Processes, Shape, binaries};
use troth_sdk::operator::Operator;

/// How long anything may take that must happen.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Logs to the test's output what `RUST_LOG` asks for.
pub fn logging() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    // The first test of a process sets it up for all.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

/// Logs to standard error what `RUST_LOG` asks for: standard output is for what a program is asked for.
pub fn logging_of_a_program() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// An embedded cluster in a temporary folder, and a client of it.
pub struct Embedded {
    /// The cluster.
    pub cluster: Cluster,
    /// The client.
    pub client: Client,
    folder: TempDir,
}

impl Embedded {
    /// One coordinator, three participants, one replica, in a new folder.
    pub async fn start() -> Embedded {
        Embedded::start_in(tempfile::tempdir().expect("a temporary folder")).await
    }

    /// The same, in a folder where a cluster may have been before.
    pub async fn start_in(folder: TempDir) -> Embedded {
        logging();
        let config = ClusterConfig { dir: folder.path().to_owned(), ..ClusterConfig::default() };
        let cluster = in_time(Cluster::start(config)).await.expect("the cluster starts");
        let client = in_time(cluster.client()).await.expect("the cluster gets ready");
        Embedded { cluster, client, folder }
    }

    /// Stops everything, and hands back the folder with the data.
    pub async fn stop(self) -> TempDir {
        in_time(self.client.close()).await;
        in_time(self.cluster.shutdown()).await;
        self.folder
    }
}

/// Awaits something that must not take for ever.
///
/// # Panics
/// If it takes longer than [`PATIENCE`].
pub async fn in_time<T>(work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.expect("in time")
}

/// Awaits a condition.
///
/// # Panics
/// If it does not come true within [`PATIENCE`].
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// The programs of this build. Cargo builds a package's programs for its own tests only, so they
/// are built here, once; that takes a moment if they are there already.
///
/// # Panics
/// If they do not compile.
pub fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        // The cargo that runs this program, or the one that a shell would take: that which has compiled it, run
        // by itself, may find another compiler.
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // What cargo tells a program that it runs is not for the cargo that this program runs: build scripts
        // look at some of it, and what both have built would be built anew by each of them, every time.
        for (name, _) in std::env::vars_os() {
            let told = ["CARGO_MANIFEST_", "CARGO_PKG_", "OUT_DIR"];
            if told.iter().any(|told| name.to_string_lossy().starts_with(told)) {
                cargo.env_remove(name);
            }
        }
        // With the features that `make` gives to whatever has this profile, in all of the workspace: nothing is
        // compiled again then. (Cargo leaves out a program of a package that is named, if its features are named
        // like this, without a word.)
        let mut features = String::from("troth-sdk/cli,troth-coordinator/otlp,troth-participant/otlp");
        let mut wanted = vec!["troth", "troth-coordinator", "troth-participant", "application"];
        let profile = match (cfg!(debug_assertions), cfg!(feature = "mutations")) {
            (true, _) => "dev",
            (false, false) => "release",
            (false, true) => {
                wanted.extend(["model", "stack"]);
                "mutations"
            }
        };
        cargo.args(["build", "--quiet", "--locked", "--profile", profile]);
        if profile != "release" {
            features += ",troth-tests/stack,troth-tests/mutations";
        }
        if profile == "dev" {
            // What only tests depend on has a say in the features of what all depend on, if a test is built too.
            cargo.args(["--test", "deploy"]);
        }
        if cfg!(feature = "root") {
            features += ",troth-tests/root";
        }
        cargo.args(["--features", &features]).args(wanted.iter().flat_map(|program| ["--bin", program]));
        let status =
            cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).status().expect("cargo runs");
        assert!(status.success(), "the programs do not compile");
        binaries().expect("the system tells where this program is")
    })
}

/// A cluster of real processes in a folder, started, and a client of it.
pub async fn processes(folder: &Path, shape: Shape) -> (Processes, Client) {
    logging();
    let mut processes = Processes::create(folder, programs(), shape).expect("laid out");
    processes.start().expect("started");
    let client = connect(&processes).await;
    (processes, client)
}

/// One coordinator, three participants, one replica.
pub const SMALL: Shape = Shape { coordinators: 1, nodes: 3, replicas: 1, shards: 16 };

/// A client of a cluster of processes.
pub async fn connect(processes: &Processes) -> Client {
    let mut config = processes.client_config().expect("certificates");
    config.timeout = PATIENCE;
    in_time(Client::connect(config)).await.expect("the cluster gets ready")
}

/// Waits until no transaction is prepared anywhere and no lock is held.
///
/// # Panics
/// If that does not come true within [`PATIENCE`].
pub async fn until_nothing_is_held(operator: &Operator) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = operator.status().await;
        if status.held() == Some((0, 0)) {
            return;
        }
        let in_doubt = operator.in_doubt().await;
        assert!(Instant::now() < deadline, "held in the end: {status:#?}, in doubt: {in_doubt:#?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// A seed for a random test: `TROTH_SEED` if set, else a new one. Printed, so that a failure can be
/// run again.
pub fn seed() -> u64 {
    let given = std::env::var("TROTH_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(rand::random);
    println!("seed {seed}: run again with TROTH_SEED={seed}");
    seed
}
