//! Decides what happens next: by time and by chance, all of it from one seed.
//!
//! Each seed has its own weather: which kinds of faults there are, how often, and how long they last.
//! A run in which everything breaks all the time finds less than many in which some things do.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt::Write as _;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use troth_protocol::{GroupId, ShardId};
use xxhash_rust::xxh3::Xxh3;

use super::faults::{Fault, Kind};
use super::world::World;
use super::{Address, Item, Pace};

/// How a trace is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tracing {
    /// Only as a number, of when which kind of thing happened.
    Number,
    /// In words, all of it.
    Words,
}

/// The chances of one seed.
#[derive(Clone, Debug)]
struct Weather {
    /// The mean time between two faults of a kind.
    every: BTreeMap<Kind, Duration>,
    loss: f64,
    double: f64,
    slow: f64,
}

impl Weather {
    fn new(rng: &mut SmallRng, without: &BTreeSet<Kind>) -> Weather {
        let mut every = BTreeMap::new();
        let mut rates = BTreeMap::new();
        for kind in Kind::ALL {
            // Drawn also where it is left out, so that leaving one out changes as little as can be.
            let (there, mean, rate) =
                (rng.random_bool(0.6), rng.random_range(100..3_000), rng.random_range(0.001..0.1));
            if there && !without.contains(&kind) {
                every.insert(kind, Duration::from_millis(mean));
                rates.insert(kind, rate);
            }
        }
        let rate = |kind| rates.get(&kind).copied().unwrap_or(0.0);
        Weather { loss: rate(Kind::Loss), double: rate(Kind::Double), slow: rate(Kind::Slow), every }
    }
}

/// What is due, by time; of what is due at the same moment, the first that was planned.
struct Due {
    at: Duration,
    number: u64,
    what: What,
}

enum What {
    Item(Item),
    /// It is time for a fault of this kind.
    Fault(Kind),
    /// It is time to look who leads.
    Watch,
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        self.number == other.number
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// A world and its fate.
pub struct Schedule {
    /// The world.
    pub world: World,
    rng: SmallRng,
    weather: Weather,
    due: BinaryHeap<Reverse<Due>>,
    number: u64,
    /// Since when a group has had no leader that can do anything.
    leaderless: BTreeMap<GroupId, Duration>,
    paused: BTreeMap<Address, Duration>,
    /// Faults are over.
    calm: bool,
    /// How many items have happened.
    pub steps: u64,
    /// How many faults of each kind had an effect.
    pub faults: BTreeMap<&'static str, u64>,
    hash: Xxh3,
    words: Option<String>,
}

impl Schedule {
    /// A world with the fate of a seed.
    pub fn new(world: World, seed: u64, without: &BTreeSet<Kind>, tracing: Tracing) -> Schedule {
        let mut rng = SmallRng::seed_from_u64(seed);
        let weather = Weather::new(&mut rng, without);
        let mut schedule = Schedule {
            world,
            rng,
            weather,
            due: BinaryHeap::new(),
            number: 0,
            leaderless: BTreeMap::new(),
            paused: BTreeMap::new(),
            calm: false,
            steps: 0,
            faults: BTreeMap::new(),
            hash: Xxh3::new(),
            words: (tracing == Tracing::Words).then(String::new),
        };
        schedule.plan(Duration::ZERO, What::Watch);
        for kind in schedule.weather.every.keys().copied().collect::<Vec<_>>() {
            schedule.plan_fault(kind);
        }
        for client in 0..schedule.world.clients.len() as u8 {
            let at = schedule.between(0, 50_000);
            schedule.plan(at, What::Item(Item::Go { client }));
        }
        schedule
    }

    /// The trace so far, as a number: equal traces have equal numbers.
    pub fn trace_hash(&self) -> u64 {
        self.hash.digest()
    }

    /// The trace so far, in words, if they are kept.
    pub fn trace(&self) -> &str {
        self.words.as_deref().unwrap_or_default()
    }

    /// The time since the beginning.
    pub fn time(&self) -> Duration {
        self.world.shared.time
    }

    fn between(&mut self, from_micros: u64, to_micros: u64) -> Duration {
        Duration::from_micros(self.rng.random_range(from_micros..=to_micros))
    }

    fn plan(&mut self, after: Duration, what: What) {
        self.number += 1;
        let at = self.world.shared.time + after;
        self.due.push(Reverse(Due { at, number: self.number, what }));
    }

    fn plan_fault(&mut self, kind: Kind) {
        let mean = self.weather.every[&kind].as_micros() as u64;
        let after = self.between(mean / 10, mean * 2);
        self.plan(after, What::Fault(kind));
    }

    /// What was emitted is planned.
    fn collect(&mut self) {
        for (pace, item) in std::mem::take(&mut self.world.shared.out) {
            let slow = !self.calm && self.rng.random_bool(self.weather.slow);
            let after = match pace {
                Pace::Local if slow => self.between(0, 20_000),
                Pace::Local => self.between(0, 50),
                Pace::Network(..) => {
                    if !self.deliver(&item) {
                        continue;
                    }
                    match slow {
                        true if self.rng.random_bool(0.1) => self.between(1_000, 4_000_000),
                        true => self.between(1_000, 100_000),
                        false => self.between(50, 800),
                    }
                }
                Pace::Round if slow => self.between(1_000, 300_000),
                Pace::Round => self.between(200, 1_500),
                Pace::After(wait) => wait + self.between(0, 200),
                Pace::Notice if self.calm || self.rng.random_bool(0.5) => self.between(0, 5_000),
                Pace::Notice => self.between(5_000, 3_000_000),
            };
            self.plan(after, What::Item(item));
        }
    }

    /// Whether a message arrives at all. It may also arrive twice.
    fn deliver(&mut self, item: &Item) -> bool {
        let (call, attempt) = match item {
            Item::Ask { call, attempt, .. } | Item::Answer { call, attempt, .. } => (*call, *attempt),
            _ => return true,
        };
        if self.calm {
            return true;
        }
        if self.rng.random_bool(self.weather.loss) {
            // Mostly somebody notices that the connection is gone.
            if self.rng.random_bool(0.7) {
                let after = self.between(100, 200_000);
                self.plan(after, What::Item(Item::Broken { call, attempt, unsent: false }));
            }
            return false;
        }
        let once = self.world.shared.calls.get(&call).is_none_or(|call| !call.may_come_twice());
        if self.rng.random_bool(self.weather.double) && !once {
            let after = if self.rng.random_bool(0.5) {
                self.between(50, 5_000)
            } else {
                self.between(5_000, 8_000_000)
            };
            self.plan(after, What::Item(item.copied()));
        }
        true
    }

    /// Lets the next thing happen. Returns whether there was one.
    pub fn step(&mut self) -> bool {
        let Some(Reverse(Due { at, number, what })) = self.due.pop() else {
            return false;
        };
        self.world.shared.time = self.world.shared.time.max(at);
        match what {
            What::Watch => {
                self.watch();
                self.plan(Duration::from_millis(50), What::Watch);
            }
            What::Fault(_) if self.calm => {}
            What::Fault(kind) => {
                self.strike(kind);
                self.plan_fault(kind);
            }
            What::Item(item) => {
                let paused = target(&item).and_then(|target| self.paused.get(&target).copied());
                match paused {
                    Some(until) if until > at && !self.calm => {
                        self.number += 1;
                        let number = self.number;
                        self.due.push(Reverse(Due { at: until, number, what: What::Item(item) }));
                        return true;
                    }
                    _ => {}
                }
                self.note(number, &item);
                self.steps += 1;
                self.world.happen(item);
            }
        }
        self.collect();
        true
    }

    fn note(&mut self, number: u64, item: &Item) {
        self.hash.update(&self.world.shared.time.as_nanos().to_le_bytes());
        self.hash.update(&number.to_le_bytes());
        if let Some(words) = &mut self.words {
            let time = self.world.shared.time.as_micros();
            writeln!(words, "{time:>9} {item:?}").expect("strings grow");
        }
    }

    // --- faults ---------------------------------------------------------------------------------

    /// Elects somebody where nobody can do anything any more.
    fn watch(&mut self) {
        let groups: Vec<GroupId> = self.world.shared.groups.keys().copied().collect();
        for group in groups {
            if self.world.is_led(group) {
                self.leaderless.remove(&group);
                continue;
            }
            let now = self.world.shared.time;
            let since = *self.leaderless.entry(group).or_insert(now);
            let patience = self.between(100_000, 600_000);
            if self.world.shared.groups[&group].term == 0 || now >= since + patience {
                self.elect(group);
            }
        }
    }

    fn elect(&mut self, group: GroupId) {
        let members = self.world.shared.groups[&group].members.clone();
        let fit: Vec<Address> =
            members.into_iter().filter(|member| self.world.has_majority(group, *member)).collect();
        if let Some(to) = self.pick(&fit) {
            let flying = self.world.shared.groups[&group].flying();
            let survive = self.rng.random_range(0..=flying);
            self.inflict(Fault::Elect { group, to, survive });
        }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        if from.is_empty() { None } else { Some(from[self.rng.random_range(0..from.len())]) }
    }

    fn inflict(&mut self, fault: Fault) {
        let item = Item::Fault(fault);
        self.number += 1;
        self.note(self.number, &item);
        self.world.happen(item);
    }

    fn servers(&self) -> Vec<Address> {
        self.world.servers().collect()
    }

    fn strike(&mut self, kind: Kind) {
        let before = (self.number, self.paused.clone());
        self.strike_with(kind);
        if before != (self.number, self.paused.clone()) {
            *self.faults.entry(kind.name()).or_default() += 1;
        }
    }

    fn strike_with(&mut self, kind: Kind) {
        match kind {
            Kind::Crash => {
                let all = self.servers();
                let count = if self.rng.random_bool(0.1) { all.len() } else { 1 };
                for _ in 0..count {
                    let Some(at) = self.pick(&all) else { return };
                    if self.rng.random_bool(0.5) {
                        self.inflict(Fault::Flush(at));
                    }
                    self.inflict(Fault::Crash(at));
                    let after = self.between(1_000, 2_000_000);
                    self.plan(after, What::Item(Item::Fault(Fault::Restart(at))));
                }
            }
            Kind::Elect => {
                let groups: Vec<GroupId> = self.world.shared.groups.keys().copied().collect();
                // The coordinators are one group among many, and the one that matters most.
                let group =
                    if self.rng.random_bool(0.4) { Some(GroupId::Coordinator) } else { self.pick(&groups) };
                if let Some(group) = group {
                    self.elect(group);
                }
            }
            Kind::Cut => {
                let mut all = self.servers();
                all.extend((0..self.world.clients.len() as u8).map(Address::Client));
                let one_way = self.rng.random_bool(0.3);
                let Some(alone) = self.pick(&all) else { return };
                let wide = self.rng.random_bool(0.5);
                for other in all.iter().copied().filter(|other| *other != alone) {
                    if wide || self.rng.random_bool(0.3) {
                        self.inflict(Fault::Cut(alone, other));
                        if !one_way {
                            self.inflict(Fault::Cut(other, alone));
                        }
                    }
                }
                let after = self.between(10_000, 3_000_000);
                self.plan(after, What::Item(Item::Fault(Fault::Mend)));
            }
            Kind::Pause => {
                let all = self.servers();
                if let Some(at) = self.pick(&all) {
                    let until = self.world.shared.time + self.between(10_000, 3_000_000);
                    self.paused.insert(at, until);
                    let text = format!("{at} stands still until {until:?}");
                    self.say(&text);
                }
            }
            Kind::Jump => {
                let all = self.servers();
                let coordinators: Vec<Address> =
                    all.into_iter().filter(|at| matches!(at, Address::Coordinator(_))).collect();
                if let Some(at) = self.pick(&coordinators) {
                    let far = self.rng.random_range(-600_000..600_000);
                    self.inflict(Fault::Jump(at, far));
                }
            }
            Kind::Move => {
                let shards: Vec<ShardId> = (0..self.world.shared.shards).map(ShardId).collect();
                let nodes = self.world.shared.nodes.clone();
                let (Some(shard), Some(to)) = (self.pick(&shards), self.pick(&nodes)) else { return };
                let members = self.world.shared.groups[&GroupId::Shard(shard)].members.clone();
                if let Some(from) = self.pick(&members) {
                    self.inflict(Fault::Move { shard, from, to });
                }
                for at in self.world.strays(shard) {
                    let after = self.between(1_000, 3_000_000);
                    self.plan(after, What::Item(Item::Fault(Fault::Forget(shard, at))));
                }
            }
            Kind::Retire => {
                let shards: Vec<ShardId> = (0..self.world.shared.shards).map(ShardId).collect();
                let Some(shard) = self.pick(&shards) else { return };
                let newest = self.world.shared.ghost.newest();
                let keep = Duration::from_millis(self.rng.random_range(1..500));
                let safe_point = newest.minus(keep);
                let outcomes_before = newest.minus(self.world.shared.limits.outcome_retention);
                self.inflict(Fault::Retire { shard, safe_point, outcomes_before });
            }
            // They have rates.
            Kind::Loss | Kind::Double | Kind::Slow | Kind::Leave => {}
        }
    }

    fn say(&mut self, text: &str) {
        if let Some(words) = &mut self.words {
            let time = self.world.shared.time.as_micros();
            writeln!(words, "{time:>9} {text}").expect("strings grow");
        }
    }

    /// Everything is mended, and nothing breaks any more.
    pub fn calm(&mut self) {
        self.calm = true;
        self.paused.clear();
        self.inflict(Fault::Mend);
        for at in self.servers() {
            self.inflict(Fault::Restart(at));
        }
        self.say("everything is mended");
        self.collect();
    }
}

/// The process at which something happens.
fn target(item: &Item) -> Option<Address> {
    match item {
        Item::Ask { to, .. } | Item::Answer { to, .. } => Some(*to),
        Item::Learn { seat, .. }
        | Item::Apply { seat }
        | Item::Barrier { seat, .. }
        | Item::Role { seat, .. }
        | Item::Wake { seat }
        | Item::Perform { seat }
        | Item::Later { seat, .. }
        | Item::Resume { seat, .. }
        | Item::RequestOver { seat, .. }
        | Item::Look { seat, .. }
        | Item::ReadOver { seat, .. }
        | Item::AskTime { seat, .. } => Some(seat.at),
        // Rounds and the clock of a call go on while its process stands still.
        Item::Broken { .. }
        | Item::AttemptOver { .. }
        | Item::NextAttempt { .. }
        | Item::Replicated { .. }
        | Item::Go { .. }
        | Item::Fault(_) => None,
    }
}
