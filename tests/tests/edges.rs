//! Where the outside touches a server: its HTTP port, which asks for no certificate, and its log, which grows on the
//! disk that the data needs.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};
use troth_protocol::process::take_descriptors;
use troth_sdk::Client;
use troth_sdk::harness::processes::{Processes, Shape};
use troth_sdk::layout::{Hosting, HttpPlan};
use troth_tests::drill::{Drill, Server};
use troth_tests::ledger::{Findings, Writers};
use troth_tests::{PATIENCE, SMALL, connect, eventually, in_time, logging, programs};

/// Connections that ask nothing, and such that never come to an end with asking.
const IDLE: usize = 2000;
const SLOW: usize = 200;

/// What a server has open, at most: RocksDB's files, its connections, and a reserve.
const DESCRIPTORS_MAX: usize = 700;

async fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: troth\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_ask_nothing_take_no_descriptors_that_the_store_needs() {
    take_descriptors();
    logging();
    let folder = tempfile::tempdir().expect("a folder");
    let hosting = Hosting { http: HttpPlan::Loopback, ..Hosting::default() };
    let mut cluster = Processes::create_hosted(folder.path(), programs(), SMALL, hosting).expect("laid out");
    cluster.start().expect("started");
    let client = connect(&cluster).await;
    for name in ["coordinator-1", "participant-1"] {
        let address = fs::read_to_string(folder.path().join("data").join(name).join("http-address"));
        let address: SocketAddr = address.expect("it says where").trim().parse().expect("an address");
        let process = cluster.all_mut().find(|process| process.name == name).expect("there is one");
        let pid = process.pid().expect("it runs");
        let mut crowd = JoinSet::new();
        for _ in 0..SLOW {
            crowd.spawn(async move {
                let Ok(mut stream) = TcpStream::connect(address).await else { return };
                let mut beats = interval(Duration::from_millis(100));
                for byte in b"GET /healthz HTTP/1.1\r\nHost: troth\r\nX-Patience: "
                    .iter()
                    .chain(std::iter::repeat(&b'x'))
                {
                    beats.tick().await;
                    if stream.write_all(&[*byte]).await.is_err() {
                        return;
                    }
                }
            });
        }
        let mut idle = Vec::new();
        for _ in 0..IDLE {
            idle.push(in_time(TcpStream::connect(address)).await.expect("the system takes it"));
        }
        for _ in 0..5 {
            let mut answer = String::new();
            eventually("it answers", async || {
                answer = get(address, "/healthz").await.unwrap_or_default();
                answer.starts_with("HTTP/1.1 200")
            })
            .await;
            let open = descriptors(pid);
            assert!(open < DESCRIPTORS_MAX, "{name} has {open} open");
            let put = client.transact(async |tx| tx.put(format!("key/{name}/{open}"), "value"));
            in_time(put).await.expect("it serves");
        }
        assert!(crowd.len() == SLOW && idle.len() == IDLE);
        crowd.shutdown().await;
    }
    client.close().await;
}

/// A cluster with many groups, each of which complains of a member that is gone.
const MANY: Shape = Shape { coordinators: 1, nodes: 3, replicas: 3, shards: 128 };

/// For how long lines are counted, and how many there may be.
const WATCH: Duration = Duration::from_secs(20);
const LINES_A_SECOND: usize = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_participant_that_is_dead_does_not_make_the_others_fill_their_disks() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start(folder.path(), MANY).await;
    drill.process(Server::Participant(3)).kill().expect("it runs");
    let lines = |drill: &Drill| -> Vec<usize> {
        let cluster = &drill.cluster;
        let rest = cluster.coordinators.iter().chain(&cluster.participants[..2]);
        rest.map(|process| fs::read_to_string(process.log()).expect("it has a log").lines().count()).collect()
    };
    let (before, began) = (lines(&drill), Instant::now());
    // It is a rate that is measured, so time has to pass; transactions go on meanwhile.
    drill.until_served().await;
    let mut config = drill.cluster.client_config().expect("certificates");
    config.timeout = PATIENCE;
    let client = in_time(Client::connect(config)).await.expect("the cluster is there");
    let writers = Writers::start(&client, 4);
    sleep(WATCH.saturating_sub(began.elapsed())).await;
    let seconds = began.elapsed().as_secs_f64();
    let more: Vec<usize> = lines(&drill).iter().zip(&before).map(|(after, before)| after - before).collect();
    println!("{more:?} lines in {seconds:.1} s");
    assert!(
        more.iter().all(|more| (*more as f64) < LINES_A_SECOND as f64 * seconds),
        "{more:?} in {seconds} s"
    );
    let ledger = writers.stop().await;
    assert_eq!(ledger.audit(&client).await, Findings::default());
    client.close().await;
    drill.end().await;
}
