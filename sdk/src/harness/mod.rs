//! A cluster of real processes on this machine, and a workload for it: what the demo, the tests and
//! the benchmarks share.

pub mod bank;
pub mod load;
pub mod processes;
