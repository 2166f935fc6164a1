//! What an operator sets for a coordinator: a TOML file, and flags that override it.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use troth_protocol::limits::{OUTCOME_RETENTION, TXN_AGE_MAX, VERSION_RETENTION};
use troth_protocol::process::{
    Basics, Common, ConfigError, HttpSection, LogSection, MemorySection, NetworkSection, RaftSection,
    ServerFile, Source, TlsSection, TraceSection,
};
use troth_protocol::{FoundingId, FoundingIdError};
use troth_replication::Timing;

use crate::leader::Limits;
use crate::steward::Rules;

/// The file, key by key. What is left out has the default of [`Config`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// This coordinator's number; unique among coordinators, and never changed.
    pub id: Option<u64>,
    /// Where to listen: `host:port`; port 0: the system chooses one.
    pub listen: Option<String>,
    /// Where others find this coordinator, if not where it listens: `host:port`.
    pub advertise: Option<String>,
    /// The data folder.
    pub data: Option<PathBuf>,
    /// The coordinators that found the cluster, this one among them; left out: it is the only one. Later it only
    /// says where to ask first.
    #[serde(default)]
    pub coordinator: Vec<PeerSection>,
    /// Some of the coordinators of the cluster that this one joins: `host:port` each.
    #[serde(default)]
    pub coordinators: Vec<String>,
    /// What a new cluster shall be like.
    #[serde(default)]
    pub cluster: ClusterSection,
    /// What bounds this coordinator while it leads.
    #[serde(default)]
    pub limits: LimitsSection,
    /// How shards follow the ring.
    #[serde(default)]
    pub placement: PlacementSection,
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
    /// How patient coordinators are with each other.
    #[serde(default)]
    pub raft: RaftSection,
}

/// One of the coordinators.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerSection {
    /// Its number.
    pub id: u64,
    /// Where it is found: `host:port`.
    pub address: String,
}

/// What a new cluster shall be like. An old one keeps what it was made with.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterSection {
    /// The number of shards: 1 to 1024; 16 if left out.
    pub shards: Option<u16>,
    /// How many replicas a shard has: 1, 3 or 5; 1 if left out.
    pub replicas: Option<u16>,
    /// Shards are placed when this many participants have registered; the number of replicas if
    /// left out.
    pub nodes: Option<u16>,
    /// The word by which the coordinators that are listed found the cluster together: 16 hexadecimal digits, the
    /// same for all of them. Left out: this one founds nothing, and is let in by those of a cluster.
    pub founding: Option<String>,
}

/// What bounds a leader.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsSection {
    /// Transactions in flight; more are refused as overload.
    pub in_flight: Option<usize>,
    /// When half of the commits take longer than this, fewer transactions may begin; milliseconds.
    pub commit_target_ms: Option<u64>,
    /// How old a transaction may grow; seconds.
    pub transaction_age_s: Option<u64>,
    /// How long outcomes stay answerable; seconds.
    pub outcomes_s: Option<u64>,
}

/// How shards follow the ring.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlacementSection {
    /// A participant that was not heard of for this long is replaced; seconds.
    pub replace_after_s: Option<u64>,
    /// How many shards move at once.
    pub moves_at_once: Option<usize>,
}

/// A coordinator's configuration, complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Number, address, folder.
    pub basics: Basics,
    /// The coordinators that found the cluster; empty: this one alone.
    pub coordinators: Vec<PeerSection>,
    /// Where some of the coordinators are.
    pub seeds: Vec<String>,
    /// The number of shards of a new cluster.
    pub shards: u16,
    /// How many replicas a shard of a new cluster has.
    pub replicas: u16,
    /// Shards of a new cluster are placed when this many participants have registered.
    pub nodes: u16,
    /// The word by which the coordinators that are listed found a cluster; `None`: they do not.
    pub founding: Option<FoundingId>,
    /// What bounds this coordinator while it leads.
    pub limits: Limits,
    /// How shards follow the ring.
    pub rules: Rules,
    /// How patient coordinators are with each other.
    pub timing: Timing,
    /// The log is cut after this many entries.
    pub log_entries_max: u64,
}

impl Config {
    /// A configuration with defaults for everything that has one.
    pub fn new(id: u64, data: impl Into<PathBuf>) -> Config {
        Config {
            basics: Basics::new(id, data),
            coordinators: Vec::new(),
            seeds: Vec::new(),
            shards: 16,
            replicas: 1,
            nodes: 1,
            founding: None,
            limits: Limits::default(),
            rules: Rules::default(),
            timing: Timing::default(),
            log_entries_max: 10_000,
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
        let basics = self.common().resolve("127.0.0.1:7450", source)?;
        if self.coordinator.is_empty() {
            basics.check_findable(source)?;
        }
        self.check_coordinators(basics.id, source)?;
        if let Some(wrong) = self.coordinators.iter().find(|address| !address.contains(':')) {
            return Err(source.error("coordinators", format!("{wrong:?} has no port; write host:port")));
        }
        let (shards, replicas, nodes) = self.resolve_cluster(source)?;
        let founding = self.cluster.founding.as_deref().map(str::parse).transpose();
        let founding = founding.map_err(|error: FoundingIdError| source.error("cluster.founding", error))?;
        let timing = Timing::default();
        let (heartbeat, election) = self.raft.timing(timing.heartbeat, timing.election, source)?;
        Ok(Config {
            basics,
            shards,
            replicas,
            nodes,
            founding,
            limits: self.resolve_limits(source)?,
            rules: self.resolve_placement(source)?,
            timing: Timing { heartbeat, election, stall: self.raft.stall(timing.stall, source)? },
            log_entries_max: self.raft.log_entries(source)?,
            coordinators: self.coordinator,
            seeds: self.coordinators,
        })
    }

    fn check_coordinators(&self, id: u64, source: &Source) -> Result<(), ConfigError> {
        let wrong = |reason: String| Err(source.error("coordinator", reason));
        for (at, peer) in self.coordinator.iter().enumerate() {
            if let Some(other) = self.coordinator[..at].iter().find(|other| other.address == peer.address) {
                let (one, two, address) = (other.id, peer.id, &peer.address);
                return wrong(format!(
                    "{one} and {two} are both at {address}; each needs an address of its own"
                ));
            }
        }
        let count = self.coordinator.len();
        if ![0, 1, 3, 5].contains(&count) {
            return wrong(format!("{count} are listed; a group has 1, 3 or 5"));
        }
        if count > 0 && !self.coordinator.iter().any(|peer| peer.id == id) {
            return wrong(format!("id {id}, which this one is, is not among those listed"));
        }
        let ids: std::collections::BTreeSet<u64> = self.coordinator.iter().map(|peer| peer.id).collect();
        if ids.len() != count {
            return wrong("two of those listed have the same id".into());
        }
        if let Some(peer) = self.coordinator.iter().find(|peer| !peer.address.contains(':')) {
            return wrong(format!("{:?} has no port; write host:port", peer.address));
        }
        Ok(())
    }

    fn resolve_cluster(&self, source: &Source) -> Result<(u16, u16, u16), ConfigError> {
        let shards = self.cluster.shards.unwrap_or(16);
        if !(1..=1024).contains(&shards) {
            return Err(source.error("cluster.shards", "must be from 1 to 1024"));
        }
        let replicas = self.cluster.replicas.unwrap_or(1);
        if ![1, 3, 5].contains(&replicas) {
            return Err(source.error("cluster.replicas", "must be 1, 3 or 5"));
        }
        let nodes = self.cluster.nodes.unwrap_or(replicas);
        if nodes < replicas {
            let reason = format!("must be at least replicas, which is {replicas}");
            return Err(source.error("cluster.nodes", reason));
        }
        Ok((shards, replicas, nodes))
    }

    fn resolve_placement(&self, source: &Source) -> Result<Rules, ConfigError> {
        let mut rules = Rules::default();
        if let Some(seconds) = self.placement.replace_after_s {
            if seconds < 5 {
                let reason = "must be 5 or more: as long as an election and some bad luck";
                return Err(source.error("placement.replace_after_s", reason));
            }
            rules.replace_after = source.time("placement.replace_after_s", Duration::from_secs(seconds))?;
        }
        if let Some(moves) = self.placement.moves_at_once {
            if !(1..=64).contains(&moves) {
                return Err(source.error("placement.moves_at_once", "must be from 1 to 64"));
            }
            rules.moves_at_once = moves;
        }
        Ok(rules)
    }

    fn resolve_limits(&self, source: &Source) -> Result<Limits, ConfigError> {
        let mut limits = Limits::default();
        if let Some(in_flight) = self.limits.in_flight {
            if in_flight == 0 {
                return Err(source.error("limits.in_flight", "must be 1 or more"));
            }
            limits.in_flight_max = in_flight;
        }
        if let Some(millis) = self.limits.commit_target_ms {
            if millis == 0 {
                return Err(source.error("limits.commit_target_ms", "must be 1 or more"));
            }
            limits.commit_target = source.time("limits.commit_target_ms", Duration::from_millis(millis))?;
        }
        limits.age_max = self.limits.transaction_age_s.map_or(TXN_AGE_MAX, Duration::from_secs);
        if limits.age_max.is_zero() || limits.age_max >= VERSION_RETENTION {
            let reason = format!("must be from 1 to {}", VERSION_RETENTION.as_secs() - 1);
            return Err(source.error("limits.transaction_age_s", reason));
        }
        limits.outcome_retention = self.limits.outcomes_s.map_or(OUTCOME_RETENTION, Duration::from_secs);
        if limits.outcome_retention < VERSION_RETENTION {
            let reason = format!("must be at least {}", VERSION_RETENTION.as_secs());
            return Err(source.error("limits.outcomes_s", reason));
        }
        source.time("limits.outcomes_s", limits.outcome_retention)?;
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use troth_protocol::process::load_server;

    use super::*;

    fn check(text: &str, expected: &str) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("c.toml");
        std::fs::write(&path, text).expect("writable");
        let error = load_server::<File>(&path)
            .and_then(|(file, source)| file.resolve(&source))
            .expect_err(text)
            .to_string();
        assert_eq!(error.replace(path.to_str().expect("a plain path"), "c.toml"), expected);
    }

    #[test]
    fn wrong_configurations_are_refused_with_line_and_fix() {
        let with = |line: &str| format!("id = 1\ndata = \"/tmp/x\"\n{line}\n");
        check("id = 1\n", "data: is missing; for example: data = \"/var/lib/troth\"");
        check(&with("[cluster]\nreplicas = 2"), "c.toml:4: cluster.replicas: must be 1, 3 or 5");
        check(
            &with("[cluster]\nreplicas = 3\nnodes = 2"),
            "c.toml:5: cluster.nodes: must be at least replicas, which is 3",
        );
        check(
            &with("[[coordinator]]\nid = 2\naddress = \"a:1\""),
            "coordinator: id 1, which this one is, is not among those listed",
        );
        check(
            "id = 1\ndata = \"\"\n",
            "c.toml:2: data: is empty; name a folder of its own, as in data = \"/var/lib/troth\"",
        );
        check(&with("listen = \"\""), "c.toml:3: listen: is empty; write host:port, or leave it out");
        check(
            &with("[[coordinator]]\nid = 1\naddress = \"a:1\"\n[[coordinator]]\nid = 2\naddress = \"a:1\""),
            "coordinator: 1 and 2 are both at a:1; each needs an address of its own",
        );
        check(
            &with("[cluster]\nfounding = \"now\""),
            "c.toml:4: cluster.founding: \"now\" is no founding word: 16 hexadecimal digits; `troth init` draws one",
        );
        check(
            &with("[limits]\ntransaction_age_s = 600"),
            "c.toml:4: limits.transaction_age_s: must be from 1 to 599",
        );
        check(
            &with("[limits]\noutcomes_s = 18446744073709551615"),
            "c.toml:4: limits.outcomes_s: 18446744073709551615 s is too long; ten years are the most",
        );
        check(
            &with("[http]\nconsole_token = \"t\""),
            "http.listen: is missing; for example: listen = \"127.0.0.1:9450\"",
        );
        check(
            &with("[http]\nlisten = \"127.0.0.1:0\"\nconsole_token = \"/dev/null\""),
            "c.toml:5: http.console_token: /dev/null: a token has 16 to 128 letters, digits, '-' or '_'",
        );
        check(
            &with("[network]\nidle_timeout_ms = 10"),
            "c.toml:4: network.idle_timeout_ms: 10 ms must be at least twice keep_alive_ms, which is 1000",
        );
    }

    #[test]
    fn a_short_configuration_is_enough() {
        let file: File = toml::from_str("id = 1\ndata = \"/tmp/x\"").expect("well-formed");
        let config = file.resolve(&Source::default()).expect("complete");
        assert_eq!((config.shards, config.replicas, config.nodes), (16, 1, 1));
    }
}
