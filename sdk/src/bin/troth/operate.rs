//! `troth switchover` and `troth txn list|show|resolve`: what an operator does to a running cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use troth_protocol::{NodeId, ParticipantId, Reject, ShardId, Timestamp, TxnId};
use troth_sdk::operator::{Decision, InDoubt, Operator, OperatorError, Peer, TxnAtShard, TxnKnowledge};

use crate::Context;
use crate::output::{EXIT_FAILED, EXIT_USAGE, Failure, line, table};

/// Options of `troth switchover`.
#[derive(Args)]
pub struct SwitchoverOptions {
    /// The coordinator that shall lead; the one that is fit best if left out.
    #[arg(long, value_name = "ID")]
    to: Option<u64>,
}

/// Hands the leadership of the coordinators to another one. Transactions wait, and none fails.
pub async fn switchover(context: &Context, options: SwitchoverOptions) -> Result<(), Failure> {
    let operator = Operator::new(&context.admin_config()?)?;
    operator.refresh_map().await;
    let began = Instant::now();
    let switched = operator.switchover(options.to.map(NodeId), context.timeout).await;
    operator.close().await;
    let to = switched.map_err(|error| match error {
        OperatorError::Refused { reject: Reject::Overloaded { .. }, .. } => {
            Failure::new(EXIT_FAILED, "called off: not everything under way has ended in time; try again")
        }
        error => error.into(),
    })?;
    if let Some(wanted) = options.to.filter(|wanted| *wanted != to.0) {
        let reason =
            format!("coordinator {to} leads now, since {wanted} could not take over in time; try again");
        return Err(Failure::new(EXIT_FAILED, reason));
    }
    let took = began.elapsed().as_millis() as u64;
    if context.json {
        line(json!({ "leader": to.0, "took_ms": took }))
    } else {
        line(format!("coordinator {to} leads now; handing over took {took} ms"))
    }
}

/// What `troth txn` does besides running scripts.
#[derive(Subcommand)]
pub enum TxnCommand {
    /// Show transactions that are prepared and not finished.
    List(ListOptions),
    /// Show what every server knows of a transaction.
    Show(ShowOptions),
    /// End a transaction by hand, when the coordinators are lost for good.
    Resolve(ResolveOptions),
}

/// Options of `troth txn list`.
#[derive(Args)]
pub struct ListOptions {
    /// Those that are in doubt: today there are no others to show.
    #[arg(long)]
    in_doubt: bool,
    #[command(flatten)]
    whom: Whom,
}

/// Options of `troth txn show`.
#[derive(Args)]
pub struct ShowOptions {
    /// The transaction.
    id: TxnId,
    #[command(flatten)]
    whom: Whom,
}

/// Options of `troth txn resolve`.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("decision").required(true))]
pub struct ResolveOptions {
    /// The transaction.
    id: TxnId,
    /// It shall have happened.
    #[arg(long, group = "decision")]
    commit: bool,
    /// It shall not have happened.
    #[arg(long, group = "decision")]
    abort: bool,
    /// Do it. Without this, only what would be done is shown.
    #[arg(long)]
    yes: bool,
    /// Who says so, and why: for the audit record.
    #[arg(long, default_value = "")]
    note: String,
    #[command(flatten)]
    whom: Whom,
}

/// Which participants are asked.
#[derive(Args)]
struct Whom {
    /// A participant; repeat it for all of them. Needed when no coordinator can name them.
    #[arg(long = "participant", value_name = "HOST:PORT")]
    participants: Vec<String>,
}

/// An operator who knows the participants, from a coordinator or from the command line.
async fn operator(context: &Context, whom: &Whom) -> Result<Operator, Failure> {
    let named = whom.participants.iter().map(|address| Peer::participant(address)).collect();
    let operator = Operator::new(&context.admin_config()?)?.with_participants(named);
    if operator.participants().is_empty() {
        operator.refresh_map().await;
    }
    if operator.participants().is_empty() {
        let reason = "no coordinator names the participants; name them with --participant";
        return Err(Failure::new(EXIT_USAGE, reason));
    }
    Ok(operator)
}

/// `troth txn list|show|resolve`.
pub async fn txn(context: &Context, command: TxnCommand) -> Result<(), Failure> {
    let whom = match &command {
        TxnCommand::List(options) => &options.whom,
        TxnCommand::Show(options) => &options.whom,
        TxnCommand::Resolve(options) => &options.whom,
    };
    let operator = operator(context, whom).await?;
    let result = match &command {
        TxnCommand::List(_) => list(context, &operator).await,
        TxnCommand::Show(options) => show(context, &operator, options.id).await,
        TxnCommand::Resolve(options) => resolve(context, &operator, options).await,
    };
    operator.close().await;
    result
}

async fn list(context: &Context, operator: &Operator) -> Result<(), Failure> {
    let mut by_txn: BTreeMap<TxnId, Vec<InDoubt>> = BTreeMap::new();
    for record in operator.in_doubt().await? {
        by_txn.entry(record.txn).or_default().push(record);
    }
    let summary = |records: &[InDoubt]| {
        let sum = |of: fn(&InDoubt) -> u64| records.iter().map(of).sum::<u64>();
        let age = records.iter().map(|record| record.age_ms).max().unwrap_or(0);
        let promised: BTreeSet<ShardId> = records.iter().map(|record| record.shard).collect();
        let all: Vec<String> = records
            .first()
            .map_or(Vec::new(), |record| record.participants.iter().map(ToString::to_string).collect());
        (age, all, promised, sum(|record| record.locks), sum(|record| record.waiting))
    };
    if context.json {
        for (txn, records) in &by_txn {
            let (age, all, promised, locks, waiting) = summary(records);
            let promised: Vec<u16> = promised.iter().map(|shard| shard.0).collect();
            line(json!({
                "txn": txn.to_string(), "age_ms": age, "participants": all, "prepared_at": promised,
                "locks": locks, "waiting": waiting,
            }))?;
        }
        return Ok(());
    }
    if by_txn.is_empty() {
        return line("nothing is in doubt");
    }
    let rows: Vec<Vec<String>> = by_txn
        .iter()
        .map(|(txn, records)| {
            let (age, all, promised, locks, waiting) = summary(records);
            let promised: Vec<String> = promised.iter().map(ToString::to_string).collect();
            vec![
                txn.to_string(),
                format!("{:.1} s", age as f64 / 1e3),
                all.join(", "),
                promised.join(", "),
                locks.to_string(),
                waiting.to_string(),
            ]
        })
        .collect();
    table(&["transaction", "age", "participants", "prepared at shards", "locks", "reads waiting"], &rows)
}

fn decision_text(decision: Decision) -> String {
    match decision {
        Decision::Commit { commit_ts } => format!("committed at {commit_ts}"),
        Decision::Abort => "never commits".into(),
    }
}

async fn show(context: &Context, operator: &Operator, txn: TxnId) -> Result<(), Failure> {
    let known = operator.knowledge(txn).await;
    if context.json {
        let server = |(peer, known): &(Peer, TxnKnowledge)| {
            json!({
                "server": peer.to_string(),
                "decision": known.decision.map(decision_text),
                "shards": known.shards.iter().map(json_shard).collect::<Vec<_>>(),
                "moments": known.moments.iter().map(|moment| json!({
                    "at_ms": moment.at_ms, "shard": moment.shard.map(|shard| shard.0), "what": moment.what,
                })).collect::<Vec<_>>(),
                "audit": known.audit,
            })
        };
        return line(
            json!({ "txn": txn.to_string(), "servers": known.iter().map(server).collect::<Vec<_>>() }),
        );
    }
    let mut moments = Vec::new();
    for (peer, known) in &known {
        if let Some(decision) = known.decision {
            line(format!("{peer}: {}", decision_text(decision)))?;
        }
        for at in &known.shards {
            let role = if at.leads { "leader" } else { "replica" };
            let state = match (&at.prepared, at.ended) {
                (Some(_), _) => "prepared".to_owned(),
                (None, Some(decision)) => decision_text(decision),
                (None, None) => "unknown".to_owned(),
            };
            line(format!("{peer}: shard {} ({role}): {state}", at.shard))?;
        }
        for record in &known.audit {
            line(format!("{peer}: ended by hand: {record}"))?;
        }
        moments.extend(known.moments.iter().map(|moment| (moment.at_ms, peer, moment)));
    }
    moments.sort_by_key(|(at_ms, ..)| *at_ms);
    let began = txn.start.millis();
    let rows: Vec<Vec<String>> = moments
        .iter()
        .map(|(at_ms, peer, moment)| {
            let shard = moment.shard.map_or(String::new(), |shard| format!("shard {shard}"));
            vec![
                format!("{:+} ms", *at_ms as i64 - began as i64),
                peer.to_string(),
                shard,
                moment.what.clone(),
            ]
        })
        .collect();
    if rows.is_empty() && known.iter().all(|(_, known)| known.decision.is_none() && known.shards.is_empty()) {
        return Err(Failure::new(EXIT_FAILED, format!("no server knows of {txn}")));
    }
    table(&["since begin", "server", "", "what"], &rows)
}

fn json_shard(at: &TxnAtShard) -> Value {
    json!({
        "shard": at.shard.0, "leads": at.leads, "prepared": at.prepared.is_some(),
        "ended": at.ended.map(decision_text),
    })
}

/// What is known of a transaction, taken together.
struct Evidence {
    /// Everybody who votes.
    participants: Vec<ShardId>,
    /// Where it is prepared, and who leads there.
    prepared: BTreeMap<ShardId, Peer>,
    /// Where a replica has something of it on record, and no leader has.
    leaderless: BTreeSet<ShardId>,
    /// If it is committed somewhere, when.
    committed: Option<Timestamp>,
    /// Where it is certain that it never commits.
    aborted: Option<String>,
    /// Participants that have it neither prepared nor on record.
    blank: Vec<ShardId>,
    /// The earliest moment at which it could commit.
    next: Timestamp,
}

fn weigh(known: &[(Peer, TxnKnowledge)]) -> Evidence {
    let mut evidence = Evidence {
        participants: Vec::new(),
        prepared: BTreeMap::new(),
        leaderless: BTreeSet::new(),
        committed: None,
        aborted: None,
        blank: Vec::new(),
        next: Timestamp::ZERO,
    };
    let (mut on_record, mut led): (BTreeSet<ShardId>, BTreeSet<ShardId>) = Default::default();
    for (peer, known) in known {
        match known.decision {
            Some(Decision::Commit { commit_ts }) => evidence.committed = Some(commit_ts),
            Some(Decision::Abort) => evidence.aborted = Some(peer.to_string()),
            None => {}
        }
        for at in &known.shards {
            evidence.next = evidence.next.max(at.above.next());
            if at.leads {
                led.insert(at.shard);
            }
            if let Some(participants) = &at.prepared {
                evidence.participants = participants.iter().filter_map(ParticipantId::shard).collect();
                if at.leads {
                    evidence.prepared.insert(at.shard, peer.clone());
                }
                on_record.insert(at.shard);
            }
            match at.ended {
                Some(Decision::Commit { commit_ts }) => {
                    evidence.committed = Some(commit_ts);
                    on_record.insert(at.shard);
                }
                Some(Decision::Abort) => evidence.aborted = Some(format!("shard {} at {peer}", at.shard)),
                None => {}
            }
        }
    }
    evidence.leaderless = on_record.difference(&led).copied().collect();
    evidence.blank =
        evidence.participants.iter().filter(|shard| !on_record.contains(shard)).copied().collect();
    evidence
}

async fn resolve(context: &Context, operator: &Operator, options: &ResolveOptions) -> Result<(), Failure> {
    let refuse = |reason: String| Err(Failure::new(EXIT_FAILED, reason));
    let txn = options.id;
    for peer in &operator.coordinators() {
        if operator.coordinator(peer).await.is_ok_and(|status| status.leader.is_some()) {
            return refuse(format!(
                "{peer} answers, and the coordinators have a leader: they settle {txn} by themselves; \
                 `troth txn show {txn}` shows what is known"
            ));
        }
    }
    let known = operator.knowledge(txn).await;
    let answering: BTreeSet<&Peer> = known.iter().map(|(peer, _)| peer).collect();
    if let Some(silent) = operator.participants().into_iter().find(|peer| !answering.contains(peer)) {
        return refuse(format!("{silent} does not answer, and may know how {txn} ended; start it first"));
    }
    let evidence = weigh(&known);
    if let Some(shard) = evidence.leaderless.first() {
        return refuse(format!("shard {shard} has no leader that knows of {txn}; try again when it has one"));
    }
    if evidence.prepared.is_empty() {
        return refuse(format!("{txn} is prepared nowhere: there is nothing to end"));
    }
    let decision = if options.commit {
        if let Some(place) = &evidence.aborted {
            return refuse(format!("{txn} never commits, as {place} has on record"));
        }
        if evidence.committed.is_none() && !evidence.blank.is_empty() {
            let blank: Vec<String> = evidence.blank.iter().map(ToString::to_string).collect();
            return refuse(format!(
                "{txn} was not promised by shards {}: it cannot commit",
                blank.join(", ")
            ));
        }
        Decision::Commit { commit_ts: evidence.committed.unwrap_or(evidence.next) }
    } else {
        if let Some(commit_ts) = evidence.committed {
            return refuse(format!("{txn} is committed at {commit_ts}, as a server has on record"));
        }
        Decision::Abort
    };
    let shards: Vec<u16> = evidence.prepared.keys().map(|shard| shard.0).collect();
    if options.yes {
        for (shard, peer) in &evidence.prepared {
            operator.resolve(peer, *shard, txn, decision, &options.note).await?;
        }
    }
    if context.json {
        return line(json!({
            "txn": txn.to_string(), "decision": decision_text(decision), "shards": shards, "done": options.yes,
        }));
    }
    let shards: Vec<String> = shards.iter().map(ToString::to_string).collect();
    let (what, hint) = if options.yes { ("ended", "") } else { ("would end", "; --yes does it") };
    line(format!("{what} {txn} at shards {}: {}{hint}", shards.join(", "), decision_text(decision)))
}
