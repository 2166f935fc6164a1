//! Golden scripts: what a shard does, step by step, as text that a person can read.
//!
//! A script drives the pure state and leader over a modelled store. Each line is a step; what it
//! leads to is printed under it. `restart` forgets everything that is not in the store.
//!
//! ```text
//! lead fresh=F                        a leader begins, with a fresh timestamp
//! prepare T10 epoch=1 floor=20 r:a@0 w:b=1 d:c s:x-y     reads a, writes b, deletes c, scans x to y
//! late-prepare T10 …                  the same, proposed before the last step and applied now
//! finish epoch=1 T10 commit@30        or: abort
//! one T10 floor=20 …                  a transaction of this shard alone: chosen, proposed, applied
//! propose-one T10 floor=20 …          … chosen and proposed only; `apply` applies what is proposed
//! fence T10                           whoever asks how it ended makes sure that it has
//! read #1 at=25 a b   |   scan #2 at=25 a-z
//! time +20ms   |   answer epoch=1 T10=committed@30 (aborted, in-flight)   |   no-answer T10
//! retire T50                          snapshots before 50 are not read any more
//! ```

mod golden;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::time::{Duration, Instant};

use expect_test::Expect;
use troth_protocol::message::coordinator::Resolution;
use troth_protocol::message::shard::{Decision, Prepare};
use troth_protocol::message::txn::{Outcome, RangeCheck, ReadCheck, Work, Write};
use troth_protocol::{ClientId, Epoch, Key, KeyRange, ParticipantId, ShardId, Timestamp, TxnId};

use super::command::{Command, Output};
use super::leader::{Effect, Event, Leader, Target};
use super::state::{Marks, Mutation, Prepared, State, View};

/// What would be on disk.
#[derive(Default)]
struct Disk {
    versions: BTreeMap<(Key, Reverse<Timestamp>), Option<String>>,
    prepared: BTreeMap<TxnId, Prepared>,
    outcomes: BTreeMap<TxnId, Outcome>,
    marks: Marks,
}

impl View for Disk {
    fn newest(&self, key: &Key) -> io::Result<Timestamp> {
        let mut versions = self.versions.range((key.clone(), Reverse(Timestamp::MAX))..);
        Ok(versions.next().filter(|((found, _), _)| found == key).map_or(Timestamp::ZERO, |((_, v), _)| v.0))
    }

    fn newer_in_range(&self, range: &KeyRange, after: Timestamp) -> io::Result<Option<(Key, Timestamp)>> {
        let mut versions = self.versions.keys();
        let found = versions.find(|(key, version)| version.0 > after && range.contains(key));
        Ok(found.map(|(key, version)| (key.clone(), version.0)))
    }

    fn outcome(&self, txn: TxnId) -> io::Result<Option<Outcome>> {
        Ok(self.outcomes.get(&txn).cloned())
    }
}

struct Stage {
    disk: Disk,
    state: State,
    leader: Option<Leader>,
    proposed: Vec<Command>,
    now: Instant,
    index: u64,
    reads: BTreeMap<u64, (Timestamp, Target)>,
    trace: String,
}

fn txn(text: &str) -> TxnId {
    let number = text.strip_prefix('T').and_then(|number| number.parse().ok());
    TxnId { start: Timestamp(number.expect("a transaction like T10")), client: ClientId(0) }
}

fn key(text: &str) -> Key {
    Key::copy_from(text.as_bytes())
}

/// `name=value` anywhere in the line.
fn number(words: &[&str], name: &str) -> u64 {
    let value = words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{words:?} needs {name}="))
}

fn work(words: &[&str], snapshot: Timestamp) -> Work {
    let mut work = Work::default();
    for word in words {
        match word.split_once(':') {
            Some(("r", read)) => {
                let (name, version) = read.split_once('@').expect("r:key@version");
                let version = Timestamp(version.parse().expect("a version"));
                work.reads.push(ReadCheck { key: key(name), version });
            }
            Some(("w", write)) => {
                let (name, value) = write.split_once('=').expect("w:key=value");
                work.writes.push(Write { key: key(name), value: Some(value.as_bytes().to_vec().into()) });
            }
            Some(("d", name)) => work.writes.push(Write { key: key(name), value: None }),
            Some(("s", range)) => work.ranges.push(RangeCheck { range: key_range(range), snapshot }),
            _ => {}
        }
    }
    work
}

fn key_range(text: &str) -> KeyRange {
    let (start, end) = text.split_once('-').expect("start-end");
    KeyRange::new(key(start), (!end.is_empty()).then(|| key(end)))
}

fn show_txn(txn: &TxnId) -> String {
    format!("T{}", txn.start)
}

fn show(text: impl ToString) -> String {
    text.to_string().replace("-0000000000000000", "")
}

impl Stage {
    fn new() -> Stage {
        Stage {
            disk: Disk::default(),
            state: State::default(),
            leader: None,
            proposed: Vec::new(),
            now: Instant::now(),
            index: 0,
            reads: BTreeMap::new(),
            trace: String::new(),
        }
    }

    fn say(&mut self, text: impl std::fmt::Display) {
        writeln!(self.trace, "    {text}").expect("strings grow");
    }

    fn apply(&mut self, command: Command) -> Output {
        self.index += 1;
        let ended_by_word = match &command {
            Command::CommitOnePhase { txn, .. } | Command::Fence { txn, .. } => Some(*txn),
            _ => None,
        };
        let mut mutations = Vec::new();
        let output =
            self.state.apply(self.index, command, &self.disk, &mut mutations).expect("a modelled disk");
        let (mut prepared, mut ended) = (Vec::new(), Vec::from_iter(ended_by_word));
        for mutation in mutations {
            match mutation {
                Mutation::Version { write, version } => {
                    let value = write.value.map(|value| String::from_utf8_lossy(&value).into_owned());
                    let shown = value.as_deref().unwrap_or("(deleted)").to_owned();
                    self.say(format_args!("version {}@{version} = {shown}", write.key));
                    self.disk.versions.insert((write.key, Reverse(version)), value);
                }
                Mutation::Prepared(record) => {
                    prepared.push(record.txn);
                    self.disk.prepared.insert(record.txn, record);
                }
                Mutation::Unprepared(txn) => {
                    ended.push(txn);
                    self.disk.prepared.remove(&txn);
                }
                Mutation::Outcome(txn, outcome) => drop(self.disk.outcomes.insert(txn, outcome)),
                Mutation::OutcomesBefore(before) => self.disk.outcomes.retain(|txn, _| txn.start >= before),
            }
        }
        self.disk.marks = *self.state.marks();
        self.tell(Event::Applied { prepared, ended });
        output
    }

    fn tell(&mut self, event: Event) {
        if let Some(leader) = &mut self.leader {
            leader.handle_event(self.now, event, &self.state);
        }
        self.effects();
    }

    fn effects(&mut self) {
        while let Some(effect) = self.leader.as_mut().and_then(Leader::poll_effect) {
            match effect {
                Effect::Serve { id } => self.serve(id),
                Effect::Refuse { id } => self.say(format_args!("#{id} refused: too many wait")),
                Effect::Ask { txns } => {
                    let txns: Vec<String> = txns.iter().map(show_txn).collect();
                    self.say(format_args!("ask the coordinator about {}", txns.join(" ")));
                }
                Effect::Finish { epoch, decisions } => {
                    self.say(format_args!("propose finish, epoch {epoch}"));
                    let txns = decisions.iter().map(|(txn, _)| *txn).collect();
                    self.apply(Command::Finish { epoch, decisions });
                    self.tell(Event::NotResolved { txns });
                }
            }
        }
    }

    fn serve(&mut self, id: u64) {
        let (at, target) = self.reads[&id].clone();
        let mut keys: Vec<&Key> = self.disk.versions.keys().map(|(key, _)| key).collect();
        keys.dedup();
        let wanted: Vec<Key> = match &target {
            Target::Keys(keys) => keys.clone(),
            Target::Range(range) => keys.into_iter().filter(|key| range.contains(key)).cloned().collect(),
        };
        let found: Vec<String> = wanted
            .iter()
            .map(|key| {
                let mut versions = self.disk.versions.range((key.clone(), Reverse(at))..);
                match versions.next() {
                    Some(((found, version), Some(value))) if found == key => {
                        format!("{key}@{}={value}", version.0)
                    }
                    _ => format!("{key} has none"),
                }
            })
            .collect();
        self.say(format_args!("#{id} sees {}", found.join(", ")));
    }

    fn read(&mut self, id: u64, at: Timestamp, target: Target) {
        self.reads.insert(id, (at, target.clone()));
        self.tell(Event::Read { id, at, target });
        let blocker = self.leader.as_ref().and_then(|leader| leader.blocker(id)).cloned();
        if let Some(conflict) = blocker {
            self.say(format_args!(
                "#{id} waits for {}, which writes {}",
                show_txn(&conflict.by),
                conflict.key
            ));
        }
    }

    fn begin_one(&mut self, words: &[&str]) -> bool {
        let id = txn(words[1]);
        let work = work(words, id.start);
        let floor = Timestamp(number(words, "floor"));
        let leader = self.leader.as_mut().expect("somebody leads");
        match leader.begin_one_phase(&self.state, id, floor, &work) {
            Ok(commit_ts) => {
                let lead = leader.lead();
                self.say(format_args!("chosen: {commit_ts}"));
                self.proposed.push(Command::CommitOnePhase { lead, txn: id, commit_ts, work });
                true
            }
            Err(cause) => {
                self.say(format_args!("hopeless: {}", show(&cause)));
                self.proposed.push(Command::Fence { txn: id, cause });
                true
            }
        }
    }

    fn apply_proposed(&mut self) {
        for command in std::mem::take(&mut self.proposed) {
            match self.apply(command) {
                Output::Outcome(Outcome::Committed { commit_ts }) => {
                    self.say(format_args!("committed at {commit_ts}"))
                }
                Output::Outcome(Outcome::Aborted { cause }) => {
                    self.say(format_args!("aborted: {}", show(cause)))
                }
                other => self.say(format_args!("{other:?}")),
            }
        }
    }

    fn step(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            "lead" => {
                self.apply(Command::Lead);
                let fresh = Timestamp(number(&words, "fresh"));
                self.leader = Some(Leader::new(self.index, fresh, self.now, &self.state));
                self.effects();
            }
            "prepare" | "late-prepare" => {
                let id = txn(words[1]);
                let epoch = Epoch(number(&words, "epoch"));
                let refused = self.leader.as_ref().is_some_and(|leader| leader.is_aborted_early(id, epoch));
                if words[0] == "prepare" && refused {
                    return self.say(format_args!("vote no: aborted before"));
                }
                let prepare = Prepare {
                    txn: id,
                    epoch,
                    floor: Timestamp(number(&words, "floor")),
                    participants: vec![ParticipantId::Shard(ShardId(0)), ParticipantId::Shard(ShardId(1))],
                    work: work(&words, id.start),
                };
                match self.apply(Command::Prepare(prepare)) {
                    Output::Vote(Ok(())) => {
                        let above = self.leader.as_ref().map(|leader| leader.vote_above(&self.state));
                        self.say(format_args!("vote yes, above {}", above.expect("somebody leads")));
                    }
                    Output::Vote(Err(cause)) => self.say(format_args!("vote no: {}", show(cause))),
                    other => panic!("{other:?}"),
                }
            }
            "finish" => {
                let decision = match words[3].strip_prefix("commit@") {
                    Some(at) => Decision::Commit { commit_ts: Timestamp(at.parse().expect("a timestamp")) },
                    None => Decision::Abort,
                };
                let decisions = vec![(txn(words[2]), decision)];
                let held = self.state.locks().len();
                let epoch = Epoch(number(&words, "epoch"));
                if let Some(leader) = &mut self.leader {
                    leader.note_early_aborts(&self.state, epoch, &decisions);
                    leader.begin_finish(&decisions);
                }
                self.apply(Command::Finish { epoch, decisions });
                let left = self.state.locks().len();
                self.say(format_args!("locks: {held} before, {left} after"));
            }
            "one" => {
                self.begin_one(&words);
                self.apply_proposed();
            }
            "propose-one" => drop(self.begin_one(&words)),
            "apply" => self.apply_proposed(),
            "fence" => {
                let cause = troth_protocol::message::txn::Cause::Settled;
                self.proposed.push(Command::Fence { txn: txn(words[1]), cause });
                self.apply_proposed();
            }
            "read" => {
                let id = words[1].strip_prefix('#').and_then(|id| id.parse().ok()).expect("#id");
                let target = Target::Keys(words[3..].iter().map(|name| key(name)).collect());
                self.read(id, Timestamp(number(&words, "at")), target);
            }
            "scan" => {
                let id = words[1].strip_prefix('#').and_then(|id| id.parse().ok()).expect("#id");
                self.read(id, Timestamp(number(&words, "at")), Target::Range(key_range(words[3])));
            }
            "time" => {
                let millis = words[1].trim_start_matches('+').trim_end_matches("ms").parse().expect("+20ms");
                self.now += Duration::from_millis(millis);
                let due = self.leader.as_ref().and_then(Leader::poll_timeout);
                if due.is_some_and(|due| due <= self.now) {
                    self.leader.as_mut().expect("it has a timeout").handle_timeout(self.now);
                }
                self.effects();
            }
            "answer" => {
                let resolution = |word: &&str| {
                    let (id, said) = word.split_once('=')?;
                    let resolution = match said.split_once('@') {
                        Some(("committed", at)) => {
                            Resolution::Committed { commit_ts: Timestamp(at.parse().expect("a timestamp")) }
                        }
                        _ if said == "aborted" => Resolution::Aborted,
                        _ if said == "in-flight" => Resolution::InFlight,
                        _ => return None,
                    };
                    Some((txn(id), resolution))
                };
                let resolutions = words[2..].iter().filter_map(resolution).collect();
                self.tell(Event::Resolved { epoch: Epoch(number(&words, "epoch")), resolutions });
            }
            "no-answer" => self.tell(Event::NotResolved { txns: vec![txn(words[1])] }),
            "retire" => {
                let before = txn(words[1]).start;
                self.apply(Command::Retire { safe_point: before, outcomes_before: before });
                let safe_point = self.state.marks().safe_point;
                self.say(format_args!("safe point {safe_point}"));
            }
            "restart" => {
                self.leader = None;
                self.proposed.clear();
                self.state = State::restore(self.disk.marks, self.disk.prepared.values().cloned());
                let locks = self.state.locks().len();
                self.say(format_args!("{} prepared, {locks} locks", self.disk.prepared.len()));
            }
            other => panic!("no such step: {other}"),
        }
    }
}

fn check(script: &str, expected: Expect) {
    let mut stage = Stage::new();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        writeln!(stage.trace, "{line}").expect("strings grow");
        stage.step(line);
    }
    expected.assert_eq(&stage.trace);
}
