//! The program `troth-coordinator`.

use std::process::ExitCode;

use clap::Parser;
use troth_protocol::clock::Clock;
use troth_protocol::net::Role;
use troth_protocol::process::Source;
use troth_replication::server::{self, ServerFlags};

use crate::Server;
use crate::config::File;

/// What `--help` says.
const HELP: &str = r#"A Troth coordinator: hands out timestamps, runs two-phase commit and remembers what was decided.

It reads a TOML file, and flags override it. The shortest one:

    id = 1
    listen = "127.0.0.1:7450"
    data = "/var/lib/troth/coordinator-1"
    [cluster]            # what a new cluster shall be like
    shards = 16
    replicas = 1
    nodes = 3            # shards are placed when this many participants have registered
    [tls]
    ca = "/etc/troth/ca.pem"
    cert = "/etc/troth/coordinator-1.pem"
    key = "/etc/troth/coordinator-1-key.pem"

A group of three lists its members, the same in all three files:

    [[coordinator]]
    id = 1
    address = "10.0.0.1:7450"

`troth init` writes such files for a whole cluster. SIGTERM stops it gracefully; SIGKILL loses
nothing that was acknowledged. Exit codes: 0 stopped when asked, 1 failed, 2 wrong configuration."#;

/// A Troth coordinator: hands out timestamps, runs two-phase commit and remembers what was decided.
#[derive(Parser)]
#[command(version, long_about = HELP)]
struct Flags {
    #[command(flatten)]
    server: ServerFlags,
    /// The number of shards of a new cluster.
    #[arg(long)]
    shards: Option<u16>,
    /// How many replicas a shard of a new cluster has: 1, 3 or 5.
    #[arg(long)]
    replicas: Option<u16>,
    /// Shards of a new cluster are placed when this many participants have registered.
    #[arg(long)]
    nodes: Option<u16>,
}

/// Runs a coordinator from the command line to its end. In this crate and not in that of the program, so that the
/// server is compiled once for all programs that run one.
pub fn main() -> ExitCode {
    let Flags { server, shards, replicas, nodes } = Flags::parse();
    let resolve = |mut file: File, source: &Source| {
        let cluster = &mut file.cluster;
        cluster.shards = shards.or(cluster.shards);
        cluster.replicas = replicas.or(cluster.replicas);
        cluster.nodes = nodes.or(cluster.nodes);
        file.resolve(source)
    };
    server::main(Role::Coordinator, &server, resolve, async |config, credentials| {
        Server::start(config, &credentials, Clock::system()).await
    })
}
