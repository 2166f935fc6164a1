//! What participants report and coordinators show: how everything is at the moment.

use std::collections::BTreeMap;

use crate::cluster_map::ClusterMap;
use crate::id::{Epoch, NodeId, ShardId};
use crate::message::admin::InDoubt;
use crate::ring::diff;

/// How a participant is; it comes with each sign of life.
#[derive(Clone, PartialEq, Eq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct NodeReport {
    /// Its replicas, by shard.
    pub shards: Vec<ShardReport>,
    /// The oldest transactions that are prepared at the shards that it leads, and not young any more.
    pub in_doubt: Vec<InDoubt>,
}

/// How a replica is.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct ShardReport {
    /// The shard.
    pub shard: ShardId,
    /// It leads, and answers requests.
    pub serving: bool,
    /// Which leadership it is in: the index of the entry that began it.
    pub lead: u64,
    /// Transactions that are prepared and not finished.
    pub prepared: u64,
    /// Keys and ranges that they hold locked.
    pub locks: u64,
    /// Reads that wait for one of them.
    pub waiting: u64,
    /// About how many bytes it has on disk.
    pub bytes: u64,
    /// How far it is with moving the shard, if it leads it and does.
    pub moving: Option<Moving>,
}

/// How far a shard on its way has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Moving {
    /// What is being done.
    pub stage: MoveStage,
    /// Bytes of keys and values that were sent, by this leader.
    pub sent: u64,
    /// Bytes that needed not be sent, since they were there from before.
    pub known: u64,
    /// About how many thousandths are done; `None`: nobody can say.
    pub permille: Option<u32>,
    /// Milliseconds that this leader has been at it.
    pub taken_ms: u64,
}

impl Moving {
    /// Milliseconds that the copying will still take, if it goes on as it did.
    pub fn left_ms(&self) -> Option<u64> {
        let done = u64::from(self.permille.filter(|permille| *permille > 0)?);
        Some(self.taken_ms * (1000 - done.min(1000)) / done)
    }
}

/// What is being done about a shard on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum MoveStage {
    /// The newcomers are being made known to the group.
    Joining,
    /// The newcomers receive what the shard has.
    Copying,
    /// The newcomers have it, and receive what was written meanwhile.
    CatchingUp,
    /// Leadership goes to one of those that stay.
    HandingOver,
    /// The newcomers get a vote, and those that go lose theirs.
    Changing,
    /// It is done, and the coordinators are told.
    Reporting,
}

impl MoveStage {
    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            MoveStage::Joining => "joining",
            MoveStage::Copying => "copying",
            MoveStage::CatchingUp => "catching up",
            MoveStage::HandingOver => "handing over",
            MoveStage::Changing => "changing votes",
            MoveStage::Reporting => "reporting",
        }
    }
}

/// How the cluster is, as the coordinators' leader sees it.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Overview {
    /// Milliseconds since the Unix epoch, by the leader's clock.
    pub at_ms: u64,
    /// The leader.
    pub leader: NodeId,
    /// Its epoch.
    pub epoch: Epoch,
    /// The cluster map.
    pub map: ClusterMap,
    /// Where the ring wants the shards.
    pub target: Vec<Vec<NodeId>>,
    /// The participants, as they said last.
    pub nodes: Vec<NodeView>,
    /// Since when each move of the map has been under way: milliseconds, by this leader.
    pub move_ages_ms: Vec<(ShardId, u64)>,
    /// Shards that have moved since the cluster was made.
    pub moved_shards: u64,
    /// Bytes of keys and values that were sent for that.
    pub moved_bytes: u64,
    /// Transactions that something is being done about.
    pub in_flight: u64,
    /// Decisions that not all participants have applied.
    pub unfinished: u64,
    /// What happened in the last minutes, a second each, oldest first.
    pub history: Vec<Second>,
    /// Leaderships that began lately, oldest first.
    pub elections: Vec<Election>,
}

impl Overview {
    /// Who serves each shard. Of two that both say so, the one with the later entry is right; who is silent
    /// says nothing any more.
    pub fn leaders(&self) -> BTreeMap<ShardId, NodeId> {
        let mut leaders: BTreeMap<ShardId, (u64, NodeId)> = BTreeMap::new();
        for view in self.nodes.iter().filter(|view| !view.is_silent()) {
            for shard in view.report.shards.iter().filter(|shard| shard.serving) {
                let newest = leaders.entry(shard.shard).or_insert((shard.lead, view.id));
                *newest = (*newest).max((shard.lead, view.id));
            }
        }
        leaders.into_iter().map(|(shard, (_, node))| (shard, node)).collect()
    }

    /// About how many bytes each shard has: what its largest replica has.
    pub fn sizes(&self) -> BTreeMap<ShardId, u64> {
        let mut sizes: BTreeMap<ShardId, u64> = BTreeMap::new();
        for shard in self.nodes.iter().flat_map(|view| &view.report.shards) {
            let size = sizes.entry(shard.shard).or_default();
            *size = shard.bytes.max(*size);
        }
        sizes
    }

    /// Who moves a shard, and how far that is.
    pub fn progress(&self, shard: ShardId) -> Option<(NodeId, Moving)> {
        let reports = self.nodes.iter().flat_map(|view| view.report.shards.iter().map(|of| (view.id, of)));
        reports
            .filter(|(_, report)| report.shard == shard)
            .find_map(|(node, report)| Some((node, report.moving?)))
    }

    /// Since when a move has been under way: milliseconds.
    pub fn move_age_ms(&self, shard: ShardId) -> u64 {
        self.move_ages_ms.iter().find(|(moving, _)| *moving == shard).map_or(0, |(_, age)| *age)
    }

    /// Shards that must move and have not begun to.
    pub fn moves_waiting(&self) -> usize {
        let steps = diff(&self.map.placement, &self.target);
        steps.iter().filter(|step| self.map.move_of(step.shard).is_none()).count()
    }
}

/// A participant, as it said last.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct NodeView {
    /// Which.
    pub id: NodeId,
    /// Milliseconds since its last sign of life; `None`: none since this leader leads.
    pub seen_ms: Option<u64>,
    /// What it said.
    pub report: NodeReport,
}

/// A participant that was not heard of for this long counts as silent: milliseconds.
pub const SILENT_MS: u64 = 3000;

impl NodeView {
    /// Whether what it said last may not be so any more.
    pub fn is_silent(&self) -> bool {
        self.seen_ms.is_none_or(|seen| seen > SILENT_MS)
    }
}

/// What the leader did within a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Second {
    /// When it began: milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Transactions committed.
    pub committed: u64,
    /// Transactions aborted.
    pub aborted: u64,
    /// Requests refused as overload.
    pub shed: u64,
    /// Half of the commits took at most this, from their arrival to the answer: microseconds.
    pub p50_us: u64,
    /// 99 of 100 commits took at most this: microseconds.
    pub p99_us: u64,
}

/// A leadership that began.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Election {
    /// When it was noticed: milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The shard; `None`: the coordinators.
    pub shard: Option<ShardId>,
    /// Who leads since.
    pub node: NodeId,
}
