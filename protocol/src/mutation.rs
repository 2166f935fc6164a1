//! Deliberate bugs, for the proof that the tests find bugs.
//!
//! They are compiled in with the feature `mutations` only, and at most one is on: the one that the
//! environment variable `TROTH_MUTATION` names when it is first asked, or that `switch` has chosen.
//! Without the feature, [`on`] is a constant, and nothing of them is left in a program.

/// A bug that somebody could have made. Each breaks one promise of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Bug {
    /// A new coordinator leader begins at its own clock, not above the ceiling that it finds.
    OracleForgetsCeiling,
    /// A coordinator hands out timestamps without proof that it still leads.
    TimestampsWithoutBarrier,
    /// A transaction is decided when all votes but one are there.
    CommitBeforeLastVote,
    /// Participants and client hear of a decision when it is proposed, not when it is committed.
    DecisionBeforeDurable,
    /// *Aborted* is presumed without a barrier and without a fence in the log.
    AbortWithoutBarrier,
    /// A commit that is sent again is run like one that is sent for the first time.
    ResubmissionRunsTwice,
    /// A shard that starts with prepared transactions does not take their locks.
    LocksNotRebuilt,
    /// The snapshot of a shard leaves out what is prepared.
    SnapshotForgetsPrepared,
    /// A decision is forgotten when the first participant has applied it.
    ForgetBeforeAll,
    /// A read does not wait for a prepared transaction that may have committed before it.
    ReadIgnoresLock,
    /// A prepare does not check the keys that were read.
    SkipReadValidation,
    /// A prepare does not check the ranges that were read.
    SkipRangeValidation,
    /// How far the log is applied is written apart from what was applied, and before it.
    AppliedIndexNotAtomic,
    /// A new coordinator leader draws a new timestamp for decisions that it finds.
    FinishTwice,
    /// Versions are given up while somebody still reads at their moment.
    CollectUnderSnapshot,
    /// A one-shard transaction may commit at a moment that has been read already.
    OnePhaseIgnoresReads,
    /// A shard answers reads without proof that this replica still leads.
    StaleShardLeaderReads,
    /// A new shard leader serves without a fresh timestamp.
    ShardLeaderWithoutFreshTime,
    /// A deposed coordinator presumes abort without a barrier, and shards obey its word. Either wall alone
    /// would hold.
    DeposedAborts,
    /// A coordinator with an empty folder founds a group with whoever it lists, whatever they have, and speaks to
    /// them without saying who it is; they listen, and participants obey whoever leads. Each wall alone would hold.
    FormsAGroupFromAnEmptyFolder,
    /// An older copy of a data folder is admitted like the folder itself.
    AcceptsAnOlderCopy,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 21] = [
        Bug::OracleForgetsCeiling,
        Bug::TimestampsWithoutBarrier,
        Bug::CommitBeforeLastVote,
        Bug::DecisionBeforeDurable,
        Bug::AbortWithoutBarrier,
        Bug::ResubmissionRunsTwice,
        Bug::LocksNotRebuilt,
        Bug::SnapshotForgetsPrepared,
        Bug::ForgetBeforeAll,
        Bug::ReadIgnoresLock,
        Bug::SkipReadValidation,
        Bug::SkipRangeValidation,
        Bug::AppliedIndexNotAtomic,
        Bug::FinishTwice,
        Bug::CollectUnderSnapshot,
        Bug::OnePhaseIgnoresReads,
        Bug::StaleShardLeaderReads,
        Bug::ShardLeaderWithoutFreshTime,
        Bug::DeposedAborts,
        Bug::FormsAGroupFromAnEmptyFolder,
        Bug::AcceptsAnOlderCopy,
    ];

    /// Its name, in the environment and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Bug::OracleForgetsCeiling => "oracle-forgets-ceiling",
            Bug::TimestampsWithoutBarrier => "timestamps-without-barrier",
            Bug::CommitBeforeLastVote => "commit-before-last-vote",
            Bug::DecisionBeforeDurable => "decision-before-durable",
            Bug::AbortWithoutBarrier => "abort-without-barrier",
            Bug::ResubmissionRunsTwice => "resubmission-runs-twice",
            Bug::LocksNotRebuilt => "locks-not-rebuilt",
            Bug::SnapshotForgetsPrepared => "snapshot-forgets-prepared",
            Bug::ForgetBeforeAll => "forget-before-all",
            Bug::ReadIgnoresLock => "read-ignores-lock",
            Bug::SkipReadValidation => "skip-read-validation",
            Bug::SkipRangeValidation => "skip-range-validation",
            Bug::AppliedIndexNotAtomic => "applied-index-not-atomic",
            Bug::FinishTwice => "finish-twice",
            Bug::CollectUnderSnapshot => "collect-under-snapshot",
            Bug::OnePhaseIgnoresReads => "one-phase-ignores-reads",
            Bug::StaleShardLeaderReads => "stale-shard-leader-reads",
            Bug::ShardLeaderWithoutFreshTime => "shard-leader-without-fresh-time",
            Bug::DeposedAborts => "deposed-aborts",
            Bug::FormsAGroupFromAnEmptyFolder => "forms-a-group-from-an-empty-folder",
            Bug::AcceptsAnOlderCopy => "accepts-an-older-copy",
        }
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Bug> {
        Bug::ALL.into_iter().find(|bug| bug.name() == name)
    }
}

/// Whether a bug is on.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub const fn on(_bug: Bug) -> bool {
    false
}

#[cfg(feature = "mutations")]
pub use self::switched::{ENVIRONMENT, on, switch};

#[cfg(feature = "mutations")]
mod switched {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Bug;

    /// The environment variable that names the bug of a process.
    pub const ENVIRONMENT: &str = "TROTH_MUTATION";

    const NONE: usize = usize::MAX;

    static CURRENT: LazyLock<AtomicUsize> = LazyLock::new(|| {
        let chosen = std::env::var(ENVIRONMENT).ok().filter(|name| !name.is_empty());
        let bug = chosen.map(|name| Bug::named(&name).expect("a mutation that there is"));
        AtomicUsize::new(number(bug))
    });

    fn number(bug: Option<Bug>) -> usize {
        bug.map_or(NONE, |bug| bug as usize)
    }

    /// Whether a bug is on.
    pub fn on(bug: Bug) -> bool {
        CURRENT.load(Ordering::Relaxed) == bug as usize
    }

    /// Switches one on, and all others off.
    pub fn switch(bug: Option<Bug>) {
        CURRENT.store(number(bug), Ordering::Relaxed);
    }
}
