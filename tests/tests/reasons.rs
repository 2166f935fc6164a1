//! Whatever keeps a client from its cluster, the error says it: who was asked, what came of it, what to do. What waiting
//! does not mend is said at once.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use troth_protocol::net::tls::{Authority, Credentials};
use troth_sdk::harness::processes::Processes;
use troth_sdk::{Client, ClientConfig, Role};
use troth_tests::{SMALL, in_time, processes, programs};

/// How long a client would wait.
const TIMEOUT: Duration = Duration::from_secs(8);

struct Scene {
    cluster: Processes,
    good: ClientConfig,
}

impl Scene {
    async fn connect(&self, coordinators: &[&str], credentials: Credentials) -> (String, Duration) {
        let mut config = ClientConfig::new(coordinators.iter().copied(), credentials);
        (config.bind, config.timeout) = (self.good.bind, TIMEOUT);
        let began = Instant::now();
        let error = in_time(Client::connect(config)).await.map(drop).expect_err("it cannot connect");
        println!("{error}");
        (error.to_string(), began.elapsed())
    }

    /// It is said at once, in these words.
    async fn at_once(&self, coordinators: &[&str], credentials: Credentials, words: &str) {
        let (error, took) = self.connect(coordinators, credentials).await;
        assert!(error.contains(words), "{error}");
        assert!(took < TIMEOUT / 2, "{took:?}: {error}");
    }

    /// It may change, so it is waited for, and then said in these words.
    async fn in_the_end(&self, coordinators: &[&str], words: &str) {
        let (error, took) = self.connect(coordinators, self.good.credentials.clone()).await;
        assert!(error.contains(words), "{error}");
        assert!(took >= TIMEOUT, "{took:?}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_keeps_a_client_from_its_cluster_is_in_the_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let (cluster, client) = processes(folder.path(), SMALL).await;
    let participant = client.map().nodes[0].address.clone();
    client.close().await;
    let good = cluster.client_config().expect("certificates");
    let (own, address) = (good.credentials.clone(), good.coordinators[0].clone());
    let scene = Scene { cluster, good };
    let stranger = Authority::create(own.identity().cluster).expect("an authority");
    let issued = stranger.issue(Role::Client, "stranger", Duration::from_secs(3600)).expect("issued");
    let of_stranger = Credentials::from_pem(stranger.certificate(), &issued).expect("well-formed");
    scene.at_once(&[&address], of_stranger, "its certificate is of another cluster").await;
    let authority = scene.cluster.layout().authority().expect("it is there");
    let mixed = Credentials::from_pem(authority.certificate(), &issued).expect("well-formed");
    scene.at_once(&[&address], mixed, "our certificate is of another cluster").await;
    let brief = authority.issue(Role::Client, "brief", Duration::ZERO).expect("issued");
    let expired = Credentials::from_pem(authority.certificate(), &brief).expect("well-formed");
    tokio::time::sleep(Duration::from_secs(2)).await;
    scene.at_once(&[&address], expired, "our certificate has expired").await;
    scene.at_once(&["127.0.0.1"], own.clone(), "\"127.0.0.1\" is no address; write host:port").await;
    scene.at_once(&[&participant], own.clone(), "this is the address of another kind of server").await;
    scene.in_the_end(&["no-such-host.invalid:7450"], "no-such-host.invalid:7450").await;
    scene.in_the_end(&["127.0.0.1:9"], "coordinator at 127.0.0.1:9 cannot be reached: no answer").await;
    // And so does the command line.
    let file = folder.path().join("client.toml");
    let text = fs::read_to_string(&file).expect("readable").replace(&address, &participant);
    fs::write(folder.path().join("wrong.toml"), text).expect("writable");
    let told = Command::new(programs().join("troth"))
        .args(["--cluster", "wrong.toml", "get", "key"])
        .current_dir(folder.path())
        .output()
        .expect("it runs");
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(
        told.contains(&format!(
            "coordinator at {participant} cannot be used: its certificate is of another role"
        )),
        "{told}"
    );
}
