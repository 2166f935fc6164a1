//! The participant: a node that holds shards.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use troth_participant::config::File;
use troth_participant::{Config, Server};
use troth_protocol::clock::Clock;
use troth_protocol::net::Role;
use troth_protocol::net::tls::Credentials;
use troth_protocol::process::{self, ConfigError, EXIT_FAILED, EXIT_USAGE, LogFormat, Source};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A Troth participant: holds shards of the data and votes on transactions.
///
/// It reads a TOML file, and flags override it. The shortest one:
///
///     id = 1
///     listen = "127.0.0.1:7461"
///     data = "/var/lib/troth/node-1"
///     coordinators = ["127.0.0.1:7450"]
///     [tls]
///     ca = "/etc/troth/ca.pem"
///     cert = "/etc/troth/participant-1.pem"
///     key = "/etc/troth/participant-1-key.pem"
///
/// `troth init` writes such files for a whole cluster. SIGTERM stops it gracefully; SIGKILL loses
/// nothing that was acknowledged. Exit codes: 0 stopped when asked, 1 failed, 2 wrong configuration.
#[derive(Parser)]
#[command(version, verbatim_doc_comment)]
struct Flags {
    /// The configuration file.
    #[arg(long, short, value_name = "FILE", env = "TROTH_CONFIG")]
    config: Option<PathBuf>,
    /// This node's number: unique among participants, and never changed.
    #[arg(long)]
    id: Option<u64>,
    /// Where to listen; port 0: the system chooses one and <data>/address tells.
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where others find this node, if not where it listens.
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// The data folder.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// What fails together with this node: a rack, a building.
    #[arg(long)]
    zone: Option<String>,
    /// This node's share of the shards, relative to others.
    #[arg(long)]
    weight: Option<u32>,
    /// A coordinator; repeat it for several.
    #[arg(long = "coordinator", value_name = "HOST:PORT")]
    coordinators: Vec<String>,
    /// The authority's certificate.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// This node's certificate.
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
        file.zone = self.zone.or(file.zone);
        file.weight = self.weight.or(file.weight);
        if !self.coordinators.is_empty() {
            file.coordinators = Some(self.coordinators);
        }
        file.tls.get_or_insert_default().override_with(self.ca, self.cert, self.key);
        file.log.override_with(self.log_format, self.log_level);
        Ok((file, source))
    }
}

fn configure(flags: Flags) -> anyhow::Result<(Config, Credentials)> {
    let (file, source) = flags.file()?;
    let config = file.resolve(&source)?;
    file.log.start(&source)?;
    let credentials = file.tls.unwrap_or_default().load(Role::Participant)?;
    Ok((config, credentials))
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let (with_parent, threads) = (flags.stop_with_parent, flags.threads);
    let (config, credentials) = match configure(flags) {
        Ok(configured) => configured,
        Err(error) => {
            eprintln!("troth-participant: {error}");
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
            eprintln!("troth-participant: {error}");
            EXIT_FAILED.into()
        }
    }
}

async fn run(config: Config, credentials: &Credentials, with_parent: bool) -> anyhow::Result<()> {
    let server = Server::start(config, credentials, Clock::system()).await?;
    let mut failure = server.failure();
    let failed = async {
        match failure.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the node has ended".into(),
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
