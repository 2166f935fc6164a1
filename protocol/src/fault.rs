//! Fault points: named instants at which a process can be held, stopped or killed, so that a test can
//! bring a cluster to exactly the state that it wants to see survive.
//!
//! Nothing is armed unless an operator's certificate asks for it, and what is armed fires once, but
//! for what holds everybody. A point that is not armed costs one load of a flag. The table belongs to the process: servers that
//! share one, as in an embedded cluster, share it too.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::message::admin::{Fault, FaultAction, FaultPoint, FaultStatus};

/// The longest hold.
pub const HOLD_MAX: Duration = Duration::from_secs(60);

/// Whether anything is armed.
static ANY: AtomicBool = AtomicBool::new(false);

static TABLE: LazyLock<Table> = LazyLock::new(Table::default);

#[derive(Default)]
struct Table {
    points: Mutex<BTreeMap<FaultPoint, Armed>>,
    /// Counts the times that everything was disarmed.
    releases: watch::Sender<u64>,
}

struct Armed {
    action: FaultAction,
    /// How often it is still passed before it fires.
    skip: u32,
    fired: bool,
}

/// Does what an operator asks, and tells what is armed then.
pub fn handle(request: Fault) -> Vec<FaultStatus> {
    match request {
        Fault::Arm { point, action, skip } => arm(point, action, skip),
        Fault::Disarm => disarm(),
        Fault::List => {}
    }
    status()
}

fn arm(point: FaultPoint, action: FaultAction, skip: u32) {
    tracing::warn!(%point, ?action, skip, "a fault point is armed");
    TABLE.points.lock().insert(point, Armed { action, skip, fired: false });
    ANY.store(true, Ordering::Relaxed);
}

fn disarm() {
    ANY.store(false, Ordering::Relaxed);
    TABLE.points.lock().clear();
    TABLE.releases.send_modify(|count| *count += 1);
}

fn status() -> Vec<FaultStatus> {
    let points = TABLE.points.lock();
    let told = |(point, armed): (&FaultPoint, &Armed)| FaultStatus { point: *point, fired: armed.fired };
    points.iter().map(told).collect()
}

/// Passes a point: at once, unless it is armed.
pub async fn pass(point: FaultPoint) {
    if ANY.load(Ordering::Relaxed) {
        meet(point).await;
    }
}

/// Passes a point on a thread that may block.
pub fn pass_blocking(point: FaultPoint) {
    if ANY.load(Ordering::Relaxed) {
        let releases = TABLE.releases.subscribe();
        if let Some(limit) = strike(point) {
            let until = Instant::now() + limit;
            while Instant::now() < until && !releases.has_changed().unwrap_or(true) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

#[cold]
async fn meet(point: FaultPoint) {
    let mut releases = TABLE.releases.subscribe();
    if let Some(limit) = strike(point) {
        // Released, or held long enough: either way it goes on.
        let _ = timeout(limit, releases.changed()).await;
    }
}

/// Kills or stops the process, or says for how long to hold, if the point is armed.
fn strike(point: FaultPoint) -> Option<Duration> {
    let action = {
        let mut points = TABLE.points.lock();
        let again = |armed: &Armed| matches!(armed.action, FaultAction::HoldAll { .. });
        let armed = points.get_mut(&point).filter(|armed| !armed.fired || again(armed))?;
        if armed.skip > 0 {
            armed.skip -= 1;
            return None;
        }
        armed.fired = true;
        armed.action
    };
    tracing::warn!(%point, ?action, "a fault point is reached");
    match action {
        FaultAction::Kill => signal_self(rustix::process::Signal::KILL),
        FaultAction::Stop => signal_self(rustix::process::Signal::STOP),
        FaultAction::Hold { millis } | FaultAction::HoldAll { millis } => {
            return Some(Duration::from_millis(millis.into()).min(HOLD_MAX));
        }
    }
    None
}

fn signal_self(signal: rustix::process::Signal) {
    if let Err(error) = rustix::process::kill_process(rustix::process::getpid(), signal) {
        tracing::error!(%error, "cannot signal this process");
    }
}
