//! Faults, one after the other and several at a time: what is done, for how long, and how it is undone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, sleep};
use troth_protocol::NodeId;
use troth_sdk::harness::moving::{change_node, until_placed};
use troth_sdk::operator::{NodeChange, Operator};

use crate::disk::{FailReads, Flipped};
use crate::drill::Server;
use crate::history::recorder::Recorder;
use crate::network::{Impairment, Link, Way};

use super::nemesis::Nemesis;
use super::servers::{Condition, Servers, Trouble};

/// Faults at the same time.
const AT_ONCE: usize = 4;

/// The mean time between the beginnings of two faults.
const GAP: Duration = Duration::from_millis(2_000);

/// When a server that has ended by itself is started again, as a supervisor would do.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// How long a change of the ring may take while everything else goes wrong.
const MOVE_PATIENCE: Duration = Duration::from_secs(600);

/// Participants there are at most.
const NODES_MAX: usize = 6;

/// How long a server may take to stop when it is asked to.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// What is written about a run while it goes on.
pub struct Journal {
    began: Instant,
    loud: bool,
    lines: Mutex<Vec<String>>,
}

impl Journal {
    /// An empty one that begins now; a loud one also writes to standard error.
    pub fn new(loud: bool) -> Journal {
        Journal { began: Instant::now(), loud, lines: Mutex::default() }
    }

    /// Writes a line.
    pub fn note(&self, text: impl AsRef<str>) {
        let line = format!("{:7.1} s  {}", self.began.elapsed().as_secs_f64(), text.as_ref());
        if self.loud {
            eprintln!("{line}");
        }
        self.lines.lock().push(line);
    }

    /// What was written.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().clone()
    }
}

/// What was done to a cluster.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Faults of each kind.
    pub faults: BTreeMap<Nemesis, u64>,
    /// Processes that got SIGKILL.
    pub sigkills: u64,
    /// Processes that were stopped with SIGSTOP.
    pub pauses: u64,
    /// Disks whose power was cut.
    pub power_cuts: u64,
    /// Changes of the ring that have ended: a participant that joined, or one that left.
    pub ring_changes: u64,
    /// When there was a fault: from and to, in nanoseconds since the history began.
    pub times: Vec<(u64, u64)>,
    /// Servers that ended by themselves, why, and how often.
    pub ended: BTreeMap<String, u64>,
    /// Of these, those that had no reason to.
    pub crashed: Vec<String>,
    /// Changes of the ring that have not ended in time.
    pub stuck: Vec<String>,
    /// Bits that were flipped, and what the server made of it.
    pub flips: Vec<String>,
}

/// A fault that is there now.
struct Active {
    nemesis: Nemesis,
    /// What it is, in words.
    story: String,
    began_nanos: u64,
    until: Instant,
    undo: Undo,
}

/// How a fault ends.
enum Undo {
    Start(Vec<Server>),
    Resume(Vec<Server>),
    Heal(Vec<Impairment>),
    /// Cut, whole, cut, whole.
    Flap {
        impairment: Impairment,
        is_cut: bool,
        next: Instant,
    },
    SetClock(Vec<Server>),
    /// A participant joins or leaves.
    Move {
        node: Server,
        leaves: bool,
        ended: JoinHandle<Result<(), String>>,
    },
    /// The first is about to stop, the others wait for their turn.
    Restart {
        waiting: VecDeque<Server>,
        stopping: Option<(Server, Instant)>,
    },
    Space(Server),
    Speed(Vec<Server>),
    Reads(Server),
    /// With how often the server had ended by itself before.
    Repair(Server, Flipped, u64),
}

impl Undo {
    /// The servers that may be down or broken because of it.
    fn concerns(&self) -> Vec<Server> {
        match self {
            Undo::Start(servers) | Undo::Resume(servers) | Undo::SetClock(servers) | Undo::Speed(servers) => {
                servers.clone()
            }
            Undo::Heal(_) | Undo::Flap { .. } => Vec::new(),
            // One that joins may be killed as any other; one that leaves, too.
            Undo::Move { .. } => Vec::new(),
            Undo::Restart { waiting, stopping } => {
                waiting.iter().copied().chain(stopping.map(|(server, _)| server)).collect()
            }
            Undo::Space(server) | Undo::Reads(server) | Undo::Repair(server, ..) => vec![*server],
        }
    }
}

/// Who makes the faults.
pub struct Faults {
    /// The servers.
    pub servers: Servers,
    operator: Operator,
    nemeses: Vec<Nemesis>,
    /// Where applications talk from.
    applications: Vec<SocketAddr>,
    rng: StdRng,
    active: Vec<Active>,
    /// How often each server has ended by itself.
    endings: BTreeMap<Server, u64>,
    /// Servers that have ended by themselves, and when they are started again.
    fallen: BTreeMap<Server, Instant>,
    /// Servers whose disk has failed, and which may have ended because of that, until then.
    excused: BTreeMap<Server, Instant>,
    leader: Arc<Mutex<Option<Server>>>,
    watch: JoinHandle<()>,
    journal: Arc<Journal>,
    /// What was done so far.
    pub tally: Tally,
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl Faults {
    /// Faults of these kinds.
    pub fn new(
        servers: Servers,
        operator: Operator,
        nemeses: &[Nemesis],
        applications: Vec<SocketAddr>,
        seed: u64,
        journal: Arc<Journal>,
    ) -> Faults {
        let leader: Arc<Mutex<Option<Server>>> = Arc::default();
        let watch = tokio::spawn(watch(operator.clone(), leader.clone()));
        Faults {
            servers,
            operator,
            nemeses: nemeses.to_vec(),
            applications,
            rng: StdRng::seed_from_u64(seed),
            active: Vec::new(),
            endings: BTreeMap::new(),
            fallen: BTreeMap::new(),
            excused: BTreeMap::new(),
            leader,
            watch,
            journal,
            tally: Tally::default(),
        }
    }

    /// Makes faults until then, and undoes them all.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn rage(&mut self, until: Instant, recorder: &Recorder) -> Result<(), Trouble> {
        let mut ticks = interval(Duration::from_millis(20));
        let mut next = Instant::now();
        while Instant::now() < until {
            ticks.tick().await;
            self.look_after(recorder).await?;
            if Instant::now() >= next && self.active.len() < AT_ONCE && !self.nemeses.is_empty() {
                self.strike(recorder).await?;
                next = Instant::now() + GAP.mul_f64(0.2 + 1.6 * self.rng.random::<f64>());
            }
        }
        self.journal.note("all faults end");
        self.calm_down(recorder).await
    }

    /// Undoes everything, and starts everybody. What moves goes on.
    async fn calm_down(&mut self, recorder: &Recorder) -> Result<(), Trouble> {
        let moves = |active: &mut Active| active.nemesis == Nemesis::Move;
        let moving: Vec<Active> = self.active.extract_if(.., moves).collect();
        for active in std::mem::replace(&mut self.active, moving) {
            self.undo(active, recorder).await?;
        }
        self.fallen.clear();
        for server in self.servers.all().collect::<Vec<_>>() {
            self.servers.resume(server)?;
            self.servers.start(server)?;
        }
        Ok(())
    }

    /// Whether nothing is under way any more. To be called now and then after the last fault.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn is_calm(&mut self, recorder: &Recorder) -> Result<bool, Trouble> {
        self.look_after(recorder).await?;
        Ok(self.active.is_empty() && self.fallen.is_empty())
    }

    /// The operator.
    pub fn operator(&self) -> &Operator {
        &self.operator
    }

    /// Starts again who has ended by itself.
    fn supervise(&mut self) -> Result<(), Trouble> {
        for (server, status) in self.servers.ended()? {
            self.has_ended(server, status);
            if !self.is_restarting(server) {
                self.fallen.insert(server, Instant::now() + RESTART_AFTER);
            }
        }
        let due: Vec<Server> =
            self.fallen.iter().filter(|(_, at)| **at <= Instant::now()).map(|(server, _)| *server).collect();
        for server in due {
            self.fallen.remove(&server);
            self.servers.start(server)?;
        }
        Ok(())
    }

    fn is_restarting(&self, server: Server) -> bool {
        self.active.iter().any(|active| match &active.undo {
            Undo::Restart { stopping: Some((stopping, _)), .. } => *stopping == server,
            _ => false,
        })
    }

    fn has_ended(&mut self, server: Server, status: ExitStatus) {
        let leaves = self
            .active
            .iter()
            .any(|active| matches!(active.undo, Undo::Move { node, leaves: true, .. } if node == server));
        // One that was removed from the ring says so and ends.
        if self.is_restarting(server) && status.success() || leaves && status.code() == Some(1) {
            return;
        }
        let last = self.servers.last_lines(server, 1).pop().unwrap_or_default();
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "no status".to_owned(),
        };
        // The folder has another name each time.
        let last = last.replace(&self.servers.folder().display().to_string(), "");
        let story = format!("{server} has ended by itself ({how}): {last}");
        self.journal.note(&story);
        // A server may give up with an error when its disk fails; it may never panic.
        let excused = self.excused.get(&server).is_some_and(|until| Instant::now() < *until);
        if !(excused && status.code() == Some(1)) {
            self.tally.crashed.push(story.clone());
        }
        *self.tally.ended.entry(story).or_default() += 1;
        *self.endings.entry(server).or_default() += 1;
    }

    /// What goes on with the faults that are there.
    async fn look_after(&mut self, recorder: &Recorder) -> Result<(), Trouble> {
        self.supervise()?;
        let mut place = 0;
        while place < self.active.len() {
            if self.is_over(place)? {
                let active = self.active.swap_remove(place);
                self.undo(active, recorder).await?;
            } else {
                place += 1;
            }
        }
        Ok(())
    }

    /// Lets a fault go on, and tells whether it is over.
    fn is_over(&mut self, place: usize) -> Result<bool, Trouble> {
        let now = Instant::now();
        let active = &mut self.active[place];
        let late = now >= active.until;
        match &mut active.undo {
            Undo::Flap { impairment, is_cut, next } if now >= *next => {
                *is_cut = !*is_cut;
                impairment.set(if *is_cut { Link::CUT } else { Link::default() });
                *next = now + Duration::from_millis(self.rng.random_range(100..1_500));
                Ok(late)
            }
            Undo::Move { ended, .. } => Ok(ended.is_finished()),
            Undo::Restart { waiting, stopping } => {
                match *stopping {
                    Some((server, _)) if self.servers.condition(server) == Condition::Down => {
                        self.servers.start(server)?;
                        *stopping = None;
                    }
                    Some((server, since)) if since + STOP_PATIENCE < now => {
                        self.tally.crashed.push(format!("{server} does not stop when it is asked to"));
                        self.servers.kill(&[server])?;
                    }
                    Some(_) => {}
                    None => match waiting.pop_front() {
                        Some(server) if self.servers.condition(server) == Condition::Up => {
                            self.servers.terminate(server)?;
                            *stopping = Some((server, now));
                        }
                        Some(_) => {}
                        None => return Ok(true),
                    },
                }
                Ok(false)
            }
            _ => Ok(late),
        }
    }

    async fn undo(&mut self, active: Active, recorder: &Recorder) -> Result<(), Trouble> {
        match active.undo {
            Undo::Start(servers) => servers.into_iter().try_for_each(|server| self.servers.start(server))?,
            Undo::Resume(servers) => {
                servers.into_iter().try_for_each(|server| self.servers.resume(server))?
            }
            Undo::Heal(impairments) => drop(impairments),
            Undo::Flap { impairment, .. } => drop(impairment),
            Undo::SetClock(servers) => {
                servers.into_iter().try_for_each(|server| self.servers.set_clock(server, 0))?;
            }
            Undo::Move { node, leaves, ended } => self.moved(node, leaves, ended).await?,
            // Whoever is stopping is started by the one who looks after it.
            Undo::Restart { stopping: Some((server, _)), .. } => {
                self.servers.kill(&[server])?;
                self.servers.start(server)?;
            }
            Undo::Restart { stopping: None, .. } => {}
            Undo::Space(server) => self.servers.disk(server).set_full(false),
            Undo::Speed(servers) => {
                servers.iter().for_each(|server| self.servers.disk(*server).set_sync_delay(None));
            }
            Undo::Reads(server) => self.servers.disk(server).fail_reads("", FailReads::Never),
            Undo::Repair(server, flipped, before) => self.repair(server, &flipped, before)?,
        }
        let now = recorder.elapsed_nanos();
        self.tally.times.push((active.began_nanos, now));
        let seconds = (now - active.began_nanos) as f64 / 1e9;
        self.journal.note(format!("  over after {seconds:.1} s: {}", active.story));
        Ok(())
    }

    async fn moved(
        &mut self,
        node: Server,
        leaves: bool,
        ended: JoinHandle<Result<(), String>>,
    ) -> Result<(), Trouble> {
        match ended.await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(()) => self.tally.ring_changes += 1,
            Err(error) => {
                let story = format!("a change of the ring has not ended: {error}");
                self.journal.note(&story);
                self.tally.stuck.push(story);
                return Ok(());
            }
        }
        if leaves {
            self.fallen.remove(&node);
            self.servers.retire(node)?;
        }
        Ok(())
    }

    /// Begins one more fault, if the dice fall on one that is possible now.
    async fn strike(&mut self, recorder: &Recorder) -> Result<(), Trouble> {
        let nemesis = *self.nemeses.choose(&mut self.rng).expect("there are some");
        let Some((story, seconds, undo)) = self.begin(nemesis).await? else { return Ok(()) };
        let story = format!("{nemesis}: {story}");
        self.journal.note(&story);
        *self.tally.faults.entry(nemesis).or_default() += 1;
        self.active.push(Active {
            nemesis,
            story,
            began_nanos: recorder.elapsed_nanos(),
            until: Instant::now() + Duration::from_secs_f64(seconds),
            undo,
        });
        Ok(())
    }

    /// What happens, for how many seconds, and how it is undone. `None`: it is not possible now.
    async fn begin(&mut self, nemesis: Nemesis) -> Result<Option<(String, f64, Undo)>, Trouble> {
        let seconds = |from: f64, to: f64, rng: &mut StdRng| rng.random_range(from..to);
        Ok(match nemesis {
            Nemesis::KillCoordinator => {
                let Some((server, who)) = self.one_coordinator() else { return Ok(None) };
                self.kill(&[server])?;
                Some((who, seconds(0.2, 5.0, &mut self.rng), Undo::Start(vec![server])))
            }
            Nemesis::KillParticipant => {
                let Some(server) = self.one(|server| matches!(server, Server::Participant(_))) else {
                    return Ok(None);
                };
                self.kill(&[server])?;
                Some((server.to_string(), seconds(0.2, 8.0, &mut self.rng), Undo::Start(vec![server])))
            }
            Nemesis::KillMany => {
                let Some((who, servers)) = self.many() else { return Ok(None) };
                self.kill(&servers)?;
                Some((who, seconds(0.2, 3.0, &mut self.rng), Undo::Start(servers)))
            }
            Nemesis::Pause => {
                let several = self.rng.random_bool(0.3);
                let Some((who, servers)) = (if several { self.many() } else { self.anyone() }) else {
                    return Ok(None);
                };
                for server in &servers {
                    self.servers.pause(*server)?;
                    self.tally.pauses += 1;
                }
                Some((who, seconds(0.2, 8.0, &mut self.rng), Undo::Resume(servers)))
            }
            Nemesis::Partition => {
                let (story, undo) = self.partition();
                Some((story, seconds(1.0, 10.0, &mut self.rng), undo))
            }
            Nemesis::Network => {
                let (story, undo) = self.spoil_network();
                Some((story, seconds(2.0, 12.0, &mut self.rng), undo))
            }
            Nemesis::Clock => self.move_clocks()?,
            Nemesis::Move => self.change_ring().await?,
            Nemesis::Restart => {
                if self.active.iter().any(|active| active.nemesis == Nemesis::Restart) {
                    return Ok(None);
                }
                let mut servers: Vec<Server> = self.free().collect();
                servers.shuffle(&mut self.rng);
                let story = format!("of {} servers, one after the other", servers.len());
                Some((story, 0.0, Undo::Restart { waiting: servers.into(), stopping: None }))
            }
            Nemesis::PowerCut => {
                let several = self.rng.random_bool(0.5);
                let Some((who, servers)) = (if several { self.many() } else { self.anyone() }) else {
                    return Ok(None);
                };
                self.tally.sigkills += self.servers.cut_power(&servers)?.len() as u64;
                self.tally.power_cuts += servers.len() as u64;
                Some((who, seconds(0.2, 4.0, &mut self.rng), Undo::Start(servers)))
            }
            Nemesis::DiskFull => {
                let Some(server) = self.one(|_| true) else { return Ok(None) };
                self.excuse(server, 30.0);
                self.servers.disk(server).set_full(true);
                Some((format!("at {server}"), seconds(2.0, 10.0, &mut self.rng), Undo::Space(server)))
            }
            Nemesis::DiskSlow => {
                let Some((who, servers)) = self.anyone() else { return Ok(None) };
                let delay = Duration::from_millis(self.rng.random_range(20..600));
                for server in &servers {
                    self.servers.disk(*server).set_sync_delay(Some(delay));
                }
                let story = format!("syncs take {} ms longer at {who}", delay.as_millis());
                Some((story, seconds(2.0, 12.0, &mut self.rng), Undo::Speed(servers)))
            }
            Nemesis::DiskReadError => {
                let Some(server) = self.one(|_| true) else { return Ok(None) };
                self.excuse(server, 30.0);
                let part = [0.05, 0.5, 1.0].choose(&mut self.rng).copied().unwrap_or(1.0);
                self.servers.disk(server).fail_reads("", FailReads::Fraction(part));
                // What is in memory is not read, so it begins anew.
                self.kill(&[server])?;
                self.servers.start(server)?;
                let story = format!("{:.0} % of the reads fail at {server}, which begins anew", 100.0 * part);
                Some((story, seconds(2.0, 8.0, &mut self.rng), Undo::Reads(server)))
            }
            Nemesis::DiskBitFlip => self.flip_bit()?,
        })
    }

    fn endings(&self, server: Server) -> u64 {
        self.endings.get(&server).copied().unwrap_or(0)
    }

    fn kill(&mut self, servers: &[Server]) -> Result<(), Trouble> {
        self.tally.sigkills += self.servers.kill(servers)?.len() as u64;
        Ok(())
    }

    /// A server may end because of its disk for so long.
    fn excuse(&mut self, server: Server, seconds: f64) {
        self.excused.insert(server, Instant::now() + Duration::from_secs_f64(seconds));
    }

    /// Servers that run and that no fault concerns but those of the network.
    fn free(&self) -> impl Iterator<Item = Server> {
        let concerned: BTreeSet<Server> =
            self.active.iter().flat_map(|active| active.undo.concerns()).collect();
        let free =
            |server: &Server| self.servers.condition(*server) == Condition::Up && !concerned.contains(server);
        self.servers.all().filter(free).collect::<Vec<_>>().into_iter()
    }

    fn one(&mut self, which: impl Fn(&Server) -> bool) -> Option<Server> {
        self.free().filter(which).collect::<Vec<_>>().choose(&mut self.rng).copied()
    }

    fn one_coordinator(&mut self) -> Option<(Server, String)> {
        let leader = *self.leader.lock();
        if let Some(leader) = leader.filter(|leader| self.free().any(|server| server == *leader))
            && self.rng.random_bool(0.7)
        {
            return Some((leader, format!("{leader}, the leader")));
        }
        let server = self.one(|server| matches!(server, Server::Coordinator(_)))?;
        Some((server, server.to_string()))
    }

    fn anyone(&mut self) -> Option<(String, Vec<Server>)> {
        if self.rng.random_bool(0.4) {
            let (server, who) = self.one_coordinator()?;
            return Some((who, vec![server]));
        }
        let server = self.one(|_| true)?;
        Some((server.to_string(), vec![server]))
    }

    /// A minority, a majority or all of the coordinators, the participants, or both.
    fn many(&mut self) -> Option<(String, Vec<Server>)> {
        let (role, which): (&str, fn(&Server) -> bool) = match self.rng.random_range(0..3) {
            0 => ("coordinators", |server| matches!(server, Server::Coordinator(_))),
            1 => ("participants", |server| matches!(server, Server::Participant(_))),
            _ => ("servers", |_| true),
        };
        let mut servers: Vec<Server> = self.free().filter(which).collect();
        let all = self.servers.all().filter(which).count();
        servers.shuffle(&mut self.rng);
        let (how_many, count) = match self.rng.random_range(0..4) {
            0 => ("a minority", (all - 1) / 2),
            1 => ("a majority", all / 2 + 1),
            _ => ("all", all),
        };
        servers.truncate(count);
        servers.sort();
        if servers.is_empty() {
            return None;
        }
        Some((format!("{how_many} of the {role}: {}", list(&servers)), servers))
    }

    /// Where servers and applications talk from, by name.
    fn parties(&self) -> Vec<(String, SocketAddr)> {
        let servers = self.servers.all().map(|server| (server.to_string(), self.servers.address(server)));
        let applications = self.applications.iter().enumerate();
        servers.chain(applications.map(|(at, address)| (format!("application-{at}"), *address))).collect()
    }

    fn partition(&mut self) -> (String, Undo) {
        let mut parties = self.parties();
        parties.shuffle(&mut self.rng);
        let address = |party: &(String, SocketAddr)| party.1;
        let both = |one: SocketAddr, other: SocketAddr| [(one, other), (other, one)];
        let names = |parties: &[(String, SocketAddr)]| {
            parties.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
        };
        let network = self.servers.network();
        let kind = self.rng.random_range(0..7);
        match kind {
            // One is alone: as a whole, or only to hear, or only to be heard.
            0..=2 => {
                let leader =
                    self.leader.lock().map(|leader| (leader.to_string(), self.servers.address(leader)));
                let alone =
                    leader.filter(|_| self.rng.random_bool(0.4)).unwrap_or_else(|| parties[0].clone());
                let others = parties.iter().map(address).filter(|other| *other != alone.1);
                let ways: Vec<Way> = match kind {
                    0 => others.flat_map(|other| both(alone.1, other)).collect(),
                    1 => others.map(|other| (other, alone.1)).collect(),
                    _ => others.map(|other| (alone.1, other)).collect(),
                };
                let how = ["is alone", "hears nothing", "is not heard"][kind];
                (format!("{} {how}", alone.0), Undo::Heal(vec![network.impair(ways, Link::CUT)]))
            }
            // Two halves, both ways or one.
            3 | 4 => {
                let (one, other) = parties.split_at(parties.len() / 2);
                let pairs = one.iter().flat_map(|one| other.iter().map(|other| (one.1, other.1)));
                let ways: Vec<Way> = match kind {
                    3 => pairs.flat_map(|(one, other)| both(one, other)).collect(),
                    _ => pairs.collect(),
                };
                let arrow = if kind == 3 { "|" } else { "does not reach" };
                let story = format!("{} {arrow} {}", names(one), names(other));
                (story, Undo::Heal(vec![network.impair(ways, Link::CUT)]))
            }
            // Everybody sees a majority, and no two see the same.
            5 => {
                let count = parties.len();
                let reach = count / 4 + 1;
                let far = |one: usize, other: usize| {
                    let distance = one.abs_diff(other);
                    distance.min(count - distance) > reach
                };
                let mut ways = Vec::new();
                for one in 0..count {
                    for other in (0..count).filter(|other| far(one, *other)) {
                        ways.push((parties[one].1, parties[other].1));
                    }
                }
                let story = format!("a ring of majorities: {}", names(&parties));
                (story, Undo::Heal(vec![network.impair(ways, Link::CUT)]))
            }
            // One is cut off, and is not, and is.
            _ => {
                let ways = parties[1..].iter().flat_map(|other| both(parties[0].1, other.1));
                let impairment = network.impair(ways, Link::CUT);
                let next = Instant::now() + Duration::from_millis(500);
                let story = format!("{} is cut off now and then", parties[0].0);
                (story, Undo::Flap { impairment, is_cut: true, next })
            }
        }
    }

    fn spoil_network(&mut self) -> (String, Undo) {
        let parties = self.parties();
        let rng = &mut self.rng;
        let mut link = Link::default();
        let mut story = String::new();
        let percent = |part: f64| 100.0 * part;
        if rng.random_bool(0.5) {
            link.loss = rng.random_range(0.01..0.3);
            let _ = write!(story, "{:.0} % lost, ", percent(link.loss));
        }
        if rng.random_bool(0.4) {
            link.duplicated = rng.random_range(0.01..0.3);
            let _ = write!(story, "{:.0} % doubled, ", percent(link.duplicated));
        }
        if rng.random_bool(0.4) {
            link.reordered = rng.random_range(0.01..0.3);
            let _ = write!(story, "{:.0} % overtaken, ", percent(link.reordered));
        }
        if rng.random_bool(0.4) {
            link.corrupted = rng.random_range(0.005..0.1);
            let _ = write!(story, "{:.1} % damaged, ", percent(link.corrupted));
        }
        if story.is_empty() || rng.random_bool(0.4) {
            link.delay = Duration::from_millis(rng.random_range(1..150));
            link.jitter = Duration::from_millis(rng.random_range(0..100));
            let (delay, jitter) = (link.delay.as_millis(), link.jitter.as_millis());
            let _ = write!(story, "{delay} to {} ms late, ", delay + jitter);
        }
        let (from, to): (Vec<_>, Vec<_>) = if rng.random_bool(0.3) {
            story += "everywhere";
            (parties.clone(), parties)
        } else {
            let one = parties.choose(rng).cloned().expect("there are servers");
            let _ = write!(story, "from and to {}", one.0);
            (vec![one], parties)
        };
        let pairs = from.iter().flat_map(|from| to.iter().map(|to| (from.1, to.1)));
        let ways: BTreeSet<Way> =
            pairs.filter(|(from, to)| from != to).flat_map(|(from, to)| [(from, to), (to, from)]).collect();
        (story, Undo::Heal(vec![self.servers.network().impair(ways, link)]))
    }

    fn move_clocks(&mut self) -> Result<Option<(String, f64, Undo)>, Trouble> {
        let several = self.rng.random_bool(0.3);
        let Some((who, servers)) = (if several { self.many() } else { self.anyone() }) else {
            return Ok(None);
        };
        // From milliseconds to an hour, each size as likely as another.
        let size = 10.0_f64.powf(self.rng.random_range(0.7..6.55)) as i64;
        let offset = if self.rng.random_bool(0.5) { size } else { -size };
        for server in &servers {
            self.servers.set_clock(*server, offset)?;
        }
        let story = format!("{:+.3} s at {who}", offset as f64 / 1e3);
        Ok(Some((story, self.rng.random_range(2.0..12.0), Undo::SetClock(servers))))
    }

    async fn change_ring(&mut self) -> Result<Option<(String, f64, Undo)>, Trouble> {
        if self.active.iter().any(|active| active.nemesis == Nemesis::Move) {
            return Ok(None);
        }
        let nodes: Vec<Server> =
            self.servers.all().filter(|server| matches!(server, Server::Participant(_))).collect();
        let leaves = nodes.len() >= NODES_MAX || (nodes.len() > 4 && self.rng.random_bool(0.7));
        let node = if leaves {
            *nodes.choose(&mut self.rng).expect("there are several")
        } else {
            self.servers.add_participant().await?
        };
        let story = format!("{node} {}", if leaves { "leaves" } else { "joins" });
        let ended = tokio::spawn(change_ring(self.operator.clone(), node, leaves));
        Ok(Some((story, 0.0, Undo::Move { node, leaves, ended })))
    }

    fn flip_bit(&mut self) -> Result<Option<(String, f64, Undo)>, Trouble> {
        // One replica of all may be damaged at a time: what is written on a majority only must survive.
        if self.active.iter().any(|active| active.nemesis == Nemesis::DiskBitFlip) {
            return Ok(None);
        }
        let Some(server) = self.one(|_| true) else { return Ok(None) };
        let suffix = if self.rng.random_bool(0.5) { ".log" } else { ".sst" };
        let Some(flipped) = self.servers.disk(server).flip_bit(suffix) else { return Ok(None) };
        self.excuse(server, 60.0);
        let before = self.endings(server);
        // It is read for certain only by a server that begins anew.
        self.kill(&[server])?;
        self.servers.start(server)?;
        let story = format!(
            "bit {} of byte {} of {} at {server}",
            flipped.bit,
            flipped.offset,
            flipped.path.display()
        );
        Ok(Some((story, self.rng.random_range(4.0..10.0), Undo::Repair(server, flipped, before))))
    }

    fn repair(&mut self, server: Server, flipped: &Flipped, before: u64) -> Result<(), Trouble> {
        let noticed = self.endings(server) > before;
        self.kill(&[server])?;
        let there = self.servers.disk(server).repair(flipped);
        let story = format!(
            "{} at {server}: {}",
            flipped.path.display(),
            match (noticed, there) {
                (true, _) => "the server has noticed and ended",
                (false, true) => "the server went on",
                (false, false) => "the file is not there any more",
            }
        );
        self.tally.flips.push(story);
        self.fallen.remove(&server);
        self.servers.start(server)
    }
}

fn list(servers: &[Server]) -> String {
    servers.iter().map(Server::to_string).collect::<Vec<_>>().join(", ")
}

/// Lets a participant join or leave, and waits until its shards have moved.
async fn change_ring(operator: Operator, node: Server, leaves: bool) -> Result<(), String> {
    let Server::Participant(id) = node else { return Err(format!("{node} has no shards")) };
    let change = if leaves { NodeChange::Drain } else { NodeChange::Admit { weight: None, zone: None } };
    let asked = change_node(&operator, NodeId(id), change, MOVE_PATIENCE).await;
    asked.map_err(|error| error.to_string())?;
    until_placed(&operator, MOVE_PATIENCE).await.map_err(|error| error.to_string())?;
    if leaves {
        let removed = change_node(&operator, NodeId(id), NodeChange::Remove, MOVE_PATIENCE).await;
        removed.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Keeps up with who leads.
async fn watch(operator: Operator, leader: Arc<Mutex<Option<Server>>>) {
    loop {
        let leads = operator.status().await.leader();
        *leader.lock() = leads.map(|id| Server::Coordinator(id.0));
        sleep(Duration::from_millis(300)).await;
    }
}
