//! A load of transactions that write two keys on two shards, and a ledger of what was acknowledged.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::task::JoinSet;
use troth_sdk::{Client, Error, Key, KeyRange};

use crate::in_time;

/// A load that runs.
pub struct Writers {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<BTreeSet<String>>>,
    pause: Arc<Mutex<Pause>>,
    failed: Arc<AtomicUsize>,
    tasks: JoinSet<()>,
}

/// The longest time in which nothing was acknowledged.
struct Pause {
    last: Instant,
    longest: Duration,
}

impl Pause {
    fn new() -> Pause {
        Pause { last: Instant::now(), longest: Duration::ZERO }
    }

    fn note(&mut self) {
        let now = Instant::now();
        self.longest = self.longest.max(now - self.last);
        self.last = now;
    }
}

/// What was acknowledged, to be looked for.
pub struct Ledger {
    /// The names of the transactions that clients were told are committed.
    pub acknowledged: BTreeSet<String>,
    /// Transactions that ended otherwise.
    pub failed: usize,
}

/// What a cluster has of what it acknowledged.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Findings {
    /// Acknowledged, and neither key is there.
    pub lost: usize,
    /// One key is there, and the other one is not, acknowledged or not.
    pub torn: usize,
}

impl Writers {
    /// Starts clients, each of which writes one pair of keys after the other.
    pub fn start(client: &Client, clients: usize) -> Writers {
        let mut writers = Writers {
            stop: Arc::default(),
            acknowledged: Arc::default(),
            pause: Arc::new(Mutex::new(Pause::new())),
            failed: Arc::default(),
            tasks: JoinSet::new(),
        };
        for name in 0..clients {
            let (client, stop) = (client.clone(), writers.stop.clone());
            let (acknowledged, failed) = (writers.acknowledged.clone(), writers.failed.clone());
            let pause = writers.pause.clone();
            let run: u32 = rand::random();
            writers.tasks.spawn(async move {
                for number in 0u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let name = format!("{run:08x}-{name}-{number}");
                    match write_pair(&client, &name).await {
                        Ok(()) => {
                            acknowledged.lock().insert(name);
                            pause.lock().note();
                        }
                        Err(error) => {
                            tracing::debug!(%error, "a transaction is not acknowledged");
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        writers
    }

    /// How many were acknowledged so far.
    pub fn count(&self) -> usize {
        self.acknowledged.lock().len()
    }

    /// The longest time since this was asked last in which nothing was acknowledged.
    pub fn take_pause(&self) -> Duration {
        let mut pause = self.pause.lock();
        let longest = pause.longest.max(pause.last.elapsed());
        *pause = Pause::new();
        longest
    }

    /// Ends the load: what is under way ends by its own deadline.
    ///
    /// # Panics
    /// If a client does not end, or has panicked.
    pub async fn stop(mut self) -> Ledger {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = in_time(self.tasks.join_next()).await {
            ended.expect("no panic in a client");
        }
        let acknowledged = std::mem::take(&mut *self.acknowledged.lock());
        Ledger { acknowledged, failed: self.failed.load(Ordering::Relaxed) }
    }
}

/// The two keys of a transaction, on different shards.
fn pair(client: &Client, name: &str) -> (String, String) {
    let shards = client.map().shards;
    let home = |key: &str| Key::copy_from(key.as_bytes()).shard(shards);
    let first = format!("a/{name}");
    let second = (0..).map(|salt| format!("b/{name}/{salt}")).find(|key| home(key) != home(&first));
    (first, second.expect("there are several shards"))
}

async fn write_pair(client: &Client, name: &str) -> Result<(), Error> {
    let (first, second) = pair(client, name);
    client
        .transact(async |tx| {
            tx.put(&first, name)?;
            tx.put(&second, name)
        })
        .await
}

impl Ledger {
    /// Looks for everything that was acknowledged.
    ///
    /// # Panics
    /// If the cluster cannot be read.
    pub async fn audit(&self, client: &Client) -> Findings {
        let snapshot = in_time(client.snapshot()).await.expect("a snapshot");
        let mut found: [BTreeSet<String>; 2] = Default::default();
        for (prefix, names) in [(&b"a/"[..], 0), (b"b/", 1)] {
            let rows = in_time(snapshot.scan(KeyRange::prefix(prefix), usize::MAX)).await.expect("readable");
            let value = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
            found[names] = rows.iter().map(|(_, name)| value(name)).collect();
        }
        let [first, second] = &found;
        let is_lost = |name: &&String| !first.contains(*name) && !second.contains(*name);
        Findings {
            lost: self.acknowledged.iter().filter(is_lost).count(),
            torn: first.symmetric_difference(second).count(),
        }
    }
}

/// How long a client of such a load tries.
pub const TIMEOUT: Duration = Duration::from_secs(3);
