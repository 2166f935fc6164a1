//! Explores every order of everything in small cases, and says how many states there were.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use troth_tests::model::{Explored, Explorer, PANICKED, cases};

/// Model checking of the commit and recovery protocol, with the code that serves in production.
#[derive(Parser)]
struct Arguments {
    /// The cases; all if none is named.
    cases: Vec<String>,
    /// Names the cases and what they are about.
    #[arg(long)]
    list: bool,
    /// Gives a case up after so many seconds: a failure, but for those that nobody explores to the end.
    #[arg(long, default_value_t = 3600)]
    seconds: u64,
    /// Explores also orders of which is known that they lead to the same.
    #[arg(long)]
    every_order: bool,
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
        let (name, about, endless) = (case.name, case.about, case.endless);
        if arguments.list {
            println!("{name:16} {about}");
            continue;
        }
        let explorer =
            if arguments.every_order { Explorer::of_every_order(case) } else { Explorer::new(case) };
        let began = Instant::now();
        let explored = explorer.explore(Duration::from_secs(arguments.seconds));
        let elapsed = began.elapsed().as_secs_f64();
        let Explored { states, steps, depth, complete, failures } = explored;
        for (name, way) in &failures {
            eprint!("{name}: not so\n{way}");
        }
        failed |= !failures.is_empty() || !(complete || endless);
        if arguments.json {
            let failures: Vec<_> = failures.iter().map(|(name, _)| name).collect();
            let report = serde_json::json!({
                "case": name, "about": about, "states": states, "steps": steps, "depth": depth,
                "seconds": elapsed, "complete": complete, "failed": failures,
            });
            println!("{report}");
        } else {
            let whole = if complete { "all" } else { "NOT all" };
            println!("{name:16} {states:>9} states, {whole} of them; depth {depth}; {elapsed:.1} s: {about}");
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
