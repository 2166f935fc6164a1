//! What is explored: who does what, and what may go wrong.

use troth_protocol::{Key, KeyRange, ShardId};

use crate::sim::client::Action as Act;

/// A case to explore.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// Replicas of each of the two shards: 1, or 2 and a witness.
    pub(super) replicas: u8,
    /// What each client does, one transaction after another.
    pub(super) clients: Vec<Vec<Vec<Act>>>,
    /// Clients have begun and read already when the exploration begins.
    pub(super) from_commit: bool,
    pub(super) budget: Budget,
    /// Whether something is aborted on some path; else the case explores nothing of interest.
    pub(super) aborts: bool,
    /// It takes hours, or more memory than there is: whoever explores it stops at some point.
    pub endless: bool,
}

/// What may go wrong, and how often in one path.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Budget {
    /// Another coordinator is elected while the first one lives.
    pub(super) elections: u8,
    /// The same at a shard.
    pub(super) shard_elections: u8,
    /// A server dies and comes back.
    pub(super) crashes: u8,
    /// A message is lost.
    pub(super) losses: u8,
    /// A message comes twice.
    pub(super) doubles: u8,
    /// A timer comes before what it waits for.
    pub(super) early: u8,
}

fn key(shard: u16) -> Key {
    let name = |number: u32| Key::copy_from(format!("k{number}").as_bytes());
    (0..).map(name).find(|key| key.shard(2) == ShardId(shard)).expect("keys do not end")
}

/// All cases, small ones first.
pub fn cases() -> Vec<Case> {
    let (a, b) = (|| key(0), || key(1));
    let both = |number| vec![Act::Append(a(), number), Act::Append(b(), number)];
    let blind = |number| vec![Act::Put(a(), number), Act::Put(b(), number)];
    let case = |name, about, budget| Case {
        name,
        about,
        replicas: 1,
        clients: vec![vec![both(1)]],
        from_commit: true,
        budget,
        aborts: true,
        endless: false,
    };
    let one = |name, about, budget| Case {
        clients: vec![vec![vec![Act::Append(a(), 1)]]],
        ..case(name, about, budget)
    };
    let endless = |name, about, budget| Case { endless: true, ..case(name, about, budget) };
    let none = Budget::default();
    vec![
        Case {
            clients: vec![vec![blind(1)], vec![vec![Act::GetMany(vec![a(), b()])], vec![Act::Put(a(), 2)]]],
            from_commit: false,
            aborts: false,
            ..case("reader", "one writes two shards, another one reads both, then writes one", none)
        },
        case("lost", "one transaction on two shards; a message is lost", Budget { losses: 1, ..none }),
        Case {
            aborts: false,
            ..case(
                "double",
                "one transaction on two shards; a message comes twice",
                Budget { doubles: 1, ..none },
            )
        },
        case("early", "one transaction on two shards; a timer comes early", Budget { early: 1, ..none }),
        one(
            "one-deposed",
            "one transaction on one shard; the coordinator is deposed while it lives",
            Budget { elections: 1, ..none },
        ),
        one(
            "one-crash",
            "one transaction on one shard; any server dies and comes back",
            Budget { crashes: 1, ..none },
        ),
        case(
            "crash",
            "one transaction on two shards; any server dies and comes back",
            Budget { crashes: 1, ..none },
        ),
        case(
            "deposed",
            "one transaction on two shards; the coordinator is deposed while it lives",
            Budget { elections: 1, ..none },
        ),
        Case {
            clients: vec![vec![blind(1)], vec![both(2)]],
            ..case("conflict", "two transactions write the same two keys", none)
        },
        Case {
            replicas: 2,
            clients: vec![
                vec![vec![Act::Put(a(), 1)]],
                vec![vec![Act::Scan(KeyRange::new(a(), Some(Key::copy_from(b"z")))), Act::Get(a())]],
            ],
            from_commit: false,
            aborts: false,
            ..case(
                "shard-deposed",
                "a shard is deposed while it lives; one writes, one reads",
                Budget { shard_elections: 1, ..none },
            )
        },
        case(
            "lost-deposed",
            "one transaction on two shards; the coordinator is deposed, and a message is lost",
            Budget { elections: 1, losses: 1, ..none },
        ),
        endless(
            "deposed-twice",
            "one transaction on two shards; leadership goes to the other coordinator and back",
            Budget { elections: 2, ..none },
        ),
        endless(
            "crash-deposed",
            "one transaction on two shards; a server dies, and a coordinator is deposed",
            Budget { crashes: 1, elections: 1, ..none },
        ),
    ]
}
