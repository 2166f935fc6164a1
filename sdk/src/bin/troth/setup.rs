//! `troth init` and `troth cert`: the files of a cluster.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use troth_sdk::Role;
use troth_sdk::layout::{Hosting, HttpPlan, Layout, Plan};

use crate::Context;
use crate::output::{EXIT_FAILED, EXIT_USAGE, Failure, line};

/// Options of `troth init`.
#[derive(Args)]
pub struct InitOptions {
    /// The folder to make.
    #[arg(long, default_value = "troth-cluster")]
    dir: PathBuf,
    /// Where coordinators will listen: host:port; repeat it for 3 or 5.
    #[arg(long = "coordinator", value_name = "HOST:PORT", default_value = "127.0.0.1:7450")]
    coordinators: Vec<String>,
    /// Where participants will listen: host:port; repeat it for each.
    #[arg(
        long = "participant",
        value_name = "HOST:PORT",
        default_values = ["127.0.0.1:7461", "127.0.0.1:7462", "127.0.0.1:7463"]
    )]
    participants: Vec<String>,
    /// Replicas of each shard: 1, 3 or 5. Fixed for ever.
    #[arg(long, default_value_t = 1)]
    replicas: u16,
    /// Shards. Fixed for ever.
    #[arg(long, default_value_t = 16)]
    shards: u16,
    #[command(flatten)]
    hosting: HostingOptions,
    /// Let coordinators show the console at their HTTP port, to whoever knows the token that is made for it.
    #[arg(long)]
    console: bool,
}

/// Options about servers on their machines.
#[derive(Args)]
pub struct HostingOptions {
    /// The folder of the data folders, on the machines of the servers; if relative, then to their
    /// configurations.
    #[arg(long, value_name = "DIR", default_value = "data")]
    data: String,
    /// Where servers show metrics and health over HTTP, at their port and 2000 more.
    #[arg(long, value_enum, default_value_t)]
    http: HttpPlan,
}

impl HostingOptions {
    /// What that means.
    pub fn hosting(self, console: bool) -> Hosting {
        Hosting { data: self.data, http: self.http, console }
    }
}

/// Makes the files of a new cluster.
pub fn init(context: &Context, options: InitOptions) -> Result<(), Failure> {
    let wrong = |reason: &str| Err(Failure::new(EXIT_USAGE, reason));
    if ![1, 3, 5].contains(&options.coordinators.len()) {
        return wrong("name 1, 3 or 5 coordinators");
    }
    if ![1, 3, 5].contains(&options.replicas) {
        return wrong("--replicas must be 1, 3 or 5");
    }
    if options.participants.len() < usize::from(options.replicas) {
        return wrong("name at least as many participants as there are replicas");
    }
    if !(1..=1024).contains(&options.shards) {
        return wrong("--shards must be from 1 to 1024");
    }
    if options.console && options.hosting.http == HttpPlan::Off {
        return wrong("--console needs the HTTP port; leave --http off out");
    }
    let layout = Layout::at(&options.dir);
    let plan = Plan {
        coordinators: options.coordinators,
        participants: options.participants,
        shards: options.shards,
        replicas: options.replicas,
        hosting: options.hosting.hosting(options.console),
    };
    let cluster = layout.create(&plan).map_err(|error| Failure::new(EXIT_FAILED, error))?;
    let dir = options.dir.display();
    if context.json {
        return line(json!({ "cluster": cluster.to_string(), "dir": options.dir }));
    }
    line(format!("Cluster {cluster}: files in {dir}. Start its processes:"))?;
    for id in 1..=plan.coordinators.len() {
        line(format!("  troth-coordinator --config {dir}/coordinator-{id}.toml"))?;
    }
    for id in 1..=plan.participants.len() {
        line(format!("  troth-participant --config {dir}/participant-{id}.toml"))?;
    }
    line(format!("Then: troth --cluster {dir} status. Keep {dir}/ca-key.pem safe: it lets anybody in."))
}

/// What `troth authority` does.
#[derive(Subcommand)]
pub enum AuthorityCommand {
    /// Make another authority, which issues certificates from now on; those of the one before count still.
    Renew(AuthorityOptions),
    /// Let only the certificates count that the newest authority has issued.
    Retire(AuthorityOptions),
}

/// Options of `troth authority`.
#[derive(Args)]
pub struct AuthorityOptions {
    /// The folder that `troth init` made, with ca.pem and ca-key.pem.
    #[arg(long, default_value = "troth-cluster")]
    dir: PathBuf,
}

/// `troth authority`.
pub fn authority(context: &Context, command: AuthorityCommand) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(EXIT_FAILED, error);
    let (dir, next) = match command {
        AuthorityCommand::Renew(AuthorityOptions { dir }) => {
            Layout::at(&dir).renew_authority().map_err(|error| failed(&error))?;
            (dir, "copy it to all servers and clients, then renew all certificates: troth cert --renew")
        }
        AuthorityCommand::Retire(AuthorityOptions { dir }) => {
            Layout::at(&dir).retire_authorities().map_err(|error| failed(&error))?;
            (dir, "copy it to all servers and clients; certificates of the authority before count no more")
        }
    };
    let path = dir.join("ca.pem");
    if context.json {
        return line(json!({ "ca": path }));
    }
    line(format!("{}: {next}", path.display()))
}

/// Options of `troth cert`.
#[derive(Args)]
pub struct CertOptions {
    /// The folder that `troth init` made, with ca.pem and ca-key.pem.
    #[arg(long, default_value = "troth-cluster")]
    dir: PathBuf,
    /// What its holder may be: coordinator, participant, client, admin.
    #[arg(long)]
    role: Role,
    /// The holder's name, and that of the files: letters, digits, '-', '_', '.'.
    #[arg(long)]
    name: String,
    /// How long it is valid.
    #[arg(long, default_value_t = 365)]
    days: u64,
    /// Issue another one in the place of the one that there is. Servers and clients take it by themselves.
    #[arg(long)]
    renew: bool,
    /// Put the one that there is on the list of those that do not count any more, crl.pem, instead of issuing one.
    #[arg(long, conflicts_with = "renew")]
    revoke: bool,
}

/// Issues a certificate.
pub fn cert(context: &Context, options: CertOptions) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(EXIT_FAILED, error);
    let layout = Layout::at(&options.dir);
    let authority = layout.authority().map_err(|error| failed(&error))?;
    let validity = Duration::from_secs(options.days.clamp(1, 3650) * 24 * 3600);
    if options.revoke {
        let list = layout.revoke(&authority, &options.name).map_err(|error| failed(&error))?;
        if context.json {
            return line(json!({ "crl": list }));
        }
        return line(format!("{}: copy it to all servers; they take it by themselves", list.display()));
    }
    let issued = if options.renew {
        layout.renew(&authority, options.role, &options.name, validity)
    } else {
        layout.issue(&authority, options.role, &options.name, validity)
    };
    issued.map_err(|error| failed(&error))?;
    let files = layout.credentials(&options.name);
    if context.json {
        return line(json!({ "cert": files.cert, "key": files.key, "ca": files.ca }));
    }
    line(format!("{}\n{}", files.cert.display(), files.key.display()))
}
