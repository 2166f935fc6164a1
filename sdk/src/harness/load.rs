//! Clients that move money, each one transfer after the other, and what they see.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use rand::RngExt;
use tokio::task::JoinSet;
use tokio::time::timeout;
use troth_protocol::ShardId;

use crate::error::Error;
use crate::harness::bank::{Balances, Bank, Transfer};
use crate::transaction::Outcome;

/// How long a client asks how a transfer ended that was not answered.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(60);

/// A load of transfers. Its clients end when it is dropped.
pub struct Load {
    seen: Arc<Seen>,
    clients: JoinSet<()>,
}

struct Seen {
    bank: Bank,
    amount_max: u64,
    began: Instant,
    stop: AtomicBool,
    attempts: AtomicU64,
    committed: AtomicU64,
    refused: AtomicU64,
    unknown: AtomicU64,
    failed: AtomicU64,
    error: Mutex<Option<String>>,
    latencies: Mutex<Histogram<u64>>,
    commits: Mutex<BTreeMap<ShardId, Vec<Done>>>,
    /// What acknowledged transfers have brought to each account.
    ledger: Mutex<BTreeMap<u32, i64>>,
}

/// When a transfer was begun that was committed, and when its client heard of it.
#[derive(Clone, Copy)]
struct Done {
    began: Instant,
    ended: Instant,
}

/// What has become of the transfers so far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Committed.
    pub committed: u64,
    /// Not made, since the account had too little.
    pub refused: u64,
    /// Attempts that were aborted, because of another transfer or of a server, and made again.
    pub aborted: u64,
    /// Nobody could say within a minute how they ended.
    pub unknown: u64,
    /// Given up at the timeout of the client.
    pub failed: u64,
    /// What the first of those that failed met.
    pub error: Option<String>,
}

/// What a load leaves behind.
pub struct Ended {
    /// What became of its transfers.
    pub counts: Counts,
    ledger: BTreeMap<u32, i64>,
}

impl Ended {
    /// How many accounts do not hold exactly what they had when the load began, with all transfers that
    /// were acknowledged and no others.
    pub fn wrong_accounts(&self, before: &Balances, after: &Balances) -> usize {
        let accounts: BTreeSet<u32> = before.0.keys().chain(after.0.keys()).copied().collect();
        let amount =
            |balances: &Balances, account: &u32| balances.0.get(account).map_or(0, |amount| *amount as i64);
        let is_wrong = |account: &&u32| {
            let brought = self.ledger.get(*account).copied().unwrap_or(0);
            amount(before, account) + brought != amount(after, account)
        };
        accounts.iter().filter(is_wrong).count()
    }
}

/// How long shards had no commits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outage {
    /// The longest time between the last commit before and the first commit after, of one shard.
    pub gap: Duration,
    /// When all of the shards had commits again.
    pub over: Instant,
}

/// Clients did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("{0} clients wait for a transfer that does not end")]
pub struct Stuck(usize);

impl Load {
    /// Starts clients that move random amounts, at most `amount_max`, between random accounts on
    /// different shards.
    pub fn start(bank: &Bank, clients: usize, amount_max: u64) -> Load {
        let seen = Arc::new(Seen {
            bank: bank.clone(),
            amount_max,
            began: Instant::now(),
            stop: AtomicBool::new(false),
            attempts: AtomicU64::new(0),
            committed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            error: Mutex::default(),
            latencies: Mutex::new(no_latencies()),
            commits: Mutex::default(),
            ledger: Mutex::default(),
        });
        let mut set = JoinSet::new();
        for _ in 0..clients {
            set.spawn(seen.clone().move_money());
        }
        Load { seen, clients: set }
    }

    /// When it was started.
    pub fn began(&self) -> Instant {
        self.seen.began
    }

    /// What has become of the transfers so far.
    pub fn counts(&self) -> Counts {
        self.seen.counts()
    }

    /// Microseconds from the begin of a transfer to the answer, with all its attempts, of those that
    /// were committed since this was asked last.
    pub fn take_latencies(&self) -> Histogram<u64> {
        std::mem::replace(&mut self.seen.latencies.lock(), no_latencies())
    }

    /// How long these shards had no commits because of something that happened at `struck`. A commit
    /// comes after it if its transfer began after it: what began before may have been decided before.
    /// `None`: one of the shards has no commits yet.
    pub fn outage(&self, struck: Instant, shards: impl IntoIterator<Item = ShardId>) -> Option<Outage> {
        let commits = self.seen.commits.lock();
        let mut outage = Outage { gap: Duration::ZERO, over: struck };
        for shard in shards {
            let done = commits.get(&shard).map_or(&[][..], Vec::as_slice);
            let (before, after) = done.split_at(done.partition_point(|done| done.ended <= struck));
            let last = before.last().map_or(self.seen.began, |done| done.ended);
            let first = after.iter().find(|done| done.began > struck)?.ended;
            outage.gap = outage.gap.max(first - last);
            outage.over = outage.over.max(first);
        }
        Some(outage)
    }

    /// Lets the clients finish what they have begun, and waits for that.
    ///
    /// # Errors
    /// If some do not end within `patience`.
    ///
    /// # Panics
    /// If a client panicked.
    pub async fn stop(mut self, patience: Duration) -> Result<Ended, Stuck> {
        self.seen.stop.store(true, Ordering::Relaxed);
        let all = async {
            while let Some(ended) = self.clients.join_next().await {
                ended.expect("clients do not panic");
            }
        };
        match timeout(patience, all).await {
            Ok(()) => Ok(Ended { counts: self.counts(), ledger: self.seen.ledger.lock().clone() }),
            Err(_) => Err(Stuck(self.clients.len())),
        }
    }
}

impl Seen {
    async fn move_money(self: Arc<Seen>) {
        while !self.stop.load(Ordering::Relaxed) {
            let (from, to) = self.bank.pick();
            let amount = rand::rng().random_range(1..=self.amount_max);
            let began = Instant::now();
            match self.transfer(from, to, amount).await {
                Ok(Some(Transfer::Done)) => self.done(began, from, to, amount),
                Ok(Some(Transfer::Refused)) => _ = self.refused.fetch_add(1, Ordering::Relaxed),
                // It was aborted, and another one is as good.
                Ok(None) => {}
                Err(Error::Unknown(_)) => _ = self.unknown.fetch_add(1, Ordering::Relaxed),
                Err(error) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    self.error.lock().get_or_insert_with(|| error.to_string());
                }
            }
        }
    }

    /// Moves money, and finds out what became of it. `None`: nothing, and it was not tried again.
    async fn transfer(&self, from: u32, to: u32, amount: u64) -> Result<Option<Transfer>, Error> {
        match self.bank.transfer_counting(from, to, amount, &self.attempts).await {
            Ok(transfer) => Ok(Some(transfer)),
            Err(Error::Unknown(handle)) => match handle.resolve(RESOLVE_PATIENCE).await {
                Ok(Outcome::Committed { .. }) => Ok(Some(Transfer::Done)),
                Ok(Outcome::Aborted { .. }) => Ok(None),
                Ok(Outcome::Expired) | Err(_) => Err(Error::Unknown(handle)),
            },
            Err(error) => Err(error),
        }
    }

    fn done(&self, began: Instant, from: u32, to: u32, amount: u64) {
        self.committed.fetch_add(1, Ordering::Relaxed);
        self.latencies.lock().saturating_record(began.elapsed().as_micros() as u64);
        {
            let mut ledger = self.ledger.lock();
            *ledger.entry(from).or_default() -= amount as i64;
            *ledger.entry(to).or_default() += amount as i64;
        }
        let mut commits = self.commits.lock();
        // Under the lock, so that they are in order.
        let done = Done { began, ended: Instant::now() };
        for account in [from, to] {
            commits.entry(self.bank.shard(account)).or_default().push(done);
        }
    }

    fn counts(&self) -> Counts {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (committed, refused) = (count(&self.committed), count(&self.refused));
        let (unknown, failed) = (count(&self.unknown), count(&self.failed));
        Counts {
            committed,
            refused,
            aborted: count(&self.attempts).saturating_sub(committed + refused + unknown),
            unknown,
            failed,
            error: self.error.lock().clone(),
        }
    }
}

/// Microseconds up to ten minutes, to three digits.
fn no_latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("these bounds are in order")
}
