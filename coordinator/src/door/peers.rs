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
