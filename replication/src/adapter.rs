//! Between the Raft library and a [`Machine`].

use std::io;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::watch;
use troth_protocol::mutation::{self, Bug};

use crate::machine::{Batch, Machine};
use crate::rocks::Store;
use crate::snapshot::incoming::Site;
use crate::snapshot::{self, Mark, Transfer, outgoing};
use crate::types::{self, LogId, Reply, StoredMembership, Types};

/// Entries that one batch applies at most.
const BATCH_ENTRIES_MAX: usize = 256;

pub(crate) struct Adapter<M> {
    group: u32,
    store: Store,
    site: Arc<Site>,
    machine: M,
    applied: Option<LogId>,
    membership: StoredMembership,
    /// Dropped with this: nothing is applied or installed any more.
    _running: watch::Sender<()>,
}

impl<M: Machine> Adapter<M> {
    /// Takes over a machine whose state is in the store. `running` is dropped when it has ended.
    pub(crate) fn new(
        group: u32,
        store: &Store,
        site: &Arc<Site>,
        mut machine: M,
        running: watch::Sender<()>,
    ) -> io::Result<Adapter<M>> {
        let Mark { applied, membership } = snapshot::read_mark(store, group)?;
        // Without a mark there is no state, though there may be a part of one.
        if applied.is_some() {
            machine.reload()?;
        }
        Ok(Adapter {
            group,
            store: store.clone(),
            site: site.clone(),
            machine,
            applied: applied.map(types::log_id),
            membership: types::stored_membership(membership),
            _running: running,
        })
    }

    fn mark(&self) -> Mark {
        Mark {
            applied: self.applied.as_ref().map(types::log_id_to_wire),
            membership: types::stored_membership_to_wire(&self.membership),
        }
    }

    fn apply_batch(&mut self, entries: Vec<EntryResponder<Types>>) -> io::Result<()> {
        if self.applied.is_none() {
            self.site.begin_applying()?;
        }
        for (entry, _) in &entries {
            self.applied = Some(entry.log_id);
            if let EntryPayload::Membership(membership) = &entry.payload {
                self.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
            }
        }
        let commands: Vec<(u64, &[u8])> = entries
            .iter()
            .filter_map(|(entry, _)| match &entry.payload {
                EntryPayload::Normal(command) => Some((entry.log_id.index, &command.0[..])),
                EntryPayload::Blank | EntryPayload::Membership(_) => None,
            })
            .collect();
        let mut batch = Batch::new(&self.store);
        snapshot::put_mark(&mut batch, self.group, &self.mark());
        if mutation::on(Bug::AppliedIndexNotAtomic) {
            batch.commit()?;
            batch = Batch::new(&self.store);
        }
        let (outputs, _written) = self.machine.apply(&commands, batch)?;
        assert_eq!(outputs.len(), commands.len(), "group {}: one output for each command", self.group);

        let mut outputs = outputs.into_iter();
        for (entry, responder) in entries {
            let output: Option<Box<dyn std::any::Any + Send + Sync>> = match entry.payload {
                EntryPayload::Normal(_) => outputs.next().map(|output| Box::new(output) as _),
                EntryPayload::Blank | EntryPayload::Membership(_) => None,
            };
            if let Some(responder) = responder {
                responder.send(Reply(output));
            }
        }
        Ok(())
    }
}

fn meta(mark: Mark) -> SnapshotMetaOf<Types> {
    SnapshotMetaOf::<Types> {
        last_log_id: mark.applied.map(types::log_id),
        last_membership: types::stored_membership(mark.membership),
    }
}

impl<M: Machine> RaftStateMachine<Types> for Adapter<M> {
    type SnapshotData = Transfer;
    type SnapshotBuilder = Position;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        let mut batches = entries.ready_chunks(BATCH_ENTRIES_MAX);
        while let Some(batch) = batches.next().await {
            self.apply_batch(batch.into_iter().collect::<io::Result<_>>()?)?;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Position {
        Position(self.mark())
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMetaOf<Types>, transfer: Transfer) -> io::Result<()> {
        let Transfer::Arrived(area) = transfer else {
            let reason = format!("group {}: only a snapshot that has arrived can be installed", self.group);
            return Err(io::Error::other(reason));
        };
        let mark = Mark {
            applied: meta.last_log_id.as_ref().map(types::log_id_to_wire),
            membership: types::stored_membership_to_wire(&meta.last_membership),
        };
        self.machine.unload();
        self.site.install(area, &mark).await?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.machine.reload()
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf<Types, Transfer>>> {
        if self.applied.is_none() {
            return Ok(None);
        }
        let opened = outgoing::open(&self.store, self.group, self.machine.spans()).await?;
        let (mark, transfer) = opened.unwrap_or_else(|| (self.mark(), Transfer::Postponed));
        Ok(Some(SnapshotOf::<Types, Transfer> { meta: meta(mark), snapshot: transfer }))
    }
}

/// Since the state on disk is the snapshot, to build one is to note where it stands.
pub(crate) struct Position(Mark);

impl RaftSnapshotBuilder<Types> for Position {
    type SnapshotData = Transfer;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<Types, Transfer>> {
        Ok(SnapshotOf::<Types, Transfer> { meta: meta(self.0.clone()), snapshot: Transfer::Position })
    }
}
