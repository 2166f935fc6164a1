//! Whether all replicas of a group have the same, read by somebody or not.
//!
//! A replica that has lost a write is a fault that no history shows until that replica leads. So when
//! everything has come to rest, all servers are killed, and what they have on disk is compared, row by row:
//! the state of a group follows from its log, so at the same entry it must be the same everywhere. Only what
//! each replica forgets in its own time, old versions, is first forgotten by all.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use troth_coordinator::machine as coordinator;
use troth_participant::families as participant;
use troth_participant::mvcc::{gc, key};
use troth_participant::shard::machine::spans;
use troth_participant::shard::state::Marks;
use troth_protocol::net::Role;
use troth_protocol::process::Memory;
use troth_protocol::wire::decode;
use troth_protocol::{ClusterMap, GroupId, NodeId, ShardId};
use troth_replication::server::owner;
use troth_replication::{Span, Store, applied};
use troth_sdk::operator::ClusterStatus;
use xxhash_rust::xxh3::xxh3_128;

use super::faults::Faults;
use super::servers::Trouble;
use crate::PATIENCE;
use crate::drill::Server;

/// Rows that are shown of each difference.
const SHOWN: usize = 3;

const MEMORY: Memory = Memory { cache: 4 << 20, write_buffers: 4 << 20 };

/// What came of a comparison.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Compared {
    /// Replicas that were compared with another one.
    pub replicas: u64,
    /// Rows of all of them.
    pub rows: u64,
    /// What is not the same.
    pub differences: Vec<String>,
}

/// What a replica has.
struct Replica {
    holder: Server,
    /// The last entry of the log that is in it.
    applied: Option<u64>,
    /// Checksums of values, by family and key.
    rows: BTreeMap<(&'static str, Vec<u8>), u128>,
}

type Groups = BTreeMap<GroupId, Vec<Replica>>;

/// Waits until all replicas have applied the same, kills all servers, and compares what they have. The servers
/// do not run afterwards. To be called when everything has come to rest.
///
/// # Errors
/// If the system refuses.
pub async fn compare(faults: &mut Faults) -> Result<Compared, Trouble> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let map = loop {
            let status = faults.operator().status().await;
            match behind(&status) {
                None => break status.map,
                Some(behind) if Instant::now() > deadline => {
                    return Ok(Compared { differences: vec![behind], ..Compared::default() });
                }
                Some(_) => sleep(Duration::from_millis(50)).await,
            }
        };
        let servers: Vec<Server> = faults.servers.all().collect();
        faults.servers.kill(&servers)?;
        let copies = tempfile::tempdir()?;
        for server in &servers {
            faults.servers.copy_data(*server, &copies.path().join(server.to_string()))?;
        }
        let reading = spawn_blocking(move || read(copies.path(), &servers, &map));
        let groups = match reading.await.map_err(io::Error::other)? {
            Ok(groups) => groups,
            Err(unreadable) => {
                return Ok(Compared { differences: vec![unreadable], ..Compared::default() });
            }
        };
        // A leader may have had its last word after it was asked.
        let even = |replicas: &Vec<Replica>| {
            replicas.iter().map(|replica| replica.applied).collect::<BTreeSet<_>>().len() == 1
        };
        if groups.values().all(even) || Instant::now() > deadline {
            return Ok(differences(&groups));
        }
        for server in faults.servers.all().collect::<Vec<_>>() {
            faults.servers.start(server)?;
        }
    }
}

/// A shard whose replicas have not all applied the same, in words.
fn behind(status: &ClusterStatus) -> Option<String> {
    (0..status.map.shards).map(ShardId).find_map(|shard| {
        let members = status.map.members_of(shard);
        let told = |node| {
            let participant = status.up_participants().find(|participant| participant.id == node)?;
            participant.shards.iter().find(|replica| replica.shard == shard).map(|replica| replica.applied)
        };
        let applied: Vec<Option<u64>> = members.iter().map(|node| told(*node)).collect();
        let even = applied.iter().all(|one| one.is_some() && *one == applied[0]);
        (!even).then(|| format!("shard {shard}: nodes {members:?} have applied {applied:?}"))
    })
}

/// What these servers have stored, each in a folder of its name; or why one of them cannot be read.
fn read(data: &Path, servers: &[Server], map: &ClusterMap) -> Result<Groups, String> {
    let mut groups = Groups::new();
    for server in servers {
        let replicas = replicas(data, *server, map).map_err(|error| format!("{server}: {error}"))?;
        for (group, replica) in replicas {
            groups.entry(group).or_default().push(replica);
        }
    }
    Ok(groups)
}

/// All replicas that a server holds.
fn replicas(data: &Path, server: Server, map: &ClusterMap) -> io::Result<Vec<(GroupId, Replica)>> {
    let (role, id, families) = match server {
        Server::Coordinator(id) => (Role::Coordinator, id, &coordinator::FAMILIES[..]),
        Server::Participant(id) => (Role::Participant, id, &participant::ALL[..]),
    };
    let owner = owner(role, id, map.cluster);
    let store = Store::open(&data.join(server.to_string()), &owner, families, MEMORY);
    let store = store.map_err(io::Error::other)?;
    let read = |group, spans: &[Span]| Ok((group, replica(&store, server, group, spans)?));
    match server {
        Server::Coordinator(_) => Ok(vec![read(GroupId::Coordinator, &coordinator::spans())?]),
        Server::Participant(id) => {
            let held =
                (0..map.shards).map(ShardId).filter(|shard| map.members_of(*shard).contains(&NodeId(id)));
            let read = |shard| {
                forget(&store, shard)?;
                read(GroupId::Shard(shard), &spans(shard))
            };
            held.map(read).collect()
        }
    }
}

/// Removes the versions of a shard that its replicas may remove, each in its own time.
fn forget(store: &Store, shard: ShardId) -> io::Result<()> {
    let Some(record) = store.get(participant::SHARD, &key::shard_start(shard))? else {
        return Ok(());
    };
    let marks: Marks = decode(&record).map_err(io::Error::other)?;
    let mut batch = store.batch();
    gc::collect(store, shard, marks.safe_point, None, usize::MAX, &mut batch)?;
    batch.commit()?;
    Ok(())
}

fn replica(store: &Store, holder: Server, group: GroupId, spans: &[Span]) -> io::Result<Replica> {
    let mut rows = BTreeMap::new();
    for span in spans {
        store.scan(span.family, &span.start, &span.end, |key, value| {
            rows.insert((span.family.0, key.to_vec()), xxh3_128(value));
            true
        })?;
    }
    Ok(Replica { holder, applied: applied(store, group)?, rows })
}

fn differences(groups: &Groups) -> Compared {
    let mut compared = Compared::default();
    for (group, replicas) in groups {
        let (first, others) = replicas.split_first().expect("a group is there because of a replica");
        compared.rows += replicas.iter().map(|replica| replica.rows.len() as u64).sum::<u64>();
        if !others.is_empty() {
            compared.replicas += replicas.len() as u64;
        }
        compared.differences.extend(others.iter().filter_map(|other| {
            let what = difference(first, other)?;
            Some(format!("{group}: {} and {} differ: {what}", first.holder, other.holder))
        }));
    }
    compared
}

/// What two replicas have that is not the same.
fn difference(one: &Replica, other: &Replica) -> Option<String> {
    if one.applied != other.applied {
        return Some(format!("applied up to {:?} and {:?}", one.applied, other.applied));
    }
    let keys: BTreeSet<_> = one.rows.keys().chain(other.rows.keys()).collect();
    let differ: Vec<_> = keys.into_iter().filter(|key| one.rows.get(key) != other.rows.get(key)).collect();
    if differ.is_empty() {
        return None;
    }
    let shown = differ.iter().take(SHOWN).map(|row| {
        let how = match (one.rows.contains_key(row), other.rows.contains_key(row)) {
            (true, true) => "another value",
            (true, false) => "only the first has it",
            (false, _) => "only the second has it",
        };
        format!("{} {}: {how}", row.0, shown_key(row.0, &row.1))
    });
    Some(format!("{} rows; {}", differ.len(), shown.collect::<Vec<_>>().join(", ")))
}

fn shown_key(family: &str, bytes: &[u8]) -> String {
    match key::parse_version(bytes) {
        Some((_, key, version)) if family == participant::DATA.0 => format!("{key} at {version}"),
        _ => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use troth_participant::mvcc::Mvcc;
    use troth_protocol::wire::encode;
    use troth_protocol::{Key, Timestamp, Value};

    use super::*;

    const SHARD: ShardId = ShardId(3);
    const GROUP: GroupId = GroupId::Shard(SHARD);

    /// A replica with these versions of two keys, whose safe point is 20.
    fn holds(versions: &[(&'static str, u64)], id: u64) -> Replica {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), "a test", &participant::ALL, MEMORY).expect("a new folder");
        let mvcc = Mvcc::new(&store, SHARD);
        let mut batch = store.batch();
        for (key, version) in versions {
            mvcc.put(&mut batch, &Key::from(*key), Timestamp(*version), Some(&Value::from(*key)));
        }
        let marks = Marks { safe_point: Timestamp(20), ..Marks::default() };
        batch.put(participant::SHARD, &key::shard_start(SHARD), &encode(&marks));
        batch.commit().expect("written");
        forget(&store, SHARD).expect("forgotten");
        replica(&store, Server::Participant(id), GROUP, &spans(SHARD)).expect("read")
    }

    fn compared(one: &[(&'static str, u64)], other: &[(&'static str, u64)]) -> Compared {
        differences(&Groups::from([(GROUP, vec![holds(one, 1), holds(other, 2)])]))
    }

    #[test]
    fn a_write_that_one_replica_has_lost_is_seen_though_a_later_one_covers_it() {
        let whole = [("a", 10), ("a", 30), ("a", 40), ("b", 50)];
        let lost = [("a", 10), ("a", 40), ("b", 50)];
        let Compared { replicas, rows, differences } = compared(&whole, &lost);
        assert_eq!((replicas, rows), (2, 5 + 4));
        let story = "shard 3: participant-1 and participant-2 differ: 1 rows; \
                     data a at 30: only the first has it";
        assert_eq!(differences, [story]);
    }

    #[test]
    fn old_versions_are_forgotten_by_each_replica_in_its_own_time() {
        let kept = [("a", 5), ("a", 10), ("a", 30), ("b", 15)];
        let forgotten = [("a", 10), ("a", 30), ("b", 15)];
        assert_eq!(compared(&kept, &forgotten).differences, Vec::<String>::new());
        // The newest one that may be read may not.
        let too_much = [("a", 30), ("b", 15)];
        assert_eq!(compared(&kept, &too_much).differences.len(), 1);
    }
}
