//! Hybrid timestamps: wall-clock milliseconds and a counter in one `u64`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A moment in the order of transactions: `[ms since the Unix epoch: 46 bits | counter: 18 bits]`.
///
/// Only the coordinator leader's oracle and, for one-shard transactions, the shard's leader make
/// timestamps. Comparing two of them compares their place in the serial order.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Bits of the counter.
    pub const COUNTER_BITS: u32 = 18;
    /// Before every transaction; "never written" where a version is meant.
    pub const ZERO: Timestamp = Timestamp(0);
    /// After every transaction.
    pub const MAX: Timestamp = Timestamp(u64::MAX);

    /// The first timestamp of a millisecond. Milliseconds past 46 bits (the year 4199) saturate.
    pub fn from_millis(millis: u64) -> Timestamp {
        Timestamp(millis.min((1 << 46) - 1) << Self::COUNTER_BITS)
    }

    /// Milliseconds since the Unix epoch.
    pub fn millis(self) -> u64 {
        self.0 >> Self::COUNTER_BITS
    }

    /// The counter within the millisecond.
    pub fn counter(self) -> u64 {
        self.0 & ((1 << Self::COUNTER_BITS) - 1)
    }

    /// The next larger timestamp.
    ///
    /// # Panics
    /// At the end of time, which no oracle reaches: reads from the future are refused.
    pub fn next(self) -> Timestamp {
        Timestamp(self.0.checked_add(1).expect("timestamps do not reach u64::MAX"))
    }

    /// The timestamp `count` steps later.
    pub fn advance(self, count: u64) -> Timestamp {
        Timestamp(self.0.checked_add(count).expect("timestamps do not reach u64::MAX"))
    }

    /// This moment moved back by a duration, at [`Timestamp::ZERO`] at the earliest.
    pub fn minus(self, by: Duration) -> Timestamp {
        Timestamp::from_millis(self.millis().saturating_sub(by.as_millis() as u64))
    }

    /// This moment moved forward by a duration.
    pub fn plus(self, by: Duration) -> Timestamp {
        Timestamp::from_millis(self.millis().saturating_add(by.as_millis() as u64))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}", self.0)
    }
}

impl FromStr for Timestamp {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Timestamp, Self::Err> {
        text.parse().map(Timestamp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back() {
        let ts = Timestamp::from_millis(1_763_740_800_000).advance(17);
        assert_eq!(ts.millis(), 1_763_740_800_000);
        assert_eq!(ts.counter(), 17);
        assert_eq!(ts.to_string().parse(), Ok(ts));
    }

    #[test]
    fn counter_overflows_into_the_next_millisecond() {
        let ts = Timestamp::from_millis(5).advance((1 << 18) - 1);
        assert_eq!((ts.millis(), ts.counter()), (5, (1 << 18) - 1));
        assert_eq!((ts.next().millis(), ts.next().counter()), (6, 0));
    }

    #[test]
    fn durations_move_by_milliseconds_and_saturate() {
        let ts = Timestamp::from_millis(1_000);
        assert_eq!(ts.minus(Duration::from_secs(2)), Timestamp::ZERO);
        assert_eq!(ts.minus(Duration::from_millis(1)), Timestamp::from_millis(999));
        assert_eq!(ts.plus(Duration::from_millis(1)), Timestamp::from_millis(1_001));
        assert_eq!(Timestamp::from_millis(u64::MAX).millis(), (1 << 46) - 1);
    }
}
