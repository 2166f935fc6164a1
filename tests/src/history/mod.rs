//! Histories: what clients asked, what they were told, and in which order, in the manner of Jepsen.
//!
//! ```text
//! process 0   invoke ────────────── ok
//! process 1          invoke ───────────────── info     it may have happened, or happen yet
//! process 2                         invoke ── fail     it has not happened and never will
//! index          0   1              2  3      4 5
//! ```
//!
//! A process has at most one operation outstanding. One whose operation ended as *info* is retired: it
//! cannot ask again, since its operation may still be under way.

pub mod edn;
pub mod generate;
mod op;
pub mod recorder;

use std::collections::{BTreeMap, HashMap};

pub use op::{Mop, Op, RwMop, UnknownWorkload, Workload};

/// All events of a run, in the order in which they happened.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    /// The events, by index.
    pub events: Vec<Event>,
}

/// A client asked something, or was told what became of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Its place in the history. Numbers increase; some may be missing.
    pub index: u64,
    /// Nanoseconds since the run began. They never decrease.
    pub time_nanos: u64,
    /// Who asked.
    pub process: u32,
    /// Whether it is the question, or what kind of answer.
    pub kind: Kind,
    /// What was asked; in an `Ok`, with the answer.
    pub op: Op,
    /// Why it is a `Fail` or an `Info`, if that is known.
    pub error: Option<String>,
    /// In an `Ok`, when it took place by the clock of the system: the commit timestamp of a writer, the
    /// snapshot timestamp of a reader. `None` if the client was not told.
    pub commit_ts: Option<u64>,
}

/// What an event says about its operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It was asked for.
    Invoke,
    /// It took place, after it was asked for and before now.
    Ok,
    /// It has not taken place and never will.
    Fail,
    /// It may have taken place, may take place later, or never.
    Info,
}

/// How an operation ended whose client was not told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// It took place.
    Committed {
        /// The answer that its client would have had.
        answer: Op,
        /// When, by the clock of the system.
        commit_ts: u64,
    },
    /// It has not taken place and never will.
    Aborted,
}

/// A question and what became of it.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'h> {
    /// The question.
    pub invoked: &'h Event,
    /// The answer. `None` if the history ends before it.
    pub completed: Option<&'h Event>,
}

impl Operation<'_> {
    /// What became of it; one without an answer is an `Info`.
    pub fn outcome(&self) -> Kind {
        self.completed.map_or(Kind::Info, |event| event.kind)
    }

    /// What was asked, with the answer if it is an `Ok`.
    pub fn op(&self) -> &Op {
        match self.completed {
            Some(event) if event.kind == Kind::Ok => &event.op,
            Some(_) | None => &self.invoked.op,
        }
    }

    /// The index of its question.
    pub fn begun(&self) -> u64 {
        self.invoked.index
    }

    /// The index of the answer after which it has surely taken place: `None` unless it is an `Ok`.
    pub fn acknowledged(&self) -> Option<u64> {
        self.completed.filter(|event| event.kind == Kind::Ok).map(|event| event.index)
    }

    /// The index of its last event, by which stories call it.
    pub fn index(&self) -> u64 {
        self.completed.map_or(self.invoked.index, |event| event.index)
    }

    /// When it took place by the clock of the system, if the client was told.
    pub fn commit_ts(&self) -> Option<u64> {
        self.completed.and_then(|event| event.commit_ts)
    }
}

/// Why something is not a history.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Malformed {
    /// Events are not in the order of their indices.
    #[error("event {0} does not come after the one before it")]
    Unordered(u64),
    /// Time runs backwards.
    #[error("event {0} is earlier than the one before it")]
    Earlier(u64),
    /// A process asks while it waits for an answer.
    #[error("event {index}: process {process} has an operation outstanding")]
    Outstanding {
        /// The event.
        index: u64,
        /// Who asks.
        process: u32,
    },
    /// A process asks again after an `Info`.
    #[error("event {index}: process {process} was retired by an info")]
    Retired {
        /// The event.
        index: u64,
        /// Who asks.
        process: u32,
    },
    /// An answer to nobody.
    #[error("event {index}: process {process} has asked nothing")]
    NotInvoked {
        /// The event.
        index: u64,
        /// Who is answered.
        process: u32,
    },
    /// An answer to another question.
    #[error("event {index} answers something else than was asked")]
    AnotherOp {
        /// The answer.
        index: u64,
    },
}

impl History {
    /// Whether it is one: processes ask one thing at a time, and are answered what they asked.
    ///
    /// # Errors
    /// The first event that cannot be.
    pub fn validate(&self) -> Result<(), Malformed> {
        /// What a process may do next.
        enum State<'h> {
            Idle,
            Waiting(&'h Op),
            Retired,
        }
        let mut processes: HashMap<u32, State> = HashMap::new();
        let mut before: Option<&Event> = None;
        for event in &self.events {
            let (index, process) = (event.index, event.process);
            if before.is_some_and(|before| before.index >= index) {
                return Err(Malformed::Unordered(index));
            }
            if before.is_some_and(|before| before.time_nanos > event.time_nanos) {
                return Err(Malformed::Earlier(index));
            }
            before = Some(event);
            let state = processes.entry(process).or_insert(State::Idle);
            *state = match (&*state, event.kind) {
                (State::Idle, Kind::Invoke) => State::Waiting(&event.op),
                (State::Waiting(_), Kind::Invoke) => return Err(Malformed::Outstanding { index, process }),
                (State::Retired, Kind::Invoke) => return Err(Malformed::Retired { index, process }),
                (State::Waiting(asked), _) if !event.op.answers(asked) => {
                    return Err(Malformed::AnotherOp { index });
                }
                (State::Waiting(_), Kind::Ok | Kind::Fail) => State::Idle,
                (State::Waiting(_), Kind::Info) => State::Retired,
                (State::Idle | State::Retired, Kind::Ok | Kind::Fail | Kind::Info) => {
                    return Err(Malformed::NotInvoked { index, process });
                }
            };
        }
        Ok(())
    }

    /// The history that it would be if clients that were never told how their operation ended had waited until
    /// this event, and been told just before it. The endings are by process; events are numbered anew.
    pub fn settled(&self, endings: &BTreeMap<u32, Ending>, until: u64) -> History {
        let (before, after) = self.events.split_at(self.events.partition_point(|event| event.index < until));
        let time_nanos = before.last().map_or(0, |event| event.time_nanos);
        let told = self.unanswered().filter_map(|operation| {
            let process = operation.invoked.process;
            let (kind, op, commit_ts) = match endings.get(&process)? {
                Ending::Committed { answer, commit_ts } => (Kind::Ok, answer.clone(), Some(*commit_ts)),
                Ending::Aborted => (Kind::Fail, operation.invoked.op.clone(), None),
            };
            Some(Event { index: until, time_nanos, process, kind, op, error: None, commit_ts })
        });
        let is_left = |event: &&Event| event.kind != Kind::Info || !endings.contains_key(&event.process);
        let before = before.iter().filter(is_left).cloned();
        let events = before.chain(told).chain(after.iter().filter(is_left).cloned()).zip(0..);
        History { events: events.map(|(event, index)| Event { index, ..event }).collect() }
    }

    /// The history with an answer to every question: whoever still waits when it ends is told that the end is
    /// unknown. That means the same, and there are checkers that cannot do without.
    pub fn closed(mut self) -> History {
        let waiting =
            |operation: &Operation| operation.completed.is_none().then(|| operation.invoked.clone());
        let waiting: Vec<Event> = self.operations().iter().filter_map(waiting).collect();
        let (mut index, time_nanos) =
            self.events.last().map_or((0, 0), |event| (event.index, event.time_nanos));
        for asked in waiting {
            index += 1;
            let error = Some("the history ends before its answer".to_owned());
            self.events.push(Event { index, time_nanos, kind: Kind::Info, error, ..asked });
        }
        self
    }

    /// Operations whose clients were not told how they ended.
    pub fn unanswered(&self) -> impl Iterator<Item = Operation<'_>> {
        self.operations().into_iter().filter(|operation| operation.outcome() == Kind::Info)
    }

    /// Questions with their answers, in the order of the questions.
    pub fn operations(&self) -> Vec<Operation<'_>> {
        let mut operations: Vec<Operation> = Vec::with_capacity(self.events.len() / 2);
        let mut waiting: HashMap<u32, usize> = HashMap::new();
        for event in &self.events {
            match event.kind {
                Kind::Invoke => {
                    waiting.insert(event.process, operations.len());
                    operations.push(Operation { invoked: event, completed: None });
                }
                Kind::Ok | Kind::Fail | Kind::Info => {
                    if let Some(asked) = waiting.remove(&event.process) {
                        operations[asked].completed = Some(event);
                    }
                }
            }
        }
        operations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(index: u64, process: u32, kind: Kind, op: Op) -> Event {
        Event { index, time_nanos: index, process, kind, op, error: None, commit_ts: None }
    }

    fn verdict(events: &[(u32, Kind, Op)]) -> Result<(), Malformed> {
        let events = events.iter().enumerate();
        let events =
            events.map(|(index, (process, kind, op))| event(index as u64, *process, *kind, op.clone()));
        History { events: events.collect() }.validate()
    }

    const ADD: Op = Op::Add(3);
    const READ: Op = Op::Elements(None);

    #[test]
    fn processes_may_take_turns_and_be_left_without_an_answer() {
        let answer = Op::Elements(Some([3].into()));
        let events =
            [(0, Kind::Invoke, ADD), (1, Kind::Invoke, READ), (0, Kind::Ok, ADD), (1, Kind::Ok, answer)];
        assert_eq!(verdict(&events), Ok(()));
        assert_eq!(verdict(&events[..2]), Ok(()));
    }

    #[test]
    fn a_process_asks_one_thing_at_a_time() {
        let events = [(0, Kind::Invoke, ADD), (0, Kind::Invoke, READ)];
        assert_eq!(verdict(&events), Err(Malformed::Outstanding { index: 1, process: 0 }));
    }

    #[test]
    fn an_answer_needs_a_question() {
        assert_eq!(verdict(&[(7, Kind::Fail, ADD)]), Err(Malformed::NotInvoked { index: 0, process: 7 }));
    }

    #[test]
    fn a_process_is_retired_by_an_info_but_not_by_a_fail() {
        let again = |kind| verdict(&[(0, Kind::Invoke, ADD), (0, kind, ADD), (0, Kind::Invoke, ADD)]);
        assert_eq!(again(Kind::Info), Err(Malformed::Retired { index: 2, process: 0 }));
        assert_eq!(again(Kind::Fail), Ok(()));
    }

    #[test]
    fn an_answer_must_be_to_the_question() {
        let answered = |asked, answer| verdict(&[(0, Kind::Invoke, asked), (0, Kind::Ok, answer)]);
        let another = Err(Malformed::AnotherOp { index: 1 });
        assert_eq!(answered(ADD, READ), another);
        assert_eq!(answered(ADD, Op::Add(4)), another);
        let asked = Op::Txn(vec![Mop::Append { key: 1, value: 2 }, Mop::Read { key: 3, list: None }]);
        let other_key = vec![Mop::Append { key: 1, value: 2 }, Mop::Read { key: 4, list: None }];
        assert_eq!(answered(asked.clone(), Op::Txn(other_key)), another);
        let answer = vec![Mop::Append { key: 1, value: 2 }, Mop::Read { key: 3, list: Some(vec![5]) }];
        assert_eq!(answered(asked, Op::Txn(answer)), Ok(()));
    }

    #[test]
    fn who_was_not_told_can_be_told_in_the_end() {
        let read = Op::Elements(Some([3].into()));
        let asked = [
            (0, Kind::Invoke, ADD),
            (0, Kind::Info, ADD),
            (1, Kind::Invoke, Op::Add(4)),
            (2, Kind::Invoke, Op::Add(5)),
            (2, Kind::Info, Op::Add(5)),
            (3, Kind::Invoke, READ),
            (3, Kind::Ok, read),
        ];
        let events = asked.into_iter().enumerate();
        let events = events.map(|(index, (process, kind, op))| event(index as u64, process, kind, op));
        let history = History { events: events.collect() };
        let told = Ending::Committed { answer: ADD, commit_ts: 7 };
        let endings = BTreeMap::from([(0, told), (1, Ending::Aborted)]);
        let settled = history.settled(&endings, 5);
        assert_eq!(settled.validate(), Ok(()));
        let outcomes: Vec<_> = settled
            .operations()
            .iter()
            .map(|operation| (operation.outcome(), operation.commit_ts()))
            .collect();
        let expected = [(Kind::Ok, Some(7)), (Kind::Fail, None), (Kind::Info, None), (Kind::Ok, None)];
        assert_eq!(outcomes, expected);
        // Both are told before the last read begins.
        assert_eq!(settled.operations()[0].acknowledged(), Some(4));
        assert_eq!(settled.operations()[3].begun(), 6);
        assert_eq!(history.settled(&BTreeMap::new(), 5), history);

        // Who still waits in the end is answered in either order.
        let closed = history.clone().closed();
        assert_eq!(closed.validate(), Ok(()));
        assert_eq!(closed.events[..7], history.events);
        assert!(closed.operations().iter().all(|operation| operation.completed.is_some()));
        assert_eq!(closed.operations()[1].outcome(), Kind::Info);
        assert_eq!(closed.settled(&endings, 5), settled);
        assert_eq!(closed.clone().closed(), closed);
    }

    #[test]
    fn order_and_time_never_run_backwards() {
        let mut history =
            History { events: vec![event(5, 0, Kind::Invoke, ADD), event(5, 0, Kind::Ok, ADD)] };
        assert_eq!(history.validate(), Err(Malformed::Unordered(5)));
        history.events[1].index = 6;
        history.events[1].time_nanos = 4;
        assert_eq!(history.validate(), Err(Malformed::Earlier(6)));
    }
}
