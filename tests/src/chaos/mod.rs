//! Chaos: a cluster of real processes, applications that note what they ask and are told, and everything that
//! can go wrong, several things at a time. In the end the history is checked.
//!
//! ```text
//!   applications ──▶ proxies ──▶ servers ──▶ disks that forget
//!        │              ▲           ▲  ▲         ▲
//!        ▼              └───────────┴──┴─────────┘
//!     history                    faults            SIGKILL, SIGSTOP, links, clocks, disks, the ring
//!        │
//!        ▼
//!     checker
//! ```
//!
//! | module | what it is |
//! | --- | --- |
//! | `nemesis` | kinds of faults, and their names |
//! | `faults` | which fault when, for how long, and how it is undone |
//! | `servers` | the processes, with their network, disks and clocks |
//! | `application` | what a client does for each operation of a workload |
//! | `replicas` | whether all replicas have the same in the end |
//!
//! First faults come and go. Then all are undone, and everything must come to rest: nobody is down, all shards
//! are served from where they should be, no transaction is prepared, no lock is held, every change of the
//! ring has ended. Then it is asked how the transactions ended whose clients were not told, and everything is
//! read once more. At last all servers are killed, and what replicas have
//! on disk is compared.

pub mod application;
pub mod faults;
pub mod nemesis;
pub mod replicas;
pub mod servers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use troth_sdk::Client;
use troth_sdk::harness::processes::{Shape, free_ports};
use troth_sdk::harness::until_settled;

use crate::PATIENCE;
use crate::checker::{self, Options};
use crate::disk::Struck;
use crate::history::generate::{Asker, OPENING, Plan as Asked};
use crate::history::{History, Kind, Workload};
use crate::network::Traffic;

use application::{Applications, OP_TIMEOUT, Settled, open_accounts};
use faults::{Faults, Journal, Tally};
use nemesis::Nemesis;
use replicas::Compared;
use servers::{Equipment, Servers, Trouble};

/// How long it may take after the last fault until everything has come to rest. Shards that move when nodes
/// were gone take the largest part of it.
const REST_WITHIN: Duration = Duration::from_secs(300);

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the applications do.
    pub workload: Workload,
    /// What goes wrong.
    pub nemeses: Vec<Nemesis>,
    /// For how long it does.
    pub time: Duration,
    /// Where the choices of faults and operations come from. What servers and networks make of them is never
    /// the same twice.
    pub seed: u64,
    /// What the cluster is like.
    pub shape: Shape,
    /// Clients, each with a connection of its own.
    pub clients: usize,
    /// Operations at a time on each connection.
    pub processes: usize,
    /// Operations each second, of all together.
    pub rate: f64,
    /// Where the files of the cluster are to be.
    pub folder: PathBuf,
    /// Where the programs are.
    pub binaries: PathBuf,
    /// What else the servers have in their environment.
    pub environment: Vec<(&'static str, &'static str)>,
    /// Whether to write to standard error what is done.
    pub loud: bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What the applications saw.
    pub history: History,
    /// What became of the transactions whose clients were not told.
    pub settled: Settled,
    /// What the checker says, who knows what became of those.
    pub verdict: checker::Report,
    /// What was done to the cluster.
    pub tally: Tally,
    /// What was to go wrong and never did: the time was too short for it.
    pub never_struck: Vec<Nemesis>,
    /// What passed between the servers.
    pub traffic: Traffic,
    /// How often disks failed.
    pub struck: Struck,
    /// How many shards have moved.
    pub moved_shards: u64,
    /// How long it took after the last fault until all had come to rest, or what did not.
    pub rest: Result<Duration, String>,
    /// What replicas have that should be the same; not looked at if there is no rest.
    pub compared: Compared,
    /// Seconds with faults, and those of them with at least one committed write.
    pub seconds: (u64, u64),
    /// The longest time without a committed write.
    pub longest_gap: Duration,
    /// Operations that succeeded while something was wrong: all, and those that wrote.
    pub ok_during_faults: (u64, u64),
    /// What was done when.
    pub journal: Vec<String>,
}

impl Outcome {
    /// Whether the cluster has kept its promises.
    pub fn is_good(&self) -> bool {
        self.verdict.valid()
            && (self.verdict.unchecked() == 0 || !self.settled.expired.is_empty())
            && self.history.events.iter().any(|event| event.kind == Kind::Ok && !event.op.is_read_only())
            && self.rest.is_ok()
            && self.compared.differences.is_empty()
            && self.tally.crashed.is_empty()
            && self.tally.stuck.is_empty()
    }

    /// The part of the seconds with at least one committed write.
    pub fn availability(&self) -> f64 {
        let (all, with) = self.seconds;
        with as f64 / all.max(1) as f64
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        let Tally {
            faults,
            sigkills,
            pauses,
            power_cuts,
            ring_changes,
            ended,
            crashed,
            stuck,
            flips,
            times: _,
        } = &self.tally;
        let faults: BTreeMap<&str, u64> =
            faults.iter().map(|(nemesis, times)| (nemesis.name(), *times)).collect();
        let Traffic { passed, cut, refused, lost, duplicated, reordered, corrupted, delayed } = self.traffic;
        let Struck { full, slow_syncs, failed_syncs, slow_reads, failed_reads, flipped_bits } = self.struck;
        json!({
            "good": self.is_good(),
            "faults": faults,
            "never_struck": self.never_struck.iter().map(|nemesis| nemesis.name()).collect::<Vec<_>>(),
            "sigkills": sigkills,
            "pauses": pauses,
            "power_cuts": power_cuts,
            "ring_changes": ring_changes,
            "moved_shards": self.moved_shards,
            "datagrams": {
                "passed": passed, "cut": cut, "refused": refused, "lost": lost, "duplicated": duplicated,
                "reordered": reordered, "corrupted": corrupted, "delayed": delayed,
            },
            "disks": {
                "full": full, "slow_syncs": slow_syncs, "failed_syncs": failed_syncs,
                "slow_reads": slow_reads, "failed_reads": failed_reads, "flipped_bits": flipped_bits,
            },
            "flips": flips,
            "ended_by_themselves": ended,
            "crashed": crashed,
            "stuck": stuck,
            "not_told": {
                "committed": self.settled.committed(),
                "aborted": self.settled.aborted(),
                "expired": self.settled.expired.len(),
            },
            "ok_during_faults": self.ok_during_faults.0,
            "writes_during_faults": self.ok_during_faults.1,
            "seconds": self.seconds.0,
            "seconds_with_a_commit": self.seconds.1,
            "availability": self.availability(),
            "longest_gap_seconds": self.longest_gap.as_secs_f64(),
            "rest_after_seconds": self.rest.as_ref().ok().map(Duration::as_secs_f64),
            "unrest": self.rest.as_ref().err(),
            "replicas_compared": self.compared.replicas,
            "rows_compared": self.compared.rows,
            "replicas_differ": self.compared.differences,
            "checker": self.verdict.to_json(),
        })
    }
}

/// What the workload is like: few keys, so that clients meet.
fn asked(workload: Workload, seed: u64) -> Asked {
    Asked { keys: 24, writes_per_key: 100, ..Asked::new(workload, seed, usize::MAX) }
}

/// Runs it.
///
/// # Errors
/// If the system refuses, or the cluster does not even start.
pub async fn run(plan: &Plan) -> Result<Outcome, Trouble> {
    let has = |which: fn(Nemesis) -> bool| plan.nemeses.iter().copied().any(which);
    let equipment =
        Equipment { disks: has(Nemesis::is_of_disks), clocks: has(|nemesis| nemesis == Nemesis::Clock) };
    let mut servers = Servers::create(&plan.folder, &plan.binaries, plan.shape, equipment, plan.seed).await?;
    servers.set_environment(&plan.environment);
    for server in servers.all().collect::<Vec<_>>() {
        servers.start(server)?;
    }
    let ports = free_ports(plan.clients.try_into().unwrap_or(u16::MAX))?;
    let addresses: Vec<SocketAddr> =
        ports.iter().map(|port| SocketAddr::from(([127, 0, 0, 1], *port))).collect();
    let operator = servers.operator()?;
    let settled = until_settled(&operator, PATIENCE).await;
    settled.map_err(|error| Trouble::Missing(error.to_string()))?;

    let mut clients = Vec::new();
    for address in &addresses {
        let mut config = servers.client_config(*address)?;
        config.timeout = OP_TIMEOUT;
        clients.push(Client::connect(config).await?);
    }
    let asked = asked(plan.workload, plan.seed);
    let mut options = Options::default();
    if plan.workload == Workload::Bank {
        options.opening = (0..asked.keys as i64).map(|account| (account, OPENING)).collect();
        open_accounts(&clients[0], &options.opening).await?;
    }

    let journal = Arc::new(Journal::new(plan.loud));
    let pace = Duration::from_secs_f64((plan.clients * plan.processes) as f64 / plan.rate);
    let applications = Arc::new(Applications::new(Asker::new(&asked), pace));
    let mut running = JoinSet::new();
    for (at, client) in clients.iter().enumerate() {
        for process in 0..plan.processes {
            let seed = plan.seed.wrapping_add((at * plan.processes + process + 1) as u64);
            running.spawn(applications.clone().run(client.clone(), seed));
        }
    }
    let mut faults = Faults::new(servers, operator, &plan.nemeses, addresses, plan.seed, journal.clone());
    let recorder = &applications.recorder;
    let from = recorder.elapsed_nanos();
    faults.rage(Instant::now() + plan.time, recorder).await?;
    let to = recorder.elapsed_nanos();
    let mut settled = Settled::default();
    let rest = come_to_rest(&mut faults, &applications, running, &clients[0], &mut settled).await?;
    match &rest {
        Ok(after) => journal.note(format!("at rest after {:.1} s", after.as_secs_f64())),
        Err(unrest) => journal.note(format!("no rest: {unrest}")),
    }
    let moved_shards = faults.operator().overview().await.map_or(0, |overview| overview.moved_shards);
    for client in &clients {
        client.close().await;
    }
    let compared = if rest.is_ok() { replicas::compare(&mut faults).await? } else { Compared::default() };
    compared.differences.iter().for_each(|difference| journal.note(difference));
    faults.operator().close().await;

    let history = recorder.history().closed();
    let verdict = checker::check(&settled.told(&history), plan.workload, &options);
    let mut struck = Struck::default();
    for disk in faults.servers.disks() {
        struck += disk.struck();
    }
    let tally = std::mem::take(&mut faults.tally);
    let never = |nemesis: &Nemesis| !tally.faults.contains_key(nemesis);
    let never_struck = plan.nemeses.iter().copied().filter(never).collect();
    let commits = commits(&history, from, to);
    Ok(Outcome {
        seconds: seconds(&commits, from, to),
        longest_gap: longest_gap(&commits, from, to),
        ok_during_faults: during(&history, &tally.times),
        traffic: faults.servers.network().links().traffic(),
        journal: journal.lines(),
        history,
        settled,
        verdict,
        tally,
        never_struck,
        struck,
        moved_shards,
        rest,
        compared,
    })
}

/// Waits until everything has come to rest, and reads it.
async fn come_to_rest(
    faults: &mut Faults,
    applications: &Applications,
    mut running: JoinSet<()>,
    client: &Client,
    settled: &mut Settled,
) -> Result<Result<Duration, String>, Trouble> {
    let began = Instant::now();
    let deadline = began + REST_WITHIN;
    let recorder = &applications.recorder;
    loop {
        let calm = faults.is_calm(recorder).await?;
        let status = faults.operator().status().await;
        if calm && status.is_settled() {
            break;
        }
        if Instant::now() > deadline {
            let map = &status.map;
            return Ok(Err(format!("{} moves, served: {:?}", map.moves.len(), status.serving())));
        }
        sleep(Duration::from_millis(50)).await;
    }
    applications.stop();
    let all = async { while running.join_next().await.is_some() {} };
    if timeout(PATIENCE, all).await.is_err() {
        return Ok(Err(format!("{} applications wait for something that does not end", running.len())));
    }
    loop {
        let status = faults.operator().status().await;
        if faults.is_calm(recorder).await? && status.held() == Some((0, 0)) {
            break;
        }
        if Instant::now() > deadline {
            let in_doubt = faults.operator().in_doubt().await;
            return Ok(Err(format!("held: {:?}, in doubt: {in_doubt:?}", status.held())));
        }
        sleep(Duration::from_millis(50)).await;
    }
    let rested = began.elapsed();
    match applications.settle(client, Instant::now() + PATIENCE).await {
        Ok(endings) => *settled = endings,
        Err(unanswered) => return Ok(Err(unanswered)),
    }
    Ok(applications.read_everything(client, Instant::now() + PATIENCE).await.map(|()| rested))
}

/// When writes were committed, from one instant to another.
fn commits(history: &History, from: u64, to: u64) -> Vec<u64> {
    let done = history.events.iter().filter(|event| event.kind == Kind::Ok && !event.op.is_read_only());
    done.map(|event| event.time_nanos).filter(|time| (from..to).contains(time)).collect()
}

/// All whole seconds, and those with a commit.
fn seconds(commits: &[u64], from: u64, to: u64) -> (u64, u64) {
    let second = |time: u64| (time - from) / 1_000_000_000;
    let all = second(to);
    let with: BTreeSet<u64> =
        commits.iter().map(|time| second(*time)).filter(|second| *second < all).collect();
    (all, with.len() as u64)
}

fn longest_gap(commits: &[u64], from: u64, to: u64) -> Duration {
    let mut before = from;
    let mut longest = 0;
    for time in commits.iter().copied().chain([to]) {
        longest = longest.max(time - before);
        before = time;
    }
    Duration::from_nanos(longest)
}

/// Operations that succeeded while something was wrong: all, and those that wrote.
fn during(history: &History, times: &[(u64, u64)]) -> (u64, u64) {
    let mut counts = (0, 0);
    for event in history.events.iter().filter(|event| event.kind == Kind::Ok) {
        if times.iter().any(|(from, to)| (*from..*to).contains(&event.time_nanos)) {
            counts.0 += 1;
            counts.1 += u64::from(!event.op.is_read_only());
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn seconds_with_a_commit_are_counted_and_the_longest_gap_is_found() {
        let (from, to) = (5 * SECOND, 10 * SECOND + 7);
        let commits = [from + 1, from + 2, from + 3 * SECOND, from + 3 * SECOND + 1];
        assert_eq!(seconds(&commits, from, to), (5, 2));
        assert_eq!(longest_gap(&commits, from, to), Duration::from_nanos(3 * SECOND - 2));
        assert_eq!(seconds(&[], from, to), (5, 0));
        assert_eq!(longest_gap(&[], from, to), Duration::from_nanos(to - from));
    }
}
