//! What makes no difference any more, now or later: for those who explore everything, and need not look at
//! that.

use std::time::Duration;

use troth_protocol::message::{Response, shard};
use troth_protocol::{GroupId, Reject};

use super::{Replica, World};
use crate::sim::calls::{Call, CallId, Owner};
use crate::sim::told::Told;
use crate::sim::{Address, Item, Seat};

impl World {
    /// Whether an item that waits can do nothing any more, now or later: what is due at a time, for timers.
    pub fn is_moot(&self, item: &Item, due: Option<Duration>) -> bool {
        let shared = &self.shared;
        let gone = |seat: &Seat| self.replica(*seat).is_none();
        match item {
            Item::Answer { call, attempt, .. }
            | Item::Broken { call, attempt, .. }
            | Item::AttemptOver { call, attempt } => shared.is_attempt_past(*call, *attempt),
            Item::NextAttempt { call } => !shared.calls.contains_key(call),
            Item::Replicated { group, term, proposal } => {
                let group = &shared.groups[group];
                group.leader.is_none() || !group.is_flying(*term, *proposal)
            }
            Item::Learn { seat, upto } => {
                let upto = shared.groups[&seat.group].committed().max(*upto);
                self.replica(*seat).is_none_or(|replica| match replica {
                    Replica::Coordinator(replica) => replica.log().knows(upto),
                    Replica::Shard(replica) => replica.log().knows(upto),
                })
            }
            Item::Barrier { seat, barrier } => self.replica(*seat).is_none_or(|replica| match replica {
                Replica::Coordinator(replica) => !replica.log().awaits(*barrier),
                Replica::Shard(replica) => !replica.log().awaits(*barrier),
            }),
            Item::Role { seat, term, .. } => self.replica(*seat).is_none_or(|replica| match replica {
                Replica::Coordinator(replica) => replica.log().has_heard(*term),
                Replica::Shard(replica) => replica.log().has_heard(*term),
            }),
            Item::Wake { seat } => self.replica(*seat).is_none_or(|replica| {
                let wanted = match replica {
                    Replica::Coordinator(replica) => replica.wake_at(),
                    Replica::Shard(replica) => replica.wake_at(),
                };
                // If it wants to be woken earlier, another item does that.
                wanted.is_none_or(|at| due.is_some_and(|due| shared.instant(due) < at))
            }),
            Item::Later { seat, epoch, .. } => match self.replica(*seat) {
                Some(Replica::Coordinator(replica)) => !replica.leads_in(*epoch),
                _ => true,
            },
            Item::RequestOver { seat, id } => match self.replica(*seat) {
                Some(Replica::Coordinator(replica)) => !replica.awaits(*id),
                _ => true,
            },
            Item::ReadOver { seat, read } => match self.replica(*seat) {
                Some(Replica::Shard(replica)) => !replica.awaits(*read),
                _ => true,
            },
            Item::Apply { seat }
            | Item::Perform { seat }
            | Item::Resume { seat, .. }
            | Item::Look { seat, .. }
            | Item::AskTime { seat, .. } => gone(seat),
            Item::Ask { .. } | Item::Go { .. } | Item::Fault(_) => false,
        }
    }

    /// Whether a replica does not lead, and knows that.
    pub fn follows(&self, seat: Seat) -> bool {
        let believes = self.replica(seat).is_some_and(|replica| match replica {
            Replica::Coordinator(replica) => replica.log().believes_to_lead(),
            Replica::Shard(replica) => replica.log().believes_to_lead(),
        });
        !believes && self.shared.groups[&seat.group].leader != Some(seat.at)
    }

    /// Whether a server answers a request to the leader of a group with the name of another one.
    pub fn declines(&self, at: Address, group: GroupId) -> bool {
        self.is_up(at) && self.is_led(group) && self.follows(self.seat(at, group))
    }

    /// Whether an answer comes to a coordinator that was deposed, and changes nothing there: it has heard of
    /// it, or what it asked for is done.
    pub fn is_late(&self, call: CallId, answer: &Result<Response, Reject>) -> bool {
        let call = self.shared.calls.get(&call).map(|call| call.owner);
        let Some(Owner::Seat(seat)) = call else { return false };
        let Some(Replica::Coordinator(replica)) = self.replica(seat) else { return false };
        let done = *answer == Ok(Response::Shard(shard::Response::Finished));
        self.shared.groups[&seat.group].leader != Some(seat.at)
            && answer.is_ok()
            && (done || !replica.log().believes_to_lead())
    }

    /// Whether a call is all that its owner, a client, waits for.
    pub fn awaits_only(&self, call: CallId) -> bool {
        let owner = self.shared.calls.get(&call).map(|call| call.owner);
        let same = |other: &&Told<Call>| Some(other.owner) == owner;
        matches!(owner, Some(Owner::Client(_))) && self.shared.calls.values().filter(same).count() == 1
    }
}
