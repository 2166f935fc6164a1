//! A whole cluster in one thread: the pure hearts of coordinators, participants and clients, as they serve
//! in production, over a modelled log, disk and network.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`group`], [`log`], [`store`] | the replicated log, how one replica sees it, and the disks, modelled |
//! | [`shared`], [`calls`] | what everybody in the world reaches: messages, calls, identities, the ghost |
//! | [`coordinator`], [`shard`], [`client`] | those who live in it: the production code and what carries it out |
//! | [`told`] | parts of the world, shared by worlds in which they are the same |
//! | [`world`] | all of it; whatever happens is an [`Item`] |
//! | [`ghost`] | sees everything, remembers it, and knows what must never happen |
//! | [`schedule`], [`faults`] | decide what happens next: by a seed, with delays, losses and crashes |
//! | [`run`] | one run from a seed to a report; failing ones are made smaller |
//!
//! Nothing here reads a clock or draws a number that does not come from the seed, so a seed is a run, bit
//! for bit. The world itself decides nothing: its items may be taken in any order by whoever schedules
//! them. The simulator takes them by time and chance, and the [model checker](crate::model) in every order.

pub mod calls;
pub mod client;
pub mod coordinator;
pub mod faults;
pub mod ghost;
pub mod group;
pub mod log;
pub mod run;
pub mod schedule;
pub mod shard;
pub mod shared;
pub mod store;
pub mod told;
pub mod world;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use troth_coordinator::leader as coordinator_leader;
use troth_protocol::message::{Request, Response};
use troth_protocol::{Epoch, GroupId, Reject};

use self::calls::CallId;
use self::coordinator::CoordinatorThen;
use self::group::ProposalId;

/// A process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Address {
    /// A coordinator.
    Coordinator(u8),
    /// A participant.
    Node(u8),
    /// An application.
    Client(u8),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Coordinator(id) => write!(f, "c{id}"),
            Address::Node(id) => write!(f, "n{id}"),
            Address::Client(id) => write!(f, "client{id}"),
        }
    }
}

/// A replica of a group, in one life of its process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Seat {
    /// Where.
    pub at: Address,
    /// Of which group.
    pub group: GroupId,
    /// Which life; what was meant for an earlier one reaches nobody.
    pub life: u64,
}

/// How soon something happens. How long that is decides who schedules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// Within a process.
    Local,
    /// A message between processes, in one direction.
    Network(Address, Address),
    /// A round of the log: a majority writes.
    Round,
    /// After this long.
    After(Duration),
    /// When somebody notices that he does not lead any more.
    Notice,
}

/// Something that can happen. Whatever happens in the world is one of these.
#[derive(Clone, Debug)]
pub enum Item {
    /// A request arrives.
    Ask {
        /// Who asks.
        from: Address,
        /// Who is asked.
        to: Address,
        /// Names the call.
        call: CallId,
        /// Which attempt of the call it is.
        attempt: u32,
        /// The group whose leader is asked.
        group: GroupId,
        /// What.
        request: Arc<Request>,
        /// When nobody waits for the answer any more.
        deadline: Duration,
    },
    /// An answer arrives.
    Answer {
        /// Who answers.
        from: Address,
        /// Who asked.
        to: Address,
        /// Names the call.
        call: CallId,
        /// Which attempt of the call it is.
        attempt: u32,
        /// What is answered.
        answer: Arc<Result<Response, Reject>>,
    },
    /// A connection breaks, or was never made.
    Broken {
        /// Whose call is lost.
        call: CallId,
        /// Which attempt of it.
        attempt: u32,
        /// The request was certainly not seen.
        unsent: bool,
    },
    /// An attempt has taken too long.
    AttemptOver {
        /// Names the call.
        call: CallId,
        /// Which attempt.
        attempt: u32,
    },
    /// A pause before the next attempt is over.
    NextAttempt {
        /// Names the call.
        call: CallId,
    },
    /// A majority has an entry of the leader's log.
    Replicated {
        /// The group.
        group: GroupId,
        /// The leader's term.
        term: u64,
        /// The entry.
        proposal: ProposalId,
    },
    /// A replica hears how far the log is committed.
    Learn {
        /// Which.
        seat: Seat,
        /// So far.
        upto: u64,
    },
    /// A replica applies its next entry.
    Apply {
        /// Which.
        seat: Seat,
    },
    /// A majority has answered whether a replica leads.
    Barrier {
        /// Which.
        seat: Seat,
        /// Names the barrier.
        barrier: u64,
    },
    /// A replica hears that it leads, or that it does not any more.
    Role {
        /// Which.
        seat: Seat,
        /// The term that it leads in, or that has ended its own.
        term: u64,
        /// Whether it leads.
        leads: bool,
    },
    /// Something is due at a replica.
    Wake {
        /// Which.
        seat: Seat,
    },
    /// A replica does the next thing that its leader wants done.
    Perform {
        /// Which.
        seat: Seat,
    },
    /// A coordinator does something a little later.
    Later {
        /// Which.
        seat: Seat,
        /// For which leader.
        epoch: Epoch,
        /// What.
        what: Box<Later>,
    },
    /// A coordinator takes a question up again.
    Resume {
        /// Which.
        seat: Seat,
        /// The question.
        then: Box<CoordinatorThen>,
    },
    /// Nobody waits any longer for the answer to a commit or a question.
    RequestOver {
        /// Which coordinator.
        seat: Seat,
        /// The request.
        id: u64,
    },
    /// A read looks at the disk.
    Look {
        /// Which replica.
        seat: Seat,
        /// Names the read.
        read: u64,
    },
    /// Nobody waits any longer for a read.
    ReadOver {
        /// Which replica.
        seat: Seat,
        /// Names the read.
        read: u64,
    },
    /// A new shard leader asks the time again.
    AskTime {
        /// Which replica.
        seat: Seat,
        /// The leadership.
        lead: u64,
    },
    /// A client begins its next transaction, or goes on.
    Go {
        /// Which.
        client: u8,
    },
    /// Something breaks, or is mended.
    Fault(faults::Fault),
}

impl Item {
    /// The same message once more. Who asked hears no answer to the second copy: the transport gives each
    /// request one answer, and a refusal of a copy says nothing about the other one.
    pub fn copied(&self) -> Item {
        let mut copy = self.clone();
        if let Item::Ask { attempt, .. } = &mut copy {
            *attempt = u32::MAX;
        }
        copy
    }
}

/// What a coordinator does a little later.
#[derive(Clone, Debug)]
pub enum Later {
    /// Tells the leader.
    Tell(coordinator_leader::Event),
    /// Tries again.
    Do(coordinator_leader::Effect),
}
