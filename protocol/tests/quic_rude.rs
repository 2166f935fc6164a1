//! Those who should not be there, or who do not know how to behave: they are told why they are put
//! out, and nobody else notices.

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::Instant;
use troth_protocol::message::{Request, Response, shard};
use troth_protocol::net::quic::Quic;
use troth_protocol::net::tls::{Authority, CERTIFICATE_VALIDITY, Credentials, Issued};
use troth_protocol::net::{Peer, Role, Transport};
use troth_protocol::wire::{self, HEADER_BYTES, Hello, Kind};
use troth_protocol::{Epoch, Reject};

use support::*;

/// Why a server closes a connection, as QUIC's application error codes say it.
const VERSION: u32 = 1;
const MALFORMED: u32 = 2;
const IDENTITY: u32 = 3;

/// A server, and somebody who is served and shall never notice anything.
struct Scene {
    cluster: Cluster,
    server: Arc<Quic>,
    peer: Peer,
    bystander: Arc<Quic>,
}

impl Scene {
    async fn new() -> Scene {
        let cluster = Cluster::new(1);
        let (server, peer) = cluster.serve(&Script::new());
        let bystander = cluster.open(Role::Client, "bystander");
        check_echo(&bystander, &peer, "before").await;
        Scene { cluster, server, peer, bystander }
    }

    fn issue(&self, role: Role) -> Issued {
        let issued = self.cluster.0.issue(role, "rude", CERTIFICATE_VALIDITY);
        issued.expect("a proper name")
    }

    /// A connection with a certificate of this cluster, on which nothing was said yet.
    async fn connect(&self) -> quinn::Connection {
        let issued = self.issue(Role::Client);
        let connection = connect(&self.cluster.0, &issued, self.server.local_addr());
        expect_soon("a connection", connection).await.expect("the certificate is good")
    }

    /// A connection that is closed must say so in these words, and only it may be closed.
    async fn check_put_out(&self, rude: &quinn::Connection, code: u32, reason: &str) {
        let closed = expect_soon(reason, rude.closed()).await;
        let quinn::ConnectionError::ApplicationClosed(close) = &closed else {
            panic!("{closed} instead of {reason}");
        };
        assert_eq!(String::from_utf8_lossy(&close.reason), reason);
        assert_eq!(close.error_code, code.into(), "{reason}");
        self.check_unnoticed().await;
    }

    async fn check_unnoticed(&self) {
        check_echo(&self.bystander, &self.peer, "after").await;
        let newcomer = self.cluster.open(Role::Client, "newcomer");
        check_echo(&newcomer, &self.peer, "also after").await;
    }
}

fn certificate(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate")
}

fn key(issued: &Issued) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).expect("a key")
}

/// Connects as QUIC would let anybody do who trusts an authority and has some certificate.
async fn connect(trusted: &Authority, shown: &Issued, to: SocketAddr) -> Result<quinn::Connection, String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate(trusted.certificate())).expect("an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3 exists")
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate(&shown.certificate)], key(shown))
        .expect("the key is that of the certificate");
    tls.alpn_protocols = vec![b"troth".to_vec()];
    let tls = QuicClientConfig::try_from(tls).expect("TLS 1.3 has what QUIC needs");
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port");
    endpoint
        .connect_with(quinn::ClientConfig::new(Arc::new(tls)), to, "participant.troth")
        .expect("a proper address")
        .await
        .map_err(|error| error.to_string())
}

/// A participant by its certificate, which answers hello with some bytes and requests with others.
fn babbler(cluster: &Cluster, hello: Vec<u8>, answer: Vec<u8>) -> Peer {
    let issued = cluster.0.issue(Role::Participant, "babbler", CERTIFICATE_VALIDITY);
    let issued = issued.expect("a proper name");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3 exists")
        .with_no_client_auth()
        .with_single_cert(vec![certificate(&issued.certificate)], key(&issued))
        .expect("the key is that of the certificate");
    tls.alpn_protocols = vec![b"troth".to_vec()];
    let tls = QuicServerConfig::try_from(tls).expect("TLS 1.3 has what QUIC needs");
    let config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    let endpoint = quinn::Endpoint::server(config, ([127, 0, 0, 1], 0).into()).expect("a free port");
    let peer = at(endpoint.local_addr().expect("bound"));
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let (hello, answer) = (hello.clone(), answer.clone());
            tokio::spawn(async move {
                let connection = incoming.await.expect("a handshake");
                let (mut send, mut receive) = connection.accept_bi().await.expect("the first stream");
                send.write_all(&hello).await.expect("the stream is open");
                // The other streams are only opened by what is said on them.
                let (mut other, _requests) = match connection.accept_bi().await {
                    Ok(streams) => streams,
                    Err(_) => return,
                };
                other.write_all(&answer).await.expect("the stream is open");
                // Until the caller has had enough.
                let _ = receive.read_to_end(1 << 20).await;
            });
        }
    });
    peer
}

/// A frame of a small read.
fn frame() -> Vec<u8> {
    let frame = wire::seal(Kind::Request, 7, 1_000, &read(AT_ONCE, "honest"));
    frame.expect("a small frame").to_vec()
}

/// Says the beginning of a conversation on a new stream.
async fn say(rude: &quinn::Connection, bytes: &[u8]) -> (quinn::SendStream, quinn::RecvStream) {
    let (mut send, receive) = rude.open_bi().await.expect("a stream");
    send.write_all(bytes).await.expect("the connection is open");
    (send, receive)
}

async fn hear_hello(receive: &mut quinn::RecvStream) {
    let mut hello = [0; wire::HELLO_BYTES];
    expect_soon("a hello", receive.read_exact(&mut hello)).await.expect("a hello");
    assert_eq!(Hello::agree(&hello), Ok(1));
}

/// Reads one answer, as it is.
async fn hear(receive: &mut quinn::RecvStream) -> Response {
    let mut head = [0; HEADER_BYTES];
    expect_soon("a header", receive.read_exact(&mut head)).await.expect("a header");
    let header = wire::Header::read(&head).expect("a proper header");
    let mut payload = vec![0; header.length as usize];
    expect_soon("a payload", receive.read_exact(&mut payload)).await.expect("a payload");
    wire::open(&head, &payload).expect("a proper frame");
    wire::decode(&payload).expect("a response")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_does_not_say_hello_is_put_out() {
    let scene = Scene::new().await;
    let check = async |hello: &[u8], code: u32, reason: &str| {
        let rude = scene.connect().await;
        let _streams = say(&rude, hello).await;
        scene.check_put_out(&rude, code, reason).await;
    };
    let not_troth = "not a Troth frame: it begins with 0x47455420";
    check(b"GET / HTTP/1.1\r\n\r\n", MALFORMED, not_troth).await;
    let hello = |version_min, version_max| Hello { version_min, version_max }.to_bytes();
    let too_new = "protocol version 9 is not supported; this side speaks 1 to 1";
    check(&hello(9, 10), VERSION, too_new).await;
    let too_old = "protocol version 0 is not supported; this side speaks 1 to 1";
    check(&hello(0, 0), VERSION, too_old).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_says_nothing_is_put_out_after_a_while() {
    let scene = Scene::new().await;
    let mute = scene.connect().await;
    let since = Instant::now();
    let reason = "no hello came within 5000 ms";
    scene.check_put_out(&mute, MALFORMED, reason).await;
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_no_frame_end_the_connection() {
    let scene = Scene::new().await;
    let check = async |bytes: &[u8], reason: &str| {
        // After hello on the first stream, and after an honest frame on another.
        let rude = scene.connect().await;
        let first = say(&rude, &[&Hello::OURS.to_bytes(), bytes].concat()).await;
        scene.check_put_out(&rude, MALFORMED, reason).await;
        drop(first);
        let rude = scene.connect().await;
        let _first = say(&rude, &Hello::OURS.to_bytes()).await;
        let _second = say(&rude, &[&frame(), bytes].concat()).await;
        scene.check_put_out(&rude, MALFORMED, reason).await;
    };
    let changed = |at: usize, byte: u8| {
        let mut frame = frame();
        frame[at] = byte;
        frame
    };
    check(&[b'x'; 40], "not a Troth frame: it begins with 0x78787878").await;
    let checksum = "the checksum of a frame does not match";
    check(&changed(HEADER_BYTES, 0xff), checksum).await;
    check(&changed(23, 0xff), checksum).await;
    let version = "protocol version 2 is not supported; this side speaks 1 to 1";
    check(&changed(4, 2), version).await;
    check(&changed(5, 3), "unknown frame kind 3").await;
    let mut oversized = frame();
    oversized[8..12].fill(0xff);
    let too_large = "a frame of 4294967295 bytes is larger than 50331648 allows";
    check(&oversized, too_large).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proper_frame_with_nonsense_in_it_is_only_refused() {
    let scene = Scene::new().await;
    let rude = scene.connect().await;
    let (mut send, mut receive) = say(&rude, &Hello::OURS.to_bytes()).await;
    hear_hello(&mut receive).await;
    let not_a_request = wire::seal(Kind::Request, 1, 1_000, &7u64).expect("a small frame");
    let a_response = wire::seal(Kind::Response, 2, 1_000, &read(AT_ONCE, "x")).expect("a small frame");
    for (nonsense, expected) in [(not_a_request, ""), (a_response, "a server was sent a response")] {
        send.write_all(&nonsense).await.expect("the connection is open");
        let answer = hear(&mut receive).await;
        let Response::Rejected(Reject::Malformed { reason }) = answer else {
            panic!("{answer:?}");
        };
        assert!(reason.contains(expected), "{reason}");
    }
    send.write_all(&frame()).await.expect("the connection is open");
    assert_eq!(bytes_of(hear(&mut receive).await), "honest");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_answer_that_is_not_fetched_does_not_hold_up_the_next_one() {
    let scene = Scene::new().await;
    let rude = scene.connect().await;
    let large = wire::seal(Kind::Request, 1, 10_000, &scan(AT_ONCE, 20 << 20)).expect("a small frame");
    let words = [&Hello::OURS.to_bytes()[..], &large, &frame()].concat();
    let (_send, mut receive) = say(&rude, &words).await;
    hear_hello(&mut receive).await;
    assert_eq!(bytes_of(hear(&mut receive).await), "honest");
    // It waits on a stream of its own.
    let mut fetched = expect_soon("a stream", rude.accept_uni()).await.expect("a stream");
    assert_eq!(bytes_of(hear(&mut fetched).await).len(), 20 << 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_ends_inside_a_frame_harms_nobody() {
    let scene = Scene::new().await;
    let rude = scene.connect().await;
    let (mut send, mut receive) = say(&rude, &Hello::OURS.to_bytes()).await;
    for length in [1, HEADER_BYTES, frame().len() - 1] {
        let (mut cut, mut answer) = say(&rude, &frame()[..length]).await;
        cut.finish().expect("open");
        let end = expect_soon("the end of the stream", answer.read_to_end(1_000)).await;
        assert_eq!(end, Ok(vec![]), "after {length} bytes");
    }
    send.write_all(&frame()).await.expect("the connection is open");
    hear_hello(&mut receive).await;
    assert_eq!(bytes_of(hear(&mut receive).await), "honest");
    scene.check_unnoticed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_may_not_speak_as_a_peer_and_is_served_on() {
    let scene = Scene::new().await;
    let finish = of_shard(shard::Request::Finish { epoch: Epoch(1), decisions: vec![] });
    let check = async |role: Role, request: Request| {
        let caller = scene.cluster.open(role, "caller");
        let expected = Response::Rejected(Reject::Forbidden {
            role: role.to_string(),
            request: request.name().to_owned(),
        });
        for _ in 0..3 {
            assert_eq!(caller.call(&scene.peer, request.clone(), soon()).await, Ok(expected.clone()));
            check_echo(&caller, &scene.peer, "something permitted").await;
        }
    };
    check(Role::Client, finish.clone()).await;
    check(Role::Admin, finish.clone()).await;
    check(Role::Participant, finish.clone()).await;
    check(Role::Client, numbered(1)).await;
    check(Role::Coordinator, numbered(1)).await;
    let coordinator = scene.cluster.open(Role::Coordinator, "coordinator");
    let answer = coordinator.call(&scene.peer, finish, soon()).await;
    assert_eq!(answer, Ok(Response::Shard(shard::Response::Finished)));
}

/// A call that cannot even connect says why.
async fn check_unreachable(caller: &Arc<Quic>, peer: &Peer, reason: &str) {
    let error = echo(caller, peer, "let me in").await.expect_err(reason);
    assert!(!error.is_ambiguous(), "{error}");
    assert_eq!(error.to_string(), format!("{peer} cannot be used: {reason}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_cluster_is_refused_by_both_sides() {
    let scene = Scene::new().await;
    let stranger = Cluster::new(2);
    let caller = stranger.open(Role::Client, "stranger");
    let theirs = "its certificate is of another cluster: our authority did not sign it";
    check_unreachable(&caller, &scene.peer, theirs).await;
    // One who trusts the server's authority, but shows a certificate of its own.
    let issued = stranger.0.issue(Role::Client, "stranger", CERTIFICATE_VALIDITY);
    let issued = issued.expect("a proper name");
    let credentials = Credentials::from_pem(scene.cluster.0.certificate(), &issued);
    let caller = open(&credentials.expect("proper text"));
    let ours = "our certificate is of another cluster: its authority did not sign it";
    check_unreachable(&caller, &scene.peer, ours).await;
    scene.check_unnoticed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_without_a_proper_identity_is_refused() {
    let scene = Scene::new().await;
    let check = async |uri: &str, reason: &str| {
        let authority = &scene.cluster.0;
        let key = KeyPair::from_pem(&authority.key()).expect("the authority's key");
        let issuer = Issuer::from_ca_cert_pem(authority.certificate(), key).expect("an authority");
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::URI(uri.try_into().expect("a URI")));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        let issued = Issued { certificate: certificate.pem(), key: key.serialize_pem() };
        let rude = connect(authority, &issued, scene.server.local_addr());
        let rude = expect_soon("a connection", rude).await.expect("the authority signed it");
        scene.check_put_out(&rude, IDENTITY, reason).await;
    };
    let nobody = "your certificate carries no Troth identity";
    check("https://example.com/", nobody).await;
    check("troth://01010101010101010101010101010101/emperor/me", nobody).await;
    let elsewhere = "your certificate is of cluster 02020202020202020202020202020202, \
                     this is 01010101010101010101010101010101";
    check("troth://02020202020202020202020202020202/client/me", elsewhere).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_poses_as_a_server_without_its_certificate() {
    let cluster = Cluster::new(1);
    let caller = cluster.open(Role::Client, "caller");
    let check = async |actual: Role, called: fn(&str) -> Peer, reason: &str| {
        let poser = cluster.open(actual, "poser");
        poser.serve(Script::new());
        let peer = called(&poser.local_addr().to_string());
        let error = echo(&caller, &peer, "who are you?").await.expect_err(reason);
        assert!(!error.is_ambiguous(), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    };
    let no_server = "certificate does not allow extended key usage for server authentication";
    check(Role::Client, Peer::coordinator, no_server).await;
    check(Role::Admin, Peer::participant, no_server).await;
    let another = "this is the address of another kind of server";
    check(Role::Participant, Peer::coordinator, another).await;
    check(Role::Coordinator, Peer::participant, another).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_talks_nonsense_is_left_with_its_own_words_as_the_reason() {
    let cluster = Cluster::new(1);
    let caller = cluster.open(Role::Client, "caller");
    let ours = Hello::OURS.to_bytes().to_vec();
    let check = async |hello: Vec<u8>, answer: &[u8], expected: &str| {
        let peer = babbler(&cluster, hello, answer.to_vec());
        let error = echo(&caller, &peer, "what?").await.expect_err(expected);
        assert_eq!(error.to_string().replace(&peer.to_string(), "it"), expected);
    };
    let new = Hello { version_min: 9, version_max: 9 };
    let version = "protocol version 9 is not supported; this side speaks 1 to 1";
    let unreachable = format!("it cannot be used: {version}");
    check(new.to_bytes().to_vec(), b"", &unreachable).await;
    let unreachable = "it cannot be reached: not a Troth frame: it begins with 0x78787878";
    check(vec![b'x'; 16], b"", unreachable).await;
    let lost = "the connection to it broke: not a Troth frame: it begins with 0x78787878";
    check(ours.clone(), &[b'x'; 40], lost).await;
    let mut damaged = wire::seal(Kind::Response, 1, 0, &Response::Rejected(Reject::Deposed))
        .expect("a small frame")
        .to_vec();
    damaged[HEADER_BYTES] ^= 1;
    let lost = "the connection to it broke: the checksum of a frame does not match";
    check(ours.clone(), &damaged, lost).await;
    let not_a_response = wire::seal(Kind::Response, 1, 0, &[7u8; 3]).expect("a small frame");
    let peer = babbler(&cluster, ours, not_a_response.to_vec());
    let error = echo(&caller, &peer, "what?").await.expect_err("three bytes are no response");
    assert!(error.to_string().contains("broke: malformed payload"), "{error}");
}
