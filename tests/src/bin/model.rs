//! Explores every order of everything in small cases, and says how many states there were.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use stateright::{Checker, HasDiscoveries, Model};
use troth_tests::model::{Explorer, PANICKED, cases};

/// Model checking of the commit and recovery protocol, with the code that serves in production.
#[derive(Parser)]
struct Arguments {
    /// The cases; all if none is named.
    cases: Vec<String>,
    /// Names the cases and what they are about.
    #[arg(long)]
    list: bool,
    /// Gives a case up after so many seconds.
    #[arg(long, default_value_t = 3600)]
    seconds: u64,
    /// Print the report as JSON, a line for each case.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // An assertion of the product is a finding, and the other threads of the checker would wait for ever.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::exit(PANICKED);
    }));
    let chosen = |name: &str| arguments.cases.is_empty() || arguments.cases.iter().any(|case| case == name);
    let mut failed = false;
    for case in cases().into_iter().filter(|case| chosen(case.name)) {
        let (name, about) = (case.name, case.about);
        if arguments.list {
            println!("{name:16} {about}");
            continue;
        }
        let began = Instant::now();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let checker = Explorer::new(case)
            .checker()
            .threads(threads)
            .timeout(Duration::from_secs(arguments.seconds))
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_dfs()
            .join();
        let elapsed = began.elapsed().as_secs_f64();
        let complete = elapsed < arguments.seconds as f64;
        let missed: Vec<&str> = checker
            .model()
            .properties()
            .into_iter()
            .filter(|property| {
                let found = checker.discovery(property.name).is_some();
                found != matches!(property.expectation, stateright::Expectation::Sometimes)
            })
            .map(|property| property.name)
            .collect();
        for name in &missed {
            eprintln!("{name}: not so");
            if let Some(path) = checker.discovery(name) {
                for (state, step) in path.into_vec() {
                    match step {
                        Some(step) => eprintln!("    {step:?}"),
                        None => eprintln!("    then: {:?}", state.violations()),
                    }
                }
            }
        }
        failed |= !missed.is_empty() || !complete;
        let (states, unique, depth) =
            (checker.state_count(), checker.unique_state_count(), checker.max_depth());
        if arguments.json {
            let report = serde_json::json!({
                "case": name, "about": about, "states": states, "unique_states": unique, "depth": depth,
                "seconds": elapsed, "complete": complete, "failed": missed,
            });
            println!("{report}");
        } else {
            let state = if complete { "all" } else { "NOT all" };
            println!("{name:16} {unique:>9} states, {state} of them; depth {depth}; {elapsed:.1} s: {about}");
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
