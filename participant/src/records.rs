//! What a node keeps on its disk beside its groups.

use std::io;

/// The key of something that belongs to the node, not to one of its groups.
pub(crate) fn node_key(name: &str) -> Vec<u8> {
    [&u32::MAX.to_be_bytes()[..], name.as_bytes()].concat()
}

/// What is stored cannot be understood.
pub(crate) fn damaged(what: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the stored {what} is damaged: {error}"))
}
