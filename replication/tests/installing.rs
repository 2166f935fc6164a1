//! A snapshot that is being put in place while its sender has given up and sends another one. In a program of
//! its own, as fault points belong to the process.

mod support;

use std::time::Duration;

use bytes::Bytes;
use support::*;
use tokio::time::timeout;
use troth_protocol::fault;
use troth_protocol::message::admin::{Fault, FaultAction, FaultPoint};
use troth_protocol::message::raft::{
    self as wire, Body, Bounds, LogId, Membership, Pair, Part, StoredMembership,
};
use troth_protocol::net::memory::Network;
use troth_protocol::{Incarnation, NodeId, Reject};
use troth_replication::{Group, LogWriter};

/// What a leader that this member has never heard of says to it.
async fn say(group: &Group<Journal>, body: Body) -> Result<wire::Response, Reject> {
    group
        .step(wire::Request {
            group: GROUP,
            from: NodeId(2),
            incarnation: Incarnation(2),
            to: NodeId(1),
            body,
        })
        .await
}

const VOTE: wire::Vote = wire::Vote { term: 100, node: NodeId(2), committed: true };

/// Offers a snapshot with these commands, and sends it.
async fn send(group: &Group<Journal>, transfer: u64, commands: &[&'static str]) -> Result<(), Reject> {
    say(group, Body::SnapshotOffer { vote: VOTE, transfer, begin: true, offers: Vec::new() }).await?;
    let span = Journal::span(GROUP.to_u32());
    let pair = |(index, command): (usize, &&'static str)| Pair {
        key: [&span.start[..], &(index as u64).to_be_bytes()].concat().into(),
        value: Bytes::from_static(command.as_bytes()),
    };
    let pairs = commands.iter().enumerate().map(pair).collect();
    let bounds = Bounds { span: 0, from: span.start.clone().into(), to: span.end.into() };
    let parts = vec![Part { bounds, pairs }];
    say(group, Body::SnapshotParts { vote: VOTE, transfer, parts }).await?;
    Ok(())
}

fn end(transfer: u64, index: u64) -> Body {
    let voters = vec![NodeId(1), NodeId(2)];
    let membership = StoredMembership {
        set_by: Some(LogId { term: 1, index: 0 }),
        membership: Membership { voters: vec![voters.clone()], members: voters },
    };
    Body::SnapshotEnd { vote: VOTE, last: Some(LogId { term: 99, index }), membership, transfer }
}

/// Asks to put a snapshot in place, which takes until everything is disarmed, and does not wait for it.
async fn end_and_give_up(group: &Group<Journal>, end: Body) {
    fault::handle(Fault::Arm {
        point: FaultPoint::LogSync,
        action: FaultAction::Hold { millis: 30_000 },
        skip: 0,
    });
    let sender = group.clone();
    let ending = tokio::spawn(async move { say(&sender, end).await });
    eventually("it is held", || fault::handle(Fault::List).iter().any(|point| point.fired)).await;
    ending.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_next_snapshot_waits_until_the_last_one_is_in_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let (store, network) = (open(folder.path()), Network::new());
    let writer = LogWriter::start(&store);
    let group = start(&network, &store, &writer, GROUP, 1, &[1], 1000).await.expect("starts");
    leads(&group).await;
    // It has a state, so what arrives is staged beside it.
    group.propose(command(1)).await.expect("it leads");

    // Its sender gives up waiting, and asks again.
    send(&group, 1, &["one", "two", "three"]).await.expect("taken");
    end_and_give_up(&group, end(1, 1000)).await;
    let asking = group.clone();
    let mut again = tokio::spawn(async move { say(&asking, end(1, 1000)).await });
    let early = timeout(Duration::from_millis(300), &mut again).await;
    assert!(early.is_err(), "it is said to be in place: {early:?}");
    fault::handle(Fault::Disarm);
    let done = again.await.expect("no panic");
    assert!(matches!(done, Ok(wire::Response::SnapshotDone { vote: VOTE })), "{done:?}");
    assert_eq!(group.applied(), 1000);
    assert_eq!(journal(&store, GROUP), [&b"one"[..], b"two", b"three"]);

    // Its sender gives up for good, and sends the next one.
    send(&group, 2, &["uno"]).await.expect("taken");
    end_and_give_up(&group, end(2, 2000)).await;
    let sending = group.clone();
    let mut next = tokio::spawn(async move { send(&sending, 3, &["ein", "zwei"]).await });
    let early = timeout(Duration::from_millis(300), &mut next).await;
    assert!(early.is_err(), "it is staged over the one before: {early:?}");
    fault::handle(Fault::Disarm);
    next.await.expect("no panic").expect("taken");
    assert_eq!(group.applied(), 2000);
    assert_eq!(journal(&store, GROUP), [b"uno"]);
    say(&group, end(3, 3000)).await.expect("taken");
    assert_eq!(group.applied(), 3000);
    assert_eq!(journal(&store, GROUP), [&b"ein"[..], b"zwei"]);
    let twice = say(&group, end(3, 3000)).await;
    assert!(twice.is_ok(), "it is in place: {twice:?}");
    group.shutdown().await;
}
