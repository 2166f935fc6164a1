//! Calls to the leader of a group, wherever it is: what the router of the SDK does, in the model's terms.
//!
//! It follows redirects, tries the members in turn, and sends a request again only if that is harmless.
//! The rules of what is harmless are those of production: [`Reject`], [`RouteError`] and [`Resend`].

use std::sync::Arc;
use std::time::Duration;

use troth_protocol::message::{Request, Response};
use troth_protocol::net::{CallError, Peer};
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{Epoch, GroupId, NodeId, Reject, ShardId, TxnId};

use super::shared::Shared;
use super::told::Told;
use super::{Address, Item, Pace, Seat};

/// Names a call, for ever.
pub type CallId = u64;

/// How long one attempt may take before another member is asked, if that is harmless.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause before another attempt.
const PAUSE: Duration = Duration::from_millis(20);

/// Who calls.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Owner {
    /// A replica.
    Seat(Seat),
    /// A client.
    Client(u8),
}

impl Owner {
    /// Where.
    pub fn address(self) -> Address {
        match self {
            Owner::Seat(seat) => seat.at,
            Owner::Client(client) => Address::Client(client),
        }
    }
}

/// Why somebody calls.
#[derive(Clone, PartialEq, Debug)]
pub enum Purpose {
    /// A coordinator wants a vote.
    Vote(Epoch, TxnId, ShardId),
    /// A coordinator lets a shard commit, or asks it how that ended.
    OnePhase(Epoch, TxnId, ShardId),
    /// A coordinator asks a shard how a transaction ended, and again until it knows.
    AskShard(Epoch, TxnId, ShardId),
    /// A coordinator tells a shard what was decided.
    Finish(Epoch, ShardId, Vec<(TxnId, troth_protocol::message::shard::Decision)>),
    /// A coordinator asks a shard what is prepared there.
    Collect(Epoch, ShardId, Option<TxnId>),
    /// A shard asks what became of transactions.
    Resolve(Vec<TxnId>),
    /// A new shard leader asks the time.
    FreshTime(u64),
    /// A client begins.
    Begin,
    /// A client reads keys or a range of a shard.
    Read(ShardId),
    /// A client commits.
    Commit,
    /// A client asks how a transaction ended.
    Outcome,
}

/// A call under way.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who calls.
    pub owner: Owner,
    /// Why.
    pub purpose: Purpose,
    group: GroupId,
    request: Arc<Request>,
    resend: Resend,
    deadline: Duration,
    attempt: u32,
    /// Who is asked.
    pub to: Address,
    turn: usize,
    redirected: bool,
}

impl Call {
    /// Whether its request may arrive twice: routers send some again, and the transport carries each once. A
    /// first submission of a commit arrives once or never; that is what lets a refusal of it be final.
    pub fn may_come_twice(&self) -> bool {
        self.resend == Resend::Idempotent
    }

    /// Which attempt is under way.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}

/// A call that is over: who called, why, and what came of it.
pub type Ended = (Owner, Purpose, Result<Response, RouteError>);

fn peer(address: Address) -> Peer {
    match address {
        Address::Coordinator(_) => Peer::coordinator(&address.to_string()),
        Address::Node(_) | Address::Client(_) => Peer::participant(&address.to_string()),
    }
}

/// The number of a server among those of its kind, as redirects name it.
pub fn node_id(address: Address) -> NodeId {
    match address {
        Address::Coordinator(id) | Address::Node(id) | Address::Client(id) => NodeId(id.into()),
    }
}

impl Shared {
    /// Calls the leader of a group.
    pub fn call(
        &mut self,
        owner: Owner,
        group: GroupId,
        request: Request,
        resend: Resend,
        deadline: Duration,
        purpose: Purpose,
    ) {
        let id = self.fresh(owner.address(), &purpose);
        let turn = id as usize;
        let call = Call {
            owner,
            purpose,
            group,
            request: Arc::new(request),
            resend,
            deadline,
            attempt: 0,
            to: owner.address(),
            turn,
            redirected: false,
        };
        self.calls.insert(id, Told::new(call));
        self.attempt(id);
    }

    /// Makes the next attempt of a call.
    pub fn attempt(&mut self, id: CallId) {
        let now = self.time;
        let Some(call) = self.calls.get_mut(&id) else { return };
        let hint = self.leaders.get(&(call.owner.address(), call.group));
        let members = match call.group {
            GroupId::Coordinator => &self.coordinators,
            GroupId::Shard(_) => &self.nodes,
        };
        call.to = match hint {
            Some(leader) => *leader,
            None => {
                call.turn += 1;
                members[call.turn % members.len()]
            }
        };
        call.attempt += 1;
        let (from, to, attempt) = (call.owner.address(), call.to, call.attempt);
        let deadline = match call.resend {
            Resend::Idempotent => call.deadline.min(now + ATTEMPT_TIMEOUT),
            Resend::OnlyUnsent => call.deadline,
        };
        let ask = Item::Ask {
            from,
            to,
            call: id,
            attempt,
            group: call.group,
            request: call.request.clone(),
            deadline,
        };
        self.emit(Pace::Network(from, to), ask);
        self.emit(Pace::After(deadline.saturating_sub(now)), Item::AttemptOver { call: id, attempt });
    }

    /// Whether nobody waits for an attempt any more, and nobody will.
    pub fn is_attempt_past(&self, id: CallId, attempt: u32) -> bool {
        self.calls.get(&id).is_none_or(|call| call.attempt > attempt || attempt == u32::MAX)
    }

    /// An answer has arrived.
    pub fn answered(&mut self, id: CallId, attempt: u32, answer: &Result<Response, Reject>) -> Option<Ended> {
        let call = self.calls.get(&id).filter(|call| call.attempt == attempt)?;
        match answer {
            Ok(response) => {
                let (address, group, to) = (call.owner.address(), call.group, call.to);
                self.leaders.entry((address, group)).or_insert(to);
                self.end(id, Ok(response.clone()))
            }
            Err(reject) => self.failed(id, RouteError::Rejected(reject.clone())),
        }
    }

    /// The connection of an attempt has broken.
    pub fn broken(&mut self, id: CallId, attempt: u32, unsent: bool) -> Option<Ended> {
        let call = self.calls.get(&id).filter(|call| call.attempt == attempt)?;
        let (peer, reason) = (peer(call.to), "simulated".to_owned());
        let error =
            if unsent { CallError::Unreachable { peer, reason } } else { CallError::Lost { peer, reason } };
        self.failed(id, RouteError::Call(error))
    }

    /// An attempt has taken too long.
    pub fn attempt_over(&mut self, id: CallId, attempt: u32) -> Option<Ended> {
        let call = self.calls.get(&id).filter(|call| call.attempt == attempt)?;
        let error = CallError::DeadlineExceeded { peer: peer(call.to) };
        self.failed(id, RouteError::Call(error))
    }

    fn failed(&mut self, id: CallId, error: RouteError) -> Option<Ended> {
        let call = self.calls.get_mut(&id)?;
        if !error.is_worth_another() || error.ends(call.resend) {
            return self.end(id, Err(error));
        }
        let overloaded = matches!(error, RouteError::Rejected(Reject::Overloaded { .. }));
        let (key, to) = ((call.owner.address(), call.group), call.to);
        // An answer to this attempt comes too late from now on.
        call.attempt += 1;
        let hint = match &error {
            RouteError::Rejected(Reject::NotLeader { leader: Some(node) }) => {
                self.coordinators.iter().chain(&self.nodes).copied().find(|address| {
                    let same = matches!(
                        (address, to),
                        (Address::Coordinator(_), Address::Coordinator(_))
                            | (Address::Node(_), Address::Node(_))
                    );
                    same && node_id(*address) == *node && *address != to
                })
            }
            _ => None,
        };
        let redirect = hint.is_some() && !call.redirected;
        call.redirected = redirect;
        match hint {
            Some(leader) => drop(self.leaders.insert(key, leader)),
            None if overloaded => {}
            None => {
                if self.leaders.get(&key) == Some(&to) {
                    self.leaders.remove(&key);
                }
            }
        }
        if redirect {
            self.attempt(id);
            return None;
        }
        if self.time + PAUSE >= self.calls[&id].deadline {
            return self.end(id, Err(error));
        }
        self.emit(Pace::After(PAUSE), Item::NextAttempt { call: id });
        None
    }

    fn end(&mut self, id: CallId, result: Result<Response, RouteError>) -> Option<Ended> {
        let call = self.calls.remove(&id)?;
        Some((call.owner, call.purpose.clone(), result))
    }
}
