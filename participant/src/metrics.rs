//! What a participant counts and measures, and how it says that it is well.

use std::sync::{Arc, Weak};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use serde_json::json;
use troth_protocol::message::shard::{Request, Response, Vote};
use troth_protocol::message::txn::Outcome;
use troth_protocol::{MapEpoch, Reject};
use troth_replication::http::Vitals;
use troth_replication::metrics::{Registry, Sampler, durations};

use crate::node::Node;
use crate::shard::Shard;

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Asked {
    request: &'static str,
    outcome: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Voted {
    vote: &'static str,
    cause: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Of {
    request: &'static str,
}

/// Counters and histograms of a participant. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    requests: Family<Asked, Counter>,
    took: Family<Of, Histogram>,
    votes: Family<Voted, Counter>,
    leaderships: Counter,
    collected: Counter,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics {
            requests: Family::default(),
            took: Family::new_with_constructor(durations),
            votes: Family::default(),
            leaderships: Counter::default(),
            collected: Counter::default(),
        }
    }
}

/// A request to a shard, by name.
pub fn name(request: &Request) -> &'static str {
    match request {
        Request::Read { .. } => "read",
        Request::Scan { .. } => "scan",
        Request::WhoLeads => "who_leads",
        Request::Prepare(_) => "prepare",
        Request::CommitOnePhase(_) => "commit_one_phase",
        Request::Finish { .. } => "finish",
        Request::Prepared { .. } => "prepared",
        Request::Outcome { .. } => "outcome",
    }
}

impl Metrics {
    /// A request to a shard was answered.
    pub fn answered(&self, request: &'static str, answer: &Result<Response, Reject>, began: Instant) {
        let outcome = match answer {
            Ok(_) => "ok",
            Err(reject) => reject.name(),
        };
        self.requests.get_or_create(&Asked { request, outcome }).inc();
        if answer.is_ok() {
            self.took.get_or_create(&Of { request }).observe(began.elapsed().as_secs_f64());
        }
        let voted = match answer {
            Ok(Response::Vote(Vote::Yes { .. })) => Voted { vote: "yes", cause: "" },
            Ok(Response::Vote(Vote::No { cause })) => Voted { vote: "no", cause: cause.name() },
            Ok(Response::Outcome(Outcome::Aborted { cause })) if request == "commit_one_phase" => {
                Voted { vote: "no", cause: cause.name() }
            }
            _ => return,
        };
        self.votes.get_or_create(&voted).inc();
    }

    /// A shard is led from here now.
    pub fn led(&self) {
        self.leaderships.inc();
    }

    /// Old versions were removed.
    pub fn collected(&self, versions: u64) {
        self.collected.inc_by(versions);
    }

    /// Adds everything to a registry.
    pub fn register(&self, registry: &mut Registry, node: &Arc<Node>) {
        let of = self.clone();
        registry.register("shard_requests", "Requests to shards that were answered, and how", of.requests);
        registry.register(
            "shard_request_seconds",
            "How long requests to shards took that were not refused",
            of.took,
        );
        registry.register("votes", "Votes, and why they were no", of.votes);
        registry.register("elections", "How often this server began to lead a shard", of.leaderships);
        registry.register("versions_collected", "Old versions that were removed", of.collected);
        let node = Arc::downgrade(node);
        Sampler::register(registry, move |samples| {
            let Some(node) = node.upgrade() else { return Ok(()) };
            let shards = node.shards();
            let status: Vec<_> = shards.iter().map(Shard::status).collect();
            let led = status.iter().filter(|status| status.serving).count();
            samples.gauge("shards", "Shards that this node has a replica of", shards.len() as f64)?;
            samples.gauge("shards_led", "Shards that it leads", led as f64)?;
            let lost = shards.iter().filter(|shard| !shard.group().is_led()).count();
            samples.gauge("shards_leaderless", "Shards that it knows no living leader of", lost as f64)?;
            let sum = |of: fn(&troth_protocol::message::admin::ShardStatus) -> u64| {
                status.iter().filter(|status| status.serving).map(of).sum::<u64>() as f64
            };
            samples.gauge(
                "prepared",
                "Transactions that are prepared at the shards it leads",
                sum(|s| s.prepared),
            )?;
            samples.gauge("locks", "Keys and ranges that they hold locked", sum(|s| s.locks))?;
            samples.gauge("reads_waiting", "Reads that wait for one of them", sum(|s| s.waiting))?;
            let oldest = shards.iter().filter_map(Shard::oldest_in_doubt).max().unwrap_or_default();
            samples.gauge(
                "in_doubt_oldest_seconds",
                "The age of the oldest of them",
                oldest.as_secs_f64(),
            )?;
            let behind = shards.iter().map(|shard| shard.group().behind()).max().unwrap_or(0);
            samples.gauge(
                "behind_entries",
                "Entries that the replica that is most behind has not applied",
                behind as f64,
            )?;
            let kept = shards
                .iter()
                .map(|shard| (shard.group().applied() + 1).saturating_sub(shard.group().log_begins_at()));
            samples.gauge("log_entries", "Entries of logs that are kept", kept.sum::<u64>() as f64)?;
            let bytes = shards.iter().map(|shard| shard.group().snapshot_bytes());
            let (sent, known) =
                bytes.fold((0, 0), |(sent, known), bytes| (sent + bytes.sent, known + bytes.known));
            samples.counter(
                "snapshot_sent_bytes",
                "Bytes that were sent in snapshots, by the replicas that are here",
                sent,
            )?;
            samples.counter("snapshot_known_bytes", "Bytes that needed not be sent", known)?;
            let sending: usize = shards.iter().map(|shard| shard.group().transfers().len()).sum();
            samples.gauge("snapshots_sending", "Snapshots that are on their way from here", sending as f64)
        });
    }
}

/// How a participant says that it is well.
pub struct Health(pub Weak<Node>);

impl Vitals for Health {
    fn health(&self) -> Result<(), String> {
        let node = self.0.upgrade().ok_or("it is shutting down")?;
        if let Some(reason) = node.failure().borrow().clone() {
            return Err(reason);
        }
        let stalled = node.shards().iter().any(|shard| shard.group().is_stalled());
        if stalled { Err("the disk stalls".into()) } else { Ok(()) }
    }

    /// Ready is who is known to the coordinators and knows a living leader of each of its shards.
    fn readiness(&self) -> (bool, serde_json::Value) {
        let Some(node) = self.0.upgrade() else {
            return (false, json!({ "ready": false, "health": "it is shutting down" }));
        };
        let (map, shards) = (node.map(), node.shards());
        let status: Vec<_> = shards.iter().map(Shard::status).collect();
        let zipped = status.iter().zip(&shards);
        let leaderless: Vec<u16> =
            zipped.filter(|(_, shard)| !shard.group().is_led()).map(|(status, _)| status.shard.0).collect();
        let behind = shards.iter().map(|shard| shard.group().behind()).max().unwrap_or(0);
        let id = node.id();
        let standing = map.node(id).map(|node| node.state.name());
        let admitted = node.is_admitted();
        let ready = self.health().is_ok() && admitted && map.epoch > MapEpoch(0) && leaderless.is_empty();
        let details = json!({
            "ready": ready, "role": "participant", "admitted": admitted, "id": id.0, "state": standing, "shards": shards.len(),
            "leads": status.iter().filter(|status| status.serving).count(), "leaderless": leaderless,
            "behind": behind, "map_epoch": map.epoch.0, "health": self.health().err(),
        });
        (ready, details)
    }
}
