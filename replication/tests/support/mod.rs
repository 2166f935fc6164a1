//! What the tests of groups share: a machine that keeps a journal, and members on a network in memory.

#![allow(dead_code, missing_docs, reason = "each test program uses a part of this")]

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use tokio::time::{Instant, timeout};
use troth_protocol::message::raft::LogId;
use troth_protocol::message::{Request, Response};
use troth_protocol::net::memory::Network;
use troth_protocol::net::{BoxFuture, Identity, Peer, Role, Service};
use troth_protocol::process::Memory;
use troth_protocol::{ClusterId, GroupId, Incarnation, NodeId, ShardId};
use troth_replication::{
    Batch, Committed, Directory, Family, Group, GroupConfig, Leadership, LogWriter, Machine, Span,
    StartError, Store, Throttle, Timing,
};

pub const DATA: Family = Family("data");
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Keeps every command under its index, and answers how many there are.
pub struct Journal {
    store: Store,
    group: u32,
    count: u64,
}

impl Journal {
    pub fn new(store: &Store, group: GroupId) -> Journal {
        Journal { store: store.clone(), group: group.to_u32(), count: 0 }
    }

    pub fn span(group: u32) -> Span {
        Span { family: DATA, start: group.to_be_bytes().to_vec(), end: (group + 1).to_be_bytes().to_vec() }
    }
}

pub fn journal(store: &Store, group: GroupId) -> Vec<Vec<u8>> {
    let span = Journal::span(group.to_u32());
    let mut entries = Vec::new();
    store
        .scan(DATA, &span.start, &span.end, |_, value| {
            entries.push(value.to_vec());
            true
        })
        .expect("readable");
    entries
}

/// A command that no machine can apply, as if its disk had failed then.
pub const POISON: &[u8] = b"poison";

/// A command that is applied for as long as a test says.
pub const SLOW: &[u8] = b"slow";

static SLOW_NOW: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

/// From now on what is slow takes until this is said again.
pub fn set_slow(slow: bool) {
    *SLOW_NOW.0.lock() = slow;
    SLOW_NOW.1.notify_all();
}

impl Machine for Journal {
    type Output = u64;

    fn apply(
        &mut self,
        commands: &[(u64, &[u8])],
        mut batch: Batch<'_>,
    ) -> io::Result<(Vec<u64>, Committed)> {
        let mut outputs = Vec::new();
        for (index, command) in commands {
            if *command == POISON {
                return Err(io::Error::other("this machine cannot take it"));
            }
            if *command == SLOW {
                SLOW_NOW.1.wait_while(&mut SLOW_NOW.0.lock(), |slow| *slow);
            }
            let key = [&self.group.to_be_bytes()[..], &index.to_be_bytes()].concat();
            batch.put(DATA, &key, command);
            self.count += 1;
            outputs.push(self.count);
        }
        Ok((outputs, batch.commit()?))
    }

    fn spans(&self) -> Vec<Span> {
        vec![Journal::span(self.group)]
    }

    fn unload(&mut self) {}

    fn reload(&mut self) -> io::Result<()> {
        let span = Journal::span(self.group);
        self.count = 0;
        self.store.scan(DATA, &span.start, &span.end, |_, _| {
            self.count += 1;
            true
        })?;
        Ok(())
    }
}

/// Everybody is found under their number. Tests may say what is known to be committed.
#[derive(Default)]
pub struct Addresses {
    pub committed: Mutex<Option<LogId>>,
}

impl Directory for Addresses {
    fn peer(&self, _: GroupId, node: NodeId) -> Option<Peer> {
        Some(address(node))
    }

    fn committed(&self, _: GroupId) -> Option<LogId> {
        *self.committed.lock()
    }
}

pub fn address(node: NodeId) -> Peer {
    Peer::participant(&format!("node-{node}"))
}

pub struct Member(Group<Journal>);

impl Service for Member {
    fn handle(&self, _: &Identity, request: Request, _: Instant) -> BoxFuture<'static, Response> {
        let group = self.0.clone();
        Box::pin(async move {
            let Request::Raft(request) = request else { panic!("only members talk here") };
            group.step(request).await.map_or_else(Response::Rejected, Response::Raft)
        })
    }
}

pub const GROUP: GroupId = GroupId::Shard(ShardId(3));

/// A member that is about to start.
pub struct Plan<'a> {
    pub network: &'a Network,
    pub store: &'a Store,
    pub writer: &'a LogWriter,
    pub group: GroupId,
    pub node: u64,
    pub members: &'a [u64],
    pub log_entries_max: u64,
    pub directory: Arc<Addresses>,
    pub throttle: Option<Throttle>,
}

impl Plan<'_> {
    pub async fn start(self) -> Result<Group<Journal>, StartError> {
        let node = NodeId(self.node);
        let identity =
            Identity { cluster: ClusterId::default(), role: Role::Participant, name: node.to_string() };
        let config = GroupConfig {
            group: self.group,
            node,
            incarnation: Incarnation(self.node),
            members: self.members.iter().copied().map(NodeId).collect::<BTreeSet<_>>(),
            transport: self.network.transport(identity),
            directory: self.directory,
            timing: Timing {
                heartbeat: Duration::from_millis(50),
                election: Duration::from_millis(300),
                ..Timing::default()
            },
            log_entries_max: self.log_entries_max,
            throttle: self.throttle,
        };
        let machine = Journal::new(self.store, self.group);
        let started = Group::start(config, self.store, self.writer, machine).await?;
        serve(self.network, &started);
        Ok(started)
    }
}

/// Others reach a member from now on.
pub fn serve(network: &Network, group: &Group<Journal>) {
    network.serve(address(group.node()), Arc::new(Member(group.clone())));
}

pub async fn start(
    network: &Network,
    store: &Store,
    writer: &LogWriter,
    group: GroupId,
    node: u64,
    members: &[u64],
    log_entries_max: u64,
) -> Result<Group<Journal>, StartError> {
    let directory = Arc::default();
    Plan { network, store, writer, group, node, members, log_entries_max, directory, throttle: None }
        .start()
        .await
}

pub fn open(folder: &std::path::Path) -> Store {
    Store::open(folder, "a test", &[DATA], Memory::default()).expect("a fresh folder")
}

pub async fn leads(group: &Group<Journal>) {
    let mut leadership = group.leadership();
    let leads = leadership.wait_for(|role| matches!(role, Leadership::Leader { .. }));
    timeout(PATIENCE, leads).await.expect("a leader in time").expect("the group runs");
}

pub async fn leader_of(groups: &[Group<Journal>]) -> usize {
    let elected = groups.iter().map(|group| Box::pin(leads(group)));
    futures_util::future::select_all(elected).await.1
}

pub fn command(number: u64) -> Bytes {
    Bytes::from(format!("command {number}"))
}

/// Awaits a condition.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

pub async fn applied_everywhere(stores: &[Store], count: usize) {
    let all = async {
        while stores.iter().any(|store| journal(store, GROUP).len() < count) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, all).await.expect("all members apply in time");
}
