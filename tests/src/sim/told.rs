//! Parts of the world that many worlds share while they are the same in them, and that are told by a number.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, OnceLock};

use xxhash_rust::xxh3::xxh3_64;

/// A part of the world. Whoever clones it gets the same one; whoever changes it, one of his own.
#[derive(Clone)]
pub struct Told<T>(Arc<Inner<T>>);

#[derive(Clone)]
struct Inner<T> {
    value: T,
    /// All of it as a number, once somebody has asked for it.
    digest: OnceLock<u64>,
}

impl<T> Told<T> {
    /// A part that nobody shares yet.
    pub fn new(value: T) -> Told<T> {
        Told(Arc::new(Inner { value, digest: OnceLock::new() }))
    }
}

impl<T: fmt::Debug> Told<T> {
    /// A number that follows from what it is, to its last field: equal parts have equal numbers.
    pub fn digest(&self) -> u64 {
        *self.0.digest.get_or_init(|| xxh3_64(format!("{:?}", self.0.value).as_bytes()))
    }
}

impl<T> Deref for Told<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T: Clone> DerefMut for Told<T> {
    fn deref_mut(&mut self) -> &mut T {
        let inner = Arc::make_mut(&mut self.0);
        inner.digest.take();
        &mut inner.value
    }
}

/// Only the number, so that what has not changed is not told again.
impl<T: fmt::Debug> fmt::Debug for Told<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.digest())
    }
}
