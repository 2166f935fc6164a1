//! The second layer of simulation: the real servers and the real client, with their Raft, QUIC, codecs and
//! RocksDB, on machines whose clock is held and whose network is in memory.
//!
//! ```text
//!   application ─┐                      ┌─ coordinators     each machine is a runtime in one thread; a tick
//!   application ─┼─ QUIC ─▶ fabric ◀────┤                   lets each of them work for a millisecond of
//!   operator ────┘    seeded loss,      └─ participants     its own time, in an order that chance decides
//!                     delay, partition
//! ```
//!
//! | module | what it is |
//! | --- | --- |
//! | `fabric` | datagrams in memory |
//! | `host` | a machine, and its clocks |
//! | `cluster` | all machines, and what runs on them |
//! | `faults` | what goes wrong |
//!
//! Hours of a cluster's life pass in minutes, since nobody waits for time to pass. A seed fixes the cluster, the
//! weather, the faults and what the applications ask for. It does not fix a run bit by bit: keys of TLS and
//! numbers of connections are random, and RocksDB writes and syncs in threads of its own. The layer
//! [below](crate::sim) is the one whose seeds are runs.

pub mod cluster;
pub mod fabric;
pub mod faults;
pub mod host;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;
use tokio::time::Instant;
use troth_replication::all_closed;
use troth_sdk::Client;

use self::cluster::{Cluster, Shape, Who};
use self::fabric::Fabric;
use self::faults::Faults;
use crate::chaos::application::{Applications, Settled, open_accounts};
use crate::checker::{self, Options};
use crate::history::generate::{Asker, OPENING, Plan as Asked};
use crate::history::{History, Kind, Workload};
use crate::network::{Impairment, Link, Traffic};

/// How long a cluster may take to get ready, and to come to rest after the last fault.
const READY_WITHIN: Duration = Duration::from_secs(60);
const REST_WITHIN: Duration = Duration::from_secs(300);

/// How long it may take, by the clock on the wall, until the databases of machines that are gone are closed.
const CLOSED_WITHIN: Duration = Duration::from_secs(20);

/// How long the last reads may take.
const READ_WITHIN: Duration = Duration::from_secs(60);

/// An application that none of the others is.
const VISITOR: Who = Who::Application(100);

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Where all choices come from.
    pub seed: u64,
    /// What the applications do; `None`: the seed decides.
    pub workload: Option<Workload>,
    /// How long everything goes wrong, by the clock of the cluster.
    pub time: Duration,
    /// Whether to write to standard error what happens.
    pub loud: bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What the applications did.
    pub workload: Workload,
    /// What they saw.
    pub history: History,
    /// How long it took, by the clock of the cluster.
    pub time: Duration,
    /// How often each kind of fault came.
    pub faults: BTreeMap<&'static str, u64>,
    /// What passed between machines.
    pub traffic: Traffic,
    /// Shards that have moved.
    pub moved_shards: u64,
    /// What must not have happened.
    pub violations: Vec<String>,
    /// What was done when.
    pub journal: Vec<String>,
}

impl Outcome {
    /// Operations that happened, did not, and of which nobody knows.
    pub fn counts(&self) -> (u64, u64, u64) {
        let count = |kind| self.history.events.iter().filter(|event| event.kind == kind).count() as u64;
        (count(Kind::Ok), count(Kind::Fail), count(Kind::Info))
    }
}

/// Runs a cluster whose data lies in a folder.
///
/// # Errors
/// If it does not even start.
pub fn run(plan: &Plan, folder: &Path) -> Result<Outcome, String> {
    let outcome = Run::new(plan, folder)?.go();
    // Their threads may still be at work, and need the folder.
    if !all_closed(CLOSED_WITHIN) {
        return Err("a database of a machine that is gone stays open".into());
    }
    outcome
}

/// A folder for a cluster, which goes when it is dropped: in memory, if there is such a place.
///
/// # Errors
/// If the system refuses.
pub fn folder() -> io::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }
}

struct Run {
    plan: Plan,
    workload: Workload,
    options: Options,
    cluster: Cluster,
    faults: Faults,
    /// What became of the transactions whose clients were not told.
    settled: Arc<Mutex<Settled>>,
    /// What is always wrong with the network.
    _weather: Option<Impairment>,
}

impl Run {
    fn new(plan: &Plan, folder: &Path) -> Result<Run, String> {
        let mut rng = StdRng::seed_from_u64(plan.seed);
        let drawn = *Workload::ALL.choose(&mut rng).expect("there are some");
        let workload = plan.workload.unwrap_or(drawn);
        let shape = Shape {
            coordinators: 3,
            nodes: rng.random_range(3..=4),
            shards: rng.random_range(2..=6),
            applications: 2,
            processes: rng.random_range(2..=4),
        };
        let micros = |rng: &mut StdRng, from: u64, to: u64| Duration::from_micros(rng.random_range(from..to));
        let least = micros(&mut rng, 50, 2_000);
        let takes = (least, least + micros(&mut rng, 10, 3_000));
        let fabric = Fabric::new(rng.random(), takes);
        let asked = Asked { keys: 12, writes_per_key: 60, ..Asked::new(workload, plan.seed, usize::MAX) };
        let pace = micros(&mut rng, 40_000, 250_000);
        let applications = Arc::new(Applications::new(Asker::new(&asked), pace));
        let mut options = Options::default();
        if workload == Workload::Bank {
            options.opening = (0..asked.keys as i64).map(|account| (account, OPENING)).collect();
        }
        let faults = Faults::new(rng.random(), shape.nodes, plan.loud);
        let loss = rng.random_bool(0.5).then(|| rng.random_range(0.0..0.02));
        let cluster_rng = StdRng::seed_from_u64(rng.random());
        let mut cluster = Cluster::new(folder, shape, fabric, applications, cluster_rng)?;
        for who in cluster.all().collect::<Vec<_>>() {
            if !matches!(who, Who::Application(_)) {
                cluster.boot(who)?;
            }
        }
        let weather = loss.map(|loss| {
            let all: Vec<_> = cluster.all().map(|who| cluster.party(who).1).collect();
            let ways = all.iter().flat_map(|from| all.iter().map(|to| (*from, *to)));
            cluster.fabric.links().impair(ways, Link { loss, ..Link::default() })
        });
        Ok(Run {
            plan: *plan,
            workload,
            options,
            cluster,
            faults,
            settled: Arc::default(),
            _weather: weather,
        })
    }

    /// Lets time pass until a condition holds, and tells whether it did in time.
    fn until(
        &mut self,
        within: Duration,
        condition: impl Fn(&mut Cluster, &Faults) -> bool,
    ) -> Result<bool, String> {
        let deadline = self.cluster.now + within;
        while self.cluster.now < deadline {
            self.cluster.tick();
            self.faults.look_after(&mut self.cluster)?;
            if condition(&mut self.cluster, &self.faults) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn go(mut self) -> Result<Outcome, String> {
        let settled = self.until(READY_WITHIN, |cluster, _| is_settled(cluster))?;
        if !settled {
            let status = self.cluster.seen.status.lock();
            return Err(format!("the cluster does not get ready: {status:?}, {:?}", self.faults.violations));
        }
        self.open_accounts()?;
        let applications: Vec<Who> =
            self.cluster.all().filter(|who| matches!(who, Who::Application(_))).collect();
        applications.into_iter().try_for_each(|who| self.cluster.boot(who))?;

        let until = self.cluster.now + self.plan.time;
        while self.cluster.now < until {
            self.cluster.tick();
            self.faults.look_after(&mut self.cluster)?;
            self.faults.strike(&mut self.cluster)?;
        }
        self.faults.calm_down(&mut self.cluster)?;
        let rested = self.come_to_rest()?;
        if let Some(unrest) = rested {
            self.faults.note(&self.cluster, &unrest);
            self.faults.violations.push(unrest);
        }
        self.judge()
    }

    /// Opens the accounts of a bank, as an application of its own that comes and goes.
    fn open_accounts(&mut self) -> Result<(), String> {
        if self.options.opening.is_empty() {
            return Ok(());
        }
        let opening = self.options.opening.clone();
        self.with_a_client(READY_WITHIN, async move |client, _| {
            open_accounts(&client, &opening).await.map_err(|error| error.to_string())
        })
    }

    /// Lets an application do something that no process of it does, and waits for that.
    fn with_a_client<F>(
        &mut self,
        within: Duration,
        work: impl FnOnce(Client, Arc<Applications>) -> F + 'static,
    ) -> Result<(), String>
    where
        F: Future<Output = Result<(), String>>,
    {
        let who = VISITOR;
        self.cluster.add(who)?;
        let done: Arc<Mutex<Option<Result<(), String>>>> = Arc::default();
        self.cluster.visit(who, done.clone(), work)?;
        let ended = self.until(within, |_, _| done.lock().is_some())?;
        self.cluster.remove(who);
        let result = done.lock().take();
        match result {
            Some(result) if ended => result,
            _ => Err("an application waits for something that does not end".into()),
        }
    }

    /// Waits until everything has come to rest, and reads it. Tells what does not.
    fn come_to_rest(&mut self) -> Result<Option<String>, String> {
        let settled = self.until(REST_WITHIN, |cluster, faults| faults.is_calm() && is_settled(cluster))?;
        if !settled {
            let status = self.cluster.seen.status.lock();
            let serving = status.as_ref().map(|status| status.serving());
            return Ok(Some(format!("the cluster does not settle; served: {serving:?}")));
        }
        self.cluster.applications.stop();
        if !self.until(READ_WITHIN, |cluster, _| cluster.busy.load(Ordering::Relaxed) == 0)? {
            return Ok(Some("applications wait for something that does not end".into()));
        }
        let looks = self.cluster.seen.looks.load(Ordering::Relaxed);
        let is_free = move |cluster: &mut Cluster, _: &Faults| {
            let held = cluster.seen.status.lock().as_ref().and_then(|status| status.held());
            cluster.seen.looks.load(Ordering::Relaxed) > looks + 1 && held == Some((0, 0))
        };
        if !self.until(REST_WITHIN, is_free)? {
            let held = self.cluster.seen.status.lock().as_ref().and_then(|status| status.held());
            return Ok(Some(format!("transactions and locks are held for ever: {held:?}")));
        }
        let told = self.settled.clone();
        let read = self.with_a_client(3 * READ_WITHIN, async move |client, applications| {
            *told.lock() = applications.settle(&client, Instant::now() + READ_WITHIN).await?;
            applications.read_everything(&client, Instant::now() + READ_WITHIN).await
        });
        Ok(read.err())
    }

    fn judge(mut self) -> Result<Outcome, String> {
        let history = self.cluster.applications.recorder.history().closed();
        let mut violations = std::mem::take(&mut self.faults.violations);
        let told = self.settled.lock().told(&history);
        let verdict = checker::check(&told, self.workload, &self.options);
        if !verdict.valid() || verdict.unchecked() > 0 {
            violations.push(format!("{verdict}"));
        }
        let moved_shards = self.cluster.seen.moved_shards.load(Ordering::Relaxed);
        Ok(Outcome {
            workload: self.workload,
            history,
            time: self.cluster.now,
            faults: self.faults.counts.iter().map(|(kind, count)| (kind.name(), *count)).collect(),
            traffic: self.cluster.fabric.links().traffic(),
            moved_shards,
            violations,
            journal: std::mem::take(&mut self.faults.journal),
        })
    }
}

/// Whether the operator sees that all is served, and by whom it should be.
fn is_settled(cluster: &mut Cluster) -> bool {
    cluster.seen.status.lock().as_ref().is_some_and(|status| status.is_settled())
}
