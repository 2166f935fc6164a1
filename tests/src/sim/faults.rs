//! What can break.

use std::fmt;

use troth_protocol::{GroupId, ShardId, Timestamp};

use super::Address;

/// Something breaks, or is mended.
#[derive(Clone, PartialEq, Debug)]
pub enum Fault {
    /// A process dies, and all that it has not flushed.
    Crash(Address),
    /// It is started again.
    Restart(Address),
    /// What one says does not reach the other.
    Cut(Address, Address),
    /// Everything reaches everybody again.
    Mend,
    /// Another replica is elected; of what was on its way, the first so many were in its log.
    Elect {
        /// The group.
        group: GroupId,
        /// Who leads then.
        to: Address,
        /// How many entries survive.
        survive: usize,
    },
    /// A wall clock is off by this from now on.
    Jump(Address, i64),
    /// A replica of a shard moves.
    Move {
        /// The shard.
        shard: ShardId,
        /// Whose replica is given up.
        from: Address,
        /// Who gets one.
        to: Address,
    },
    /// A node forgets a replica that has moved away.
    Forget(ShardId, Address),
    /// What a process has written becomes durable.
    Flush(Address),
    /// A shard gives up old versions and outcomes.
    Retire {
        /// The shard.
        shard: ShardId,
        /// No snapshot before this is read any more.
        safe_point: Timestamp,
        /// No outcome of a transaction that began before this is kept.
        outcomes_before: Timestamp,
    },
}

/// A kind of fault that can be left out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// Processes die and come back.
    Crash,
    /// Leaders are deposed while they live.
    Elect,
    /// Messages do not pass between some processes.
    Cut,
    /// Processes stand still for a while.
    Pause,
    /// Wall clocks jump.
    Jump,
    /// Shards move.
    Move,
    /// Old versions are given up.
    Retire,
    /// Messages are lost.
    Loss,
    /// Messages come twice.
    Double,
    /// Messages, disks and processes are slow now and then.
    Slow,
    /// Clients leave without waiting for the answer.
    Leave,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 11] = [
        Kind::Crash,
        Kind::Elect,
        Kind::Cut,
        Kind::Pause,
        Kind::Jump,
        Kind::Move,
        Kind::Retire,
        Kind::Loss,
        Kind::Double,
        Kind::Slow,
        Kind::Leave,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Crash => "crash",
            Kind::Elect => "elect",
            Kind::Cut => "cut",
            Kind::Pause => "pause",
            Kind::Jump => "jump",
            Kind::Move => "move",
            Kind::Retire => "retire",
            Kind::Loss => "loss",
            Kind::Double => "double",
            Kind::Slow => "slow",
            Kind::Leave => "leave",
        }
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
