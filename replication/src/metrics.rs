//! What a server counts and measures, in the form of Prometheus.
//!
//! Every server has a registry of its own, also where several share a process. Counters and histograms
//! are kept where things happen; what is a state, like a length, is looked up when somebody asks
//! ([`Sampler`]).

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
pub use prometheus_client::registry::Registry;

/// The prefix of all names.
pub const PREFIX: &str = "troth";

/// A histogram of durations, in seconds: from 50 µs on, each bucket twice as wide as the one before, up
/// to 26 s.
pub fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 20))
}

/// A histogram of numbers: from 1 on, each bucket twice as wide as the one before, up to 8192.
pub fn sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 14))
}

/// Writes all of a registry in the text format of Prometheus.
pub fn render(registry: &Registry) -> String {
    let mut text = String::new();
    text::encode(&mut text, registry).expect("strings grow");
    text
}

/// Looks values up when somebody asks for the metrics.
pub struct Sampler<F>(F);

impl<F> Sampler<F>
where
    F: Fn(&mut Samples<'_>) -> fmt::Result + Send + Sync + 'static,
{
    /// Adds what a closure says to a registry.
    pub fn register(registry: &mut Registry, look: F) {
        registry.register_collector(Box::new(Sampler(look)));
    }
}

impl<F> fmt::Debug for Sampler<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sampler")
    }
}

impl<F> Collector for Sampler<F>
where
    F: Fn(&mut Samples<'_>) -> fmt::Result + Send + Sync + 'static,
{
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        (self.0)(&mut Samples(encoder))
    }
}

/// Where a [`Sampler`] says what it sees.
pub struct Samples<'a>(DescriptorEncoder<'a>);

impl Samples<'_> {
    /// A value that goes up and down.
    ///
    /// # Errors
    /// If nobody takes it.
    pub fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let metric = ConstGauge::new(value);
        metric.encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    /// The same for each value of a label.
    ///
    /// # Errors
    /// If nobody takes it.
    pub fn gauges(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (String, f64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (of, value) in values {
            ConstGauge::new(value).encode(family.encode_family(&[(label, of)])?)?;
        }
        Ok(())
    }

    /// A value that only goes up.
    ///
    /// # Errors
    /// If nobody takes it.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let metric = ConstCounter::new(value);
        metric.encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }
}

/// A registry that is complete, to be asked. Cheap to clone.
#[derive(Clone)]
pub struct Shown(Arc<Registry>);

impl Shown {
    /// Nothing is added any more.
    pub fn new(registry: Registry) -> Shown {
        Shown(Arc::new(registry))
    }

    /// All of it, as text.
    pub fn render(&self) -> String {
        render(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_looked_up_is_written_like_what_is_counted() {
        let mut registry = Registry::with_prefix(PREFIX);
        Sampler::register(&mut registry, |samples| {
            samples.gauge("length", "How long", 3.0)?;
            samples.counter("bytes", "How many", 7)?;
            samples.gauges("nodes", "By state", "state", [("active".to_owned(), 2.0)])
        });
        let text = Shown::new(registry).render();
        for line in [
            "# TYPE troth_length gauge",
            "troth_length 3.0",
            "troth_bytes_total 7",
            "troth_nodes{state=\"active\"} 2.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
