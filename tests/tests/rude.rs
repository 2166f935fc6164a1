//! Somebody who does not know how to behave, at the door of live servers: refused with a reason,
//! and everybody else is served on.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use troth_protocol::message::{Request, Response, coordinator, shard};
use troth_protocol::net::Peer;
use troth_protocol::{Epoch, FolderId, Reject, ShardId};
use troth_sdk::Client;
use troth_tests::rude::{self, Manner, Plan};
use troth_tests::{SMALL, in_time, processes, seed};

async fn connect(cluster: &Path, server: SocketAddr, name: &str) -> quinn::Connection {
    rude::connect(cluster, "client", server, name).await.expect("the certificate is good")
}

async fn hello(connection: &quinn::Connection) -> quinn::SendStream {
    rude::hello(connection).await.expect("a hello in return")
}

/// The server's reason for closing a connection.
async fn why_closed(connection: &quinn::Connection) -> String {
    match in_time(connection.closed()).await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            String::from_utf8_lossy(&close.reason).into_owned()
        }
        other => panic!("closed without a word: {other}"),
    }
}

async fn is_served(client: &Client, round: &str) {
    in_time(client.transact(async |tx| tx.put("a", round).and_then(|()| tx.put("b", round))))
        .await
        .expect("others are served on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rude_clients_are_put_out_with_a_reason_and_nobody_else_notices() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_cluster, client) = processes(folder.path(), SMALL).await;
    let map = client.map();
    let address = |address: &str| address.parse::<SocketAddr>().expect("host:port");
    let servers = [
        (address(&map.coordinators[0].address), "coordinator.troth"),
        (address(&map.nodes[0].address), "participant.troth"),
    ];
    for (server, name) in servers {
        // Garbage that is not even QUIC.
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        for size in [0, 1, 20, 1200] {
            socket.send_to(&vec![0xa5; size], server).expect("sent");
        }
        is_served(&client, "after datagrams").await;

        // Garbage instead of a hello, and a hello of another version.
        let connection = connect(folder.path(), server, name).await;
        let (mut send, _) = connection.open_bi().await.expect("a stream");
        send.write_all(&[0x55; 64]).await.expect("sent");
        assert_eq!(why_closed(&connection).await, "not a Troth frame: it begins with 0x55555555");
        let connection = connect(folder.path(), server, name).await;
        let (mut send, _) = connection.open_bi().await.expect("a stream");
        let future = troth_protocol::wire::Hello { version_min: 7, version_max: 9 };
        send.write_all(&future.to_bytes()).await.expect("sent");
        assert_eq!(
            why_closed(&connection).await,
            "protocol version 7 is not supported; this side speaks 1 to 1"
        );
        is_served(&client, "after hellos").await;

        // Garbage in place of a frame, and a frame that says it is huge.
        let connection = connect(folder.path(), server, name).await;
        let mut send = hello(&connection).await;
        send.write_all(&[0x55; 64]).await.expect("sent");
        assert_eq!(why_closed(&connection).await, "not a Troth frame: it begins with 0x55555555");
        let connection = connect(folder.path(), server, name).await;
        let mut send = hello(&connection).await;
        let mut header = [0; troth_protocol::wire::HEADER_BYTES];
        header[..4].copy_from_slice(b"TRTH");
        header[4..6].copy_from_slice(&[1, 1]);
        header[8..12].copy_from_slice(&(1u32 << 31).to_be_bytes());
        send.write_all(&header).await.expect("sent");
        let reason = why_closed(&connection).await;
        assert_eq!(reason, "a frame of 2147483648 bytes is larger than 50331648 allows");
        is_served(&client, "after frames").await;
    }
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_may_not_say_what_only_peers_say() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_cluster, client) = processes(folder.path(), SMALL).await;
    let map = client.map();
    let (coordinator, participant) =
        (Peer::coordinator(&map.coordinators[0].address), Peer::participant(&map.nodes[0].address));
    let finish = shard::Request::Finish { epoch: Epoch(u64::MAX), decisions: Vec::new() };
    let register = coordinator::Request::Register {
        node: map.nodes[0].clone(),
        folder: FolderId(1),
        previous: None,
        progress: 0,
        heard: None,
        known: map.epoch,
        report: Default::default(),
    };
    let forbidden = [
        (&participant, Request::Shard { shard: ShardId(0), request: finish }, "Finish"),
        (&coordinator, Request::Coordinator(register), "Register"),
    ];
    for (peer, request, name) in forbidden {
        let deadline = Instant::now() + Duration::from_secs(10);
        let answer = client.transport().call(peer, request, deadline).await.expect("an answer");
        let expected = Reject::Forbidden { role: "client".into(), request: name.into() };
        assert_eq!(answer, Response::Rejected(expected));
        is_served(&client, name).await;
    }
    client.close().await;
}

/// A slice; `rude --seconds 600` is the long one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn live_servers_serve_on_whatever_anybody_sends() {
    let plan = Plan { time: Duration::from_secs(10), seed: seed(), clients: 8 };
    let outcome = rude::run(&plan).await;
    assert_eq!(outcome.complaints, Vec::<String>::new(), "{outcome:?}");
    assert!(outcome.served > 10 && outcome.offences.len() == Manner::ALL.len(), "{outcome:?}");
}
