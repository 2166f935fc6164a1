//! Measures Troth on a cluster of real processes on this machine.

mod failover;
mod move_shard;
mod overload;
mod report;
mod ring;
mod scene;
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
    /// Transfers that arrive at multiples of the rate that the cluster can do, whatever becomes of those
    /// before them: what gets done, what is shed, and how long it takes.
    Overload(overload::Options),
    /// Kills a leader again and again under such transfers, and takes the time until they go on.
    Failover(failover::Options),
    /// A large shard moves to a node that joins, under transfers: how long, how much memory, what they feel.
    Move(move_shard::Options),
    /// What the ring moves when a node comes or goes, and how evenly it divides: computed, without a cluster.
    Ring(ring::Options),
}

fn main() -> ExitCode {
    let command = Flags::parse().command;
    // Here clients and servers share a machine, where in earnest they do not: a client that wakes up
    // shall not push a server aside.
    work_in_batches();
    let run = async {
        match &command {
            Command::Transfer(options) => {
                transfer::run(options).await.map(|report| report.print(options.json))
            }
            Command::Overload(options) => overload::run(options).await,
            Command::Failover(options) => failover::run(options).await,
            Command::Move(options) => move_shard::run(options).await,
            Command::Ring(options) => ring::run(options),
        }
    };
    match runtime(None).context("cannot start the runtime").and_then(|runtime| runtime.block_on(run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("troth-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
