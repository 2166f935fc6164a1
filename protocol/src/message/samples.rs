//! One message of every kind, for tests of what all of them must survive.

use bytes::Bytes;

use crate::message::overview::{
    Election, MoveStage, Moving, NodeReport, NodeView, Overview, Second, ShardReport,
};
use crate::message::txn::{Cause, Outcome, Part, RangeCheck, ReadCheck, Work, Write};
use crate::message::{Request, Response, admin, coordinator, greeting, raft, shard};
use crate::{
    ClientId, ClusterId, ClusterMap, CoordinatorMember, Epoch, FolderId, FoundingId, GroupId, Incarnation,
    KeyRange, Lineage, MapEpoch, MemberState, Move, Node, NodeId, NodeState, ParticipantId, Reject, ShardId,
    Timestamp, TxnId,
};

const TXN: TxnId = TxnId { start: Timestamp(0x0102_0304_0506_0708), client: ClientId(0xc0ff_eec0_ffee_c0ff) };

pub fn work() -> Work {
    Work {
        reads: vec![ReadCheck { key: "seen".into(), version: Timestamp(5) }],
        ranges: vec![RangeCheck { range: KeyRange::prefix(b"{list}/"), snapshot: Timestamp(6) }],
        writes: vec![
            Write {
                key: "a key that is longer than a word".into(),
                value: Some(Bytes::from_static(b"value")),
            },
            Write { key: "gone".into(), value: None },
        ],
    }
}

pub fn prepare() -> Request {
    let prepare = shard::Prepare {
        txn: TXN,
        epoch: Epoch(3),
        floor: Timestamp(9),
        participants: vec![ParticipantId::Shard(ShardId(7)), ParticipantId::Resource("postgres".into())],
        work: work(),
    };
    of_shard(shard::Request::Prepare(prepare))
}

fn of_shard(request: shard::Request) -> Request {
    Request::Shard { shard: ShardId(7), request }
}

fn of_raft(body: raft::Body) -> Request {
    let (group, incarnation) = (GroupId::Shard(ShardId(7)), Incarnation(6));
    Request::Raft(raft::Request { group, from: NodeId(1), incarnation, to: NodeId(2), body })
}

fn node() -> Node {
    Node {
        id: NodeId(1),
        address: "node-1.example:7450".into(),
        zone: "north".into(),
        weight: 2,
        state: NodeState::Active,
        incarnation: Incarnation(6),
    }
}

fn plan() -> greeting::Plan {
    greeting::Plan { founding: Some(FoundingId(9)), listed: vec![NodeId(1), NodeId(2)] }
}

fn greet(folder: greeting::Folder) -> Request {
    let (address, from, to) = ("host:1".into(), NodeId(1), Some(NodeId(2)));
    Request::Coordinator(coordinator::Request::Greet(greeting::Greeting { from, address, to, folder }))
}

fn bounds() -> raft::Bounds {
    raft::Bounds { span: 1, from: Bytes::from_static(b"a"), to: Bytes::from_static(b"c") }
}

fn report() -> NodeReport {
    NodeReport {
        shards: vec![ShardReport {
            shard: ShardId(7),
            serving: true,
            lead: 1,
            prepared: 2,
            locks: 3,
            waiting: 4,
            bytes: 5,
            moving: Some(Moving {
                stage: MoveStage::Copying,
                sent: 6,
                known: 7,
                permille: Some(8),
                taken_ms: 9,
            }),
        }],
        in_doubt: Vec::new(),
    }
}

pub fn map() -> ClusterMap {
    ClusterMap {
        cluster: ClusterId([7; 16]),
        lineage: Lineage(11),
        epoch: MapEpoch(8),
        shards: 2,
        replicas: 1,
        coordinators: vec![node()],
        nodes: vec![node(), node()],
        placement: vec![vec![NodeId(1)], vec![]],
        formed: vec![LAST, None],
        moves: vec![Move { shard: ShardId(1), to: vec![NodeId(2)] }],
    }
}

const HEARD: coordinator::Heard =
    coordinator::Heard { lineage: Lineage(11), epoch: Epoch(3), leader: Incarnation(6), index: 99 };
const VOTE: raft::Vote = raft::Vote { term: 4, node: NodeId(1), committed: true };
const LAST: Option<raft::LogId> = Some(raft::LogId { term: 4, index: 99 });

/// One request of every kind.
pub fn requests() -> Vec<Request> {
    let membership = raft::Membership {
        voters: vec![vec![NodeId(1), NodeId(2)], vec![NodeId(1)]],
        members: vec![NodeId(1), NodeId(2), NodeId(3)],
    };
    let payloads = [
        raft::Payload::Blank,
        raft::Payload::Command(Bytes::from_static(b"command")),
        raft::Payload::Membership(membership.clone()),
    ];
    let entry = |(index, payload)| raft::Entry { id: raft::LogId { term: 4, index }, payload };
    let commit = coordinator::Commit {
        txn: TXN,
        epoch: Epoch(3),
        resubmission: true,
        parts: vec![Part { participant: ParticipantId::Shard(ShardId(7)), work: work() }],
    };
    vec![
        Request::Coordinator(coordinator::Request::Timestamps { count: 12, begins: Some(ClientId(7)) }),
        Request::Coordinator(coordinator::Request::Commit(commit)),
        Request::Coordinator(coordinator::Request::Outcome {
            txn: TXN,
            participants: vec![ParticipantId::Shard(ShardId(7))],
        }),
        Request::Coordinator(coordinator::Request::WhoLeads),
        Request::Coordinator(coordinator::Request::Map { known: MapEpoch(8) }),
        Request::Coordinator(coordinator::Request::Register {
            node: node(),
            folder: FolderId(5),
            previous: Some(Incarnation(5)),
            progress: 4711,
            heard: Some(HEARD),
            known: MapEpoch(8),
            report: report(),
        }),
        Request::Coordinator(coordinator::Request::Moved {
            shard: ShardId(7),
            voters: vec![NodeId(1), NodeId(2)],
            formed: raft::LogId { term: 4, index: 99 },
        }),
        Request::Coordinator(coordinator::Request::Carried { bytes: 1000 }),
        Request::Coordinator(coordinator::Request::Resolve { txns: vec![TXN; 3] }),
        Request::Coordinator(coordinator::Request::Ends { server: "node 1".into(), reason: "reason".into() }),
        greet(greeting::Folder::Empty(plan())),
        greet(greeting::Folder::Used {
            since: 12,
            incarnation: Incarnation(6),
            previous: Some(Incarnation(5)),
            progress: 4711,
        }),
        of_shard(shard::Request::Read { at: Timestamp(9), keys: vec!["a".into(), "".into()] }),
        of_shard(shard::Request::Scan {
            at: Timestamp(9),
            range: KeyRange::new("a".into(), None),
            rows_max: 100,
        }),
        of_shard(shard::Request::WhoLeads),
        prepare(),
        of_shard(shard::Request::CommitOnePhase(shard::CommitOnePhase {
            txn: TXN,
            floor: Timestamp(9),
            work: work(),
        })),
        of_shard(shard::Request::Finish {
            epoch: Epoch(3),
            decisions: vec![
                (TXN, shard::Decision::Commit { commit_ts: Timestamp(10) }),
                (TXN, shard::Decision::Abort),
            ],
        }),
        of_shard(shard::Request::Prepared { epoch: Epoch(3), after: Some(TXN), count_max: 100 }),
        of_shard(shard::Request::Outcome { txn: TXN }),
        of_raft(raft::Body::Append {
            vote: VOTE,
            previous: LAST,
            entries: (100..).zip(payloads).map(entry).collect(),
            committed: None,
        }),
        of_raft(raft::Body::Vote { vote: VOTE, last: LAST, leadership_transfer: true }),
        of_raft(raft::Body::PreVote { vote: VOTE, last: None }),
        of_raft(raft::Body::TransferLeader { vote: VOTE, to: NodeId(2), last: LAST }),
        of_raft(raft::Body::SnapshotOffer {
            vote: VOTE,
            transfer: 5,
            begin: true,
            offers: vec![raft::Offer { bounds: bounds(), hash: [9; 16] }],
        }),
        of_raft(raft::Body::SnapshotParts {
            vote: VOTE,
            transfer: 5,
            parts: vec![raft::Part {
                bounds: bounds(),
                pairs: vec![raft::Pair {
                    key: Bytes::from_static(b"b"),
                    value: Bytes::from_static(b"value"),
                }],
            }],
        }),
        of_raft(raft::Body::SnapshotEnd {
            vote: VOTE,
            last: LAST,
            membership: raft::StoredMembership { set_by: LAST, membership },
            transfer: 5,
        }),
        Request::Admin(admin::Request::Status),
        Request::Admin(admin::Request::Overview),
        Request::Admin(admin::Request::Node {
            node: NodeId(4),
            change: admin::NodeChange::Admit { weight: Some(2), zone: Some("south".into()) },
        }),
        Request::Admin(admin::Request::Coordinators(admin::CoordinatorChange::Add {
            members: vec![(NodeId(2), "host:2".into()), (NodeId(3), "host:3".into())],
        })),
        Request::Admin(admin::Request::Coordinators(admin::CoordinatorChange::Remove {
            ids: vec![NodeId(3)],
        })),
        Request::Admin(admin::Request::Coordinators(admin::CoordinatorChange::Replace {
            id: NodeId(2),
            address: Some("host:4".into()),
        })),
        Request::Admin(admin::Request::InDoubt),
        Request::Admin(admin::Request::Txn { txn: TXN }),
        Request::Admin(admin::Request::Resolve {
            shard: ShardId(7),
            txn: TXN,
            decision: shard::Decision::Commit { commit_ts: Timestamp(10) },
            note: "note".into(),
        }),
        Request::Admin(admin::Request::Switchover { to: Some(NodeId(2)) }),
        Request::Admin(admin::Request::Fault(admin::Fault::Arm {
            point: admin::FaultPoint::BeforeDecide,
            action: admin::FaultAction::Hold { millis: 7 },
            skip: 1,
        })),
    ]
}

/// One response of every kind.
pub fn responses() -> Vec<Response> {
    let commit_ts = Timestamp(10);
    let coordinator = [
        coordinator::Response::Timestamps {
            first: commit_ts,
            count: 5,
            retry_after_millis: 20,
            epoch: Epoch(3),
            map: MapEpoch(8),
        },
        coordinator::Response::Outcome(Outcome::Committed { commit_ts }),
        coordinator::Response::Expired,
        coordinator::Response::Map(map()),
        coordinator::Response::MapUnchanged,
        coordinator::Response::Registered { heard: HEARD, map: Some(map()) },
        coordinator::Response::Welcome(greeting::Welcome::Empty(plan())),
        coordinator::Response::Welcome(greeting::Welcome::Formed {
            founding: Some(FoundingId(9)),
            members: vec![(NodeId(1), "host:1".into()), (NodeId(2), "host:2".into())],
            place: greeting::Place::Awaited { since: 12 },
        }),
        coordinator::Response::Welcome(greeting::Welcome::Noted),
        coordinator::Response::Welcome(greeting::Welcome::Remembered {
            incarnation: Incarnation(5),
            progress: 4711,
            address: "host:1".into(),
        }),
        coordinator::Response::Welcome(greeting::Welcome::Elsewhere { address: "host:1".into() }),
        coordinator::Response::Welcome(greeting::Welcome::Removed),
        coordinator::Response::Noted,
        coordinator::Response::Resolved {
            epoch: Epoch(3),
            resolutions: vec![
                coordinator::Resolution::Committed { commit_ts },
                coordinator::Resolution::Aborted,
                coordinator::Resolution::InFlight,
            ],
        },
    ];
    let shard = [
        shard::Response::Values(vec![shard::Version { version: commit_ts, value: None }]),
        shard::Response::Page {
            rows: vec![shard::Row {
                key: "a".into(),
                version: commit_ts,
                value: Bytes::from_static(b"value"),
            }],
            more: true,
        },
        shard::Response::Vote(shard::Vote::Yes { above: commit_ts }),
        shard::Response::Expired,
        shard::Response::Finished,
        shard::Response::Prepared {
            txns: vec![shard::PreparedTxn { txn: TXN, participants: vec![ParticipantId::Shard(ShardId(7))] }],
            more: false,
        },
    ];
    let causes = [
        Cause::ReadConflict { key: "a".into(), version: commit_ts },
        Cause::RangeConflict { range: KeyRange::prefix(b"a"), key: "ab".into(), version: commit_ts },
        Cause::Locked { key: "a".into(), by: TXN },
        Cause::TooOld,
        Cause::Unreachable { participant: ParticipantId::Resource("postgres".into()) },
        Cause::CoordinatorChanged,
        Cause::Superseded,
        Cause::Settled,
    ];
    let no = |cause: Cause| shard::Response::Vote(shard::Vote::No { cause });
    let aborted = |cause: Cause| shard::Response::Outcome(Outcome::Aborted { cause });
    let raft = [
        raft::Response::Append(raft::Appended::Success),
        raft::Response::Append(raft::Appended::Partial(LAST)),
        raft::Response::Append(raft::Appended::Conflict),
        raft::Response::Append(raft::Appended::HigherVote(VOTE)),
        raft::Response::Vote { vote: VOTE, granted: true, last: LAST },
        raft::Response::TransferLeader { accepted: true },
        raft::Response::SnapshotWanted { wanted: vec![0, 2], rest_is_empty: true },
        raft::Response::SnapshotStored,
        raft::Response::SnapshotDone { vote: VOTE },
    ];
    let admin = [
        admin::Response::Coordinator(admin::CoordinatorStatus {
            cluster: ClusterId([7; 16]),
            id: NodeId(1),
            version: "0.1.0".into(),
            leader: Some(NodeId(2)),
            epoch: None,
            map_epoch: MapEpoch(8),
            in_flight: 1,
            unfinished: 2,
            committed: 3,
            aborted: 4,
            nodes_seen: vec![(NodeId(1), Some(17)), (NodeId(2), None)],
            members: vec![CoordinatorMember {
                id: NodeId(1),
                address: "host:1".into(),
                since: 12,
                state: MemberState::Voting,
            }],
            notices: vec![admin::Notice { at_ms: 1, what: "something".into() }],
        }),
        admin::Response::Participant(admin::ParticipantStatus {
            cluster: ClusterId([7; 16]),
            id: NodeId(1),
            version: "0.1.0".into(),
            map_epoch: MapEpoch(8),
            shards: vec![admin::ShardStatus {
                shard: ShardId(7),
                leader: None,
                serving: false,
                lead: 1,
                applied: 1,
                prepared: 2,
                locks: 3,
                waiting: 4,
            }],
        }),
    ];
    let overview = Overview {
        at_ms: 1,
        leader: NodeId(1),
        epoch: Epoch(3),
        map: map(),
        target: vec![vec![NodeId(1)]],
        nodes: vec![NodeView { id: NodeId(1), seen_ms: Some(5), report: report() }],
        move_ages_ms: vec![(ShardId(1), 7)],
        moved_shards: 8,
        moved_bytes: 9,
        in_flight: 10,
        unfinished: 11,
        history: vec![Second { at_ms: 1, committed: 2, aborted: 3, shed: 4, p50_us: 5, p99_us: 6 }],
        elections: vec![Election { at_ms: 1, shard: Some(ShardId(1)), node: NodeId(2) }],
    };
    let overviews = [
        admin::Response::Overview(overview),
        admin::Response::NodeChanged,
        admin::Response::CoordinatorsChanged,
    ];
    let rejects = [
        Reject::NotLeader { leader: Some(NodeId(2)) },
        Reject::Deposed,
        Reject::StaleEpoch { current: Epoch(3) },
        Reject::StaleMap { epoch: MapEpoch(8) },
        Reject::Overloaded { retry_after_millis: 20 },
        Reject::NodeTaken { node: NodeId(1), address: "host:1".into() },
        Reject::NodeRemoved { node: NodeId(1) },
        Reject::NodePassed {
            node: NodeId(1),
            incarnation: Incarnation(5),
            progress: 4711,
            address: "host:1".into(),
        },
        Reject::NodeElsewhere { node: NodeId(1), address: "host:1".into() },
        Reject::NotAdmitted { node: NodeId(1) },
        Reject::CoordinatorPassed { epoch: Epoch(3), index: 99 },
        Reject::DeadlineExceeded,
        Reject::Blocked { key: "a".into(), by: TXN },
        Reject::ShuttingDown,
        Reject::Forbidden { role: "client".into(), request: "Prepare".into() },
        Reject::malformed("reason"),
        Reject::TooLarge { reason: "reason".into() },
        Reject::SnapshotTooOld,
        Reject::WrongNode { actual: NodeId(2) },
        Reject::Internal { reason: "reason".into() },
    ];
    coordinator
        .into_iter()
        .map(Response::Coordinator)
        .chain(shard.into_iter().map(Response::Shard))
        .chain(causes.clone().map(no).map(Response::Shard))
        .chain(causes.map(aborted).map(Response::Shard))
        .chain(raft.into_iter().map(Response::Raft))
        .chain(admin.into_iter().map(Response::Admin))
        .chain(overviews.into_iter().map(Response::Admin))
        .chain(rejects.into_iter().map(Response::Rejected))
        .collect()
}
