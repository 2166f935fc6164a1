//! Measures Troth on a cluster of real processes on this machine.

mod report;
mod transfer;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use troth_protocol::process::{runtime, work_in_batches};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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

fn main() -> ExitCode {
    let Command::Transfer(options) = Flags::parse().command;
    // Here clients and servers share a machine, where in earnest they do not: a client that wakes up
    // shall not push a server aside.
    work_in_batches();
    let report = runtime(None)
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(transfer::run(&options)));
    match report {
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
