//! All of it: servers, clients, and what happens to them, one item at a time.

mod moot;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use troth_coordinator::command::{Command, Founding, Settings};
use troth_coordinator::leader::Limits;
use troth_protocol::message::Request;
use troth_protocol::{ClusterId, GroupId, NodeId, Reject, ShardId};

use super::calls::{Ended, Owner};
use super::client::Client;
use super::coordinator::Coordinator;
use super::faults::Fault;
use super::shard::Shard;
use super::shared::{Asker, Shared};
use super::store::{CoordinatorDisk, ShardDisk};
use super::told::Told;
use super::{Address, Item, Pace, Seat};

/// How long a member that hears nothing waits before it asks again.
const HEARTBEAT: Duration = Duration::from_millis(100);

/// What a cluster of the model is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Coordinators.
    pub coordinators: u8,
    /// Participants.
    pub nodes: u8,
    /// Replicas of a shard.
    pub replicas: u8,
    /// Shards.
    pub shards: u16,
}

#[derive(Clone, Debug)]
enum Replica {
    Coordinator(Box<Coordinator>),
    Shard(Box<Shard>),
}

#[derive(Clone, Debug)]
struct Server {
    up: bool,
    life: u64,
    offset_millis: i64,
    replicas: BTreeMap<GroupId, Told<Replica>>,
}

impl Server {
    fn new(replicas: BTreeMap<GroupId, Told<Replica>>) -> Told<Server> {
        Told::new(Server { up: true, life: 1, offset_millis: 0, replicas })
    }
}

/// A cluster and its clients.
#[derive(Clone, Debug)]
pub struct World {
    /// What everybody reaches.
    pub shared: Shared,
    servers: BTreeMap<Address, Told<Server>>,
    /// The applications.
    pub clients: Vec<Told<Client>>,
    /// Who is not heard by whom.
    cuts: BTreeSet<(Address, Address)>,
    settings: Settings,
}

impl World {
    /// A cluster whose shards are placed, without leaders yet.
    pub fn new(shape: Shape, limits: Limits, clients: Vec<Client>) -> World {
        let coordinators: Vec<Address> = (1..=shape.coordinators).map(Address::Coordinator).collect();
        let nodes: Vec<Address> = (1..=shape.nodes).map(Address::Node).collect();
        let settings = Settings {
            cluster: ClusterId([1; 16]),
            shards: shape.shards,
            replicas: shape.replicas.into(),
            nodes: shape.nodes.into(),
        };
        let mut shared = Shared::new(shape.shards, limits, coordinators.clone(), nodes.clone());
        shared.groups.insert(GroupId::Coordinator, Told::new(super::group::Group::new(coordinators.clone())));
        let mut servers = BTreeMap::new();
        let disk = Told::new(first_disk(shape, settings));
        for at in coordinators {
            let seat = Seat { at, group: GroupId::Coordinator, life: 1 };
            let replica = Coordinator::start(seat, settings, (0, disk.clone()));
            let replicas = BTreeMap::from([(seat.group, Told::new(Replica::Coordinator(Box::new(replica))))]);
            servers.insert(at, Server::new(replicas));
        }
        for at in nodes.iter().copied() {
            servers.insert(at, Server::new(BTreeMap::new()));
        }
        for number in 0..shape.shards {
            let (shard, group) = (ShardId(number), GroupId::Shard(ShardId(number)));
            let member = |turn: u16| nodes[usize::from(number + turn) % nodes.len()];
            let members: Vec<Address> = (0..shape.replicas.into()).map(member).collect();
            for at in members.iter().copied() {
                let disk = Told::new(ShardDisk::default());
                let replica = Shard::start(Seat { at, group, life: 1 }, shard, (0, disk));
                let server = servers.get_mut(&at).expect("a node");
                server.replicas.insert(group, Told::new(Replica::Shard(Box::new(replica))));
            }
            shared.groups.insert(group, Told::new(super::group::Group::new(members)));
        }
        let clients = clients.into_iter().map(Told::new).collect();
        World { shared, servers, clients, cuts: BTreeSet::new(), settings }
    }

    // --- looking --------------------------------------------------------------------------------

    /// All servers.
    pub fn servers(&self) -> impl Iterator<Item = Address> {
        self.servers.keys().copied()
    }

    /// Tells all that there is, so that equal worlds tell the same.
    pub fn tell(&self, out: &mut impl fmt::Write) -> fmt::Result {
        let World { shared, servers, clients, cuts, settings: _ } = self;
        shared.tell(out)?;
        write!(out, "{servers:?} {clients:?} {cuts:?}")
    }

    /// Whether a process runs.
    pub fn is_up(&self, at: Address) -> bool {
        self.servers.get(&at).is_none_or(|server| server.up)
    }

    fn hears(&self, from: Address, to: Address) -> bool {
        !self.cuts.contains(&(from, to))
    }

    fn talk(&self, one: Address, other: Address) -> bool {
        self.hears(one, other) && self.hears(other, one)
    }

    /// Whether a majority of a group hears a member and is heard by it.
    pub fn has_majority(&self, group: GroupId, at: Address) -> bool {
        let members = &self.shared.groups[&group].members;
        let with = members.iter().filter(|other| self.is_up(**other) && self.talk(at, **other));
        self.is_up(at) && members.contains(&at) && with.count() * 2 > members.len()
    }

    /// Whether a group has a leader that can do something.
    pub fn is_led(&self, group: GroupId) -> bool {
        self.shared.groups[&group].leader.is_some_and(|leader| self.has_majority(group, leader))
    }

    /// Nodes that have a replica of a shard and are no member of its group.
    pub fn strays(&self, shard: ShardId) -> Vec<Address> {
        let group = GroupId::Shard(shard);
        let members = &self.shared.groups[&group].members;
        let holds = |(_, server): &(&Address, &Told<Server>)| server.replicas.contains_key(&group);
        let all = self.servers.iter().filter(holds).map(|(at, _)| *at);
        all.filter(|at| !members.contains(at)).collect()
    }

    /// How many shards have a leader that serves.
    pub fn shards_served(&self) -> usize {
        let replicas = self.servers.values().flat_map(|server| server.replicas.values());
        let serves = |replica: &Told<Replica>| match &**replica {
            Replica::Shard(shard) => shard.leader().is_some(),
            Replica::Coordinator(_) => false,
        };
        replicas.filter(|replica| serves(replica)).count()
    }

    /// A replica, if its process is still in the same life.
    fn replica(&self, seat: Seat) -> Option<&Replica> {
        let server = self.servers.get(&seat.at).filter(|server| server.up && server.life == seat.life)?;
        server.replicas.get(&seat.group).map(|replica| &**replica)
    }

    fn seat(&self, at: Address, group: GroupId) -> Seat {
        Seat { at, group, life: self.servers[&at].life }
    }

    /// What is not at rest, if anything: for the time after all faults.
    pub fn unrest(&self) -> Option<String> {
        if let Some(client) = self.clients.iter().position(|client| !client.is_done()) {
            return Some(format!("client {client} is not done: {:?}", *self.clients[client]));
        }
        self.are_servers_at_rest()
    }

    /// What is not at rest among the servers, if anything.
    pub fn are_servers_at_rest(&self) -> Option<String> {
        for (at, server) in &self.servers {
            for (group, replica) in &server.replicas {
                let (settled, applied) = match &**replica {
                    Replica::Coordinator(replica) => (replica.is_settled(), replica.applied()),
                    Replica::Shard(replica) => (replica.is_settled(), replica.applied()),
                };
                let group_now = &self.shared.groups[group];
                let stray = !group_now.members.contains(at);
                if !stray && (!settled || applied < group_now.committed()) {
                    let committed = group_now.committed();
                    return Some(format!("{at} is not at rest in {group}: {applied} of {committed} applied"));
                }
            }
        }
        None
    }

    // --- happening ------------------------------------------------------------------------------

    /// Lets an item happen.
    pub fn happen(&mut self, item: Item) {
        match item {
            Item::Ask { from, to, call, attempt, group, request, deadline } => {
                if !self.hears(from, to) {
                    return;
                }
                let asker = Asker { at: from, call, attempt };
                self.ask(to, group, asker, &request, deadline);
            }
            Item::Answer { from, to, call, attempt, answer } => {
                if self.hears(from, to) {
                    let ended = self.shared.answered(call, attempt, &answer);
                    self.ended(ended);
                }
            }
            Item::Broken { call, attempt, unsent } => {
                let ended = self.shared.broken(call, attempt, unsent);
                self.ended(ended);
            }
            Item::AttemptOver { call, attempt } => {
                let ended = self.shared.attempt_over(call, attempt);
                self.ended(ended);
            }
            Item::NextAttempt { call } => self.shared.attempt(call),
            Item::Replicated { group, term, proposal } => {
                let leader = self.shared.groups[&group].leader;
                let led = leader.filter(|leader| self.has_majority(group, *leader));
                if let Some(leader) = led {
                    if self.shared.group(group).replicated(term, proposal) {
                        self.spread(group, leader);
                    }
                } else if leader.is_some() {
                    self.shared.emit(Pace::After(HEARTBEAT), Item::Replicated { group, term, proposal });
                }
                // Without a leader its fate is open until the next election.
            }
            Item::Learn { seat, upto } => {
                let group = &self.shared.groups[&seat.group];
                let hears = group.leader.is_none_or(|leader| self.hears(leader, seat.at));
                let upto = upto.max(group.committed());
                if !hears {
                    return self.shared.emit(Pace::After(HEARTBEAT), Item::Learn { seat, upto });
                }
                self.with(seat, |replica, shared| match replica {
                    Replica::Coordinator(replica) => replica.learn(shared, upto),
                    Replica::Shard(replica) => replica.learn(shared, upto),
                });
            }
            Item::Apply { seat } => self.with(seat, |replica, shared| match replica {
                Replica::Coordinator(replica) => replica.apply(shared),
                Replica::Shard(replica) => replica.apply(shared),
            }),
            Item::Barrier { seat, barrier } => {
                let leads = self.has_majority(seat.group, seat.at);
                self.with(seat, |replica, shared| match replica {
                    Replica::Coordinator(replica) => replica.barrier(shared, barrier, leads),
                    Replica::Shard(replica) => replica.barrier(shared, barrier, leads),
                });
            }
            Item::Role { seat, term, leads } => self.with(seat, |replica, shared| match replica {
                Replica::Coordinator(replica) => replica.role(shared, term, leads),
                Replica::Shard(replica) => replica.role(shared, term, leads),
            }),
            Item::Wake { seat } => self.with(seat, |replica, shared| match replica {
                Replica::Coordinator(replica) => replica.wake(shared),
                Replica::Shard(replica) => replica.wake(shared),
            }),
            Item::Perform { seat } => self.with(seat, |replica, shared| match replica {
                Replica::Coordinator(replica) => replica.perform_next(shared),
                Replica::Shard(replica) => replica.perform_next(shared),
            }),
            Item::Later { seat, epoch, what } => {
                self.with_coordinator(seat, |replica, shared| replica.later(shared, epoch, *what));
            }
            Item::Resume { seat, then } => {
                self.with_coordinator(seat, |replica, shared| replica.resume(shared, *then));
            }
            Item::RequestOver { seat, id } => {
                self.with_coordinator(seat, |replica, shared| replica.request_over(shared, id));
            }
            Item::Look { seat, read } => self.with_shard(seat, |replica, shared| replica.look(shared, read)),
            Item::ReadOver { seat, read } => {
                self.with_shard(seat, |replica, shared| replica.read_over(shared, read));
            }
            Item::AskTime { seat, lead } => {
                self.with_shard(seat, |replica, shared| replica.ask_time(shared, lead));
            }
            Item::Go { client } => self.clients[usize::from(client)].go(&mut self.shared),
            Item::Fault(fault) => self.fault(fault),
        }
    }

    fn with(&mut self, seat: Seat, act: impl FnOnce(&mut Replica, &mut Shared)) {
        let Some(server) = self.servers.get_mut(&seat.at) else { return };
        if server.up
            && server.life == seat.life
            && let Some(replica) = server.replicas.get_mut(&seat.group)
        {
            act(replica, &mut self.shared);
        }
    }

    fn with_coordinator(&mut self, seat: Seat, act: impl FnOnce(&mut Coordinator, &mut Shared)) {
        self.with(seat, |replica, shared| match replica {
            Replica::Coordinator(replica) => act(replica, shared),
            Replica::Shard(_) => unreachable!("this is for coordinators"),
        });
    }

    fn with_shard(&mut self, seat: Seat, act: impl FnOnce(&mut Shard, &mut Shared)) {
        self.with(seat, |replica, shared| match replica {
            Replica::Shard(replica) => act(replica, shared),
            Replica::Coordinator(_) => unreachable!("this is for shards"),
        });
    }

    fn ask(&mut self, to: Address, group: GroupId, asker: Asker, request: &Request, deadline: Duration) {
        let shared = &mut self.shared;
        let Some(server) = self.servers.get_mut(&to).filter(|server| server.up) else {
            let broken = Item::Broken { call: asker.call, attempt: asker.attempt, unsent: true };
            return shared.emit(Pace::Network(to, asker.at), broken);
        };
        match (server.replicas.get_mut(&group).map(|replica| &mut **replica), request) {
            (Some(Replica::Coordinator(replica)), Request::Coordinator(request)) => {
                replica.asked(shared, asker, request, deadline);
            }
            (Some(Replica::Shard(replica)), Request::Shard { request, .. }) => {
                replica.asked(shared, asker, request, deadline);
            }
            _ => shared.answer(to, asker, Err(Reject::StaleMap { epoch: Default::default() })),
        }
    }

    fn ended(&mut self, ended: Option<Ended>) {
        let Some((owner, purpose, result)) = ended else { return };
        match owner {
            Owner::Client(number) => {
                self.clients[usize::from(number)].called(&mut self.shared, purpose, result);
            }
            Owner::Seat(seat) => self.with(seat, |replica, shared| match replica {
                Replica::Coordinator(replica) => replica.called(shared, purpose, result),
                Replica::Shard(replica) => replica.called(shared, purpose, result),
            }),
        }
    }

    /// All members hear how far the log is committed.
    fn spread(&mut self, group: GroupId, leader: Address) {
        let upto = self.shared.groups[&group].committed();
        for at in self.shared.groups[&group].members.clone() {
            if !self.servers.contains_key(&at) {
                // A member that only votes.
                continue;
            }
            let seat = self.seat(at, group);
            let pace = if at == leader { Pace::Local } else { Pace::Network(leader, at) };
            self.shared.emit(pace, Item::Learn { seat, upto });
        }
    }

    // --- faults ---------------------------------------------------------------------------------

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Crash(at) => self.crash(at),
            Fault::Restart(at) => self.restart(at),
            Fault::Cut(from, to) => drop(self.cuts.insert((from, to))),
            Fault::Mend => self.cuts.clear(),
            Fault::Elect { group, to, survive } => self.elect(group, to, survive),
            Fault::Jump(at, millis) => {
                let server = self.servers.get_mut(&at).expect("a server");
                server.offset_millis = millis;
                for replica in server.replicas.values_mut() {
                    if let Replica::Coordinator(replica) = &mut **replica {
                        replica.offset_millis = millis;
                    }
                }
            }
            Fault::Move { shard, from, to } => self.moves(shard, from, to),
            Fault::Forget(shard, at) => {
                let group = GroupId::Shard(shard);
                if !self.shared.groups[&group].members.contains(&at) {
                    self.servers.get_mut(&at).expect("a server").replicas.remove(&group);
                }
            }
            Fault::Flush(at) => {
                for replica in self.servers.get_mut(&at).expect("a server").replicas.values_mut() {
                    match &mut **replica {
                        Replica::Coordinator(replica) => replica.flush(),
                        Replica::Shard(replica) => replica.flush(),
                    }
                }
            }
            Fault::Retire { shard, safe_point, outcomes_before } => {
                let group = GroupId::Shard(shard);
                if let Some(leader) = self.shared.groups[&group].leader {
                    let seat = self.seat(leader, group);
                    self.with_shard(seat, |replica, shared| {
                        replica.retire(shared, safe_point, outcomes_before);
                    });
                }
            }
        }
    }

    fn crash(&mut self, at: Address) {
        let server = self.servers.get_mut(&at).expect("a server");
        if !server.up {
            return;
        }
        server.up = false;
        for group in server.replicas.keys().copied().collect::<Vec<_>>() {
            let group = self.shared.group(group);
            if group.leader == Some(at) {
                group.leader = None;
            }
        }
        // Who waits for it hears soon that the connection is gone.
        let lost = self.shared.calls.iter().filter(|(_, call)| call.to == at);
        let lost: Vec<Item> = lost
            .map(|(id, call)| Item::Broken { call: *id, attempt: call.attempt(), unsent: false })
            .collect();
        for item in lost {
            self.shared.emit(Pace::Network(at, at), item);
        }
        self.shared.calls.retain(|_, call| call.owner.address() != at);
    }

    fn restart(&mut self, at: Address) {
        let settings = self.settings;
        let server = self.servers.get_mut(&at).expect("a server");
        if server.up {
            return;
        }
        server.up = true;
        server.life += 1;
        let (life, offset_millis) = (server.life, server.offset_millis);
        for (group, replica) in &mut server.replicas {
            let seat = Seat { at, group: *group, life };
            match (&mut **replica, group) {
                (Replica::Coordinator(replica), _) => {
                    **replica = Coordinator::start(seat, settings, replica.durable());
                    replica.offset_millis = offset_millis;
                }
                (Replica::Shard(replica), GroupId::Shard(shard)) => {
                    **replica = Shard::start(seat, *shard, replica.durable());
                }
                (Replica::Shard(_), GroupId::Coordinator) => unreachable!("a shard is in its own group"),
            }
            let upto = self.shared.groups[group].committed();
            self.shared.emit(Pace::After(HEARTBEAT), Item::Learn { seat, upto });
        }
    }

    fn elect(&mut self, group: GroupId, to: Address, survive: usize) {
        if !self.has_majority(group, to) {
            return;
        }
        let before = self.shared.group(group).elect(to, survive);
        let term = self.shared.groups[&group].term;
        self.shared.emit(Pace::Local, Item::Role { seat: self.seat(to, group), term, leads: true });
        if let Some(before) = before.filter(|before| *before != to && self.is_up(*before)) {
            let seat = self.seat(before, group);
            self.shared.emit(Pace::Notice, Item::Role { seat, term, leads: false });
        }
        self.spread(group, to);
    }

    /// A new member gets a snapshot of the leader's state, and then the place of another one.
    fn moves(&mut self, shard: ShardId, from: Address, to: Address) {
        let group = GroupId::Shard(shard);
        let Some(leader) = self.shared.groups[&group].leader.filter(|at| self.has_majority(group, *at))
        else {
            return;
        };
        let members = &self.shared.groups[&group].members;
        let present = self.servers[&to].replicas.contains_key(&group);
        if members.contains(&to) || !members.contains(&from) || present || !self.is_up(to) {
            return;
        }
        let Some(Replica::Shard(source)) = self.replica(self.seat(leader, group)) else { return };
        let snapshot = source.snapshot();
        let seat = self.seat(to, group);
        let replica = Shard::start(seat, shard, snapshot);
        let server = self.servers.get_mut(&to).expect("a server");
        server.replicas.insert(group, Told::new(Replica::Shard(Box::new(replica))));
        let now = self.shared.group(group);
        now.members.retain(|member| *member != from);
        now.members.push(to);
        now.members.sort();
        let (upto, term) = (now.committed(), now.term + 1);
        if now.leader == Some(from) {
            now.leader = None;
            // It hears of it when it hears of it.
            let seat = self.seat(from, group);
            self.shared.emit(Pace::Notice, Item::Role { seat, term, leads: false });
        }
        self.shared.emit(Pace::Network(leader, to), Item::Learn { seat, upto });
    }
}

/// What a coordinator's log begins with: a cluster whose participants have made themselves known.
fn first_disk(shape: Shape, settings: Settings) -> CoordinatorDisk {
    use troth_protocol::{FolderId, Node, NodeState};
    let node = |id: u8| Node {
        id: NodeId(id.into()),
        address: format!("127.0.0.1:{id}"),
        zone: String::new(),
        weight: 1,
        state: NodeState::Waiting,
        incarnation: Default::default(),
    };
    let founder = |id: u8| (NodeId(id.into()), node(id).address);
    let founders = (1..=shape.coordinators).map(founder).collect();
    let lead = Command::Lead {
        leader: Default::default(),
        founding: Founding { founders, settings, ..Founding::default() },
    };
    let register = |id: u8| Command::Register {
        node: node(id),
        folder: FolderId(id.into()),
        previous: None,
        progress: 0,
    };
    let mut disk = CoordinatorDisk::default();
    let mut state = disk.restore();
    for command in std::iter::once(lead).chain((1..=shape.nodes).map(register)) {
        let mut mutations = Vec::new();
        state.apply(0, command, &disk, &mut mutations).expect("a modelled disk is readable");
        disk.write(mutations, &state);
    }
    disk
}
