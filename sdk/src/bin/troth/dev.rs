//! `troth dev`: a cluster for one developer.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tracing_subscriber::EnvFilter;
use troth_protocol::process::asked_to_stop;
use troth_sdk::embedded::{Cluster, ClusterConfig};

use crate::Context;
use crate::cluster::{DEV_FOLDER, remember_dev};
use crate::output::{EXIT_USAGE, Failure, line};

/// Options of `troth dev`.
#[derive(Args)]
pub struct Options {
    /// The folder for data and certificates. What was acknowledged there is there again.
    #[arg(long, default_value = DEV_FOLDER)]
    dir: PathBuf,
    /// The port of the first coordinator; 0: the system chooses.
    #[arg(long, default_value_t = 7450)]
    port: u16,
    /// Coordinators: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    coordinators: u16,
    /// Participants.
    #[arg(long, default_value_t = 3)]
    nodes: u16,
    /// Replicas of each shard: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    replicas: u16,
    /// Shards of a new cluster.
    #[arg(long, default_value_t = 16)]
    shards: u16,
}

/// Runs until it is asked to stop.
pub async fn run(context: &Context, options: Options) -> Result<(), Failure> {
    if ![1, 3, 5].contains(&options.coordinators) || ![1, 3, 5].contains(&options.replicas) {
        return Err(Failure::new(EXIT_USAGE, "coordinators and replicas must be 1, 3 or 5"));
    }
    if options.nodes < options.replicas {
        return Err(Failure::new(EXIT_USAGE, "there must be at least as many nodes as replicas"));
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    let cluster = Cluster::start(ClusterConfig {
        coordinators: options.coordinators,
        nodes: options.nodes,
        replicas: options.replicas,
        shards: options.shards,
        dir: options.dir.clone(),
        port: (options.port > 0).then_some(options.port),
        http: true,
    })
    .await?;
    let client = cluster.client().await?;
    client.close().await;
    remember_dev(&options.dir);
    let console = cluster.console()?;
    let dir = options.dir.display();
    if context.json {
        line(json!({
            "ready": true,
            "dir": options.dir,
            "coordinators": cluster.coordinators(),
            "nodes": options.nodes,
            "replicas": options.replicas,
            "console": console,
        }))?;
    } else {
        line(format!("Troth is ready: {} participants, data in {dir}", options.nodes))?;
        line(format!("  troth --cluster {dir} put greeting hello"))?;
        line(format!("  troth --cluster {dir} get greeting"))?;
        if let Some(console) = console {
            line(format!("Look at it: {console}"))?;
        }
        line(format!("An application connects with {dir}/client.toml. Ctrl-C stops it."))?;
    }
    asked_to_stop(false).await?;
    cluster.shutdown().await;
    Ok(())
}
