//! Logging to standard error, and sending spans: what a configuration file says about them, and their start.

use std::io::IsTerminal;

use serde::Deserialize;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry};

use super::config::{ConfigError, Source};
use super::sparing::Sparing;
use crate::net::Role;

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
    /// the `RUST_LOG` variable, which overrides this. The Raft library tells its every step at `info`:
    /// of it only warnings are logged, unless the filter names `openraft`.
    pub level: String,
    /// A transaction that takes longer than this is logged with all that happened to it; milliseconds.
    pub slow_ms: u64,
}

impl Default for LogSection {
    fn default() -> LogSection {
        LogSection { format: LogFormat::default(), level: "info".into(), slow_ms: 1000 }
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

    /// Starts logging to standard error, and sending spans if that is wanted.
    ///
    /// # Errors
    /// If the level is not one, or spans cannot be sent.
    pub fn start(
        &self,
        trace: &TraceSection,
        role: Role,
        id: Option<u64>,
        source: &Source,
    ) -> Result<Traces, ConfigError> {
        let level = std::env::var("RUST_LOG").unwrap_or_else(|_| self.level.clone());
        let filter = EnvFilter::try_new(format!("openraft=warn,{level}"));
        let filter = filter.map_err(|error| source.error("log.level", error))?;
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
        let lines = match self.format {
            LogFormat::Json => {
                let lines = lines.json().flatten_event(true);
                lines.map_event_format(|format| Sparing::new(format, true)).boxed()
            }
            LogFormat::Pretty => {
                let lines = lines.with_ansi(std::io::stderr().is_terminal());
                lines.map_event_format(|format| Sparing::new(format, false)).boxed()
            }
        };
        let (traces, layer) = trace.start(role, id.unwrap_or_default(), source)?;
        // A second start in one process, as tests do, keeps the first.
        let _ = tracing_subscriber::registry().with(layer).with(lines.with_filter(filter)).try_init();
        Ok(traces)
    }
}

/// Where spans of transactions are sent.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TraceSection {
    /// A collector that takes OTLP over HTTP, for example `http://127.0.0.1:4318`. Left out: nowhere.
    pub endpoint: Option<String>,
    /// The share of all transactions whose spans are sent, from 0 to 1: 0.01 if left out. To be the same
    /// at all servers.
    pub share: Option<f64>,
}

/// Sends spans. To be flushed before the process ends.
#[derive(Default)]
pub struct Traces {
    #[cfg(feature = "otlp")]
    provider: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

impl Traces {
    /// Sends what was not sent yet. Blocks for some seconds at most.
    pub fn flush(&self) {
        #[cfg(feature = "otlp")]
        if let Some(provider) = &self.provider
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

type SpanLayer = Box<dyn Layer<Registry> + Send + Sync>;

impl TraceSection {
    fn start(
        &self,
        role: Role,
        id: u64,
        source: &Source,
    ) -> Result<(Traces, Option<SpanLayer>), ConfigError> {
        let Some(endpoint) = &self.endpoint else { return Ok((Traces::default(), None)) };
        if !endpoint.starts_with("http://") {
            let reason = "must begin with http://; a collector on this machine can speak TLS to others";
            return Err(source.error("trace.endpoint", reason));
        }
        let share = self.share.unwrap_or(0.01);
        if !(0.0..=1.0).contains(&share) {
            return Err(source.error("trace.share", "must be from 0 to 1"));
        }
        start_traces(endpoint, share, role, id).map_err(|reason| source.error("trace.endpoint", reason))
    }
}

#[cfg(feature = "otlp")]
fn start_traces(
    endpoint: &str,
    share: f64,
    role: Role,
    id: u64,
) -> Result<(Traces, Option<SpanLayer>), String> {
    let (provider, tracer) = crate::trace::export::start(endpoint, share, format!("troth-{role}"), id)?;
    let ours = tracing_subscriber::filter::Targets::new().with_target("troth", tracing::Level::DEBUG);
    let layer = tracing_opentelemetry::layer().with_tracer(tracer).with_filter(ours).boxed();
    Ok((Traces { provider: Some(provider) }, Some(layer)))
}

#[cfg(not(feature = "otlp"))]
fn start_traces(_: &str, _: f64, _: Role, _: u64) -> Result<(Traces, Option<SpanLayer>), String> {
    Err("this program was built without the feature otlp; leave it out".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_sent_where_that_makes_sense() {
        let start = |endpoint: &str, share: f64| {
            let section = TraceSection { endpoint: Some(endpoint.into()), share: Some(share) };
            section
                .start(Role::Coordinator, 1, &Source::default())
                .map(drop)
                .map_err(|error| error.to_string())
        };
        let refused =
            "trace.endpoint: must begin with http://; a collector on this machine can speak TLS to others";
        assert_eq!(start("https://x", 0.5), Err(refused.into()));
        assert_eq!(start("http://127.0.0.1:1", 1.5), Err("trace.share: must be from 0 to 1".into()));
        let built_with = cfg!(feature = "otlp");
        assert_eq!(start("http://127.0.0.1:1", 0.5).is_ok(), built_with);
    }
}
