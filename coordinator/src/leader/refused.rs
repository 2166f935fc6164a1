//! What this leader must not start.

use std::collections::BTreeSet;

use troth_protocol::{Timestamp, TxnId};

/// Transactions that this leader remembers not to start; the oldest make way.
const REFUSED_MAX: usize = 1 << 20;

/// Transactions that this leader must not start.
#[derive(Clone, Default, Debug)]
pub(super) struct Refused {
    txns: BTreeSet<TxnId>,
    /// All that began before this are refused.
    before: Timestamp,
}

impl Refused {
    pub(super) fn insert(&mut self, txn: TxnId) {
        self.txns.insert(txn);
        if self.txns.len() > REFUSED_MAX
            && let Some(oldest) = self.txns.pop_first()
        {
            self.before = oldest.start.next();
        }
    }

    pub(super) fn contains(&self, txn: TxnId) -> bool {
        txn.start < self.before || self.txns.contains(&txn)
    }

    /// Those that are too old to be started anyway need not be remembered.
    pub(super) fn prune(&mut self, too_old: Timestamp) {
        while self.txns.first().is_some_and(|txn| txn.start < too_old) {
            self.txns.pop_first();
        }
    }
}
