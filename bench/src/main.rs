//! Measures Troth on a cluster of real processes on this machine.

mod report;
mod transfer;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures Troth: starts a cluster of real processes in a temporary folder, with synced writes,
/// puts a load on it, and prints what it saw.
#[derive(Parser)]
#[command(version)]
struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bank transfers between two shards on different nodes: two reads and two writes each.
    Transfer(transfer::Options),
}

#[tokio::main]
async fn main() -> ExitCode {
    let Command::Transfer(options) = Flags::parse().command;
    match transfer::run(&options).await {
        Ok(report) => {
            report.print(options.json);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("troth-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
