//! Every order of everything: the world of the [simulation](crate::sim), explored without chance.
//!
//! What the simulator tries for some orders of messages, rounds of the log, elections, losses and crashes,
//! the model checker does for all of them, in small cases. It runs the same production code: states and
//! leaders of coordinators and shards, buffers and submissions of clients.
//!
//! Most cases begin when the clients have read and commit. What happens within a process happens at once; between any two things that pass between processes,
//! anything else may come. Time passes only when nothing else is left to happen, but for a budget of
//! timers that come early. Processes number what they do for themselves, and wall clocks stand still, so
//! that two orders which lead to the same state are one state.

mod cases;

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stateright::{Checker, Expectation, HasDiscoveries, Model, Property};
use troth_coordinator::leader::Limits;
use troth_protocol::GroupId;
use troth_protocol::message::{Request, coordinator};
use xxhash_rust::xxh3::Xxh3;

use crate::sim::calls::CallId;
use crate::sim::client::{Action as Act, Client, Plan};
use crate::sim::faults::Fault;
use crate::sim::world::{Shape, World};
use crate::sim::{Address, Item, Pace};

use self::cases::Budget;
pub use self::cases::{Case, cases};

/// The property that no step may break; so it is called where it was broken.
pub const BROKEN: &str = "no promise is broken";

/// The exit code of the model checker when an assertion of the product did not hold.
pub const PANICKED: i32 = 101;

/// How long everything may take to come to rest when nothing breaks any more.
const REST_MAX: Duration = Duration::from_secs(30);

/// The member of a group of two that only votes: of three, one is never in the way.
const WITNESS: u8 = 99;

/// A world, and what is on its way in it.
#[derive(Clone, Debug)]
pub struct State {
    world: World,
    /// What may happen now, each with its name, in the order of names.
    pending: Vec<(Arc<str>, Item)>,
    /// What happens when time has passed.
    timers: Vec<(Duration, Arc<str>, Item)>,
    budget: Budget,
    down: Option<Address>,
    just_died: bool,
    /// A server has died on the way here.
    has_died: bool,
    /// Nothing happens any more.
    over: bool,
    /// Also what makes no difference is kept, and happens in every order.
    every_order: bool,
}

impl State {
    /// All that may still matter, as a number.
    fn digest(&self) -> u64 {
        struct Feed(Xxh3);
        impl fmt::Write for Feed {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                self.0.update(text.as_bytes());
                Ok(())
            }
        }
        let mut feed = Feed(Xxh3::new());
        self.world.tell(&mut feed).expect("a hasher takes everything");
        let State { pending, timers, budget, down, just_died, has_died, over, .. } = self;
        let Feed(mut hash) = feed;
        for (name, _) in pending {
            name.hash(&mut hash);
        }
        for (due, name, _) in timers {
            (due, name).hash(&mut hash);
        }
        (budget, down, just_died, has_died, over).hash(&mut hash);
        hash.digest()
    }
}

/// Equal if their digests are: no more is compared when states are counted either.
impl PartialEq for State {
    fn eq(&self, other: &State) -> bool {
        self.digest() == other.digest()
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest().hash(state);
    }
}

/// What happens next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// This, of what may happen now.
    Happens(Arc<str>),
    /// This message is lost.
    IsLost(Arc<str>),
    /// This message comes now, and once more later.
    ComesTwice(Arc<str>),
    /// This timer comes early.
    ComesEarly(Arc<str>),
    /// Another leader is elected; so many entries survive.
    Elect(GroupId, Address, usize),
    /// A server dies, and has on disk what it had first, or all.
    Crash(Address, bool),
    /// It is started again.
    Restart(Address),
    /// Nothing else happens: time passes.
    TimePasses,
}

/// Explores a case.
#[derive(Clone, Debug)]
pub struct Explorer {
    case: Case,
    /// Orders that lead to the same are all explored.
    every_order: bool,
}

/// What came of exploring a case.
#[derive(Clone, Debug)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// All steps between them.
    pub steps: usize,
    /// The longest path.
    pub depth: usize,
    /// Nothing is left to explore.
    pub complete: bool,
    /// What does not hold, each with a way there in words, if there is one.
    pub failures: Vec<(&'static str, String)>,
}

impl Explorer {
    /// An explorer of a case.
    pub fn new(case: Case) -> Explorer {
        Explorer { case, every_order: false }
    }

    /// The same, which explores also what makes no difference: messages that nobody waits for, and orders of
    /// which is known that they lead to the same. It must find the same, only later.
    pub fn of_every_order(case: Case) -> Explorer {
        Explorer { case, every_order: true }
    }

    /// Explores until nothing is left, something is broken, or the time is over.
    pub fn explore(self, limit: Duration) -> Explored {
        let began = Instant::now();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let checker = self.checker().threads(threads).timeout(limit);
        let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
        let complete = began.elapsed() < limit;
        let holds = |property: &Property<Explorer>| {
            let found = checker.discovery(property.name).is_some();
            found == matches!(property.expectation, Expectation::Sometimes)
        };
        let way = |name| {
            let path = checker.discovery(name).into_iter().flat_map(|path| path.into_vec());
            let words = path.map(|(state, step)| match step {
                Some(step) => format!("    {step:?}\n"),
                None => format!("    then: {:?}\n", state.violations()),
            });
            (name, words.collect())
        };
        Explored {
            states: checker.unique_state_count(),
            steps: checker.state_count(),
            depth: checker.max_depth(),
            complete,
            failures: checker
                .model()
                .properties()
                .iter()
                .filter(|property| !holds(property))
                .map(|property| way(property.name))
                .collect(),
        }
    }

    /// Every way in which the case can end: what became of each transaction, in words.
    pub fn endings(&self) -> BTreeSet<String> {
        let (mut seen, mut endings) = (BTreeSet::new(), BTreeSet::new());
        let mut left = self.init_states();
        while let Some(state) = left.pop() {
            if !seen.insert(state.digest()) {
                continue;
            }
            if state.over {
                endings.insert(state.ending());
            }
            let mut steps = Vec::new();
            self.actions(&state, &mut steps);
            left.extend(steps.into_iter().filter_map(|step| self.next_state(&state, step)));
        }
        endings
    }

    fn first(&self) -> State {
        let shape = Shape { coordinators: 2, nodes: 2, replicas: self.case.replicas, shards: 2 };
        let limits = Limits { vote_timeout: Duration::from_secs(2), ..Limits::default() };
        let clients = self.case.clients.iter().enumerate().map(|(number, txns)| {
            let plan = |steps: &Vec<Act>| Plan {
                steps: steps.clone(),
                patience: Duration::from_secs(8),
                leaves: false,
                forgetful: false,
            };
            Client::new(number as u8, txns.iter().map(plan).collect::<VecDeque<_>>())
        });
        let mut world = World::new(shape, limits, clients.collect());
        world.shared.explored = true;
        for group in world.shared.groups.values_mut() {
            if group.members.len() == 2 {
                let witness = match group.members[0] {
                    Address::Coordinator(_) => Address::Coordinator(WITNESS),
                    Address::Node(_) | Address::Client(_) => Address::Node(WITNESS),
                };
                group.members.push(witness);
            }
        }
        let mut state = State {
            world,
            pending: Vec::new(),
            timers: Vec::new(),
            budget: self.case.budget,
            down: None,
            just_died: false,
            has_died: false,
            over: false,
            every_order: self.every_order,
        };
        // Everybody has a leader, and knows it.
        for group in state.world.shared.groups.keys().copied().collect::<Vec<_>>() {
            let to = state.world.shared.groups[&group].members[0];
            state.happen(Item::Fault(Fault::Elect { group, to, survive: 0 }));
        }
        let askers: Vec<Address> = state.world.servers().chain((0..2).map(Address::Client)).collect();
        for (group, now) in state.world.shared.groups.clone() {
            let hints = askers.iter().filter_map(|asker| Some(((*asker, group), now.leader?)));
            state.world.shared.leaders.extend(hints);
        }
        while !state.is_ready() {
            if state.pending.is_empty() {
                state.fire(0);
            } else {
                let (_, item) = state.pending.remove(0);
                state.happen(item);
            }
        }
        for client in 0..state.world.clients.len() as u8 {
            state.add(Item::Go { client });
        }
        let commits = |item: &Item| {
            let Item::Ask { request, .. } = item else { return false };
            matches!(&**request, Request::Coordinator(coordinator::Request::Commit(_)))
        };
        while self.case.from_commit
            && let Some(at) = state.pending.iter().position(|(_, item)| !commits(item))
        {
            let (_, item) = state.pending.remove(at);
            state.happen(item);
        }
        state
    }
}

impl State {
    /// Whether all is served, and nothing is left to do.
    fn is_ready(&self) -> bool {
        let served = self.world.shards_served() == usize::from(self.world.shared.shards);
        served && self.pending.is_empty() && self.world.are_servers_at_rest().is_none()
    }

    fn add(&mut self, mut item: Item) {
        // How far a log is committed, a member hears once, and then all of it.
        let learns = matches!(item, Item::Learn { .. });
        if let Item::Learn { upto, .. } = &mut item {
            *upto = 0;
        }
        let name: Arc<str> = format!("{item:?}").into();
        let at = self.pending.partition_point(|(other, _)| *other < name);
        if learns && self.pending.get(at).is_some_and(|(other, _)| *other == name) {
            return;
        }
        self.pending.insert(at, (name, item));
    }

    /// Lets an item happen, and everything that follows from it within processes.
    fn happen(&mut self, item: Item) {
        let mut local = VecDeque::from([item]);
        while let Some(item) = local.pop_front() {
            self.world.happen(item);
            for (pace, item) in std::mem::take(&mut self.world.shared.out) {
                let alone = |group: &GroupId| self.world.shared.groups[group].members.len() == 1;
                match (pace, &item) {
                    (Pace::Local, _) => local.push_back(item),
                    // A group of one needs no round to know that it leads.
                    (Pace::Round, Item::Barrier { seat, .. }) if alone(&seat.group) => local.push_back(item),
                    (Pace::Network(..) | Pace::Round | Pace::Notice, _) => self.add(item),
                    (Pace::After(wait), _) => {
                        let (due, name) = (self.world.shared.time + wait, format!("{item:?}").into());
                        let at =
                            self.timers.partition_point(|(other, named, _)| (*other, named) <= (due, &name));
                        self.timers.insert(at, (due, name, item));
                    }
                }
            }
        }
        if self.every_order {
            return;
        }
        let world = &self.world;
        self.pending.retain(|(_, item)| !world.is_moot(item, None));
        self.timers.retain(|(due, _, item)| !world.is_moot(item, Some(*due)));
        self.timers.dedup_by(|one, other| (one.0, &one.1) == (other.0, &other.1));
    }

    fn take(&mut self, name: &str) -> Option<Item> {
        let at = self.pending.iter().position(|(other, _)| **other == *name)?;
        Some(self.pending.remove(at).1)
    }

    fn fire(&mut self, at: usize) {
        let (due, _, item) = self.timers.remove(at);
        self.world.shared.time = self.world.shared.time.max(due);
        self.happen(item);
    }

    /// Timers come, in their order, until something may happen again or everything is at rest.
    fn pass_time(&mut self) {
        let until = self.world.shared.time + REST_MAX;
        while self.pending.is_empty() {
            if self.world.unrest().is_none() {
                self.over = true;
                self.world.shared.ghost.judge();
                return;
            }
            if self.timers.first().is_none_or(|(due, ..)| *due > until) {
                let unrest = self.world.unrest().unwrap_or_default();
                let text = format!("not at rest after {REST_MAX:?} without a fault: {unrest}");
                self.world.shared.ghost.violations.push(text);
                self.over = true;
                return;
            }
            self.fire(0);
        }
    }

    /// Something that may happen and leads to the same whether it happens now or after anything else: then
    /// it is enough to let it happen now.
    fn first_alone(&self) -> Option<&(Arc<str>, Item)> {
        let Budget { elections, shard_elections, crashes, losses: _, doubles, early } = self.budget;
        if self.every_order || self.down.is_some() {
            return None;
        }
        let settled = crashes == 0 && doubles == 0 && early == 0;
        let stays = |group: GroupId| match group {
            GroupId::Coordinator => elections == 0,
            GroupId::Shard(_) => shard_elections == 0,
        };
        // Where a server has died, a call may be broken and answered all the same, by the one that comes back.
        let breaks = |answered: &CallId| {
            let broken =
                |(_, item): &(_, Item)| matches!(item, Item::Broken { call, .. } if call == answered);
            self.has_died && self.pending.iter().any(broken)
        };
        self.pending.iter().find(|(_, item)| match item {
            Item::Broken { .. } if self.has_died => false,
            Item::Answer { call, .. } if breaks(call) => false,
            // A member that does not lead applies what the others have, and nobody sees it.
            Item::Learn { seat, .. } => self.world.follows(*seat),
            // A client that waits for one answer does nothing else.
            Item::Answer { call, .. } | Item::Broken { call, .. }
                if settled && self.world.awaits_only(*call) =>
            {
                true
            }
            // A coordinator that does not lead any more has nothing to do with what was answered.
            Item::Answer { call, answer, .. } if settled => self.world.is_late(*call, answer),
            // Who does not lead, and will not, says so.
            Item::Ask { to, group, .. } if settled && stays(*group) => self.world.declines(*to, *group),
            _ => false,
        })
    }

    /// What went wrong on the way here.
    pub fn violations(&self) -> &[String] {
        &self.world.shared.ghost.violations
    }

    /// What became of everything. How long it took depends on timers that had nothing to do any more.
    fn ending(&self) -> String {
        let counts: Vec<_> = self.world.clients.iter().map(|client| client.counts).collect();
        format!("{counts:?} {:?}", self.world.shared.ghost.timeless())
    }

    fn count(&self, count: fn(&crate::sim::client::Counts) -> u64) -> u64 {
        self.world.clients.iter().map(|client| count(&client.counts)).sum()
    }
}

impl Model for Explorer {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![self.first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        if state.over || !state.violations().is_empty() {
            return;
        }
        if let Some((name, item)) = state.first_alone() {
            actions.push(Step::Happens(name.clone()));
            if state.budget.losses > 0 && matches!(item, Item::Ask { .. } | Item::Answer { .. }) {
                actions.push(Step::IsLost(name.clone()));
            }
            return;
        }
        let mut last = None;
        for (name, item) in &state.pending {
            // Two of the same are one.
            if last.replace(name) == Some(name) {
                continue;
            }
            actions.push(Step::Happens(name.clone()));
            if let Item::Ask { call, .. } | Item::Answer { call, .. } = item {
                let calls = &state.world.shared.calls;
                if state.budget.losses > 0 {
                    actions.push(Step::IsLost(name.clone()));
                }
                if state.budget.doubles > 0 && calls.get(call).is_some_and(|call| call.may_come_twice()) {
                    actions.push(Step::ComesTwice(name.clone()));
                }
            }
        }
        if state.budget.early > 0 && !state.pending.is_empty() {
            let waits = |item: &Item| !matches!(item, Item::Wake { .. });
            for (_, name, _) in state.timers.iter().filter(|(_, _, item)| waits(item)) {
                actions.push(Step::ComesEarly(name.clone()));
            }
        }
        let mut leaderless = false;
        for (group, now) in &state.world.shared.groups {
            let budget = match group {
                GroupId::Coordinator => state.budget.elections,
                GroupId::Shard(_) => state.budget.shard_elections,
            };
            let led = state.world.is_led(*group);
            leaderless |= !led;
            if led && budget == 0 {
                continue;
            }
            for to in state.world.servers().filter(|to| now.members.contains(to)) {
                if now.leader != Some(to) && state.world.has_majority(*group, to) {
                    actions.extend((0..=now.flying()).map(|survive| Step::Elect(*group, to, survive)));
                }
            }
        }
        match state.down {
            // In between it would only make the same messages fail one by one.
            Some(at) if state.just_died || state.pending.is_empty() => actions.push(Step::Restart(at)),
            Some(_) => {}
            None if state.budget.crashes > 0 => {
                for flushed in [false, true] {
                    actions.extend(state.world.servers().map(|at| Step::Crash(at, flushed)));
                }
            }
            None => {}
        }
        if state.pending.is_empty() && state.down.is_none() && !leaderless {
            actions.push(Step::TimePasses);
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        state.just_died = matches!(step, Step::Crash(..));
        match step {
            Step::Happens(name) => {
                let item = state.take(&name)?;
                state.happen(item);
            }
            Step::IsLost(name) => {
                state.budget.losses -= 1;
                let item = state.take(&name)?;
                if let Item::Ask { call, attempt, .. } | Item::Answer { call, attempt, .. } = item {
                    state.add(Item::Broken { call, attempt, unsent: false });
                }
            }
            Step::ComesTwice(name) => {
                state.budget.doubles -= 1;
                let item = state.take(&name)?;
                state.add(item.copied());
                state.happen(item);
            }
            Step::ComesEarly(name) => {
                state.budget.early -= 1;
                let at = state.timers.iter().position(|(_, other, _)| *other == name)?;
                state.fire(at);
            }
            Step::Elect(group, to, survive) => {
                if state.world.is_led(group) {
                    match group {
                        GroupId::Coordinator => state.budget.elections -= 1,
                        GroupId::Shard(_) => state.budget.shard_elections -= 1,
                    }
                }
                state.happen(Item::Fault(Fault::Elect { group, to, survive }));
            }
            Step::Crash(at, flushed) => {
                state.budget.crashes -= 1;
                state.down = Some(at);
                state.has_died = true;
                if flushed {
                    state.happen(Item::Fault(Fault::Flush(at)));
                }
                state.happen(Item::Fault(Fault::Crash(at)));
            }
            Step::Restart(at) => {
                state.down = None;
                state.happen(Item::Fault(Fault::Restart(at)));
            }
            Step::TimePasses => state.pass_time(),
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Explorer>> {
        let mut properties = vec![
            Property::always(BROKEN, |_, state: &State| state.violations().is_empty()),
            Property::sometimes("everything commits", |explorer: &Explorer, state: &State| {
                let txns: usize = explorer.case.clients.iter().map(Vec::len).sum();
                state.over && state.count(|counts| counts.ok) == txns as u64
            }),
        ];
        if self.case.aborts {
            properties.push(Property::sometimes("something is aborted", |_, state: &State| {
                state.over && state.count(|counts| counts.failed) > 0
            }));
        }
        properties
    }
}
