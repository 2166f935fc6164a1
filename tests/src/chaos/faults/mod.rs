//! Faults, one after the other and several at a time: what is done, for how long, and how it is undone.
//!
//! | module | what it is |
//! | --- | --- |
//! | `strike` | which fault comes next, whom it hits, and for how long |
//! | `links` | what goes wrong between servers |
//! | `record` | what is written down |
//! | `ring` | participants that join and leave |

pub mod links;
mod record;
pub mod ring;
mod strike;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, sleep};
use troth_sdk::operator::Operator;

use super::nemesis::Nemesis;
use super::servers::{Condition, Servers, Trouble};
use crate::disk::{FailReads, Flipped};
use crate::drill::Server;
use crate::history::recorder::Recorder;
use crate::network::{Impairment, Link};

pub use record::{Journal, Tally};

/// Faults at the same time.
const AT_ONCE: usize = 4;

/// The mean time between the beginnings of two faults.
const GAP: Duration = Duration::from_millis(2_000);

/// When a server that has ended by itself is started again, as a supervisor would do.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// How long a server may take to stop when it is asked to.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

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
    Heal(Impairment),
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
        if leaves && status.code() == Some(1) {
            return;
        }
        // One that is asked to stop while it starts has nothing to hand over, and ends at once.
        if self.is_restarting(server) && (status.success() || status.signal() == Some(Signal::TERM.as_raw()))
        {
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
        let there: Vec<Server> = self.servers.all().collect();
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
                    // It has left the ring meanwhile.
                    Some((server, _)) if !there.contains(&server) => *stopping = None,
                    Some((server, since)) if since + STOP_PATIENCE < now => {
                        self.tally.crashed.push(format!("{server} does not stop when it is asked to"));
                        self.servers.kill(&[server])?;
                    }
                    Some(_) => {}
                    None => match waiting.pop_front() {
                        Some(server)
                            if there.contains(&server) && self.servers.condition(server) == Condition::Up =>
                        {
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
            Undo::Heal(impairment) | Undo::Flap { impairment, .. } => drop(impairment),
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

    fn endings(&self, server: Server) -> u64 {
        self.endings.get(&server).copied().unwrap_or(0)
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
}

/// Keeps up with who leads.
async fn watch(operator: Operator, leader: Arc<Mutex<Option<Server>>>) {
    loop {
        let leads = operator.status().await.leader();
        *leader.lock() = leads.map(|id| Server::Coordinator(id.0));
        sleep(Duration::from_millis(300)).await;
    }
}
