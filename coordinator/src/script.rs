//! Golden scripts: what the coordinators' leader does, step by step, as text that a person can read.
//!
//! A script drives the pure state and leader over a modelled store. Each line is a step; what it
//! leads to is printed under it. Timestamps count from 1, since the scripts' clock begins at 0.
//!
//! ```text
//! cluster shards=2              a cluster whose shards are placed
//! lead                          a new leader; what is proposed before it was applied is void after it
//! apply                         what is proposed is committed, in order
//! lose                          what is proposed never enters the log
//! now                           hands out a timestamp
//! commit #1 T1 epoch=1 s0 s1    a first submission with work at these shards; `again` for a resubmission
//! outcome #2 T1 s0 s1           how did it end? (without shards: the asker does not know them)
//! vote T1 s0 yes above=0        or: no, none (it could not be asked in time)
//! one T1 s0 committed@9         a shard tells: or aborted, expired, unknown
//! delivered s0                  a shard has applied the oldest message to it; `failed s0`: it did not
//! page s0 T1 T2                 a shard names what is prepared
//! resolve T1 T2                 a shard asks
//! time +100ms
//! restart                       forgets everything that is not in the store
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::time::{Duration, Instant};

use expect_test::{Expect, expect};
use troth_protocol::message::coordinator::{Commit, Resolution};
use troth_protocol::message::shard::{Decision as Word, Vote};
use troth_protocol::message::txn::{Cause, Outcome, Part, Work, Write};
use troth_protocol::{
    ClientId, Epoch, FolderId, Key, Node, NodeId, ParticipantId, ShardId, Timestamp, TxnId,
};

use crate::command::{Command, Decision, Output, Record, Settings};
use crate::leader::{Answer, Effect, Event, Leader, Limits, Now, OnePhase};
use crate::state::{Catalog, Marks, Mutation, State, View};
use crate::steward::Rules;

/// What would be on disk.
#[derive(Default)]
struct Disk {
    records: BTreeMap<TxnId, Record>,
    unfinished: BTreeMap<TxnId, Decision>,
    catalog: Option<Catalog>,
    marks: Marks,
}

impl View for Disk {
    fn record(&self, txn: TxnId) -> io::Result<Option<Record>> {
        Ok(self.records.get(&txn).copied())
    }
}

type Message = (ShardId, Vec<(TxnId, Word)>);

struct Stage {
    disk: Disk,
    state: State,
    leader: Option<Leader>,
    limits: Limits,
    proposed: Vec<Command>,
    sent: Vec<Message>,
    start: Instant,
    elapsed: Duration,
    index: u64,
    shards: u16,
    trace: String,
}

fn txn(text: &str) -> TxnId {
    let number = text.strip_prefix('T').and_then(|number| number.parse().ok());
    TxnId { start: Timestamp(number.expect("a transaction like T1")), client: ClientId(0) }
}

fn shard(text: &str) -> ShardId {
    ShardId(text.strip_prefix('s').and_then(|number| number.parse().ok()).expect("a shard like s0"))
}

/// A key, of this shard if it is one.
fn a_key(shard: Option<ShardId>, shards: u16) -> Key {
    let mut keys = (0..).map(|number| Key::copy_from(format!("k{number}").as_bytes()));
    let fits = |key: &Key| shard.is_none_or(|shard| key.shard(shards) == shard);
    keys.find(fits).expect("keys do not end")
}

fn participants(words: &[&str]) -> Vec<ParticipantId> {
    let shards = words.iter().filter(|word| word.starts_with('s'));
    shards.map(|word| ParticipantId::Shard(shard(word))).collect()
}

fn number(words: &[&str], name: &str) -> Option<u64> {
    let value = words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.map(|value| value.parse().expect("a number"))
}

fn id(text: &str) -> u64 {
    text.strip_prefix('#').and_then(|id| id.parse().ok()).expect("a request like #1")
}

fn show_txns<'a>(txns: impl IntoIterator<Item = &'a TxnId>) -> String {
    txns.into_iter().map(|txn| format!("T{}", txn.start)).collect::<Vec<_>>().join(" ")
}

fn show_word((txn, word): &(TxnId, Word)) -> String {
    match word {
        Word::Commit { commit_ts } => format!("T{} commit@{commit_ts}", txn.start),
        Word::Abort => format!("T{} abort", txn.start),
    }
}

impl Stage {
    fn new() -> Stage {
        Stage {
            disk: Disk::default(),
            state: State::default(),
            leader: None,
            limits: Limits { in_flight_max: 3, ..Limits::default() },
            proposed: Vec::new(),
            sent: Vec::new(),
            start: Instant::now(),
            elapsed: Duration::ZERO,
            index: 0,
            shards: 0,
            trace: String::new(),
        }
    }

    fn say(&mut self, text: impl std::fmt::Display) {
        let text = text.to_string().replace("-0000000000000000", "");
        writeln!(self.trace, "    {text}").expect("strings grow");
    }

    fn now(&self) -> Now {
        // The wall clock stands still, so that timestamps stay small.
        Now { instant: self.start + self.elapsed, millis: 0 }
    }

    fn apply(&mut self, command: Command) -> Output {
        self.index += 1;
        let named: Vec<TxnId> = match &command {
            Command::Decide { decisions, .. } => decisions.iter().map(|decision| decision.txn).collect(),
            Command::Refuse { txns } => txns.clone(),
            _ => Vec::new(),
        };
        let is_ceiling = matches!(command, Command::Ceiling { .. });
        let mut mutations = Vec::new();
        let output =
            self.state.apply(self.index, command, &self.disk, &mut mutations).expect("a modelled disk");
        for mutation in mutations {
            match mutation {
                Mutation::Record(txn, record) => drop(self.disk.records.insert(txn, record)),
                Mutation::Unfinished(decision) => drop(self.disk.unfinished.insert(decision.txn, decision)),
                Mutation::Finished(txn) => drop(self.disk.unfinished.remove(&txn)),
                Mutation::RecordsBefore(before) => self.disk.records.retain(|txn, _| txn.start >= before),
                Mutation::Catalog => self.disk.catalog = self.state.catalog().cloned(),
            }
        }
        self.disk.marks = *self.state.marks();
        if let Output::Verdicts(verdicts) = &output {
            let verdicts = named.into_iter().zip(verdicts.iter().copied()).collect();
            self.tell(Event::Applied { verdicts });
        }
        if is_ceiling {
            self.tell(Event::Ceiling(self.state.marks().ceiling));
        }
        output
    }

    fn tell(&mut self, event: Event) {
        let now = self.now();
        if let Some(leader) = &mut self.leader {
            leader.handle_event(now, event, &self.state, &self.disk);
        }
        self.effects();
    }

    fn effects(&mut self) {
        let epoch = self.leader.as_ref().map(Leader::epoch).unwrap_or_default();
        while let Some(effect) = self.leader.as_mut().and_then(Leader::poll_effect) {
            match effect {
                Effect::Prepare { shard, prepare, .. } => self.say(format_args!(
                    "prepare T{} at s{shard}, epoch {}, floor {}",
                    prepare.txn.start, prepare.epoch, prepare.floor
                )),
                Effect::CommitOnePhase { shard, commit, .. } => {
                    self.say(format_args!(
                        "let s{shard} commit T{}, floor {}",
                        commit.txn.start, commit.floor
                    ));
                }
                Effect::AskShard { shard, txn } => {
                    self.say(format_args!("ask s{shard} about T{}", txn.start))
                }
                Effect::Decide(decisions) => {
                    for decision in &decisions {
                        self.say(format_args!(
                            "propose commit of T{} at {}",
                            decision.txn.start, decision.commit_ts
                        ));
                    }
                    self.proposed.push(Command::Decide { epoch, decisions });
                }
                Effect::Refuse(txns) => {
                    self.say(format_args!("propose that {} never commits", show_txns(&txns)));
                    self.proposed.push(Command::Refuse { txns });
                }
                Effect::Forget(txns) => {
                    self.say(format_args!("propose to forget {}", show_txns(&txns)));
                    self.proposed.push(Command::Forget { txns });
                }
                Effect::Retire(before) => self.proposed.push(Command::Retire { outcomes_before: before }),
                Effect::Ceiling(ceiling) => self.proposed.push(Command::Ceiling { epoch, ceiling }),
                Effect::Place(plan) => self.say(format_args!("propose {plan:?}")),
                Effect::Finish { shard, decisions } => {
                    let words: Vec<String> = decisions.iter().map(show_word).collect();
                    self.say(format_args!("finish at s{shard}: {}", words.join(", ")));
                    self.sent.push((shard, decisions));
                }
                Effect::Collect { shard, after } => match after {
                    None => self.say(format_args!("collect from s{shard}")),
                    Some(after) => self.say(format_args!("collect from s{shard} after T{}", after.start)),
                },
                Effect::Answer { id, answer } => match answer {
                    Answer::Ended(Outcome::Committed { commit_ts }) => {
                        self.say(format_args!("#{id}: committed at {commit_ts}"));
                    }
                    Answer::Ended(Outcome::Aborted { cause }) => {
                        self.say(format_args!("#{id}: aborted: {cause}"))
                    }
                    Answer::Expired => self.say(format_args!("#{id}: expired")),
                    Answer::Rejected(reject) => self.say(format_args!("#{id}: refused: {reject}")),
                },
            }
        }
    }

    fn lead(&mut self) {
        let coordinators = vec![Node {
            id: NodeId(1),
            address: "c:1".into(),
            zone: String::new(),
            weight: 0,
            state: Default::default(),
        }];
        let settings = Settings { cluster: Default::default(), shards: self.shards, replicas: 1, nodes: 1 };
        let Output::Leads(epoch) = self.apply(Command::Lead { coordinators, settings }) else {
            panic!("a lead leads to an epoch");
        };
        self.sent.clear();
        self.leader = Some(Leader::new(epoch, self.limits, Rules::default(), self.now(), &self.state));
        self.say(format_args!("epoch {epoch}"));
        self.effects();
    }

    fn deliver(&mut self, to: ShardId, ok: bool) {
        let at = self.sent.iter().position(|(shard, _)| *shard == to).expect("a message to that shard");
        let (shard, decisions) = self.sent.remove(at);
        self.tell(Event::Delivered { shard, decisions, ok });
    }

    fn step(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            "cluster" => {
                self.shards = number(&words, "shards").expect("shards=") as u16;
                self.lead();
                let node = Node {
                    id: NodeId(1),
                    address: "p:1".into(),
                    zone: String::new(),
                    weight: 1,
                    state: Default::default(),
                };
                self.apply(Command::Register { node, folder: FolderId(1) });
            }
            "lead" => self.lead(),
            "apply" => {
                for command in std::mem::take(&mut self.proposed) {
                    self.apply(command);
                }
            }
            "lose" => {
                let lost = std::mem::take(&mut self.proposed);
                self.say(format_args!("{} proposals lost", lost.len()));
            }
            "now" => {
                let now = self.now();
                let first = self.leader.as_mut().expect("somebody leads").timestamps(now, 1, None);
                self.effects();
                self.say(first.map_or("not yet".into(), |(first, _)| first.to_string()));
            }
            "commit" => {
                let work = |participant: &ParticipantId| {
                    let shard = participant.shard().filter(|shard| shard.0 < self.shards);
                    let write = Write { key: a_key(shard, self.shards), value: None };
                    Work { writes: vec![write], ..Work::default() }
                };
                let part = |participant| Part { work: work(&participant), participant };
                let parts = participants(&words).into_iter().map(part).collect();
                let commit = Commit {
                    txn: txn(words[2]),
                    epoch: Epoch(number(&words, "epoch").expect("epoch=")),
                    resubmission: words.contains(&"again"),
                    parts,
                };
                let deadline = self.now().instant + Duration::from_secs(5);
                self.tell(Event::Commit { id: id(words[1]), commit, deadline });
            }
            "outcome" => {
                let participants = participants(&words);
                self.tell(Event::Outcome { id: id(words[1]), txn: txn(words[2]), participants });
            }
            "vote" => {
                let vote = match words[3] {
                    "yes" => Some(Vote::Yes { above: Timestamp(number(&words, "above").unwrap_or(0)) }),
                    "no" => Some(Vote::No { cause: Cause::Locked { key: "k".into(), by: txn("T999") } }),
                    _ => None,
                };
                let participant = ParticipantId::Shard(shard(words[2]));
                self.tell(Event::Voted { txn: txn(words[1]), participant, vote });
            }
            "one" => {
                let answer = match words[3].split_once('@') {
                    Some((_, at)) => OnePhase::Ended(Outcome::Committed {
                        commit_ts: Timestamp(at.parse().expect("a timestamp")),
                    }),
                    None if words[3] == "aborted" => {
                        OnePhase::Ended(Outcome::Aborted { cause: Cause::Settled })
                    }
                    None if words[3] == "expired" => OnePhase::Expired,
                    None => OnePhase::Unknown,
                };
                self.tell(Event::OnePhase { txn: txn(words[1]), shard: shard(words[2]), answer });
            }
            "delivered" => self.deliver(shard(words[1]), true),
            "failed" => self.deliver(shard(words[1]), false),
            "page" => {
                let more = words.contains(&"more");
                let txns = words[2..].iter().filter(|word| **word != "more").map(|word| txn(word)).collect();
                self.tell(Event::Page { shard: shard(words[1]), txns, more });
            }
            "resolve" => {
                let txns: Vec<TxnId> = words[1..].iter().map(|word| txn(word)).collect();
                let leader = self.leader.as_mut().expect("somebody leads");
                let said = leader.resolve(&txns, &self.state, &self.disk).expect("a modelled disk");
                for (txn, resolution) in txns.iter().zip(said) {
                    match resolution {
                        Resolution::Committed { commit_ts } => {
                            self.say(format_args!("T{}: committed at {commit_ts}", txn.start));
                        }
                        Resolution::Aborted => self.say(format_args!("T{}: aborted", txn.start)),
                        Resolution::InFlight => self.say(format_args!("T{}: in flight", txn.start)),
                    }
                }
            }
            "time" => {
                let millis = words[1].trim_start_matches('+').trim_end_matches("ms").parse().expect("+20ms");
                self.elapsed += Duration::from_millis(millis);
                let now = self.now();
                self.leader.as_mut().expect("somebody leads").handle_timeout(now, &self.state);
                self.effects();
            }
            "restart" => {
                self.leader = None;
                self.proposed.clear();
                self.sent.clear();
                let unfinished: Vec<Decision> = self.disk.unfinished.values().cloned().collect();
                self.state = State::restore(self.disk.marks, self.disk.catalog.clone(), unfinished);
                let (count, ceiling) = (self.state.unfinished().len(), self.state.marks().ceiling);
                self.say(format_args!("{count} unfinished, ceiling {ceiling}"));
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
fn a_commit_is_answered_when_it_is_decided_and_forgotten_when_all_have_applied_it() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s1 yes above=7
         vote T1 s0 yes above=3
         resolve T1
         apply
         resolve T1
         now
         delivered s0
         failed s1
         delivered s1
         time +100ms
         apply
         outcome #2 T1 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s1 yes above=7
            vote T1 s0 yes above=3
                propose commit of T1 at 8
            resolve T1
                T1: in flight
            apply
                #1: committed at 8
                finish at s0: T1 commit@8
                finish at s1: T1 commit@8
            resolve T1
                T1: committed at 8
            now
                9
            delivered s0
            failed s1
                finish at s1: T1 commit@8
            delivered s1
            time +100ms
                propose to forget T1
            apply
            outcome #2 T1 s0 s1
                #2: committed at 8
        "#]],
    );
}

#[test]
fn one_no_aborts_at_once_and_nothing_is_logged() {
    check(
        "cluster shards=3
         apply
         now
         commit #1 T1 epoch=1 s0 s1 s2
         vote T1 s0 yes
         vote T1 s1 no
         vote T1 s2 yes
         commit #2 T1 epoch=1 s0 s1 s2
         resolve T1
         failed s0
         delivered s1",
        expect![[r#"
            cluster shards=3
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1 s2
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
                prepare T1 at s2, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 no
                #1: aborted: key k is locked by transaction 999
                finish at s0: T1 abort
                finish at s1: T1 abort
                finish at s2: T1 abort
            vote T1 s2 yes
            commit #2 T1 epoch=1 s0 s1 s2
                #2: aborted: its outcome was asked for before it was decided
            resolve T1
                T1: aborted
            failed s0
            delivered s1
        "#]],
    );
}

#[test]
fn votes_that_do_not_come_in_time_abort() {
    check(
        "cluster shards=2
         apply
         now
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         time +4900ms
         time +100ms
         commit #2 T2 epoch=1 s0 s1
         vote T2 s0 none",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            now
                2
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 2
                prepare T1 at s1, epoch 1, floor 2
            vote T1 s0 yes
            time +4900ms
            time +100ms
                #1: aborted: shard 1 did not vote before the deadline
                finish at s0: T1 abort
                finish at s1: T1 abort
            commit #2 T2 epoch=1 s0 s1
                prepare T2 at s0, epoch 1, floor 2
                prepare T2 at s1, epoch 1, floor 2
            vote T2 s0 none
                #2: aborted: shard 0 did not vote before the deadline
                finish at s0: T2 abort
                finish at s1: T2 abort
        "#]],
    );
}

#[test]
fn a_resubmission_is_never_started() {
    check(
        "cluster shards=2
         apply
         now
         now
         commit #1 T1 epoch=1 s0 s1 again
         commit #2 T1 epoch=1 s0 s1
         apply
         commit #3 T1 epoch=1 s0 s1
         commit #4 T2 epoch=1 s0 s1
         commit #5 T2 epoch=1 s0 s1 again
         vote T2 s0 yes
         vote T2 s1 yes
         apply
         commit #6 T2 epoch=1 s0 s1 again",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            now
                2
            commit #1 T1 epoch=1 s0 s1 again
                propose that T1 never commits
            commit #2 T1 epoch=1 s0 s1
            apply
                #1: aborted: the coordinator leader changed before the decision
                #2: aborted: the coordinator leader changed before the decision
            commit #3 T1 epoch=1 s0 s1
                #3: aborted: its outcome was asked for before it was decided
            commit #4 T2 epoch=1 s0 s1
                prepare T2 at s0, epoch 1, floor 2
                prepare T2 at s1, epoch 1, floor 2
            commit #5 T2 epoch=1 s0 s1 again
            vote T2 s0 yes
            vote T2 s1 yes
                propose commit of T2 at 3
            apply
                #4: committed at 3
                #5: committed at 3
                finish at s0: T2 commit@3
                finish at s1: T2 commit@3
            commit #6 T2 epoch=1 s0 s1 again
                #6: committed at 3
        "#]],
    );
}

#[test]
fn the_leader_dies_after_the_decision_and_the_next_one_finishes_it() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         vote T1 s1 yes
         apply
         restart
         lead
         commit #2 T1 epoch=1 s0 s1 again
         page s0 T1
         delivered s0
         delivered s1
         time +100ms
         apply
         page s1 T1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 2
            apply
                #1: committed at 2
                finish at s0: T1 commit@2
                finish at s1: T1 commit@2
            restart
                1 unfinished, ceiling 1572864000
            lead
                epoch 5
                collect from s0
                collect from s1
                finish at s0: T1 commit@2
                finish at s1: T1 commit@2
            commit #2 T1 epoch=1 s0 s1 again
                #2: committed at 2
            page s0 T1
            delivered s0
            delivered s1
            time +100ms
                propose to forget T1
            apply
            page s1 T1
                finish at s1: T1 commit@2
        "#]],
    );
}

#[test]
fn the_leader_dies_before_the_decision_and_the_next_one_aborts() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         vote T1 s1 yes
         lose
         restart
         lead
         page s0 T1 more
         page s1 T1
         page s0
         commit #2 T1 epoch=1 s0 s1 again
         commit #3 T1 epoch=4 s0 s1
         apply",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 2
            lose
                1 proposals lost
            restart
                0 unfinished, ceiling 1572864000
            lead
                epoch 4
                collect from s0
                collect from s1
            page s0 T1 more
                collect from s0 after T1
                finish at s0: T1 abort
            page s1 T1
                finish at s1: T1 abort
            page s0
            commit #2 T1 epoch=1 s0 s1 again
                propose that T1 never commits
            commit #3 T1 epoch=4 s0 s1
            apply
                #2: aborted: the coordinator leader changed before the decision
                #3: aborted: the coordinator leader changed before the decision
        "#]],
    );
}

#[test]
fn what_a_deposed_leader_proposed_is_void() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         vote T1 s1 yes
         lead
         commit #2 T1 epoch=4 s0 s1 again
         apply
         commit #3 T1 epoch=1 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 2
            lead
                epoch 4
                collect from s0
                collect from s1
            commit #2 T1 epoch=4 s0 s1 again
                propose that T1 never commits
            apply
                #2: aborted: the coordinator leader changed before the decision
            commit #3 T1 epoch=1 s0 s1
                #3: refused: the coordinator leader is in epoch 4
        "#]],
    );
}

#[test]
fn a_fence_stands_in_the_way_of_a_decision() {
    check(
        "cluster shards=2
         apply
         now
         outcome #1 T1 s0 s1
         lead
         commit #2 T1 epoch=4 s0 s1
         apply
         vote T1 s0 yes
         vote T1 s1 yes
         apply
         commit #3 T1 epoch=4 s0 s1
         restart
         lead
         apply
         commit #4 T1 epoch=8 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            outcome #1 T1 s0 s1
                propose that T1 never commits
            lead
                epoch 4
                collect from s0
                collect from s1
            commit #2 T1 epoch=4 s0 s1
                prepare T1 at s0, epoch 4, floor 1572864000
                prepare T1 at s1, epoch 4, floor 1572864000
            apply
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 1572864001
            apply
                #2: aborted: its outcome was asked for before it was decided
                finish at s0: T1 abort
                finish at s1: T1 abort
            commit #3 T1 epoch=4 s0 s1
                #3: aborted: its outcome was asked for before it was decided
            restart
                0 unfinished, ceiling 3145728000
            lead
                epoch 8
                collect from s0
                collect from s1
            apply
            commit #4 T1 epoch=8 s0 s1
                #4: aborted: its outcome was asked for before it was decided
        "#]],
    );
}

#[test]
fn a_first_submission_of_what_is_decided_gets_the_same_answer() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0 s1
         vote T1 s0 yes
         vote T1 s1 yes
         apply
         commit #2 T1 epoch=1 s0 s1
         delivered s0
         delivered s1
         time +100ms
         apply
         commit #3 T1 epoch=1 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 1
                prepare T1 at s1, epoch 1, floor 1
            vote T1 s0 yes
            vote T1 s1 yes
                propose commit of T1 at 2
            apply
                #1: committed at 2
                finish at s0: T1 commit@2
                finish at s1: T1 commit@2
            commit #2 T1 epoch=1 s0 s1
                #2: committed at 2
            delivered s0
            delivered s1
            time +100ms
                propose to forget T1
            apply
            commit #3 T1 epoch=1 s0 s1
                #3: committed at 2
        "#]],
    );
}

#[test]
fn one_shard_commits_by_itself_and_time_covers_it_before_anybody_hears() {
    check(
        "cluster shards=2
         apply
         now
         now
         commit #1 T1 epoch=1 s0
         resolve T1
         one T1 s0 committed@40
         now
         commit #2 T2 epoch=1 s1
         one T2 s1 committed@9999999999
         apply
         now",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            now
                2
            commit #1 T1 epoch=1 s0
                let s0 commit T1, floor 2
            resolve T1
                T1: in flight
            one T1 s0 committed@40
                #1: committed at 40
            now
                41
            commit #2 T2 epoch=1 s1
                let s1 commit T2, floor 41
            one T2 s1 committed@9999999999
            apply
                #2: committed at 9999999999
            now
                10000000000
        "#]],
    );
}

#[test]
fn a_shard_that_does_not_answer_is_asked_until_it_does() {
    check(
        "cluster shards=2
         apply
         now
         commit #1 T1 epoch=1 s0
         one T1 s0 unknown
         one T1 s0 unknown
         commit #2 T1 epoch=1 s0 again
         one T1 s0 aborted",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            commit #1 T1 epoch=1 s0
                let s0 commit T1, floor 1
            one T1 s0 unknown
                ask s0 about T1
            one T1 s0 unknown
                ask s0 about T1
            commit #2 T1 epoch=1 s0 again
            one T1 s0 aborted
                #1: aborted: its outcome was asked for before it was decided
                #2: aborted: its outcome was asked for before it was decided
        "#]],
    );
}

#[test]
fn a_stranger_asks_about_a_transaction_of_unknown_participants() {
    check(
        "cluster shards=2
         apply
         now
         outcome #1 T1
         apply
         one T1 s0 aborted
         one T1 s1 aborted
         commit #2 T1 epoch=1 s0
         now
         outcome #3 T2
         apply
         one T2 s1 committed@5
         outcome #4 T77
         outcome #5 T1 s9
         now
         outcome #6 T3
         apply
         one T3 s0 expired
         one T3 s1 aborted",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            outcome #1 T1
                propose that T1 never commits
            apply
                ask s0 about T1
                ask s1 about T1
            one T1 s0 aborted
            one T1 s1 aborted
                #1: aborted: its outcome was asked for before it was decided
            commit #2 T1 epoch=1 s0
                #2: aborted: its outcome was asked for before it was decided
            now
                2
            outcome #3 T2
                propose that T2 never commits
            apply
                ask s0 about T2
                ask s1 about T2
            one T2 s1 committed@5
                #3: committed at 5
            outcome #4 T77
                #4: refused: malformed request: transaction 77 begins in the future
            outcome #5 T1 s9
                #5: refused: malformed request: transaction 1 names a shard that is not
            now
                6
            outcome #6 T3
                propose that T3 never commits
            apply
                ask s0 about T3
                ask s1 about T3
            one T3 s0 expired
            one T3 s1 aborted
                #6: expired
        "#]],
    );
}

#[test]
fn too_much_and_nonsense_are_refused() {
    check(
        "cluster shards=2
         apply
         now
         now
         now
         now
         commit #1 T1 epoch=1 s0 s1
         commit #2 T2 epoch=1 s0 s1
         commit #3 T3 epoch=1 s0 s1
         commit #4 T4 epoch=1 s0 s1
         commit #5 T5 epoch=1 s0 s1
         commit #6 T4 epoch=1 s0 s9
         commit #7 T4 epoch=1 s0 s0
         commit #8 T4 epoch=1
         commit #9 T4 epoch=0 s0 s1",
        expect![[r#"
            cluster shards=2
                epoch 1
            apply
            now
                1
            now
                2
            now
                3
            now
                4
            commit #1 T1 epoch=1 s0 s1
                prepare T1 at s0, epoch 1, floor 4
                prepare T1 at s1, epoch 1, floor 4
            commit #2 T2 epoch=1 s0 s1
                prepare T2 at s0, epoch 1, floor 4
                prepare T2 at s1, epoch 1, floor 4
            commit #3 T3 epoch=1 s0 s1
                prepare T3 at s0, epoch 1, floor 4
                prepare T3 at s1, epoch 1, floor 4
            commit #4 T4 epoch=1 s0 s1
                #4: refused: overloaded; try again in 20 ms
            commit #5 T5 epoch=1 s0 s1
                #5: refused: malformed request: transaction 5 begins in the future
            commit #6 T4 epoch=1 s0 s9
                #6: refused: malformed request: transaction 4 names a shard that is not
            commit #7 T4 epoch=1 s0 s0
                #7: refused: malformed request: transaction 4 names a participant twice
            commit #8 T4 epoch=1
                #8: refused: malformed request: transaction 4 has no participants
            commit #9 T4 epoch=0 s0 s1
                #9: refused: the coordinator leader is in epoch 1
        "#]],
    );
}

#[test]
fn nobody_gets_the_time_before_the_ceiling_is_committed() {
    check(
        "cluster shards=1
         now
         apply
         now
         restart
         lead
         now
         apply
         now",
        expect![[r#"
            cluster shards=1
                epoch 1
            now
                not yet
            apply
            now
                1
            restart
                0 unfinished, ceiling 1572864000
            lead
                epoch 4
                collect from s0
            now
                not yet
            apply
            now
                1572864001
        "#]],
    );
}
