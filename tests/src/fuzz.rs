//! Everything that turns bytes into something else, fed with bytes that nobody meant.
//!
//! A target is a function that must come to an end with any bytes: without a panic, without an allocation that
//! the bytes do not pay for, and with what it understood meaning the same when it is written and read again.
//! `scripts/fuzz` lets libFuzzer look for bytes that reach new places in them; what it found is kept under
//! `tests/fuzz`, a folder for each target, and tried by every run of the tests.

use std::fmt::Debug;
use std::path::Path;

use troth_coordinator::{command as coordinator, config as coordinator_config, state as coordinator_state};
use troth_participant::config as participant_config;
use troth_participant::mvcc::key as stored_key;
use troth_participant::shard::{command as shard, state as shard_state};
use troth_protocol::key::{decode_ordered, encode_ordered, routing_part, shard_of};
use troth_protocol::message::raft;
use troth_protocol::message::samples;
use troth_protocol::message::txn::Outcome;
use troth_protocol::message::{Request, Response};
use troth_protocol::net::Role;
use troth_protocol::process::{self, ServerFile};
use troth_protocol::wire::{self, Encode, HEADER_BYTES, HELLO_BYTES, Header, Hello, Kind, WireError};
use troth_protocol::{ClusterMap, FolderId, Key, KeyRange};
use troth_replication::records;

use crate::history::{Workload, edn};

/// Something that takes any bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its folder.
    pub name: &'static str,
    /// Takes them.
    pub run: fn(&[u8]),
    /// What it was made for.
    pub samples: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 11] = [
    Target { name: "frame", run: frame, samples: frames },
    Target { name: "hello", run: hello, samples: || vec![Hello::OURS.to_bytes().to_vec()] },
    Target {
        name: "request",
        run: request,
        samples: || samples::requests().iter().map(wire::encode).collect(),
    },
    Target {
        name: "response",
        run: response,
        samples: || samples::responses().iter().map(wire::encode).collect(),
    },
    Target { name: "key", run: key, samples: keys },
    Target { name: "coordinator-record", run: coordinator_record, samples: coordinator_records },
    Target { name: "shard-record", run: shard_record, samples: shard_records },
    Target { name: "log-record", run: records::take, samples: log_records },
    Target {
        name: "coordinator-config",
        run: config::<coordinator_config::File>,
        samples: coordinator_configs,
    },
    Target {
        name: "participant-config",
        run: config::<participant_config::File>,
        samples: participant_configs,
    },
    Target { name: "history", run: history, samples: histories },
];

/// The target with a name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}

/// What reads one kind of thing.
type Read<T> = fn(&[u8]) -> Result<T, WireError>;

/// What can be read means the same when it is written and read again. If it cannot, that is told shortly.
fn same_again<T: Encode + PartialEq + Debug>(bytes: &[u8], read: Read<T>) -> Option<T> {
    match read(bytes) {
        Ok(value) => {
            let again = read(&wire::encode(&value));
            assert_eq!(again.as_ref(), Ok(&value), "it is something else when it is written and read again");
            Some(value)
        }
        Err(error) => {
            assert!(error.to_string().len() < 4096, "an error is no place for everything that was wrong");
            None
        }
    }
}

fn frame(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::read(head) else { return };
    let Some(payload) = rest.get(..header.length as usize) else { return };
    if wire::open(head, payload).is_err() {
        return;
    }
    let sealed = match header.kind {
        Kind::Request => wire::decode::<Request>(payload)
            .and_then(|message| wire::seal(header.kind, header.correlation, header.timeout_millis, &message)),
        Kind::Response => wire::decode::<Response>(payload)
            .and_then(|message| wire::seal(header.kind, header.correlation, header.timeout_millis, &message)),
    };
    match sealed {
        Ok(sealed) => {
            let (head, payload) = sealed.split_first_chunk::<HEADER_BYTES>().expect("it has a header");
            assert_eq!(wire::open(head, payload), Ok(()));
            let again = Header::read(head).expect("it was made just now");
            assert_eq!(
                (again.kind, again.correlation, again.timeout_millis),
                (header.kind, header.correlation, header.timeout_millis)
            );
        }
        Err(WireError::Malformed(_) | WireError::TooLarge { .. }) => {}
        Err(error) => panic!("a payload cannot be at fault for this: {error}"),
    }
}

fn frames() -> Vec<Vec<u8>> {
    let requests = samples::requests().into_iter().zip(1..);
    let requests = requests.map(|(message, number)| wire::seal(Kind::Request, number, 1_500, &message));
    let responses = samples::responses().into_iter().zip(1..);
    let responses = responses.map(|(message, number)| wire::seal(Kind::Response, number, 0, &message));
    requests.chain(responses).map(|frame| frame.expect("a small message").to_vec()).collect()
}

fn hello(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<HELLO_BYTES>() else { return };
    if let Ok(version) = Hello::agree(bytes) {
        assert!((wire::VERSION_MIN..=wire::VERSION).contains(&version));
    }
}

fn request(bytes: &[u8]) {
    let Some(request) = same_again(bytes, wire::decode::<Request>) else { return };
    assert!(!request.name().is_empty());
    assert!(Role::ALL.into_iter().any(|role| request.permits(role)), "somebody may ask for it");
}

fn response(bytes: &[u8]) {
    if let Some(Response::Rejected(reject)) = same_again(bytes, wire::decode::<Response>) {
        assert!(!reject.to_string().is_empty());
    }
}

fn key(bytes: &[u8]) {
    let mut ordered = Vec::new();
    encode_ordered(bytes, &mut ordered);
    ordered.extend_from_slice(bytes);
    assert_eq!(decode_ordered(&ordered), Some((bytes.to_vec(), bytes)));
    if let Some((key, rest)) = decode_ordered(bytes) {
        let mut again = Vec::new();
        encode_ordered(&key, &mut again);
        again.extend_from_slice(rest);
        assert_eq!(again, bytes, "a key has one form");
    }
    if let Some((shard, key, version)) = stored_key::parse_version(bytes) {
        assert_eq!(stored_key::version(shard, &key, version), bytes, "a version of a key has one form");
        assert_eq!(stored_key::timestamp(bytes), Some(version));
    }
    if let Some(txn) = stored_key::parse_txn(bytes) {
        let shard = troth_protocol::ShardId(u16::from_be_bytes([bytes[0], bytes[1]]));
        assert_eq!(stored_key::txn(shard, txn), bytes[..18]);
    }
    let part = routing_part(bytes);
    for shards in [1, 2, 7, 1024] {
        let key = Key::copy_from(bytes);
        assert_eq!(key.shard(shards), shard_of(part, shards));
        assert!(key.shard(shards).0 < shards);
        let range = KeyRange::prefix(bytes);
        assert!(range.contains(&key) && !range.is_empty());
        if let Some(shard) = range.shard(shards) {
            let longer = Key::copy_from(&[bytes, b"}x{"].concat());
            assert_eq!(longer.shard(shards), shard, "a range within a shard holds nothing of another");
        }
    }
}

fn keys() -> Vec<Vec<u8>> {
    let key = Key::copy_from(b"{user 7}/a\0b");
    let version = stored_key::version(troth_protocol::ShardId(3), &key, troth_protocol::Timestamp(9));
    let mut ordered = Vec::new();
    encode_ordered(key.as_bytes(), &mut ordered);
    vec![key.as_bytes().to_vec(), version, ordered, b"\0\0\0".to_vec(), vec![0xff; 20]]
}

fn coordinator_record(bytes: &[u8]) {
    same_again(bytes, wire::decode::<coordinator::Command>);
    same_again(bytes, wire::decode::<coordinator::Decision>);
    same_again(bytes, wire::decode::<coordinator::Record>);
    same_again(bytes, wire::decode::<coordinator_state::Marks>);
    same_again(bytes, wire::decode::<coordinator_state::Catalog>);
    same_again(bytes, wire::decode::<raft::Entry>);
    same_again(bytes, wire::decode::<raft::Vote>);
}

fn coordinator_records() -> Vec<Vec<u8>> {
    let mut records: Vec<Vec<u8>> = samples::requests()
        .into_iter()
        .filter_map(|request| match request {
            Request::Raft(request) => Some(wire::encode(&request)),
            _ => None,
        })
        .collect();
    records.push(wire::encode(&coordinator_state::Marks::default()));
    records.push(wire::encode(&samples::map()));
    records
}

fn shard_record(bytes: &[u8]) {
    same_again(bytes, wire::decode::<shard::Command>);
    same_again(bytes, wire::decode::<shard_state::Prepared>);
    same_again(bytes, wire::decode::<shard_state::Marks>);
    same_again(bytes, wire::decode::<Outcome>);
    same_again(bytes, wire::decode::<ClusterMap>);
    same_again(bytes, wire::decode::<FolderId>);
}

fn shard_records() -> Vec<Vec<u8>> {
    vec![
        wire::encode(&shard_state::Marks::default()),
        wire::encode(&samples::map()),
        wire::encode(&FolderId(7)),
        wire::encode(&samples::work()),
    ]
}

fn log_records() -> Vec<Vec<u8>> {
    let requests = samples::requests().into_iter();
    let entries = requests.flat_map(|request| match request {
        Request::Raft(raft::Request { body: raft::Body::Append { entries, .. }, .. }) => entries,
        _ => Vec::new(),
    });
    records::samples().into_iter().chain(entries.map(|entry| wire::encode(&entry))).collect()
}

/// A file is read, or it is said in one line what is wrong and where.
fn config<F: ServerFile>(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Err(error) = process::parse::<F>(Path::new("server.toml"), text.to_owned()) {
        let error = error.to_string();
        assert!(error.starts_with("server.toml:") && !error.contains('\n'), "{error:?}");
    }
}

fn coordinator_configs() -> Vec<Vec<u8>> {
    let text = r#"id = 1
listen = "127.0.0.1:7450"
data = "data"
[[coordinator]]
id = 1
address = "127.0.0.1:7450"
[cluster]
shards = 16
replicas = 3
[limits]
in_flight = 1000
commit_target_ms = 50
transaction_age_s = 60
[placement]
replace_after_s = 60
moves_at_once = 2
[tls]
ca = "ca.pem"
cert = "coordinator-1.pem"
key = "coordinator-1-key.pem"
[log]
format = "json"
level = "info"
[raft]
heartbeat_ms = 100
election_ms = 300
"#;
    vec![text.as_bytes().to_vec()]
}

fn participant_configs() -> Vec<Vec<u8>> {
    let text = r#"id = 2
listen = "127.0.0.1:7460"
advertise = "node-2.example:7460"
data = "data"
zone = "north"
weight = 2
coordinators = ["127.0.0.1:7450"]
[retention]
versions_s = 600
outcomes_s = 3600
[moves]
bytes_per_second = 1000000
[memory]
cache_mib = 64
write_buffers_mib = 64
[http]
listen = "127.0.0.1:8460"
"#;
    vec![text.as_bytes().to_vec()]
}

/// Histories come from elsewhere too. What was read is written as it would be read.
fn history(bytes: &[u8]) {
    let Some((which, text)) = bytes.split_first() else { return };
    let workload = Workload::ALL[usize::from(*which) % Workload::ALL.len()];
    let Ok(history) = edn::read(text, workload) else { return };
    let mut written = Vec::new();
    if edn::write(&history, &mut written).is_ok() {
        let again = edn::read(&written[..], workload).expect("it was written just now");
        assert_eq!(again, history);
    }
}

fn histories() -> Vec<Vec<u8>> {
    let sample = |(which, workload): (u8, Workload)| {
        let (function, value) = match workload {
            Workload::Append | Workload::WriteSkew => ("txn", "[[:r 1 [3]] [:r 4 nil] [:append 1 2]]"),
            Workload::Register => ("txn", "[[:r 1 nil] [:w 1 2]]"),
            Workload::LongFork => ("read", "[[:r 1 nil] [:r 2 1]]"),
            Workload::Bank => ("transfer", "{:from 1, :to 2, :amount 3}"),
            Workload::Set => ("read", "#{1 2}"),
            Workload::Counter => ("add", "1, :count 2"),
        };
        let line = format!(
            "{{:index 0, :time 1, :type :ok, :process 0, :f :{function}, :value {value}, :commit-ts 4}}\n"
        );
        [&[which], line.as_bytes()].concat()
    };
    (0..).zip(Workload::ALL).map(sample).collect()
}
