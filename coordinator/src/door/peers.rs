//! What a coordinator remembers of the others: which start of each it took note of last, how far that was, and where.
//!
//! It is on the disk before another start is taken note of, so that of two processes with copies of one folder only one
//! finds a majority that listens to it.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio::time::Instant;
use troth_protocol::message::greeting::{Folder, Greeting, Place, Plan, Welcome};
use troth_protocol::mutation::{self, Bug};
use troth_protocol::net::Peer;
use troth_protocol::wire::{decode, encode};
use troth_protocol::{CoordinatorMember, FoundingId, GroupId, Incarnation, MemberState, NodeId, Reject};
use troth_replication::families::META;
use troth_replication::{Directory, LogWriter, Store, applied};

use crate::machine::stored_catalog;
use crate::state::Catalog;

/// A process that was heard of this lately is alive: no other one takes its place from elsewhere.
pub const ALIVE_FOR: Duration = Duration::from_secs(5);

/// What a folder says of the member that it belongs to.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Membership {
    /// The entry of the log that let it in; 0: it has founded the group.
    pub since: u64,
    /// The word by which it founded the group, if it has.
    pub founding: Option<FoundingId>,
    /// Those with whom it has.
    pub founders: Vec<NodeId>,
    /// Those that have let it in, if it has not founded the group, and where they were.
    pub hosts: Vec<(NodeId, String)>,
}

/// What this coordinator has itself.
#[derive(Clone, Debug)]
pub enum Standing {
    /// Nothing.
    Empty(Plan),
    /// A place in the group.
    Member(Membership),
}

#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
struct Remembered {
    since: u64,
    incarnation: Incarnation,
    progress: u64,
    address: String,
}

/// One of the others.
#[derive(Clone, Debug)]
struct Known {
    remembered: Remembered,
    /// When it spoke last, if that was in this life.
    heard: Option<Instant>,
}

/// The other coordinators, as this one knows them.
pub struct Peers {
    own: NodeId,
    store: Store,
    writer: LogWriter,
    standing: RwLock<Standing>,
    known: Mutex<BTreeMap<NodeId, Known>>,
    /// Two greetings do not change the same record at the same time.
    noting: tokio::sync::Mutex<()>,
    /// Where the configuration says that they are.
    listed: BTreeMap<NodeId, String>,
    /// Where the replicated state says that they are.
    members: RwLock<Vec<CoordinatorMember>>,
    changed: Notify,
}

/// The keys of what is remembered: `[ff ff ff ff | "coordinator/" | id u64]`.
fn key(id: NodeId) -> Vec<u8> {
    [&u32::MAX.to_be_bytes()[..], b"coordinator/", &id.0.to_be_bytes()].concat()
}

/// The key of this coordinator's own membership.
fn membership_key() -> Vec<u8> {
    [&u32::MAX.to_be_bytes()[..], b"membership"].concat()
}

/// Members of whom nothing is known but where they were.
fn hosts(places: &[(NodeId, String)]) -> Vec<CoordinatorMember> {
    let member = |(id, address): &(NodeId, String)| CoordinatorMember {
        id: *id,
        address: address.clone(),
        since: 0,
        state: MemberState::Voting,
    };
    places.iter().map(member).collect()
}

fn damaged(what: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the stored {what} is damaged: {error}"))
}

impl Peers {
    /// Reads what is remembered. `plan`: what the configuration says, for the case that the folder is empty.
    ///
    /// # Errors
    /// If the store cannot be read, or what it holds is damaged.
    pub fn open(
        own: NodeId,
        listed: BTreeMap<NodeId, String>,
        plan: Plan,
        store: &Store,
        writer: &LogWriter,
    ) -> io::Result<Peers> {
        let mut known = BTreeMap::new();
        let mut problem = None;
        let (start, end) = (key(NodeId(0)), key(NodeId(u64::MAX)));
        store.scan(META, &start, &end, |key, record| {
            let id = key.last_chunk().map(|id| NodeId(u64::from_be_bytes(*id)));
            match (id, decode::<Remembered>(record)) {
                (Some(id), Ok(remembered)) => {
                    known.insert(id, Known { remembered, heard: None });
                }
                (_, Err(error)) => problem = Some(damaged("memory of a coordinator", error)),
                (None, _) => problem = Some(damaged("memory of a coordinator", "its key is too short")),
            }
            problem.is_none()
        })?;
        if let Some(problem) = problem {
            return Err(problem);
        }
        let standing = match store.get(META, &membership_key())? {
            Some(record) => Standing::Member(decode(&record).map_err(|error| damaged("membership", error))?),
            None => Standing::Empty(plan),
        };
        let members = match (stored_catalog(store)?, &standing) {
            (Some(catalog), _) => catalog.coordinators,
            (None, Standing::Member(membership)) => hosts(&membership.hosts),
            (None, Standing::Empty(_)) => Vec::new(),
        };
        Ok(Peers {
            own,
            store: store.clone(),
            writer: writer.clone(),
            standing: RwLock::new(standing),
            known: Mutex::new(known),
            noting: tokio::sync::Mutex::default(),
            listed,
            members: RwLock::new(members),
            changed: Notify::new(),
        })
    }

    /// What this coordinator has.
    pub fn standing(&self) -> Standing {
        self.standing.read().clone()
    }

    /// From now on, and after every start, it has this.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub async fn take_place(&self, membership: Membership) -> io::Result<()> {
        self.writer.put_durably(META, &membership_key(), encode(&membership)).await?;
        if !membership.hosts.is_empty() {
            self.learn(&hosts(&membership.hosts));
        }
        *self.standing.write() = Standing::Member(membership);
        Ok(())
    }

    /// Hears from the replicated state who belongs to the group.
    pub fn learn(&self, members: &[CoordinatorMember]) {
        let mut known = self.members.write();
        if *known != members {
            *known = members.to_vec();
            self.changed.notify_one();
        }
    }

    /// Returns when the replicated state has named others than before.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Who belongs to the group, as far as the replicated state has been heard of.
    pub fn members(&self) -> Vec<CoordinatorMember> {
        self.members.read().clone()
    }

    /// All the others that it has heard of in any way.
    pub fn others(&self) -> Vec<NodeId> {
        let members = self.members.read();
        let mut ids: Vec<NodeId> =
            members.iter().map(|member| member.id).chain(self.listed.keys().copied()).collect();
        ids.retain(|id| *id != self.own);
        ids.sort();
        ids.dedup();
        ids
    }

    /// The others that the configuration lists.
    pub fn listed(&self) -> Vec<NodeId> {
        self.listed.keys().copied().filter(|id| *id != self.own).collect()
    }

    /// Where another one may be, the likeliest place first.
    pub fn addresses(&self, id: NodeId) -> Vec<String> {
        let said = self.known.lock().get(&id).map(|known| known.remembered.address.clone());
        let stated =
            self.members.read().iter().find(|member| member.id == id).map(|member| member.address.clone());
        let mut places: Vec<String> =
            said.into_iter().chain(stated).chain(self.listed.get(&id).cloned()).collect();
        let mut seen = Vec::new();
        places.retain(|place| {
            let new = !seen.contains(place);
            seen.push(place.clone());
            new
        });
        places
    }

    /// Where those are that have said so in this life.
    pub fn heard_at(&self) -> Vec<(NodeId, String)> {
        let known = self.known.lock();
        let heard = known.iter().filter(|(_, known)| known.heard.is_some());
        heard.map(|(id, known)| (*id, known.remembered.address.clone())).collect()
    }

    /// Answers a coordinator that says who it is.
    ///
    /// # Errors
    /// If it means another one, or the store cannot be read or written.
    pub async fn welcome(&self, greeting: Greeting) -> Result<Welcome, Reject> {
        if greeting.to.is_some_and(|to| to != self.own) || greeting.from == self.own {
            return Err(Reject::WrongNode { actual: self.own });
        }
        let broken = |error: io::Error| Reject::Internal { reason: error.to_string() };
        match (greeting.folder.clone(), self.standing()) {
            (Folder::Empty(_) | Folder::Used { .. }, Standing::Empty(plan)) => Ok(Welcome::Empty(plan)),
            (Folder::Empty(_), Standing::Member(membership)) => {
                let catalog = stored_catalog(&self.store).map_err(broken)?;
                let place = self.place_of(greeting.from, &membership, catalog.as_ref());
                let members = match &catalog {
                    Some(catalog) => {
                        let place = |member: &CoordinatorMember| (member.id, member.address.clone());
                        catalog.coordinators.iter().map(place).collect()
                    }
                    None => self.listed.iter().map(|(id, address)| (*id, address.clone())).collect(),
                };
                Ok(Welcome::Formed { founding: membership.founding, members, place })
            }
            (Folder::Used { since, incarnation, previous, progress }, Standing::Member(_)) => {
                let told = Remembered { since, incarnation, progress, address: greeting.address };
                self.note(greeting.from, told, previous).await.map_err(broken)
            }
        }
    }

    fn place_of(&self, id: NodeId, own: &Membership, catalog: Option<&Catalog>) -> Place {
        let remembered = self.known.lock().get(&id).map(|known| known.remembered.since);
        let Some(catalog) = catalog else {
            return match (own.founders.contains(&id), remembered) {
                (false, _) => Place::Stranger,
                (true, None) => Place::Founder,
                (true, Some(_)) => Place::Emptied,
            };
        };
        let Some(member) = catalog.coordinator(id) else { return Place::Stranger };
        match member.state {
            MemberState::Replacing => Place::Replacing,
            MemberState::Joining if remembered != Some(member.since) => {
                Place::Awaited { since: member.since }
            }
            MemberState::Voting if member.since == 0 && remembered.is_none() => Place::Founder,
            MemberState::Joining | MemberState::Voting | MemberState::Leaving => Place::Emptied,
        }
    }

    /// Takes note of a start of another one, if that comes after the one that it remembers.
    async fn note(&self, id: NodeId, told: Remembered, previous: Option<Incarnation>) -> io::Result<Welcome> {
        let _noting = self.noting.lock().await;
        if let Some(catalog) = stored_catalog(&self.store)? {
            let applied = applied(&self.store, GroupId::Coordinator)?.unwrap_or(0);
            let gone = match catalog.coordinator(id) {
                Some(member) => told.since < member.since,
                // What let it in may not have come here yet.
                None => told.since <= applied,
            };
            if gone {
                return Ok(Welcome::Removed);
            }
        }
        let known = self.known.lock().get(&id).cloned();
        let mut same = false;
        if let Some(Known { remembered, heard }) = known {
            if told.since < remembered.since {
                return Ok(Welcome::Removed);
            }
            same = told.since == remembered.since && told.incarnation == remembered.incarnation;
            let follows = same || previous == Some(remembered.incarnation) || told.since > remembered.since;
            let forgot = told.since == remembered.since && told.progress < remembered.progress;
            if (!follows || forgot) && !mutation::on(Bug::AcceptsAnOlderCopy) {
                let Remembered { incarnation, progress, address, .. } = remembered;
                return Ok(Welcome::Remembered { incarnation, progress, address });
            }
            let alive = heard.is_some_and(|at| at.elapsed() < ALIVE_FOR);
            if !same && alive && told.address != remembered.address {
                return Ok(Welcome::Elsewhere { address: remembered.address });
            }
            if same && told == remembered {
                self.heard(id, told);
                return Ok(Welcome::Noted);
            }
        }
        let record = encode(&told);
        if same {
            self.writer.put_lazily(META, &key(id), record).await?;
        } else {
            tracing::info!(coordinator = %id, incarnation = %told.incarnation, address = told.address, "took note of a start");
            self.writer.put_durably(META, &key(id), record).await?;
        }
        self.heard(id, told);
        Ok(Welcome::Noted)
    }

    fn heard(&self, id: NodeId, remembered: Remembered) {
        self.known.lock().insert(id, Known { remembered, heard: Some(Instant::now()) });
    }
}

impl Directory for Peers {
    fn peer(&self, _: GroupId, node: NodeId) -> Option<Peer> {
        self.addresses(node).first().map(|address| Peer::coordinator(address))
    }

    fn admits(&self, _: GroupId, node: NodeId, incarnation: Incarnation) -> bool {
        let known = self.known.lock();
        known.get(&node).is_some_and(|known| known.remembered.incarnation == incarnation)
            || mutation::on(Bug::FormsAGroupFromAnEmptyFolder)
    }
}

#[cfg(test)]
mod tests {
    use troth_protocol::process::Memory;

    use super::*;
    use crate::machine::FAMILIES;

    async fn open(folder: &std::path::Path) -> (Store, Peers) {
        let store = Store::open(folder, "a test", &FAMILIES, Memory::default()).expect("it opens");
        let writer = LogWriter::start(&store);
        let listed = [1, 2].map(|id| (NodeId(id), format!("c:{id}"))).into();
        let plan = Plan { founding: Some(FoundingId(7)), listed: vec![NodeId(1), NodeId(2)] };
        let peers = Peers::open(NodeId(1), listed, plan, &store, &writer).expect("readable");
        (store, peers)
    }

    fn greeting(address: &str, folder: Folder) -> Greeting {
        Greeting { from: NodeId(2), address: address.into(), to: Some(NodeId(1)), folder }
    }

    async fn told(peers: &Peers, incarnation: u64, previous: Option<u64>, progress: u64) -> Welcome {
        let (incarnation, previous) = (Incarnation(incarnation), previous.map(Incarnation));
        let folder = Folder::Used { since: 0, incarnation, previous, progress };
        peers.welcome(greeting("c:2", folder)).await.expect("for this one")
    }

    fn remembered(incarnation: u64, progress: u64) -> Welcome {
        Welcome::Remembered { incarnation: Incarnation(incarnation), progress, address: "c:2".into() }
    }

    async fn place(peers: &Peers) -> Place {
        let plan = Plan { founding: Some(FoundingId(7)), listed: vec![NodeId(1), NodeId(2)] };
        match peers.welcome(greeting("c:2", Folder::Empty(plan))).await {
            Ok(Welcome::Formed { place, .. }) => place,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_start_that_does_not_come_after_the_one_before_is_told_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, peers) = open(folder.path()).await;
        assert!(matches!(told(&peers, 10, None, 5).await, Welcome::Empty(_)), "it has nothing itself");
        let founders = vec![NodeId(1), NodeId(2)];
        let membership = Membership { since: 0, founding: Some(FoundingId(7)), founders, hosts: Vec::new() };
        peers.take_place(membership).await.expect("written");
        assert_eq!(place(&peers).await, Place::Founder);
        assert!(!peers.admits(GroupId::Coordinator, NodeId(2), Incarnation(10)), "it was not heard of");
        assert_eq!(told(&peers, 10, None, 5).await, Welcome::Noted);
        assert_eq!(place(&peers).await, Place::Emptied, "it had something");
        assert_eq!(told(&peers, 10, None, 90).await, Welcome::Noted);
        assert_eq!(told(&peers, 10, None, 80).await, remembered(10, 90), "it was set back while it ran");
        assert_eq!(told(&peers, 11, None, 95).await, remembered(10, 90));
        assert_eq!(told(&peers, 11, Some(9), 95).await, remembered(10, 90), "a copy from before");
        assert_eq!(told(&peers, 11, Some(10), 89).await, remembered(10, 90), "a copy while it ran");
        let elsewhere = Folder::Used {
            since: 0,
            incarnation: Incarnation(11),
            previous: Some(Incarnation(10)),
            progress: 95,
        };
        let answer = peers.welcome(greeting("c:9", elsewhere)).await;
        assert_eq!(answer, Ok(Welcome::Elsewhere { address: "c:2".into() }), "that one lives");
        assert_eq!(told(&peers, 11, Some(10), 95).await, Welcome::Noted);
        assert!(peers.admits(GroupId::Coordinator, NodeId(2), Incarnation(11)));
        assert_eq!(told(&peers, 10, Some(9), 99).await, remembered(11, 95), "it was passed by");
        // After a start of this one it is the same.
        drop(peers);
        store.closed().await;
        let (_store, peers) = open(folder.path()).await;
        assert_eq!(told(&peers, 12, Some(10), 99).await, remembered(11, 95));
        assert!(peers.admits(GroupId::Coordinator, NodeId(2), Incarnation(11)));
        // A later place in the group makes up for everything; an earlier one is lost.
        let folder =
            |since| Folder::Used { since, incarnation: Incarnation(20), previous: None, progress: 1 };
        assert_eq!(peers.welcome(greeting("c:2", folder(40))).await, Ok(Welcome::Noted));
        assert_eq!(told(&peers, 11, None, 99).await, Welcome::Removed);
    }
}
