//! What a coordinator does before it takes part: it finds out whether it may.
//!
//! ```text
//!                       ┌─ another one belongs to a group ──► that one says how to come in, or this one is awaited
//!   the folder is empty ┤
//!                       └─ all that are listed are empty, and all were told the same word ──► they found the group
//!
//!   it is not ──► a majority takes note of this start ──► goes on where it was
//!                 somebody remembers a start that this folder does not know ──► it is an older copy, and ends
//! ```
//!
//! An empty folder without the word never founds anything: what is empty may have been lost. Coordinators that have all
//! been started again may all have older copies, and one that is the only one has nobody to ask: so the first leader
//! after a start waits until half of the participants have told it how far the coordinators were.

pub mod peers;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout};
use troth_protocol::message::greeting::{Folder, Greeting, Place, Plan, Welcome};
use troth_protocol::message::{Request, Response, coordinator};
use troth_protocol::mutation::{self, Bug};
use troth_protocol::net::{Peer, Transport};
use troth_protocol::{FoundingId, GroupId, Incarnation, NodeId};
use troth_replication::{Incarnations, LogWriter, Store, last_stored, stored_voters};

use self::peers::{Membership, Peers, Standing};
use crate::notices::Notices;

/// How often the others are asked before this one takes part, and how often they are told who it is afterwards.
const ASK_INTERVAL: Duration = Duration::from_millis(100);
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// How long another one may take to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// After how long it is said what is waited for, and how often again.
const SAY_AFTER: Duration = Duration::from_secs(3);
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// How long it may take to tell the others that this one ends.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(1);

/// How long a process that is alive elsewhere is given to end.
const ELSEWHERE_PATIENCE: Duration = Duration::from_secs(20);

/// What a coordinator may take part with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// With whom it founds the group; empty: it goes on, or waits to be let in.
    pub founders: BTreeSet<NodeId>,
    /// The last entry of the log that is here; `None`: nothing is. Nobody but participants can tell whether all that
    /// are there have older copies.
    pub last: Option<u64>,
}

/// It may not; the reason says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The store failed, or what it holds is damaged.
    #[error("{0}")]
    Store(#[from] io::Error),
    /// Another one has said something that forbids it.
    #[error("{0}")]
    Forbidden(String),
}

/// A coordinator and the others, from its start to its end.
pub struct Door {
    id: NodeId,
    address: String,
    store: Store,
    peers: Arc<Peers>,
    incarnations: Incarnations,
    transport: Arc<dyn Transport>,
    notices: Arc<Notices>,
    /// Where it may ask besides, by its configuration.
    seeds: Vec<String>,
    /// What each of the others remembered, if this folder has begun that too.
    previous: Mutex<BTreeMap<NodeId, Incarnation>>,
}

/// One that is asked with an empty folder.
struct Whom {
    name: String,
    /// It is to found the group too.
    listed: bool,
}

/// What came of a greeting.
enum Answer {
    Welcome(Welcome),
    /// Nothing, because of this.
    Silence(String),
}

/// What was said lately about waiting.
struct Patience {
    began: Instant,
    said: Option<Instant>,
}

impl Door {
    /// The door of this coordinator, which is found at an address.
    ///
    /// # Errors
    /// If the store cannot be written, or what it holds is damaged.
    pub async fn new(
        id: NodeId,
        address: String,
        peers: Arc<Peers>,
        transport: Arc<dyn Transport>,
        notices: Arc<Notices>,
        seeds: Vec<String>,
        (store, writer): (&Store, &LogWriter),
    ) -> io::Result<Door> {
        let incarnations = Incarnations::begin(store, writer).await?;
        let (store, previous) = (store.clone(), Mutex::default());
        Ok(Door { id, address, store, peers, incarnations, transport, notices, seeds, previous })
    }

    /// Where others find this coordinator.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// This start of the coordinator.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnations.current()
    }

    /// Waits until this coordinator may take part.
    ///
    /// # Errors
    /// Why it never may, and what to do.
    pub async fn enter(&self) -> Result<Entry, Refusal> {
        let membership = match self.peers.standing() {
            Standing::Member(membership) => membership,
            Standing::Empty(plan) => {
                let membership = self.begin(&plan).await?;
                self.peers.take_place(membership.clone()).await?;
                membership
            }
        };
        let stored = stored_voters(&self.store, GroupId::Coordinator)?;
        let founders: BTreeSet<NodeId> = membership.founders.iter().copied().collect();
        let voters = match (stored.is_empty(), founders.is_empty()) {
            (false, _) => stored.clone(),
            (true, false) => founders.clone(),
            (true, true) => self.peers.others().into_iter().collect(),
        };
        self.compare_with_files(&stored);
        if !mutation::on(Bug::FormsAGroupFromAnEmptyFolder) {
            self.be_noted(&voters, membership.since).await?;
        }
        let founders = if stored.is_empty() { founders } else { BTreeSet::new() };
        let last = last_stored(&self.store, GroupId::Coordinator)?;
        Ok(Entry { last: (!stored.is_empty()).then_some(last), founders })
    }

    /// Says so if the files list others than there are.
    fn compare_with_files(&self, voters: &BTreeSet<NodeId>) {
        let mut listed: BTreeSet<NodeId> = self.peers.listed().into_iter().collect();
        listed.insert(self.id);
        if voters.is_empty() || listed == *voters {
            return;
        }
        let (ours, theirs) = (numbers(&listed), numbers(voters));
        let others: BTreeSet<NodeId> = listed.difference(voters).copied().collect();
        let advice = if others.is_empty() {
            "`troth coordinator remove` sends one away".to_owned()
        } else {
            format!("to let {} in: `troth coordinator add`", numbers(&others))
        };
        self.notices.warn(format!(
            "the configuration lists coordinators {ours}, and the cluster has {theirs}: the list only says where to \
             ask first; {advice}"
        ));
    }

    /// With an empty folder: waits until it is let in, or all agree to found a group.
    async fn begin(&self, plan: &Plan) -> Result<Membership, Refusal> {
        let mut patience = Patience { began: Instant::now(), said: None };
        let others = self.peers.listed();
        let found = || Membership {
            since: 0,
            founding: plan.founding,
            founders: plan.listed.clone(),
            hosts: Vec::new(),
        };
        if mutation::on(Bug::FormsAGroupFromAnEmptyFolder) {
            return Ok(found());
        }
        if plan.founding.is_none() && others.is_empty() && self.seeds.is_empty() {
            return Err(forbidden(format!(
                "coordinator {} has an empty data folder, and was not told to found a cluster: if it had one, put its \
                 folder back; for a new cluster write `founding = \"<16 hexadecimal digits>\"` into the section \
                 [cluster] of its configuration, as `troth init` does",
                self.id
            )));
        }
        loop {
            let answers = self.ask_all(&others, plan).await;
            let (mut agree, mut missing) = (0, Vec::new());
            for (whom, answer) in answers {
                match answer {
                    Answer::Welcome(Welcome::Empty(other)) if whom.listed && other == *plan => agree += 1,
                    Answer::Welcome(Welcome::Empty(other)) if whom.listed && plan.founding.is_some() => {
                        return Err(self.disagrees(plan, &whom.name, &other));
                    }
                    Answer::Welcome(Welcome::Formed { founding, members, place }) => {
                        match self.placed(plan, founding, members, place)? {
                            Some(membership) if membership.since > 0 => return Ok(membership),
                            Some(_) => agree += usize::from(whom.listed),
                            None => missing.push(format!("{} is about to let this one in", whom.name)),
                        }
                    }
                    Answer::Welcome(Welcome::Empty(_)) => {
                        missing.push(format!("the folder of {} is empty too", whom.name));
                    }
                    Answer::Welcome(_) => missing.push(format!("{} says something else", whom.name)),
                    Answer::Silence(reason) => {
                        missing.push(format!("{} does not answer: {reason}", whom.name));
                    }
                }
            }
            if plan.founding.is_some() && agree == others.len() {
                tracing::info!(founders = numbers(&plan.listed), "founding the coordinator group");
                return Ok(found());
            }
            let wanted = match plan.founding {
                Some(_) => "it founds a group when all that are listed are there",
                None => "an operator lets it in with `troth coordinator add`",
            };
            let id = self.id;
            self.say(&mut patience, || {
                format!(
                    "coordinator {id} has an empty data folder, and waits: {wanted}; {}",
                    missing.join("; ")
                )
            });
            sleep(ASK_INTERVAL).await;
        }
    }

    /// What to do with an empty folder when another coordinator belongs to a group; `None`: wait.
    fn placed(
        &self,
        plan: &Plan,
        founding: Option<FoundingId>,
        hosts: Vec<(NodeId, String)>,
        place: Place,
    ) -> Result<Option<Membership>, Refusal> {
        let (id, address, members) = (self.id, &self.address, numbers(hosts.iter().map(|(id, _)| id)));
        match place {
            Place::Awaited { since } => {
                Ok(Some(Membership { since, founding: None, founders: Vec::new(), hosts }))
            }
            Place::Replacing => Ok(None),
            Place::Founder if plan.founding.is_some() && plan.founding == founding => {
                let founders = plan.listed.clone();
                Ok(Some(Membership { since: 0, founding, founders, hosts: Vec::new() }))
            }
            Place::Stranger => Err(forbidden(format!(
                "coordinators {members} have formed a cluster, and {id} is none of them: let it in with \
                 `troth coordinator add {id} {address}`, and start it again"
            ))),
            Place::Founder | Place::Emptied => Err(forbidden(format!(
                "the data folder of coordinator {id} is empty, and coordinators {members} know it as one of them: it \
                 has lost what it promised. Put the folder back; if that cannot be: \
                 `troth coordinator replace {id}`, and start it again"
            ))),
        }
    }

    fn disagrees(&self, plan: &Plan, peer: &str, other: &Plan) -> Refusal {
        let id = self.id;
        if other.listed != plan.listed {
            let (ours, theirs) = (numbers(&plan.listed), numbers(&other.listed));
            return forbidden(format!(
                "coordinator {id} was told to found a cluster with coordinators {ours}, and {peer} lists \
                 {theirs}: all must list the same"
            ));
        }
        forbidden(format!(
            "coordinator {id} was told to found a cluster, and {peer} was told another word or none: \
             `cluster.founding` must be the same in the configurations of all"
        ))
    }

    /// Waits until a majority has taken note of this start.
    async fn be_noted(&self, voters: &BTreeSet<NodeId>, since: u64) -> Result<(), Refusal> {
        let mut patience = Patience { began: Instant::now(), said: None };
        let needed = voters.len() / 2 + 1;
        loop {
            let answers = self.tell_all(since).await?;
            let mut noted: BTreeSet<NodeId> = BTreeSet::from([self.id]);
            let mut missing = Vec::new();
            for (peer, answer) in answers {
                match answer {
                    Answer::Welcome(Welcome::Noted) => {
                        noted.insert(peer);
                    }
                    Answer::Welcome(Welcome::Elsewhere { address }) => {
                        if patience.began.elapsed() > ELSEWHERE_PATIENCE {
                            return Err(self.lives_elsewhere(peer, &address));
                        }
                        missing
                            .push(format!("coordinator {peer} hears of one with this number at {address}"));
                    }
                    Answer::Welcome(Welcome::Empty(_)) => {
                        missing.push(format!("the data folder of coordinator {peer} is empty"));
                    }
                    Answer::Welcome(_) => {}
                    Answer::Silence(reason) => {
                        missing.push(format!("coordinator {peer} does not answer: {reason}"))
                    }
                }
            }
            if noted.intersection(voters).count() >= needed {
                return Ok(());
            }
            let (id, count) = (self.id, noted.intersection(voters).count());
            self.say(&mut patience, || {
                let of = voters.len();
                format!(
                    "coordinator {id} waits until a majority has confirmed who it is: {count} of {of} have; {}",
                    missing.join("; ")
                )
            });
            sleep(ASK_INTERVAL).await;
        }
    }

    /// Tells the others again and again who this one is. Returns why it must not go on, once that is so.
    pub async fn stay(&self) -> String {
        loop {
            // Who is new must know at once who speaks.
            let _ = timeout(TELL_INTERVAL, self.peers.changed()).await;
            let Standing::Member(membership) = self.peers.standing() else { continue };
            if mutation::on(Bug::FormsAGroupFromAnEmptyFolder) {
                continue;
            }
            if let Err(refusal) = self.tell_all(membership.since).await {
                return refusal.to_string();
            }
        }
    }

    /// Tells the others how far this one was, as nobody may know less of it when it comes back.
    pub async fn tell_the_end(&self) {
        if let Standing::Member(membership) = self.peers.standing() {
            // They may be gone, or know of another one: this one ends anyway.
            let _ = timeout(FAREWELL_PATIENCE, self.tell_all(membership.since)).await;
        }
    }

    /// Tells all others who this one is.
    async fn tell_all(&self, since: u64) -> Result<Vec<(NodeId, Answer)>, Refusal> {
        let others = self.peers.others();
        let told = others.iter().map(async |peer| {
            let mut answer = self.tell(*peer, since).await;
            if let Answer::Welcome(Welcome::Remembered { incarnation, progress, .. }) = &answer
                && self.incarnations.follows(*incarnation)
                && *progress <= self.store.progress()
            {
                self.previous.lock().insert(*peer, *incarnation);
                answer = self.tell(*peer, since).await;
            }
            (*peer, answer)
        });
        let told: Vec<(NodeId, Answer)> = join_all(told).await;
        for (peer, answer) in &told {
            match answer {
                Answer::Welcome(Welcome::Remembered { incarnation, progress, address }) => {
                    return Err(self.passed(*peer, *incarnation, *progress, address));
                }
                Answer::Welcome(Welcome::Removed) => return Err(self.removed(*peer)),
                _ => {}
            }
        }
        Ok(told)
    }

    async fn tell(&self, peer: NodeId, since: u64) -> Answer {
        let folder = Folder::Used {
            since,
            incarnation: self.incarnation(),
            previous: self.previous.lock().get(&peer).copied().or(self.incarnations.previous()),
            progress: self.store.progress(),
        };
        self.greet(Some(peer), self.peers.addresses(peer), folder).await
    }

    /// Asks everybody whom the configuration names, with an empty folder.
    async fn ask_all(&self, others: &[NodeId], plan: &Plan) -> Vec<(Whom, Answer)> {
        let listed = others.iter().map(|id| {
            let whom = Whom { name: format!("coordinator {id}"), listed: true };
            (whom, Some(*id), self.peers.addresses(*id))
        });
        let seeds = self.seeds.iter().map(|address| {
            let whom = Whom { name: format!("the coordinator at {address}"), listed: false };
            (whom, None, vec![address.clone()])
        });
        let asked = listed.chain(seeds).map(async |(whom, to, addresses)| {
            (whom, self.greet(to, addresses, Folder::Empty(plan.clone())).await)
        });
        join_all(asked).await
    }

    /// Greets another one wherever it may be.
    async fn greet(&self, to: Option<NodeId>, addresses: Vec<String>, folder: Folder) -> Answer {
        let mut reasons = Vec::new();
        for address in addresses {
            let greeting =
                Greeting { from: self.id, address: self.address.clone(), to, folder: folder.clone() };
            let request = Request::Coordinator(coordinator::Request::Greet(greeting));
            let peer = Peer::coordinator(&address);
            let calling = self.transport.call(&peer, request, Instant::now() + ANSWER_PATIENCE);
            let reason = match timeout(ANSWER_PATIENCE, calling).await {
                Ok(Ok(Response::Coordinator(coordinator::Response::Welcome(welcome)))) => {
                    return Answer::Welcome(welcome);
                }
                Ok(Ok(Response::Rejected(reject))) => format!("{address}: {reject}"),
                Ok(Ok(_)) => format!("{address}: an answer of the wrong kind"),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("{address}: no answer within {} s", ANSWER_PATIENCE.as_secs()),
            };
            reasons.push(reason);
        }
        Answer::Silence(if reasons.is_empty() {
            "nobody knows where it is".into()
        } else {
            reasons.join(", ")
        })
    }

    /// Tells the others that this one ends, for those who look at them.
    pub async fn say_farewell(&self, reason: &str) {
        let telling = self.peers.others().into_iter().map(async |to| {
            for address in self.peers.addresses(to) {
                let (server, reason) = (format!("coordinator {}", self.id), reason.to_owned());
                let request = Request::Coordinator(coordinator::Request::Ends { server, reason });
                let deadline = Instant::now() + FAREWELL_PATIENCE;
                if self.transport.call(&Peer::coordinator(&address), request, deadline).await.is_ok() {
                    return;
                }
            }
        });
        // They may be gone; nothing depends on it.
        let _ = timeout(FAREWELL_PATIENCE, join_all(telling)).await;
    }

    fn passed(&self, peer: NodeId, remembered: Incarnation, progress: u64, address: &str) -> Refusal {
        let (id, own) = (self.id, self.store.progress());
        if self.incarnations.follows(remembered) || remembered == self.incarnation() {
            return forbidden(format!(
                "the data folder of coordinator {id} is an older copy: coordinator {peer} has heard of {progress} \
                 synced batches in it, and here are {own}. Put the newest folder back; if that cannot be: empty this \
                 one, and `troth coordinator replace {id}`"
            ));
        }
        forbidden(format!(
            "the data folder of coordinator {id} is a copy: coordinator {peer} has heard of a start of it, last at \
             {address}, that this folder does not know. Only the newest folder may be used, by one process; if it is \
             lost: empty this one, and `troth coordinator replace {id}`"
        ))
    }

    fn lives_elsewhere(&self, peer: NodeId, address: &str) -> Refusal {
        forbidden(format!(
            "coordinator {} runs already: coordinator {peer} hears of it at {address}. Stop one of the two processes; \
             only the newest data folder may be used",
            self.id
        ))
    }

    fn removed(&self, peer: NodeId) -> Refusal {
        let (id, address) = (self.id, &self.address);
        forbidden(format!(
            "coordinator {id} was removed, as coordinator {peer} says, or another data folder took its place: this one \
             can be deleted; `troth coordinator add {id} {address}` lets an empty one in"
        ))
    }

    fn say(&self, patience: &mut Patience, what: impl FnOnce() -> String) {
        let due = match patience.said {
            None => patience.began.elapsed() >= SAY_AFTER,
            Some(said) => said.elapsed() >= SAY_AGAIN,
        };
        if due {
            patience.said = Some(Instant::now());
            self.notices.warn(what());
        }
    }
}

fn forbidden(reason: String) -> Refusal {
    Refusal::Forbidden(reason)
}

/// Numbers for people: `1, 2, 3`.
fn numbers<'a>(ids: impl IntoIterator<Item = &'a NodeId>) -> String {
    ids.into_iter().map(NodeId::to_string).collect::<Vec<_>>().join(", ")
}
