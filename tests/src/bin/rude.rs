//! Lets many be rude to live servers while one behaves, and says whether that one was served.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use troth_tests::logging_of_a_program;
use troth_tests::rude::{Plan, run};

/// Malformed datagrams, streams, frames and requests at the doors of live servers.
#[derive(Parser)]
struct Arguments {
    /// For how long.
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    /// Where all choices come from; random if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// How many are rude at a time.
    #[arg(long, default_value_t = 8)]
    clients: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    logging_of_a_program();
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(rand::random);
    eprintln!("rude --seconds {} --clients {} --seed {seed}", arguments.seconds, arguments.clients);
    let plan = Plan { time: Duration::from_secs(arguments.seconds), seed, clients: arguments.clients };
    let outcome = run(&plan).await;
    let all: u64 = outcome.offences.values().sum();
    println!("{all} offences: {:?}", outcome.offences);
    println!("{} transactions were served, the longest took {:?}", outcome.served, outcome.longest_gap);
    for (name, before, after) in &outcome.memory {
        println!("{name}: {} MiB before, {} MiB after", before >> 20, after >> 20);
    }
    for complaint in &outcome.complaints {
        println!("{complaint}");
    }
    if outcome.complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
