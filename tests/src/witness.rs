//! Transfers and audits that go on while something happens to a cluster, and what they say about it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::task::JoinHandle;
use troth_sdk::harness::bank::{Audit, Balances, Bank};
use troth_sdk::harness::load::Load;

use crate::drill::Drill;
use crate::{PATIENCE, eventually, in_time};

/// Accounts that money moves between.
const ACCOUNTS: u32 = 100;

/// Transfers and audits under way.
pub struct Witness {
    bank: Bank,
    before: Balances,
    /// The transfers.
    pub load: Load,
    stop: Arc<AtomicBool>,
    audited: Arc<AtomicUsize>,
    auditors: Vec<JoinHandle<()>>,
}

impl Witness {
    /// Opens accounts, and begins: some clients move money, and some count it again and again, each time
    /// all of it in one snapshot.
    pub async fn start(drill: &Drill, clients: usize) -> Witness {
        let bank = Bank::new(&drill.client, ACCOUNTS);
        let opened = in_time(bank.open()).await.expect("the accounts are opened");
        let before = in_time(bank.balances()).await.expect("readable");
        let (stop, audited) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let auditor = |_| tokio::spawn(audits(bank.clone(), opened, audited.clone(), stop.clone()));
        let auditors = (0..2).map(auditor).collect();
        let load = Load::start(&bank, clients, 20);
        Witness { bank, before, load, stop, audited, auditors }
    }

    /// Waits until transfers and audits that begin now were made.
    pub async fn until_it_goes_on(&self) {
        let (commits, audits) = (self.load.counts().committed, self.audited.load(Ordering::Relaxed));
        eventually("transfers and audits go on", async || {
            self.load.counts().committed >= commits + 20 && self.audited.load(Ordering::Relaxed) >= audits + 4
        })
        .await;
    }

    /// Ends them. No audit may have been wrong, no transfer may have failed, and every account holds
    /// exactly what was acknowledged. Returns how many audits and transfers there were.
    pub async fn testify(self, drill: &Drill) -> (usize, u64) {
        self.until_it_goes_on().await;
        self.stop.store(true, Ordering::Relaxed);
        for auditor in self.auditors {
            in_time(auditor).await.expect("no audit is wrong");
        }
        let ended = in_time(self.load.stop(PATIENCE)).await.expect("they end");
        let counts = &ended.counts;
        assert_eq!((counts.failed, counts.unknown), (0, 0), "{:?}", counts.error);
        let after = in_time(self.bank.balances_within(PATIENCE)).await.expect("readable");
        assert_eq!(after.audit(), self.before.audit(), "no money appears or vanishes");
        assert_eq!(ended.wrong_accounts(&self.before, &after), 0, "all that was acknowledged is there");
        drill.until_nothing_is_held().await;
        let audited = self.audited.load(Ordering::Relaxed);
        println!("{audited} audits, {counts:?}");
        (audited, counts.committed)
    }
}

async fn audits(bank: Bank, expected: Audit, audited: Arc<AtomicUsize>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let audit = in_time(bank.audit_within(PATIENCE)).await.expect("readable");
        assert_eq!(audit, expected, "an audit");
        audited.fetch_add(1, Ordering::Relaxed);
    }
}
