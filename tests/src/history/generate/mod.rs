//! Histories made up from a seed: clients of a simulated store, whose transactions take place one after
//! another, each at some instant between its question and its answer.
//!
//! An operation may fail, and then never takes place. Its answer may get lost, and then it has taken
//! place, or never does, or does so long after its client has given up. A store may also be flawed, to
//! see whether a checker notices.

pub(crate) mod store;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{Event, History, Kind, Mop, Op, RwMop, Workload};
use store::Store;

/// Which history to make up. The same plan always makes the same history.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// What the clients do.
    pub workload: Workload,
    /// Where all chance comes from.
    pub seed: u64,
    /// Operations that are asked for, without the reads at the end.
    pub operations: usize,
    /// Clients at a time.
    pub clients: usize,
    /// Keys in use at a time; accounts of the bank.
    pub keys: usize,
    /// Writes to a key before another one takes its place.
    pub writes_per_key: i64,
    /// Steps that a transaction has at most.
    pub steps_max: usize,
    /// The part of the operations that fail.
    pub fails: f64,
    /// The part of the operations whose answers get lost.
    pub infos: f64,
    /// How the store errs.
    pub flaw: Flaw,
}

/// How a store errs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// It does not.
    None,
    /// It has snapshot isolation: transactions read what was there when they began, and fail if somebody
    /// else has written since what they write.
    Snapshot,
    /// It has no isolation: the same, but nobody fails, and of two transfers at a time one is lost.
    Unchecked,
    /// Of the transactions that only read, some read what was there some time ago.
    Stale,
}

/// What an account of the bank holds at first.
pub const OPENING: i64 = 100;

/// States of the past that a store may show.
const PAST_MAX: usize = 20;

impl Plan {
    /// A plan of moderate size: ten clients, five keys, few failures, no flaw.
    pub fn new(workload: Workload, seed: u64, operations: usize) -> Plan {
        Plan {
            workload,
            seed,
            operations,
            clients: 10,
            keys: 5,
            writes_per_key: 20,
            steps_max: 5,
            fails: 0.05,
            infos: 0.05,
            flaw: Flaw::None,
        }
    }
}

/// Makes up a history. At its end, after all clients are done, everything is read once more.
pub fn history(plan: &Plan) -> History {
    let mut run = Run::new(plan);
    while run.asked < plan.operations || run.clients.iter().any(|client| !client.is_idle()) {
        let client = run.rng.random_range(0..run.clients.len());
        run.step(client);
        if !run.limbo.is_empty() && run.rng.random_bool(0.05) {
            run.take_place_late();
        }
    }
    while !run.limbo.is_empty() {
        run.take_place_late();
    }
    for op in run.asker.everything() {
        let process = run.processes;
        run.note(process, Kind::Invoke, op.clone(), None);
        let (answer, commit_ts) = run.store.execute(&op).expect("reads are never refused");
        run.note(process, Kind::Ok, answer, Some(commit_ts));
    }
    History { events: run.events }
}

struct Run<'p> {
    plan: &'p Plan,
    rng: StdRng,
    store: Store,
    asker: Asker,
    clients: Vec<Client>,
    /// Operations whose clients have given up.
    limbo: Vec<Op>,
    /// States of the store in the past, if it is one that shows them.
    past: Vec<Store>,
    events: Vec<Event>,
    time_nanos: u64,
    /// The number of the next process.
    processes: u32,
    asked: usize,
}

struct Client {
    process: u32,
    state: State,
}

enum State {
    Idle,
    Asked(Op),
    /// What it reads is settled, what it writes is not.
    Begun(Op, Box<Store>),
    Done(Op, u64),
}

impl Client {
    fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }
}

impl Run<'_> {
    fn new(plan: &Plan) -> Run<'_> {
        let clients = (0..plan.clients as u32).map(|process| Client { process, state: State::Idle });
        Run {
            plan,
            rng: StdRng::seed_from_u64(plan.seed),
            store: Store::new(plan.keys as i64, OPENING),
            asker: Asker::new(plan),
            clients: clients.collect(),
            limbo: Vec::new(),
            past: Vec::new(),
            events: Vec::new(),
            time_nanos: 0,
            processes: plan.clients as u32,
            asked: 0,
        }
    }

    /// Lets one client go on.
    fn step(&mut self, client: usize) {
        let process = self.clients[client].process;
        let next = match std::mem::replace(&mut self.clients[client].state, State::Idle) {
            State::Idle if self.asked == self.plan.operations => State::Idle,
            State::Idle => {
                self.asked += 1;
                let op = self.asker.next(&mut self.rng);
                self.note(process, Kind::Invoke, op.clone(), None);
                State::Asked(op)
            }
            State::Asked(op) if self.rng.random_bool(self.plan.fails) => {
                self.note(process, Kind::Fail, op, None);
                State::Idle
            }
            State::Asked(op) if self.rng.random_bool(self.plan.infos / 2.0) => {
                self.give_up(client, op.clone());
                if self.rng.random_bool(0.5) {
                    self.limbo.push(op);
                }
                State::Idle
            }
            State::Asked(op) => self.execute(client, op),
            State::Begun(op, seen) => self.commit(client, op, *seen),
            State::Done(op, _) if self.rng.random_bool(self.plan.infos / 2.0) => {
                self.give_up(client, op.question());
                State::Idle
            }
            State::Done(op, commit_ts) => {
                self.note(process, Kind::Ok, op, Some(commit_ts));
                State::Idle
            }
        };
        self.clients[client].state = next;
    }

    fn execute(&mut self, client: usize, op: Op) -> State {
        match self.plan.flaw {
            Flaw::None => {}
            Flaw::Snapshot | Flaw::Unchecked => return State::Begun(op, Box::new(self.store.clone())),
            Flaw::Stale => {
                self.past.push(self.store.clone());
                if self.past.len() > PAST_MAX {
                    self.past.remove(0);
                }
                if op.is_read_only() && self.rng.random_bool(0.1) {
                    let mut seen = self.past[self.rng.random_range(0..self.past.len())].clone();
                    let (answer, commit_ts) = seen.execute(&op).expect("reads are never refused");
                    return State::Done(answer, commit_ts);
                }
            }
        }
        self.executed(client, op, None)
    }

    fn commit(&mut self, client: usize, op: Op, mut seen: Store) -> State {
        let answer = seen.clone().execute(&op).map(|(answer, _)| answer);
        let refused = self.plan.flaw == Flaw::Snapshot && seen.conflicts(&self.store, &op);
        match answer {
            Some(answer) if op.is_read_only() => {
                State::Done(answer, seen.execute(&op).map_or(0, |(_, ts)| ts))
            }
            Some(answer) if !refused => {
                if self.plan.flaw == Flaw::Unchecked {
                    self.store.forget_since(&seen, &op);
                }
                self.executed(client, op, Some(answer))
            }
            Some(_) | None => {
                self.note(self.clients[client].process, Kind::Fail, op, None);
                State::Idle
            }
        }
    }

    /// Lets it take place, and answers what the store says, or something else.
    fn executed(&mut self, client: usize, op: Op, instead: Option<Op>) -> State {
        match self.store.execute(&op) {
            Some((answer, commit_ts)) => State::Done(instead.unwrap_or(answer), commit_ts),
            None => {
                self.note(self.clients[client].process, Kind::Fail, op, None);
                State::Idle
            }
        }
    }

    fn give_up(&mut self, client: usize, op: Op) {
        self.note(self.clients[client].process, Kind::Info, op, None);
        self.clients[client].process = self.processes;
        self.processes += 1;
    }

    /// Lets an operation take place whose client has given up, or gives it up too.
    fn take_place_late(&mut self) {
        let op = self.limbo.swap_remove(self.rng.random_range(0..self.limbo.len()));
        if self.rng.random_bool(0.8) {
            // Nobody learns what it read, nor that it was refused.
            let _ = self.store.execute(&op);
        }
    }

    fn note(&mut self, process: u32, kind: Kind, op: Op, commit_ts: Option<u64>) {
        self.time_nanos += self.rng.random_range(1..1000);
        let error = match kind {
            Kind::Invoke | Kind::Ok => None,
            Kind::Fail => Some("aborted".to_owned()),
            Kind::Info => Some("timed out".to_owned()),
        };
        let index = self.events.len() as u64;
        self.events.push(Event { index, time_nanos: self.time_nanos, process, kind, op, error, commit_ts });
    }
}

/// Thinks of operations.
pub struct Asker {
    workload: Workload,
    steps_max: usize,
    writes_per_key: i64,
    /// The keys in use, each with the writes to it so far.
    keys: Vec<(i64, i64)>,
    /// Keys that were ever used.
    used: i64,
    /// Elements that were ever added.
    added: i64,
}

/// Keys that the long fork workload reads at once.
const FORK_KEYS: i64 = 3;

impl Asker {
    /// One that has asked for nothing yet.
    pub fn new(plan: &Plan) -> Asker {
        let keys: Vec<_> = (0..plan.keys as i64).map(|key| (key, 0)).collect();
        let (steps_max, writes_per_key) = (plan.steps_max, plan.writes_per_key);
        let used = keys.len() as i64;
        Asker { workload: plan.workload, steps_max, writes_per_key, keys, used, added: 0 }
    }

    /// The next operation.
    pub fn next(&mut self, rng: &mut StdRng) -> Op {
        let steps = rng.random_range(1..=self.steps_max);
        match self.workload {
            Workload::Append => Op::Txn((0..steps).map(|_| self.mop(rng)).collect()),
            Workload::WriteSkew => {
                let (pair, write) = self.written(rng);
                let [one, other] = [2 * pair, 2 * pair + 1];
                let key = if rng.random_bool(0.5) { one } else { other };
                let read = |key| Mop::Read { key, list: None };
                Op::Txn(vec![read(one), read(other), Mop::Append { key, value: write }])
            }
            Workload::Register => Op::RwTxn((0..steps).map(|_| self.rw_mop(rng)).collect()),
            Workload::LongFork => {
                let group = rng.random_range(0..self.keys.len());
                let (key, written) = self.keys[group];
                if written < FORK_KEYS && rng.random_bool(0.4) {
                    self.keys[group].1 += 1;
                    return Op::Fork(vec![RwMop::Write { key: FORK_KEYS * key + written, value: 1 }]);
                }
                if written == FORK_KEYS && rng.random_bool(0.3) {
                    self.keys[group] = (self.used, 0);
                    self.used += 1;
                }
                fork_read(key)
            }
            Workload::Bank if rng.random_bool(0.7) => {
                let from = rng.random_range(0..self.keys.len() as i64);
                let to = (from + rng.random_range(1..self.keys.len() as i64)) % self.keys.len() as i64;
                Op::Transfer { from, to, amount: rng.random_range(1..=20) }
            }
            Workload::Set if rng.random_bool(0.8) => {
                self.added += 1;
                Op::Add(self.added)
            }
            Workload::Counter if rng.random_bool(0.7) => Op::Increment(None),
            Workload::Bank => Op::Balances(None),
            Workload::Set => Op::Elements(None),
            Workload::Counter => Op::Count(None),
        }
    }

    fn mop(&mut self, rng: &mut StdRng) -> Mop {
        if rng.random_bool(0.5) {
            let (key, value) = self.written(rng);
            return Mop::Append { key, value };
        }
        Mop::Read { key: self.keys[rng.random_range(0..self.keys.len())].0, list: None }
    }

    fn rw_mop(&mut self, rng: &mut StdRng) -> RwMop {
        if rng.random_bool(0.5) {
            let (key, value) = self.written(rng);
            return RwMop::Write { key, value };
        }
        RwMop::Read { key: self.keys[rng.random_range(0..self.keys.len())].0, value: None }
    }

    /// A key to be written, and what.
    fn written(&mut self, rng: &mut StdRng) -> (i64, i64) {
        let place = rng.random_range(0..self.keys.len());
        if self.keys[place].1 == self.writes_per_key {
            self.keys[place] = (self.used, 0);
            self.used += 1;
        }
        self.keys[place].1 += 1;
        self.keys[place]
    }

    /// Reads of all that there is.
    pub fn everything(&self) -> Vec<Op> {
        let keys = |count| (0..count).collect::<Vec<i64>>();
        let read = |key: &i64| Mop::Read { key: *key, list: None };
        let rw_read = |key: &i64| RwMop::Read { key: *key, value: None };
        let lists =
            |count| keys(count).chunks(4).map(|keys| Op::Txn(keys.iter().map(read).collect())).collect();
        match self.workload {
            Workload::Append => lists(self.used),
            Workload::WriteSkew => lists(2 * self.used),
            Workload::Register => {
                keys(self.used).chunks(4).map(|keys| Op::RwTxn(keys.iter().map(rw_read).collect())).collect()
            }
            Workload::LongFork => (0..self.used).map(fork_read).collect(),
            Workload::Bank => vec![Op::Balances(None)],
            Workload::Set => vec![Op::Elements(None)],
            Workload::Counter => vec![Op::Count(None)],
        }
    }
}

fn fork_read(group: i64) -> Op {
    let keys = FORK_KEYS * group..FORK_KEYS * (group + 1);
    Op::Fork(keys.map(|key| RwMop::Read { key, value: None }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_histories_are_histories_of_their_workload() {
        for workload in Workload::ALL {
            let plan = Plan::new(workload, 1, 300);
            let made = history(&plan);
            assert_eq!(made.validate(), Ok(()), "{workload}");
            assert!(made.events.iter().all(|event| event.op.is_of(workload)), "{workload}");
            for kind in [Kind::Invoke, Kind::Ok, Kind::Fail, Kind::Info] {
                assert!(made.events.iter().any(|event| event.kind == kind), "{workload} has no {kind:?}");
            }
            assert_eq!(history(&plan), made, "the same seed makes the same history");
            assert_ne!(history(&Plan { seed: 2, ..plan }), made);
        }
    }
}
