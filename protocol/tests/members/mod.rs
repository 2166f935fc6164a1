//! A network in memory whose members follow scripts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Barrier;
use tokio::time::{Instant, sleep, timeout};
use troth_protocol::message::{Request, Response, coordinator, shard};
use troth_protocol::net::memory::Network;
use troth_protocol::net::{BoxFuture, Identity, Peer, Role, Service};
use troth_protocol::routing::{Resend, RouteError, Router};
use troth_protocol::{
    ClientId, ClusterId, ClusterMap, Epoch, MapEpoch, Node, NodeId, NodeState, Reject, ShardId, Timestamp,
    TxnId,
};

/// What a member does with one request.
#[derive(Clone)]
pub enum Step {
    Answer,
    WrongAnswer,
    /// Answers, and says that it leads when it is asked.
    Lead,
    Refuse(Reject),
    /// Refuses only when that many requests are there.
    RefuseTogether(Arc<Barrier>, Reject),
    Map(ClusterMap),
    Hang,
}

use Step::{Answer, Hang, Refuse};

pub fn not_leader(hint: impl Into<Option<u64>>) -> Step {
    Refuse(Reject::NotLeader { leader: hint.into().map(NodeId) })
}

pub fn overloaded(millis: u64) -> Step {
    Refuse(Reject::overloaded(Duration::from_millis(millis)))
}

pub fn blocked() -> Step {
    Refuse(Reject::Blocked { key: "a".into(), by: TxnId { start: Timestamp(1), client: ClientId(1) } })
}

pub fn stale_map() -> Step {
    Refuse(Reject::StaleMap { epoch: MapEpoch(2) })
}

/// A member that does one step after the other, and the last one for ever.
struct Member {
    name: String,
    steps: Mutex<VecDeque<Step>>,
    asked: Asked,
}

/// The names of those who were asked, in order.
type Asked = Arc<Mutex<Vec<String>>>;

impl Service for Member {
    fn handle(&self, _: &Identity, request: Request, _: Instant) -> BoxFuture<'static, Response> {
        if let Request::Shard { request: shard::Request::WhoLeads, .. } = request {
            let said = match self.steps.lock().front() {
                Some(Step::Lead) => Response::Shard(shard::Response::Leading),
                Some(Refuse(reject)) => Response::Rejected(reject.clone()),
                Some(Hang) => return Box::pin(std::future::pending()),
                _ => Response::Rejected(Reject::NotLeader { leader: None }),
            };
            return Box::pin(std::future::ready(said));
        }
        self.asked.lock().push(self.name.clone());
        let mut steps = self.steps.lock();
        let step = match steps.len() {
            0 | 1 => steps.front().cloned(),
            _ => steps.pop_front(),
        };
        Box::pin(async move {
            match step.expect("a script has steps") {
                Answer | Step::Lead => answer(&request),
                Step::WrongAnswer => Response::Shard(shard::Response::Expired),
                Refuse(reject) => Response::Rejected(reject),
                Step::RefuseTogether(barrier, reject) => {
                    barrier.wait().await;
                    Response::Rejected(reject)
                }
                Step::Map(map) => {
                    // No network answers in no time.
                    sleep(Duration::from_millis(2)).await;
                    Response::Coordinator(coordinator::Response::Map(map))
                }
                Hang => std::future::pending().await,
            }
        })
    }
}

fn answer(request: &Request) -> Response {
    match request {
        Request::Coordinator(coordinator::Request::Map { .. }) => {
            Response::Coordinator(coordinator::Response::MapUnchanged)
        }
        Request::Coordinator(_) => Response::Coordinator(coordinator::Response::Timestamps {
            first: Timestamp(1),
            count: 1,
            retry_after_millis: 0,
            epoch: Epoch(1),
            map: MapEpoch(1),
        }),
        Request::Shard { .. } | Request::Raft(_) | Request::Admin(_) => {
            Response::Shard(shard::Response::Finished)
        }
    }
}

/// One shard on some nodes, `n1` and so on, and coordinators `c1` and so on.
pub fn map(epoch: u64, nodes: &[u64], coordinators: &[u64]) -> ClusterMap {
    let member = |letter: char| {
        move |&id: &u64| Node {
            id: NodeId(id),
            address: format!("{letter}{id}"),
            zone: String::new(),
            weight: 1,
            state: NodeState::Active,
            incarnation: Default::default(),
        }
    };
    ClusterMap {
        cluster: ClusterId([1; 16]),
        lineage: Default::default(),
        epoch: MapEpoch(epoch),
        shards: 1,
        replicas: nodes.len() as u16,
        coordinators: coordinators.iter().map(member('c')).collect(),
        nodes: nodes.iter().map(member('n')).collect(),
        placement: vec![nodes.iter().map(|&id| NodeId(id)).collect()],
        formed: vec![None],
        moves: Vec::new(),
    }
}

/// A router among members with scripts. A member without one is not there.
pub struct Scene {
    pub router: Arc<Router>,
    asked: Asked,
}

impl Scene {
    /// Its router knows a map of all members, in the order of their names.
    pub fn new(scripts: &[(&str, &[Step])]) -> Scene {
        let scene = Scene::without_map(scripts);
        let numbers = |letter: char| -> Vec<u64> {
            let number = |(name, _): &(&str, _)| name.strip_prefix(letter)?.parse().ok();
            scripts.iter().filter_map(number).collect()
        };
        scene.router.learn(map(1, &numbers('n'), &numbers('c')));
        scene
    }

    /// Its router only knows the coordinator `c1`.
    pub fn without_map(scripts: &[(&str, &[Step])]) -> Scene {
        let (network, asked) = (Network::new(), Asked::default());
        for &(name, steps) in scripts.iter().filter(|(_, steps)| !steps.is_empty()) {
            let peer = match name.starts_with('c') {
                true => Peer::coordinator(name),
                false => Peer::participant(name),
            };
            let member = Member {
                name: name.to_owned(),
                steps: Mutex::new(steps.iter().cloned().collect()),
                asked: asked.clone(),
            };
            network.serve(peer, Arc::new(member));
        }
        let identity =
            Identity { cluster: ClusterId([1; 16]), role: Role::Coordinator, name: "caller".into() };
        let seeds = vec![Peer::coordinator("c1")];
        Scene { router: Arc::new(Router::new(network.transport(identity), seeds)), asked }
    }

    pub async fn ask_shard(&self, resend: Resend, patience: Duration) -> Result<shard::Response, RouteError> {
        let request = shard::Request::Finish { epoch: Epoch(1), decisions: vec![] };
        let deadline = Instant::now() + patience;
        let router = self.router.clone();
        // In a task of its own, so that a call that never yields does not take the test with it.
        let call = tokio::spawn(async move { router.shard(ShardId(0), request, resend, deadline).await });
        let ended = timeout(patience + Duration::from_millis(300), call).await;
        ended.expect("a call ends by its deadline").expect("it does not panic")
    }

    pub async fn ask_coordinator(&self, patience: Duration) -> Result<coordinator::Response, RouteError> {
        let request = coordinator::Request::Timestamps { count: 1, begins: None };
        let deadline = Instant::now() + patience;
        self.router.coordinator(request, Resend::Idempotent, deadline).await
    }

    /// Returns when that many requests have arrived.
    pub async fn until_asked(&self, count: usize) {
        let arrived = async {
            while self.asked.lock().len() < count {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let waited = timeout(Duration::from_secs(10), arrived).await;
        waited.expect("requests arrive");
    }

    /// Who was asked since the last time.
    pub fn asked(&self) -> String {
        std::mem::take(&mut *self.asked.lock()).join(" ")
    }
}
