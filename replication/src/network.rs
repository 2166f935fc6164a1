//! Between the Raft library and the transport, in both directions.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::FutureExt;
use futures_util::{Stream, StreamExt, pin_mut};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, v2::RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use openraft::{EntryPayload, OptionalSend};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use troth_protocol::limits::SHARED_FRAME_BYTES_MAX;
use troth_protocol::message::admin::FaultPoint;
use troth_protocol::message::raft::{self as wire, Appended, Body, Offer, Part};
use troth_protocol::message::{Request, Response};
use troth_protocol::net::{CallError, Peer, Transport};
use troth_protocol::{GroupId, Incarnation, NodeId, Reject, fault};

use crate::snapshot::Transfer;
use crate::snapshot::outgoing::{Outgoing, Piece, Throttle};
use crate::types::{self, Types, Vote};

/// Appends to one member that may be under way at once.
const PIPELINE: usize = 64;

/// How long a member may take to make entries durable. Heartbeats have less: they tell who is alive.
const APPEND_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a member may take for some parts of a snapshot.
const PIECE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a member may take to put a snapshot in place, and when it is asked again whether it has.
const INSTALL_PATIENCE: Duration = Duration::from_secs(3600);
const INSTALL_ASK: Duration = Duration::from_secs(10);

/// What an entry takes in a message besides its command, at most.
const ENTRY_BYTES: usize = 128;

/// Whether a request may be too large to share a stream with others, and so keep its place among them.
fn is_large(request: &AppendEntriesRequest<Types>) -> bool {
    let size = |entry: &types::Entry| match &entry.payload {
        EntryPayload::Normal(command) => command.0.len() + ENTRY_BYTES,
        EntryPayload::Blank | EntryPayload::Membership(_) => ENTRY_BYTES,
    };
    request.entries.iter().map(size).sum::<usize>() > SHARED_FRAME_BYTES_MAX
}

/// Where the members of groups are.
pub trait Directory: Send + Sync + 'static {
    /// Where to reach a member; `None` while nobody knows.
    fn peer(&self, group: GroupId, node: NodeId) -> Option<Peer>;

    /// Whether this start of a member is the one that counts, as far as is known.
    fn admits(&self, _group: GroupId, _node: NodeId, _incarnation: Incarnation) -> bool {
        true
    }

    /// An entry that the group is known to have committed: whoever lacks it gets no vote. Needed where
    /// members leave and come back without what they had.
    fn committed(&self, _group: GroupId) -> Option<wire::LogId> {
        None
    }
}

/// How the members of one group are reached from here.
#[derive(Clone)]
pub(crate) struct Network {
    pub group: GroupId,
    pub from: NodeId,
    pub incarnation: Incarnation,
    pub transport: Arc<dyn Transport>,
    pub directory: Arc<dyn Directory>,
    pub outgoing: Arc<Outgoing>,
    pub throttle: Option<Throttle>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Member;

    async fn new_client(&mut self, target: u64, _node: &()) -> Member {
        Member { network: self.clone(), to: NodeId(target) }
    }
}

/// One member, as another calls it.
#[derive(Clone)]
pub(crate) struct Member {
    network: Network,
    to: NodeId,
}

impl Member {
    async fn call(&self, body: Body, timeout: Duration) -> Result<wire::Response, RPCError<Types>> {
        let Network { group, from, incarnation, transport, directory, .. } = &self.network;
        let unreachable = |reason: String| RPCError::Unreachable(Unreachable::from_string(reason));
        let peer = directory
            .peer(*group, self.to)
            .ok_or_else(|| unreachable(format!("nobody knows where node {} is", self.to)))?;
        let (group, from, incarnation) = (*group, *from, *incarnation);
        let request = Request::Raft(wire::Request { group, from, incarnation, to: self.to, body });
        match transport.call(&peer, request, Instant::now() + timeout).await {
            Ok(Response::Raft(response)) => Ok(response),
            Ok(Response::Rejected(reject @ Reject::DeadlineExceeded)) => {
                Err(RPCError::Network(NetworkError::from_string(reject)))
            }
            Ok(Response::Rejected(reject)) => Err(unreachable(reject.to_string())),
            Ok(Response::Coordinator(_) | Response::Shard(_) | Response::Admin(_)) => {
                Err(unreachable(format!("node {} gave an answer of the wrong kind", self.to)))
            }
            Err(
                error @ (CallError::Unreachable { .. } | CallError::Refused { .. } | CallError::TooLarge(_)),
            ) => Err(unreachable(error.to_string())),
            Err(error @ (CallError::Lost { .. } | CallError::DeadlineExceeded { .. })) => {
                Err(RPCError::Network(NetworkError::from_string(error)))
            }
        }
    }

    fn wrong_answer(&self) -> RPCError<Types> {
        let reason = format!("node {} gave an answer of the wrong kind", self.to);
        RPCError::Unreachable(Unreachable::from_string(reason))
    }

    async fn append(
        &self,
        request: AppendEntriesRequest<Types>,
        timeout: Duration,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        let body = Body::Append {
            vote: types::vote_to_wire(&request.vote),
            previous: request.prev_log_id.as_ref().map(types::log_id_to_wire),
            entries: request.entries.iter().map(types::entry_to_wire).collect(),
            committed: request.leader_commit.as_ref().map(types::log_id_to_wire),
        };
        match self.call(body, timeout).await? {
            wire::Response::Append(appended) => Ok(match appended {
                Appended::Success => AppendEntriesResponse::Success,
                Appended::Partial(upto) => AppendEntriesResponse::PartialSuccess(upto.map(types::log_id)),
                Appended::Conflict => AppendEntriesResponse::Conflict,
                Appended::HigherVote(vote) => AppendEntriesResponse::HigherVote(types::vote(vote)),
            }),
            _ => Err(self.wrong_answer()),
        }
    }

    async fn ask_for_vote(
        &self,
        body: Body,
        timeout: Duration,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        match self.call(body, timeout).await? {
            wire::Response::Vote { vote, granted, last } => {
                Ok(VoteResponse::new(types::vote(vote), last.map(types::log_id), granted))
            }
            _ => Err(self.wrong_answer()),
        }
    }
}

impl RaftNetworkV2<Types> for Member {
    type SnapshotData = Transfer;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        self.append(request, option.soft_ttl()).await
    }

    /// Many appends under way at once, answers in the order of the requests: `buffered` keeps the order
    /// of what comes back, and the transport that of what is sent. It does so only for small messages,
    /// so a large one is sent when nothing else is under way. Each gets its place before the next one
    /// looks for its own: of several that wait for one, any may be woken first.
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>, RPCError<Types>>,
    >
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        let member = self.clone();
        let places = Arc::new(Semaphore::new(PIPELINE));
        let answers = input
            .then(move |request| {
                let count = if is_large(&request) { PIPELINE as u32 } else { 1 };
                let place = places.clone().acquire_many_owned(count);
                async move { (place.await.expect("never closed"), request) }
            })
            .map(move |(place, request)| {
                let member = member.clone();
                let previous = request.prev_log_id;
                let last = request.entries.last().map(|entry| entry.log_id).or(previous);
                let idle = request.entries.is_empty();
                let timeout = if idle { option.soft_ttl() } else { APPEND_TIMEOUT };
                async move {
                    let _place = place;
                    let response = member.append(request, timeout).await?;
                    Ok(response.into_stream_result(previous, last))
                }
            })
            .buffered(PIPELINE);
        let answers: BoxStream<'s, _> = Box::pin(answers);
        async move { Ok(answers) }.boxed()
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let body = Body::Vote {
            vote: types::vote_to_wire(&request.vote),
            last: request.last_log_id.as_ref().map(types::log_id_to_wire),
            leadership_transfer: request.leadership_transfer,
        };
        self.ask_for_vote(body, option.soft_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let body = Body::PreVote {
            vote: types::vote_to_wire(&request.vote),
            last: request.last_log_id.as_ref().map(types::log_id_to_wire),
        };
        self.ask_for_vote(body, option.soft_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<Types, Transfer>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let sending = self.send_snapshot(vote, snapshot).fuse();
        let cancel = cancel.fuse();
        pin_mut!(sending, cancel);
        futures_util::select! {
            result = sending => result,
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let body = Body::TransferLeader {
            vote: types::vote_to_wire(request.from_leader()),
            to: NodeId(*request.to_node_id()),
            last: request.last_log_id().map(types::log_id_to_wire),
        };
        match self.call(body, option.soft_ttl()).await? {
            wire::Response::TransferLeader { accepted: true } => Ok(Ok(())),
            wire::Response::TransferLeader { accepted: false } => {
                Err(RPCError::Unreachable(Unreachable::from_string("the successor is not ready")))
            }
            _ => Err(self.wrong_answer()),
        }
    }
}

impl Member {
    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: SnapshotOf<Types, Transfer>,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let broken = |reason: String| StreamingError::Unreachable(Unreachable::from_string(reason));
        let mut pieces = match snapshot.snapshot {
            Transfer::Outgoing(pieces) => pieces,
            Transfer::Postponed => return Err(broken("as many snapshots are on their way as may be".into())),
            Transfer::Position | Transfer::Arrived(_) => {
                return Err(broken("this snapshot carries no data".into()));
            }
        };
        let transfer: u64 = rand::random();
        let vote = types::vote_to_wire(&vote);
        let index = snapshot.meta.last_log_id.map_or(0, |id| id.index);
        let on_its_way = self.network.outgoing.begin(self.to, index);
        tracing::info!(group = %self.network.group, to = %self.to, index, "sending a snapshot");

        let offer = Body::SnapshotOffer { vote, transfer, begin: true, offers: Vec::new() };
        let mut rest_is_empty = match self.call(offer, PIECE_TIMEOUT).await? {
            wire::Response::SnapshotWanted { rest_is_empty, .. } => rest_is_empty,
            wire::Response::SnapshotDone { vote } => return Ok(SnapshotResponse::new(types::vote(vote))),
            _ => return Err(self.wrong_answer().into()),
        };
        while let Some(piece) = pieces.next().await {
            let Piece { mut parts, bytes, share } = piece.map_err(|error| broken(error.to_string()))?;
            if !rest_is_empty {
                let offers =
                    parts.iter().map(|(part, hash)| Offer { bounds: part.bounds.clone(), hash: *hash });
                let offers = offers.collect();
                let offer = Body::SnapshotOffer { vote, transfer, begin: false, offers };
                match self.call(offer, PIECE_TIMEOUT).await? {
                    wire::Response::SnapshotWanted { wanted, rest_is_empty: empty } => {
                        rest_is_empty = empty;
                        let wanted: BTreeSet<usize> = wanted.iter().map(|place| *place as usize).collect();
                        let mut place = 0..;
                        parts.retain(|_| place.next().is_some_and(|place| wanted.contains(&place)));
                    }
                    wire::Response::SnapshotDone { vote } => {
                        return Ok(SnapshotResponse::new(types::vote(vote)));
                    }
                    _ => return Err(self.wrong_answer().into()),
                }
            }
            let parts: Vec<Part> = parts.into_iter().map(|(part, _)| part).collect();
            let pairs = parts.iter().flat_map(|part| &part.pairs);
            let sent: usize = pairs.map(|pair| pair.key.len() + pair.value.len()).sum();
            if !parts.is_empty() {
                if let Some(throttle) = &self.network.throttle {
                    throttle.pass(sent).await;
                }
                fault::pass(FaultPoint::SnapshotParts).await;
                match self.call(Body::SnapshotParts { vote, transfer, parts }, PIECE_TIMEOUT).await? {
                    wire::Response::SnapshotStored => {}
                    wire::Response::SnapshotDone { vote } => {
                        return Ok(SnapshotResponse::new(types::vote(vote)));
                    }
                    _ => return Err(self.wrong_answer().into()),
                }
            }
            on_its_way.advance(sent, bytes - sent, share);
        }
        let end = Body::SnapshotEnd {
            vote,
            last: snapshot.meta.last_log_id.as_ref().map(types::log_id_to_wire),
            membership: types::stored_membership_to_wire(&snapshot.meta.last_membership),
            transfer,
        };
        let patience = Instant::now() + INSTALL_PATIENCE;
        loop {
            match self.call(end.clone(), INSTALL_ASK).await {
                Ok(wire::Response::SnapshotDone { vote }) => {
                    return Ok(SnapshotResponse::new(types::vote(vote)));
                }
                Ok(_) => return Err(self.wrong_answer().into()),
                // It is still at it, as far as anybody knows.
                Err(RPCError::Network(_)) if Instant::now() < patience => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use parking_lot::Mutex;
    use tokio::time::timeout;
    use troth_protocol::ShardId;
    use troth_protocol::net::BoxFuture as Boxed;

    use super::*;
    use crate::types::{Command, Entry};

    /// Takes note of what it is asked, and answers when it may.
    struct Gated {
        asked: Mutex<Vec<u64>>,
        gate: Semaphore,
    }

    impl Transport for Gated {
        fn call<'a>(
            &'a self,
            _: &'a Peer,
            request: Request,
            _: Instant,
        ) -> Boxed<'a, Result<Response, CallError>> {
            Box::pin(async move {
                let Request::Raft(wire::Request { body: Body::Append { previous, .. }, .. }) = request else {
                    panic!("only appends are sent here");
                };
                self.asked.lock().push(previous.map_or(0, |previous| previous.index));
                self.gate.acquire().await.expect("never closed").forget();
                Ok(Response::Raft(wire::Response::Append(Appended::Success)))
            })
        }
    }

    struct Somewhere;

    impl Directory for Somewhere {
        fn peer(&self, _: GroupId, _: NodeId) -> Option<Peer> {
            Some(Peer::participant("there:1"))
        }
    }

    fn request(index: u64, bytes: usize) -> AppendEntriesRequest<Types> {
        let id = |index| types::log_id(wire::LogId { term: 1, index });
        let payload = EntryPayload::Normal(Command(Bytes::from(vec![0; bytes])));
        AppendEntriesRequest {
            vote: types::vote(wire::Vote { term: 1, node: NodeId(1), committed: true }),
            prev_log_id: Some(id(index)),
            entries: vec![Entry { log_id: id(index + 1), payload }],
            leader_commit: None,
        }
    }

    /// Seen in a test with large transactions, once in some twenty starts: one append waited behind a
    /// large one, and another one that came just when that was answered was sent first. The follower did
    /// not have the entry before it, and said so; by then it had acknowledged that entry.
    #[tokio::test]
    async fn an_append_does_not_overtake_one_that_waits_behind_a_large_one() {
        let transport = Arc::new(Gated { asked: Mutex::default(), gate: Semaphore::new(0) });
        let network = Network {
            group: GroupId::Shard(ShardId(1)),
            from: NodeId(1),
            incarnation: Incarnation(1),
            transport: transport.clone(),
            directory: Arc::new(Somewhere),
            outgoing: Arc::default(),
            throttle: None,
        };
        let mut member = Member { network, to: NodeId(2) };
        let (requests, input) = tokio::sync::mpsc::unbounded_channel();
        let input = futures_util::stream::unfold(input, async |mut input| Some((input.recv().await?, input)));
        let option = RPCOption::new(Duration::from_secs(5));
        let mut answers = member.stream_append(Box::pin(input), option).await.expect("a stream");

        requests.send(request(1, 2 * SHARED_FRAME_BYTES_MAX)).expect("it is read");
        requests.send(request(2, 10)).expect("it is read");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(*transport.asked.lock(), [1], "the large one is under way alone");
        requests.send(request(3, 10)).expect("it is read");
        transport.gate.add_permits(1);
        let first = answers.next().now_or_never();
        assert!(matches!(first, Some(Some(Ok(_)))), "the large one is answered");
        assert!(answers.next().now_or_never().is_none());
        assert_eq!(*transport.asked.lock(), [1, 2, 3]);
        transport.gate.add_permits(2);
        drop(requests);
        let rest = timeout(Duration::from_secs(20), answers.collect::<Vec<_>>()).await.expect("in time");
        assert!(rest.len() == 2 && rest.iter().all(Result::is_ok));
    }
}
