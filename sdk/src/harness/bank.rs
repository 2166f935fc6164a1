//! Money moves between accounts, and none may appear or vanish.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::RngExt;
use troth_protocol::ShardId;

use crate::client::Client;
use crate::error::Error;
use crate::transaction::Transaction;
use crate::{Bytes, Key, KeyRange};

/// What every account begins with.
pub const OPENING_BALANCE: u64 = 1_000;

const PREFIX: &str = "account/";

/// Accounts in a cluster.
#[derive(Clone)]
pub struct Bank {
    client: Client,
    accounts: u32,
}

/// How a transfer ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transfer {
    /// The money was moved.
    Done,
    /// The account had too little; nothing was moved.
    Refused,
}

/// What an audit found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Audit {
    /// Accounts.
    pub accounts: usize,
    /// Money in all of them.
    pub total: u64,
}

/// What is in each account, by its number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Balances(pub BTreeMap<u32, u64>);

impl Balances {
    /// All of it together.
    pub fn audit(&self) -> Audit {
        Audit { accounts: self.0.len(), total: self.0.values().sum() }
    }
}

fn account(number: u32) -> String {
    format!("{PREFIX}{number:08}")
}

fn balance(value: Option<&Bytes>) -> u64 {
    let digits = value.and_then(|value| std::str::from_utf8(value).ok());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

impl Bank {
    /// The bank of a cluster, with this many accounts.
    ///
    /// # Panics
    /// With fewer than two accounts no money can move.
    pub fn new(client: &Client, accounts: u32) -> Bank {
        assert!(accounts >= 2, "money moves between two accounts");
        Bank { client: client.clone(), accounts }
    }

    /// Opens all accounts with the same balance.
    ///
    /// # Errors
    /// If the cluster cannot commit that.
    pub async fn open(&self) -> Result<Audit, Error> {
        let numbers: Vec<u32> = (0..self.accounts).collect();
        for chunk in numbers.chunks(2_000) {
            self.client
                .transact(async |tx| {
                    for number in chunk {
                        tx.put(account(*number), OPENING_BALANCE.to_string())?;
                    }
                    Ok::<_, Error>(())
                })
                .await?;
        }
        Ok(Audit { accounts: self.accounts as usize, total: u64::from(self.accounts) * OPENING_BALANCE })
    }

    /// Two accounts, by number, on different shards; on different nodes too, if there are several
    /// and shards are not replicated.
    pub fn pick(&self) -> (u32, u32) {
        let mut random = rand::rng();
        let map = self.client.map();
        let home = |number: u32| {
            let shard = self.shard(number);
            (shard, map.replicas_of(shard).to_vec())
        };
        let from = random.random_range(0..self.accounts);
        let (from_shard, from_nodes) = home(from);
        let mut to = from;
        // With few accounts there may be no such pair: then another account will do.
        for _ in 0..50 {
            to = (from + random.random_range(1..self.accounts)) % self.accounts;
            let (shard, nodes) = home(to);
            if shard != from_shard && (nodes != from_nodes || map.nodes.len() == 1 || map.replicas > 1) {
                break;
            }
        }
        (from, to)
    }

    /// The shard of an account.
    pub fn shard(&self, number: u32) -> ShardId {
        Key::copy_from(account(number).as_bytes()).shard(self.client.map().shards)
    }

    /// The shards that hold accounts.
    pub fn shards(&self) -> BTreeSet<ShardId> {
        (0..self.accounts).map(|number| self.shard(number)).collect()
    }

    /// Moves an amount between two accounts, with retries.
    ///
    /// # Errors
    /// As [`Client::transact`].
    pub async fn transfer(&self, from: u32, to: u32, amount: u64) -> Result<Transfer, Error> {
        self.transfer_counting(from, to, amount, &AtomicU64::new(0)).await
    }

    /// Moves an amount between two accounts, and counts the attempts.
    ///
    /// # Errors
    /// As [`Client::transact`].
    pub async fn transfer_counting(
        &self,
        from: u32,
        to: u32,
        amount: u64,
        attempts: &AtomicU64,
    ) -> Result<Transfer, Error> {
        self.client
            .transact(async |tx| {
                attempts.fetch_add(1, Ordering::Relaxed);
                self.transfer_in(&tx, from, to, amount).await
            })
            .await
    }

    /// Moves an amount between two accounts as a part of a transaction.
    ///
    /// # Errors
    /// As [`Transaction::get`].
    pub async fn transfer_in(
        &self,
        tx: &Transaction,
        from: u32,
        to: u32,
        amount: u64,
    ) -> Result<Transfer, Error> {
        let (from, to) = (account(from), account(to));
        let balances = tx.get_many([&from, &to]).await?;
        let (source, target) = (balance(balances[0].as_ref()), balance(balances[1].as_ref()));
        if source < amount {
            return Ok(Transfer::Refused);
        }
        tx.put(&from, (source - amount).to_string())?;
        tx.put(&to, (target + amount).to_string())?;
        Ok(Transfer::Done)
    }

    /// What is in each account, in one snapshot.
    ///
    /// # Errors
    /// If the cluster cannot be read.
    pub async fn balances(&self) -> Result<Balances, Error> {
        let snapshot = self.client.snapshot().await?;
        let rows = snapshot.scan(KeyRange::prefix(PREFIX.as_bytes()), usize::MAX).await?;
        let number = |key: &Key| {
            let digits = key.as_bytes().strip_prefix(PREFIX.as_bytes());
            digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(u32::MAX)
        };
        Ok(Balances(rows.iter().map(|(key, value)| (number(key), balance(Some(value)))).collect()))
    }

    /// What is in each account; tries again until that works or `patience` is over.
    ///
    /// # Errors
    /// The last error.
    pub async fn balances_within(&self, patience: Duration) -> Result<Balances, Error> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            match self.balances().await {
                Err(error) if error.is_retriable() && tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                result => return result,
            }
        }
    }

    /// Counts all money in one snapshot.
    ///
    /// # Errors
    /// If the cluster cannot be read.
    pub async fn audit(&self) -> Result<Audit, Error> {
        Ok(self.balances().await?.audit())
    }

    /// Counts all money, and tries again until that works or `patience` is over.
    ///
    /// # Errors
    /// The last error.
    pub async fn audit_within(&self, patience: Duration) -> Result<Audit, Error> {
        Ok(self.balances_within(patience).await?.audit())
    }
}
