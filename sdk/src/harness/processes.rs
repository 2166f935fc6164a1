//! A cluster of real processes on this machine, in a folder.
//!
//! Processes end with the [`Processes`] that started them, and also if this process is killed: they
//! watch a pipe to it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::Role;
use crate::config::ClientConfig;
use crate::error::Error;
use crate::layout::{HTTP_PORT_DISTANCE, Hosting, Layout, LayoutError, NewCoordinator, Newcomer, Plan};
use crate::operator::Operator;

/// Something about the processes failed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// A program is not where it should be.
    #[error("{path} is not there; build it with `make build`")]
    NoBinary {
        /// Where it should be.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// The files of the cluster cannot be made.
    #[error("{0}")]
    Layout(#[from] LayoutError),
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> ProcessError {
    let what = what.into();
    move |source| ProcessError::Io { what, source }
}

/// What the cluster is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Coordinators: 1, 3 or 5.
    pub coordinators: u16,
    /// Participants.
    pub nodes: u16,
    /// Replicas of each shard: 1, 3 or 5.
    pub replicas: u16,
    /// Shards.
    pub shards: u16,
}

/// One process of the cluster, running or not.
pub struct Process {
    /// `coordinator-1`, `participant-2`, …
    pub name: String,
    program: PathBuf,
    config: PathBuf,
    log: PathBuf,
    env: Vec<(String, OsString)>,
    child: Option<Child>,
}

impl Process {
    fn new(folder: &Path, binaries: &Path, role: Role, id: usize) -> Result<Process, ProcessError> {
        Process::named(folder, binaries, role, format!("{role}-{id}"))
    }

    fn named(folder: &Path, binaries: &Path, role: Role, name: String) -> Result<Process, ProcessError> {
        let program = binaries.join(format!("troth-{role}"));
        if !program.exists() {
            return Err(ProcessError::NoBinary { path: program });
        }
        let config = folder.join(format!("{name}.toml"));
        let log = folder.join("logs").join(format!("{name}.log"));
        Ok(Process { name, program, config, log, env: Vec::new(), child: None })
    }

    /// Its configuration file, to be changed before it is started.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Has this variable in its environment whenever it is started from now on.
    pub fn set_env(&mut self, name: &str, value: impl Into<OsString>) {
        self.env.push((name.to_owned(), value.into()));
    }

    /// Starts it.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start(&mut self) -> Result<(), ProcessError> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.map_err(failed(format!("cannot write {}", self.log.display())))?;
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config).arg("--stop-with-parent");
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().map_err(failed(format!("cannot start {}", self.program.display())))?;
        self.child = Some(child);
        Ok(())
    }

    /// The last line that it has written to its log: what it says when it cannot go on.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn last_words(&self) -> Result<String, ProcessError> {
        let log =
            fs::read_to_string(&self.log).map_err(failed(format!("cannot read {}", self.log.display())))?;
        Ok(log.lines().last().unwrap_or_default().to_owned())
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where it writes its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Kills it: SIGKILL, without a moment to tidy up. Returns its former process id.
    ///
    /// # Errors
    /// If it does not run, or the system refuses.
    pub fn kill(&mut self) -> Result<u32, ProcessError> {
        let what = format!("cannot kill {}", self.name);
        let mut child = self.take(&what)?;
        let pid = child.id();
        child.kill().and_then(|()| child.wait()).map_err(failed(what))?;
        Ok(pid)
    }

    /// Asks it to stop, and waits until it has.
    ///
    /// # Errors
    /// If it does not run, or does not stop within `patience`; it is killed then.
    pub fn stop(&mut self, patience: Duration) -> Result<ExitStatus, ProcessError> {
        self.signal(Signal::TERM)?;
        self.wait(patience)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// If it does not run, or does not end within `patience`; it is killed then.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus, ProcessError> {
        let what = format!("{} does not end", self.name);
        let mut child = self.take(&what)?;
        let deadline = Instant::now() + patience;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(failed(what)(io::Error::from(io::ErrorKind::TimedOut)));
                }
                Err(error) => return Err(failed(what)(error)),
            }
        }
    }

    /// How it ended, if it has ended by itself.
    ///
    /// # Errors
    /// If it was not started, or the system refuses.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        let what = format!("cannot watch {}", self.name);
        let child = self.child.as_mut().ok_or_else(|| io::Error::other("it does not run"));
        let status = child.and_then(Child::try_wait).map_err(failed(what))?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    /// Sends it a signal, for example SIGSTOP.
    ///
    /// # Errors
    /// If it does not run, or the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        let what = format!("cannot signal {}", self.name);
        let child = self.child.as_ref();
        let pid = child.and_then(|child| Pid::from_raw(child.id() as i32));
        let pid = pid.ok_or_else(|| failed(what.clone())(io::Error::other("it does not run")))?;
        kill_process(pid, signal).map_err(|error| failed(what)(error.into()))
    }

    /// Processor time that it has used, all threads together; zero if it does not run.
    pub fn cpu(&self) -> Duration {
        self.pid().map_or(Duration::ZERO, cpu_of)
    }

    fn take(&mut self, what: &str) -> Result<Child, ProcessError> {
        self.child.take().ok_or_else(|| failed(what)(io::Error::other("it does not run")))
    }
}

/// Processor time that a process has used, user and system, all threads together.
pub fn cpu_of(pid: u32) -> Duration {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return Duration::ZERO;
    };
    // The second field is a name that may hold anything, in parentheses.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    let per_second = rustix::param::clock_ticks_per_second();
    Duration::from_secs_f64((ticks(11) + ticks(12)) as f64 / per_second as f64)
}

/// A cluster of processes.
pub struct Processes {
    layout: Layout,
    hosting: Hosting,
    binaries: PathBuf,
    addresses: Vec<String>,
    /// The coordinators.
    pub coordinators: Vec<Process>,
    /// The participants.
    pub participants: Vec<Process>,
}

impl Processes {
    /// Lays out a new cluster in a folder, with programs from another. Nothing is started.
    ///
    /// # Errors
    /// If the folder cannot be written, or the programs are not there.
    pub fn create(folder: &Path, binaries: &Path, shape: Shape) -> Result<Processes, ProcessError> {
        Processes::create_hosted(folder, binaries, shape, Hosting::default())
    }

    /// The same, with servers that show themselves.
    ///
    /// # Errors
    /// As [`Processes::create`].
    pub fn create_hosted(
        folder: &Path,
        binaries: &Path,
        shape: Shape,
        hosting: Hosting,
    ) -> Result<Processes, ProcessError> {
        let layout = Layout::at(folder);
        let ports = free_ports(shape.coordinators + shape.nodes).map_err(failed("cannot find free ports"))?;
        let addresses: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let (coordinators, participants) = addresses.split_at(shape.coordinators.into());
        layout.create(&Plan {
            coordinators: coordinators.to_vec(),
            participants: participants.to_vec(),
            shards: shape.shards,
            replicas: shape.replicas,
            hosting: hosting.clone(),
        })?;
        let logs = folder.join("logs");
        fs::create_dir_all(&logs).map_err(failed(format!("cannot make {}", logs.display())))?;
        let all = |role: Role, count: u16| -> Result<Vec<Process>, ProcessError> {
            (1..=count.into()).map(|id| Process::new(folder, binaries, role, id)).collect()
        };
        Ok(Processes {
            coordinators: all(Role::Coordinator, shape.coordinators)?,
            participants: all(Role::Participant, shape.nodes)?,
            addresses: coordinators.to_vec(),
            binaries: binaries.to_owned(),
            layout,
            hosting,
        })
    }

    /// Lays out one more participant. It is not started, and not on the ring.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn add_participant(&mut self) -> Result<&mut Process, ProcessError> {
        let id = self.participants.len() + 1;
        let port = free_ports(1).map_err(failed("cannot find a free port"))?[0];
        self.layout.add_participant(&Newcomer {
            id: id as u64,
            listen: format!("127.0.0.1:{port}"),
            coordinators: self.addresses.clone(),
            zone: String::new(),
            weight: 1,
            hosting: self.hosting.clone(),
        })?;
        let process = Process::new(self.layout.folder(), &self.binaries, Role::Participant, id)?;
        self.participants.push(process);
        Ok(self.participants.last_mut().expect("pushed just now"))
    }

    /// Lays out one more coordinator. It is not started, and nobody has let it in.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn add_coordinator(&mut self) -> Result<(&mut Process, String), ProcessError> {
        let id = self.coordinators.len() + 1;
        let port = free_ports(1).map_err(failed("cannot find a free port"))?[0];
        let listen = format!("127.0.0.1:{port}");
        self.layout.add_coordinator(&NewCoordinator {
            id: id as u64,
            listen: listen.clone(),
            others: self.addresses.clone(),
            hosting: self.hosting.clone(),
        })?;
        self.addresses.push(listen.clone());
        let process = Process::new(self.layout.folder(), &self.binaries, Role::Coordinator, id)?;
        self.coordinators.push(process);
        Ok((self.coordinators.last_mut().expect("pushed just now"), listen))
    }

    /// A process with a configuration that was written beside the others, as `<name>.toml`.
    ///
    /// # Errors
    /// If the program is not there.
    pub fn beside(&self, role: Role, name: &str) -> Result<Process, ProcessError> {
        Process::named(self.layout.folder(), &self.binaries, role, name.to_owned())
    }

    /// Where the coordinators listen.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Starts all processes.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start(&mut self) -> Result<(), ProcessError> {
        self.all_mut().try_for_each(Process::start)
    }

    /// Kills all processes that run, at the same moment: SIGKILL.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn kill_all(&mut self) -> Result<(), ProcessError> {
        for process in self.all_mut().filter(|process| process.child.is_some()) {
            process.signal(Signal::KILL)?;
        }
        self.all_mut()
            .filter(|process| process.child.is_some())
            .try_for_each(|process| process.kill().map(drop))
    }

    /// All processes.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Process> {
        self.coordinators.iter_mut().chain(&mut self.participants)
    }

    /// Processor time that all running processes have used.
    pub fn cpu(&self) -> Duration {
        self.coordinators.iter().chain(&self.participants).map(Process::cpu).sum()
    }

    /// How to connect to this cluster.
    ///
    /// # Errors
    /// [`Error::Config`] if the certificates are gone.
    pub fn client_config(&self) -> Result<ClientConfig, Error> {
        self.config_as(Role::Client)
    }

    /// How an operator connects to this cluster.
    ///
    /// # Errors
    /// [`Error::Config`] if the certificates are gone.
    pub fn admin_config(&self) -> Result<ClientConfig, Error> {
        self.config_as(Role::Admin)
    }

    fn config_as(&self, role: Role) -> Result<ClientConfig, Error> {
        let files = self.layout.credentials(role.name());
        let credentials = files.load().map_err(|error| Error::Config(error.to_string()))?;
        Ok(ClientConfig::new(self.addresses.clone(), credentials))
    }

    /// An operator of this cluster.
    ///
    /// # Errors
    /// [`Error::Config`] if the certificates are gone.
    pub fn operator(&self) -> Result<Operator, Error> {
        Operator::new(&self.admin_config()?)
    }

    /// The files of this cluster.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let _ = self.kill_all();
    }
}

/// Where the programs of this build lie: beside the running one, or, for a test, one folder up.
///
/// # Errors
/// If the system does not tell where the running program is.
pub fn binaries() -> Result<PathBuf, ProcessError> {
    let program = std::env::current_exe().map_err(failed("cannot find the running program"))?;
    let folder = program.parent().map(Path::to_owned).unwrap_or_default();
    let is_test = folder.file_name().is_some_and(|name| name == "deps");
    Ok(if is_test { folder.parent().map(Path::to_owned).unwrap_or_default() } else { folder })
}

/// Where ports for servers are looked for, with those for HTTP: below all that systems give to sockets which do
/// not care (Linux from 32768 on, see `ip_local_port_range`). Else any socket could get the port of a server
/// before it listens, or while it is down.
const PORTS: Range<u16> = 10_000..30_000;

/// Ports that were free a moment ago, and so were those for HTTP that belong to them.
///
/// # Errors
/// If there are not so many.
pub fn free_ports(count: u16) -> io::Result<Vec<u16>> {
    // Held until all are found, so that none is found twice.
    let mut held = Vec::new();
    for _ in 0..PORTS.len() {
        if held.len() == usize::from(count) {
            break;
        }
        let port = rand::random_range(PORTS);
        let own = UdpSocket::bind(("127.0.0.1", port));
        let for_http = TcpListener::bind(("127.0.0.1", port + HTTP_PORT_DISTANCE));
        if let (Ok(own), Ok(_)) = (own, for_http) {
            held.push(own);
        }
    }
    if held.len() < usize::from(count) {
        let reason = format!("fewer than {count} ports from {} to {} are free", PORTS.start, PORTS.end - 1);
        return Err(io::Error::new(io::ErrorKind::AddrInUse, reason));
    }
    held.iter().map(|socket| Ok(socket.local_addr()?.port())).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::UdpSocket;

    use super::{PORTS, free_ports};

    #[test]
    fn ports_are_free_and_no_other_socket_gets_them_by_itself() {
        let ports = free_ports(100).expect("there are thousands");
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 100);
        for port in ports {
            UdpSocket::bind(("127.0.0.1", port)).expect("it is free");
        }
        let any = || UdpSocket::bind(("127.0.0.1", 0)).expect("a socket").local_addr().expect("bound").port();
        assert!((0..1000).all(|_| !PORTS.contains(&any())), "the system gives such ports to anybody");
    }
}
