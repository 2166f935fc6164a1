//! How far the coordinators were, as this node has heard.
//!
//! A coordinator whose folder was emptied, or replaced by an older copy, has forgotten decisions, and does not know it.
//! If it is the only one, or the others have forgotten too, nobody can tell it but participants. So a node remembers on
//! its disk which lineage of coordinators it belongs to, their last epoch, and an entry of their log that was committed.
//! An epoch is the index of the entry by which a leader began; so every leader that knows what was committed has a
//! greater one.

use std::io;

use parking_lot::Mutex;
use troth_protocol::message::coordinator::Heard;
use troth_protocol::mutation::{self, Bug};
use troth_protocol::wire::{decode, encode};
use troth_protocol::{Epoch, Incarnation, Reject};
use troth_replication::families::META;
use troth_replication::{LogWriter, Store};

use crate::records::{damaged, node_key};

/// A leader begins its term with a blank entry, and its epoch with the next one at the earliest.
const BLANK: u64 = 1;

/// What this node has heard.
pub struct Hearing {
    heard: Mutex<Option<Heard>>,
}

impl Hearing {
    /// Reads what is remembered.
    pub fn open(store: &Store) -> io::Result<Hearing> {
        let stored = store.get(META, &node_key("heard"))?.map(|record| decode(&record));
        let heard = stored.transpose().map_err(|error| damaged("memory of the coordinators", error))?;
        Ok(Hearing { heard: Mutex::new(heard) })
    }

    /// What it has heard; `None`: nothing yet.
    pub fn heard(&self) -> Option<Heard> {
        *self.heard.lock()
    }

    /// Makes sure that a leader with this epoch may be obeyed.
    pub fn obey(&self, epoch: Epoch) -> Result<(), Reject> {
        let mut heard = self.heard.lock();
        let Some(heard) = &mut *heard else { return Ok(()) };
        if !may_lead(heard, epoch) && !mutation::on(Bug::FormsAGroupFromAnEmptyFolder) {
            return Err(Reject::CoordinatorPassed { epoch, index: heard.index });
        }
        if epoch > heard.epoch {
            // Which start that is, it says when this node makes itself known.
            (heard.epoch, heard.leader) = (epoch, Incarnation(0));
        }
        Ok(())
    }

    /// Takes what a leader says of the coordinators, unless it knows less than was heard before; tells whether it did.
    pub async fn hear(&self, told: Heard, writer: &LogWriter) -> io::Result<bool> {
        let now = {
            let mut heard = self.heard.lock();
            let now = match *heard {
                None => told,
                Some(before) if !may_follow(&before, &told) => {
                    return Ok(mutation::on(Bug::FormsAGroupFromAnEmptyFolder));
                }
                Some(before) if before.epoch > told.epoch => before,
                Some(before) => Heard { index: before.index.max(told.index), ..told },
            };
            if *heard == Some(now) {
                return Ok(true);
            }
            *heard = Some(now);
            now
        };
        // An older one only tells less.
        writer.put_lazily(META, &node_key("heard"), encode(&now)).await?;
        Ok(true)
    }
}

/// Whether a leader with this epoch knows all that was heard. One that was deposed does not matter: it is told so.
fn may_lead(heard: &Heard, epoch: Epoch) -> bool {
    epoch <= heard.epoch || epoch.0 > heard.index + BLANK
}

/// Whether a leader that says this knows all that was heard before.
fn may_follow(before: &Heard, told: &Heard) -> bool {
    // One with the same epoch that is another start has gone on from an older copy.
    let forked =
        told.epoch == before.epoch && told.leader != before.leader && before.leader != Incarnation(0);
    told.lineage == before.lineage && may_lead(before, told.epoch) && !forked
}

#[cfg(test)]
mod tests {
    use troth_protocol::Lineage;
    use troth_protocol::process::Memory;

    use super::*;

    #[tokio::test]
    async fn coordinators_that_know_less_than_was_heard_are_not_obeyed() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), "a test", &[], Memory::default()).expect("it opens");
        let writer = LogWriter::start(&store);
        let hearing = Hearing::open(&store).expect("empty");
        assert_eq!((hearing.heard(), hearing.obey(Epoch(7))), (None, Ok(())));
        let told = |lineage, epoch, index| {
            let leader = Incarnation(epoch);
            Heard { lineage: Lineage(lineage), epoch: Epoch(epoch), leader, index }
        };
        let hear = async |hearing: &Hearing, told| hearing.hear(told, &writer).await.expect("written");
        assert!(hear(&hearing, told(1, 7, 100)).await);
        assert!(!hear(&hearing, told(2, 200, 300)).await, "another lineage");
        let forked = Heard { leader: Incarnation(1), ..told(1, 7, 110) };
        assert!(!hear(&hearing, forked).await, "another start with the same epoch");
        for (epoch, obeyed) in [(3, true), (7, true), (8, false), (100, false), (101, false), (102, true)] {
            let hearing = Hearing::open(&store).expect("readable");
            // What was written lazily is there when something later is durable.
            writer.put_durably(META, b"later", Vec::new()).await.expect("written");
            let hearing =
                if hearing.heard().is_some() { hearing } else { Hearing::open(&store).expect("readable") };
            assert_eq!(hearing.obey(Epoch(epoch)).is_ok(), obeyed, "{epoch}");
            assert_eq!(hear(&hearing, told(1, epoch, 90)).await, obeyed, "{epoch}");
            assert!(hearing.heard().is_some_and(|heard| heard.index == 100), "{epoch}");
        }
    }
}
