//! What the benchmarks on a cluster have in common: the cluster, and a bank in it.

use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use tempfile::TempDir;
use troth_sdk::Client;
use troth_sdk::harness::bank::{Audit, Bank};
use troth_sdk::harness::processes::{Processes, Shape, binaries};
use troth_sdk::harness::until_settled;
use troth_sdk::operator::{ClusterStatus, Operator};

/// How long anything may take that is not measured.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What the cluster is like.
#[derive(Args, Clone, Copy)]
pub struct ClusterOptions {
    /// Coordinators: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    pub coordinators: u16,
    /// Participants.
    #[arg(long, default_value_t = 3)]
    pub nodes: u16,
    /// Replicas of each shard: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    pub replicas: u16,
    /// Shards.
    #[arg(long, default_value_t = 16)]
    pub shards: u16,
}

/// A cluster of real processes in a temporary folder, and a bank in it.
pub struct Scene {
    pub processes: Processes,
    pub client: Client,
    pub operator: Operator,
    pub bank: Bank,
    /// The bank's accounts, and how much was in them at the beginning.
    pub opened: Audit,
    /// How the cluster was when it was ready.
    pub calm: ClusterStatus,
    /// Removed after the processes have ended.
    _folder: TempDir,
}

impl Scene {
    /// Starts one, and waits until every shard is served by the node that should lead it. `change`: what is
    /// to be changed in the files of its servers.
    pub async fn start(
        cluster: ClusterOptions,
        accounts: u32,
        change: impl FnOnce(&Processes) -> anyhow::Result<()>,
    ) -> anyhow::Result<Scene> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let ClusterOptions { coordinators, nodes, replicas, shards } = cluster;
        let shape = Shape { coordinators, nodes, replicas, shards };
        let mut processes = Processes::create(folder.path(), &binaries()?, shape)?;
        change(&processes)?;
        processes.start()?;
        let mut config = processes.client_config()?;
        config.timeout = PATIENCE;
        let client = Client::connect(config).await?;
        let operator = processes.operator()?;
        let bank = Bank::new(&client, accounts);
        let opened = bank.open().await?;
        let calm = until_settled(&operator, PATIENCE).await?;
        Ok(Scene { processes, client, operator, bank, opened, calm, _folder: folder })
    }

    /// Whether no money has appeared or vanished.
    pub async fn check_the_books(&self) -> anyhow::Result<()> {
        let (audit, opened) = (self.bank.audit_within(PATIENCE).await?, &self.opened);
        ensure!(audit == *opened, "the books do not balance: {audit:?} instead of {opened:?}");
        Ok(())
    }

    /// Says goodbye; the processes end with this.
    pub async fn end(self) {
        self.operator.close().await;
        self.client.close().await;
    }
}
