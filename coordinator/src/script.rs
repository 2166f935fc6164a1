//! Golden scripts: what the coordinators' leader does, step by step, as text that a person can read.
//!
//! A script drives the pure state and leader over a modelled store. Each line is a step; what it
//! leads to is printed under it. Timestamps count from 1, since the scripts' clock begins at 0.
//!
//! ```text
//! cluster shards=2              a cluster whose shards are placed
//! lead                          a new leader; what is proposed before it was applied is void after it
//! apply                         what is proposed is committed, in order
//! lose                          what is proposed never enters the log; told is who wanted to forget
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

mod golden;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::time::{Duration, Instant};

use expect_test::Expect;
use troth_protocol::message::coordinator::{Commit, Resolution};
use troth_protocol::message::shard::{Decision as Word, Vote};
use troth_protocol::message::txn::{Cause, Outcome, Part, Work, Write};
use troth_protocol::{
    ClientId, Epoch, FolderId, Key, Node, NodeId, ParticipantId, ShardId, Timestamp, TxnId,
};

use crate::command::{Command, Decision, Founding, Output, Record, Settings};
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
                Mutation::Progress => {}
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
        let settings = Settings { cluster: Default::default(), shards: self.shards, replicas: 1, nodes: 1 };
        let founding = Founding { settings, ..Founding::default() };
        let Output::Leads(epoch) = self.apply(Command::Lead { leader: Default::default(), founding }) else {
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
                    incarnation: Default::default(),
                };
                self.apply(Command::Register { node, folder: FolderId(1), previous: None, progress: 0 });
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
                for command in lost {
                    if let Command::Forget { txns } = command
                        && self.leader.is_some()
                    {
                        self.tell(Event::NotForgotten { txns });
                    }
                }
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
                self.state = State::restore(self.disk.marks, self.disk.catalog.clone(), [], unfinished);
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
