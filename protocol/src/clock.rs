//! Both clocks, read in one place, so that a test can move them.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The clock that only goes forward. In a runtime whose time a test holds, it is that time.
pub fn monotonic() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The wall clock of this process, with an offset that tests may set.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    offset_millis: Arc<AtomicI64>,
}

impl Clock {
    /// The system's clock.
    pub fn system() -> Clock {
        Clock::default()
    }

    /// Milliseconds since the Unix epoch; 0 for a clock set before it.
    pub fn millis(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let offset = self.offset_millis.load(Ordering::Relaxed);
        (since.as_millis() as u64).saturating_add_signed(offset)
    }

    /// Moves this clock and all its clones by an offset from the system's clock.
    pub fn set_offset_millis(&self, offset: i64) {
        self.offset_millis.store(offset, Ordering::Relaxed);
    }
}
