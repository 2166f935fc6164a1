//! The bytes of one file: what is durable of them, and over it the pages that are not.
//!
//! ```text
//!   what a process reads    | AAAA | bbbb | BBBB | CCCC | dd      size: how long it is said to be
//!                               ^      ^      ^      ^     ^
//!   pages, in memory        |      | bbbb |      | CCCC | dd |    dirty: written, not synced
//!   the file in the folder  | AAAA | BBBB | BBBB |                base: how long it is there
//! ```
//!
//! A file that has been cut off shows nothing of the folder beyond the cut, although it is still there until
//! the journal comes to that point. What is written after a cut goes to blocks that only the cut makes part
//! of the file, so no power cut leaves it there without the cut.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::IoSlice;
use std::os::unix::fs::FileExt;

use rand::RngExt;
use rand::rngs::StdRng;
use rustix::io::{Errno, Result, pwritev};

use super::Lost;
use super::store::errno;

/// How many bytes become dirty together.
pub const PAGE: u64 = 4096;

/// How many bytes a disk writes all or nothing of.
const SECTOR: u64 = 512;

/// Pages that are handed to the system in one call.
const PAGES_AT_ONCE: usize = 256;

const _: () = assert!(PAGE.is_multiple_of(SECTOR));

/// A page that is not durable.
struct Page {
    bytes: Box<[u8]>,
    /// The operation of the journal that must be durable before this can be: 0 for none.
    after: u64,
}

/// The bytes of a file.
#[derive(Default)]
pub struct Body {
    /// How many handles of processes there are.
    pub handles: u32,
    /// Since when it has had dirty pages, by a clock that counts writes.
    pub dirty_since: Option<u64>,
    file: Option<File>,
    size: u64,
    base: u64,
    /// Operations of the journal that change the size, with that size.
    resizes: VecDeque<(u64, u64)>,
    pages: BTreeMap<u64, Page>,
}

impl Body {
    /// A file as it is in the folder.
    pub fn new(base: u64) -> Body {
        Body { size: base, base, ..Body::default() }
    }

    /// How long it is.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many pages are not durable.
    pub fn dirty_pages(&self) -> usize {
        self.pages.len()
    }

    /// Whether the file in the folder is open.
    pub fn is_attached(&self) -> bool {
        self.file.is_some()
    }

    /// The file in the folder, from now on.
    pub fn attach(&mut self, file: Option<File>) {
        self.file = file;
    }

    /// Whether a write up to here needs space: it does if it makes the file longer by a page or more. Space
    /// that was reserved does not help, as on a disk that never writes to the same place twice.
    pub fn allocates(&self, end: u64) -> bool {
        end.div_ceil(PAGE) > self.size.div_ceil(PAGE)
    }

    /// Reads as much as there is.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let end = self.size.min(offset.saturating_add(length as u64));
        if offset >= end {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; (end - offset) as usize];
        self.read_base(offset, &mut bytes)?;
        for (index, page) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = index * PAGE;
            let (from, to) = (offset.max(start), end.min(start + PAGE));
            bytes[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&page.bytes[(from - start) as usize..(to - start) as usize]);
        }
        Ok(bytes)
    }

    /// Writes to memory.
    ///
    /// # Errors
    /// If a page that is written in part cannot be read from the folder. Then pages before it are written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let end = offset.checked_add(data.len() as u64).ok_or(Errno::FBIG)?;
        if data.is_empty() {
            return Ok(());
        }
        let after = self.resizes.back().map_or(0, |(sequence, _)| *sequence);
        for index in offset / PAGE..end.div_ceil(PAGE) {
            let start = index * PAGE;
            let (from, to) = (offset.max(start), end.min(start + PAGE));
            let new = &data[(from - offset) as usize..(to - offset) as usize];
            if new.len() as u64 == PAGE {
                self.pages.insert(index, Page { bytes: new.into(), after });
            } else {
                let page = self.page(index)?;
                page.bytes[(from - start) as usize..(to - start) as usize].copy_from_slice(new);
                page.after = after;
            }
            // What is beyond the end of a file reads as zeros when the file grows, so it must be zeros.
            self.size = self.size.max(to);
        }
        Ok(())
    }

    /// Makes a range zeros, as far as there is a file.
    ///
    /// # Errors
    /// Those of writing.
    pub fn punch(&mut self, offset: u64, length: u64) -> Result<()> {
        let end = self.size.min(offset.saturating_add(length));
        let mut from = offset;
        while from < end {
            let to = end.min((from / PAGE + 1) * PAGE);
            self.write(from, &[0; PAGE as usize][..(to - from) as usize])?;
            from = to;
        }
        Ok(())
    }

    /// Cuts it off or extends it by zeros; `sequence` is the operation of the journal that says so.
    pub fn resize(&mut self, sequence: u64, size: u64) {
        let _ = self.pages.split_off(&size.div_ceil(PAGE));
        if let Some(page) = self.pages.get_mut(&(size / PAGE)) {
            page.bytes[(size % PAGE) as usize..].fill(0);
            page.after = sequence;
        }
        self.size = size;
        self.resizes.push_back((sequence, size));
    }

    /// The journal has come to a change of size.
    ///
    /// # Errors
    /// If the folder does not take it.
    pub fn commit_resize(&mut self, sequence: u64) -> Result<()> {
        let Some((first, size)) = self.resizes.front().copied() else { return Ok(()) };
        assert_eq!(first, sequence, "sizes change in the order of the journal");
        if let Some(file) = &self.file {
            file.set_len(size).map_err(errno)?;
            self.base = size;
        }
        self.resizes.pop_front();
        Ok(())
    }

    /// Makes pages durable, the first ones of the file first, and if there are no more than these, also the
    /// size. The journal must have come to its end.
    ///
    /// # Errors
    /// If the folder does not take them. What it has not taken is still dirty.
    pub fn write_back(&mut self, pages_max: usize) -> Result<()> {
        assert!(self.resizes.is_empty(), "the journal is committed before pages are");
        let Some(file) = &self.file else { return Ok(()) };
        let mut left = pages_max;
        while left > 0 && !self.pages.is_empty() {
            let run = self.run(left.min(PAGES_AT_ONCE));
            let first = *self.pages.keys().next().expect("it has pages");
            write_run(file, first * PAGE, self.size, &run)?;
            let written = run.len();
            let end = (first + written as u64) * PAGE;
            self.base = self.base.max(end.min(self.size));
            self.pages = self.pages.split_off(&(first + written as u64));
            left -= written;
        }
        if self.pages.is_empty() {
            self.dirty_since = None;
            if self.base != self.size {
                file.set_len(self.size).map_err(errno)?;
                self.base = self.size;
            }
        }
        Ok(())
    }

    /// Loses what is not durable, except for how long the file is said to be: what is missing reads as zeros.
    pub fn forget_dirty(&mut self) {
        self.pages.clear();
        self.dirty_since = None;
    }

    /// The power has been cut: some of the pages reach the folder, and the last one of them not whole. The
    /// file becomes as long as it was, or as it should be, or something in between. Operations up to
    /// `committed` have been made durable before.
    ///
    /// # Errors
    /// If the folder does not take it.
    pub fn crash(&mut self, committed: u64, chance: &mut StdRng, lost: &mut Lost) -> Result<()> {
        let Some(file) = &self.file else {
            lost.pages += self.pages.len() as u64;
            lost.bytes += self.pages.keys().map(|index| live(*index, self.size)).sum::<u64>();
            return Ok(());
        };
        let size = match chance.random_range(0..3) {
            // A change of size was lost, and so is all that came after it.
            _ if !self.resizes.is_empty() => self.base,
            0 => self.base,
            1 => self.size,
            _ => {
                let pages = self.base.div_ceil(PAGE)..=self.size.div_ceil(PAGE);
                (chance.random_range(pages) * PAGE).clamp(self.base, self.size)
            }
        };
        let share = chance.random::<f64>();
        let reached: Vec<u64> = self
            .pages
            .iter()
            .filter(|(index, page)| page.after <= committed && *index * PAGE < size)
            .filter(|_| chance.random_bool(share))
            .map(|(index, _)| *index)
            .collect();
        let (mut bytes, mut whole) = (0, 0);
        for index in &reached {
            let length = live(*index, size);
            let taken = match reached.last() == Some(index) {
                true => length.min(chance.random_range(1..=PAGE / SECTOR) * SECTOR),
                false => length,
            };
            file.write_all_at(&self.pages[index].bytes[..taken as usize], index * PAGE).map_err(errno)?;
            lost.torn += u64::from(taken < length);
            whole += u64::from(taken == live(*index, self.size));
            bytes += taken;
        }
        if size > self.base {
            file.set_len(size).map_err(errno)?;
        }
        lost.pages += self.pages.len() as u64 - whole;
        lost.bytes += self.pages.keys().map(|index| live(*index, self.size)).sum::<u64>() - bytes;
        Ok(())
    }

    /// Flips one bit of what is durable and not hidden by what is not. `None` if there is nothing.
    ///
    /// # Errors
    /// If the folder cannot be read or does not take it.
    pub fn flip(&mut self, chance: &mut StdRng) -> Result<Option<(u64, u8)>> {
        let Some(file) = &self.file else { return Ok(None) };
        let seen = self.seen();
        let clean: Vec<u64> =
            (0..seen.div_ceil(PAGE)).filter(|index| !self.pages.contains_key(index)).collect();
        if clean.is_empty() {
            return Ok(None);
        }
        let start = clean[chance.random_range(0..clean.len())] * PAGE;
        let offset = chance.random_range(start..seen.min(start + PAGE));
        let bit = chance.random_range(0..8);
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).map_err(errno)?;
        file.write_all_at(&[byte[0] ^ (1 << bit)], offset).map_err(errno)?;
        Ok(Some((offset, bit)))
    }

    /// How much of the file in the folder is part of this file.
    fn seen(&self) -> u64 {
        self.resizes.iter().map(|(_, size)| *size).fold(self.base, u64::min)
    }

    fn read_base(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let end = self.seen().min(offset + bytes.len() as u64);
        match &self.file {
            Some(file) if offset < end => {
                file.read_exact_at(&mut bytes[..(end - offset) as usize], offset).map_err(errno)
            }
            Some(_) | None => Ok(()),
        }
    }

    /// A page to write to, with what is in it now.
    fn page(&mut self, index: u64) -> Result<&mut Page> {
        if !self.pages.contains_key(&index) {
            let mut bytes = vec![0; PAGE as usize];
            self.read_base(index * PAGE, &mut bytes)?;
            self.pages.insert(index, Page { bytes: bytes.into(), after: 0 });
        }
        Ok(self.pages.get_mut(&index).expect("it was there, or is now"))
    }

    /// The first dirty pages without a gap between them.
    fn run(&self, pages_max: usize) -> Vec<IoSlice<'_>> {
        let mut run = Vec::new();
        let mut next = None;
        for (index, page) in self.pages.iter().take(pages_max) {
            if next.is_some_and(|next| next != *index) {
                break;
            }
            next = Some(index + 1);
            run.push(IoSlice::new(&page.bytes));
        }
        run
    }
}

/// How many bytes of a page are in a file of this size.
fn live(index: u64, size: u64) -> u64 {
    size.saturating_sub(index * PAGE).min(PAGE)
}

/// Writes pages that follow one another, no further than the file is long.
fn write_run(file: &File, offset: u64, size: u64, run: &[IoSlice<'_>]) -> Result<()> {
    let whole = ((size - offset) / PAGE).min(run.len() as u64) as usize;
    let (mut at, end) = (offset, offset + whole as u64 * PAGE);
    while at < end {
        // What the system took last ended at a page, as a rule.
        let skip = (at - offset) / PAGE;
        let inside = ((at - offset) % PAGE) as usize;
        at += match inside {
            0 => pwritev(file, &run[skip as usize..whole], at)? as u64,
            _ => file.write_at(&run[skip as usize][inside..], at).map_err(errno)? as u64,
        };
    }
    if let Some(last) = run.get(whole) {
        file.write_all_at(&last[..(size - end) as usize], end).map_err(errno)?;
    }
    Ok(())
}
