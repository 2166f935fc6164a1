//! Faults that can be switched on and off at any time, and how often they have struck.

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Which reads fail.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum FailReads {
    /// None.
    Never,
    /// The next ones.
    Next(u64),
    /// Each with this probability, between 0 and 1.
    Fraction(f64),
}

/// How often each fault has struck since the disk was mounted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Struck {
    /// Writes and new names that failed because the disk was full.
    pub full: u64,
    /// Syncs that took longer.
    pub slow_syncs: u64,
    /// Syncs that failed.
    pub failed_syncs: u64,
    /// Reads that took longer.
    pub slow_reads: u64,
    /// Reads that failed.
    pub failed_reads: u64,
    /// Bits that were flipped.
    pub flipped_bits: u64,
}

impl AddAssign for Struck {
    fn add_assign(&mut self, other: Struck) {
        self.full += other.full;
        self.slow_syncs += other.slow_syncs;
        self.failed_syncs += other.failed_syncs;
        self.slow_reads += other.slow_reads;
        self.failed_reads += other.failed_reads;
        self.flipped_bits += other.flipped_bits;
    }
}

/// The faults of a disk.
pub struct Faults {
    inner: Mutex<Inner>,
}

struct Inner {
    full: bool,
    sync_delay: Option<Duration>,
    read_delay: Option<Duration>,
    syncs_to_fail: u64,
    /// By how the name of the file ends.
    reads_to_fail: BTreeMap<String, FailReads>,
    chance: StdRng,
    struck: Struck,
}

impl Faults {
    /// None yet.
    pub fn new(seed: u64) -> Faults {
        let inner = Inner {
            full: false,
            sync_delay: None,
            read_delay: None,
            syncs_to_fail: 0,
            reads_to_fail: BTreeMap::new(),
            chance: StdRng::seed_from_u64(seed),
            struck: Struck::default(),
        };
        Faults { inner: Mutex::new(inner) }
    }

    /// How often they have struck.
    pub fn struck(&self) -> Struck {
        self.inner.lock().struck
    }

    /// The disk is full from now on, or is not.
    pub fn set_full(&self, full: bool) {
        self.inner.lock().full = full;
    }

    /// Syncs take so much longer.
    pub fn set_sync_delay(&self, delay: Option<Duration>) {
        self.inner.lock().sync_delay = delay;
    }

    /// Reads take so much longer.
    pub fn set_read_delay(&self, delay: Option<Duration>) {
        self.inner.lock().read_delay = delay;
    }

    /// So many syncs fail, from now on.
    pub fn fail_syncs(&self, count: u64) {
        self.inner.lock().syncs_to_fail = count;
    }

    /// Reads of files whose names end like this fail.
    pub fn fail_reads(&self, suffix: &str, which: FailReads) {
        let mut inner = self.inner.lock();
        match which {
            FailReads::Never => inner.reads_to_fail.remove(suffix),
            FailReads::Next(_) | FailReads::Fraction(_) => {
                inner.reads_to_fail.insert(suffix.to_owned(), which)
            }
        };
    }

    /// A bit has been flipped.
    pub fn flipped(&self) {
        self.inner.lock().struck.flipped_bits += 1;
    }

    /// Whether there is no more space; asked by who needs some.
    pub fn strike_full(&self) -> bool {
        let mut inner = self.inner.lock();
        inner.struck.full += u64::from(inner.full);
        inner.full
    }

    /// Whether there is no more space; asked by who only wants to know.
    pub fn is_full(&self) -> bool {
        self.inner.lock().full
    }

    /// How much longer this sync takes.
    pub fn strike_sync_delay(&self) -> Option<Duration> {
        let mut inner = self.inner.lock();
        inner.struck.slow_syncs += u64::from(inner.sync_delay.is_some());
        inner.sync_delay
    }

    /// How much longer this read takes.
    pub fn strike_read_delay(&self) -> Option<Duration> {
        let mut inner = self.inner.lock();
        inner.struck.slow_reads += u64::from(inner.read_delay.is_some());
        inner.read_delay
    }

    /// Whether this sync fails.
    pub fn strike_sync(&self) -> bool {
        let mut inner = self.inner.lock();
        let fails = inner.syncs_to_fail > 0;
        inner.syncs_to_fail -= u64::from(fails);
        inner.struck.failed_syncs += u64::from(fails);
        fails
    }

    /// Whether this read fails; `is_called` says whether the name of the file ends so.
    pub fn strike_read(&self, is_called: impl Fn(&str) -> bool) -> bool {
        let inner = &mut *self.inner.lock();
        let Some((_, which)) = inner.reads_to_fail.iter_mut().find(|(suffix, _)| is_called(suffix)) else {
            return false;
        };
        let fails = match which {
            FailReads::Never | FailReads::Next(0) => false,
            FailReads::Next(left) => {
                *left -= 1;
                true
            }
            FailReads::Fraction(share) => inner.chance.random_bool(share.clamp(0.0, 1.0)),
        };
        inner.struck.failed_reads += u64::from(fails);
        fails
    }
}
