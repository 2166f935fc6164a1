//! What the two servers share: configuration files, logging, signals, exit codes.

mod config;
mod sparing;
mod telemetry;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

pub use self::config::{
    Basics, Common, ConfigError, HttpConfig, HttpSection, Memory, MemorySection, NetworkSection, RaftSection,
    ServerFile, Source, TIME_MAX, TlsSection, Token, load, load_server, parse,
};
pub use self::sparing::unwritten;
pub use self::telemetry::{LogFormat, LogSection, TraceSection, Traces};

/// The process did what it was asked to.
pub const EXIT_OK: u8 = 0;
/// It failed on the way.
pub const EXIT_FAILED: u8 = 1;
/// Its configuration or command line makes no sense; nothing was done.
pub const EXIT_USAGE: u8 = 2;

/// A runtime with this many threads for its tasks. `None`: half as many as the machine has cores,
/// and one at least; the other half is for the log writer and RocksDB's own threads. On a machine
/// of two cores a second thread only makes every step wait for the other core to wake up.
///
/// # Errors
/// If the system does not give the process that many threads.
pub fn runtime(threads: Option<usize>) -> std::io::Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or(cores / 2).max(1);
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
}

/// Asks the system for the batch scheduling policy, for the calling thread and every thread that it
/// begets from here on: a server's threads work in bursts of microseconds, and when one that wakes up
/// pushes aside the one that woke it, the rest of a burst (the second of two messages to send) waits
/// for nothing. Where the system refuses, all goes on without. Its share of the processors stays what it
/// was: a process that was started with a niceness keeps that, and its policy with it.
#[cfg(target_os = "linux")]
pub fn work_in_batches() {
    use thread_priority::{NormalThreadSchedulePolicy::Batch, ThreadPriority, ThreadSchedulePolicy::Normal};
    if rustix::process::getpriority_process(None) != Ok(0) {
        return;
    }
    // This library sets the niceness too, and takes the least priority for the largest niceness.
    let (this, as_it_is) = (thread_priority::thread_native_id(), ThreadPriority::Os(Default::default()));
    if let Err(error) = thread_priority::set_thread_priority_and_policy(this, as_it_is, Normal(Batch)) {
        tracing::debug!(%error, "the system keeps its own scheduling policy");
    }
}

/// Other systems have no such policy.
#[cfg(not(target_os = "linux"))]
pub fn work_in_batches() {}

/// Descriptors that a server needs at the least: RocksDB keeps up to 512 files open, besides its logs; HTTP has
/// connections; and there is a reserve.
const DESCRIPTORS_MIN: u64 = 1024;

/// Takes as many file descriptors as the system lets this process have, and says so if they are few.
pub fn take_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limits = getrlimit(Resource::Nofile);
    if let (Some(current), most) = (limits.current, limits.maximum)
        && most.is_none_or(|most| current < most)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })
    {
        tracing::debug!(%error, "the limit of descriptors stays what it was");
    }
    let (_, most) = descriptors();
    if most < DESCRIPTORS_MIN {
        tracing::warn!(
            "this process may have {most} files and sockets open, and may need {DESCRIPTORS_MIN}: raise the limit \
             (LimitNOFILE of its systemd unit, or ulimit -n)"
        );
    }
}

/// How many files and sockets this process has open, and how many it may have.
pub fn descriptors() -> (u64, u64) {
    use rustix::process::{Resource, getrlimit};
    let open = fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
    (open, getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
}

/// Writes an address into a file of the data folder, in a line, for scripts that let the system choose a
/// port.
///
/// # Errors
/// If the folder cannot be written.
pub fn publish(folder: &Path, name: &str, address: SocketAddr) -> std::io::Result<()> {
    let part = folder.join(format!("{name}.part"));
    fs::write(&part, format!("{address}\n"))?;
    fs::rename(part, folder.join(name))
}

/// Returns when the process is asked to stop: SIGTERM, SIGINT from a terminal, or, `with_parent`,
/// the end of standard input, which comes when whoever started the process has ended, however.
///
/// # Errors
/// If the system does not let a process listen for signals.
pub async fn asked_to_stop(with_parent: bool) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (parent_lives, parent_ended) = tokio::sync::oneshot::channel::<()>();
    if with_parent {
        // A thread, since nothing else can wait for standard input without holding up the exit.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            drop(parent_lives);
        });
    } else {
        std::mem::forget(parent_lives);
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = parent_ended => {}
    }
    Ok(())
}

/// Ends the process when any of its threads panics: a broken invariant must not be served from.
pub fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        tracing::error!(panic = %info, "a bug: the process stops rather than serve from a broken state");
        std::process::abort();
    }));
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::work_in_batches;

    const BATCH: &str = "3";

    /// Niceness and scheduling policy of the calling thread, as the kernel tells them.
    fn scheduling() -> (String, String) {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("there is /proc");
        // The second field may hold spaces, and ends with the last parenthesis.
        let (_, rest) = stat.rsplit_once(')').expect("a name");
        let field = |number: usize| rest.split_whitespace().nth(number - 3).expect("so many").to_owned();
        (field(19), field(41))
    }

    #[test]
    fn bursts_are_not_paid_for_with_a_share_of_the_processors() {
        let (before, after) = (scheduling(), std::thread::spawn(|| (work_in_batches(), scheduling()).1));
        let after = after.join().expect("it ends");
        assert_eq!(after.0, before.0, "the niceness");
        if before.0 == "0" {
            assert_eq!(after.1, BATCH, "the policy");
        }
    }

    #[test]
    fn a_niceness_that_was_chosen_stays() {
        let chosen = std::thread::spawn(|| {
            rustix::process::setpriority_process(None, 7).expect("anybody may be nicer");
            let before = scheduling();
            work_in_batches();
            (before, scheduling())
        });
        let (before, after) = chosen.join().expect("it ends");
        assert_eq!((before.0.as_str(), &after), ("7", &before));
    }
}
