//! `troth`: the human's side of a cluster.

mod cluster;
mod coordinator;
mod demo;
mod dev;
mod keys;
mod node;
mod operate;
mod output;
mod ring;
mod script;
mod setup;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::output::Failure;

/// Talk to a Troth cluster, or make one.
///
/// Commands that talk to a cluster find it by --cluster or TROTH_CLUSTER: the folder that `troth
/// init` or `troth dev` made, or a client.toml. Without either: the folder ./troth-dev, else the
/// cluster that `troth dev` started last on this machine.
///
/// Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 the key has no value,
/// 4 the transaction was aborted, 5 it is not known whether it was committed.
#[derive(Parser)]
#[command(name = "troth", version)]
struct Flags {
    /// The cluster: its folder, or a client.toml.
    #[arg(long, global = true, env = "TROTH_CLUSTER", value_name = "PATH")]
    cluster: Option<PathBuf>,
    /// Print JSON: one object, or one object a line.
    #[arg(long, global = true)]
    json: bool,
    /// How long to try, in seconds.
    #[arg(long, global = true, default_value_t = 10.0, value_name = "SECONDS")]
    timeout: f64,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole cluster in this process, with its data in a folder, until Ctrl-C.
    Dev(dev::Options),
    /// Show what Troth does: real processes, transfers between accounts, a kill in the middle.
    Demo(demo::Options),
    /// Make the files of a new cluster: authority, certificates, configurations.
    Init(setup::InitOptions),
    /// Issue one more certificate for a cluster.
    Cert(setup::CertOptions),
    /// Renew the authority of a cluster, with a time in which the old one counts too.
    #[command(subcommand)]
    Authority(setup::AuthorityCommand),
    /// Print the value of a key.
    Get(keys::GetOptions),
    /// Set a key.
    Put(keys::PutOptions),
    /// Delete a key.
    Delete(keys::DeleteOptions),
    /// Print the keys with a prefix, or in a range, with their values.
    Scan(keys::ScanOptions),
    /// Run a script of reads and writes as one transaction; or list, show and end transactions.
    Txn(script::Options),
    /// Show how the servers are.
    Status,
    /// Show which nodes hold which shards, and how far those are that move; or what would move.
    Ring(ring::Options),
    /// Show the shards that move: how much of each has arrived, and how long the rest will take.
    Moves(ring::MovesOptions),
    /// Let coordinators in, send them away, replace one that has lost its folder, or list them.
    #[command(subcommand)]
    Coordinator(coordinator::CoordinatorCommand),
    /// Put participants on the ring, drain them, remove them, or list them.
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Hand the leadership of the coordinators to another one, without a failed transaction.
    Switchover(operate::SwitchoverOptions),
}

/// What all commands share.
pub struct Context {
    cluster: Option<PathBuf>,
    json: bool,
    timeout: Duration,
}

#[tokio::main]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    let context = Context {
        cluster: flags.cluster,
        json: flags.json,
        timeout: Duration::from_secs_f64(flags.timeout.clamp(0.001, 86_400.0)),
    };
    let result = match flags.command {
        Command::Dev(options) => dev::run(&context, options).await,
        Command::Demo(options) => demo::run(&context, options).await,
        Command::Init(options) => setup::init(&context, options),
        Command::Cert(options) => setup::cert(&context, options),
        Command::Authority(command) => setup::authority(&context, command),
        Command::Get(options) => keys::get(&context, options).await,
        Command::Put(options) => keys::put(&context, options).await,
        Command::Delete(options) => keys::delete(&context, options).await,
        Command::Scan(options) => keys::scan(&context, options).await,
        Command::Txn(script::Options { command: Some(command), .. }) => operate::txn(&context, command).await,
        Command::Txn(options) => script::run(&context, options).await,
        Command::Status => status::status(&context).await,
        Command::Ring(options) => ring::ring(&context, options).await,
        Command::Moves(options) => ring::moves(&context, options).await,
        Command::Coordinator(command) => coordinator::run(&context, command).await,
        Command::Node(command) => node::run(&context, command).await,
        Command::Switchover(options) => operate::switchover(&context, options).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(context.json),
    }
}

impl From<troth_sdk::Error> for Failure {
    fn from(error: troth_sdk::Error) -> Failure {
        let code = match &error {
            troth_sdk::Error::Aborted { .. } => output::EXIT_ABORTED,
            troth_sdk::Error::Unknown(_) => output::EXIT_UNKNOWN,
            troth_sdk::Error::Config(_) | troth_sdk::Error::Limit { .. } => output::EXIT_USAGE,
            _ => output::EXIT_FAILED,
        };
        Failure::new(code, error)
    }
}
