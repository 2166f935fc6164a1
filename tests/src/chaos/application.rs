//! The applications: clients that ask one thing after the other, and note what they are told.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep, sleep_until};
use troth_sdk::{Bytes, Client, Commit, Error, Key, KeyRange, Outcome, Snapshot, Transaction, TxnId};

use crate::history::generate::Asker;
use crate::history::recorder::Recorder;
use crate::history::{Ending, History, Kind, Mop, Op, RwMop};

/// How long an operation may take with all its attempts.
pub const OP_TIMEOUT: Duration = Duration::from_secs(5);

/// Attempts of one operation.
const ATTEMPTS_MAX: u32 = 8;

/// How long an application asks how a transaction ended that was not answered.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(3);

/// Rows that are scanned at most.
const ROWS_MAX: usize = 1_000_000;

/// What became of an operation.
#[derive(Clone, PartialEq, Debug)]
pub enum Done {
    /// It took place: with what was read, and when by the clock of the cluster.
    Ok(Op, u64),
    /// It has not taken place and never will.
    Fail(String),
    /// Nobody knows.
    Info(String),
}

/// What all applications share.
pub struct Applications {
    /// What they note.
    pub recorder: Recorder,
    /// What they are to ask.
    pub asker: Mutex<Asker>,
    /// The time between the questions of one of them.
    pub pace: Duration,
    /// Transactions that were to be committed, by process, until it is told how they ended.
    unanswered: Mutex<BTreeMap<u32, Unanswered>>,
    stop: AtomicBool,
}

/// A transaction that was to be committed.
struct Unanswered {
    txn: TxnId,
    /// What the process says if it is committed.
    answer: Op,
}

/// What became of the transactions whose clients were not told.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Settled {
    /// How each ended, by the process that asked for it.
    pub endings: BTreeMap<u32, Ending>,
    /// Processes that asked for something so long ago that nobody knows any more.
    pub expired: BTreeSet<u32>,
    /// The first event of the history after this was known.
    pub until: u64,
}

impl Settled {
    /// Those that took place.
    pub fn committed(&self) -> usize {
        self.endings.values().filter(|ending| matches!(ending, Ending::Committed { .. })).count()
    }

    /// Those that did not.
    pub fn aborted(&self) -> usize {
        self.endings.len() - self.committed()
    }

    /// The history that it would be if the clients had been told.
    pub fn told(&self, history: &History) -> History {
        history.settled(&self.endings, self.until)
    }
}

impl Applications {
    /// None is there yet.
    pub fn new(asker: Asker, pace: Duration) -> Applications {
        Applications {
            recorder: Recorder::new(),
            asker: Mutex::new(asker),
            pace,
            unanswered: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    /// They end after what they are about to do.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Asks one thing after the other, until stopped.
    pub async fn run(self: Arc<Applications>, client: Client, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut process = self.recorder.new_process();
        let mut next = Instant::now() + self.pace.mul_f64(rng.random());
        while !self.stop.load(Ordering::Relaxed) {
            sleep_until(next).await;
            // Whoever was late does not hurry.
            next = Instant::now().max(next) + self.pace;
            let op = self.asker.lock().next(&mut rng);
            let manner = Manner {
                snapshot: rng.random_bool(0.5),
                resolve: rng.random_bool(0.5),
                until: Instant::now() + OP_TIMEOUT,
                attempts_max: ATTEMPTS_MAX,
            };
            self.recorder.invoke(process, op.clone());
            let done = self.perform(process, &client, &op, manner).await;
            if !self.note(process, &op, done) {
                process = self.recorder.new_process();
            }
        }
    }

    /// Asks how the transactions ended whose clients were not told, or died before. Nobody may be at work any
    /// more, and nothing in doubt. The answers do not go into the history: its clients do not know.
    ///
    /// # Errors
    /// What is not answered until the deadline.
    pub async fn settle(&self, client: &Client, deadline: Instant) -> Result<Settled, String> {
        let unanswered = std::mem::take(&mut *self.unanswered.lock());
        let mut settled = Settled::default();
        for (process, Unanswered { txn, answer }) in unanswered {
            let outcome = loop {
                match client.outcome(txn).await {
                    Ok(outcome) => break outcome,
                    Err(error) if Instant::now() > deadline => {
                        return Err(format!("nobody says how {txn} of process {process} ended: {error}"));
                    }
                    Err(_) => sleep(Duration::from_millis(50)).await,
                }
            };
            let ending = match outcome {
                Outcome::Committed { commit_ts } => Ending::Committed { answer, commit_ts: commit_ts.0 },
                Outcome::Aborted { .. } => Ending::Aborted,
                Outcome::Expired => {
                    settled.expired.insert(process);
                    continue;
                }
            };
            settled.endings.insert(process, ending);
        }
        let history = self.recorder.history();
        settled.until = history.events.last().map_or(0, |event| event.index + 1);
        // Whoever died before it was about to commit has committed nothing.
        let processes = history.unanswered().map(|operation| operation.invoked.process);
        for process in processes.filter(|process| !settled.expired.contains(process)) {
            settled.endings.entry(process).or_insert(Ending::Aborted);
        }
        Ok(settled)
    }

    /// Reads everything once more, as one process. Nobody else may be at work any more.
    ///
    /// # Errors
    /// What cannot be read until the deadline.
    pub async fn read_everything(&self, client: &Client, deadline: Instant) -> Result<(), String> {
        let everything = self.asker.lock().everything();
        let process = self.recorder.new_process();
        for op in everything {
            let manner = Manner { snapshot: false, resolve: false, until: deadline, attempts_max: u32::MAX };
            self.recorder.invoke(process, op.clone());
            let done = self.perform(process, client, &op, manner).await;
            let failure = match &done {
                Done::Ok(..) => None,
                Done::Fail(error) | Done::Info(error) => Some(format!("{op}: {error}")),
            };
            self.note(process, &op, done);
            if let Some(failure) = failure {
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Notes what became of an operation, and tells whether the process may go on.
    fn note(&self, process: u32, op: &Op, done: Done) -> bool {
        match done {
            Done::Ok(op, ts) => self.recorder.complete(process, Kind::Ok, op, None, Some(ts)),
            Done::Fail(error) => self.recorder.complete(process, Kind::Fail, op.clone(), Some(error), None),
            // What only reads has changed nothing, whatever became of it.
            Done::Info(error) if op.is_read_only() => {
                self.recorder.complete(process, Kind::Fail, op.clone(), Some(error), None);
            }
            Done::Info(error) => {
                self.recorder.complete(process, Kind::Info, op.clone(), Some(error), None);
                return false;
            }
        }
        true
    }
}

/// How an operation is carried out.
#[derive(Clone, Copy)]
struct Manner {
    /// What only reads uses a snapshot, not a transaction.
    snapshot: bool,
    /// Whether to ask how a transaction ended that was not answered.
    resolve: bool,
    /// When it is not tried again.
    until: Instant,
    attempts_max: u32,
}

impl Applications {
    async fn perform(&self, process: u32, client: &Client, op: &Op, manner: Manner) -> Done {
        let mut attempts = 1;
        loop {
            let pause = match self.attempt(process, client, op, manner).await {
                Ok(done) => return done,
                Err(error) if !error.is_retriable() => return Done::Fail(error.to_string()),
                Err(error) if attempts >= manner.attempts_max || Instant::now() > manner.until => {
                    return Done::Fail(error.to_string());
                }
                Err(Error::Overloaded { retry_after }) => retry_after,
                Err(_) => Duration::from_millis(1 << attempts.min(8)),
            };
            attempts += 1;
            sleep(pause.mul_f64(0.5 + rand::random::<f64>())).await;
        }
    }

    /// One attempt. An error: it certainly did not happen.
    async fn attempt(&self, process: u32, client: &Client, op: &Op, manner: Manner) -> Result<Done, Error> {
        if op.is_read_only() && manner.snapshot {
            let snapshot = client.snapshot().await?;
            let answer = carry_out(&View::Snapshot(&snapshot), op).await?;
            return Ok(answer.map_or_else(Done::Fail, |op| Done::Ok(op, snapshot.timestamp().0)));
        }
        let tx = client.begin().await?;
        let answer = match carry_out(&View::Transaction(&tx), op).await? {
            Ok(answer) => answer,
            Err(refused) => {
                tx.rollback();
                return Ok(Done::Fail(refused));
            }
        };
        let unanswered = Unanswered { txn: tx.id(), answer: answer.clone() };
        self.unanswered.lock().insert(process, unanswered);
        let done = commit(tx, answer, manner).await;
        if op.is_read_only() || !matches!(done, Ok(Done::Info(_))) {
            self.unanswered.lock().remove(&process);
        }
        done
    }
}

/// Commits, and tells what became of it. An error: it certainly did not happen.
async fn commit(tx: Transaction, answer: Op, manner: Manner) -> Result<Done, Error> {
    match tx.commit().await? {
        Commit::Committed { commit_ts } => Ok(Done::Ok(answer, commit_ts.0)),
        Commit::Aborted { cause } => Err(Error::Aborted { cause }),
        Commit::Unknown { handle } if manner.resolve => match handle.resolve(RESOLVE_PATIENCE).await {
            Ok(Outcome::Committed { commit_ts }) => Ok(Done::Ok(answer, commit_ts.0)),
            Ok(Outcome::Aborted { cause }) => Err(Error::Aborted { cause }),
            Ok(Outcome::Expired) => Ok(Done::Info("the outcome is not kept any more".into())),
            Err(error) => Ok(Done::Info(error.to_string())),
        },
        Commit::Unknown { handle } => Ok(Done::Info(Error::Unknown(handle).to_string())),
    }
}

/// What is read from, and written to.
enum View<'v> {
    Transaction(&'v Transaction),
    Snapshot(&'v Snapshot),
}

impl View<'_> {
    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>, Error> {
        match self {
            View::Transaction(tx) => tx.get_many(keys).await,
            View::Snapshot(snapshot) => snapshot.get_many(keys).await,
        }
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        match self {
            View::Transaction(tx) => tx.get(key).await,
            View::Snapshot(snapshot) => snapshot.get(key).await,
        }
    }

    async fn scan(&self, prefix: &str) -> Result<Vec<(Key, Bytes)>, Error> {
        let range = KeyRange::prefix(prefix.as_bytes());
        match self {
            View::Transaction(tx) => tx.scan(range, ROWS_MAX).await,
            View::Snapshot(snapshot) => snapshot.scan(range, ROWS_MAX).await,
        }
    }

    fn put(&self, key: &str, value: impl ToString) -> Result<(), Error> {
        match self {
            View::Transaction(tx) => tx.put(key, value.to_string()),
            View::Snapshot(_) => unreachable!("snapshots are for what only reads"),
        }
    }
}

/// Reads and writes what an operation is about. The inner error: it makes no sense, and nothing was written.
async fn carry_out(view: &View<'_>, op: &Op) -> Result<Result<Op, String>, Error> {
    Ok(Ok(match op {
        Op::Txn(mops) => {
            let mut answers = Vec::with_capacity(mops.len());
            for mop in mops {
                answers.push(on_list(view, mop).await?);
            }
            Op::Txn(answers)
        }
        Op::RwTxn(mops) => Op::RwTxn(on_registers(view, mops).await?),
        Op::Fork(mops) => Op::Fork(on_registers(view, mops).await?),
        Op::Transfer { from, to, amount } => {
            let names = [account(*from), account(*to)];
            let held = view.get_many(&names).await?;
            let (paying, paid) = (number(held[0].as_ref()), number(held[1].as_ref()));
            if paying < *amount {
                return Ok(Err(format!("account {from} holds {paying}")));
            }
            view.put(&names[0], paying - amount)?;
            view.put(&names[1], paid + amount)?;
            op.clone()
        }
        Op::Balances(_) => {
            let rows = view.scan(ACCOUNTS).await?;
            let balances: BTreeMap<i64, i64> =
                rows.iter().map(|(key, value)| (last_part(key), number(Some(value)))).collect();
            Op::Balances(Some(balances))
        }
        Op::Add(element) => {
            // Each element says how many of its kind there were before, which is wrong if another one slips in.
            let kind = element.rem_euclid(KINDS);
            let before = view.scan(&format!("{ELEMENTS}{kind}/")).await?.len();
            view.put(&format!("{ELEMENTS}{kind}/{element}"), before)?;
            op.clone()
        }
        Op::Elements(_) => Op::Elements(Some(elements(&view.scan(ELEMENTS).await?))),
        Op::Increment(_) => {
            let count = number(view.get(COUNTER).await?.as_ref()) + 1;
            view.put(COUNTER, count)?;
            Op::Increment(Some(count))
        }
        Op::Count(_) => Op::Count(Some(number(view.get(COUNTER).await?.as_ref()))),
    }))
}

/// Keys of accounts, of elements by kind, and of the counter.
const ACCOUNTS: &str = "account/";
const ELEMENTS: &str = "element/";
const COUNTER: &str = "counter";

/// Kinds of elements: those of one kind wait for each other.
const KINDS: i64 = 4;

/// The elements of a set. If those of a kind do not count from 0 on, one is there that nobody has added.
fn elements(rows: &[(Key, Bytes)]) -> BTreeSet<i64> {
    let mut elements: BTreeSet<i64> = rows.iter().map(|(key, _)| last_part(key)).collect();
    let mut counts: BTreeMap<i64, BTreeSet<i64>> = BTreeMap::new();
    for (key, before) in rows {
        counts.entry(last_part(key).rem_euclid(KINDS)).or_default().insert(number(Some(before)));
    }
    let of_kind = |kind: &i64| elements.iter().filter(|element| element.rem_euclid(KINDS) == *kind).count();
    let is_wrong =
        |(kind, counts): (&i64, &BTreeSet<i64>)| !counts.iter().copied().eq(0..of_kind(kind) as i64);
    if counts.iter().any(is_wrong) {
        elements.insert(GARBAGE);
    }
    elements
}

/// What follows the last slash of a key.
fn last_part(key: &Key) -> i64 {
    parsed(key.as_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default())
}

fn account(number: i64) -> String {
    format!("{ACCOUNTS}{number}")
}

async fn on_list(view: &View<'_>, mop: &Mop) -> Result<Mop, Error> {
    let (Mop::Append { key, .. } | Mop::Read { key, .. }) = mop;
    let name = format!("list/{key}");
    let held = view.get(&name).await?;
    Ok(match mop {
        Mop::Append { value, .. } => {
            let text = held.as_deref().map_or("".into(), String::from_utf8_lossy);
            view.put(&name, format!("{text}{value} "))?;
            mop.clone()
        }
        Mop::Read { key, .. } => {
            let list = held.map(|text| {
                let text = String::from_utf8_lossy(&text);
                text.split_whitespace().map(|value| value.parse().unwrap_or(GARBAGE)).collect()
            });
            Mop::Read { key: *key, list }
        }
    })
}

/// What is read where no number is stored, or a wrong one. Nobody writes it, so the checkers find it.
const GARBAGE: i64 = i64::MIN;

async fn on_registers(view: &View<'_>, mops: &[RwMop]) -> Result<Vec<RwMop>, Error> {
    let mut answers = Vec::with_capacity(mops.len());
    for mop in mops {
        answers.push(match mop {
            RwMop::Write { key, value } => {
                view.put(&format!("register/{key}"), value)?;
                mop.clone()
            }
            RwMop::Read { key, .. } => {
                let held = view.get(&format!("register/{key}")).await?;
                RwMop::Read { key: *key, value: held.map(|value| number(Some(&value))) }
            }
        });
    }
    Ok(answers)
}

/// The number that is stored; 0 if nothing is.
fn number(stored: Option<&Bytes>) -> i64 {
    stored.map_or(0, |text| parsed(text))
}

fn parsed(text: &[u8]) -> i64 {
    std::str::from_utf8(text).ok().and_then(|text| i64::from_str(text).ok()).unwrap_or(GARBAGE)
}

/// Opens the accounts of the bank.
///
/// # Errors
/// If they cannot be written.
pub async fn open_accounts(client: &Client, opening: &BTreeMap<i64, i64>) -> Result<(), Error> {
    client
        .transact(async |tx| {
            for (number, balance) in opening {
                tx.put(account(*number), balance.to_string())?;
            }
            Ok(())
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_that_did_not_count_another_one_is_noticed() {
        let read = |rows: &[(&str, &str)]| {
            let row = |(key, before): &(&str, &str)| {
                let key = Key::copy_from(format!("{ELEMENTS}{key}").as_bytes());
                (key, Bytes::from(before.to_string()))
            };
            elements(&rows.iter().map(row).collect::<Vec<_>>())
        };
        assert_eq!(read(&[]), BTreeSet::new());
        assert_eq!(read(&[("0/8", "1"), ("0/4", "0"), ("1/5", "0")]), BTreeSet::from([4, 5, 8]));
        assert_eq!(read(&[("0/8", "0"), ("0/4", "0"), ("1/5", "0")]), BTreeSet::from([4, 5, 8, GARBAGE]));
        assert_eq!(read(&[("0/8", "2"), ("0/4", "0")]), BTreeSet::from([4, 8, GARBAGE]));
    }
}
