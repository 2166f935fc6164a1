//! Puts in one deliberate bug after another, and says which layer found it, and after how long.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use stateright::{Checker, HasDiscoveries, Model};
use troth_protocol::mutation::{Bug, switch};
use troth_tests::model::{Explorer, cases};
use troth_tests::sim::run::{Options, run};
use troth_tests::sim::schedule::Tracing;

/// The proof that the tests find bugs: every deliberate bug must be caught by some layer.
#[derive(Parser)]
struct Arguments {
    /// The bugs; all if none is named.
    bugs: Vec<String>,
    /// Seeds that the simulation may try for each.
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,
    /// Seconds that the model checker may take for each case.
    #[arg(long, default_value_t = 10)]
    model_seconds: u64,
}

/// What the model checker looks at, the small cases.
const CASES: [&str; 5] = ["reader", "shard-deposed", "deposed", "crash", "lost"];

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let chosen =
        |bug: &Bug| arguments.bugs.is_empty() || arguments.bugs.iter().any(|name| name == bug.name());
    println!("| bug | simulation | model checker |");
    println!("| --- | --- | --- |");
    let mut missed = 0;
    // What goes wrong is told in the table.
    std::panic::set_hook(Box::new(|_| {}));
    for bug in Bug::ALL.into_iter().filter(chosen) {
        switch(Some(bug));
        let simulated = simulated(arguments.seeds);
        let modelled = modelled(Duration::from_secs(arguments.model_seconds));
        switch(None);
        missed += u32::from(simulated.is_none() && modelled.is_none());
        let cell = |found: Option<String>| found.unwrap_or_else(|| "–".into());
        println!("| {} | {} | {} |", bug.name(), cell(simulated), cell(modelled));
    }
    if missed > 0 {
        eprintln!("{missed} deliberate bugs were not found");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn simulated(seeds: u64) -> Option<String> {
    let began = Instant::now();
    let seed = (0..seeds).find(|seed| {
        fails(|| {
            let (report, _) = run(&Options::new(*seed, 200), Tracing::Number);
            !report.violations.is_empty()
        })
    })?;
    Some(format!("seed {seed}, {:.1} s", began.elapsed().as_secs_f64()))
}

fn modelled(limit: Duration) -> Option<String> {
    CASES.into_iter().find_map(|name| {
        let began = Instant::now();
        let case = cases().into_iter().find(|case| case.name == name)?;
        let mut states = 0;
        let found = fails(|| {
            let checker = Explorer::new(case)
                .checker()
                .timeout(limit)
                .finish_when(HasDiscoveries::AnyFailures)
                .spawn_dfs()
                .join();
            states = checker.unique_state_count();
            checker.discovery("no promise is broken").is_some()
        });
        found.then(|| format!("{name}, {states} states, {:.1} s", began.elapsed().as_secs_f64()))
    })
}

/// Whether something fails, or panics: an assertion of the product is a finding too.
fn fails(attempt: impl FnOnce() -> bool) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).unwrap_or(true)
}
