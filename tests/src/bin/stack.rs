//! Runs clusters of the real servers on held clocks and a network in memory, and says which went wrong.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Parser;
use troth_tests::history::{Workload, edn};
use troth_tests::stack::{Outcome, Plan, run};
use troth_tests::{logging_of_a_program, seeds, stack};

/// The real stack on a simulated network: each seed is a cluster, its applications, and all that goes wrong.
#[derive(Parser)]
struct Arguments {
    /// The seeds, `FROM..TO`.
    #[arg(long, value_parser = seeds::range, conflicts_with = "seed")]
    seeds: Option<(u64, u64)>,
    /// One seed, as a failure names it; what happens is printed.
    #[arg(long)]
    seed: Option<u64>,
    /// How long everything goes wrong, in seconds of the cluster's time.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What the applications do; the seed decides if it is left out.
    #[arg(long)]
    workload: Option<Workload>,
    /// Where to write the history of one seed, as EDN.
    #[arg(long, requires = "seed")]
    history: Option<PathBuf>,
    /// Clusters at a time; half as many as there are processors if 0, since disks are written to in threads of
    /// their own.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Default)]
struct Totals {
    runs: u64,
    ok: u64,
    failed: u64,
    unknown: u64,
    faults: BTreeMap<&'static str, u64>,
    datagrams: u64,
    moved_shards: u64,
    time: Duration,
    failures: Vec<u64>,
}

impl Totals {
    fn add(&mut self, seed: u64, outcome: &Outcome) {
        let (ok, failed, unknown) = outcome.counts();
        self.runs += 1;
        self.ok += ok;
        self.failed += failed;
        self.unknown += unknown;
        for (kind, count) in &outcome.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        self.datagrams += outcome.traffic.passed;
        self.moved_shards += outcome.moved_shards;
        self.time += outcome.time;
        if !outcome.violations.is_empty() {
            self.failures.push(seed);
        }
    }
}

fn main() -> ExitCode {
    logging_of_a_program();
    let arguments = Arguments::parse();
    let (from, to) = match (arguments.seeds, arguments.seed) {
        (Some(range), _) => range,
        (None, Some(seed)) => (seed, seed + 1),
        (None, None) => (0, 20),
    };
    let plan = |seed| Plan {
        seed,
        workload: arguments.workload,
        time: Duration::from_secs(arguments.seconds),
        loud: arguments.seed.is_some(),
    };
    let threads = match arguments.threads {
        0 => std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2)),
        threads => threads,
    };
    let began = Instant::now();
    let totals = Mutex::new(Totals::default());
    seeds::each((from, to), threads, |seed| {
        let outcome = one(&plan(seed), arguments.history.as_deref());
        let mut totals = totals.lock().expect("no run panics while it holds this");
        match outcome {
            Ok(outcome) => {
                for violation in &outcome.violations {
                    let again = format!("stack --seed {seed} --seconds {}", arguments.seconds);
                    eprintln!("seed {seed}, {}: {violation}\n    {again}", outcome.workload);
                }
                totals.add(seed, &outcome);
            }
            Err(error) => {
                eprintln!("seed {seed}: {error}");
                totals.failures.push(seed);
            }
        }
    });
    let elapsed = began.elapsed();
    let totals = totals.into_inner().expect("no run has panicked");
    let speed = totals.time.as_secs_f64() / elapsed.as_secs_f64();
    if arguments.json {
        let report = serde_json::json!({
            "seeds": [from, to], "runs": totals.runs, "failures": totals.failures,
            "ok": totals.ok, "failed": totals.failed, "unknown": totals.unknown,
            "faults": totals.faults, "datagrams": totals.datagrams, "moved_shards": totals.moved_shards,
            "cluster_seconds": totals.time.as_secs_f64(), "seconds": elapsed.as_secs_f64(),
            "cluster_minutes_per_minute": speed, "threads": threads,
        });
        println!("{report}");
    } else {
        println!(
            "{} clusters, {:.0} s of their time in {:.0} s on {threads} threads: {speed:.1} minutes a minute",
            totals.runs,
            totals.time.as_secs_f64(),
            elapsed.as_secs_f64(),
        );
        println!(
            "{} operations happened, {} did not, {} of unknown end; {} datagrams; {} shards moved; faults: {:?}",
            totals.ok, totals.failed, totals.unknown, totals.datagrams, totals.moved_shards, totals.faults,
        );
        println!("{} failures", totals.failures.len());
    }
    if totals.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs one seed in a folder of its own, in memory if there is such a place.
fn one(plan: &Plan, history: Option<&Path>) -> Result<Outcome, String> {
    let folder = stack::folder().map_err(|error| error.to_string())?;
    let outcome = run(plan, folder.path())?;
    if let Some(path) = history {
        edn::save(&outcome.history, path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(outcome)
}
