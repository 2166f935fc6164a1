//! What goes wrong on the stage, and how it is undone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};

use super::cluster::{Cluster, Who};
use super::host::Condition;
use crate::chaos::faults::links::{self, Party};
use crate::chaos::faults::ring::change_ring;
use crate::drill::Server;
use crate::network::{Impairment, Link};

/// Faults at the same time.
const AT_ONCE: usize = 3;

/// The mean time between the beginnings of two faults.
const GAP: Duration = Duration::from_millis(1_500);

/// Participants there are at most.
const NODES_MAX: usize = 5;

/// How long a server may take to stop when it is asked to.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// Kinds of faults.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// A server, or several at the same moment, or an application, die.
    Crash,
    /// A machine or several stand still.
    Pause,
    /// Links are cut.
    Partition,
    /// Links are slow, lossy, or worse.
    Network,
    /// Wall clocks jump.
    Clock,
    /// Participants join and leave.
    Move,
    /// A server is asked to stop, and started again.
    Restart,
}

impl Kind {
    const ALL: [Kind; 7] =
        [Kind::Crash, Kind::Pause, Kind::Partition, Kind::Network, Kind::Clock, Kind::Move, Kind::Restart];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Crash => "crash",
            Kind::Pause => "pause",
            Kind::Partition => "partition",
            Kind::Network => "network",
            Kind::Clock => "clock",
            Kind::Move => "move",
            Kind::Restart => "restart",
        }
    }
}

struct Active {
    kind: Kind,
    until: Duration,
    undo: Undo,
}

enum Undo {
    Boot(Vec<Who>),
    Resume(Vec<Who>),
    Heal(Impairment),
    Flap { impairment: Impairment, is_cut: bool, next: Duration },
    SetClock(Vec<Who>),
    Move { node: u64, leaves: bool, ended: Arc<Mutex<Option<Result<(), String>>>> },
    Restart { server: Server, since: Duration },
}

impl Undo {
    fn concerns(&self) -> Vec<Who> {
        match self {
            Undo::Boot(all) | Undo::Resume(all) | Undo::SetClock(all) => all.clone(),
            Undo::Heal(_) | Undo::Flap { .. } | Undo::Move { .. } => Vec::new(),
            Undo::Restart { server, .. } => vec![Who::Server(*server)],
        }
    }
}

/// Who makes the faults.
pub struct Faults {
    rng: StdRng,
    active: Vec<Active>,
    next: Duration,
    nodes: u64,
    /// Nodes that were asked to leave and may end because of it.
    leaving: Vec<u64>,
    /// How often each kind came.
    pub counts: BTreeMap<Kind, u64>,
    /// What happened when, in words.
    pub journal: Vec<String>,
    /// What must not have happened.
    pub violations: Vec<String>,
    loud: bool,
}

impl Faults {
    /// Nothing is wrong yet with a cluster of so many participants.
    pub fn new(seed: u64, nodes: u64, loud: bool) -> Faults {
        Faults {
            rng: StdRng::seed_from_u64(seed),
            active: Vec::new(),
            next: Duration::ZERO,
            nodes,
            leaving: Vec::new(),
            counts: BTreeMap::new(),
            journal: Vec::new(),
            violations: Vec::new(),
            loud,
        }
    }

    /// Writes down what happens.
    pub fn note(&mut self, cluster: &Cluster, text: &str) {
        let line = format!("{:8.3} s  {text}", cluster.now.as_secs_f64());
        if self.loud {
            eprintln!("{line}");
        }
        self.journal.push(line);
    }

    /// Whether nothing is under way any more.
    pub fn is_calm(&self) -> bool {
        self.active.is_empty()
    }

    /// Lets faults end, and starts again who has ended; to be called after each tick.
    pub fn look_after(&mut self, cluster: &mut Cluster) -> Result<(), String> {
        for (who, result) in cluster.ended() {
            self.has_ended(cluster, who, result)?;
        }
        let mut place = 0;
        while place < self.active.len() {
            if self.is_over(cluster, place) {
                let active = self.active.swap_remove(place);
                self.undo(cluster, active)?;
            } else {
                place += 1;
            }
        }
        Ok(())
    }

    /// Lets one more fault begin, if it is time.
    pub fn strike(&mut self, cluster: &mut Cluster) -> Result<(), String> {
        if cluster.now < self.next || self.active.len() >= AT_ONCE {
            return Ok(());
        }
        self.next = cluster.now + GAP.mul_f64(0.2 + 1.6 * self.rng.random::<f64>());
        let kind = *Kind::ALL.choose(&mut self.rng).expect("there are some");
        let Some((story, undo)) = self.begin(cluster, kind)? else { return Ok(()) };
        self.note(cluster, &format!("{}: {story}", kind.name()));
        *self.counts.entry(kind).or_default() += 1;
        let until = cluster.now + Duration::from_millis(self.rng.random_range(100..8_000));
        self.active.push(Active { kind, until, undo });
        Ok(())
    }

    /// Undoes everything. What moves goes on.
    pub fn calm_down(&mut self, cluster: &mut Cluster) -> Result<(), String> {
        self.note(cluster, "all faults end");
        let (stays, ends): (Vec<Active>, Vec<Active>) = std::mem::take(&mut self.active)
            .into_iter()
            .partition(|active| matches!(active.undo, Undo::Move { .. } | Undo::Restart { .. }));
        self.active = stays;
        ends.into_iter().try_for_each(|active| self.undo(cluster, active))
    }

    fn has_ended(
        &mut self,
        cluster: &mut Cluster,
        who: Who,
        result: Result<(), String>,
    ) -> Result<(), String> {
        match (who, &result) {
            (Who::Server(server), Ok(())) => {
                let asked = self.active.iter().position(
                    |active| matches!(active.undo, Undo::Restart { server: other, .. } if other == server),
                );
                match asked {
                    Some(place) => drop(self.active.swap_remove(place)),
                    None => self.violations.push(format!("{who} has ended without being asked to")),
                }
            }
            // One that was removed from the ring says so and ends.
            (Who::Server(Server::Participant(id)), Err(_)) if self.leaving.contains(&id) => return Ok(()),
            (_, ended) => {
                let story = format!("{who} has ended by itself: {ended:?}");
                self.note(cluster, &story);
                self.violations.push(story);
            }
        }
        cluster.boot(who)
    }

    fn is_over(&mut self, cluster: &mut Cluster, place: usize) -> bool {
        let active = &mut self.active[place];
        let late = cluster.now >= active.until;
        match &mut active.undo {
            Undo::Flap { impairment, is_cut, next } if cluster.now >= *next => {
                *is_cut = !*is_cut;
                impairment.set(if *is_cut { Link::CUT } else { Link::default() });
                *next = cluster.now + Duration::from_millis(self.rng.random_range(100..1_500));
                late
            }
            Undo::Move { ended, .. } => ended.lock().is_some(),
            Undo::Restart { server, since } => {
                !cluster.is_there(Who::Server(*server)) || cluster.now > *since + STOP_PATIENCE
            }
            Undo::Boot(_) | Undo::Resume(_) | Undo::Heal(_) | Undo::Flap { .. } | Undo::SetClock(_) => late,
        }
    }

    fn undo(&mut self, cluster: &mut Cluster, active: Active) -> Result<(), String> {
        // One that has left the ring meanwhile is not there any more.
        let there =
            |all: Vec<Who>| -> Vec<Who> { all.into_iter().filter(|who| cluster.is_there(*who)).collect() };
        let undo = match active.undo {
            Undo::Boot(all) => Undo::Boot(there(all)),
            Undo::Resume(all) => Undo::Resume(there(all)),
            Undo::SetClock(all) => Undo::SetClock(there(all)),
            Undo::Restart { server, .. } if !cluster.is_there(Who::Server(server)) => return Ok(()),
            other => other,
        };
        match undo {
            Undo::Boot(all) => all.into_iter().try_for_each(|who| cluster.boot(who))?,
            Undo::Resume(all) => all.into_iter().for_each(|who| cluster.host(who).resume()),
            Undo::Heal(impairment) | Undo::Flap { impairment, .. } => drop(impairment),
            Undo::SetClock(all) => all.into_iter().for_each(|who| cluster.host(who).set_skew(0)),
            Undo::Move { node, leaves, ended } => match ended.lock().take() {
                Some(Ok(())) if leaves => {
                    self.note(cluster, &format!("participant-{node} has left"));
                    cluster.remove(Who::Server(Server::Participant(node)));
                }
                Some(Ok(())) => self.note(cluster, &format!("participant-{node} has joined")),
                Some(Err(error)) => {
                    self.violations.push(format!("a change of the ring has not ended: {error}"));
                }
                None => {}
            },
            Undo::Restart { server, .. } => {
                self.violations.push(format!("{server} does not stop when it is asked to"));
                cluster.host(Who::Server(server)).crash();
                cluster.boot(Who::Server(server))?;
            }
        }
        if active.kind != Kind::Move {
            self.note(cluster, &format!("  {} is over", active.kind.name()));
        }
        Ok(())
    }

    /// What happens, and how it is undone. `None`: it is not possible now.
    fn begin(&mut self, cluster: &mut Cluster, kind: Kind) -> Result<Option<(String, Undo)>, String> {
        Ok(match kind {
            Kind::Crash => {
                let all = if self.rng.random_bool(0.15) {
                    let number = self.rng.random_range(0..cluster.clients.len());
                    let application = Who::Application(number);
                    let alive = cluster.host(application).condition() == Condition::Up;
                    if alive { vec![application] } else { Vec::new() }
                } else {
                    self.some(cluster)
                };
                all.iter().for_each(|who| cluster.host(*who).crash());
                told(all, Undo::Boot)
            }
            Kind::Pause => {
                let all = self.some(cluster);
                all.iter().for_each(|who| cluster.host(*who).pause());
                told(all, Undo::Resume)
            }
            Kind::Partition => {
                let parties = self.parties(cluster);
                let leader = cluster.seen.status.lock().as_ref().and_then(|status| status.leader());
                let leader = leader.map(|id| cluster.party(Who::Server(Server::Coordinator(id.0))));
                let impaired = links::partition(parties, leader, &mut self.rng);
                let impairment = cluster.fabric.links().impair(impaired.ways, impaired.link);
                let next = cluster.now + Duration::from_millis(500);
                let undo = if impaired.flaps {
                    Undo::Flap { impairment, is_cut: true, next }
                } else {
                    Undo::Heal(impairment)
                };
                Some((impaired.story, undo))
            }
            Kind::Network => {
                let impaired = links::spoil(&self.parties(cluster), &mut self.rng);
                let impairment = cluster.fabric.links().impair(impaired.ways, impaired.link);
                Some((impaired.story, Undo::Heal(impairment)))
            }
            Kind::Clock => {
                let all = self.some(cluster);
                let size = 10.0_f64.powf(self.rng.random_range(0.7..6.55)) as i64;
                let skew = if self.rng.random_bool(0.5) { size } else { -size };
                all.iter().for_each(|who| cluster.host(*who).set_skew(skew));
                told(all, Undo::SetClock).map(|(who, undo)| (format!("{skew:+} ms at {who}"), undo))
            }
            Kind::Move => self.change_ring(cluster)?,
            Kind::Restart => {
                let server = self.free(cluster).choose(&mut self.rng).copied();
                server.map(|server| {
                    cluster.stop(server);
                    (server.to_string(), Undo::Restart { server, since: cluster.now })
                })
            }
        })
    }

    fn change_ring(&mut self, cluster: &mut Cluster) -> Result<Option<(String, Undo)>, String> {
        let operator = cluster.operator.lock().clone();
        let (Some(operator), true) = (operator, self.active.iter().all(|active| active.kind != Kind::Move))
        else {
            return Ok(None);
        };
        let nodes: Vec<u64> = cluster
            .servers()
            .filter_map(|server| match server {
                Server::Participant(id) => Some(id),
                Server::Coordinator(_) => None,
            })
            .collect();
        let leaves = nodes.len() >= NODES_MAX || (nodes.len() > 3 && self.rng.random_bool(0.6));
        let node = if leaves {
            let node = *nodes.choose(&mut self.rng).expect("there are several");
            self.leaving.push(node);
            node
        } else {
            self.nodes += 1;
            let newcomer = Who::Server(Server::Participant(self.nodes));
            cluster.add(newcomer)?;
            cluster.boot(newcomer)?;
            self.nodes
        };
        let ended: Arc<Mutex<Option<Result<(), String>>>> = Arc::default();
        let slot = ended.clone();
        cluster.host(Who::Operator).spawn(async move {
            let result = change_ring(operator, Server::Participant(node), leaves).await;
            *slot.lock() = Some(result);
        });
        let story = format!("participant-{node} {}", if leaves { "leaves" } else { "joins" });
        Ok(Some((story, Undo::Move { node, leaves, ended })))
    }

    /// Servers and applications.
    fn parties(&self, cluster: &Cluster) -> Vec<Party> {
        cluster.all().filter(|who| *who != Who::Operator).map(|who| cluster.party(who)).collect()
    }

    /// Servers that run and that no fault concerns but those of the network.
    fn free(&self, cluster: &mut Cluster) -> Vec<Server> {
        let concerned: Vec<Who> = self.active.iter().flat_map(|active| active.undo.concerns()).collect();
        let servers: Vec<Server> = cluster.servers().collect();
        servers
            .into_iter()
            .filter(|server| {
                let who = Who::Server(*server);
                !concerned.contains(&who) && cluster.host(who).condition() == Condition::Up
            })
            .collect()
    }

    /// One server, or several: a minority, a majority, or all.
    fn some(&mut self, cluster: &mut Cluster) -> Vec<Who> {
        let mut free = self.free(cluster);
        free.shuffle(&mut self.rng);
        let all = cluster.servers().count();
        let count = match self.rng.random_range(0..10) {
            0 => all,
            1 => all / 2 + 1,
            2 => (all - 1) / 2,
            _ => 1,
        };
        free.truncate(count);
        free.sort();
        free.into_iter().map(Who::Server).collect()
    }
}

fn told(all: Vec<Who>, undo: impl FnOnce(Vec<Who>) -> Undo) -> Option<(String, Undo)> {
    if all.is_empty() {
        return None;
    }
    Some((all.iter().map(Who::to_string).collect::<Vec<_>>().join(", "), undo(all)))
}
