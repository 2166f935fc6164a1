//! Lists, as the transactions of a history appended to them and read them.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::history::{Kind, Mop, Op, Operation};

/// All appends and all acknowledged reads.
pub(in crate::checker) struct Lists<'h> {
    /// Who appends a value to a key, by key and value.
    pub writes: HashMap<(i64, i64), Write>,
    /// Appends of a value to a key that somebody else appends too: key, value, and both.
    pub twice: Vec<(i64, i64, usize, usize)>,
    pub keys: BTreeMap<i64, Key<'h>>,
}

/// An append.
#[derive(Clone, Copy)]
pub(in crate::checker) struct Write {
    /// Whose it is, by the number of the operation.
    pub by: usize,
    /// Whether it is the last append of its transaction to this key.
    pub last: bool,
}

/// A list, and what was read of it.
#[derive(Default)]
pub(in crate::checker) struct Key<'h> {
    /// Values in the order of the questions that append them, each with whose it is.
    pub appends: Vec<(i64, usize)>,
    /// The reads that are the beginning of the longest, which is one of them.
    pub reads: Vec<Read<'h>>,
    /// The reads that are not.
    pub odd: Vec<Read<'h>>,
    /// The longest list that was read.
    pub order: &'h [i64],
    /// Whether `order` holds no element twice.
    pub is_order: bool,
    /// All elements that were read.
    pub seen: HashSet<i64>,
}

/// A read of a list.
#[derive(Clone, Copy)]
pub(in crate::checker) struct Read<'h> {
    /// Whose it is, by the number of the operation.
    pub by: usize,
    pub list: &'h [i64],
    /// How many elements at its end the transaction had appended itself.
    pub own: usize,
    /// Whether it is the first read of this key in its transaction, and finds what that has appended.
    pub first: bool,
    /// What its transaction appends to the key, if it does so after this read and not before.
    pub update: Option<i64>,
}

impl<'h> Read<'h> {
    /// The list as it was before the transaction.
    pub fn found(&self) -> &'h [i64] {
        &self.list[..self.list.len().saturating_sub(self.own)]
    }
}

impl<'h> Lists<'h> {
    /// Sorts the steps of all operations by key.
    pub fn new(operations: &'h [Operation<'h>]) -> Lists<'h> {
        let mut lists = Lists { writes: HashMap::new(), twice: Vec::new(), keys: BTreeMap::new() };
        for (number, operation) in operations.iter().enumerate() {
            if let Op::Txn(mops) = operation.op() {
                lists.add(number, mops, operation.outcome() == Kind::Ok);
            }
        }
        lists.keys.values_mut().for_each(Key::settle);
        lists
    }

    fn add(&mut self, by: usize, mops: &'h [Mop], acknowledged: bool) {
        for (place, mop) in mops.iter().enumerate() {
            match mop {
                Mop::Append { key, value } => {
                    let last = appends(&mops[place + 1..], *key).next().is_none();
                    if let Some(other) = self.writes.insert((*key, *value), Write { by, last }) {
                        self.twice.push((*key, *value, other.by, by));
                    }
                    self.keys.entry(*key).or_default().appends.push((*value, by));
                }
                Mop::Read { key, list } if acknowledged => {
                    let list = list.as_deref().unwrap_or_default();
                    let appended: Vec<_> = appends(&mops[..place], *key).collect();
                    let own = appended.len();
                    let is_read = |mop: &Mop| matches!(mop, Mop::Read { key: other, .. } if other == key);
                    let first = list.ends_with(&appended) && !mops[..place].iter().any(is_read);
                    let update = if own == 0 { appends(&mops[place + 1..], *key).next() } else { None };
                    self.keys.entry(*key).or_default().reads.push(Read { by, list, own, first, update });
                }
                Mop::Read { .. } => {}
            }
        }
    }
}

fn appends(mops: &[Mop], to: i64) -> impl Iterator<Item = i64> {
    mops.iter().filter_map(move |mop| match mop {
        Mop::Append { key, value } => (*key == to).then_some(*value),
        Mop::Read { .. } => None,
    })
}

impl<'h> Key<'h> {
    /// Finds the order of the list, once all reads are known.
    fn settle(&mut self) {
        // Of several that are longest, the first.
        for read in &self.reads {
            if read.list.len() > self.order.len() {
                self.order = read.list;
            }
        }
        let order = self.order;
        self.odd = self.reads.extract_if(.., |read| !order.starts_with(read.list)).collect();
        self.seen = order.iter().copied().collect();
        self.is_order = self.seen.len() == order.len();
        self.seen.extend(self.odd.iter().flat_map(|read| read.list));
    }

    /// A read of the longest list.
    pub fn longest(&self) -> Option<&Read<'h>> {
        self.reads.iter().find(|read| read.list.len() == self.order.len())
    }

    /// The reads that say something new: one of the longest list, and those that do not fit.
    pub fn witnesses(&self) -> impl Iterator<Item = &Read<'h>> {
        self.longest().into_iter().chain(&self.odd)
    }
}
