//! A cluster of real processes to which everything happens that can, and what its clients saw.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use troth_sdk::harness::processes::Shape;
use troth_tests::chaos::nemesis::Nemeses;
use troth_tests::chaos::{Outcome, Plan, run};
use troth_tests::history::{Workload, edn};
use troth_tests::{logging_of_a_program, programs};

/// Chaos on a cluster of real processes, and the verdict of a checker on what its clients saw.
///
/// Exit codes: 0 the cluster has kept its promises, 1 it has not, 2 the run could not be made.
#[derive(Parser)]
struct Arguments {
    /// What the clients do: append, write-skew, register, long-fork, bank, set or counter.
    #[arg(long, default_value = "append")]
    workload: Workload,
    /// What goes wrong: none, all, kill, disk, or names with commas between them: kill-coordinator,
    /// kill-participant, kill-many, pause, partition, network, clock, move, restart, power-cut, disk-full,
    /// disk-slow, disk-read-error, disk-bit-flip.
    #[arg(long, default_value = "all")]
    nemesis: Nemeses,
    /// For how long it does.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where all choices come from; random if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Where to write the history, as EDN.
    #[arg(long)]
    history: Option<PathBuf>,
    /// Coordinators: 1, 3 or 5.
    #[arg(long, default_value_t = 3)]
    coordinators: u16,
    /// Participants at first.
    #[arg(long, default_value_t = 4)]
    nodes: u16,
    /// Replicas of each shard: 1, 3 or 5.
    #[arg(long, default_value_t = 3)]
    replicas: u16,
    /// Shards.
    #[arg(long, default_value_t = 8)]
    shards: u16,
    /// Clients, each with a connection of its own.
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Operations at a time on each connection.
    #[arg(long, default_value_t = 3)]
    processes: usize,
    /// Operations each second, of all together; 10 for sets, which are read as a whole, and 100 otherwise.
    #[arg(long)]
    rate: Option<f64>,
    /// Keep the files of the cluster, with the logs of its servers, here. They are kept somewhere anyhow if the
    /// cluster has not kept its promises.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    logging_of_a_program();
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(rand::random);
    let command = format!(
        "chaos --workload {} --nemesis {} --seconds {} --seed {seed}",
        arguments.workload,
        arguments.nemesis.0.iter().map(|nemesis| nemesis.name()).collect::<Vec<_>>().join(","),
        arguments.seconds,
    );
    eprintln!("{command}");
    match made(&arguments, seed) {
        Ok(outcome) => {
            let mut report = outcome.to_json();
            report["command"] = command.into();
            report["seed"] = seed.into();
            if arguments.json {
                println!("{report}");
            } else {
                println!("{report:#}");
            }
            if outcome.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("chaos: {error}");
            ExitCode::from(2)
        }
    }
}

/// Makes the run, and leaves behind what is to be kept.
fn made(arguments: &Arguments, seed: u64) -> Result<Outcome, String> {
    let scratch = tempfile::tempdir().map_err(|error| error.to_string())?;
    let folder = arguments.keep.clone().unwrap_or_else(|| scratch.path().to_owned());
    let default_rate = if arguments.workload == Workload::Set { 10.0 } else { 100.0 };
    let plan = Plan {
        workload: arguments.workload,
        nemeses: arguments.nemesis.0.clone(),
        time: Duration::from_secs(arguments.seconds),
        seed,
        shape: Shape {
            coordinators: arguments.coordinators,
            nodes: arguments.nodes,
            replicas: arguments.replicas,
            shards: arguments.shards,
        },
        clients: arguments.clients,
        processes: arguments.processes,
        rate: arguments.rate.unwrap_or(default_rate),
        folder: folder.clone(),
        binaries: programs().to_owned(),
        environment: Vec::new(),
        loud: true,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = runtime.map_err(|error| error.to_string())?.block_on(run(&plan));
    let good = outcome.as_ref().is_ok_and(Outcome::is_good);
    if !good {
        eprintln!("the files of the cluster, with the logs of its servers: {}", folder.display());
        let _ = scratch.keep();
    }
    let outcome = outcome.map_err(|error| error.to_string())?;
    if let Some(path) = &arguments.history {
        edn::save(&outcome.history, path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    if !good {
        // As the clients saw it, and as it was judged.
        let told = outcome.settled.told(&outcome.history);
        for (name, history) in [("history.edn", &outcome.history), ("told.edn", &told)] {
            let path = folder.join(name);
            edn::save(history, &path).map_err(|error| format!("{}: {error}", path.display()))?;
        }
    }
    Ok(outcome)
}
