//! Golden scripts: what a shard does, step by step, as text that a person can read.
//!
//! A script drives the pure state and leader over a modelled store. Each line is a step; what it
//! leads to is printed under it. `restart` forgets everything that is not in the store.
//!
//! ```text
//! lead fresh=F                        a leader begins, with a fresh timestamp
//! prepare T10 epoch=1 floor=20 r:a@0 w:b=1 d:c s:x-y     reads a, writes b, deletes c, scans x to y
//! finish epoch=1 T10 commit@30        or: abort
//! one T10 floor=20 …                  a transaction of this shard alone: chosen, proposed, applied
//! propose-one T10 floor=20 …          … chosen and proposed only; `apply` applies what is proposed
//! fence T10                           whoever asks how it ended makes sure that it has
//! read #1 at=25 a b   |   scan #2 at=25 a-z
//! time +20ms   |   answer epoch=1 T10=committed@30 (aborted, in-flight)   |   no-answer T10
//! retire T50                          snapshots before 50 are not read any more
//! ```

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::time::{Duration, Instant};

use expect_test::{Expect, expect};
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
            "prepare" => {
                let id = txn(words[1]);
                let prepare = Prepare {
                    txn: id,
                    epoch: Epoch(number(&words, "epoch")),
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
                if let Some(leader) = &mut self.leader {
                    leader.begin_finish(&decisions);
                }
                self.apply(Command::Finish { epoch: Epoch(number(&words, "epoch")), decisions });
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

#[test]
fn two_phases_lock_write_and_release() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 r:a@0 w:b=1
         read #1 at=11 b
         read #2 at=20 b
         finish epoch=1 T10 commit@15
         read #3 at=14 b
         finish epoch=1 T10 commit@15",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 r:a@0 w:b=1
                vote yes, above 5
            read #1 at=11 b
                #1 sees b has none
            read #2 at=20 b
                #2 waits for T10, which writes b
            finish epoch=1 T10 commit@15
                version b@15 = 1
                #2 sees b@15=1
                locks: 2 before, 0 after
            read #3 at=14 b
                #3 sees b has none
            finish epoch=1 T10 commit@15
                locks: 0 before, 0 after
        "#]],
    );
}

#[test]
fn an_abort_leaves_nothing_and_may_come_before_its_prepare() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 w:b=1
         finish epoch=1 T10 abort
         read #1 at=20 b
         finish epoch=1 T11 abort
         prepare T11 epoch=1 floor=21 w:b=2
         time +1000ms
         answer epoch=1 T11=aborted
         read #2 at=30 b",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 w:b=1
                vote yes, above 5
            finish epoch=1 T10 abort
                locks: 1 before, 0 after
            read #1 at=20 b
                #1 sees b has none
            finish epoch=1 T11 abort
                locks: 0 before, 0 after
            prepare T11 epoch=1 floor=21 w:b=2
                vote yes, above 20
            time +1000ms
                ask the coordinator about T11
            answer epoch=1 T11=aborted
                propose finish, epoch 1
            read #2 at=30 b
                #2 sees b has none
        "#]],
    );
}

#[test]
fn locks_are_shared_for_reads_and_exclusive_for_writes_and_ranges() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 r:a@0 s:m-p w:z=1
         prepare T11 epoch=1 floor=12 r:a@0 w:y=1
         prepare T12 epoch=1 floor=12 w:a=2
         prepare T13 epoch=1 floor=12 w:n=2
         prepare T14 epoch=1 floor=12 r:z@0
         prepare T15 epoch=1 floor=12 s:x-
         finish epoch=1 T10 commit@20
         prepare T16 epoch=1 floor=21 w:n=3",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 r:a@0 s:m-p w:z=1
                vote yes, above 5
            prepare T11 epoch=1 floor=12 r:a@0 w:y=1
                vote yes, above 5
            prepare T12 epoch=1 floor=12 w:a=2
                vote no: key a is locked by transaction 10
            prepare T13 epoch=1 floor=12 w:n=2
                vote no: key n is locked by transaction 10
            prepare T14 epoch=1 floor=12 r:z@0
                vote no: key z is locked by transaction 10
            prepare T15 epoch=1 floor=12 s:x-
                vote no: key y is locked by transaction 11
            finish epoch=1 T10 commit@20
                version z@20 = 1
                locks: 4 before, 2 after
            prepare T16 epoch=1 floor=21 w:n=3
                vote yes, above 20
        "#]],
    );
}

#[test]
fn what_was_read_must_still_be_true() {
    check(
        "lead fresh=5
         one T10 floor=10 w:a=1 w:b=1
         prepare T20 epoch=1 floor=21 r:a@11 w:c=1
         finish epoch=1 T20 commit@22
         one T23 floor=23 w:a=2
         prepare T21 epoch=1 floor=24 r:a@11 w:d=1
         prepare T22 epoch=1 floor=24 s:a-c w:e=1
         prepare T30 epoch=1 floor=31 s:a-c r:a@24 w:e=1",
        expect![[r#"
            lead fresh=5
            one T10 floor=10 w:a=1 w:b=1
                chosen: 11
                version a@11 = 1
                version b@11 = 1
                committed at 11
            prepare T20 epoch=1 floor=21 r:a@11 w:c=1
                vote yes, above 11
            finish epoch=1 T20 commit@22
                version c@22 = 1
                locks: 2 before, 0 after
            one T23 floor=23 w:a=2
                chosen: 24
                version a@24 = 2
                committed at 24
            prepare T21 epoch=1 floor=24 r:a@11 w:d=1
                vote no: key a was written at 24, after it was read
            prepare T22 epoch=1 floor=24 s:a-c w:e=1
                vote no: key a in range [a, c) was written at 24, after the range was read
            prepare T30 epoch=1 floor=31 s:a-c r:a@24 w:e=1
                vote yes, above 24
        "#]],
    );
}

#[test]
fn a_one_shard_transaction_commits_after_all_that_was_read_and_readers_of_later_moments_wait_for_it() {
    check(
        "lead fresh=5
         read #1 at=50 a
         propose-one T40 floor=41 w:a=1
         read #2 at=50 a
         read #3 at=60 a
         scan #4 at=60 a-b
         apply
         one T42 floor=42 r:a@51 w:a=2
         one T42 floor=42 r:a@51 w:a=2
         prepare T61 epoch=1 floor=62 w:q=1",
        expect![[r#"
            lead fresh=5
            read #1 at=50 a
                #1 sees a has none
            propose-one T40 floor=41 w:a=1
                chosen: 51
            read #2 at=50 a
                #2 sees a has none
            read #3 at=60 a
                #3 waits for T40, which writes a
            scan #4 at=60 a-b
                #4 waits for T40, which writes a
            apply
                version a@51 = 1
                #3 sees a@51=1
                #4 sees a@51=1
                committed at 51
            one T42 floor=42 r:a@51 w:a=2
                chosen: 61
                version a@61 = 2
                committed at 61
            one T42 floor=42 r:a@51 w:a=2
                chosen: 62
                committed at 61
            prepare T61 epoch=1 floor=62 w:q=1
                vote yes, above 61
        "#]],
    );
}

#[test]
fn a_one_shard_transaction_that_was_refused_or_asked_about_can_never_commit() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 w:a=1
         one T11 floor=12 w:a=2
         finish epoch=1 T10 abort
         one T11 floor=13 w:a=2
         fence T14
         one T14 floor=15 w:b=1
         one T16 floor=16 w:b=2
         fence T16",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 w:a=1
                vote yes, above 5
            one T11 floor=12 w:a=2
                hopeless: key a is locked by transaction 10
                aborted: key a is locked by transaction 10
            finish epoch=1 T10 abort
                locks: 1 before, 0 after
            one T11 floor=13 w:a=2
                chosen: 14
                aborted: key a is locked by transaction 10
            fence T14
                aborted: its outcome was asked for before it was decided
            one T14 floor=15 w:b=1
                chosen: 16
                aborted: its outcome was asked for before it was decided
            one T16 floor=16 w:b=2
                chosen: 17
                version b@17 = 2
                committed at 17
            fence T16
                committed at 17
        "#]],
    );
}

#[test]
fn what_an_earlier_leader_proposed_is_void() {
    check(
        "lead fresh=5
         propose-one T10 floor=10 w:a=1
         lead fresh=90
         apply
         one T91 floor=91 w:a=2",
        expect![[r#"
            lead fresh=5
            propose-one T10 floor=10 w:a=1
                chosen: 11
            lead fresh=90
            apply
                aborted: a newer leader, of the coordinators or of a shard, has taken over
            one T91 floor=91 w:a=2
                chosen: 92
                version a@92 = 2
                committed at 92
        "#]],
    );
}

#[test]
fn a_promise_survives_a_restart_and_is_resolved() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 r:a@0 w:b=1
         restart
         lead fresh=40
         read #1 at=41 b
         prepare T42 epoch=1 floor=43 w:b=2
         time +20ms
         no-answer T10
         time +20ms
         answer epoch=1 T10=in-flight
         time +20ms
         answer epoch=2 T10=committed@15",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 r:a@0 w:b=1
                vote yes, above 5
            restart
                1 prepared, 2 locks
            lead fresh=40
            read #1 at=41 b
                #1 waits for T10, which writes b
            prepare T42 epoch=1 floor=43 w:b=2
                vote no: key b is locked by transaction 10
            time +20ms
                ask the coordinator about T10
            no-answer T10
            time +20ms
                ask the coordinator about T10
            answer epoch=1 T10=in-flight
            time +20ms
                ask the coordinator about T10
            answer epoch=2 T10=committed@15
                propose finish, epoch 2
                version b@15 = 1
                #1 sees b@15=1
        "#]],
    );
}

#[test]
fn a_deposed_coordinator_is_not_obeyed() {
    check(
        "lead fresh=5
         prepare T10 epoch=1 floor=12 w:a=1
         prepare T10 epoch=2 floor=14 w:a=1
         finish epoch=1 T10 abort
         prepare T11 epoch=1 floor=14 w:b=1
         finish epoch=1 T10 commit@20",
        expect![[r#"
            lead fresh=5
            prepare T10 epoch=1 floor=12 w:a=1
                vote yes, above 5
            prepare T10 epoch=2 floor=14 w:a=1
                vote yes, above 5
            finish epoch=1 T10 abort
                locks: 1 before, 1 after
            prepare T11 epoch=1 floor=14 w:b=1
                vote no: a newer leader, of the coordinators or of a shard, has taken over
            finish epoch=1 T10 commit@20
                version a@20 = 1
                locks: 1 before, 0 after
        "#]],
    );
}

#[test]
fn nothing_below_the_safe_point_is_promised_and_it_waits_for_the_prepared() {
    check(
        "lead fresh=5
         one T10 floor=10 w:a=1
         prepare T20 epoch=1 floor=21 w:b=1
         retire T30
         finish epoch=1 T20 commit@25
         retire T30
         prepare T29 epoch=1 floor=31 w:c=1
         one T28 floor=31 w:c=1
         prepare T31 epoch=1 floor=32 r:a@0 w:c=1",
        expect![[r#"
            lead fresh=5
            one T10 floor=10 w:a=1
                chosen: 11
                version a@11 = 1
                committed at 11
            prepare T20 epoch=1 floor=21 w:b=1
                vote yes, above 11
            retire T30
                safe point 20
            finish epoch=1 T20 commit@25
                version b@25 = 1
                locks: 1 before, 0 after
            retire T30
                safe point 30
            prepare T29 epoch=1 floor=31 w:c=1
                vote no: the transaction is older than transactions may be
            one T28 floor=31 w:c=1
                chosen: 32
                Expired
            prepare T31 epoch=1 floor=32 r:a@0 w:c=1
                vote yes, above 25
        "#]],
    );
}
