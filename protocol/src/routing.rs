//! Calling the leader of a group, wherever it is.
//!
//! A [`Router`] knows the cluster map and remembers who led each group last. It follows redirects,
//! tries the other members when one cannot be reached, fetches a newer map when it is told that its
//! own is stale, and pauses with jitter in between, all until the caller's deadline. It sends a
//! request again only if that is harmless: if the request is idempotent, or if it certainly had no
//! effect.
//!
//! Attempts beyond the first have a budget: while a cluster is in trouble, those who wait for it must
//! not keep it there.
//!
//! A leader that has died or hangs says nothing. While a call waits for it, the router asks the other
//! members who leads, and gives the call up as soon as one of them does.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};
use tower::retry::budget::{Budget, TpsBudget};

use crate::cluster_map::{ClusterMap, Node};
use crate::id::{GroupId, MapEpoch, NodeId, ShardId};
use crate::message::{Request, Response, coordinator, shard};
use crate::net::{CallError, Peer, Role, Transport};
use crate::reject::Reject;

/// How long one attempt may take before another member is asked as well, if that is harmless.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// A call that has waited this long for an answer makes the router ask the other members who leads,
/// and so again and again.
const SUSPECT_AFTER: Duration = Duration::from_millis(300);
const PROBE_INTERVAL: Duration = Duration::from_millis(100);

/// How long a member may take to say whether it leads.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

/// The shortest and longest pause between attempts.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// What attempts beyond the first may add to the load: a fifth, and ten a second besides, over the last
/// ten seconds. Beyond that they are not given up, but made as seldom as can be.
const BUDGET_SHARE: f32 = 0.2;
const BUDGET_PER_SECOND: u32 = 10;
const BUDGET_WINDOW: Duration = Duration::from_secs(10);

/// Coordinators of which is remembered what came of asking them.
const TROUBLES_MAX: usize = 64;

/// Whether a request may be sent again when nobody knows what became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resend {
    /// It has the same effect once or twice.
    Idempotent,
    /// It must not be carried out twice: give up as soon as it may have been; and as soon as there is too
    /// much to do, for who waits with it holds up others.
    OnlyUnsent,
}

/// A call that brought no answer by its deadline, or one that no retry can mend.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum RouteError {
    /// The last refusal.
    #[error("{0}")]
    Rejected(Reject),
    /// The last failure of the network.
    #[error("{0}")]
    Call(CallError),
    /// There is nobody to call.
    #[error("no member of the {0} is known")]
    NoMember(GroupId),
    /// The caller has closed its connections.
    #[error("the connections are closed")]
    Closed,
    /// The answer is of a kind that does not belong to the question.
    #[error("a server gave an answer of the wrong kind")]
    WrongAnswer,
}

impl RouteError {
    /// Whether the request may have taken effect all the same.
    pub fn is_ambiguous(&self) -> bool {
        match self {
            RouteError::Rejected(reject) => reject.is_ambiguous(),
            RouteError::Call(error) => error.is_ambiguous(),
            RouteError::NoMember(_) | RouteError::Closed => false,
            RouteError::WrongAnswer => true,
        }
    }

    /// Whether another attempt may bring what this one did not.
    pub fn is_worth_another(&self) -> bool {
        match self {
            // It was only the deadline of the attempt.
            RouteError::Rejected(Reject::Blocked { .. } | Reject::DeadlineExceeded) => true,
            RouteError::Rejected(reject) => reject.is_retriable(),
            RouteError::Call(CallError::TooLarge(_)) => false,
            RouteError::Call(_) => true,
            RouteError::NoMember(_) | RouteError::Closed | RouteError::WrongAnswer => false,
        }
    }

    /// Whether who may resend like this has to give up: it may have been carried out already; or there is
    /// too much to do, and who waits with it holds up others.
    pub fn ends(&self, resend: Resend) -> bool {
        let overloaded = matches!(self, RouteError::Rejected(Reject::Overloaded { .. }));
        resend == Resend::OnlyUnsent && (self.is_ambiguous() || overloaded)
    }

    /// The refusal, if it was one.
    pub fn reject(&self) -> Option<&Reject> {
        match self {
            RouteError::Rejected(reject) => Some(reject),
            RouteError::Call(_) | RouteError::NoMember(_) | RouteError::Closed | RouteError::WrongAnswer => {
                None
            }
        }
    }
}

/// Calls leaders. Cheap to share; all state is a cache.
pub struct Router {
    transport: Arc<dyn Transport>,
    seeds: Vec<Peer>,
    map: watch::Sender<Arc<ClusterMap>>,
    leaders: Mutex<HashMap<GroupId, Peer>>,
    refreshing: tokio::sync::Mutex<()>,
    /// Groups whose members are being asked who leads.
    probing: Mutex<HashSet<GroupId>>,
    /// Which coordinator is asked for the map first.
    map_source: AtomicUsize,
    budget: TpsBudget,
    /// Nobody is called any more.
    closed: AtomicBool,
    /// What came last of asking each coordinator, where that was no answer.
    troubles: Mutex<HashMap<Peer, CallError>>,
}

impl Router {
    /// A router that finds the cluster through some of its coordinators.
    pub fn new(transport: Arc<dyn Transport>, seeds: Vec<Peer>) -> Router {
        let empty = ClusterMap {
            cluster: Default::default(),
            lineage: Default::default(),
            epoch: MapEpoch(0),
            shards: 0,
            replicas: 0,
            coordinators: Vec::new(),
            nodes: Vec::new(),
            placement: Vec::new(),
            formed: Vec::new(),
            moves: Vec::new(),
        };
        Router {
            transport,
            seeds,
            map: watch::channel(Arc::new(empty)).0,
            leaders: Mutex::default(),
            refreshing: tokio::sync::Mutex::new(()),
            probing: Mutex::default(),
            map_source: AtomicUsize::new(0),
            budget: TpsBudget::new(BUDGET_WINDOW, BUDGET_PER_SECOND, BUDGET_SHARE),
            closed: AtomicBool::new(false),
            troubles: Mutex::default(),
        }
    }

    /// The newest map that this router has seen; of epoch 0 before the first.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.map.borrow().clone()
    }

    /// The newest map, and those that come after it.
    pub fn follow_map(&self) -> watch::Receiver<Arc<ClusterMap>> {
        self.map.subscribe()
    }

    /// Takes a map, if it is newer than the one it has.
    pub fn learn(&self, map: ClusterMap) {
        self.map.send_if_modified(|current| {
            let newer = map.epoch > current.epoch || current.shards == 0;
            if newer {
                *current = Arc::new(map);
            }
            newer
        });
    }

    /// From now on nobody is called, and whoever waits is told so with its next attempt.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// What came last of asking the coordinators, where that was no answer: each in one phrase.
    pub fn troubles(&self) -> Vec<String> {
        let troubles = self.troubles.lock();
        let known = self.coordinators();
        known.iter().filter_map(|peer| troubles.get(peer)).map(ToString::to_string).collect()
    }

    /// Whether no coordinator can ever be used, by what came of asking each of them.
    pub fn is_hopeless(&self) -> bool {
        let troubles = self.troubles.lock();
        let refused = |peer: &Peer| matches!(troubles.get(peer), Some(CallError::Refused { .. }));
        self.coordinators().iter().all(refused)
    }

    fn note<T>(&self, peer: &Peer, outcome: &Result<T, CallError>) {
        if peer.role == Role::Coordinator {
            let mut troubles = self.troubles.lock();
            match outcome {
                Ok(_) => drop(troubles.remove(peer)),
                // There are not many coordinators, but some come and go.
                Err(error) if troubles.len() < TROUBLES_MAX || troubles.contains_key(peer) => {
                    troubles.insert(peer.clone(), error.clone());
                }
                Err(_) => {}
            }
        }
    }

    /// The transport, for calls that are not for a group's leader.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// Asks the coordinators' leader.
    ///
    /// # Errors
    /// See [`RouteError`]; whether the request may have taken effect, [`RouteError::is_ambiguous`]
    /// tells.
    pub async fn coordinator(
        &self,
        request: coordinator::Request,
        resend: Resend,
        deadline: Instant,
    ) -> Result<coordinator::Response, RouteError> {
        self.coordinator_afresh(|| request.clone(), resend, deadline).await
    }

    /// The same with a request that is made anew for each attempt: what it says may have changed meanwhile.
    ///
    /// # Errors
    /// As [`Router::coordinator`].
    pub async fn coordinator_afresh(
        &self,
        make: impl Fn() -> coordinator::Request,
        resend: Resend,
        deadline: Instant,
    ) -> Result<coordinator::Response, RouteError> {
        let make = || Request::Coordinator(make());
        match self.call(GroupId::Coordinator, make, resend, deadline).await? {
            Response::Coordinator(response) => Ok(response),
            Response::Shard(_) | Response::Raft(_) | Response::Admin(_) | Response::Rejected(_) => {
                Err(RouteError::WrongAnswer)
            }
        }
    }

    /// Asks the leader of a shard.
    ///
    /// # Errors
    /// See [`RouteError`]; whether the request may have taken effect, [`RouteError::is_ambiguous`]
    /// tells.
    pub async fn shard(
        &self,
        shard: ShardId,
        request: shard::Request,
        resend: Resend,
        deadline: Instant,
    ) -> Result<shard::Response, RouteError> {
        let make = || Request::Shard { shard, request: request.clone() };
        match self.call(GroupId::Shard(shard), make, resend, deadline).await? {
            Response::Shard(response) => Ok(response),
            Response::Coordinator(_) | Response::Raft(_) | Response::Admin(_) | Response::Rejected(_) => {
                Err(RouteError::WrongAnswer)
            }
        }
    }

    async fn call(
        &self,
        group: GroupId,
        make: impl Fn() -> Request,
        resend: Resend,
        deadline: Instant,
    ) -> Result<Response, RouteError> {
        let mut pauses = pauses();
        let mut turn = 0;
        let mut redirected = false;
        self.budget.deposit();
        loop {
            if self.closed.load(Ordering::Acquire) {
                return Err(RouteError::Closed);
            }
            let Some(peer) = self.target(group, &mut turn) else {
                self.pause(group, None, &mut pauses, deadline, RouteError::NoMember(group)).await?;
                continue;
            };
            if Instant::now() >= deadline {
                let reason = "the deadline passed before anything was sent".to_owned();
                return Err(RouteError::Call(CallError::Unreachable { peer, reason }));
            }
            let attempt_deadline = match resend {
                Resend::Idempotent => deadline.min(Instant::now() + ATTEMPT_TIMEOUT),
                Resend::OnlyUnsent => deadline,
            };
            let outcome = self.attempt(group, &peer, make(), attempt_deadline).await;
            self.note(&peer, &outcome);
            let error = match outcome {
                Ok(Response::Rejected(reject)) => RouteError::Rejected(reject),
                Ok(response) => {
                    self.remember(group, peer);
                    return Ok(response);
                }
                Err(error) => RouteError::Call(error),
            };
            if !error.is_worth_another() || error.ends(resend) {
                return Err(error);
            }
            if group == GroupId::Coordinator && self.is_hopeless() {
                return Err(error);
            }
            // One redirect needs no pause. Members that name each other do.
            redirected = self.redirect(group, &peer, &error) && !redirected;
            if redirected {
                continue;
            }
            self.pause(group, Some(&error), &mut pauses, deadline, error.clone()).await?;
        }
    }

    /// Calls a member that is taken for the leader, until another one leads.
    async fn attempt(
        &self,
        group: GroupId,
        peer: &Peer,
        request: Request,
        deadline: Instant,
    ) -> Result<Response, CallError> {
        let mut call = self.transport.call(peer, request, deadline);
        let mut suspect_at = Instant::now() + SUSPECT_AFTER;
        loop {
            let suspicion = async {
                sleep_until(suspect_at).await;
                self.leads_elsewhere(group, peer).await
            };
            tokio::select! {
                biased;
                answer = &mut call => return answer,
                elsewhere = suspicion => if elsewhere {
                    let reason = "another member leads now".to_owned();
                    return Err(CallError::Lost { peer: peer.clone(), reason });
                },
            }
            suspect_at = Instant::now() + PROBE_INTERVAL;
        }
    }

    /// Whether another member leads than the one that is called. One call asks for all that wait.
    async fn leads_elsewhere(&self, group: GroupId, called: &Peer) -> bool {
        let known =
            |router: &Router| router.leaders.lock().get(&group).is_some_and(|leader| leader != called);
        if known(self) {
            return true;
        }
        if !self.probing.lock().insert(group) {
            return false;
        }
        let _probe = Probe { router: self, group };
        let deadline = Instant::now() + PROBE_TIMEOUT;
        let others = self.members(group).into_iter().filter(|member| member != called);
        let mut answers: FuturesUnordered<_> =
            others.map(|member| self.who_leads(group, member, deadline)).collect();
        while let Some(leader) = answers.next().await {
            if let Some(leader) = leader.filter(|leader| leader != called) {
                tracing::debug!(%group, %called, %leader, "the leader has changed");
                self.leaders.lock().insert(group, leader);
                return true;
            }
        }
        known(self)
    }

    /// Who leads, in the words of a member.
    async fn who_leads(&self, group: GroupId, member: Peer, deadline: Instant) -> Option<Peer> {
        let request = match group {
            GroupId::Coordinator => Request::Coordinator(coordinator::Request::WhoLeads),
            GroupId::Shard(shard) => Request::Shard { shard, request: shard::Request::WhoLeads },
        };
        match self.transport.call(&member, request, deadline).await {
            Ok(
                Response::Coordinator(coordinator::Response::Leading)
                | Response::Shard(shard::Response::Leading),
            ) => Some(member),
            Ok(Response::Rejected(Reject::NotLeader { leader: Some(node) })) => self.member(group, node),
            Ok(_) | Err(_) => None,
        }
    }

    /// Takes a redirect to another member than the one that sent it, and says whether there was
    /// one. Without it, the next attempt goes to another member, or stays with a busy one.
    fn redirect(&self, group: GroupId, from: &Peer, error: &RouteError) -> bool {
        let mut leaders = self.leaders.lock();
        if let RouteError::Rejected(Reject::NotLeader { leader: Some(node) }) = error
            && let Some(peer) = self.member(group, *node)
            && peer != *from
        {
            leaders.insert(group, peer);
            return true;
        }
        let stays = matches!(error, RouteError::Rejected(Reject::Overloaded { .. } | Reject::Blocked { .. }));
        if stays {
            leaders.entry(group).or_insert_with(|| from.clone());
        } else if leaders.get(&group) == Some(from) {
            // Another call may have found the leader meanwhile; that stands.
            leaders.remove(&group);
        }
        false
    }

    /// Pauses before the next attempt, and uses the time to fetch a newer map where that may help.
    async fn pause(
        &self,
        group: GroupId,
        error: Option<&RouteError>,
        pauses: &mut impl Iterator<Item = Duration>,
        deadline: Instant,
        give_up: RouteError,
    ) -> Result<(), RouteError> {
        let mut pause = pauses.next().unwrap_or(PAUSE_MAX);
        if !self.budget.withdraw() {
            pause = PAUSE_MAX.mul_f64(0.5 + 0.5 * rand::random::<f64>());
        }
        if let Some(RouteError::Rejected(Reject::Overloaded { retry_after_millis })) = error {
            let asked = Duration::from_millis((*retry_after_millis).into());
            pause = pause.max(asked.mul_f64(1.0 + 0.25 * rand::random::<f64>()));
        }
        let until = Instant::now() + pause;
        if until >= deadline {
            return Err(give_up);
        }
        let map_may_help = match error {
            None => true,
            Some(RouteError::Call(_)) => matches!(group, GroupId::Shard(_)),
            Some(RouteError::Rejected(reject)) => {
                matches!(reject, Reject::StaleMap { .. } | Reject::WrongNode { .. })
            }
            Some(RouteError::NoMember(_) | RouteError::Closed | RouteError::WrongAnswer) => false,
        };
        if map_may_help {
            self.refresh_map(until.max(Instant::now() + Duration::from_millis(50)).min(deadline)).await;
        }
        sleep_until(until).await;
        Ok(())
    }

    /// Asks the coordinators for a newer map, each in turn, until the deadline. Concurrent refreshes
    /// share one.
    pub async fn refresh_map(&self, deadline: Instant) {
        let known = self.map().epoch;
        let Ok(_one_at_a_time) = timeout_at(deadline, self.refreshing.lock()).await else {
            return;
        };
        if self.map().epoch > known {
            return;
        }
        let coordinators = self.coordinators();
        for _ in 0..coordinators.len() {
            let source = self.map_source.load(Ordering::Relaxed);
            let peer = &coordinators[source % coordinators.len()];
            let request = Request::Coordinator(coordinator::Request::Map { known });
            let outcome = self.transport.call(peer, request, deadline).await;
            self.note(peer, &outcome);
            match outcome {
                Ok(Response::Coordinator(coordinator::Response::Map(map))) => return self.learn(map),
                Ok(Response::Coordinator(_)) => return,
                // The next refresh begins with the next one, for this one may have used up the time.
                Ok(_) | Err(_) => self.map_source.store(source.wrapping_add(1), Ordering::Relaxed),
            }
            if Instant::now() >= deadline {
                return;
            }
        }
    }

    fn remember(&self, group: GroupId, peer: Peer) {
        self.leaders.lock().entry(group).or_insert(peer);
    }

    /// Whom to try: the last known leader, else the members in turn.
    fn target(&self, group: GroupId, turn: &mut usize) -> Option<Peer> {
        if let Some(leader) = self.leaders.lock().get(&group) {
            return Some(leader.clone());
        }
        let members = self.members(group);
        let member = members.get(*turn % members.len().max(1))?;
        *turn += 1;
        Some(member.clone())
    }

    fn members(&self, group: GroupId) -> Vec<Peer> {
        match group {
            GroupId::Coordinator => self.coordinators(),
            GroupId::Shard(shard) => {
                let members = self.map().members_of(shard);
                members.into_iter().filter_map(|node| self.member(group, node)).collect()
            }
        }
    }

    /// The seeds, which somebody configured, and then those of the map that are not among them.
    pub fn coordinators(&self) -> Vec<Peer> {
        let map = self.map();
        let mapped = map.coordinators.iter().map(|node| Peer::coordinator(&node.address));
        let others: Vec<Peer> = mapped.filter(|peer| !self.seeds.contains(peer)).collect();
        self.seeds.iter().cloned().chain(others).collect()
    }

    fn member(&self, group: GroupId, node: NodeId) -> Option<Peer> {
        let map = self.map();
        let address = |nodes: &[Node]| nodes.iter().find(|n| n.id == node).map(|n| n.address.clone());
        match group {
            GroupId::Coordinator => address(&map.coordinators).map(|address| Peer::coordinator(&address)),
            GroupId::Shard(_) => address(&map.nodes).map(|address| Peer::participant(&address)),
        }
    }
}

/// The members of a group are being asked; over when dropped.
struct Probe<'a> {
    router: &'a Router,
    group: GroupId,
}

impl Drop for Probe<'_> {
    fn drop(&mut self) {
        self.router.probing.lock().remove(&self.group);
    }
}

/// Pauses that grow, with jitter, without an end of their own.
pub fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::new()
        .with_min_delay(PAUSE_MIN)
        .with_max_delay(PAUSE_MAX)
        .with_jitter()
        .without_max_times()
        .build()
}
