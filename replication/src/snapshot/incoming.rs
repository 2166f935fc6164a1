//! The receiver's side: where a snapshot is put together, and how it becomes the state.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::task::spawn_blocking;
use troth_protocol::message::raft::{Bounds, Offer, Part};
use troth_protocol::wire::{decode, encode};

use super::{Mark, PartHash, malformed, put_mark};
use crate::log::{Change, LogWriter, meta_key, tag};
use crate::machine::{Batch, Span};
use crate::rocks::{Family, Reach, Store, families, group_range};

/// Bytes that one batch of an installation writes.
const BATCH_BYTES: usize = 1 << 20;

/// Where a snapshot is put together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Area {
    /// In place: the member has no state that would be in the way.
    State,
    /// Beside the state, until it is complete.
    Staging,
}

/// Where the snapshots of a group arrive. Cheap to share.
pub(crate) struct Site {
    store: Store,
    writer: LogWriter,
    group: u32,
    spans: Vec<Span>,
    ground: Mutex<Ground>,
}

/// What lies where the state should be.
struct Ground {
    /// Nothing was ever applied.
    fresh: bool,
    /// A snapshot that is not installed.
    dirty: bool,
    /// It is complete, and about to be installed: nobody may touch it.
    closed: bool,
    /// Why nothing may arrive any more, or not now: a staged snapshot is being put in place, and if that has
    /// failed the rest of it is needed at the next start; or the member has stopped.
    shut: Option<&'static str>,
}

/// A staged snapshot is being put in place.
const INSTALLING: &str = "a snapshot is being put in place";

/// The member has stopped.
const STOPPED: &str = "this member has stopped";

/// A row, as an area holds it.
struct Range {
    family: Family,
    from: Vec<u8>,
    to: Vec<u8>,
    /// Bytes before the machine's own key.
    prefix: usize,
}

impl Site {
    /// The site of a group. Finishes an installation that a crash interrupted.
    pub(crate) fn open(store: &Store, writer: &LogWriter, group: u32, spans: Vec<Span>) -> io::Result<Site> {
        finish_install(store, group, &spans)?;
        let noted = |tag| Ok::<_, io::Error>(store.get(families::META, &meta_key(group, tag))?.is_some());
        let (fresh, dirty) = (!noted(tag::APPLIED)?, noted(tag::BUILDING)?);
        let ground = Mutex::new(Ground { fresh, dirty, closed: false, shut: None });
        Ok(Site { store: store.clone(), writer: writer.clone(), group, spans, ground })
    }

    /// Where the next snapshot is put together.
    pub(crate) fn area(&self) -> Area {
        let ground = self.ground.lock();
        if ground.fresh && !ground.closed { Area::State } else { Area::Staging }
    }

    /// A snapshot has arrived whole.
    pub(crate) fn close(&self, area: Area) {
        if area == Area::State {
            self.ground.lock().closed = true;
        }
    }

    /// Whether something may arrive.
    pub(crate) fn is_open(&self) -> bool {
        self.ground.lock().shut.is_none()
    }

    /// Nothing arrives from now on. To be called when nothing is arriving, and nothing is applied any more.
    pub(crate) fn end(&self) {
        self.ground.lock().shut = Some(STOPPED);
    }

    /// Something is about to be applied: what is left of a snapshot that never got complete must not
    /// show through.
    pub(crate) fn begin_applying(&self) -> io::Result<()> {
        let mut ground = self.ground.lock();
        if ground.dirty {
            let mut batch = Batch::new(&self.store);
            for span in &self.spans {
                batch.delete_range(span.family, &span.start, &span.end);
            }
            batch.delete(families::META, &meta_key(self.group, tag::BUILDING));
            batch.commit()?;
        }
        ground.now_has_a_state();
        Ok(())
    }

    fn range(&self, area: Area, bounds: &Bounds) -> Range {
        let (from, to) = (bounds.from.to_vec(), bounds.to.to_vec());
        match area {
            Area::State => {
                let family = self.spans[usize::from(bounds.span)].family;
                Range { family, from, to, prefix: 0 }
            }
            Area::Staging => {
                let prefix = staged(self.group, bounds.span);
                let behind = |key: Vec<u8>| [&prefix[..], &key].concat();
                Range { family: families::STAGING, from: behind(from), to: behind(to), prefix: prefix.len() }
            }
        }
    }

    /// Whether an area has anything in a range, and if so whether it is exactly what was offered.
    fn holds(&self, area: Area, offer: &Offer) -> io::Result<bool> {
        let range = self.range(area, &offer.bounds);
        let mut rows = self.store.iterate(range.family, &range.from, &range.to, Reach::Disk);
        rows.seek(&range.from);
        let mut hash = PartHash::default();
        while let Some((key, value)) = rows.item() {
            hash.add(&key[range.prefix..], value);
            rows.next();
        }
        rows.status().map_err(io::Error::other)?;
        Ok(hash.finish() == offer.hash)
    }

    fn is_empty(&self, range: &Range) -> io::Result<bool> {
        let mut rows = self.store.iterate(range.family, &range.from, &range.to, Reach::Disk);
        rows.seek(&range.from);
        let empty = !rows.valid();
        rows.status().map_err(io::Error::other)?;
        Ok(empty)
    }

    /// Replaces what an area has within the bounds of parts.
    fn put(&self, area: Area, parts: &[Part]) -> io::Result<()> {
        let mut batch = Batch::new(&self.store);
        for part in parts {
            let range = self.range(area, &part.bounds);
            if !self.is_empty(&range)? {
                batch.delete_range(range.family, &range.from, &range.to);
            }
            for pair in &part.pairs {
                match area {
                    Area::State => batch.put(range.family, &pair.key, &pair.value),
                    Area::Staging => {
                        let key = [&staged(self.group, part.bounds.span)[..], &pair.key].concat();
                        batch.put(families::STAGING, &key, &pair.value);
                    }
                }
            }
        }
        // Under the lock, so that nothing begins to be applied on top of it, or to be put in place.
        let mut ground = self.ground.lock();
        ground.check()?;
        if area == Area::Staging {
            batch.commit()?;
            return Ok(());
        }
        if !ground.fresh || ground.closed {
            return Err(io::Error::other("the log is being applied; this snapshot is out of date"));
        }
        if !ground.dirty {
            batch.put(families::META, &meta_key(self.group, tag::BUILDING), &[]);
        }
        batch.commit()?;
        ground.dirty = true;
        Ok(())
    }

    /// Makes a snapshot that has arrived whole the state.
    pub(crate) async fn install(&self, area: Area, mark: &Mark) -> io::Result<()> {
        match area {
            // Everything was written before this, to the same log: so it is durable with it.
            Area::State => {
                if !self.ground.lock().closed {
                    return Err(io::Error::other("the log was applied where a snapshot was to be installed"));
                }
                let built = meta_key(self.group, tag::BUILDING);
                let changes = vec![
                    Change::put(families::META, &meta_key(self.group, tag::APPLIED), encode(mark)),
                    Change::delete(families::META, &built),
                ];
                self.writer.write_durably(changes).await?;
            }
            Area::Staging => {
                {
                    let mut ground = self.ground.lock();
                    ground.check()?;
                    ground.shut = Some(INSTALLING);
                }
                let note = Change::put(families::META, &meta_key(self.group, tag::INSTALLING), encode(mark));
                self.writer.write_durably(vec![note]).await?;
                let (store, group, spans) = (self.store.clone(), self.group, self.spans.clone());
                let finish = spawn_blocking(move || finish_install(&store, group, &spans));
                finish.await.map_err(io::Error::other)??;
                self.writer.write_durably(Vec::new()).await?;
                self.ground.lock().shut = None;
            }
        }
        self.ground.lock().now_has_a_state();
        Ok(())
    }
}

impl Ground {
    fn now_has_a_state(&mut self) {
        (self.fresh, self.dirty, self.closed) = (false, false, false);
    }

    fn check(&self) -> io::Result<()> {
        self.shut.map_or(Ok(()), |reason| Err(io::Error::other(reason)))
    }
}

/// How the keys of a span begin in staging: `[group u32 | span u16]`.
fn staged(group: u32, span: u16) -> [u8; 6] {
    let ([a, b, c, d], [e, f]) = (group.to_be_bytes(), span.to_be_bytes());
    [a, b, c, d, e, f]
}

/// Puts a staged snapshot in place, if a note says that this has begun.
fn finish_install(store: &Store, group: u32, spans: &[Span]) -> io::Result<()> {
    let note_key = meta_key(group, tag::INSTALLING);
    let Some(note) = store.get(families::META, &note_key)?.map(|note| note.to_vec()) else {
        return Ok(());
    };
    let mark: Mark = decode(&note).map_err(|error| malformed(group, error))?;
    let mut batch = Batch::new(store);
    for span in spans {
        batch.delete_range(span.family, &span.start, &span.end);
    }
    for (number, span) in spans.iter().enumerate() {
        let prefix = staged(group, number as u16);
        let (start, end) = ([&prefix[..], &span.start].concat(), [&prefix[..], &span.end].concat());
        let mut rows = store.iterate(families::STAGING, &start, &end, Reach::Disk);
        rows.seek(&start);
        while let Some((key, value)) = rows.item() {
            batch.put(span.family, &key[prefix.len()..], value);
            if batch.bytes() >= BATCH_BYTES {
                std::mem::replace(&mut batch, Batch::new(store)).commit()?;
            }
            rows.next();
        }
        rows.status().map_err(io::Error::other)?;
    }
    let (start, end) = group_range(group);
    put_mark(&mut batch, group, &mark);
    batch.delete(families::META, &note_key);
    batch.delete_range(families::STAGING, &start, &end);
    batch.commit()?;
    Ok(())
}

/// A snapshot that is arriving: which of its bounds were seen.
pub(crate) struct Session {
    transfer: u64,
    area: Area,
    /// All before this was seen: a span, and a key in it.
    cursor: (usize, Bytes),
    /// Of what was seen, these parts are still to come.
    missing: VecDeque<Bounds>,
    /// It is the state now.
    in_place: bool,
}

impl Session {
    /// Nothing was seen yet.
    pub(crate) fn new(transfer: u64, site: &Site) -> Session {
        let start = site.spans.first().map_or(Bytes::new(), |span| Bytes::copy_from_slice(&span.start));
        let area = site.area();
        Session { transfer, area, cursor: (0, start), missing: VecDeque::new(), in_place: false }
    }

    /// It is the state now: its sender may ask once more, if it has not heard that.
    pub(crate) fn is_in_place(&self) -> bool {
        self.in_place
    }

    /// Notes that it is the state now.
    pub(crate) fn set_in_place(&mut self) {
        self.in_place = true;
    }

    /// Whether it is this transfer.
    pub(crate) fn is(&self, transfer: u64) -> bool {
        self.transfer == transfer
    }

    /// Where it was put together, if nothing is missing.
    pub(crate) fn complete(&self, site: &Site) -> Option<Area> {
        let whole = self.cursor.0 == site.spans.len() && self.missing.is_empty();
        (whole && !self.in_place).then_some(self.area)
    }

    /// Compares parts with what is there. Returns which of them are wanted, by their places, and whether
    /// there is nothing at all behind them.
    ///
    /// # Errors
    /// [`Unfit`] if they do not follow what was seen.
    pub(crate) fn offered(&mut self, site: &Site, offers: &[Offer]) -> Result<(Vec<u32>, bool), Unfit> {
        if !self.missing.is_empty() {
            return Err(Unfit::OutOfOrder);
        }
        site.ground.lock().check()?;
        let mut wanted = Vec::new();
        for (place, offer) in offers.iter().enumerate() {
            self.advance(site, &offer.bounds)?;
            if !site.holds(self.area, offer)? {
                wanted.push(place as u32);
                self.missing.push_back(offer.bounds.clone());
            }
        }
        Ok((wanted, self.rest_is_empty(site)?))
    }

    /// Takes parts that were wanted, or that follow what was seen.
    ///
    /// # Errors
    /// [`Unfit`] if they are neither.
    pub(crate) fn arrived(&mut self, site: &Site, parts: &[Part]) -> Result<(), Unfit> {
        for part in parts {
            let within = |key: &Bytes| *key >= part.bounds.from && *key < part.bounds.to;
            if !part.pairs.iter().all(|pair| within(&pair.key)) {
                return Err(Unfit::OutOfOrder);
            }
            match self.missing.front() {
                Some(bounds) if *bounds == part.bounds => drop(self.missing.pop_front()),
                Some(_) => return Err(Unfit::OutOfOrder),
                None => self.advance(site, &part.bounds)?,
            }
        }
        Ok(site.put(self.area, parts)?)
    }

    fn advance(&mut self, site: &Site, bounds: &Bounds) -> Result<(), Unfit> {
        let (span, key) = &self.cursor;
        let follows = usize::from(bounds.span) == *span && bounds.from == *key;
        let inside =
            site.spans.get(*span).is_some_and(|span| bounds.to <= span.end && bounds.from < bounds.to);
        if !follows || !inside {
            return Err(Unfit::OutOfOrder);
        }
        self.cursor = if bounds.to == site.spans[*span].end {
            let next = site.spans.get(span + 1);
            (span + 1, next.map_or(Bytes::new(), |span| Bytes::copy_from_slice(&span.start)))
        } else {
            (*span, bounds.to.clone())
        };
        Ok(())
    }

    fn rest_is_empty(&self, site: &Site) -> io::Result<bool> {
        let (first, key) = &self.cursor;
        for (number, span) in site.spans.iter().enumerate().skip(*first) {
            let from = if number == *first { key.clone() } else { Bytes::copy_from_slice(&span.start) };
            let rest = Bounds { span: number as u16, from, to: Bytes::copy_from_slice(&span.end) };
            if !site.is_empty(&site.range(self.area, &rest))? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Something of a snapshot cannot be taken: its sender begins anew.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    /// It does not follow what has arrived.
    #[error("this does not follow what has arrived of its snapshot")]
    OutOfOrder,
    /// It cannot be stored.
    #[error("{0}")]
    Store(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use troth_protocol::process::Memory;

    use super::*;

    const DATA: Family = Family("data");

    /// While a staged snapshot is put in place, and for good if that fails, the next start needs it as it is.
    #[tokio::test]
    async fn nothing_arrives_where_a_snapshot_could_not_be_put_in_place() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), "a test", &[DATA], Memory::default()).expect("a new folder");
        let writer = LogWriter::start(&store);
        let span = Span { family: DATA, start: vec![1], end: vec![2] };
        let bounds = Bounds { span: 0, from: vec![1].into(), to: vec![2].into() };
        let part = Part { bounds: bounds.clone(), pairs: Vec::new() };
        let offer = Offer { bounds, hash: [7; 16] };
        let site = Site::open(&store, &writer, 1, vec![span]).expect("readable");
        site.begin_applying().expect("writable");

        let mut session = Session::new(1, &site);
        assert_eq!(session.offered(&site, std::slice::from_ref(&offer)).expect("open").0, [0]);
        site.ground.lock().shut = Some(INSTALLING);
        assert!(matches!(session.arrived(&site, &[part]), Err(Unfit::Store(_))));
        let offered = Session::new(2, &site).offered(&site, &[offer]);
        assert!(matches!(offered, Err(Unfit::Store(_))));
        assert!(site.install(Area::Staging, &Mark::default()).await.is_err());
        assert!(!site.is_open());
    }
}
