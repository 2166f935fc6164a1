//! Configuration files: TOML, with errors that name the line and the fix.

use std::fmt;
use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use subtle::ConstantTimeEq;

use super::telemetry::{LogSection, TraceSection};
use crate::net::Role;
use crate::net::quic::QuicConfig;
use crate::net::tls::{CredentialFiles, Credentials, TlsError};

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
    /// The certificates cannot be used.
    #[error("{0}")]
    Tls(#[from] TlsError),
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

/// The longest time that a file may set, ten years: nobody waits longer, and every clock can count so far.
pub const TIME_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

impl Source {
    /// A path from the file: if relative, then to the file's folder.
    pub fn path(&self, path: &Path) -> PathBuf {
        match self.path.parent() {
            Some(folder) => folder.join(path),
            None => path.to_owned(),
        }
    }

    /// Whether a path is that of the file's own folder: what an empty path comes to.
    fn is_folder(&self, path: &Path) -> bool {
        self.path
            .parent()
            .is_some_and(|folder| folder.join("") == path && path.to_string_lossy().ends_with('/'))
    }

    /// A time that a key sets.
    ///
    /// # Errors
    /// If it is longer than [`TIME_MAX`].
    pub fn time(&self, key: &str, time: Duration) -> Result<Duration, ConfigError> {
        if time > TIME_MAX {
            return Err(self.error(key, format!("{} s is too long; ten years are the most", time.as_secs())));
        }
        Ok(time)
    }

    /// An error about a key that nobody set.
    pub fn missing(&self, key: &str, example: &str) -> ConfigError {
        self.error(key, format!("is missing; for example: {example}"))
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
    parse(path, text)
}

/// The same for a file that was read already.
///
/// # Errors
/// Names the line.
pub fn parse<T: DeserializeOwned>(path: &Path, text: String) -> Result<(T, Source), ConfigError> {
    let config = toml::from_str(&text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        let line = text[..offset.min(text.len())].matches('\n').count() + 1;
        let reason = error.message().replace('\n', " ");
        ConfigError::Parse { path: path.to_owned(), line, reason }
    })?;
    Ok((config, Source { path: path.to_owned(), text }))
}

/// The keys that the files of both servers have in common, borrowed from one.
pub struct Common<'a> {
    /// The server's number among its kind.
    pub id: &'a mut Option<u64>,
    /// Where to listen.
    pub listen: &'a mut Option<String>,
    /// Where others find it.
    pub advertise: &'a mut Option<String>,
    /// The data folder.
    pub data: &'a mut Option<PathBuf>,
    /// Certificates.
    pub tls: &'a mut TlsSection,
    /// What to log, and how.
    pub log: &'a mut LogSection,
    /// Where spans are sent.
    pub trace: &'a mut TraceSection,
    /// How to talk to others.
    pub network: &'a mut NetworkSection,
    /// What is shown over HTTP.
    pub http: &'a mut HttpSection,
    /// How much memory the database may take.
    pub memory: &'a mut MemorySection,
}

/// The configuration file of a server.
pub trait ServerFile: DeserializeOwned + Default {
    /// What it has in common with the other's.
    fn common(&mut self) -> Common<'_>;
}

/// What both servers must know, complete and checked.
#[derive(Clone, Debug)]
pub struct Basics {
    /// The server's number among its kind.
    pub id: u64,
    /// Where to listen, and how to talk.
    pub quic: QuicConfig,
    /// Where others find it; `None`: where it listens.
    pub advertise: Option<String>,
    /// The data folder.
    pub data: PathBuf,
    /// Where metrics and health are shown; `None`: nowhere.
    pub http: Option<HttpConfig>,
    /// A transaction that takes longer than this is logged with all that happened to it.
    pub slow: Duration,
    /// How much memory the database may take.
    pub memory: Memory,
}

/// How much memory a database may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    /// Bytes of blocks that were read.
    pub cache: usize,
    /// Bytes that were written and are in no table yet. Write-ahead logs may take twice as much on the disk.
    pub write_buffers: usize,
}

impl Default for Memory {
    fn default() -> Memory {
        Memory { cache: 256 << 20, write_buffers: 256 << 20 }
    }
}

/// What is shown over HTTP.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Where to listen; port 0: the system chooses one.
    pub listen: SocketAddr,
    /// What whoever wants to see the console must say; `None`: there is none.
    pub console: Option<Token>,
}

/// A secret between a server and its operators.
#[derive(Clone)]
pub struct Token(String);

/// The least and the most characters of a token.
const TOKEN_CHARS: RangeInclusive<usize> = 16..=128;

impl Token {
    /// Takes a text as a token.
    ///
    /// # Errors
    /// If it is too short or too long, or has other characters than letters, digits, `-` and `_`.
    pub fn new(text: &str) -> Result<Token, String> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if TOKEN_CHARS.contains(&text.len()) && text.chars().all(is_plain) {
            return Ok(Token(text.to_owned()));
        }
        let (least, most) = TOKEN_CHARS.into_inner();
        Err(format!("a token has {least} to {most} letters, digits, '-' or '_'"))
    }

    /// Whether somebody knows it. How long this takes says nothing of how much of it was right.
    pub fn is(&self, told: &str) -> bool {
        bool::from(self.0.as_bytes().ct_eq(told.as_bytes()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Common<'_> {
    /// Checks what is in common, and fills in defaults.
    ///
    /// # Errors
    /// Names the key, its line, and what would be right.
    pub fn resolve(&self, default_listen: &str, source: &Source) -> Result<Basics, ConfigError> {
        let id = self.id.ok_or_else(|| source.missing("id", "id = 1"))?;
        if id == 0 {
            return Err(source.error("id", "must be 1 or more"));
        }
        for (key, value) in [("listen", &*self.listen), ("advertise", &*self.advertise)] {
            if value.as_ref().is_some_and(|value| value.is_empty()) {
                return Err(source.error(key, "is empty; write host:port, or leave it out"));
            }
        }
        let data = self.data.clone().ok_or_else(|| source.missing("data", "data = \"/var/lib/troth\""))?;
        if data.as_os_str().is_empty() || source.is_folder(&data) {
            return Err(
                source.error("data", "is empty; name a folder of its own, as in data = \"/var/lib/troth\"")
            );
        }
        let quic = self.network.quic(self.listen.as_deref().unwrap_or(default_listen), source)?;
        let http = self.http.resolve(source)?;
        let slow = source.time("log.slow_ms", Duration::from_millis(self.log.slow_ms))?;
        let memory = self.memory.resolve(source)?;
        Ok(Basics { id, quic, advertise: self.advertise.clone(), data, http, slow, memory })
    }
}

impl Basics {
    /// What is left out has its default.
    pub fn new(id: u64, data: impl Into<PathBuf>) -> Basics {
        let slow = Duration::from_millis(LogSection::default().slow_ms);
        let quic = QuicConfig::default();
        let memory = Memory::default();
        Basics { id, quic, advertise: None, data: data.into(), http: None, slow, memory }
    }

    /// Makes sure that others can be told where this server is.
    ///
    /// # Errors
    /// If it listens everywhere and does not say where it is found.
    pub fn check_findable(&self, source: &Source) -> Result<(), ConfigError> {
        if self.quic.bind.ip().is_unspecified() && self.advertise.is_none() {
            let listen = self.quic.bind;
            let reason = format!("is needed when listen is {listen}, which others cannot call");
            return Err(source.error("advertise", reason));
        }
        Ok(())
    }
}

/// Reads the configuration file of a server. Relative paths in it are relative to its folder.
///
/// # Errors
/// Names the line and what would be right.
pub fn load_server<F: ServerFile>(path: &Path) -> Result<(F, Source), ConfigError> {
    let (mut file, source) = load::<F>(path)?;
    let common = file.common();
    if let Some(data) = common.data {
        *data = source.path(data);
    }
    common.tls.relative_to(&source);
    Ok((file, source))
}

/// Where the certificates lie.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsSection {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// This process's certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Lists of certificates that do not count any more.
    pub crl: Option<PathBuf>,
}

impl TlsSection {
    /// Takes relative paths as relative to the file they stand in.
    pub fn relative_to(&mut self, source: &Source) {
        for path in [&mut self.ca, &mut self.cert, &mut self.key] {
            if !path.as_os_str().is_empty() {
                *path = source.path(path);
            }
        }
        self.crl = self.crl.take().map(|path| source.path(&path));
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
    /// Names what is missing, or the file and what is wrong with it.
    pub fn load(&self, role: Role, source: &Source) -> Result<Credentials, ConfigError> {
        let files =
            [("ca", &self.ca, "ca"), ("cert", &self.cert, role.name()), ("key", &self.key, role.name())];
        for (key, path, name) in files {
            if path.as_os_str().is_empty() {
                let suffix = if key == "key" { "-key" } else { "" };
                let example = format!("{key} = \"/etc/troth/{name}{suffix}.pem\"; `troth cert` makes one");
                return Err(source.missing(&format!("tls.{key}"), &example));
            }
        }
        let files = CredentialFiles {
            ca: self.ca.clone(),
            cert: self.cert.clone(),
            key: self.key.clone(),
            crl: self.crl.clone(),
        };
        let credentials = files.load()?;
        let actual = credentials.identity().role;
        if actual != role {
            let reason = format!("is a {actual}'s certificate; make one with `troth cert --role {role}`");
            return Err(TlsError::Pem { path: self.cert.clone(), reason }.into());
        }
        Ok(credentials)
    }
}

/// What is shown over HTTP.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpSection {
    /// Where metrics and health are shown: `host:port`; port 0: the system chooses one. Left out: nowhere.
    pub listen: Option<String>,
    /// A file with the token that the console asks for; coordinators only. Left out: there is no console.
    pub console_token: Option<PathBuf>,
}

impl HttpSection {
    fn resolve(&self, source: &Source) -> Result<Option<HttpConfig>, ConfigError> {
        let Some(listen) = &self.listen else {
            return match &self.console_token {
                Some(_) => Err(source.missing("http.listen", "listen = \"127.0.0.1:9450\"")),
                None => Ok(None),
            };
        };
        let listen = resolve(listen).map_err(|reason| source.error("http.listen", reason))?;
        let token = |path: &PathBuf| {
            let path = source.path(path);
            let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            Token::new(text.trim()).map_err(|reason| format!("{}: {reason}", path.display()))
        };
        let console = self.console_token.as_ref().map(token).transpose();
        let console = console.map_err(|reason| source.error("http.console_token", reason))?;
        Ok(Some(HttpConfig { listen, console }))
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

/// How much memory the database may take.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemorySection {
    /// MiB of blocks that were read; 256 if left out.
    pub cache_mib: Option<usize>,
    /// MiB that were written and are in no table yet; 256 if left out.
    pub write_buffers_mib: Option<usize>,
}

/// The least and the most MiB for each.
const MEMORY_MIB: RangeInclusive<usize> = 4..=1 << 20;

impl MemorySection {
    fn resolve(&self, source: &Source) -> Result<Memory, ConfigError> {
        let bytes = |key: &str, mib: Option<usize>, default: usize| match mib {
            Some(mib) if !MEMORY_MIB.contains(&mib) => {
                let (least, most) = (MEMORY_MIB.start(), MEMORY_MIB.end());
                Err(source.error(key, format!("must be from {least} to {most}")))
            }
            Some(mib) => Ok(mib << 20),
            None => Ok(default),
        };
        let default = Memory::default();
        Ok(Memory {
            cache: bytes("memory.cache_mib", self.cache_mib, default.cache)?,
            write_buffers: bytes("memory.write_buffers_mib", self.write_buffers_mib, default.write_buffers)?,
        })
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
    /// A leader whose disk takes longer than this for one write steps down; milliseconds.
    pub stall_ms: Option<u64>,
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
        source.time("raft.election_ms", election)?;
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

    /// How long a write may take: what is set here, else this default.
    ///
    /// # Errors
    /// If that is too short to tell a stall from a busy disk.
    pub fn stall(&self, default: Duration, source: &Source) -> Result<Duration, ConfigError> {
        let stall = self.stall_ms.map_or(default, Duration::from_millis);
        if stall < Duration::from_millis(50) {
            return Err(source.error("raft.stall_ms", "must be at least 50"));
        }
        source.time("raft.stall_ms", stall)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_plain_and_long_enough_and_not_shown() {
        for wrong in ["", "short", "has spaces in it, and a comma", &"x".repeat(129)] {
            assert!(Token::new(wrong).is_err(), "{wrong:?}");
        }
        let token = Token::new("0123456789abcdef").expect("a token");
        assert!(token.is("0123456789abcdef") && !token.is("0123456789abcdeF") && !token.is(""));
        assert_eq!(format!("{token:?}"), "Token");
    }
}
