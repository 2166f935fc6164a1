//! Work that is done a while later, so that nothing waits for what is slow but who asked for it.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{io, iter};

/// Work, and when to do it.
type Job = (Instant, Box<dyn FnOnce() + Send>);

/// Hands work over. The thread that does it ends when all of these are gone; what it has not done by then, it
/// never does. A request of the kernel waits for each, of which the kernel allows so many at a time: that
/// bounds them.
#[derive(Clone)]
pub struct Later(Sender<Job>);

impl Later {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system has none left.
    pub fn start() -> io::Result<(Later, JoinHandle<()>)> {
        let (sender, jobs) = channel();
        let thread = thread::Builder::new().name("disk-later".into()).spawn(move || run(&jobs))?;
        Ok((Later(sender), thread))
    }

    /// Does it after this time, or at once and here if there is none.
    pub fn after(&self, delay: Option<Duration>, job: impl FnOnce() + Send + 'static) {
        match delay {
            None => job(),
            // If the thread has ended, so has the disk.
            Some(delay) => drop(self.0.send((Instant::now() + delay, Box::new(job)))),
        }
    }
}

fn run(jobs: &Receiver<Job>) {
    let mut waiting: BTreeMap<(Instant, u64), Box<dyn FnOnce() + Send>> = BTreeMap::new();
    let mut count = 0;
    loop {
        let job = match waiting.first_key_value() {
            None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(((at, _), _)) => jobs.recv_timeout(at.saturating_duration_since(Instant::now())),
        };
        match job {
            Ok((at, job)) => {
                count += 1;
                waiting.insert((at, count), job);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        let due =
            iter::from_fn(|| waiting.first_entry().filter(|job| job.key().0 <= now).map(|job| job.remove()));
        due.for_each(|job| job());
    }
}
