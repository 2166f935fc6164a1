//! What an operator should know, beside the log: shown by `troth status` as long as the process lives.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use troth_protocol::clock::Clock;
use troth_protocol::message::admin::Notice;

/// Notices that are remembered.
const NOTICES_MAX: usize = 20;

/// How much of what others say is taken.
const NAME_CHARS_MAX: usize = 40;
const REASON_CHARS_MAX: usize = 600;

/// The latest notices of a server.
pub struct Notices {
    clock: Clock,
    latest: Mutex<VecDeque<Notice>>,
    refused: AtomicU64,
}

impl Notices {
    /// None yet.
    pub fn new(clock: &Clock) -> Notices {
        Notices { clock: clock.clone(), latest: Mutex::default(), refused: AtomicU64::new(0) }
    }

    /// Says something, in the log too. What was said last is not said again.
    pub fn warn(&self, what: String) {
        let mut latest = self.latest.lock();
        if latest.back().is_some_and(|notice| notice.what == what) {
            return;
        }
        tracing::warn!("{what}");
        if latest.len() == NOTICES_MAX {
            latest.pop_front();
        }
        latest.push_back(Notice { at_ms: self.clock.millis(), what });
    }

    /// A server says that it ends, since it was told that it must not take part.
    pub fn refused(&self, server: &str, reason: &str) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let short: String = reason.chars().take(REASON_CHARS_MAX).collect();
        self.warn(format!("{} has ended: {short}", server.chars().take(NAME_CHARS_MAX).collect::<String>()));
    }

    /// How many servers have said so.
    pub fn refused_count(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The latest ones, oldest first.
    pub fn latest(&self) -> Vec<Notice> {
        self.latest.lock().iter().cloned().collect()
    }
}
