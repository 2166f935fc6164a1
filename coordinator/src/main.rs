//! The coordinator: runs two-phase commit and remembers what was decided.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    troth_coordinator::program::main()
}
