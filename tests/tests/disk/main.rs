//! The file system that forgets what was not synced, on real mounts: so these tests need root.

mod common;
mod durability;
mod faults;
mod model;
mod processes;
mod rocks;
mod store;
