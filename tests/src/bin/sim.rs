//! Simulates clusters from seeds, and says which of them went wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use clap::Parser;
use troth_tests::seeds;
use troth_tests::sim::faults::Kind;
use troth_tests::sim::run::{Options, Report, run, shrink, tell_of_panics};
use troth_tests::sim::schedule::Tracing;

/// Simulates clusters: each seed is a cluster, its clients, and all that breaks.
#[derive(Parser)]
struct Arguments {
    /// The seeds, `FROM..TO`.
    #[arg(long, value_parser = seeds::range, conflicts_with = "seed")]
    seeds: Option<(u64, u64)>,
    /// One seed, as a failure names it.
    #[arg(long)]
    seed: Option<u64>,
    /// Transactions of each seed.
    #[arg(long, default_value_t = 200)]
    txns: u32,
    /// At most so many clients.
    #[arg(long, default_value_t = u8::MAX, hide_default_value = true)]
    clients: u8,
    /// Kinds of faults to leave out: crash, elect, cut, pause, jump, move, retire, loss, double, slow, leave.
    #[arg(long, value_delimiter = ',', value_parser = kind)]
    without: Vec<Kind>,
    /// Print everything that happens, in order.
    #[arg(long)]
    trace: bool,
    /// Make the first failing run smaller.
    #[arg(long)]
    shrink: bool,
    /// Run so many of the seeds twice, and compare their traces word by word.
    #[arg(long, default_value_t = 10)]
    twice: u64,
    /// Threads; all processors if 0.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

fn kind(text: &str) -> Result<Kind, String> {
    let names = Kind::ALL.map(Kind::name).join(", ");
    Kind::named(text).ok_or_else(|| format!("there are {names}"))
}

#[derive(Default)]
struct Totals {
    runs: u64,
    commits: u64,
    ok: u64,
    failed: u64,
    unknown: u64,
    faults: BTreeMap<&'static str, u64>,
    steps: u64,
    seconds: u64,
    failures: Vec<(Options, Vec<String>)>,
}

impl Totals {
    fn add(&mut self, options: &Options, report: Report) {
        self.runs += 1;
        self.commits += report.commits as u64;
        self.ok += report.counts.ok;
        self.failed += report.counts.failed;
        self.unknown += report.counts.unknown;
        for (kind, count) in report.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        self.steps += report.steps;
        self.seconds += report.time.as_secs();
        if !report.violations.is_empty() {
            self.failures.push((options.clone(), report.violations));
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tell_of_panics();
    let (from, to) = match (arguments.seeds, arguments.seed) {
        (Some(range), _) => range,
        (None, Some(seed)) => (seed, seed + 1),
        (None, None) => (0, 100),
    };
    let without: BTreeSet<Kind> = arguments.without.iter().copied().collect();
    let options = |seed| Options {
        clients_max: arguments.clients,
        without: without.clone(),
        ..Options::new(seed, arguments.txns)
    };
    if arguments.trace {
        let (report, trace) = run(&options(from), Tracing::Words);
        print!("{trace}");
        println!("{report:#?}");
        return if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }

    let began = Instant::now();
    let totals = Mutex::new(Totals::default());
    let threads = match arguments.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    seeds::each((from, to), threads, |seed| {
        let options = options(seed);
        let (report, _) = run(&options, Tracing::Number);
        let mut totals = totals.lock().expect("no run panics while it holds this");
        if let Some(violation) = report.violations.first() {
            eprintln!("seed {seed}: {violation}\n    {}", options.command());
        }
        totals.add(&options, report);
    });
    let elapsed = began.elapsed();
    let totals = totals.into_inner().expect("no run has panicked");

    // The same seed is the same run, word by word.
    let mut unequal = 0;
    let twice = arguments.twice.min(to - from);
    for seed in (from..to).take(twice as usize) {
        let (first, second) = (run(&options(seed), Tracing::Words), run(&options(seed), Tracing::Words));
        if first != second {
            unequal += 1;
            eprintln!("seed {seed} has two traces: {} and {} characters", first.1.len(), second.1.len());
        }
    }

    if arguments.shrink
        && let Some((options, _)) = totals.failures.first()
    {
        let mut tries = 0;
        let small = shrink(options, |_| tries += 1);
        let (report, _) = run(&small, Tracing::Number);
        eprintln!("made smaller in {tries} runs: {}", report.violations.first().map_or("", String::as_str));
        eprintln!("    {}", small.command());
    }
    let rate = totals.runs as f64 / elapsed.as_secs_f64() * 60.0;
    if arguments.json {
        let report = serde_json::json!({
            "seeds": [from, to], "runs": totals.runs, "failures": totals.failures.len(),
            "txns_per_run": arguments.txns, "ok": totals.ok, "failed": totals.failed,
            "unknown": totals.unknown, "commits": totals.commits, "faults": totals.faults,
            "steps": totals.steps, "cluster_seconds": totals.seconds,
            "seconds": elapsed.as_secs_f64(), "runs_per_minute": rate, "threads": threads,
            "run_twice": twice, "unequal_traces": unequal,
        });
        println!("{report}");
    } else {
        println!(
            "{} runs of {} transactions in {:.1} s on {threads} threads: {rate:.0} a minute",
            totals.runs,
            arguments.txns,
            elapsed.as_secs_f64(),
        );
        println!(
            "{} operations happened, {} did not, {} of unknown end; {} commits; {} steps; {} s of cluster time",
            totals.ok, totals.failed, totals.unknown, totals.commits, totals.steps, totals.seconds
        );
        let faults: Vec<String> =
            totals.faults.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        println!("faults: {}", faults.join(", "));
        println!("{twice} runs made twice, {unequal} of them not equal word by word");
        println!("{} failures", totals.failures.len());
    }
    if totals.failures.is_empty() && unequal == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
