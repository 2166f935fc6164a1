//! What a coordinator counts and measures, and how it says that it is well.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use serde_json::json;
use troth_protocol::message::coordinator::Response;
use troth_protocol::message::txn::Outcome;
use troth_protocol::ring::diff;
use troth_protocol::{NodeState, Reject};
use troth_replication::Leadership;
use troth_replication::http::Vitals;
use troth_replication::metrics::{Registry, Sampler, durations};

use crate::driver::{Coordinator, WeakCoordinator};
use crate::leader::Leader;

/// A standby that is this many entries behind has not caught up.
const BEHIND_MAX: u64 = 1000;

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct End {
    outcome: &'static str,
    cause: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Of {
    phase: &'static str,
}

/// A part of a commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// From a `Prepare` to its vote.
    Prepare,
    /// From the proposal of a decision until it is applied.
    Decide,
    /// From a `Finish` to its acknowledgement.
    Finish,
    /// A one-shard transaction, from the request to the shard to its answer.
    OnePhase,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Prepare => "prepare",
            Phase::Decide => "decide",
            Phase::Finish => "finish",
            Phase::OnePhase => "one_phase",
        }
    }
}

/// Counters and histograms of a coordinator. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    ends: Family<End, Counter>,
    commits: Histogram,
    phases: Family<Of, Histogram>,
    timestamps: Counter,
    refused: Counter,
    leaderships: Counter,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics {
            ends: Family::default(),
            commits: durations(),
            phases: Family::new_with_constructor(durations),
            timestamps: Counter::default(),
            refused: Counter::default(),
            leaderships: Counter::default(),
        }
    }
}

impl Metrics {
    /// A commit was answered.
    pub fn ended(&self, answer: &Result<Response, Reject>, took: Duration) {
        let (outcome, cause) = match answer {
            Ok(Response::Outcome(Outcome::Committed { .. })) => {
                self.commits.observe(took.as_secs_f64());
                ("committed", "")
            }
            Ok(Response::Outcome(Outcome::Aborted { cause })) => ("aborted", cause.name()),
            Ok(_) => ("expired", ""),
            Err(Reject::Overloaded { .. }) => ("shed", "overloaded"),
            Err(reject) if reject.is_ambiguous() => ("unknown", reject.name()),
            Err(reject) => ("refused", reject.name()),
        };
        self.ends.get_or_create(&End { outcome, cause }).inc();
    }

    /// A part of a commit took this long.
    pub fn phase(&self, phase: Phase, began: Instant) {
        self.phases.get_or_create(&Of { phase: phase.name() }).observe(began.elapsed().as_secs_f64());
    }

    /// Timestamps were handed out, and others were asked for and refused.
    pub fn timestamps(&self, count: u32, refused: u32) {
        self.timestamps.inc_by(count.into());
        self.refused.inc_by(refused.into());
    }

    /// This coordinator has taken the lead.
    pub fn led(&self) {
        self.leaderships.inc();
    }

    /// Adds everything to a registry.
    pub fn register(&self, registry: &mut Registry, coordinator: &Coordinator) {
        let of = self.clone();
        registry.register("transactions", "Commits that were answered, and how", of.ends);
        registry.register(
            "commit_seconds",
            "From the arrival of a commit to its answer, if it committed",
            of.commits,
        );
        registry.register("phase_seconds", "How long the parts of a commit took", of.phases);
        registry.register("timestamps", "Timestamps handed out", of.timestamps);
        registry.register("begins_shed", "Transactions that were told to begin later", of.refused);
        registry.register("elections", "How often this server began to lead", of.leaderships);
        let coordinator = coordinator.downgrade();
        Sampler::register(registry, move |samples| {
            let Some(coordinator) = coordinator.upgrade() else { return Ok(()) };
            let group = coordinator.group();
            let behind = group.followers().iter().map(|follower| follower.behind).max().unwrap_or(0);
            let core = coordinator.core().lock();
            let leader = core.leader.as_ref();
            let lead = |of: fn(&Leader) -> usize| leader.map_or(0, of) as f64;
            samples.gauge(
                "leads",
                "1 while this coordinator leads",
                f64::from(u8::from(leader.is_some() && group.is_led())),
            )?;
            let ahead =
                leader.map_or(Duration::ZERO, |leader| leader.time_ahead(coordinator.core().now().millis));
            let help = "How far the time of the cluster is ahead of the wall clock of its leader";
            samples.gauge("time_ahead_seconds", help, ahead.as_secs_f64())?;
            samples.counter(
                "servers_refused",
                "Servers that have ended, since their data folder is a copy or has lost something",
                coordinator.notices().refused_count(),
            )?;
            samples.gauge("epoch", "The epoch of the last leader", core.state.marks().epoch.0 as f64)?;
            samples.gauge(
                "log_entries",
                "Entries of the log that are kept",
                (group.applied() + 1).saturating_sub(group.log_begins_at()) as f64,
            )?;
            samples.gauge(
                "followers_behind_entries",
                "Entries that the slowest other one lacks",
                behind as f64,
            )?;
            samples.gauge("in_flight", "Transactions being decided", lead(Leader::in_flight))?;
            samples.gauge(
                "under_way",
                "Transactions that have begun or are being decided, and count for admission",
                lead(|leader| leader.admission().under_way()),
            )?;
            samples.gauge(
                "admission_limit",
                "How many of them may be",
                lead(|leader| leader.admission().limit()),
            )?;
            samples.gauge(
                "unfinished",
                "Decisions that not all participants have applied",
                core.state.unfinished().len() as f64,
            )?;
            let Some(catalog) = core.state.catalog() else { return Ok(()) };
            let map = &catalog.map;
            let count = |state: NodeState| map.nodes.iter().filter(|node| node.state == state).count() as f64;
            let states = [NodeState::Waiting, NodeState::Active, NodeState::Draining, NodeState::Lost];
            samples.gauges(
                "nodes",
                "Participants, by where they stand",
                "state",
                states.map(|state| (state.name().to_owned(), count(state))),
            )?;
            samples.gauge("map_epoch", "The version of the cluster map", map.epoch.0 as f64)?;
            samples.gauge("moves", "Shards on their way to other nodes", map.moves.len() as f64)?;
            let target = map.target();
            let astray = if map.is_placed() { diff(&map.placement, &target).len() } else { 0 };
            samples.gauge(
                "shards_misplaced",
                "Shards that are not where the ring wants them",
                astray as f64,
            )?;
            let served = coordinator.served();
            let unserved =
                if leader.is_some() && map.is_placed() { usize::from(map.shards) - served } else { 0 };
            samples.gauge(
                "shards_unserved",
                "Shards of which nobody has said lately that it serves them",
                unserved as f64,
            )?;
            let oldest = leader
                .and_then(|leader| leader.moving().values().min())
                .map_or(0.0, |since| since.elapsed().as_secs_f64());
            samples.gauge("move_oldest_seconds", "How long the oldest move has been under way", oldest)?;
            samples.counter("moved_shards", "Shards that have moved", catalog.moved_shards)?;
            samples.counter("moved_bytes", "Bytes that were sent for that", catalog.moved_bytes)
        });
    }
}

/// How a coordinator says that it is well.
pub struct Health(pub WeakCoordinator);

impl Vitals for Health {
    fn health(&self) -> Result<(), String> {
        let coordinator = self.0.upgrade().ok_or("it is shutting down")?;
        let group = coordinator.group();
        match &*group.leadership().borrow() {
            Leadership::Failed { reason } => Err(reason.clone()),
            _ if group.is_stalled() => Err("the disk stalls".into()),
            Leadership::Leader { .. } | Leadership::Follower { .. } => Ok(()),
        }
    }

    fn readiness(&self) -> (bool, serde_json::Value) {
        let Some(coordinator) = self.0.upgrade() else {
            return (false, json!({ "ready": false, "health": "it is shutting down" }));
        };
        let status = coordinator.status();
        let behind = coordinator.group().behind();
        let leads = status.epoch.is_some();
        let knows_leader = coordinator.group().is_led();
        let caught_up = behind <= BEHIND_MAX;
        let ready = self.health().is_ok() && (leads || (knows_leader && caught_up));
        let role = if leads { "leader" } else { "standby" };
        let details = json!({
            "ready": ready, "role": role, "id": status.id.0, "leader": status.leader.map(|leader| leader.0),
            "caught_up": caught_up, "behind": behind, "epoch": status.epoch.map(|epoch| epoch.0),
            "map_epoch": status.map_epoch.0, "health": self.health().err(),
        });
        (ready, details)
    }
}

/// A coordinator and what it counts.
pub fn registered(mut registry: Registry, coordinator: &Coordinator) -> (Registry, Arc<dyn Vitals>) {
    coordinator.metrics().register(&mut registry, coordinator);
    (registry, Arc::new(Health(coordinator.downgrade())))
}
