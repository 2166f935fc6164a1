//! The program `troth-participant`.

use std::process::ExitCode;

use clap::Parser;
use troth_protocol::clock::Clock;
use troth_protocol::net::Role;
use troth_protocol::process::Source;
use troth_replication::server::{self, ServerFlags};

use crate::Server;
use crate::config::File;

/// What `--help` says.
const HELP: &str = r#"A Troth participant: holds shards of the data and votes on transactions.

It reads a TOML file, and flags override it. The shortest one:

    id = 1
    listen = "127.0.0.1:7461"
    data = "/var/lib/troth/node-1"
    coordinators = ["127.0.0.1:7450"]
    [tls]
    ca = "/etc/troth/ca.pem"
    cert = "/etc/troth/participant-1.pem"
    key = "/etc/troth/participant-1-key.pem"

`troth init` writes such files for a whole cluster. SIGTERM stops it gracefully; SIGKILL loses
nothing that was acknowledged. Exit codes: 0 stopped when asked, 1 failed, 2 wrong configuration."#;

/// A Troth participant: holds shards of the data and votes on transactions.
#[derive(Parser)]
#[command(version, long_about = HELP)]
struct Flags {
    #[command(flatten)]
    server: ServerFlags,
    /// What fails together with this node: a rack, a building.
    #[arg(long)]
    zone: Option<String>,
    /// This node's share of the shards, relative to others.
    #[arg(long)]
    weight: Option<u32>,
    /// A coordinator; repeat it for several.
    #[arg(long = "coordinator", value_name = "HOST:PORT")]
    coordinators: Vec<String>,
}

/// Runs a participant from the command line to its end. In this crate and not in that of the program, so that the
/// server is compiled once for all programs that run one.
pub fn main() -> ExitCode {
    let Flags { server, zone, weight, coordinators } = Flags::parse();
    let resolve = |mut file: File, source: &Source| {
        file.zone = zone.or(file.zone);
        file.weight = weight.or(file.weight);
        if !coordinators.is_empty() {
            file.coordinators = Some(coordinators);
        }
        file.resolve(source)
    };
    server::main(Role::Participant, &server, resolve, async |config, credentials| {
        Server::start(config, &credentials, Clock::system()).await
    })
}
