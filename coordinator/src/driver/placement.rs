//! Participants that make themselves known, operators that change where they stand, and shards that move.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use troth_protocol::message::admin::{Moment, NodeChange};
use troth_protocol::message::coordinator::{Heard, Response};
use troth_protocol::message::overview::{NodeReport, NodeView, Overview};
use troth_protocol::message::raft::LogId;
use troth_protocol::message::txn::Outcome;
use troth_protocol::mutation::{self, Bug};
use troth_protocol::{FolderId, Incarnation, Lineage, MapEpoch, Node, NodeId, Reject, ShardId, TxnId};

use super::{Coordinator, Inner};
use crate::command::{Command, Output};
use crate::door::peers::ALIVE_FOR;
use crate::eyes::Ended;
use crate::leader::{Event, Leader};
use troth_replication::Leadership;

/// How long the answer to a sign of life waits for a newer map.
const MAP_PATIENCE: Duration = Duration::from_millis(800);

/// How often it is written down how far participants are.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Time may be ahead of the wall clock by this much without a word: clocks are never quite the same.
const AHEAD_MAX: Duration = Duration::from_secs(5);

/// After how long it is said that participants are waited for.
const SAY_AFTER: Duration = Duration::from_secs(3);

/// What a participant says of itself.
pub(super) struct Said {
    pub(super) node: Node,
    pub(super) folder: FolderId,
    pub(super) previous: Option<Incarnation>,
    pub(super) progress: u64,
    pub(super) heard: Option<Heard>,
}

/// What participants have said of themselves to this leader.
pub(super) struct Signs {
    began: Instant,
    nodes: BTreeMap<NodeId, Sign>,
}

struct Sign {
    at: Instant,
    incarnation: Incarnation,
    progress: u64,
}

impl Default for Signs {
    fn default() -> Signs {
        Signs { began: Instant::now(), nodes: BTreeMap::new() }
    }
}

impl Signs {
    /// Whether a start of a node may be alive still; a new leader does not know.
    fn may_live(&self, node: NodeId, incarnation: Incarnation) -> bool {
        let sign = self.nodes.get(&node).filter(|sign| sign.incarnation == incarnation);
        sign.map_or(self.began, |sign| sign.at).elapsed() < ALIVE_FOR
    }

    fn progress(&self, node: NodeId) -> u64 {
        self.nodes.get(&node).map_or(0, |sign| sign.progress)
    }
}

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
        said: Said,
        known: MapEpoch,
        report: NodeReport,
    ) -> Result<Response, Reject> {
        self.check_heard(&said).await?;
        let id = said.node.id;
        self.admit(said).await?;
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
        let index = self.group.applied();
        let core = self.core.lock();
        let (Some(leader), Some(catalog)) = (&core.leader, core.state.catalog()) else {
            return Err(self.not_leader());
        };
        let (lineage, epoch, leader) = (catalog.map.lineage, leader.epoch(), self.door.incarnation());
        let heard = Heard { lineage, epoch, leader, index };
        let map = (catalog.map.epoch > known).then(|| catalog.map.clone());
        Ok(Response::Registered { heard, map })
    }

    /// Sees to it that only one start of a participant is admitted, and none that has forgotten what it had said.
    async fn admit(&self, said: Said) -> Result<(), Reject> {
        let Said { node, folder, previous, progress, .. } = said;
        let (id, incarnation, address) = (node.id, node.incarnation, node.address.clone());
        let registered = {
            let core = self.core.lock();
            if core.leader.is_none() {
                return Err(self.not_leader());
            }
            let signs = self.signs.lock();
            let before = core.state.catalog().and_then(|catalog| catalog.map.node(id));
            if let Some(before) = before {
                let told = signs.progress(id).max(core.state.progress().get(&id).copied().unwrap_or(0));
                if progress < told && !mutation::on(Bug::AcceptsAnOlderCopy) {
                    let (incarnation, address) = (before.incarnation, before.address.clone());
                    return Err(self.passed(id, incarnation, told, address));
                }
                if before.incarnation != incarnation
                    && before.address != address
                    && signs.may_live(id, before.incarnation)
                {
                    return Err(Reject::NodeElsewhere { node: id, address: before.address.clone() });
                }
            }
            core.state.catalog().is_some_and(|catalog| catalog.is_registered(&node, folder))
        };
        if !registered {
            match self.propose(&Command::Register { node, folder, previous, progress }).await? {
                Output::Taken => {
                    let core = self.core.lock();
                    let taken = core.state.catalog().and_then(|catalog| catalog.map.node(id));
                    let address = taken.map_or(String::new(), |node| node.address.clone());
                    return Err(Reject::NodeTaken { node: id, address });
                }
                Output::Removed => return Err(Reject::NodeRemoved { node: id }),
                Output::Passed { incarnation, progress, address } => {
                    // The first time it cannot know what it has to come after.
                    let reject = Reject::NodePassed { node: id, incarnation, progress, address };
                    return Err(reject);
                }
                _ => tracing::info!(node = %id, address, %incarnation, "a participant has registered"),
            }
        }
        let sign = Sign { at: Instant::now(), incarnation, progress };
        self.signs.lock().nodes.insert(id, sign);
        Ok(())
    }

    fn passed(&self, node: NodeId, incarnation: Incarnation, progress: u64, address: String) -> Reject {
        self.notices.warn(format!(
            "participant {node} was started with an older copy of its data folder: {progress} synced batches are \
             known of it; it is refused until its newest folder is put back"
        ));
        Reject::NodePassed { node, incarnation, progress, address }
    }

    /// A participant that has heard of more than there is here has heard it from coordinators that knew more: this one
    /// runs on an older copy of their state, or has founded another cluster.
    async fn check_heard(&self, said: &Said) -> Result<(), Reject> {
        let (id, address) = (said.node.id, &said.node.address);
        let Some(heard) = said.heard else {
            self.confirm(id);
            return Ok(());
        };
        if self.covers(&heard) {
            self.confirm(id);
            return Ok(());
        }
        // A leader that was deposed without knowing it has not heard of it yet.
        self.group.read_barrier().await?;
        if self.covers(&heard) {
            self.confirm(id);
            return Ok(());
        }
        if !matches!(&*self.group.leadership().borrow(), Leadership::Leader { .. }) {
            return Err(self.not_leader());
        }
        let (own, here) = (self.id, self.lineage());
        let reason = if here == Some(heard.lineage) {
            format!(
                "the data folder of coordinator {own} is an older copy: participant {id} at {address} has heard of \
                 entry {} of the coordinators' log in epoch {}, which is not here. Put the newest folder back; if all \
                 of them are lost, see \"When the coordinators are lost\" in docs/operations.md",
                heard.index, heard.epoch
            )
        } else {
            let here = here.map_or("new".to_owned(), |lineage| lineage.to_string());
            format!(
                "coordinator {own} has founded another cluster: participant {id} at {address} belongs to one of \
                 lineage {}, and this is {here}. Put the folders of its coordinators back; if this one shall join others, \
                 write `coordinators` instead of `cluster.founding` into its configuration; if all of them are lost, \
                 see \"When the coordinators are lost\" in docs/operations.md",
                heard.lineage
            )
        };
        self.fail(reason);
        Err(Reject::ShuttingDown)
    }

    fn lineage(&self) -> Option<Lineage> {
        self.core.lock().state.catalog().map(|catalog| catalog.map.lineage)
    }

    /// Whether what was heard is here. A leader's `Lead` is in the log only if participants have confirmed that it knew
    /// all that they had heard before.
    fn covers(&self, heard: &Heard) -> bool {
        let applied = self.group.applied();
        let core = self.core.lock();
        let marks = core.state.marks();
        let is_leader = heard.leader == marks.leader || heard.leader == Incarnation(0);
        let same = core.state.catalog().is_some_and(|catalog| catalog.map.lineage == heard.lineage);
        same && match heard.epoch.cmp(&marks.epoch) {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Equal => is_leader && heard.index <= applied,
            std::cmp::Ordering::Greater => false,
        } || mutation::on(Bug::FormsAGroupFromAnEmptyFolder)
    }

    fn confirm(&self, node: NodeId) {
        if !*self.core.trusted.borrow() {
            self.confirmed.send_if_modified(|confirmed| confirmed.insert(node));
        }
    }

    /// Waits until half of the participants have said that they have heard of nothing that is not here, unless the log
    /// has gone on in this life.
    pub(super) async fn be_confirmed(&self) {
        let placed: BTreeSet<NodeId> = {
            let core = self.core.lock();
            let map = core.state.catalog().map(|catalog| &catalog.map);
            map.map_or_else(BTreeSet::new, |map| map.placement.iter().flatten().copied().collect())
        };
        let needed = placed.len().div_ceil(2);
        let (mut confirmed, mut trusted) = (self.confirmed.subscribe(), self.core.trusted.subscribe());
        let enough = confirmed.wait_for(|confirmed| confirmed.intersection(&placed).count() >= needed);
        let say = async {
            sleep(SAY_AFTER).await;
            self.notices.warn(format!(
                "coordinator {} leads after a start, and waits until {needed} of {} participants have told it that its \
                 data folder is not an older copy",
                self.id,
                placed.len()
            ));
            std::future::pending::<()>().await;
        };
        tokio::select! {
            _ = enough => {}
            _ = trusted.wait_for(|trusted| *trusted) => {}
            () = say => {}
        }
    }

    /// This coordinator must not go on.
    pub(super) fn fail(&self, reason: String) {
        self.core.lock().depose();
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                tracing::error!("{reason}");
                *failure = Some(reason);
            }
            first
        });
    }

    /// Says so, once, if the time of the cluster is far ahead of the wall clock.
    fn look_at_the_time(&self) {
        let now = self.core.now();
        let ahead = match &self.core.lock().leader {
            Some(leader) => leader.time_ahead(now.millis),
            None => return,
        };
        let far = ahead > AHEAD_MAX;
        if far && !self.said_ahead.swap(true, Ordering::Relaxed) {
            self.notices.warn(format!(
                "the time of this cluster is {} s ahead of the wall clock of its leader: a clock was wrong once. It \
                 goes on by counting until clocks have caught up; ages are measured in it",
                ahead.as_secs()
            ));
        } else if ahead < AHEAD_MAX / 2 {
            self.said_ahead.store(false, Ordering::Relaxed);
        }
    }

    /// Writes down how far participants are, while this one leads.
    pub(super) async fn note_progress(&self) {
        loop {
            sleep(PROGRESS_INTERVAL).await;
            self.look_at_the_time();
            let nodes: Vec<(NodeId, u64)> = {
                let (core, signs) = (self.core.lock(), self.signs.lock());
                let noted = |node: &NodeId| core.state.progress().get(node).copied().unwrap_or(0);
                let ahead = signs.nodes.iter().filter(|(node, sign)| sign.progress > noted(node));
                ahead.map(|(node, sign)| (*node, sign.progress)).collect()
            };
            if !nodes.is_empty()
                && let Err(error) = self.propose(&Command::Progress { nodes }).await
            {
                tracing::debug!(%error, "how far participants are is not noted");
            }
        }
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
