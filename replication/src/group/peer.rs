//! What the other members of a group say to this one, and its answers.

use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest};
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf};
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use troth_protocol::Reject;
use troth_protocol::message::raft::{self as wire, Appended, Body};

use super::Group;
use crate::machine::Machine;
use crate::snapshot::Transfer;
use crate::snapshot::incoming::{Session, Site, Unfit};
use crate::types::{self, Types};

impl<M: Machine> Group<M> {
    /// While this is held, no snapshot takes the place of the machine's state: for whoever changes
    /// that state beside the log, as every replica may for itself. `None`: the state is not this member's to
    /// change, as it has stopped, or could not put a snapshot in place.
    pub async fn hold_state(&self) -> Option<impl Send + '_> {
        let held = self.inner.incoming.lock().await;
        self.inner.site.is_open().then_some(held)
    }

    /// Answers another member.
    ///
    /// # Errors
    /// If the message is not for this member, or the member has stopped.
    pub async fn step(&self, request: wire::Request) -> Result<wire::Response, Reject> {
        if request.to != self.inner.node {
            return Err(Reject::WrongNode { actual: self.inner.node });
        }
        if !self.inner.directory.admits(request.group, request.from, request.incarnation) {
            return Err(Reject::NotAdmitted { node: request.from });
        }
        let raft = &self.inner.raft;
        let stopped = |error: String| {
            tracing::debug!(group = %self.inner.group, error, "a message for a stopped member");
            Reject::ShuttingDown
        };
        match request.body {
            Body::Append { vote, previous, entries, committed } => {
                let request = AppendEntriesRequest {
                    vote: types::vote(vote),
                    prev_log_id: previous.map(types::log_id),
                    entries: entries.into_iter().map(types::entry).collect(),
                    leader_commit: committed.map(types::log_id),
                };
                *self.inner.heard.lock() = Some(Instant::now());
                let response =
                    raft.append_entries(request).await.map_err(|error| stopped(error.to_string()))?;
                Ok(wire::Response::Append(match response {
                    AppendEntriesResponse::Success => Appended::Success,
                    AppendEntriesResponse::PartialSuccess(upto) => {
                        Appended::Partial(upto.as_ref().map(types::log_id_to_wire))
                    }
                    AppendEntriesResponse::Conflict => Appended::Conflict,
                    AppendEntriesResponse::HigherVote(vote) => {
                        Appended::HigherVote(types::vote_to_wire(&vote))
                    }
                }))
            }
            Body::Vote { .. } | Body::PreVote { .. } if Instant::now() < self.inner.silent_until => {
                Err(Reject::overloaded(self.inner.silent_until - Instant::now()))
            }
            Body::Vote { last, .. } | Body::PreVote { last, .. } if last < self.known_to_be_committed() => {
                Err(Reject::malformed("this candidate lacks what the group has committed"))
            }
            Body::Vote { vote, last, leadership_transfer } => {
                let mut request = VoteRequest::new(types::vote(vote), last.map(types::log_id));
                request.leadership_transfer = leadership_transfer;
                let response = raft.vote(request).await.map_err(|error| stopped(error.to_string()))?;
                Ok(vote_response(&response))
            }
            Body::PreVote { vote, last } => {
                let request = VoteRequest::new(types::vote(vote), last.map(types::log_id));
                let response = raft.pre_vote(request).await.map_err(|error| stopped(error.to_string()))?;
                Ok(vote_response(&response))
            }
            Body::TransferLeader { vote, to, last } => {
                let request = TransferLeaderRequest::new(types::vote(vote), to.0, last.map(types::log_id));
                let accepted =
                    raft.handle_transfer_leader(request).await.map_err(|error| stopped(error.to_string()))?;
                Ok(wire::Response::TransferLeader { accepted: accepted.is_ok() })
            }
            Body::SnapshotOffer { vote, transfer, begin, offers } => {
                if let Some(newer) = self.newer_vote(vote) {
                    return Ok(wire::Response::SnapshotDone { vote: newer });
                }
                if begin {
                    *self.inner.incoming.lock().await = Some(Session::new(transfer, &self.inner.site));
                }
                let compare = move |session: &mut Session, site: &Site| session.offered(site, &offers);
                let (wanted, rest_is_empty) = self.receive(transfer, compare).await?;
                Ok(wire::Response::SnapshotWanted { wanted, rest_is_empty })
            }
            Body::SnapshotParts { vote, transfer, parts } => {
                if let Some(newer) = self.newer_vote(vote) {
                    return Ok(wire::Response::SnapshotDone { vote: newer });
                }
                self.receive(transfer, move |session, site| session.arrived(site, &parts)).await?;
                Ok(wire::Response::SnapshotStored)
            }
            Body::SnapshotEnd { vote, last, membership, transfer } => {
                // Held until it is in place, so that no other one is put together meanwhile; by a task, as
                // whoever called may give up.
                let mut incoming = self.inner.incoming.clone().lock_owned().await;
                let session = incoming.take().filter(|session| session.is(transfer));
                if session.as_ref().is_some_and(Session::is_in_place) {
                    *incoming = session;
                    return Ok(wire::Response::SnapshotDone { vote: self.own_vote() });
                }
                let unfit = || Reject::malformed("this snapshot has not arrived whole");
                let mut session = session.ok_or_else(unfit)?;
                let area = session.complete(&self.inner.site).ok_or_else(unfit)?;
                self.inner.site.close(area);
                let snapshot = SnapshotOf::<Types, Transfer> {
                    meta: SnapshotMetaOf::<Types> {
                        last_log_id: last.map(types::log_id),
                        last_membership: types::stored_membership(membership),
                    },
                    snapshot: Transfer::Arrived(area),
                };
                let raft = raft.clone();
                let installing = tokio::spawn(async move {
                    let installed = raft.install_full_snapshot(types::vote(vote), snapshot).await;
                    if installed.is_ok() {
                        session.set_in_place();
                        *incoming = Some(session);
                    }
                    installed
                });
                let installed = installing.await.map_err(|error| stopped(error.to_string()))?;
                let response = installed.map_err(|error| stopped(error.to_string()))?;
                Ok(wire::Response::SnapshotDone { vote: types::vote_to_wire(&response.vote) })
            }
        }
    }

    /// An entry that every leader must have. A member that was taken into the group anew, without what it
    /// had acknowledged before, would otherwise help to elect one that missed that.
    fn known_to_be_committed(&self) -> Option<wire::LogId> {
        self.inner.directory.committed(self.inner.group)
    }

    /// The vote that this member follows, if it is newer than that of a sender.
    fn newer_vote(&self, sender: wire::Vote) -> Option<wire::Vote> {
        let own = self.own_vote();
        (types::vote(own) > types::vote(sender)).then_some(own)
    }

    fn own_vote(&self) -> wire::Vote {
        use openraft::async_runtime::watch::WatchReceiver;
        types::vote_to_wire(&self.inner.raft.server_metrics().borrow_watched().vote)
    }

    /// Lets the session of a transfer take something in, on a thread that may wait for the disk. The
    /// thread holds the lock: whoever called may give up, and what it writes must not come in between
    /// what a later session writes.
    async fn receive<T: Send + 'static>(
        &self,
        transfer: u64,
        take: impl FnOnce(&mut Session, &Site) -> Result<T, Unfit> + Send + 'static,
    ) -> Result<T, Reject> {
        let mut incoming = self.inner.incoming.clone().lock_owned().await;
        let site = self.inner.site.clone();
        let work = spawn_blocking(move || {
            let session = incoming.as_mut().filter(|session| session.is(transfer));
            let taken = take(session.ok_or(Unfit::OutOfOrder)?, &site);
            if taken.is_err() {
                // Its sender begins anew.
                *incoming = None;
            }
            taken
        });
        let taken = work.await.map_err(|error| Unfit::Store(std::io::Error::other(error))).flatten();
        taken.map_err(|error| match error {
            Unfit::OutOfOrder => Reject::malformed(error.to_string()),
            Unfit::Store(error) => Reject::Internal { reason: error.to_string() },
        })
    }
}

fn vote_response(response: &openraft::raft::VoteResponse<Types>) -> wire::Response {
    wire::Response::Vote {
        vote: types::vote_to_wire(&response.vote),
        granted: response.vote_granted,
        last: response.last_log_id.as_ref().map(types::log_id_to_wire),
    }
}
