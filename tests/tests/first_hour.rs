//! What a developer tries in the first hour: closures of every natural form, whatever is at hand as a key or value, and
//! mistakes, each of which gets an answer that helps.

use std::error::Error as StdError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::time::sleep;
use troth_sdk::{Bytes, Client, ClientConfig, Commit, Error, KeyRange, Outcome};
use troth_tests::{Embedded, PATIENCE, in_time};

/// Only names of the SDK, so that an application can write down every type that it meets.
#[expect(dead_code, reason = "that it compiles is all that it is for")]
mod names {
    use troth_sdk::{
        ClientId, ClusterMap, CredentialFiles, Credentials, Key, Kind, Node, NodeId, NodeState, Reject, Role,
        ShardId, Sockets, Timestamp, TlsError, Transport, TxnId, TxnIdError,
    };

    struct All {
        credentials: (Credentials, CredentialFiles, TlsError, Role),
        map: (ClusterMap, Node, NodeId, NodeState, ShardId),
        told: (Reject, TxnIdError, Kind, Key, Timestamp, TxnId, ClientId),
        network: (Box<dyn Transport>, Box<dyn Sockets>),
    }
}

#[derive(Debug)]
#[expect(dead_code, reason = "it is looked at as Debug shows it")]
enum Own {
    TooPoor,
    Troth(Error),
}

impl From<Error> for Own {
    fn from(error: Error) -> Own {
        Own::Troth(error)
    }
}

async fn natural(client: &Client) -> Result<u64, Error> {
    client
        .transact(async |tx| {
            tx.put("natural", "1")?;
            Ok(())
        })
        .await?;
    let read = client.transact(async |tx| tx.get("natural").await).await?;
    Ok(read.map_or(0, |value| value.len() as u64))
}

async fn with_an_own_error(client: &Client) -> Result<(), Own> {
    client
        .transact(async |tx| match tx.get("natural").await? {
            Some(value) if value.is_empty() => Err(Own::TooPoor),
            _ => Ok(tx.put("own", "1")?),
        })
        .await
}

async fn with_anyhow(client: &Client) -> anyhow::Result<()> {
    client
        .transact(async |tx| {
            let number: u64 = "12".parse()?;
            tx.put("anyhow", number.to_string())?;
            anyhow::Ok(())
        })
        .await
}

async fn with_a_box(client: &Client) -> Result<(), Box<dyn StdError + Send + Sync>> {
    client
        .transact(async |tx| {
            tx.put("box", "1")?;
            Ok::<_, Box<dyn StdError + Send + Sync>>(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn natural_closures_compile_and_arguments_are_what_is_at_hand() {
    let embedded = Embedded::start().await;
    let client = &embedded.client;
    assert_eq!(in_time(natural(client)).await.expect("it commits"), 1);
    in_time(with_an_own_error(client)).await.expect("it commits");
    in_time(with_anyhow(client)).await.expect("it commits");
    in_time(with_a_box(client)).await.expect("it commits");
    let (owned, bytes) = (String::from("at/string"), Bytes::from_static(b"at/bytes"));
    let put = client.transact(async |tx| {
        tx.put("at/str", vec![1u8])?;
        tx.put(&owned, &[2u8][..])?;
        tx.put(owned.clone() + "/2", bytes.clone())?;
        tx.put(b"at/array", "text")?;
        tx.put(bytes.clone(), String::from("text"))?;
        tx.delete(vec![b'x'])?;
        tx.get_many(["at/str", "at/string"]).await.map(drop)
    });
    in_time(put).await.expect("it commits");
    let snapshot = in_time(client.snapshot()).await.expect("a snapshot");
    for range in
        [KeyRange::prefix("at/"), KeyRange::prefix(String::from("at/")), KeyRange::between("at/", b"at0")]
    {
        assert_eq!(in_time(snapshot.scan(range, 100)).await.expect("readable").len(), 5);
    }
    assert!(ClientConfig::load("no/such/file").is_err());
    embedded.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_ends_its_transaction_gets_what_became_of_it() {
    let embedded = Embedded::start().await;
    let client = &embedded.client;
    let committed = client.transact(async |tx| {
        tx.put("by hand", "1")?;
        match tx.commit().await? {
            Commit::Committed { .. } => Ok(7),
            other => panic!("{other:?}"),
        }
    });
    assert_eq!(in_time(committed).await.map_err(|error: Error| error.to_string()), Ok(7));
    let rolled_back = client.transact(async |tx| {
        tx.put("rolled back", "1")?;
        tx.rollback();
        Ok::<_, Error>(8)
    });
    assert_eq!(in_time(rolled_back).await.map_err(|error| error.to_string()), Ok(8));
    // One that meets another transaction is run again, and can count that.
    let attempts = AtomicU32::new(0);
    let contended = client.transact(async |tx| {
        attempts.store(tx.attempt(), Ordering::Relaxed);
        let before = tx.get("contended").await?;
        if tx.attempt() == 1 {
            client.transact(async |other| other.put("contended", "other")).await?;
        }
        tx.put("contended", format!("{before:?}"))?;
        tx.commit().await.map(drop)
    });
    in_time(contended).await.map_err(|error: Error| error.to_string()).expect("the second run commits");
    assert_eq!(attempts.load(Ordering::Relaxed), 2);
    let snapshot = in_time(client.snapshot()).await.expect("a snapshot");
    let found = in_time(snapshot.get_many(["by hand", "rolled back"])).await.expect("readable");
    assert_eq!(found, [Some(Bytes::from_static(b"1")), None]);
    embedded.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_deadline_nothing_is_sent() {
    let embedded = Embedded::start().await;
    let mut config = embedded.cluster.client_config().expect("certificates");
    config.timeout = Duration::from_millis(300);
    let client = in_time(Client::connect(config)).await.expect("the cluster is there");
    let txn = std::sync::Mutex::new(None);
    let slow = client.transact(async |tx| {
        tx.put("slow/a", "1")?;
        tx.put("slow/b", "1")?;
        *txn.lock().expect("not poisoned") = Some(tx.id());
        sleep(Duration::from_millis(600)).await;
        Ok(())
    });
    let error: Error = in_time(slow).await.expect_err("it took too long");
    assert!(error.is_retriable(), "it is certain that nothing happened: {error}");
    assert!(error.to_string().contains("before the commit was sent"), "{error}");
    let txn = txn.lock().expect("not poisoned").expect("it ran");
    let outcome = in_time(embedded.client.outcome(txn)).await.expect("there is a leader");
    assert!(matches!(outcome, Outcome::Aborted { .. }), "{outcome:?}");
    in_time(client.close()).await;
    embedded.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_client_says_so_at_once_and_patience_may_be_endless() {
    let embedded = Embedded::start().await;
    let mut config = embedded.cluster.client_config().expect("certificates");
    config.timeout = Duration::MAX;
    let client = in_time(Client::connect(config.clone())).await.expect("the cluster is there");
    in_time(client.transact(async |tx| tx.put("patient", "1"))).await.expect("it commits");
    let open = in_time(client.begin()).await.expect("it begins");
    let snapshot = in_time(client.snapshot()).await.expect("a snapshot");
    in_time(client.close()).await;
    let began = Instant::now();
    let closed = |error: Error| assert!(matches!(error, Error::Closed), "{error}");
    closed(in_time(client.begin()).await.map(drop).expect_err("it is closed"));
    closed(in_time(client.transact(async |tx| tx.put("k", "v"))).await.expect_err("it is closed"));
    closed(in_time(snapshot.get("patient")).await.map(drop).expect_err("it is closed"));
    closed(in_time(open.get("patient")).await.map(drop).expect_err("it is closed"));
    assert!(began.elapsed() < PATIENCE / 4, "{:?}", began.elapsed());
    // One whose runtime is gone.
    let elsewhere = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(Client::connect(config)).expect("the cluster is there")
    });
    let orphan = elsewhere.join().expect("no panic");
    closed(in_time(orphan.begin()).await.map(drop).expect_err("its runtime is gone"));
    embedded.stop().await;
}
