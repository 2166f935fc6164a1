//! The coordinator: runs two-phase commit and remembers what was decided.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use troth_coordinator::config::File;
use troth_coordinator::{Config, Server};
use troth_protocol::clock::Clock;
use troth_protocol::net::Role;
use troth_protocol::net::tls::Credentials;
use troth_protocol::process::{self, ConfigError, EXIT_FAILED, EXIT_USAGE, LogFormat, Source};
use troth_replication::Leadership;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A Troth coordinator: hands out timestamps, runs two-phase commit and remembers what was decided.
///
/// It reads a TOML file, and flags override it. The shortest one:
///
///     id = 1
///     listen = "127.0.0.1:7450"
///     data = "/var/lib/troth/coordinator-1"
///     [cluster]            # what a new cluster shall be like
///     shards = 16
///     replicas = 1
///     nodes = 3            # shards are placed when this many participants have registered
///     [tls]
///     ca = "/etc/troth/ca.pem"
///     cert = "/etc/troth/coordinator-1.pem"
///     key = "/etc/troth/coordinator-1-key.pem"
///
/// A group of three lists its members, the same in all three files:
///
///     [[coordinator]]
///     id = 1
///     address = "10.0.0.1:7450"
///
/// `troth init` writes such files for a whole cluster. SIGTERM stops it gracefully; SIGKILL loses
/// nothing that was acknowledged. Exit codes: 0 stopped when asked, 1 failed, 2 wrong configuration.
#[derive(Parser)]
#[command(version, verbatim_doc_comment)]
struct Flags {
    /// The configuration file.
    #[arg(long, short, value_name = "FILE", env = "TROTH_CONFIG")]
    config: Option<PathBuf>,
    /// This coordinator's number: unique among coordinators, and never changed.
    #[arg(long)]
    id: Option<u64>,
    /// Where to listen; port 0: the system chooses one and <data>/address tells.
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where others find this coordinator, if not where it listens.
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// The data folder.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The number of shards of a new cluster.
    #[arg(long)]
    shards: Option<u16>,
    /// How many replicas a shard of a new cluster has: 1, 3 or 5.
    #[arg(long)]
    replicas: Option<u16>,
    /// Shards of a new cluster are placed when this many participants have registered.
    #[arg(long)]
    nodes: Option<u16>,
    /// The authority's certificate.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// This coordinator's certificate.
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// The private key of the certificate.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Threads that serve requests; half of the machine's cores if left out.
    #[arg(long, value_name = "NUMBER")]
    threads: Option<usize>,
    /// Stop when standard input ends, as it does when whoever started this process has ended.
    #[arg(long)]
    stop_with_parent: bool,
    /// How to write the log: pretty or json.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// What to log: error, warn, info, debug, trace.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

impl Flags {
    fn file(self) -> Result<(File, Source), ConfigError> {
        let (mut file, source) = match &self.config {
            Some(path) => File::load(path)?,
            None => Default::default(),
        };
        file.id = self.id.or(file.id);
        file.listen = self.listen.or(file.listen);
        file.advertise = self.advertise.or(file.advertise);
        file.data = self.data.or(file.data);
        file.cluster.shards = self.shards.or(file.cluster.shards);
        file.cluster.replicas = self.replicas.or(file.cluster.replicas);
        file.cluster.nodes = self.nodes.or(file.cluster.nodes);
        file.tls.get_or_insert_default().override_with(self.ca, self.cert, self.key);
        file.log.override_with(self.log_format, self.log_level);
        Ok((file, source))
    }
}

fn configure(flags: Flags) -> anyhow::Result<(Config, Credentials)> {
    let (file, source) = flags.file()?;
    let config = file.resolve(&source)?;
    file.log.start(&source)?;
    let credentials = file.tls.unwrap_or_default().load(Role::Coordinator)?;
    Ok((config, credentials))
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let (with_parent, threads) = (flags.stop_with_parent, flags.threads);
    let (config, credentials) = match configure(flags) {
        Ok(configured) => configured,
        Err(error) => {
            eprintln!("troth-coordinator: {error}");
            return EXIT_USAGE.into();
        }
    };
    process::abort_on_panic();
    let result = process::runtime(threads)
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(config, &credentials, with_parent)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("troth-coordinator: {error}");
            EXIT_FAILED.into()
        }
    }
}

async fn run(config: Config, credentials: &Credentials, with_parent: bool) -> anyhow::Result<()> {
    let server = Server::start(config, credentials, Clock::system()).await?;
    let mut leadership = server.leadership();
    let failed = async {
        match leadership.wait_for(|role| matches!(role, Leadership::Failed { .. })).await.as_deref() {
            Ok(Leadership::Failed { reason }) => reason.clone(),
            _ => "the coordinator has ended".into(),
        }
    };
    let failed = tokio::select! {
        stop = process::asked_to_stop(with_parent) => stop.map(|()| None)?,
        reason = failed => Some(reason),
    };
    server.shutdown().await;
    match failed {
        None => Ok(()),
        Some(reason) => Err(anyhow::anyhow!("{reason}")),
    }
}
