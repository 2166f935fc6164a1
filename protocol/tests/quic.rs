//! Calls over QUIC between processes that mean well.

mod support;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use tokio::task::JoinSet;
use tokio::time::Instant;
use troth_protocol::Reject;
use troth_protocol::message::Response;
use troth_protocol::net::quic::{Quic, QuicConfig};
use troth_protocol::net::{CallError, Peer, Role, Transport};

use support::*;

const MIB: usize = 1 << 20;

/// A caller and a server of one cluster, connected.
async fn pair() -> (Arc<Quic>, Arc<Quic>, Peer, Arc<Script>) {
    let cluster = Cluster::new(1);
    let script = Script::new();
    let (server, peer) = cluster.serve(&script);
    let caller = cluster.open(Role::Participant, "caller");
    check_echo(&caller, &peer, "hello").await;
    (caller, server, peer, script)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_calls_at_once_each_get_their_own_answer() {
    let (caller, _server, peer, _) = pair().await;
    let mut calls = JoinSet::new();
    for number in 0..10_000u32 {
        let (caller, peer) = (caller.clone(), peer.clone());
        // Every second one leaves the stream's own task, so that answers overtake each other.
        let at = if number % 2 == 0 { AT_ONCE } else { YIELDING };
        calls.spawn(async move {
            let question = format!("question {number}");
            let answer = caller.call(&peer, read(at, question.clone()), soon()).await;
            assert_eq!(answer.map(bytes_of), Ok(Bytes::from(question)), "call {number}");
        });
    }
    let answered = expect_soon("all answers", calls.join_all()).await;
    assert_eq!(answered.len(), 10_000);
}

/// Small calls go on while a large one is under way.
async fn check_small_calls_pass(what: &str, request: troth_protocol::message::Request) {
    let (caller, _server, peer, _) = pair().await;
    let large = {
        let (caller, peer) = (caller.clone(), peer.clone());
        tokio::spawn(async move {
            let answer = caller.call(&peer, request, soon()).await;
            (answer.map(bytes_of).expect("the large answer").len(), Instant::now())
        })
    };
    let (mut passed, mut slowest) = (Vec::new(), Duration::ZERO);
    while !large.is_finished() {
        let asked = Instant::now();
        check_echo(&caller, &peer, "small").await;
        slowest = slowest.max(asked.elapsed());
        passed.push(Instant::now());
    }
    let (length, large_done) = expect_soon("the large call", large).await.expect("the large call");
    assert_eq!(length, 20 * MIB, "{what}");
    let before = passed.iter().filter(|&&done| done < large_done).count();
    assert!(before >= 10, "{what}: only {before} small calls passed it");
    assert!(slowest < Duration::from_secs(1), "{what}: a small call took {slowest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_calls_pass_a_large_request_and_a_large_answer() {
    check_small_calls_pass("a large answer", scan(AT_ONCE, 20 * MIB as u32)).await;
    // Its answer is as large, on the same stream.
    check_small_calls_pass("a large request", read(AT_ONCE, vec![1; 20 * MIB])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_around_the_limit_of_shared_streams_come_back_whole() {
    let (caller, _server, peer, _) = pair().await;
    for bytes in (64 << 10) - 400..(64 << 10) + 10 {
        let answer = caller.call(&peer, read(AT_ONCE, vec![3; bytes]), soon()).await;
        assert_eq!(answer.map(bytes_of), Ok(vec![3; bytes].into()), "{bytes} bytes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_large_requests_than_memory_is_granted_for_do_not_choke_the_connection() {
    let (caller, _server, peer, script) = pair().await;
    let ballast = Bytes::from(vec![1; 20 * MIB]);
    let mut calls = JoinSet::new();
    for _ in 0..24 {
        let (caller, peer, ballast) = (caller.clone(), peer.clone(), ballast.clone());
        calls.spawn(async move {
            let request = read_with_ballast(GATED, "large", ballast);
            caller.call(&peer, request, soon()).await.map(bytes_of)
        });
    }
    // 256 MiB are granted.
    script.waiting_at_gate(12).await;
    check_echo(&caller, &peer, "small").await;
    script.open_gate();
    let answers = expect_soon("all answers", calls.join_all()).await;
    assert_eq!(answers, vec![Ok(Bytes::from("large")); 24]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_above_all_limits_is_refused_before_it_is_sent() {
    let (caller, _server, peer, _) = pair().await;
    let refused = caller.call(&peer, read(AT_ONCE, vec![1; 49 * MIB]), soon()).await;
    let error = refused.expect_err("it does not fit a frame");
    assert!(matches!(error, CallError::TooLarge(_)), "{error}");
    let refused = caller.call(&peer, scan(AT_ONCE, 49 * MIB as u32), soon()).await;
    let Ok(Response::Rejected(Reject::TooLarge { reason })) = refused else {
        panic!("{refused:?}");
    };
    assert!(reason.starts_with("the answer does not fit a frame"), "{reason}");
    check_echo(&caller, &peer, "still here").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_answers_do_not_delay_others() {
    let (caller, _server, peer, script) = pair().await;
    let mut slow = JoinSet::new();
    for number in 0..100u32 {
        let (caller, peer) = (caller.clone(), peer.clone());
        slow.spawn(async move { caller.call(&peer, read(GATED, number.to_string()), soon()).await });
    }
    script.waiting_at_gate(100).await;
    for number in 0..100 {
        check_echo(&caller, &peer, &format!("quick {number}")).await;
    }
    assert_eq!(slow.try_join_next().map(|_| ()), None, "the gate is closed");
    script.open_gate();
    for answer in expect_soon("slow answers", slow.join_all()).await {
        answer.expect("the gate is open");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_messages_arrive_in_the_order_of_sending() {
    let (caller, _server, peer, script) = pair().await;
    let mut calls = Vec::new();
    for sequence in 0..2_000 {
        // Polled once, it is sent; a task may do only so much between two yields.
        tokio::task::yield_now().await;
        let mut call = caller.call(&peer, numbered(sequence), soon());
        match (&mut call).now_or_never() {
            Some(answer) => drop(answer.expect("an answer")),
            None => calls.push(call),
        }
    }
    for call in calls {
        expect_soon("an answer", call).await.expect("an answer");
    }
    assert_eq!(*script.raft.lock(), (0..2_000).collect::<Vec<_>>());
}

/// Also those that had to wait for the connection: they are woken together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_messages_keep_their_order_while_a_connection_is_made() {
    let cluster = Cluster::new(1);
    let script = Script::new();
    let (_server, peer) = cluster.serve(&script);
    for round in 0..20 {
        let caller = cluster.open(Role::Participant, "caller");
        script.raft.lock().clear();
        let calls = futures_util::stream::iter(0..50)
            .map(|sequence| caller.call(&peer, numbered(sequence), soon()))
            .buffered(50);
        let answers: Vec<_> = expect_soon("the answers", calls.collect()).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        assert_eq!(*script.raft.lock(), (0..50).collect::<Vec<_>>(), "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_says_goodbye_does_not_wait_for_its_own_connections() {
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let (caller, _server, peer, _) = pair().await;
        caller.call(&peer, read(AT_ONCE, Vec::new()), soon()).await.expect("an answer");
        let began = Instant::now();
        caller.close().await;
        fastest = fastest.min(began.elapsed());
    }
    // Half a second is how long it waits at most for what does not end.
    assert!(fastest < Duration::from_millis(400), "{fastest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_never_answered_ends_by_its_deadline() {
    let (caller, _server, peer, _) = pair().await;
    let deadline = Instant::now() + Duration::from_millis(200);
    let error = match caller.call(&peer, read(NEVER, "anybody?"), deadline).await {
        Ok(Response::Rejected(Reject::DeadlineExceeded)) => None,
        Err(error @ CallError::DeadlineExceeded { .. }) => Some(error),
        other => panic!("{other:?}"),
    };
    let late = deadline.elapsed();
    assert!(late < Duration::from_millis(500), "{late:?} late");
    assert!(error.is_none_or(|error| error.is_ambiguous()), "it may have happened");
    check_echo(&caller, &peer, "still here").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_address_is_unreachable_by_the_deadline() {
    let cluster = Cluster::new(1);
    let caller = cluster.open(Role::Client, "caller");
    // Bound, so that nobody else gets the port, and silent.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let peer = at(silent.local_addr().expect("bound"));
    let check = async |deadline: Instant, expected: &str| {
        let error = caller.call(&peer, read(AT_ONCE, "anybody?"), deadline).await;
        let error = error.expect_err("nobody answers there");
        let late = Instant::now().saturating_duration_since(deadline);
        assert!(late < Duration::from_millis(500), "{late:?} late: {error}");
        assert!(!error.is_ambiguous(), "nothing was sent: {error}");
        assert_eq!(error.to_string(), format!("{peer} cannot be reached: {expected}"));
    };
    let deadline = Instant::now() + Duration::from_millis(200);
    check(deadline, "no answer before the deadline").await;
    check(soon(), "no answer within 2000 ms").await;
    let peer = Peer::participant("no-such-host.invalid:1");
    let error = caller.call(&peer, read(AT_ONCE, "anybody?"), soon()).await;
    let error = error.expect_err("there is no such host").to_string();
    assert!(error.contains("no-such-host.invalid"), "{error}");
}

/// A server that can be taken away and put back at the same address.
struct Place {
    credentials: troth_protocol::net::tls::Credentials,
    config: QuicConfig,
}

impl Place {
    fn serve(&self) -> Result<Arc<Quic>, troth_protocol::net::quic::EndpointError> {
        let server = Quic::bind(self.config.clone(), &self.credentials)?;
        server.serve(Script::new());
        Ok(server)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_restarts_is_reached_again() {
    let cluster = Cluster::new(1);
    let credentials = cluster.credentials(Role::Participant, "server");
    let mut place = Place { credentials, config: QuicConfig::default() };
    let script = Script::new();
    let server = Quic::bind(place.config.clone(), &place.credentials).expect("a free port");
    server.serve(script.clone());
    place.config.bind = server.local_addr();
    let peer = at(place.config.bind);
    let caller = cluster.open(Role::Client, "caller");

    let in_flight = {
        let (caller, peer) = (caller.clone(), peer.clone());
        // Its deadline is no reason for anybody to let go.
        let deadline = Instant::now() + 10 * PATIENCE;
        tokio::spawn(async move { caller.call(&peer, read(GATED, "wait"), deadline).await })
    };
    script.waiting_at_gate(1).await;
    server.close().await;
    drop(server);
    let error = expect_soon("the end of the call", in_flight).await.expect("no panic");
    let error = error.expect_err("its server is gone");
    assert!(error.is_ambiguous(), "it was sent: {error}");
    assert_eq!(error.to_string(), format!("the connection to {peer} broke: shutting down"));
    let error = echo(&caller, &peer, "anybody?").await.expect_err("nobody is there");
    assert!(!error.is_ambiguous(), "it was not sent: {error}");

    let server = until_ok("the same port", async || place.serve()).await;
    let since = Instant::now();
    until_ok("an echo", async || echo(&caller, &peer, "again").await).await;
    let waited = since.elapsed();
    assert!(waited < Duration::from_secs(2), "{waited:?}");
    server.close().await;
}

#[test]
fn a_server_that_was_killed_and_restarts_says_that_old_connections_are_gone() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().expect("a runtime")
    };
    let cluster = Cluster::new(1);
    // Nobody shall find out by waiting.
    let patient = QuicConfig {
        idle_timeout: 10 * PATIENCE,
        keep_alive: Duration::from_millis(100),
        ..QuicConfig::default()
    };
    let mut place =
        Place { credentials: cluster.credentials(Role::Participant, "server"), config: patient.clone() };
    let (here, there) = (runtime(), runtime());
    let server = there.block_on(async { place.serve().expect("a free port") });
    place.config.bind = server.local_addr();
    let peer = at(place.config.bind);
    let caller = here.block_on(async {
        Quic::bind(patient, &cluster.credentials(Role::Client, "caller")).expect("a free port")
    });
    here.block_on(check_echo(&caller, &peer, "before"));
    let in_flight = {
        let (caller, peer) = (caller.clone(), peer.clone());
        here.spawn(async move { caller.call(&peer, read(NEVER, "wait"), soon()).await })
    };
    // Without a goodbye.
    there.shutdown_timeout(PATIENCE);
    drop(server);
    here.block_on(async {
        let _server = until_ok("the same port", async || place.serve()).await;
        let error = expect_soon("the end of the call", in_flight).await.expect("no panic");
        let error = error.expect_err("its server is gone").to_string();
        assert!(error.contains("reset by peer"), "{error}");
        until_ok("an echo", async || echo(&caller, &peer, "again").await).await;
    });
}
