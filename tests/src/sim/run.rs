//! One run from a seed to a report, and making a failing one smaller.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::panic;
use std::sync::Once;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use troth_coordinator::leader::Limits;
use troth_protocol::{Key, KeyRange};

use super::client::{Action, Client, Counts, Plan};
use super::faults::Kind;
use super::schedule::{Schedule, Tracing};
use super::world::{Shape, World};

/// How long faults may go on, in the time of the run.
const FAULTS_MAX: Duration = Duration::from_secs(300);

/// How long everything may take to come to rest afterwards.
const REST_MAX: Duration = Duration::from_secs(60);

/// Items that a run may take in all.
const STEPS_MAX: u64 = 20_000_000;

/// What is run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// Decides everything else.
    pub seed: u64,
    /// Transactions, of all clients together.
    pub txns: u32,
    /// At most so many clients; the seed has chosen some.
    pub clients_max: u8,
    /// Kinds of faults that are left out.
    pub without: BTreeSet<Kind>,
}

impl Options {
    /// What a seed is like in full.
    pub fn new(seed: u64, txns: u32) -> Options {
        Options { seed, txns, clients_max: u8::MAX, without: BTreeSet::new() }
    }

    /// The command that runs this again.
    pub fn command(&self) -> String {
        let mut command = format!(
            "cargo run --release -p troth-tests --bin sim -- --seed {} --txns {}",
            self.seed, self.txns
        );
        if self.clients_max != u8::MAX {
            command += &format!(" --clients {}", self.clients_max);
        }
        if !self.without.is_empty() {
            let names: Vec<&str> = self.without.iter().map(|kind| kind.name()).collect();
            command += &format!(" --without {}", names.join(","));
        }
        command
    }
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// What went wrong.
    pub violations: Vec<String>,
    /// How operations ended.
    pub counts: Counts,
    /// Transactions that were committed.
    pub commits: usize,
    /// Items that happened.
    pub steps: u64,
    /// Faults that struck, but for those that have rates: of each kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Time that passed in the run.
    pub time: Duration,
    /// The trace as a number.
    pub hash: u64,
}

thread_local! {
    /// What this thread runs.
    static RUNS: RefCell<Option<Options>> = const { RefCell::new(None) };
}

/// From now on whoever panics in a run tells the command that does it again: an assertion of the product is a
/// finding.
pub fn tell_of_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            report(info);
            if let Some(options) = RUNS.take() {
                eprintln!("seed {} panics\n    {} --trace", options.seed, options.command());
            }
        }));
    });
}

/// Runs a seed. With [`Tracing::Words`] the whole trace is returned too.
pub fn run(options: &Options, tracing: Tracing) -> (Report, String) {
    RUNS.set(Some(options.clone()));
    let ran = run_on(options, tracing);
    RUNS.set(None);
    ran
}

fn run_on(options: &Options, tracing: Tracing) -> (Report, String) {
    let mut rng = SmallRng::seed_from_u64(options.seed ^ 0x9e37_79b9_7f4a_7c15);
    let shape = Shape {
        coordinators: if rng.random_bool(0.8) { 3 } else { 1 },
        nodes: rng.random_range(3..=4),
        replicas: if rng.random_bool(0.7) { 3 } else { 1 },
        shards: rng.random_range(2..=4),
    };
    let limits = Limits {
        vote_timeout: Duration::from_millis(rng.random_range(500..3_000)),
        age_max: Duration::from_secs(20),
        outcome_retention: Duration::from_secs(if rng.random_bool(0.8) { 3_600 } else { 40 }),
        ..Limits::default()
    };
    let clients = rng.random_range(2..=8).min(options.clients_max).max(1);
    let keys = rng.random_range(2..=12);
    let mut next = 0;
    let leave = !options.without.contains(&Kind::Leave);
    let mut plans: Vec<VecDeque<Plan>> = vec![VecDeque::new(); clients.into()];
    for number in 0..options.txns {
        let plan = plan(&mut rng, keys, &mut next, leave);
        plans[number as usize % usize::from(clients)].push_back(plan);
    }
    let clients = plans.into_iter().enumerate().map(|(number, plans)| Client::new(number as u8, plans));
    let world = World::new(shape, limits, clients.collect());
    let mut schedule = Schedule::new(world, options.seed, &options.without, tracing);

    let done = |schedule: &Schedule| schedule.world.clients.iter().all(|client| client.is_done());
    while !done(&schedule) && schedule.time() < FAULTS_MAX && is_sound(&schedule) {
        schedule.step();
    }
    schedule.calm();
    rest(&mut schedule);
    if is_sound(&schedule) {
        // Everything is read once more, when nothing moves any more.
        let all = Plan {
            steps: vec![
                Action::GetMany((0..keys).map(key).collect()),
                Action::Scan(KeyRange::new(Key::copy_from(b""), None)),
            ],
            patience: REST_MAX,
            leaves: false,
            forgetful: false,
        };
        let before = schedule.world.clients[0].counts.ok;
        schedule.world.clients[0].extend([all]);
        schedule.world.shared.emit(super::Pace::Local, super::Item::Go { client: 0 });
        rest(&mut schedule);
        if is_sound(&schedule) && schedule.world.clients[0].counts.ok == before {
            schedule.world.shared.ghost.violations.push("the last read of everything failed".into());
        }
    }
    if schedule.steps >= STEPS_MAX {
        let text = format!("after {STEPS_MAX} steps it is still not over: {:?}", schedule.world.unrest());
        schedule.world.shared.ghost.violations.push(text);
    }
    schedule.world.shared.ghost.judge();
    let total =
        |count: fn(&Counts) -> u64| schedule.world.clients.iter().map(|client| count(&client.counts)).sum();
    let ghost = &schedule.world.shared.ghost;
    let report = Report {
        violations: ghost.violations.clone(),
        counts: Counts {
            ok: total(|counts| counts.ok),
            failed: total(|counts| counts.failed),
            unknown: total(|counts| counts.unknown),
        },
        commits: ghost.commits(),
        steps: schedule.steps,
        faults: schedule.faults.clone(),
        time: schedule.time(),
        hash: schedule.trace_hash(),
    };
    (report, schedule.trace().to_owned())
}

fn is_sound(schedule: &Schedule) -> bool {
    schedule.world.shared.ghost.violations.is_empty() && schedule.steps < STEPS_MAX
}

/// After all faults everything must come to rest: clients have their answers, no transaction is
/// prepared, every decision has arrived.
fn rest(schedule: &mut Schedule) {
    let until = schedule.time() + REST_MAX;
    let mut looked = 0;
    while is_sound(schedule) {
        schedule.step();
        // Looking costs more than a step.
        if schedule.steps < looked + 50 {
            continue;
        }
        looked = schedule.steps;
        let Some(unrest) = schedule.world.unrest() else { return };
        if schedule.time() > until {
            let text = format!("not at rest {REST_MAX:?} after the last fault: {unrest}");
            return schedule.world.shared.ghost.violations.push(text);
        }
    }
}

/// The keys of a run: some share a shard by their tag, as an application would have it.
fn key(number: u32) -> Key {
    let name = if number.is_multiple_of(3) { format!("{{t}}{number}") } else { format!("k{number}") };
    Key::copy_from(name.as_bytes())
}

fn plan(rng: &mut SmallRng, keys: u32, next: &mut u64, leave: bool) -> Plan {
    let count = rng.random_range(1..=4);
    let read_only = rng.random_bool(0.2);
    // A quarter stays in one shard.
    let tagged = rng.random_bool(0.25);
    let mut steps = Vec::new();
    for _ in 0..count {
        let number = rng.random_range(0..keys);
        let key_of = |number: u32| if tagged { key(number - number % 3) } else { key(number) };
        let chosen = key_of(number);
        *next += 1;
        steps.push(match rng.random_range(0..100) {
            0..20 => Action::Get(chosen),
            20..30 => {
                let mut many =
                    vec![chosen, key_of(rng.random_range(0..keys)), key_of(rng.random_range(0..keys))];
                many.sort();
                many.dedup();
                Action::GetMany(many)
            }
            30..40 => Action::Scan(match tagged {
                true => KeyRange::prefix(b"{t}"),
                false => KeyRange::new(Key::copy_from(b"k"), None),
            }),
            _ if read_only => Action::Get(chosen),
            40..75 => Action::Append(chosen, *next),
            75..95 => Action::Put(chosen, *next),
            _ => Action::Delete(chosen),
        });
    }
    Plan {
        steps,
        patience: Duration::from_millis(rng.random_range(300..8_000)),
        leaves: rng.random_bool(0.03) && leave,
        forgetful: rng.random_bool(0.3),
    }
}

/// The first seed that goes wrong, in a violation or a panic.
pub fn first_failing(seeds: Range<u64>, txns: u32) -> Option<u64> {
    let fails = |seed: &u64| {
        let options = Options::new(*seed, txns);
        let ran = panic::catch_unwind(|| run(&options, Tracing::Number).0);
        !ran.is_ok_and(|report| report.violations.is_empty())
    };
    seeds.into_iter().find(fails)
}

/// Makes a failing run smaller, as long as it still fails in some way.
pub fn shrink(options: &Options, mut tried: impl FnMut(&Options)) -> Options {
    let fails = |options: &Options| !run(options, Tracing::Number).0.violations.is_empty();
    let mut best = options.clone();
    loop {
        let mut smaller: Vec<Options> = Vec::new();
        for kind in Kind::ALL.into_iter().filter(|kind| !best.without.contains(kind)) {
            let mut without = best.without.clone();
            without.insert(kind);
            smaller.push(Options { without, ..best.clone() });
        }
        for txns in [best.txns / 2, best.txns * 3 / 4, best.txns - 1] {
            if txns > 0 && txns < best.txns {
                smaller.push(Options { txns, ..best.clone() });
            }
        }
        for clients_max in [1, 2, 3, 4] {
            if clients_max < best.clients_max {
                smaller.push(Options { clients_max, ..best.clone() });
            }
        }
        let found = smaller.into_iter().find(|options| {
            tried(options);
            fails(options)
        });
        match found {
            Some(options) => best = options,
            None => return best,
        }
    }
}
