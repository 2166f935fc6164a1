//! `troth switchover` and `troth txn list|show|resolve`: what an operator does to a running cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::Instant;
use troth_protocol::message::admin::{InDoubt, Request as Ask, Response as Told, TxnAtShard, TxnKnowledge};
use troth_protocol::message::shard::Decision;
use troth_protocol::message::{Request, Response};
use troth_protocol::net::quic::{Quic, QuicConfig};
use troth_protocol::net::{Peer, Transport};
use troth_protocol::{NodeId, ParticipantId, Reject, ShardId, Timestamp, TxnId};
use troth_sdk::Client;

use crate::Context;
use crate::output::{EXIT_FAILED, EXIT_USAGE, Failure, line, table};

/// How long a server may take to answer an operator.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Options of `troth switchover`.
#[derive(Args)]
pub struct SwitchoverOptions {
    /// The coordinator that shall lead; the one that is fit best if left out.
    #[arg(long, value_name = "ID")]
    to: Option<u64>,
}

/// Hands the leadership of the coordinators to another one. Transactions wait, and none fails.
pub async fn switchover(context: &Context, options: SwitchoverOptions) -> Result<(), Failure> {
    let client = context.connect_as_admin().await?;
    client.refresh_map().await;
    let began = Instant::now();
    let switched = hand_over(&client, options.to.map(NodeId), began + context.timeout).await;
    client.close().await;
    let to = switched?;
    let took = began.elapsed().as_millis() as u64;
    if context.json {
        line(json!({ "leader": to.0, "took_ms": took }))
    } else {
        line(format!("coordinator {to} leads now; handing over took {took} ms"))
    }
}

async fn hand_over(client: &Client, to: Option<NodeId>, deadline: Instant) -> Result<NodeId, Failure> {
    let mut last = Failure::new(EXIT_FAILED, "no coordinator leads");
    for node in &client.map().coordinators {
        let peer = Peer::coordinator(&node.address);
        let request = Request::Admin(Ask::Switchover { to });
        match client.transport().call(&peer, request, deadline).await {
            Ok(Response::Admin(Told::Switched { to })) => return Ok(to),
            Ok(Response::Rejected(Reject::NotLeader { .. })) => {}
            Ok(Response::Rejected(Reject::Overloaded { .. })) => {
                let reason = "called off: not everything under way has ended in time; try again";
                return Err(Failure::new(EXIT_FAILED, reason));
            }
            Ok(Response::Rejected(reject)) => return Err(Failure::new(EXIT_FAILED, reject)),
            Ok(_) => last = Failure::new(EXIT_FAILED, "a coordinator answered something else"),
            Err(error) => last = Failure::new(EXIT_FAILED, error),
        }
    }
    Err(last)
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

/// Calls servers as an operator, also when the cluster has no coordinator to connect to.
struct Operator {
    transport: Arc<dyn Transport>,
    quic: Arc<Quic>,
    coordinators: Vec<Peer>,
    participants: Vec<Peer>,
}

impl Operator {
    async fn connect(context: &Context, whom: &Whom) -> Result<Operator, Failure> {
        let config = context.admin_config()?;
        let quic = Quic::bind(QuicConfig { bind: config.bind, ..QuicConfig::default() }, &config.credentials);
        let quic = quic.map_err(|error| Failure::new(EXIT_FAILED, error))?;
        let transport: Arc<dyn Transport> = Arc::new(quic.clone());
        let seeds: Vec<Peer> = config.coordinators.iter().map(|address| Peer::coordinator(address)).collect();
        let router = troth_protocol::routing::Router::new(transport.clone(), seeds.clone());
        let mut participants: Vec<Peer> =
            whom.participants.iter().map(|address| Peer::participant(address)).collect();
        if participants.is_empty() {
            router.refresh_map(Instant::now() + ANSWER_TIMEOUT).await;
            participants = router.map().nodes.iter().map(|node| Peer::participant(&node.address)).collect();
        }
        if participants.is_empty() {
            let reason = "no coordinator names the participants; name them with --participant";
            return Err(Failure::new(EXIT_USAGE, reason));
        }
        Ok(Operator { transport, quic, coordinators: seeds, participants })
    }

    async fn ask(&self, peer: &Peer, request: Ask) -> Result<Told, Failure> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        match self.transport.call(peer, Request::Admin(request), deadline).await {
            Ok(Response::Admin(told)) => Ok(told),
            Ok(Response::Rejected(reject)) => Err(Failure::new(EXIT_FAILED, format!("{peer}: {reject}"))),
            Ok(_) => Err(Failure::new(EXIT_FAILED, format!("{peer} answered something else"))),
            Err(error) => Err(Failure::new(EXIT_FAILED, error)),
        }
    }

    /// What every server knows of a transaction; those that do not answer are left out.
    async fn knowledge(&self, txn: TxnId) -> Vec<(Peer, TxnKnowledge)> {
        let all = self.coordinators.iter().chain(&self.participants);
        let answers = join_all(all.map(async |peer| (peer, self.ask(peer, Ask::Txn { txn }).await))).await;
        let known = |(peer, told): (&Peer, Result<Told, Failure>)| match told {
            Ok(Told::Txn(known)) => Some((peer.clone(), known)),
            Ok(_) | Err(_) => None,
        };
        answers.into_iter().filter_map(known).collect()
    }
}

/// `troth txn list|show|resolve`.
pub async fn txn(context: &Context, command: TxnCommand) -> Result<(), Failure> {
    let whom = match &command {
        TxnCommand::List(options) => &options.whom,
        TxnCommand::Show(options) => &options.whom,
        TxnCommand::Resolve(options) => &options.whom,
    };
    let operator = Operator::connect(context, whom).await?;
    let result = match &command {
        TxnCommand::List(_) => list(context, &operator).await,
        TxnCommand::Show(options) => show(context, &operator, options.id).await,
        TxnCommand::Resolve(options) => resolve(context, &operator, options).await,
    };
    operator.quic.close().await;
    result
}

async fn list(context: &Context, operator: &Operator) -> Result<(), Failure> {
    let mut by_txn: BTreeMap<TxnId, Vec<InDoubt>> = BTreeMap::new();
    for peer in &operator.participants {
        if let Told::InDoubt(found) = operator.ask(peer, Ask::InDoubt).await? {
            for record in found {
                by_txn.entry(record.txn).or_default().push(record);
            }
        }
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
    for peer in &operator.coordinators {
        if let Ok(Told::Coordinator(status)) = operator.ask(peer, Ask::Status).await
            && status.leader.is_some()
        {
            return refuse(format!(
                "{peer} answers, and the coordinators have a leader: they settle {txn} by themselves; \
                 `troth txn show {txn}` shows what is known"
            ));
        }
    }
    let known = operator.knowledge(txn).await;
    let answering: BTreeSet<&Peer> = known.iter().map(|(peer, _)| peer).collect();
    if let Some(silent) = operator.participants.iter().find(|peer| !answering.contains(peer)) {
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
            let request = Ask::Resolve { shard: *shard, txn, decision, note: options.note.clone() };
            operator.ask(peer, request).await?;
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
