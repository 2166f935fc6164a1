//! Recording a history while clients run.

use std::time::Instant;

use parking_lot::Mutex;

use super::{Event, History, Kind, Op};

/// Where all clients of a run note what they ask and what they are told.
///
/// Index and time come from under one lock, so that the order of events is the order of their indices: if
/// an answer was noted before a question, it has the smaller number. Note a question before it is asked,
/// and an answer after it has come, and the history claims no order that was not there.
#[derive(Debug)]
pub struct Recorder {
    started: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    events: Vec<Event>,
    /// By the number of the process.
    processes: Vec<Process>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Process {
    Idle,
    Waiting,
    Retired,
}

impl Default for Recorder {
    fn default() -> Recorder {
        Recorder { started: Instant::now(), inner: Mutex::default() }
    }
}

impl Recorder {
    /// An empty history that begins now.
    pub fn new() -> Recorder {
        Recorder::default()
    }

    /// A number for a client that begins, or that goes on after an `Info` has retired its number.
    pub fn new_process(&self) -> u32 {
        let mut inner = self.inner.lock();
        inner.processes.push(Process::Idle);
        u32::try_from(inner.processes.len() - 1).expect("a run has fewer than four billion processes")
    }

    /// Notes a question, just before it is asked.
    ///
    /// # Panics
    /// If the process is unknown, retired, or has an operation outstanding.
    pub fn invoke(&self, process: u32, op: Op) {
        let mut inner = self.inner.lock();
        let before = inner.turn(process, Process::Waiting);
        assert_eq!(before, Some(Process::Idle), "process {process} cannot ask for {op}");
        self.note(&mut inner, process, Kind::Invoke, op, None, None);
    }

    /// Notes an answer, just after it has come. After an `Info` the process is retired, and its client
    /// goes on as a [`new_process`](Recorder::new_process).
    ///
    /// # Panics
    /// If the process has asked nothing, or the kind is not an answer.
    pub fn complete(&self, process: u32, kind: Kind, op: Op, error: Option<String>, commit_ts: Option<u64>) {
        let after = match kind {
            Kind::Ok | Kind::Fail => Process::Idle,
            Kind::Info => Process::Retired,
            Kind::Invoke => panic!("process {process}: an invoke completes nothing"),
        };
        let mut inner = self.inner.lock();
        let before = inner.turn(process, after);
        assert_eq!(before, Some(Process::Waiting), "process {process} has not asked for {op}");
        self.note(&mut inner, process, kind, op, error, commit_ts);
    }

    /// Nanoseconds since the history began.
    pub fn elapsed_nanos(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).expect("a run is not that long")
    }

    /// What was noted until now.
    pub fn history(&self) -> History {
        History { events: self.inner.lock().events.clone() }
    }

    /// What was noted, when all clients are done.
    pub fn into_history(self) -> History {
        History { events: self.inner.into_inner().events }
    }

    fn note(
        &self,
        inner: &mut Inner,
        process: u32,
        kind: Kind,
        op: Op,
        error: Option<String>,
        commit_ts: Option<u64>,
    ) {
        let index = inner.events.len() as u64;
        let time_nanos = self.elapsed_nanos();
        inner.events.push(Event { index, time_nanos, process, kind, op, error, commit_ts });
    }
}

impl Inner {
    fn turn(&mut self, process: u32, next: Process) -> Option<Process> {
        let state = self.processes.get_mut(process as usize)?;
        Some(std::mem::replace(state, next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_clients_note_at_once_is_a_history() {
        let recorder = Recorder::new();
        let client = |elements: std::ops::Range<i64>| {
            let mut process = recorder.new_process();
            for element in elements {
                recorder.invoke(process, Op::Add(element));
                let kind = [Kind::Ok, Kind::Fail, Kind::Info][element as usize % 3];
                recorder.complete(process, kind, Op::Add(element), None, None);
                if kind == Kind::Info {
                    process = recorder.new_process();
                }
            }
        };
        std::thread::scope(|scope| {
            for number in 0..4 {
                scope.spawn(move || client(number * 100..number * 100 + 100));
            }
        });
        let history = recorder.into_history();
        assert_eq!(history.events.len(), 800);
        assert_eq!(history.validate(), Ok(()));
        assert!(history.events.iter().enumerate().all(|(place, event)| event.index == place as u64));
    }

    #[test]
    #[should_panic(expected = "process 0 cannot ask for 2")]
    fn a_process_cannot_ask_twice() {
        let recorder = Recorder::new();
        let process = recorder.new_process();
        recorder.invoke(process, Op::Add(1));
        recorder.invoke(process, Op::Add(2));
    }

    #[test]
    #[should_panic(expected = "process 0 cannot ask for 2")]
    fn a_retired_process_cannot_ask() {
        let recorder = Recorder::new();
        let process = recorder.new_process();
        recorder.invoke(process, Op::Add(1));
        recorder.complete(process, Kind::Info, Op::Add(1), None, None);
        recorder.invoke(process, Op::Add(2));
    }

    #[test]
    #[should_panic(expected = "process 0 has not asked for 1")]
    fn nothing_completes_that_was_not_invoked() {
        let recorder = Recorder::new();
        recorder.complete(recorder.new_process(), Kind::Ok, Op::Add(1), None, None);
    }
}
