//! The whole way, on the embedded cluster: real QUIC, real Raft logs, real RocksDB.

use std::time::Duration;

use troth_sdk::{Cause, Client, ClientConfig, Commit, Error, Key, KeyRange, Outcome, limits};
use troth_tests::{Embedded, in_time};

fn text(value: Option<&troth_sdk::Bytes>) -> Option<String> {
    value.map(|value| String::from_utf8_lossy(value).into_owned())
}

async fn put(client: &Client, pairs: &[(&str, &str)]) {
    let committed = client.transact(async |tx| pairs.iter().try_for_each(|(key, value)| tx.put(key, value)));
    in_time(committed).await.expect("it commits");
}

async fn get(client: &Client, key: &str) -> Option<String> {
    let snapshot = in_time(client.snapshot()).await.expect("a snapshot");
    text(in_time(snapshot.get(key)).await.expect("readable").as_ref())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_is_read_and_survives_a_restart() {
    let first = Embedded::start().await;
    let pairs: Vec<(String, String)> = (0..100).map(|n| (format!("key-{n}"), format!("value-{n}"))).collect();
    let all: Vec<(&str, &str)> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    put(&first.client, &all).await;
    put(&first.client, &[("one", "shard")]).await;
    let folder = first.stop().await;

    let second = Embedded::start_in(folder).await;
    for (key, value) in &all {
        assert_eq!(get(&second.client, key).await.as_deref(), Some(*value));
    }
    assert_eq!(get(&second.client, "one").await.as_deref(), Some("shard"));
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_sees_one_moment_and_its_own_writes() {
    let troth = Embedded::start().await;
    let client = &troth.client;
    put(client, &[("a", "1"), ("b", "1"), ("gone", "1")]).await;

    let tx = client.begin().await.expect("begins");
    let snapshot = client.snapshot().await.expect("a snapshot");
    put(client, &[("a", "2"), ("new", "2")]).await;
    client.transact(async |tx| tx.delete("gone")).await.expect("deletes");

    assert_eq!(text(tx.get("a").await.expect("readable").as_ref()).as_deref(), Some("1"));
    assert_eq!(tx.get("new").await.expect("readable"), None);
    tx.put("b", "mine").expect("small");
    tx.put("c", "mine").expect("small");
    tx.delete("gone").expect("small");
    assert_eq!(text(tx.get("b").await.expect("readable").as_ref()).as_deref(), Some("mine"));
    assert_eq!(tx.get("gone").await.expect("readable"), None);
    let rows = tx.scan(KeyRange::prefix(b""), 10).await.expect("readable");
    let keys: Vec<String> = rows.iter().map(|(key, _)| key.to_string()).collect();
    assert_eq!(keys, ["a", "b", "c"], "its own writes, and nothing later");

    let rows = snapshot.scan(KeyRange::prefix(b""), 10).await.expect("readable");
    let keys: Vec<String> = rows.iter().map(|(key, _)| key.to_string()).collect();
    assert_eq!(keys, ["a", "b", "gone"]);
    let commit = tx.commit().await.expect("an answer");
    assert!(matches!(commit, Commit::Aborted { .. }), "what it read has changed: {commit:?}");
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scans_are_in_order_over_all_shards_and_in_pages() {
    let troth = Embedded::start().await;
    let client = &troth.client;
    let keys: Vec<String> = (0..500).map(|n| format!("k/{n:04}")).collect();
    let pairs: Vec<(&str, &str)> = keys.iter().map(|key| (key.as_str(), "v")).collect();
    put(client, &pairs).await;
    put(client, &[("{tag}/a", "1"), ("{tag}/b", "2"), ("{tag}", "0"), ("{tagg}", "3")]).await;

    let snapshot = client.snapshot().await.expect("a snapshot");
    let found = snapshot.scan(KeyRange::prefix(b"k/"), usize::MAX).await.expect("readable");
    let found: Vec<String> = found.into_iter().map(|(key, _)| key.to_string()).collect();
    assert_eq!(found, keys);

    let mut paged = Vec::new();
    let mut range = KeyRange::prefix(b"k/");
    loop {
        let page = snapshot.scan(range.clone(), 37).await.expect("readable");
        let Some((last, _)) = page.last() else { break };
        range.start = Key::copy_from(&[last.as_bytes(), &[0]].concat());
        paged.extend(page.iter().map(|(key, _)| key.to_string()));
    }
    assert_eq!(paged, keys);

    let tagged = snapshot.scan(KeyRange::prefix(b"{tag}"), 10).await.expect("readable");
    let tagged: Vec<String> = tagged.into_iter().map(|(key, _)| key.to_string()).collect();
    assert_eq!(tagged, ["{tag}", "{tag}/a", "{tag}/b"]);
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_refused_with_what_would_be_right() {
    let troth = Embedded::start().await;
    let tx = troth.client.begin().await.expect("begins");
    let check = |result: Result<(), Error>, words: &str| {
        let error = result.expect_err("too large");
        assert!(error.is_fatal() && error.to_string().contains(words), "{error}");
    };
    check(tx.put(vec![b'k'; limits::KEY_BYTES_MAX + 1], "v"), "a key has 4097 bytes; at most 4096 may be");
    check(
        tx.put("k", vec![0; limits::VALUE_BYTES_MAX + 1]),
        "a value has 1048577 bytes; at most 1048576 may be",
    );
    let large = vec![7; limits::VALUE_BYTES_MAX];
    let too_many = (0..40).map(|n| tx.put(format!("large-{n}"), &large)).find(Result::is_err);
    check(too_many.expect("40 MiB do not fit"), "bytes; at most 33554432 may be");

    // The largest transaction that may be is committed and read back.
    let tx = troth.client.begin().await.expect("begins");
    for number in 0..31 {
        tx.put(format!("large-{number}"), &large).expect("31 MiB fit");
    }
    assert!(matches!(in_time(tx.commit()).await, Ok(Commit::Committed { .. })));
    let snapshot = troth.client.snapshot().await.expect("a snapshot");
    let names: Vec<String> = (0..31).map(|number| format!("large-{number}")).collect();
    let values = in_time(snapshot.get_many(&names)).await.expect("readable");
    assert!(values.iter().all(|value| value.as_deref() == Some(&large[..])));

    let tx = troth.client.begin().await.expect("begins");
    for number in 0..limits::TXN_KEYS_MAX {
        tx.put(format!("small-{number}"), "v").expect("a hundred thousand keys fit");
    }
    check(tx.put("one more", "v"), "the transaction has 100001 keys; at most 100000 may be");
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_closures_own_errors_come_back_untouched_and_nothing_is_written() {
    #[derive(Debug)]
    enum Own {
        Broke(u32),
        Troth(Error),
    }
    impl From<Error> for Own {
        fn from(error: Error) -> Own {
            Own::Troth(error)
        }
    }
    let troth = Embedded::start().await;
    let result: Result<(), Own> = troth
        .client
        .transact(async |tx| {
            tx.put("never", "written")?;
            Err(Own::Broke(7))
        })
        .await;
    assert!(matches!(result, Err(Own::Broke(7))), "{result:?}");
    assert_eq!(get(&troth.client, "never").await, None);
    let refused: Result<(), Own> =
        troth.client.transact(async |tx| Ok(tx.put("k", vec![0; limits::VALUE_BYTES_MAX + 1])?)).await;
    assert!(matches!(refused, Err(Own::Troth(Error::Limit { .. }))), "{refused:?}");
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_name_the_key_and_an_ended_transaction_is_over() {
    let troth = Embedded::start().await;
    let client = &troth.client;
    put(client, &[("contended", "0")]).await;
    let (first, second) = (client.begin().await.expect("begins"), client.begin().await.expect("begins"));
    for tx in [&first, &second] {
        tx.get("contended").await.expect("readable");
        tx.put("contended", "mine").expect("small");
    }
    assert!(matches!(first.clone().commit().await, Ok(Commit::Committed { .. })));
    match second.commit().await.expect("an answer") {
        Commit::Aborted { cause: Cause::ReadConflict { key, .. } } => assert_eq!(key, "contended".into()),
        other => panic!("the second must see that it was too late: {other:?}"),
    }
    assert!(matches!(first.put("k", "v"), Err(Error::Ended)));
    assert!(matches!(first.commit().await, Err(Error::Ended)));
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outcome_is_the_same_for_ever_and_asking_settles_it() {
    let troth = Embedded::start().await;
    let client = &troth.client;
    let (two_shards, one_shard) =
        (client.begin().await.expect("begins"), client.begin().await.expect("begins"));
    two_shards.put("a", "1").and_then(|()| two_shards.put("b", "1")).expect("small");
    one_shard.put("c", "1").expect("small");
    for tx in [two_shards, one_shard] {
        let id = tx.id();
        let Ok(Commit::Committed { commit_ts }) = tx.commit().await else { panic!("it commits") };
        for _ in 0..2 {
            let outcome = in_time(client.outcome(id)).await.expect("an answer");
            assert_eq!(outcome, Outcome::Committed { commit_ts });
        }
    }

    // Asked before it is committed: it can never commit then.
    for keys in [&["d", "e"][..], &["f"]] {
        let tx = client.begin().await.expect("begins");
        keys.iter().try_for_each(|key| tx.put(key, "1")).expect("small");
        let id = tx.id();
        let outcome = in_time(client.outcome(id)).await.expect("an answer");
        assert!(matches!(outcome, Outcome::Aborted { .. }), "{outcome:?}");
        let commit = tx.commit().await.expect("an answer");
        assert!(matches!(commit, Commit::Aborted { .. }), "{commit:?}");
        assert_eq!(in_time(client.outcome(id)).await.expect("an answer"), outcome);
    }
    assert_eq!(get(client, "d").await, None);
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_goes_on_when_the_wall_clock_jumps() {
    let troth = Embedded::start().await;
    let mut last = troth.client.snapshot().await.expect("a snapshot").timestamp();
    for jump in [0, -3_600_000, 1_800_000, -10_000_000, 0] {
        troth.cluster.clock().set_offset_millis(jump);
        put(&troth.client, &[("jump", &jump.to_string())]).await;
        assert_eq!(get(&troth.client, "jump").await, Some(jump.to_string()));
        let now = troth.client.snapshot().await.expect("a snapshot").timestamp();
        assert!(now > last, "{now} after {last}");
        last = now;
    }
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_not_there_is_an_error_by_the_deadline() {
    let troth = Embedded::start().await;
    let mut config: ClientConfig = troth.cluster.client_config().expect("certificates");
    config.coordinators = vec!["127.0.0.1:9".into()];
    config.timeout = Duration::from_millis(1500);
    let begin = std::time::Instant::now();
    let error = Client::connect(config).await.err().expect("nobody is there");
    assert!(error.is_retriable() && error.to_string().contains("no coordinator answers"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(6), "{:?}", begin.elapsed());
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_a_frame_of_values_is_read_at_once() {
    let test = Embedded::start().await;
    // All on one shard, and together larger than any frame may be.
    let keys: Vec<String> = (0..60).map(|n| format!("{{large}}/{n:02}")).collect();
    let value = |key: &str| key.as_bytes()[8..].repeat(limits::VALUE_BYTES_MAX / 2);
    assert!(keys.len() * limits::VALUE_BYTES_MAX > limits::FRAME_BYTES_MAX);
    for some in keys.chunks(20) {
        let write = test.client.transact(async |tx| some.iter().try_for_each(|key| tx.put(key, value(key))));
        in_time(write).await.expect("it commits");
    }
    let snapshot = in_time(test.client.snapshot()).await.expect("a snapshot");
    let found = in_time(snapshot.get_many(&keys)).await.expect("readable");
    for (key, found) in keys.iter().zip(found) {
        assert_eq!(found.as_deref(), Some(&value(key)[..]), "{key}");
    }
    test.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_of_nothing_watches_nothing() {
    let test = Embedded::start().await;
    let tx = in_time(test.client.begin()).await.expect("begins");
    assert_eq!(in_time(tx.scan(KeyRange::prefix(b""), 0)).await.expect("readable"), []);
    tx.put("mine", "1").expect("small");
    put(&test.client, &[("other", "1")]).await;
    assert!(matches!(in_time(tx.commit()).await, Ok(Commit::Committed { .. })));
    test.stop().await;
}
