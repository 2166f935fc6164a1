//! What strict serializability forbids. `scripts/mutation` names those that must fail when
//! transactions are not checked, and runs them so.

use futures_util::future::join_all;
use troth_sdk::{Client, Commit, Error, KeyRange};
use troth_tests::{Embedded, in_time};

fn number(value: Option<troth_sdk::Bytes>) -> u64 {
    value.map_or(0, |value| String::from_utf8_lossy(&value).parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_concurrent_increments_add_up() {
    const CLIENTS: u64 = 50;
    const INCREMENTS: u64 = 200;
    const COUNTERS: u64 = 10;
    let troth = Embedded::start().await;
    let increments = (0..CLIENTS).map(|client| {
        let troth = troth.client.clone();
        tokio::spawn(async move {
            for round in 0..INCREMENTS {
                let counter = format!("counter/{}", (client + round) % COUNTERS);
                troth
                    .transact(async |tx| {
                        let count = number(tx.get(&counter).await?);
                        tx.put(&counter, (count + 1).to_string())
                    })
                    .await
                    .expect("it commits in the end");
            }
        })
    });
    for done in in_time(join_all(increments)).await {
        done.expect("no panic");
    }
    let snapshot = troth.client.snapshot().await.expect("a snapshot");
    for counter in 0..COUNTERS {
        let count = number(snapshot.get(format!("counter/{counter}")).await.expect("readable"));
        assert_eq!(count, CLIENTS * INCREMENTS / COUNTERS, "counter {counter}");
    }
    troth.stop().await;
}

/// How many of two transactions commit that both read all of `keys` before either commits, and then
/// write one each.
async fn both_read_then_write(client: &Client, keys: [&str; 2]) -> usize {
    client.transact(async |tx| keys.iter().try_for_each(|key| tx.put(key, "on call"))).await.expect("set up");
    let (first, second) = (client.begin().await.expect("begins"), client.begin().await.expect("begins"));
    for tx in [&first, &second] {
        let on_call = tx.get_many(keys).await.expect("readable");
        assert_eq!(on_call.iter().flatten().count(), 2, "both doctors are on call");
    }
    first.delete(keys[0]).expect("small");
    second.delete(keys[1]).expect("small");
    committed(first).await + committed(second).await
}

async fn committed(tx: troth_sdk::Transaction) -> usize {
    match in_time(tx.commit()).await.expect("an answer") {
        Commit::Committed { .. } => 1,
        Commit::Aborted { .. } => 0,
        Commit::Unknown { handle } => panic!("nothing has failed: {handle:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_doctors_cannot_both_leave() {
    let troth = Embedded::start().await;
    for (what, keys) in [("on two shards", ["alice", "bob"]), ("on one shard", ["{er}alice", "{er}bob"])] {
        let left = both_read_then_write(&troth.client, keys).await;
        assert_eq!(left, 1, "write skew {what}");
    }
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_inserted_into_a_range_that_was_read() {
    let troth = Embedded::start().await;
    for (what, prefix) in [("over all shards", "shift/"), ("on one shard", "{shift}/")] {
        let range = || KeyRange::prefix(prefix.as_bytes());
        let (first, second) =
            (troth.client.begin().await.expect("begins"), troth.client.begin().await.expect("begins"));
        for (tx, name) in [(&first, "a"), (&second, "b")] {
            let rows = tx.scan(range(), 100).await.expect("readable");
            assert_eq!(rows.len(), 0, "the shift is free");
            tx.put(format!("{prefix}{name}"), "mine").expect("small");
        }
        assert_eq!(committed(first).await + committed(second).await, 1, "phantom {what}");
    }
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_a_scan_guards_only_what_it_showed() {
    let troth = Embedded::start().await;
    let client = &troth.client;
    client
        .transact(async |tx| ["p/1", "p/2", "p/3"].iter().try_for_each(|key| tx.put(key, "v")))
        .await
        .expect("set up");
    let tx = client.begin().await.expect("begins");
    assert_eq!(tx.scan(KeyRange::prefix(b"p/"), 2).await.expect("readable").len(), 2);
    tx.put("result", "two").expect("small");
    client.transact(async |tx| tx.put("p/9", "behind the page")).await.expect("commits");
    assert_eq!(committed(tx).await, 1, "what was not shown does not matter");

    let tx = client.begin().await.expect("begins");
    assert_eq!(tx.scan(KeyRange::prefix(b"p/"), 2).await.expect("readable").len(), 2);
    tx.put("result", "two").expect("small");
    client.transact(async |tx| tx.put("p/11", "between")).await.expect("commits");
    assert_eq!(committed(tx).await, 0, "phantom inside a page");
    troth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_snapshot_sees_whole_transfers() {
    let troth = Embedded::start().await;
    let client = &troth.client;
    let accounts = ["a", "b", "c", "d"];
    client.transact(async |tx| accounts.iter().try_for_each(|key| tx.put(key, "100"))).await.expect("set up");
    let movers = (0..8usize).map(|mover| {
        let client = client.clone();
        tokio::spawn(async move {
            for round in 0..40 {
                let (from, to) = (accounts[(mover + round) % 4], accounts[(mover + 2 * round + 1) % 4]);
                if from == to {
                    continue;
                }
                let moved = client.transact(async |tx| {
                    let source = number(tx.get(from).await?);
                    let target = number(tx.get(to).await?);
                    tx.put(from, source.saturating_sub(1).to_string())?;
                    tx.put(to, (target + source.min(1)).to_string())?;
                    Ok::<_, Error>(())
                });
                moved.await.expect("it commits in the end");
            }
        })
    });
    let audits = async {
        for _ in 0..100 {
            let snapshot = client.snapshot().await.expect("a snapshot");
            let balances = snapshot.get_many(accounts).await.expect("readable");
            let total: u64 = balances.into_iter().map(number).sum();
            assert_eq!(total, 400, "a snapshot at {} is torn", snapshot.timestamp());
        }
    };
    let (moved, ()) = in_time(futures_util::future::join(join_all(movers), audits)).await;
    for done in moved {
        done.expect("no panic");
    }
    troth.stop().await;
}
