//! A machine of the cluster: a runtime with a clock of its own, which only the stage lets go on.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::runtime::{Builder, Runtime};
use troth_protocol::clock::Clock;

/// How often all tasks of a machine that can go on do so in a moment. What then still can goes on in the next.
const TURNS: u32 = 16;

/// A machine. What runs on it runs in one thread with that of all others, and its time stands still while it
/// is not that machine's turn.
pub struct Host {
    /// What others call it.
    pub name: String,
    /// Where it talks from.
    pub address: SocketAddr,
    clock: Clock,
    skew_millis: i64,
    life: Option<Life>,
    /// How much time has passed while it stood still, if it does.
    paused: Option<Duration>,
    /// How what ran on it has ended.
    ended: Option<Result<(), String>>,
}

/// What is lost when it dies.
struct Life {
    // Dropped before the runtime that it belongs to.
    main: Pin<Box<dyn Future<Output = Result<(), String>>>>,
    runtime: Runtime,
}

/// How a machine is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    /// It runs.
    Up,
    /// It stands still.
    Paused,
    /// It does not run.
    Down,
}

impl Host {
    /// A machine that does not run.
    pub fn new(name: impl Into<String>, address: SocketAddr) -> Host {
        Host {
            name: name.into(),
            address,
            clock: Clock::system(),
            skew_millis: 0,
            life: None,
            paused: None,
            ended: None,
        }
    }

    /// Its wall clock.
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// How it is.
    pub fn condition(&self) -> Condition {
        match (&self.life, self.paused) {
            (None, _) => Condition::Down,
            (Some(_), Some(_)) => Condition::Paused,
            (Some(_), None) => Condition::Up,
        }
    }

    /// Starts it.
    ///
    /// # Panics
    /// If it runs.
    pub fn boot(&mut self, main: impl Future<Output = Result<(), String>> + 'static) {
        assert!(self.life.is_none(), "{} runs already", self.name);
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime without a driver of its own needs nothing");
        self.life = Some(Life { main: Box::pin(main), runtime });
    }

    /// It dies: everything that it was about to do is not done.
    pub fn crash(&mut self) {
        self.paused = None;
        if let Some(Life { main, runtime }) = self.life.take() {
            let entered = runtime.enter();
            drop(main);
            drop(entered);
        }
    }

    /// It stands still.
    pub fn pause(&mut self) {
        self.paused.get_or_insert_default();
    }

    /// It goes on. All that was to happen meanwhile is late.
    pub fn resume(&mut self) {
        let Some(behind) = self.paused.take() else { return };
        if let Some(life) = &self.life {
            life.runtime.block_on(tokio::time::advance(behind));
        }
    }

    /// How far its wall clock is ahead.
    pub fn set_skew(&mut self, millis: i64) {
        self.skew_millis = millis;
    }

    /// Lets a moment pass. `wall_millis`: what a clock that is right shows.
    pub fn tick(&mut self, moment: Duration, wall_millis: u64) {
        let Some(Life { main, runtime }) = &mut self.life else { return };
        if let Some(behind) = &mut self.paused {
            *behind += moment;
            return;
        }
        let system = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64;
        self.clock.set_offset_millis(wall_millis as i64 + self.skew_millis - system);
        // Time is not left to pass when there is nothing to do: there may be, in a thread that is about to
        // write to a disk or to read from it.
        let turns = async {
            tokio::time::advance(moment).await;
            for _ in 0..TURNS {
                tokio::task::yield_now().await;
            }
        };
        self.ended = runtime.block_on(async {
            tokio::select! {
                biased;
                result = main => Some(result),
                () = turns => None,
            }
        });
        if self.ended.is_some() {
            self.crash();
        }
    }

    /// How what ran on it has ended, told once. The machine does not run any more then.
    pub fn ended(&mut self) -> Option<Result<(), String>> {
        self.ended.take()
    }

    /// Does something else on it too, if it runs.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(life) = &self.life {
            life.runtime.spawn(work);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::time::{Instant, sleep};

    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);

    /// A machine that counts how often ten milliseconds have passed, and the latest of them by how much.
    fn counting() -> (Host, Arc<AtomicU64>, Arc<AtomicU64>) {
        let mut host = Host::new("host", SocketAddr::from(([10, 0, 0, 1], 1)));
        let (count, late) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (counter, latest) = (count.clone(), late.clone());
        host.boot(async move {
            loop {
                let due = Instant::now() + Duration::from_millis(10);
                sleep(Duration::from_millis(10)).await;
                counter.fetch_add(1, Ordering::Relaxed);
                latest.fetch_max(due.elapsed().as_millis() as u64, Ordering::Relaxed);
            }
        });
        (host, count, late)
    }

    #[test]
    fn time_passes_as_it_is_told_and_a_machine_that_stood_still_is_late() {
        let (mut host, count, late) = counting();
        for _ in 0..105 {
            host.tick(MOMENT, 0);
        }
        assert_eq!(count.load(Ordering::Relaxed), 10);
        assert!(late.load(Ordering::Relaxed) <= 1);
        host.pause();
        assert_eq!(host.condition(), Condition::Paused);
        for _ in 0..1000 {
            host.tick(MOMENT, 0);
        }
        assert_eq!(count.load(Ordering::Relaxed), 10);
        host.resume();
        for _ in 0..5 {
            host.tick(MOMENT, 0);
        }
        assert_eq!(count.load(Ordering::Relaxed), 11, "one timer was due, and its successors are not yet");
        assert!(late.load(Ordering::Relaxed) > 900);
    }

    #[test]
    fn a_machine_that_dies_does_nothing_more_and_one_that_ends_says_how() {
        let (mut host, count, _) = counting();
        for _ in 0..15 {
            host.tick(MOMENT, 0);
        }
        host.crash();
        assert_eq!(host.condition(), Condition::Down);
        host.tick(MOMENT, 0);
        assert_eq!((count.load(Ordering::Relaxed), host.ended()), (1, None));
        host.boot(async {
            sleep(Duration::from_millis(3)).await;
            Err("enough".to_owned())
        });
        host.tick(MOMENT, 0);
        assert_eq!(host.ended(), None);
        for _ in 0..5 {
            host.tick(MOMENT, 0);
        }
        assert_eq!(host.ended(), Some(Err("enough".to_owned())));
        assert_eq!(host.condition(), Condition::Down);
    }

    #[test]
    fn its_wall_clock_follows_the_cluster_and_jumps_when_it_is_told_to() {
        let (mut host, ..) = counting();
        host.tick(MOMENT, 5_000_000);
        let is_near = |shown: u64, right: u64| (right..right + 1_000).contains(&shown);
        assert!(is_near(host.clock().millis(), 5_000_000));
        host.set_skew(-60_000);
        host.tick(MOMENT, 5_000_001);
        assert!(is_near(host.clock().millis(), 4_940_001));
    }
}
