//! The servers that everything happens to: processes, the network between them, their disks and clocks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::process::Signal;
use troth_sdk::ClientConfig;
use troth_sdk::harness::processes::{Process, ProcessError, Processes, Shape};
use troth_sdk::operator::Operator;

use crate::disk::Disk;
use crate::drill::Server;
use crate::network::Network;

/// A server cannot be set up, or not be made to do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// About its process.
    #[error("{0}")]
    Process(#[from] ProcessError),
    /// About its files.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// About talking to it.
    #[error("{0}")]
    Client(#[from] troth_sdk::Error),
    /// Something that is needed is not there.
    #[error("{0}")]
    Missing(String),
}

/// What servers have besides the network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Equipment {
    /// A disk of their own whose power can be cut. Only root can mount it.
    pub disks: bool,
    /// A wall clock of their own.
    pub clocks: bool,
}

/// How a server is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    /// It runs.
    Up,
    /// It was stopped with SIGSTOP.
    Paused,
    /// It does not run, and will.
    Down,
    /// It does not belong to the cluster any more.
    Retired,
}

struct Place {
    /// Where it listens and from where it talks.
    address: SocketAddr,
    disk: Option<Disk>,
    clock: Option<PathBuf>,
    condition: Condition,
}

/// The servers of a cluster.
pub struct Servers {
    // Killed before their disks are taken away.
    processes: Processes,
    network: Network,
    equipment: Equipment,
    places: BTreeMap<Server, Place>,
    /// For where each server listens, where others find it.
    fronts: BTreeMap<SocketAddr, SocketAddr>,
    folder: PathBuf,
    environment: Vec<(&'static str, &'static str)>,
    seed: u64,
}

/// The library that makes up the time. Debian puts it into a folder for each architecture.
fn faketime() -> Result<PathBuf, Trouble> {
    let folders = fs::read_dir("/usr/lib")?.filter_map(|entry| Some(entry.ok()?.path()));
    let library = folders.map(|folder| folder.join("faketime/libfaketime.so.1")).find(|path| path.exists());
    library.ok_or_else(|| {
        Trouble::Missing("install the package libfaketime, or leave out the nemesis clock".to_owned())
    })
}

impl Servers {
    /// Lays out a cluster in a folder, with programs from another. Nothing is started.
    ///
    /// # Errors
    /// If the system refuses, or something is not installed.
    pub async fn create(
        folder: &Path,
        binaries: &Path,
        shape: Shape,
        equipment: Equipment,
        seed: u64,
    ) -> Result<Servers, Trouble> {
        let processes = Processes::create(folder, binaries, shape)?;
        let mut servers = Servers {
            processes,
            network: Network::new(),
            equipment,
            places: BTreeMap::new(),
            fronts: BTreeMap::new(),
            folder: folder.to_owned(),
            environment: Vec::new(),
            seed,
        };
        let coordinators = (1..=shape.coordinators.into()).map(Server::Coordinator);
        let all: Vec<Server> =
            coordinators.chain((1..=shape.nodes.into()).map(Server::Participant)).collect();
        for server in &all {
            servers.equip(*server).await?;
        }
        // Once all proxies are known.
        for server in all {
            servers.readdress(server)?;
        }
        Ok(servers)
    }

    /// Gives all servers, those that join later too, these variables whenever they are started.
    pub fn set_environment(&mut self, variables: &[(&'static str, &'static str)]) {
        self.environment = variables.to_vec();
        for process in self.processes.all_mut() {
            variables.iter().for_each(|(name, value)| process.set_env(name, value));
        }
    }

    /// Gives a server everything but its configuration.
    async fn equip(&mut self, server: Server) -> Result<(), Trouble> {
        let name = server.to_string();
        let process = server.process(&mut self.processes);
        self.environment.iter().for_each(|(name, value)| process.set_env(name, value));
        let address = listens_at(process)?;
        self.fronts.insert(address, self.network.serve(address).await);
        let disk = if self.equipment.disks { Some(self.mount(&name)?) } else { None };
        let clock = if self.equipment.clocks { Some(self.clock(server)?) } else { None };
        self.places.insert(server, Place { address, disk, clock, condition: Condition::Down });
        Ok(())
    }

    /// What is on the disk of a server, and what it sees of it.
    fn folders(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.folder.join("disks").join(name), self.folder.join("data").join(name))
    }

    fn mount(&mut self, name: &str) -> Result<Disk, Trouble> {
        let (backing, mountpoint) = self.folders(name);
        fs::create_dir_all(&backing)?;
        fs::create_dir_all(&mountpoint)?;
        self.seed += 1;
        Ok(Disk::mount(&backing, &mountpoint, self.seed)?)
    }

    fn clock(&mut self, server: Server) -> Result<PathBuf, Trouble> {
        let library = faketime()?;
        let folder = self.folder.join("clocks");
        fs::create_dir_all(&folder)?;
        let clock = folder.join(server.to_string());
        set_clock(&clock, 0)?;
        let process = server.process(&mut self.processes);
        process.set_env("LD_PRELOAD", library);
        process.set_env("FAKETIME_TIMESTAMP_FILE", &clock);
        // Looked at again each second; what measures how long something takes goes on as it is.
        process.set_env("FAKETIME_CACHE_DURATION", "1");
        process.set_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        process.set_env("FAKETIME_DONT_RESET", "1");
        process.set_env("NO_FAKE_STAT", "1");
        Ok(clock)
    }

    /// Tells a server where it and the coordinators are found.
    fn readdress(&mut self, server: Server) -> Result<(), Trouble> {
        let front = self.fronts[&self.places[&server].address];
        let path = server.process(&mut self.processes).config().to_owned();
        let mut text = format!("advertise = \"{front}\"\n");
        for line in fs::read_to_string(&path)?.lines() {
            let mut line = line.to_owned();
            if !line.starts_with("listen") {
                for (address, front) in &self.fronts {
                    line = line.replace(&format!("\"{address}\""), &format!("\"{front}\""));
                }
            }
            text += &line;
            text.push('\n');
        }
        // So little that tables are written and merged all the time, there are several write-ahead logs, and
        // who was away for long gets a snapshot.
        text += "[memory]\ncache_mib = 4\nwrite_buffers_mib = 4\n[raft]\nlog_entries = 300\n";
        fs::write(path, text)?;
        Ok(())
    }

    /// Lays out one more participant, and starts it. It is not on the ring yet.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn add_participant(&mut self) -> Result<Server, Trouble> {
        self.processes.add_participant()?;
        let server = Server::Participant(self.processes.participants.len() as u64);
        self.equip(server).await?;
        self.readdress(server)?;
        self.start(server)?;
        Ok(server)
    }

    /// How applications connect, the one that talks from this address.
    ///
    /// # Errors
    /// If the certificates are gone.
    pub fn client_config(&self, bind: SocketAddr) -> Result<ClientConfig, Trouble> {
        let config = self.processes.client_config()?;
        Ok(ClientConfig { bind, ..self.fronted(config) })
    }

    /// An operator of this cluster, whom no fault concerns.
    ///
    /// # Errors
    /// If the certificates are gone.
    pub fn operator(&self) -> Result<Operator, Trouble> {
        Ok(Operator::new(&self.fronted(self.processes.admin_config()?))?)
    }

    fn fronted(&self, config: ClientConfig) -> ClientConfig {
        let front = |address: &String| {
            let front = address.parse().ok().and_then(|address| self.fronts.get(&address));
            front.map_or_else(|| address.clone(), SocketAddr::to_string)
        };
        ClientConfig { coordinators: config.coordinators.iter().map(front).collect(), ..config }
    }

    /// Where all files are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The network between them.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Where a server talks from.
    pub fn address(&self, server: Server) -> SocketAddr {
        self.places[&server].address
    }

    /// The disk of a server.
    ///
    /// # Panics
    /// If it was given none.
    pub fn disk(&self, server: Server) -> &Disk {
        self.places[&server].disk.as_ref().expect("it was given a disk")
    }

    /// The disks of all servers.
    pub fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.places.values().filter_map(|place| place.disk.as_ref())
    }

    /// All servers that belong to the cluster.
    pub fn all(&self) -> impl Iterator<Item = Server> {
        let member = |(_, place): &(&Server, &Place)| place.condition != Condition::Retired;
        self.places.iter().filter(member).map(|(server, _)| *server)
    }

    /// How a server is.
    pub fn condition(&self, server: Server) -> Condition {
        self.places[&server].condition
    }

    fn set(&mut self, server: Server, condition: Condition) {
        if let Some(place) = self.places.get_mut(&server) {
            place.condition = condition;
        }
    }

    /// Starts a server, if it is down.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start(&mut self, server: Server) -> Result<(), Trouble> {
        if self.condition(server) == Condition::Down {
            server.process(&mut self.processes).start()?;
            self.set(server, Condition::Up);
        }
        Ok(())
    }

    /// Kills those of these servers that run, at the same moment: SIGKILL. Returns whom.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn kill(&mut self, servers: &[Server]) -> Result<Vec<Server>, Trouble> {
        let runs = |server: &Server| matches!(self.condition(*server), Condition::Up | Condition::Paused);
        let running: Vec<Server> = servers.iter().copied().filter(runs).collect();
        for server in &running {
            server.process(&mut self.processes).signal(Signal::KILL)?;
        }
        for server in &running {
            server.process(&mut self.processes).kill()?;
            self.set(*server, Condition::Down);
        }
        Ok(running)
    }

    /// Kills these servers and cuts the power of their disks, at the same moment. Returns whom it killed.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn cut_power(&mut self, servers: &[Server]) -> Result<Vec<Server>, Trouble> {
        let killed = self.kill(servers)?;
        for server in servers {
            self.disk(*server).power_cut();
        }
        Ok(killed)
    }

    /// Copies what a server that does not run has stored.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn copy_data(&self, server: Server, to: &Path) -> Result<(), Trouble> {
        let (backing, seen) = self.folders(&server.to_string());
        // Not through the disk: this process could not be killed while it waits for itself.
        let from = match &self.places[&server].disk {
            Some(disk) => {
                disk.sync_all();
                backing
            }
            None => seen,
        };
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok(())
    }

    /// Asks a server to stop.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn terminate(&mut self, server: Server) -> Result<(), Trouble> {
        Ok(server.process(&mut self.processes).signal(Signal::TERM)?)
    }

    /// Lets a server stand still, if it runs: SIGSTOP.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn pause(&mut self, server: Server) -> Result<(), Trouble> {
        if self.condition(server) == Condition::Up {
            server.process(&mut self.processes).signal(Signal::STOP)?;
            self.set(server, Condition::Paused);
        }
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn resume(&mut self, server: Server) -> Result<(), Trouble> {
        if self.condition(server) == Condition::Paused {
            server.process(&mut self.processes).signal(Signal::CONT)?;
            self.set(server, Condition::Up);
        }
        Ok(())
    }

    /// A server that has left the cluster ends.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn retire(&mut self, server: Server) -> Result<(), Trouble> {
        self.kill(&[server])?;
        self.set(server, Condition::Retired);
        Ok(())
    }

    /// Sets the wall clock of a server so far from that of the system.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn set_clock(&mut self, server: Server, offset_millis: i64) -> Result<(), Trouble> {
        match &self.places[&server].clock {
            Some(clock) => Ok(set_clock(clock, offset_millis)?),
            None => Err(Trouble::Missing(format!("{server} has no clock of its own"))),
        }
    }

    /// Those that have ended by themselves since this was asked last: they are down now.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn ended(&mut self) -> Result<Vec<(Server, ExitStatus)>, Trouble> {
        let up: BTreeSet<Server> =
            self.all().filter(|server| self.condition(*server) == Condition::Up).collect();
        let mut ended = Vec::new();
        for server in up {
            if let Some(status) = server.process(&mut self.processes).ended()? {
                self.set(server, Condition::Down);
                ended.push((server, status));
            }
        }
        Ok(ended)
    }

    /// The last lines of the log of a server, at most so many.
    pub fn last_lines(&mut self, server: Server, count: usize) -> Vec<String> {
        let Ok(log) = File::open(server.process(&mut self.processes).log()) else { return Vec::new() };
        let mut lines = Vec::new();
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            if lines.len() == count {
                lines.remove(0);
            }
            lines.push(line);
        }
        lines
    }
}

/// Where a server listens that has a configuration file.
fn listens_at(process: &Process) -> Result<SocketAddr, Trouble> {
    let text = fs::read_to_string(process.config())?;
    let listen = text.lines().find_map(|line| line.strip_prefix("listen = "));
    let address = listen.and_then(|listen| listen.trim_matches('"').parse().ok());
    address.ok_or_else(|| Trouble::Missing(format!("{} listens nowhere", process.config().display())))
}

/// Whoever reads it sees the old offset or the new one.
fn set_clock(clock: &Path, offset_millis: i64) -> io::Result<()> {
    let part = clock.with_extension("part");
    fs::write(&part, format!("{:+.3}\n", offset_millis as f64 / 1000.0))?;
    fs::rename(part, clock)
}
