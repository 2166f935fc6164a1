//! Spans of a transaction reach a collector from every process that had to do with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use parking_lot::Mutex;
use prost::Message;
use troth_sdk::Commit;
use troth_sdk::harness::processes::{Processes, Shape};
use troth_tests::drill::Drill;
use troth_tests::{eventually, in_time};

/// By trace: the name of each span, and the process that it is of.
type Seen = Arc<Mutex<BTreeMap<Vec<u8>, BTreeSet<(String, String)>>>>;

async fn collect(State(seen): State<Seen>, body: Bytes) {
    let request = ExportTraceServiceRequest::decode(body).expect("OTLP");
    for of_process in request.resource_spans {
        let about = of_process.resource.expect("it says who it is").attributes;
        let attribute = |key: &str| {
            let found = about.iter().find(|attribute| attribute.key == key).expect("it is there");
            match found.value.as_ref().and_then(|value| value.value.as_ref()) {
                Some(Value::StringValue(text)) => text.clone(),
                other => panic!("{key}: {other:?}"),
            }
        };
        let process = format!("{} {}", attribute("service.name"), attribute("service.instance.id"));
        for span in of_process.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
            seen.lock().entry(span.trace_id).or_default().insert((span.name, process.clone()));
        }
    }
}

/// A cluster that sends the spans of this share of its transactions to a collector of ours.
async fn start(folder: &tempfile::TempDir, share: f64) -> (Drill, Seen) {
    let seen = Seen::default();
    let router = Router::new().route("/v1/traces", post(collect)).with_state(seen.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, router).await });
    let shape = Shape { coordinators: 1, nodes: 3, replicas: 1, shards: 12 };
    let drill = Drill::start_with(folder.path(), shape, async |cluster: &mut Processes| {
        for process in cluster.all_mut() {
            let text = fs::read_to_string(process.config()).expect("a configuration");
            let trace = format!("\n[trace]\nendpoint = \"http://{address}\"\nshare = {share:?}\n");
            fs::write(process.config(), text + &trace).expect("writable");
        }
    })
    .await;
    drill.until_shared().await;
    (drill, seen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_that_is_done_for_a_transaction_is_one_trace() {
    let folder = tempfile::tempdir().expect("a folder");
    let (drill, seen) = start(&folder, 1.0).await;
    let [(first, _), (second, _)] = drill.two_keys("trace").await;
    let tx = in_time(drill.client.begin()).await.expect("a moment");
    let id = tx.id();
    for key in [&first, &second] {
        in_time(tx.get(key)).await.expect("it is read");
        tx.put(key, "1").expect("a sensible write");
    }
    let commit = in_time(tx.commit()).await;
    assert!(matches!(commit, Ok(Commit::Committed { .. })), "{commit:?}");
    let count = |name: &str, process: &str| {
        let seen = seen.lock();
        let of = seen.get(id.to_bytes().as_slice()).into_iter().flatten();
        of.filter(|(span, of)| span == name && of.starts_with(process)).count()
    };
    eventually("its spans have come from all three", async || {
        count("prepare", "troth-participant ") == 2
            && count("finish", "troth-participant ") == 2
            && ["commit", "ask for vote", "decide", "ask to finish"]
                .iter()
                .all(|name| count(name, "troth-coordinator 1") == 1)
    })
    .await;
    // Its trace is no other's: one begins for each transaction, and nothing else is sent.
    assert!(seen.lock().keys().all(|trace| trace.len() == 16));
    drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_processes_agree_on_which_transactions_are_sent() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut drill, seen) = start(&folder, 0.25).await;
    let [(first, _), (second, _)] = drill.two_keys("trace").await;
    const MANY: usize = 400;
    for number in 0..MANY {
        let tx = in_time(drill.client.begin()).await.expect("a moment");
        for home in [&first, &second] {
            tx.put(format!("{{{home}}}/{number}"), "1").expect("a sensible write");
        }
        let commit = in_time(tx.commit()).await;
        assert!(matches!(commit, Ok(Commit::Committed { .. })), "{commit:?}");
    }
    drill.until_nothing_is_held().await;
    // What was not sent yet is sent at the end.
    for process in drill.cluster.all_mut() {
        assert!(process.stop(troth_tests::PATIENCE).expect("it stops").success());
    }
    drill.end().await;
    let seen = seen.lock();
    let whole = |spans: &BTreeSet<(String, String)>| {
        let count = |name: &str| spans.iter().filter(|(span, _)| span == name).count();
        ["commit", "ask for vote", "decide", "ask to finish"].iter().all(|name| count(name) == 1)
            && count("prepare") == 2
            && count("finish") == 2
    };
    let torn: Vec<_> = seen.values().filter(|spans| !whole(spans)).collect();
    assert!(torn.is_empty(), "{} of {} traces, such as {:?}", torn.len(), seen.len(), torn[0]);
    // A quarter of 400 is 100, and the standard deviation 9.
    assert!((50..=150).contains(&seen.len()), "{} of {MANY}", seen.len());
}
