//! What an operator sets for a participant: a TOML file, and flags that override it.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use troth_protocol::limits::{OUTCOME_RETENTION, TXN_AGE_MAX, VERSION_RETENTION};
use troth_protocol::process::{
    Basics, Common, ConfigError, HttpSection, LogSection, MemorySection, NetworkSection, RaftSection,
    ServerFile, Source, TlsSection, TraceSection,
};
use troth_protocol::ring::WEIGHT_MAX;
use troth_replication::Timing;

/// How often old versions and outcomes are looked for.
const RETIRE_INTERVAL: Duration = Duration::from_secs(10);

/// How fast shards move away if nobody says otherwise.
const MOVE_BYTES_PER_SECOND: u64 = 32 << 20;

/// The file, key by key. What is left out has the default of [`Config`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// This node's number; unique among participants, and never changed.
    pub id: Option<u64>,
    /// Where to listen: `host:port`; port 0: the system chooses one.
    pub listen: Option<String>,
    /// Where others find this node, if not where it listens: `host:port`.
    pub advertise: Option<String>,
    /// The data folder.
    pub data: Option<PathBuf>,
    /// What fails together with this node: a rack, a building.
    pub zone: Option<String>,
    /// This node's share of the shards, relative to others: 1 to 100.
    pub weight: Option<u32>,
    /// Some of the coordinators: `host:port` each.
    pub coordinators: Option<Vec<String>>,
    /// Certificates.
    #[serde(default)]
    pub tls: TlsSection,
    /// What to log, and how.
    #[serde(default)]
    pub log: LogSection,
    /// Where spans of transactions are sent.
    #[serde(default)]
    pub trace: TraceSection,
    /// How to talk to others.
    #[serde(default)]
    pub network: NetworkSection,
    /// What is shown over HTTP.
    #[serde(default)]
    pub http: HttpSection,
    /// How much memory the database may take.
    #[serde(default)]
    pub memory: MemorySection,
    /// How long things are kept.
    #[serde(default)]
    pub retention: RetentionSection,
    /// How patient the replicas of a shard are with each other.
    #[serde(default)]
    pub raft: RaftSection,
    /// How fast shards may move away.
    #[serde(default)]
    pub moves: MovesSection,
}

/// How fast shards may move away.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MovesSection {
    /// Bytes of shards that leave this node in a second, all together.
    pub bytes_per_second: Option<u64>,
}

/// How long things are kept.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionSection {
    /// A version that was overwritten stays readable this long; seconds. Must exceed the age that
    /// transactions may reach.
    pub versions_s: Option<u64>,
    /// Outcomes stay answerable this long; seconds.
    pub outcomes_s: Option<u64>,
}

/// A participant's configuration, complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Number, address, folder.
    pub basics: Basics,
    /// What fails together with this node.
    pub zone: String,
    /// This node's share of the shards.
    pub weight: u32,
    /// Some of the coordinators.
    pub coordinators: Vec<String>,
    /// How long overwritten versions stay readable.
    pub version_retention: Duration,
    /// How long outcomes stay answerable.
    pub outcome_retention: Duration,
    /// How often old versions and outcomes are looked for.
    pub retire_interval: Duration,
    /// How patient replicas are with each other.
    pub timing: Timing,
    /// A log is cut after this many entries.
    pub log_entries_max: u64,
    /// Bytes of shards that leave this node in a second, all together.
    pub move_bytes_per_second: u64,
}

impl Config {
    /// A configuration with defaults for everything that has one.
    pub fn new(id: u64, data: impl Into<PathBuf>, coordinators: Vec<String>) -> Config {
        Config {
            basics: Basics::new(id, data),
            zone: String::new(),
            weight: 1,
            coordinators,
            version_retention: VERSION_RETENTION,
            outcome_retention: OUTCOME_RETENTION,
            retire_interval: RETIRE_INTERVAL,
            timing: Timing::default(),
            log_entries_max: 10_000,
            move_bytes_per_second: MOVE_BYTES_PER_SECOND,
        }
    }
}

impl ServerFile for File {
    fn common(&mut self) -> Common<'_> {
        let File { id, listen, advertise, data, tls, log, trace, network, http, memory, .. } = self;
        Common { id, listen, advertise, data, tls, log, trace, network, http, memory }
    }
}

impl File {
    /// Checks everything, and fills in defaults.
    ///
    /// # Errors
    /// Names the key, its line, and what would be right.
    pub fn resolve(mut self, source: &Source) -> Result<Config, ConfigError> {
        if self.http.console_token.is_some() {
            return Err(source.error("http.console_token", "only coordinators have a console; leave it out"));
        }
        let basics = self.common().resolve("127.0.0.1:7460", source)?;
        basics.check_findable(source)?;
        let coordinators = self.coordinators.unwrap_or_default();
        if coordinators.is_empty() {
            return Err(source.missing("coordinators", "coordinators = [\"127.0.0.1:7450\"]"));
        }
        if let Some(wrong) = coordinators.iter().find(|address| !address.contains(':')) {
            return Err(source.error("coordinators", format!("{wrong:?} has no port; write host:port")));
        }
        let weight = self.weight.unwrap_or(1);
        if weight == 0 || weight > WEIGHT_MAX {
            return Err(source.error("weight", format!("must be from 1 to {WEIGHT_MAX}")));
        }
        let timing = Timing::default();
        let (heartbeat, election) = self.raft.timing(timing.heartbeat, timing.election, source)?;
        let timing = Timing { heartbeat, election, stall: self.raft.stall(timing.stall, source)? };
        let log_entries_max = self.raft.log_entries(source)?;
        let move_bytes_per_second = self.moves.bytes_per_second.unwrap_or(MOVE_BYTES_PER_SECOND);
        if move_bytes_per_second < 64 << 10 {
            return Err(source.error("moves.bytes_per_second", "must be at least 65536"));
        }
        let seconds = |value: Option<u64>, default| value.map_or(default, Duration::from_secs);
        let version_retention = seconds(self.retention.versions_s, VERSION_RETENTION);
        let outcome_retention = seconds(self.retention.outcomes_s, OUTCOME_RETENTION);
        if version_retention <= TXN_AGE_MAX {
            let reason =
                format!("must exceed {}, the age that a transaction may reach", TXN_AGE_MAX.as_secs());
            return Err(source.error("retention.versions_s", reason));
        }
        if outcome_retention < version_retention {
            let reason = format!("must be at least versions_s, which is {}", version_retention.as_secs());
            return Err(source.error("retention.outcomes_s", reason));
        }
        source.time("retention.outcomes_s", outcome_retention)?;
        Ok(Config {
            basics,
            coordinators,
            zone: self.zone.unwrap_or_default(),
            weight,
            version_retention,
            outcome_retention,
            timing,
            log_entries_max,
            move_bytes_per_second,
            retire_interval: RETIRE_INTERVAL,
        })
    }
}

#[cfg(test)]
mod tests {
    use troth_protocol::process::Memory;
    use troth_protocol::process::load_server;

    use super::*;

    fn check(text: &str, expected: &str) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.toml");
        std::fs::write(&path, text).expect("writable");
        let error = load_server::<File>(&path)
            .and_then(|(file, source)| file.resolve(&source))
            .expect_err(text)
            .to_string();
        let error = error.replace(path.to_str().expect("a plain path"), "node.toml");
        assert_eq!(error, expected);
    }

    const GOOD: &str = "id = 1\ndata = \"/tmp/x\"\ncoordinators = [\"127.0.0.1:1\"]\n";

    #[test]
    fn wrong_configurations_are_refused_with_line_and_fix() {
        let with = |line: &str| format!("{GOOD}{line}\n");
        check("data = \"x\"\n", "id: is missing; for example: id = 1");
        check(&with("weight = 0"), "node.toml:4: weight: must be from 1 to 100");
        check(
            &with("wait = 0"),
            "node.toml:4: unknown field `wait`, expected one of `id`, `listen`, `advertise`, `data`, `zone`, `weight`, `coordinators`, `tls`, `log`, `trace`, `network`, `http`, `memory`, `retention`, `raft`, `moves`",
        );
        check(&with("weight = \"much\""), "node.toml:4: invalid type: string \"much\", expected u32");
        check(
            &with("[raft]\nheartbeat_ms = 100\nelection_ms = 200"),
            "node.toml:6: raft.election_ms: 200 ms must be at least three times heartbeat_ms, which is 100",
        );
        check(
            &with("[retention]\nversions_s = 60"),
            "node.toml:5: retention.versions_s: must exceed 300, the age that a transaction may reach",
        );
        check(
            &with("[retention]\noutcomes_s = 400000000"),
            "node.toml:5: retention.outcomes_s: 400000000 s is too long; ten years are the most",
        );
        check(
            &with("[raft]\nelection_ms = 400000000000"),
            "node.toml:5: raft.election_ms: 400000000 s is too long; ten years are the most",
        );
        for mib in ["3", "1048577", "9223372036854775807"] {
            check(
                &with(&format!("[memory]\nwrite_buffers_mib = {mib}")),
                "node.toml:5: memory.write_buffers_mib: must be from 4 to 1048576",
            );
        }
        check(&with("[memory]\ncache_mib = 0"), "node.toml:5: memory.cache_mib: must be from 4 to 1048576");
        check(
            &with("listen = \"0.0.0.0:1\""),
            "advertise: is needed when listen is 0.0.0.0:1, which others cannot call",
        );
        check(
            &with("[http]\nlisten = \"127.0.0.1:0\"\nconsole_token = \"/dev/null\""),
            "node.toml:6: http.console_token: only coordinators have a console; leave it out",
        );
        check("id = \n", "node.toml:1: string values must be quoted, expected literal string");
    }

    #[test]
    fn a_short_configuration_is_enough() {
        let file: File = toml::from_str(GOOD).expect("well-formed");
        let config = file.resolve(&Source::default()).expect("complete");
        assert_eq!((config.basics.id, config.weight), (1, 1));
        assert_eq!(config.basics.quic.bind.port(), 7460);
        assert_eq!(config.basics.memory, Memory::default());
    }

    #[test]
    fn memory_is_set_in_mebibytes() {
        let text = format!("{GOOD}[memory]\ncache_mib = 16\n");
        let file: File = toml::from_str(&text).expect("well-formed");
        let config = file.resolve(&Source::default()).expect("complete");
        assert_eq!(config.basics.memory, Memory { cache: 16 << 20, ..Memory::default() });
    }
}
