//! Lines that repeat are written a few times, and then counted: no fault may fill the disk with its description,
//! whichever library gives it.
//!
//! Each place in the code that says something has an allowance. What comes from Troth's own modules and says something
//! else than before costs a part of it; what says the same, or comes from a library, which puts numbers into its
//! words, is written once in a while. What is not written is counted, and said with the next line of that place.

use std::collections::HashMap;
use std::fmt::{self, Debug, Write as _};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// How many different lines a place of Troth may say at once, and how long one more takes to be allowed.
const LINES_AT_ONCE: f64 = 5.0;
const LINE_EVERY: Duration = Duration::from_secs(2);

/// The same for a library, whatever it says.
const FOREIGN_AT_ONCE: f64 = 1.0;
const FOREIGN_EVERY: Duration = Duration::from_secs(30);

/// For how long the same words of one place are not written again.
const SAME_FOR: Duration = Duration::from_secs(60);

/// Words of one place that are remembered.
const SAME_MAX: usize = 32;

/// Places that are remembered. There are not so many in the program that say something at these levels.
const PLACES_MAX: usize = 4096;

static UNWRITTEN: AtomicU64 = AtomicU64::new(0);

/// Lines that this process has counted and not written.
pub fn unwritten() -> u64 {
    UNWRITTEN.load(Ordering::Relaxed)
}

/// Writes events like another format, but not all of them.
pub(super) struct Sparing<F> {
    inner: F,
    json: bool,
    places: Mutex<HashMap<Identifier, Place>>,
}

/// A place in the code that says something.
struct Place {
    allowance: f64,
    looked_at: Instant,
    /// What it said lately, by hash, and when.
    said: Vec<(u64, Instant)>,
    /// Lines that were not written since the last one that was.
    unwritten: u64,
}

impl<F> Sparing<F> {
    pub(super) fn new(inner: F, json: bool) -> Sparing<F> {
        Sparing { inner, json, places: Mutex::default() }
    }

    /// Whether an event is written; and then how many of its place were not, since the last one that was.
    fn permit(&self, event: &Event<'_>, now: Instant) -> Option<u64> {
        let metadata = event.metadata();
        // Whoever asks for more than that wants to see it.
        if *metadata.level() > Level::INFO {
            return Some(0);
        }
        let ours = metadata.target().starts_with("troth");
        let words = ours.then(|| hash_of(event));
        let mut places = self.places.lock();
        if places.len() >= PLACES_MAX && !places.contains_key(&metadata.callsite()) {
            return Some(0);
        }
        let place = places.entry(metadata.callsite()).or_insert_with(|| Place::new(ours, now));
        let permitted = place.permit(ours, words, now);
        if permitted.is_none() {
            UNWRITTEN.fetch_add(1, Ordering::Relaxed);
        }
        permitted
    }
}

impl Place {
    fn new(ours: bool, now: Instant) -> Place {
        let allowance = if ours { LINES_AT_ONCE } else { FOREIGN_AT_ONCE };
        Place { allowance, looked_at: now, said: Vec::new(), unwritten: 0 }
    }

    fn permit(&mut self, ours: bool, words: Option<u64>, now: Instant) -> Option<u64> {
        let (most, every) = if ours { (LINES_AT_ONCE, LINE_EVERY) } else { (FOREIGN_AT_ONCE, FOREIGN_EVERY) };
        let passed = now.saturating_duration_since(self.looked_at);
        self.looked_at = now;
        self.allowance = (self.allowance + passed.as_secs_f64() / every.as_secs_f64()).min(most);
        self.said.retain(|(_, at)| now.saturating_duration_since(*at) < SAME_FOR);
        let said_before = words.is_some_and(|words| self.said.iter().any(|(said, _)| *said == words));
        if said_before || self.allowance < 1.0 {
            self.unwritten += 1;
            return None;
        }
        self.allowance -= 1.0;
        if let Some(words) = words {
            if self.said.len() == SAME_MAX {
                self.said.remove(0);
            }
            self.said.push((words, now));
        }
        Some(std::mem::take(&mut self.unwritten))
    }
}

/// What an event says, without when.
fn hash_of(event: &Event<'_>) -> u64 {
    struct Words(DefaultHasher, String);

    impl Visit for Words {
        fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
            self.1.clear();
            // Writing to memory does not fail.
            let _ = write!(self.1, "{value:?}");
            (field.name(), &self.1).hash(&mut self.0);
        }
    }

    let mut words = Words(DefaultHasher::new(), String::new());
    event.record(&mut words);
    words.0.finish()
}

impl<S, N, F> FormatEvent<S, N> for Sparing<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let Some(unwritten) = self.permit(event, Instant::now()) else { return Ok(()) };
        self.inner.format_event(context, writer.by_ref(), event)?;
        match (unwritten, self.json) {
            (0, _) => Ok(()),
            (count, true) => {
                writeln!(
                    writer,
                    "{{\"message\":\"before that, lines like it were not written\",\"count\":{count}}}"
                )
            }
            (count, false) => writeln!(writer, "    before that, {count} lines like it were not written"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use tracing_subscriber::fmt::format;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(say: impl FnOnce()) -> Vec<String> {
        let lines = Lines::default();
        let target = lines.clone();
        let format = Sparing::new(format().without_time(), false);
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(move || target.clone())
            .event_format(format);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), say);
        let text = String::from_utf8(lines.0.lock().clone()).expect("it is text");
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_same_words_are_written_once_and_different_ones_a_few_times() {
        let before = unwritten();
        let lines = written(|| {
            for _ in 0..1000 {
                tracing::warn!(target: "troth_somewhere", "the disk is full");
            }
            for number in 0..1000 {
                tracing::warn!(target: "troth_somewhere", number, "a shard waits");
            }
            for number in 0..1000 {
                tracing::warn!(target: "a_library", "heartbeat {number} failed");
            }
            for number in 0..3 {
                tracing::debug!(target: "a_library", number, "a detail");
            }
        });
        let count = |what: &str| lines.iter().filter(|line| line.contains(what)).count();
        assert_eq!((count("the disk is full"), count("a shard waits")), (1, 5), "{lines:?}");
        assert_eq!((count("heartbeat"), count("a detail")), (1, 3), "{lines:?}");
        assert!(unwritten() - before >= 999 + 995 + 999);
    }

    #[test]
    fn what_was_not_written_is_said_with_the_next_line() {
        let mut place = Place::new(true, Instant::now());
        let begin = place.looked_at;
        assert_eq!(place.permit(true, Some(1), begin), Some(0));
        for _ in 0..7 {
            assert_eq!(place.permit(true, Some(1), begin), None);
        }
        assert_eq!(place.permit(true, Some(2), begin), Some(7), "it says something else");
        assert_eq!(place.permit(true, Some(1), begin + SAME_FOR), Some(0), "it is long ago");
        let mut foreign = Place::new(false, begin);
        assert_eq!(foreign.permit(false, None, begin), Some(0));
        assert_eq!(foreign.permit(false, None, begin + FOREIGN_EVERY / 2), None);
        assert_eq!(foreign.permit(false, None, begin + FOREIGN_EVERY), Some(1));
    }
}
