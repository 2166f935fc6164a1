//! Those who do not know how to behave: QUIC clients with a proper certificate, or none, that send what nobody
//! should.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use quinn::crypto::rustls::QuicClientConfig;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use troth_protocol::message::samples;
use troth_protocol::wire::{self, HEADER_BYTES, HELLO_BYTES, Hello};
use troth_sdk::Client;
use troth_sdk::harness::processes::{Process, Processes};
use xxhash_rust::xxh3::Xxh3;

use crate::{SMALL, logging, programs};

/// How long somebody who is rude waits for anything.
const PATIENCE: Duration = Duration::from_secs(5);

/// A QUIC client with the certificate of a cluster that has this name, and no manners.
///
/// # Errors
/// Why there is no connection.
pub async fn connect(
    cluster: &Path,
    certificate: &str,
    server: SocketAddr,
    name: &str,
) -> Result<Connection, String> {
    let read = |file: &str| CertificateDer::from_pem_file(cluster.join(file)).expect("written by the layout");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(read("ca.pem")).expect("an authority");
    let key = PrivateKeyDer::from_pem_file(cluster.join(format!("{certificate}-key.pem"))).expect("a key");
    let mut tls =
        rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![read(&format!("{certificate}.pem"))], key)
            .expect("a certificate and its key");
    tls.alpn_protocols = vec![b"troth".to_vec()];
    let tls = QuicClientConfig::try_from(tls).expect("usable for QUIC");
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).map_err(|error| error.to_string())?;
    let config = quinn::ClientConfig::new(Arc::new(tls));
    let connecting = endpoint.connect_with(config, server, name).map_err(|error| error.to_string())?;
    let connected = timeout(PATIENCE, connecting).await.map_err(|_| "it takes too long".to_owned())?;
    connected.map_err(|error| error.to_string())
}

/// Says hello as it should be said, and returns the stream that it was said on.
///
/// # Errors
/// If the server does not return it.
pub async fn hello(connection: &Connection) -> Result<quinn::SendStream, String> {
    let said = async {
        let (mut send, mut receive) = connection.open_bi().await.map_err(|error| error.to_string())?;
        send.write_all(&Hello::OURS.to_bytes()).await.map_err(|error| error.to_string())?;
        let mut answer = [0; HELLO_BYTES];
        receive.read_exact(&mut answer).await.map_err(|error| error.to_string())?;
        Ok(send)
    };
    timeout(PATIENCE, said).await.map_err(|_| "no hello in return".to_owned())?
}

/// Ways to be rude.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Manner {
    /// Datagrams that are not QUIC, or begin as if they were.
    Datagrams,
    /// A connection that is left alone before or in the middle of its hello.
    HalfHello,
    /// Something else than a hello.
    NoHello,
    /// Frames of which some bytes are wrong.
    Damaged,
    /// Frames with the right checksum over a payload that nobody has written.
    Forged,
    /// A frame that ends early, with the end of the stream or without.
    CutOff,
    /// A header that promises more than is ever sent, many times.
    Promises,
    /// Streams that are opened and reset, or not read.
    Streams,
    /// Streams in the wrong direction, with garbage.
    OneWay,
    /// Requests that are well-formed and make no sense.
    Senseless,
}

impl Manner {
    /// All of them.
    pub const ALL: [Manner; 10] = [
        Manner::Datagrams,
        Manner::HalfHello,
        Manner::NoHello,
        Manner::Damaged,
        Manner::Forged,
        Manner::CutOff,
        Manner::Promises,
        Manner::Streams,
        Manner::OneWay,
        Manner::Senseless,
    ];
}

/// Where to be rude.
#[derive(Clone, Debug)]
pub struct Target {
    /// The folder with the certificates of the cluster.
    pub cluster: PathBuf,
    /// Its servers, and their names in certificates.
    pub servers: Vec<(SocketAddr, &'static str)>,
}

impl Target {
    /// All servers that a client knows.
    ///
    /// # Panics
    /// If they have no addresses.
    pub fn of(cluster: &Path, client: &Client) -> Target {
        let map = client.map();
        let address = |address: &str| address.parse::<SocketAddr>().expect("host:port");
        let coordinators = map.coordinators.iter().map(|node| (address(&node.address), "coordinator.troth"));
        let nodes = map.nodes.iter().map(|node| (address(&node.address), "participant.troth"));
        Target { cluster: cluster.to_owned(), servers: coordinators.chain(nodes).collect() }
    }

    /// Is rude once, and tells how; `None` if there was nobody to be rude to.
    pub async fn offend(&self, rng: &mut StdRng) -> Option<Manner> {
        let manner = *Manner::ALL.choose(rng).expect("there are some");
        let (server, name) = *self.servers.choose(rng).expect("there are some");
        if manner == Manner::Datagrams {
            return datagrams(server, rng).ok().map(|()| manner);
        }
        // Whoever has the certificate of a server and says something that makes sense is believed.
        let certificate = match manner {
            Manner::Forged | Manner::Senseless => "client",
            _ => ["client", "participant-1", "coordinator-1"].choose(rng).expect("three"),
        };
        let connection = connect(&self.cluster, certificate, server, name).await.ok()?;
        // However it ends: it is not the one who is rude who may complain.
        let _ = be(manner, connection, rng).await;
        Some(manner)
    }
}

/// Is rude in some manner to a server that listens.
async fn be(manner: Manner, connection: Connection, rng: &mut StdRng) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    match manner {
        Manner::HalfHello => {
            let (mut send, _receive) = connection.open_bi().await.map_err(|error| text(&error))?;
            let bytes = Hello::OURS.to_bytes();
            let said = &bytes[..rng.random_range(0..HELLO_BYTES)];
            send.write_all(said).await.map_err(|error| text(&error))?;
            if rng.random_bool(0.5) {
                // The server does not wait for ever.
                let _ = timeout(Duration::from_millis(rng.random_range(1..6_000)), connection.closed()).await;
            }
            return Ok(());
        }
        Manner::NoHello => {
            let (mut send, _receive) = connection.open_bi().await.map_err(|error| text(&error))?;
            send.write_all(&garbage(rng, 200)).await.map_err(|error| text(&error))?;
            let _ = timeout(PATIENCE, connection.closed()).await;
            return Ok(());
        }
        _ => {}
    }
    let _lane = hello(&connection).await?;
    for _ in 0..rng.random_range(1..30) {
        match manner {
            Manner::OneWay => {
                let mut send = connection.open_uni().await.map_err(|error| text(&error))?;
                send.write_all(&garbage(rng, 5_000)).await.map_err(|error| text(&error))?;
            }
            Manner::Streams => {
                let (mut send, mut receive) = connection.open_bi().await.map_err(|error| text(&error))?;
                let written = send.write_all(&frame(payload(rng), rng)[..20]).await;
                written.map_err(|error| text(&error))?;
                if rng.random_bool(0.5) {
                    let _ = send.reset(rng.random_range(0..1_000_u32).into());
                }
                if rng.random_bool(0.5) {
                    let _ = receive.stop(rng.random_range(0..1_000_u32).into());
                }
            }
            _ => {
                let bytes = said(manner, rng);
                let stream = connection.open_bi();
                let opened = timeout(PATIENCE, stream).await.map_err(|_| "no stream".to_owned())?;
                let (mut send, mut receive) = opened.map_err(|error| text(&error))?;
                send.write_all(&bytes).await.map_err(|error| text(&error))?;
                if rng.random_bool(0.7) {
                    let _ = send.finish();
                }
                if rng.random_bool(0.3) {
                    let mut answer = [0; 64];
                    let _ = timeout(Duration::from_millis(50), receive.read(&mut answer)).await;
                }
            }
        }
    }
    Ok(())
}

fn datagrams(server: SocketAddr, rng: &mut StdRng) -> std::io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    for _ in 0..rng.random_range(1..50) {
        let mut bytes = garbage(rng, 1_500);
        if rng.random_bool(0.7) && bytes.len() > 6 {
            // A packet with a long header, in the first version of QUIC; or with a short one.
            bytes[0] = if rng.random_bool(0.7) { 0xc0 | bytes[0] & 0x3f } else { 0x40 | bytes[0] & 0x3f };
            bytes[1..5].copy_from_slice(&[0, 0, 0, rng.random_range(0..3)]);
        }
        socket.send_to(&bytes, server)?;
    }
    Ok(())
}

/// What is said on a stream of its own.
fn said(manner: Manner, rng: &mut StdRng) -> Vec<u8> {
    match manner {
        Manner::Damaged => {
            let mut bytes = frame(payload(rng), rng);
            damage(&mut bytes, rng);
            bytes
        }
        Manner::Forged => {
            let mut payload = payload(rng);
            damage(&mut payload, rng);
            frame(payload, rng)
        }
        Manner::CutOff => {
            let mut bytes = frame(payload(rng), rng);
            bytes.truncate(rng.random_range(0..bytes.len()));
            bytes
        }
        Manner::Promises => {
            let mut header = frame(payload(rng), rng);
            header.truncate(HEADER_BYTES);
            let length: u32 = rng.random_range(1 << 10..48 << 20);
            header[8..12].copy_from_slice(&length.to_be_bytes());
            header.extend(garbage(rng, 2_000));
            header
        }
        _ => frame(payload(rng), rng),
    }
}

/// The bytes of some request.
fn payload(rng: &mut StdRng) -> Vec<u8> {
    wire::encode(samples::requests().choose(rng).expect("there are some"))
}

/// A frame with the right length and checksum over any payload.
fn frame(payload: Vec<u8>, rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&wire::MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&[wire::VERSION as u8, 1]);
    bytes[8..12].copy_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes[12..16].copy_from_slice(&rng.random_range(0..2_000_u32).to_be_bytes());
    bytes[16..24].copy_from_slice(&rng.random::<u64>().to_be_bytes());
    bytes.extend(payload);
    let mut sum = Xxh3::new();
    sum.update(&bytes[..24]);
    sum.update(&bytes[HEADER_BYTES..]);
    bytes[24..32].copy_from_slice(&sum.digest().to_be_bytes());
    bytes
}

/// Changes some bytes, each once, so that it is certainly not what it was.
fn damage(bytes: &mut [u8], rng: &mut StdRng) {
    let count = rng.random_range(1..6).min(bytes.len());
    for at in rand::seq::index::sample(rng, bytes.len(), count) {
        bytes[at] ^=
            if rng.random_bool(0.5) { 1 << rng.random_range(0..8) } else { rng.random_range(1..=255) };
    }
}

fn garbage(rng: &mut StdRng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; rng.random_range(1..most)];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// What to do, and for how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// For how long everybody is rude.
    pub time: Duration,
    /// Where the choices come from.
    pub seed: u64,
    /// How many are rude at a time.
    pub clients: usize,
}

/// What became of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How often each manner was shown.
    pub offences: BTreeMap<Manner, u64>,
    /// Transactions of somebody who behaves.
    pub served: u64,
    /// The longest time between two of them.
    pub longest_gap: Duration,
    /// What each server has in memory when somebody is rude for the first time, and in the end: bytes.
    pub memory: Vec<(String, u64, u64)>,
    /// What must not have happened.
    pub complaints: Vec<String>,
}

/// How much more memory a server may need in the end. Buffers and caches grow with what good clients do, too.
const GROWTH_MAX: u64 = 256 << 20;

/// How long somebody who behaves may have to wait.
const GAP_MAX: Duration = Duration::from_secs(5);

/// Lets many be rude to a cluster while one behaves.
///
/// # Panics
/// If the cluster does not start.
pub async fn run(plan: &Plan) -> Outcome {
    let folder = tempfile::tempdir().expect("a temporary folder");
    logging();
    let mut cluster = Processes::create(folder.path(), programs(), SMALL).expect("laid out");
    for process in cluster.all_mut() {
        // So little that what the one who behaves writes does not fill the room that is left for those who do not.
        let text = fs::read_to_string(process.config()).expect("a configuration");
        let memory = "\n[memory]\ncache_mib = 16\nwrite_buffers_mib = 16\n";
        fs::write(process.config(), text + memory).expect("writable");
    }
    cluster.start().expect("started");
    let client = crate::connect(&cluster).await;
    let target = Arc::new(Target::of(folder.path(), &client));
    let behaved = serve_once(&client, 0).await;
    behaved.expect("the cluster serves before anybody is rude");
    let before = memory(&mut cluster);

    let until = Instant::now() + plan.time;
    let mut rude = JoinSet::new();
    for number in 0..plan.clients {
        let (target, mut rng) =
            (target.clone(), StdRng::seed_from_u64(plan.seed.wrapping_add(number as u64)));
        rude.spawn(async move {
            let mut offences: BTreeMap<Manner, u64> = BTreeMap::new();
            while Instant::now() < until {
                match target.offend(&mut rng).await {
                    Some(manner) => *offences.entry(manner).or_default() += 1,
                    None => sleep(Duration::from_millis(10)).await,
                }
            }
            offences
        });
    }
    let (mut served, mut longest_gap, mut complaints) = (0, Duration::ZERO, Vec::new());
    while Instant::now() < until {
        let began = Instant::now();
        match serve_once(&client, served).await {
            Ok(()) => served += 1,
            Err(error) => complaints.push(format!("a transaction of somebody who behaves fails: {error}")),
        }
        longest_gap = longest_gap.max(began.elapsed());
    }
    let mut offences: BTreeMap<Manner, u64> = BTreeMap::new();
    while let Some(shown) = rude.join_next().await {
        for (manner, count) in shown.expect("whoever is rude does not panic") {
            *offences.entry(manner).or_default() += count;
        }
    }
    if longest_gap > GAP_MAX {
        complaints.push(format!("somebody who behaves had to wait for {longest_gap:?}"));
    }
    for process in cluster.all_mut() {
        if let Ok(Some(status)) = process.ended() {
            complaints.push(format!("{} has ended: {status}", process.name));
        }
    }
    let after = memory(&mut cluster);
    let memory: Vec<(String, u64, u64)> =
        before.into_iter().zip(after).map(|((name, before), (_, after))| (name, before, after)).collect();
    for (name, before, after) in &memory {
        if after.saturating_sub(*before) > GROWTH_MAX {
            complaints.push(format!("{name} has grown from {before} to {after} bytes"));
        }
    }
    client.close().await;
    Outcome { offences, served, longest_gap, memory, complaints }
}

/// One transaction, on several shards as a rule.
async fn serve_once(client: &Client, number: u64) -> Result<(), troth_sdk::Error> {
    let work = client.transact(async |tx| {
        let count = tx.get("count").await?.map_or(0, |count| count.len() as u64);
        tx.put("count", vec![b'x'; (count as usize + 1) % 50])?;
        tx.put(format!("key-{}", number % 64), number.to_string())
    });
    work.await
}

/// What each server has in memory.
fn memory(cluster: &mut Processes) -> Vec<(String, u64)> {
    let resident = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    let of = |process: &mut Process| (process.name.clone(), process.pid().and_then(resident).unwrap_or(0));
    cluster.all_mut().map(of).collect()
}
