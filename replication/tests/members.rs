//! Members come and go, and what they need travels in snapshots.

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use support::*;
use tempfile::TempDir;
use troth_protocol::message::raft as wire;
use troth_protocol::net::memory::Network;
use troth_protocol::{Incarnation, NodeId, Reject};
use troth_replication::{
    Follower, Group, LogWriter, Machine as _, ProposeError, Store, Throttle, erase, is_known,
};

/// Nodes of one group, by their numbers from 1.
struct Nodes {
    network: Network,
    folders: Vec<TempDir>,
    stores: Vec<Store>,
    writers: Vec<LogWriter>,
    groups: Vec<Option<Group<Journal>>>,
}

impl Nodes {
    /// Stores for so many, none of which runs.
    fn with_stores(count: usize) -> Nodes {
        let (network, none) = (Network::new(), Vec::new());
        let mut nodes = Nodes { network, folders: none, stores: vec![], writers: vec![], groups: vec![] };
        (0..count).for_each(|_| nodes.add_store());
        nodes
    }

    /// Three founders.
    async fn three() -> Nodes {
        let mut nodes = Nodes::with_stores(3);
        for node in 1..=3 {
            nodes.start(node, &[1, 2, 3]).await;
        }
        nodes
    }

    fn add_store(&mut self) {
        let folder = tempfile::tempdir().expect("a folder");
        self.stores.push(open(folder.path()));
        self.writers.push(LogWriter::start(self.stores.last().expect("pushed just now")));
        self.folders.push(folder);
        self.groups.push(None);
    }

    async fn start(&mut self, node: usize, members: &[u64]) {
        let plan = Plan {
            network: &self.network,
            store: &self.stores[node - 1],
            writer: &self.writers[node - 1],
            group: GROUP,
            node: node as u64,
            members,
            log_entries_max: 20,
            directory: Arc::default(),
            throttle: Some(Throttle::new(2 << 20)),
        };
        self.groups[node - 1] = Some(plan.start().await.expect("starts"));
    }

    fn group(&self, node: usize) -> &Group<Journal> {
        self.groups[node - 1].as_ref().expect("it runs")
    }

    async fn leader(&self) -> usize {
        let running: Vec<Group<Journal>> = self.groups.iter().flatten().cloned().collect();
        running[leader_of(&running).await].node().0 as usize
    }

    /// Proposes that many commands of 40 KB.
    async fn propose(&self, leader: usize, count: usize) {
        for number in 0..count {
            let mut command = vec![7; 40 << 10];
            command[..8].copy_from_slice(&number.to_be_bytes());
            self.group(leader).propose(Bytes::from(command)).await.expect("it leads");
        }
    }

    async fn stop(&mut self, node: usize) {
        self.network.remove(&address(NodeId(node as u64)));
        self.groups[node - 1].take().expect("it runs").shutdown().await;
    }

    async fn until_matched(&self, leader: usize, node: usize) {
        eventually("it has caught up", || {
            let followers = self.group(leader).followers();
            followers.iter().any(|f| f.node == NodeId(node as u64) && f.matched.is_some() && f.behind == 0)
        })
        .await;
    }

    fn sent(&self) -> (u64, u64) {
        let bytes = self.groups.iter().flatten().map(Group::snapshot_bytes);
        bytes.fold((0, 0), |(sent, known), bytes| (sent + bytes.sent, known + bytes.known))
    }

    async fn end(self) {
        for group in self.groups.iter().flatten() {
            group.shutdown().await;
        }
    }
}

fn voters(nodes: &[usize]) -> BTreeSet<NodeId> {
    nodes.iter().map(|node| NodeId(*node as u64)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_gets_a_vote_and_who_has_left_may_come_back_with_nothing_but_its_vote() {
    let mut nodes = Nodes::three().await;
    let leader = nodes.leader().await;
    nodes.propose(leader, 60).await;
    nodes.group(leader).forget_the_beginning().await;
    assert!(nodes.group(leader).log_begins_at() > 0);
    nodes.add_store();
    nodes.start(4, &[]).await;
    nodes.group(leader).add_learner(NodeId(4)).await.expect("it leads");
    nodes.until_matched(leader, 4).await;
    let leaver = if leader == 1 { 2 } else { 1 };
    let stay: Vec<usize> = (1..=4).filter(|node| *node != leaver).collect();
    let formed = nodes.group(leader).change_voters(&voters(&stay)).await.expect("it leads");
    let members = nodes.group(leader).members();
    assert_eq!((members.voters, members.learners), (voters(&stay), BTreeSet::new()));
    assert_eq!((members.set_by, members.joint, members.committed), (Some(formed), false, true));

    // Who has left takes nothing along, and is nobody.
    nodes.stop(leaver).await;
    let (store, writer) = (&nodes.stores[leaver - 1], &nodes.writers[leaver - 1]);
    assert!(is_known(store, GROUP).expect("readable"));
    erase(writer, GROUP, &Journal::new(store, GROUP).spans()).await.expect("writable");
    assert!(!is_known(store, GROUP).expect("readable"));
    assert!(journal(store, GROUP).is_empty());

    // It comes back as anybody would.
    nodes.start(leaver, &[]).await;
    nodes.group(leader).add_learner(NodeId(leaver as u64)).await.expect("it leads");
    nodes.until_matched(leader, leaver).await;
    nodes.group(leader).change_voters(&voters(&[1, 2, 3, 4])).await.expect("it leads");
    nodes.propose(leader, 1).await;
    applied_everywhere(&nodes.stores, 61).await;
    nodes.end().await;
}

/// Waits until a megabyte has left, cuts the receiver off, and lets others reach it again.
async fn interrupt(nodes: &Nodes, receiver: usize) {
    eventually("something has arrived", || nodes.sent().0 > 1 << 20).await;
    nodes.network.remove(&address(NodeId(receiver as u64)));
    eventually("the transfer has ended", || {
        nodes.groups.iter().flatten().all(|group| group.transfers().is_empty())
    })
    .await;
    serve(&nodes.network, nodes.group(receiver));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_arrived_is_not_sent_again_also_by_another_leader() {
    let mut nodes = Nodes::three().await;
    let leader = nodes.leader().await;
    nodes.propose(leader, 150).await;
    for node in 1..=3 {
        nodes.group(node).forget_the_beginning().await;
    }
    nodes.add_store();
    nodes.start(4, &[]).await;
    nodes.group(leader).add_learner(NodeId(4)).await.expect("it leads");
    interrupt(&nodes, 4).await;
    // A newcomer with a part of a state has none: what it is built from may be anybody's.
    nodes.stop(4).await;
    nodes.start(4, &[]).await;
    let before = nodes.sent().0;
    let successor = if leader == 1 { 2 } else { 1 };
    nodes.group(leader).transfer_leader(NodeId(successor as u64), PATIENCE).await.expect("it leads");
    let leader = nodes.leader().await;
    nodes.until_matched(leader, 4).await;
    let (sent, known) = nodes.sent();
    assert!(known >= 1 << 20, "{known} bytes were known");
    assert!(sent < 150 * (42 << 10), "{sent} bytes were sent, {before} of them before");
    nodes.propose(leader, 1).await;
    applied_everywhere(&nodes.stores, 151).await;
    assert_eq!(journal(&nodes.stores[3], GROUP), journal(&nodes.stores[leader - 1], GROUP));
    nodes.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_far_behind_keeps_its_state_until_the_new_one_is_complete() {
    let nodes = Nodes::three().await;
    let leader = nodes.leader().await;
    nodes.propose(leader, 5).await;
    applied_everywhere(&nodes.stores, 5).await;
    let late = if leader == 1 { 2 } else { 1 };
    nodes.network.remove(&address(NodeId(late as u64)));
    nodes.propose(leader, 150).await;
    eventually("the log is cut", || nodes.group(leader).log_begins_at() > 100).await;
    serve(&nodes.network, nodes.group(late));
    interrupt(&nodes, late).await;
    assert_eq!(journal(&nodes.stores[late - 1], GROUP).len(), 5, "what it had is there");
    nodes.until_matched(leader, late).await;
    assert!(nodes.sent().1 >= 1 << 20, "what had been staged is not sent again");
    nodes.propose(leader, 1).await;
    applied_everywhere(&nodes.stores, 156).await;
    assert_eq!(journal(&nodes.stores[late - 1], GROUP), journal(&nodes.stores[leader - 1], GROUP));
    nodes.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lacks_what_is_known_to_be_committed_gets_no_vote() {
    let folder = tempfile::tempdir().expect("a folder");
    let (store, network) = (open(folder.path()), Network::new());
    let writer = LogWriter::start(&store);
    let directory = Arc::new(Addresses::default());
    let plan = Plan {
        network: &network,
        store: &store,
        writer: &writer,
        group: GROUP,
        node: 1,
        members: &[],
        log_entries_max: 1000,
        directory: directory.clone(),
        throttle: None,
    };
    let group = plan.start().await.expect("starts");
    let ask = async |index: Option<u64>| {
        let vote = wire::Vote { term: 5, node: NodeId(2), committed: false };
        let last = index.map(|index| wire::LogId { term: 4, index });
        let body = wire::Body::Vote { vote, last, leadership_transfer: false };
        group
            .step(wire::Request {
                group: GROUP,
                from: NodeId(2),
                incarnation: Incarnation(2),
                to: NodeId(1),
                body,
            })
            .await
    };
    *directory.committed.lock() = Some(wire::LogId { term: 4, index: 7 });
    for lacking in [None, Some(6)] {
        assert!(matches!(ask(lacking).await, Err(Reject::Malformed { .. })), "{lacking:?}");
    }
    let granted = ask(Some(7)).await;
    assert!(matches!(granted, Ok(wire::Response::Vote { granted: true, .. })), "{granted:?}");
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_being_applied_when_a_member_stops_does_not_come_back_after_it_was_erased() {
    let mut nodes = Nodes::with_stores(1);
    nodes.start(1, &[1]).await;
    let group = nodes.group(1).clone();
    leads(&group).await;
    set_slow(true);
    let _slow = group.submit(Bytes::from_static(SLOW)).expect("it leads");
    let _next = group.submit(command(1)).expect("it leads");
    eventually("both are committed", || group.behind() >= 2).await;
    nodes.network.remove(&address(NodeId(1)));
    let mut stopping = tokio::spawn(async move { group.shutdown().await });
    // It waits for what applies them, which goes on when all else has ended.
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut stopping).await;
    assert!(early.is_err(), "the member has stopped while it applies");
    set_slow(false);
    stopping.await.expect("no panic");
    let (store, writer) = (&nodes.stores[0], &nodes.writers[0]);
    erase(writer, GROUP, &Journal::new(store, GROUP).spans()).await.expect("writable");
    assert!(!is_known(store, GROUP).expect("readable"));
    assert!(journal(store, GROUP).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_vote_is_not_handed_the_leadership() {
    let mut nodes = Nodes::with_stores(2);
    nodes.start(1, &[1]).await;
    leads(nodes.group(1)).await;
    nodes.start(2, &[]).await;
    nodes.group(1).add_learner(NodeId(2)).await.expect("it leads");
    nodes.until_matched(1, 2).await;
    eventually("it answers", || nodes.group(1).followers().iter().any(Follower::answers)).await;
    assert_eq!(nodes.group(1).successor(), None);
    let refused = nodes.group(1).transfer_leader(NodeId(2), PATIENCE).await;
    assert_eq!(refused, Err(ProposeError::Unknown));
    nodes.propose(1, 1).await;
    // As a voter it may.
    nodes.group(1).change_voters(&voters(&[1, 2])).await.expect("it leads");
    eventually("it may lead", || nodes.group(1).successor() == Some(NodeId(2))).await;
    assert_eq!(nodes.group(1).transfer_leader(NodeId(2), PATIENCE).await, Ok(NodeId(2)));
    nodes.end().await;
}
