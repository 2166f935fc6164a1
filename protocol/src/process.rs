//! What the two servers share: configuration files, logging, signals, exit codes.

use std::fmt;
use std::fs;
use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tracing_subscriber::EnvFilter;

use crate::net::quic::QuicConfig;
use crate::net::tls::{CredentialFiles, Credentials};
use crate::net::{Role, tls::TlsError};

/// The process did what it was asked to.
pub const EXIT_OK: u8 = 0;
/// It failed on the way.
pub const EXIT_FAILED: u8 = 1;
/// Its configuration or command line makes no sense; nothing was done.
pub const EXIT_USAGE: u8 = 2;

/// A configuration that makes no sense: where, and how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}:{line}: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A value that cannot be.
    #[error("{place}{key}: {reason}")]
    Value {
        /// The file and line that it stands in, with a colon after it; empty if it was a flag.
        place: String,
        /// The key or flag.
        key: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

/// A configuration file, as read: for naming the line of a value that turns out to make no sense.
#[derive(Debug, Default)]
pub struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    /// A path from the file: if relative, then to the file's folder.
    pub fn path(&self, path: &Path) -> PathBuf {
        match self.path.parent() {
            Some(folder) => folder.join(path),
            None => path.to_owned(),
        }
    }

    /// An error about a key, with the line where it is set.
    pub fn error(&self, key: &str, reason: impl fmt::Display) -> ConfigError {
        let name = key.rsplit('.').next().unwrap_or(key);
        let sets = |line: &str| line.split('=').next().is_some_and(|left| left.trim() == name);
        let line = self.text.lines().position(sets).map(|line| line + 1);
        let place = line.map(|line| format!("{}:{line}: ", self.path.display())).unwrap_or_default();
        ConfigError::Value { place, key: key.to_owned(), reason: reason.to_string() }
    }
}

/// Reads a configuration file. Unknown keys are errors.
///
/// # Errors
/// Names the line.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<(T, Source), ConfigError> {
    let text =
        fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let config = toml::from_str(&text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        let line = text[..offset.min(text.len())].matches('\n').count() + 1;
        let reason = error.message().replace('\n', " ");
        ConfigError::Parse { path: path.to_owned(), line, reason }
    })?;
    Ok((config, Source { path: path.to_owned(), text }))
}

/// Where the certificates lie.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// This process's certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl TlsSection {
    /// Takes relative paths as relative to the file they stand in.
    pub fn relative_to(&mut self, source: &Source) {
        for path in [&mut self.ca, &mut self.cert, &mut self.key] {
            *path = source.path(path);
        }
    }

    /// Takes what flags say instead, where they say anything.
    pub fn override_with(&mut self, ca: Option<PathBuf>, cert: Option<PathBuf>, key: Option<PathBuf>) {
        for (own, flag) in [(&mut self.ca, ca), (&mut self.cert, cert), (&mut self.key, key)] {
            if let Some(flag) = flag {
                *own = flag;
            }
        }
    }

    /// Reads the certificates, and checks that they are for this kind of process.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(&self, role: Role) -> Result<Credentials, TlsError> {
        let files = CredentialFiles { ca: self.ca.clone(), cert: self.cert.clone(), key: self.key.clone() };
        let credentials = files.load()?;
        let actual = credentials.identity().role;
        if actual != role {
            let reason = format!("is a {actual}'s certificate; make one with `troth cert --role {role}`");
            return Err(TlsError::Pem { path: self.cert.clone(), reason });
        }
        Ok(credentials)
    }
}

/// How to write the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Pretty,
    /// A JSON object on each line.
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<LogFormat, String> {
        match text {
            "pretty" => Ok(LogFormat::Pretty),
            "json" => Ok(LogFormat::Json),
            other => Err(format!("{other:?} is not a log format; the formats are pretty, json")),
        }
    }
}

/// What to log, and how.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSection {
    /// How to write it.
    pub format: LogFormat,
    /// What: `error`, `warn`, `info`, `debug`, `trace`, or a filter for each module in the form of
    /// the `RUST_LOG` variable, which overrides this.
    pub level: String,
}

impl Default for LogSection {
    fn default() -> LogSection {
        LogSection { format: LogFormat::default(), level: "info".into() }
    }
}

impl LogSection {
    /// Takes what flags say instead, where they say anything.
    pub fn override_with(&mut self, format: Option<LogFormat>, level: Option<String>) {
        self.format = format.unwrap_or(self.format);
        if let Some(level) = level {
            self.level = level;
        }
    }

    /// Starts logging to standard error.
    ///
    /// # Errors
    /// If the level is not one.
    pub fn start(&self, source: &Source) -> Result<(), ConfigError> {
        let level = std::env::var("RUST_LOG").unwrap_or_else(|_| self.level.clone());
        let filter = EnvFilter::try_new(&level).map_err(|error| source.error("log.level", error))?;
        let builder =
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
        // A second start in one process, as tests do, keeps the first.
        let _ = match self.format {
            LogFormat::Json => builder.json().flatten_event(true).try_init(),
            LogFormat::Pretty => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        };
        Ok(())
    }
}

/// How to talk to others.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSection {
    /// Let the kernel cut packets (GSO): faster on most networks, slower on loopback. Left out: off
    /// if `listen` is a loopback address.
    pub segmentation_offload: Option<bool>,
    /// A sign of life is sent when this long nothing was; milliseconds.
    pub keep_alive_ms: Option<u64>,
    /// A connection is given up when this long nothing came; milliseconds.
    pub idle_timeout_ms: Option<u64>,
}

impl NetworkSection {
    /// The transport's configuration.
    ///
    /// # Errors
    /// If the address cannot be resolved, or the times make no sense.
    pub fn quic(&self, listen: &str, source: &Source) -> Result<QuicConfig, ConfigError> {
        let bind = resolve(listen).map_err(|reason| source.error("listen", reason))?;
        let mut config =
            QuicConfig { bind, segmentation_offload: self.segmentation_offload, ..QuicConfig::default() };
        if let Some(millis) = self.keep_alive_ms {
            config.keep_alive = Duration::from_millis(millis);
        }
        if let Some(millis) = self.idle_timeout_ms {
            config.idle_timeout = Duration::from_millis(millis);
        }
        if config.keep_alive.is_zero() || config.idle_timeout < 2 * config.keep_alive {
            let reason = format!(
                "{} ms must be at least twice keep_alive_ms, which is {}",
                config.idle_timeout.as_millis(),
                config.keep_alive.as_millis()
            );
            return Err(source.error("network.idle_timeout_ms", reason));
        }
        if config.idle_timeout > Duration::from_secs(600) {
            return Err(source.error("network.idle_timeout_ms", "must be at most 600000, ten minutes"));
        }
        Ok(config)
    }
}

/// How patient the members of a Raft group are with each other.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaftSection {
    /// A leader gives a sign of life this often; milliseconds.
    pub heartbeat_ms: Option<u64>,
    /// A member that hears nothing for this long asks to be elected; milliseconds.
    pub election_ms: Option<u64>,
    /// The log is cut after this many entries; 10000 if left out.
    pub log_entries: Option<u64>,
}

impl RaftSection {
    /// Heartbeat and election timeout: what is set here, else these defaults.
    ///
    /// # Errors
    /// If they do not go together.
    pub fn timing(
        &self,
        heartbeat: Duration,
        election: Duration,
        source: &Source,
    ) -> Result<(Duration, Duration), ConfigError> {
        let heartbeat = self.heartbeat_ms.map_or(heartbeat, Duration::from_millis);
        let election = self.election_ms.map_or(election, Duration::from_millis);
        if heartbeat.is_zero() || election < 3 * heartbeat {
            let reason = format!(
                "{} ms must be at least three times heartbeat_ms, which is {}",
                election.as_millis(),
                heartbeat.as_millis()
            );
            return Err(source.error("raft.election_ms", reason));
        }
        Ok((heartbeat, election))
    }

    /// After how many entries a log is cut.
    ///
    /// # Errors
    /// If that is too few or too many.
    pub fn log_entries(&self, source: &Source) -> Result<u64, ConfigError> {
        let entries = self.log_entries.unwrap_or(10_000);
        if !(100..=10_000_000).contains(&entries) {
            return Err(source.error("raft.log_entries", "must be from 100 to 10000000"));
        }
        Ok(entries)
    }
}

/// The first address of `host:port`.
fn resolve(address: &str) -> Result<SocketAddr, String> {
    let wrong = |error: &dyn fmt::Display| {
        format!(
            "{address:?} is not an address to listen on ({error}); write host:port, for example 127.0.0.1:7450"
        )
    };
    let mut addresses = address.to_socket_addrs().map_err(|error| wrong(&error))?;
    addresses.next().ok_or_else(|| wrong(&"it resolves to nothing"))
}

/// A runtime with this many threads for its tasks. `None`: half as many as the machine has cores,
/// and one at least; the other half is for the log writer and RocksDB's own threads. On a machine
/// of two cores a second thread only makes every step wait for the other core to wake up.
///
/// The calling thread, and with it every thread that it begets from here on, asks the system for the
/// batch scheduling policy: a server's threads work in bursts of microseconds, and when one that wakes
/// up pushes aside the one that woke it, the rest of a burst (the second of two messages to send)
/// waits for nothing. Where the system refuses, all goes on without.
///
/// # Errors
/// If the system does not give the process that many threads.
pub fn runtime(threads: Option<usize>) -> std::io::Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or(cores / 2).max(1);
    work_in_batches();
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
}

#[cfg(target_os = "linux")]
fn work_in_batches() {
    use thread_priority::{NormalThreadSchedulePolicy::Batch, ThreadPriority, ThreadSchedulePolicy::Normal};
    let this = thread_priority::thread_native_id();
    if let Err(error) =
        thread_priority::set_thread_priority_and_policy(this, ThreadPriority::Min, Normal(Batch))
    {
        tracing::debug!(%error, "the system keeps its own scheduling policy");
    }
}

#[cfg(not(target_os = "linux"))]
fn work_in_batches() {}

/// Writes a line that says where a server listens into its data folder, for scripts that let the
/// system choose a port.
///
/// # Errors
/// If the folder cannot be written.
pub fn publish_address(folder: &Path, address: SocketAddr) -> std::io::Result<()> {
    let part = folder.join("address.part");
    fs::write(&part, format!("{address}\n"))?;
    fs::rename(part, folder.join("address"))
}

/// Returns when the process is asked to stop: SIGTERM, SIGINT from a terminal, or, `with_parent`,
/// the end of standard input, which comes when whoever started the process has ended, however.
///
/// # Errors
/// If the system does not let a process listen for signals.
pub async fn asked_to_stop(with_parent: bool) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (parent_lives, parent_ended) = tokio::sync::oneshot::channel::<()>();
    if with_parent {
        // A thread, since nothing else can wait for standard input without holding up the exit.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            drop(parent_lives);
        });
    } else {
        std::mem::forget(parent_lives);
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = parent_ended => {}
    }
    Ok(())
}

/// Ends the process when any of its threads panics: a broken invariant must not be served from.
pub fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        tracing::error!(panic = %info, "a bug: the process stops rather than serve from a broken state");
        std::process::abort();
    }));
}
