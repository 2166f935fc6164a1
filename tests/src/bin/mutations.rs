//! Puts in one deliberate bug after another, and says which layer found it, and after how long.

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::Value;
use troth_protocol::mutation::{Bug, ENVIRONMENT, switch};
use troth_sdk::harness::processes::Shape;
use troth_tests::chaos::nemesis::Nemesis;
use troth_tests::chaos::{self, Plan};
use troth_tests::hands::{emptied_coordinator, older_copy};
use troth_tests::history::Workload;
use troth_tests::ledger::Findings;
use troth_tests::model::{BROKEN, PANICKED};
use troth_tests::programs;
use troth_tests::sim::run::first_failing;

/// The proof that the tests find bugs: every deliberate bug must be caught by some layer.
#[derive(Parser)]
struct Arguments {
    /// The bugs; all if none is named.
    bugs: Vec<String>,
    /// Seeds that the simulation may try for each.
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,
    /// Seconds that the model checker may take for each case.
    #[arg(long, default_value_t = 60)]
    model_seconds: u64,
    /// Seeds that the simulation of the stack may try for each.
    #[arg(long, default_value_t = 10)]
    stack_seeds: u64,
    /// Seconds of power cuts that real processes get, at most five times, for what the others do not find.
    #[arg(long, default_value_t = 60)]
    chaos_seconds: u64,
}

/// What the model checker looks at, the small cases.
const CASES: [&str; 8] =
    ["lost", "double", "early", "reader", "conflict", "shard-deposed", "deposed", "crash"];

/// How often chaos is tried.
const CHAOS_SEEDS: u64 = 5;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let chosen =
        |bug: &Bug| arguments.bugs.is_empty() || arguments.bugs.iter().any(|name| name == bug.name());
    assert_eq!(stacked(None, arguments.stack_seeds), None, "without a bug nothing is found");
    println!("| bug | simulation | model checker | simulation of the stack | an operator's slip | chaos |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut missed = 0;
    // What goes wrong is told in the table.
    std::panic::set_hook(Box::new(|_| {}));
    for bug in Bug::ALL.into_iter().filter(chosen) {
        switch(Some(bug));
        let simulated = simulated(arguments.seeds);
        let modelled = modelled(bug, arguments.model_seconds);
        switch(None);
        let stacked = stacked(Some(bug), arguments.stack_seeds);
        let unseen = simulated.is_none() && modelled.is_none() && stacked.is_none();
        let slipped = if unseen { slipped(bug) } else { None };
        let unseen = unseen && slipped.is_none();
        let suffered =
            if unseen { suffered(bug, Duration::from_secs(arguments.chaos_seconds)) } else { None };
        missed += u32::from(unseen && suffered.is_none());
        let cell = |found: Option<String>| found.unwrap_or_else(|| "–".into());
        let cells = [simulated, modelled, stacked, slipped, suffered].map(cell).join(" | ");
        println!("| {} | {cells} |", bug.name());
    }
    if missed > 0 {
        eprintln!("{missed} deliberate bugs were not found");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn simulated(seeds: u64) -> Option<String> {
    let began = Instant::now();
    let seed = first_failing(0..seeds, 200)?;
    Some(format!("seed {seed}, {:.1} s", began.elapsed().as_secs_f64()))
}

/// In a process of its own: a checker does not end if one of its threads panics.
fn modelled(bug: Bug, seconds: u64) -> Option<String> {
    CASES.into_iter().find_map(|case| {
        let began = Instant::now();
        let explored = Command::new(programs().join("model"))
            .args([case, "--json", "--seconds", &seconds.to_string()])
            .env(ENVIRONMENT, bug.name())
            .stderr(Stdio::null())
            .output()
            .expect("the model checker is there");
        let elapsed = began.elapsed().as_secs_f64();
        if explored.status.code() == Some(PANICKED) {
            return Some(format!("{case}, {elapsed:.1} s: an assertion"));
        }
        let report: Value = serde_json::from_slice(&explored.stdout).expect("it prints a report");
        let broken = report["failed"].as_array().is_some_and(|failed| failed.contains(&BROKEN.into()));
        broken.then(|| format!("{case}, {} states, {elapsed:.1} s", report["states"]))
    })
}

/// The real stack with the bug if there is one, on a network in memory, each seed in a process of its own.
fn stacked(bug: Option<Bug>, seeds: u64) -> Option<String> {
    let began = Instant::now();
    let seed = (0..seeds).find(|seed| {
        let ran = Command::new(programs().join("stack"))
            .args(["--seed", &seed.to_string()])
            .envs(bug.map(|bug| (ENVIRONMENT, bug.name())))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("the simulation of the stack is there");
        !ran.success()
    })?;
    Some(format!("seed {seed}, {:.0} s", began.elapsed().as_secs_f64()))
}

/// Real processes with the bug, in the hands of an operator with old disks.
fn slipped(bug: Bug) -> Option<String> {
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("threads");
    let lost = |findings: Option<Findings>| findings.filter(|findings| *findings != Findings::default());
    let found = match lost(runtime.block_on(older_copy(Some(bug)))) {
        Some(findings) => Some(("an older copy", findings)),
        None => lost(runtime.block_on(emptied_coordinator(Some(bug))))
            .map(|findings| ("an emptied coordinator", findings)),
    };
    let (slip, Findings { lost, torn }) = found?;
    Some(format!("{slip}, {:.0} s: {lost} lost, {torn} torn", began.elapsed().as_secs_f64()))
}

/// Real processes with the bug, which lose all the time what they have not synced.
fn suffered(bug: Bug, time: Duration) -> Option<String> {
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("threads");
    (1..=CHAOS_SEEDS).find_map(|seed| {
        let folder = tempfile::tempdir().expect("a folder");
        let plan = Plan {
            workload: Workload::Append,
            nemeses: vec![Nemesis::PowerCut],
            time,
            seed,
            shape: Shape { coordinators: 3, nodes: 3, replicas: 3, shards: 6 },
            clients: 4,
            processes: 3,
            rate: 100.0,
            folder: folder.path().to_owned(),
            binaries: programs().to_owned(),
            environment: vec![(ENVIRONMENT, bug.name())],
            loud: false,
        };
        let outcome = runtime.block_on(chaos::run(&plan)).expect("the run is made");
        let what = if let Some(class) = outcome.verdict.classes().first() {
            class.name()
        } else if !outcome.tally.crashed.is_empty() {
            "a server that panics"
        } else if outcome.rest.is_err() {
            "no rest"
        } else if !outcome.compared.differences.is_empty() {
            "replicas that differ"
        } else {
            return None;
        };
        Some(format!("seed {seed}, {:.0} s: {what}", began.elapsed().as_secs_f64()))
    })
}
