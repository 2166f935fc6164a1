//! Participants that make themselves known, operators that change where they stand, and shards that move.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use troth_protocol::message::admin::{Moment, NodeChange};
use troth_protocol::message::coordinator::Response;
use troth_protocol::message::overview::{NodeReport, NodeView, Overview};
use troth_protocol::message::raft::LogId;
use troth_protocol::message::txn::Outcome;
use troth_protocol::{FolderId, MapEpoch, Node, NodeId, Reject, ShardId, TxnId};

use super::{Coordinator, Inner};
use crate::command::{Command, Output};
use crate::eyes::Ended;
use crate::leader::{Event, Leader};

/// How long the answer to a sign of life waits for a newer map.
const MAP_PATIENCE: Duration = Duration::from_millis(800);

impl Coordinator {
    /// Changes where a participant stands.
    ///
    /// # Errors
    /// If this one does not lead, or the change makes no sense; the reason says what would.
    pub async fn change_node(&self, node: NodeId, change: NodeChange) -> Result<(), Reject> {
        self.inner.group.read_barrier().await?;
        if self.inner.core.lock().leader.is_none() {
            return Err(self.inner.not_leader());
        }
        tracing::info!(%node, ?change, "an operator changes where a node stands");
        match self.inner.propose(&Command::Node { node, change }).await? {
            Output::Refused(reason) => Err(Reject::malformed(reason)),
            _ => Ok(()),
        }
    }

    /// How many shards somebody has said lately to this leader that it serves.
    pub(crate) fn served(&self) -> usize {
        self.inner.eyes.lock().served()
    }

    /// How the cluster is, as this leader sees it.
    ///
    /// # Errors
    /// If this one does not lead.
    pub async fn overview(&self) -> Result<Overview, Reject> {
        let inner = &self.inner;
        inner.group.read_barrier().await?;
        let core = inner.core.lock();
        let (Some(leader), Some(catalog)) = (&core.leader, core.state.catalog()) else {
            return Err(inner.not_leader());
        };
        let eyes = inner.eyes.lock();
        let mut nodes = eyes.nodes();
        for node in &catalog.map.nodes {
            if nodes.iter().all(|view| view.id != node.id) {
                nodes.push(NodeView { id: node.id, seen_ms: None, report: NodeReport::default() });
            }
        }
        nodes.retain(|view| catalog.map.node(view.id).is_some());
        nodes.sort_by_key(|view| view.id);
        let now = inner.core.now();
        let age = |(shard, since): (&ShardId, &std::time::Instant)| {
            (*shard, now.instant.saturating_duration_since(*since).as_millis() as u64)
        };
        Ok(Overview {
            at_ms: now.millis,
            leader: inner.id,
            epoch: leader.epoch(),
            target: catalog.map.target(),
            map: catalog.map.clone(),
            nodes,
            move_ages_ms: leader.moving().iter().map(age).collect(),
            moved_shards: catalog.moved_shards,
            moved_bytes: catalog.moved_bytes,
            in_flight: leader.in_flight() as u64,
            unfinished: core.state.unfinished().len() as u64,
            history: eyes.history(),
            elections: eyes.elections(),
        })
    }
}

impl Inner {
    /// Notes how a request for a commit ended.
    pub(super) fn note_end(&self, txn: TxnId, answer: &Result<Response, Reject>, took: Duration) {
        self.metrics.ended(answer, took);
        if took >= self.slow {
            let moments = self.core.timeline.of(txn);
            let began = moments.first().map_or(0, |moment| moment.at_ms);
            let told = |moment: &Moment| {
                let shard = moment.shard.map_or(String::new(), |shard| format!(" (shard {shard})"));
                format!("{} ms: {}{shard}", moment.at_ms.saturating_sub(began), moment.what)
            };
            let timeline: Vec<String> = moments.iter().map(told).collect();
            let took_ms = took.as_millis() as u64;
            tracing::warn!(%txn, took_ms, timeline = timeline.join("; "), "a slow transaction");
        }
        let how = match answer {
            Ok(Response::Outcome(Outcome::Committed { .. })) => Ended::Committed,
            Ok(Response::Outcome(Outcome::Aborted { .. })) => Ended::Aborted,
            Err(Reject::Overloaded { .. }) => Ended::Shed,
            Ok(_) | Err(_) => Ended::Otherwise,
        };
        self.eyes.lock().ended(how, took, self.core.now().millis);
    }

    pub(super) async fn register(
        &self,
        node: Node,
        folder: FolderId,
        known: MapEpoch,
        report: NodeReport,
    ) -> Result<Response, Reject> {
        let id = node.id;
        let registered = {
            let core = self.core.lock();
            if core.leader.is_none() {
                return Err(self.not_leader());
            }
            core.state.catalog().is_some_and(|catalog| catalog.is_registered(&node, folder))
        };
        if !registered {
            let address = node.address.clone();
            match self.propose(&Command::Register { node, folder }).await? {
                Output::Taken => {
                    let core = self.core.lock();
                    let taken = core.state.catalog().and_then(|catalog| catalog.map.node(id));
                    let address = taken.map_or(String::new(), |node| node.address.clone());
                    return Err(Reject::NodeTaken { node: id, address });
                }
                Output::Removed => return Err(Reject::NodeRemoved { node: id }),
                _ => tracing::info!(node = %id, address, "a participant has registered"),
            }
        }
        {
            let mut core = self.core.lock();
            if core.leader.as_ref().map(Leader::epoch).is_none() {
                return Err(self.not_leader());
            }
            self.core.handle(&mut core, Event::Seen { node: id });
        }
        self.eyes.lock().saw(id, report, self.core.now().millis);
        // What changes now the node shall hear of at once, and not with its next sign of life.
        let mut epoch = self.core.map_epoch.subscribe();
        let newer = epoch.wait_for(|epoch| *epoch > known);
        let wait = async { timeout(MAP_PATIENCE, newer).await.is_ok() };
        if known != MapEpoch(0) {
            self.stop.run_until_cancelled(wait).await;
        }
        Ok(self.map(known))
    }

    pub(super) async fn moved(
        &self,
        shard: ShardId,
        voters: Vec<NodeId>,
        formed: LogId,
    ) -> Result<Response, Reject> {
        if self.core.lock().leader.is_none() {
            return Err(self.not_leader());
        }
        let began = Instant::now();
        self.propose(&Command::Moved { shard, voters: voters.clone(), formed }).await?;
        tracing::info!(%shard, replicas = ?voters, took = ?began.elapsed(), "a shard has moved");
        Ok(Response::Noted)
    }

    pub(super) async fn carried(&self, bytes: u64) -> Result<Response, Reject> {
        if self.core.lock().leader.is_none() {
            return Err(self.not_leader());
        }
        self.propose(&Command::Carried { bytes }).await?;
        Ok(Response::Noted)
    }
}
