//! What everybody in the world reaches.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use troth_coordinator::leader::{Limits, Now};
use troth_protocol::message::Response;
use troth_protocol::{GroupId, Reject};
use xxhash_rust::xxh3::xxh3_64;

use super::calls::{Call, CallId};
use super::ghost::Ghost;
use super::group::{Command, Entry, Group, ProposalId};
use super::told::Told;
use super::{Address, Item, Pace, Seat};

/// The wall clock at the beginning of a run, in milliseconds.
pub const WALL_START: u64 = 1_000_000;

/// Who waits for an answer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Asker {
    /// Where.
    pub at: Address,
    /// Names the call.
    pub call: CallId,
    /// Which attempt of it.
    pub attempt: u32,
}

/// What everybody reaches.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Since the beginning of the run.
    pub time: Duration,
    /// The beginning, for clocks that must not be read.
    base: Instant,
    /// How many shards there are.
    pub shards: u16,
    /// What bounds the coordinators' leader.
    pub limits: Limits,
    /// The coordinators.
    pub coordinators: Vec<Address>,
    /// The participants.
    pub nodes: Vec<Address>,
    /// The logs.
    pub groups: BTreeMap<GroupId, Told<Group>>,
    /// Calls under way.
    pub calls: BTreeMap<CallId, Told<Call>>,
    /// Whom each process takes for the leader of a group.
    pub leaders: BTreeMap<(Address, GroupId), Address>,
    /// Sees everything.
    pub ghost: Told<Ghost>,
    /// What is to happen, for whoever schedules.
    pub out: Vec<(Pace, Item)>,
    next: BTreeMap<u64, u64>,
    /// Everything is explored: names and clocks must not make states differ that are the same.
    pub explored: bool,
}

impl Shared {
    /// A world in which nothing has happened.
    pub fn new(shards: u16, limits: Limits, coordinators: Vec<Address>, nodes: Vec<Address>) -> Shared {
        Shared {
            time: Duration::ZERO,
            base: Instant::now(),
            shards,
            limits,
            coordinators,
            nodes,
            groups: BTreeMap::new(),
            calls: BTreeMap::new(),
            leaders: BTreeMap::new(),
            ghost: Told::new(Ghost::default()),
            out: Vec::new(),
            next: BTreeMap::new(),
            explored: false,
        }
    }

    /// Tells all that may still matter: what is fixed does not, nor how many names were given.
    pub fn tell(&self, out: &mut impl fmt::Write) -> fmt::Result {
        let Shared { time, groups, calls, leaders, ghost, .. } = self;
        write!(out, "{time:?} {groups:?} {calls:?} {leaders:?} {ghost:?}")
    }

    /// A number that nothing else has, for something that a process does. If everything is explored, it
    /// follows from what that is, so that it has the same name in whatever order things were done.
    pub fn fresh(&mut self, at: Address, what: &dyn fmt::Debug) -> u64 {
        let name = match self.explored {
            false => 0,
            true => xxh3_64(format!("{at} {what:?}").as_bytes()) & !0xffff,
        };
        let next = self.next.entry(name).or_default();
        *next += 1;
        name + *next
    }

    /// Lets something happen.
    pub fn emit(&mut self, pace: Pace, item: Item) {
        self.out.push((pace, item));
    }

    /// A moment of this run, for code that wants an [`Instant`].
    pub fn instant(&self, time: Duration) -> Instant {
        self.base + time
    }

    /// The moment since the beginning.
    pub fn since(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.base)
    }

    /// The moment by both clocks, for a process whose wall clock is off by so much.
    pub fn now(&self, offset_millis: i64) -> Now {
        let passed = if self.explored { 0 } else { self.time.as_millis() as u64 };
        let millis = (WALL_START + passed).saturating_add_signed(offset_millis);
        Now { instant: self.instant(self.time), millis }
    }

    /// The log of a group.
    pub fn group(&mut self, group: GroupId) -> &mut Group {
        self.groups.get_mut(&group).expect("groups are for ever")
    }

    /// Answers somebody.
    pub fn answer(&mut self, from: Address, asker: Asker, answer: Result<Response, Reject>) {
        let answer = Item::Answer {
            from,
            to: asker.at,
            call: asker.call,
            attempt: asker.attempt,
            answer: Arc::new(answer),
        };
        self.emit(Pace::Network(from, asker.at), answer);
    }

    /// Proposes a command, for a replica that believes to lead in a term.
    pub fn propose(&mut self, seat: Seat, term: u64, command: Command) -> ProposalId {
        let proposal = self.fresh(seat.at, &command);
        let entry = Entry { proposal, command: Arc::new(command) };
        if self.group(seat.group).propose(seat.at, term, entry) {
            self.emit(Pace::Round, Item::Replicated { group: seat.group, term, proposal });
        }
        proposal
    }

    /// Begins to ask a majority whether a replica still leads.
    pub fn barrier(&mut self, seat: Seat, what: &dyn fmt::Debug) -> u64 {
        let barrier = self.fresh(seat.at, what);
        self.emit(Pace::Round, Item::Barrier { seat, barrier });
        barrier
    }
}
