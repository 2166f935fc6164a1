//! What the leader leaves to tasks: proposals, and calls to shards.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{Instrument, Span};
use troth_protocol::message::admin::FaultPoint;
use troth_protocol::message::shard::{self, CommitOnePhase, Prepare};
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{Epoch, ParticipantId, Reject, ShardId, Timestamp, TxnId, fault, txn_span};
use troth_replication::ProposeError;

use super::{ATTEMPT_PAUSE, Inner};
use crate::command::{Command, Output};
use crate::leader::{Effect, Event, OnePhase};
use crate::metrics::Phase;
use crate::recovery::PAGE;
use crate::steward::Plan;

/// How long one attempt to reach a shard may take, for what is repeated until it succeeds.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Something done for one leader. What comes of it is told to that leader, or to nobody: a vote that
/// was given to an earlier epoch must not count in a later one.
#[derive(Clone)]
pub(super) struct Errand {
    pub(super) inner: Arc<Inner>,
    pub(super) epoch: Epoch,
}

impl Errand {
    /// Starts everything that is to be done. Decisions that wait share one entry of the log.
    pub(super) async fn perform(&self, todo: Vec<Effect>) {
        let preparing =
            |effect: &Effect| matches!(effect, Effect::Prepare { .. } | Effect::CommitOnePhase { .. });
        if todo.iter().any(preparing) {
            fault::pass(FaultPoint::BeforePrepare).await;
        }
        let (mut decisions, mut refusals) = (Vec::new(), Vec::new());
        for effect in todo {
            match effect {
                Effect::Answer { .. } => unreachable!("performed where it arises"),
                Effect::Decide(more) => decisions.extend(more),
                Effect::Refuse(more) => refusals.extend(more),
                Effect::Forget(txns) => self.spawn(self.clone().forget(txns)),
                Effect::Retire(outcomes_before) => {
                    self.propose_and_forget(Command::Retire { outcomes_before });
                }
                Effect::Place(Plan::Lose(node)) => {
                    tracing::warn!(%node, "not heard of for too long: others take its place");
                    self.propose_and_forget(Command::Lose { epoch: self.epoch, node });
                }
                Effect::Place(Plan::Move(moves)) => {
                    for step in &moves {
                        tracing::info!(shard = %step.shard, to = ?step.to, "a shard moves");
                    }
                    self.propose_and_forget(Command::Move { epoch: self.epoch, moves });
                }
                Effect::Ceiling(ceiling) => self.spawn(self.clone().raise_ceiling(ceiling)),
                Effect::Prepare { shard, prepare, deadline } => {
                    let span = txn_span!("ask for vote", prepare.txn, %shard);
                    self.spawn(self.clone().ask_for_vote(shard, prepare, deadline.into()).instrument(span));
                }
                Effect::CommitOnePhase { shard, commit, deadline } => {
                    let span = txn_span!("ask to commit", commit.txn, %shard);
                    self.spawn(
                        self.clone().commit_one_phase(shard, commit, deadline.into()).instrument(span),
                    );
                }
                Effect::AskShard { shard, txn } => self.spawn(self.clone().ask_shard(shard, txn)),
                Effect::Finish { shard, decisions } => {
                    fault::pass(FaultPoint::BeforeFinish).await;
                    self.spawn(self.clone().finish(shard, decisions));
                }
                Effect::Collect { shard, after } => self.spawn(self.clone().collect(shard, after)),
            }
        }
        if !decisions.is_empty() {
            fault::pass(FaultPoint::BeforeDecide).await;
            let txns = decisions.iter().map(|decision| decision.txn).collect();
            let decide = Command::Decide { epoch: self.epoch, decisions };
            self.propose_for(txns, &decide, Some(Phase::Decide));
        }
        if !refusals.is_empty() {
            self.propose_for(refusals.clone(), &Command::Refuse { txns: refusals }, None);
        }
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.inner.stop.clone();
        self.inner.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    fn tell(&self, event: Event) {
        let core = &self.inner.core;
        let mut inner = core.lock();
        if inner.leader.as_ref().is_some_and(|leader| leader.epoch() == self.epoch) {
            core.handle(&mut inner, event);
        }
    }

    /// Proposes what the leader hears of when it is applied; here only failure matters.
    fn propose_for(&self, txns: Vec<TxnId>, command: &Command, phase: Option<Phase>) {
        let began = std::time::Instant::now();
        // They end with the proposal.
        let spans: Vec<Span> = txns.iter().map(|txn| txn_span!("decide", *txn)).collect();
        let proposal = self.inner.submit(command);
        let errand = self.clone();
        self.spawn(async move {
            let _spans = spans;
            let result = match proposal {
                Ok(proposal) => proposal.output().await,
                Err(error) => Err(error),
            };
            if errand.is_done(result, Event::NotProposed { txns }).await
                && let Some(phase) = phase
            {
                errand.inner.metrics.phase(phase, began);
            }
        });
    }

    async fn forget(self, txns: Vec<TxnId>) {
        let result = self.inner.propose(&Command::Forget { txns: txns.clone() }).await;
        self.is_done(result, Event::NotForgotten { txns }).await;
    }

    /// Whether a proposal was applied. If it is in no log, the leader is told so, after a pause.
    async fn is_done(&self, result: Result<Output, ProposeError>, otherwise: Event) -> bool {
        match result {
            Ok(_) => return true,
            Err(ProposeError::NotLeader { .. } | ProposeError::Overloaded) => {
                sleep(ATTEMPT_PAUSE).await;
                self.tell(otherwise);
            }
            // What became of it the next leader will find in the log.
            Err(error) => tracing::debug!(%error, "a proposal is lost"),
        }
        false
    }

    /// Proposes what is harmless to lose: it will be proposed again.
    fn propose_and_forget(&self, command: Command) {
        let inner = self.inner.clone();
        self.spawn(async move {
            if let Err(error) = inner.propose(&command).await {
                tracing::debug!(%error, "a proposal is lost");
            }
        });
    }

    async fn raise_ceiling(self, ceiling: Timestamp) {
        let command = Command::Ceiling { epoch: self.epoch, ceiling };
        if let Err(error) = self.inner.propose(&command).await {
            tracing::debug!(%error, "the ceiling is not raised");
            sleep(ATTEMPT_PAUSE).await;
            self.tell(Event::NoCeiling);
        }
    }

    async fn call(
        &self,
        shard: ShardId,
        request: shard::Request,
        deadline: Instant,
    ) -> Result<shard::Response, RouteError> {
        let answer = self.inner.router.shard(shard, request, Resend::Idempotent, deadline).await;
        if let Err(RouteError::Rejected(Reject::CoordinatorPassed { epoch, index })) = &answer {
            self.inner.fail(format!(
                "the data folder of coordinator {} is an older copy: shard {shard} has heard of entry {index} of the \
                 coordinators' log, and this one leads with epoch {epoch}. Put the newest folder back; if all of them \
                 are lost, see \"When the coordinators are lost\" in docs/operations.md",
                self.inner.id
            ));
        }
        answer
    }

    async fn ask_for_vote(self, shard: ShardId, prepare: Prepare, deadline: Instant) {
        let (txn, began) = (prepare.txn, std::time::Instant::now());
        let vote = match self.call(shard, shard::Request::Prepare(prepare), deadline).await {
            Ok(shard::Response::Vote(vote)) => Some(vote),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(%txn, %shard, %error, "no vote");
                None
            }
        };
        if vote.is_some() {
            self.inner.metrics.phase(Phase::Prepare, began);
        }
        fault::pass(FaultPoint::VoteReceived).await;
        self.tell(Event::Voted { txn, participant: ParticipantId::Shard(shard), vote });
    }

    /// The shard answers the same however often it is asked, so asking again is harmless.
    async fn commit_one_phase(self, shard: ShardId, commit: CommitOnePhase, deadline: Instant) {
        let (txn, began) = (commit.txn, std::time::Instant::now());
        let answer = self.call(shard, shard::Request::CommitOnePhase(commit), deadline).await;
        let answer = one_phase(answer);
        if answer != OnePhase::Unknown {
            self.inner.metrics.phase(Phase::OnePhase, began);
        }
        self.tell(Event::OnePhase { txn, shard, answer });
    }

    async fn ask_shard(self, shard: ShardId, txn: TxnId) {
        let deadline = Instant::now() + ATTEMPT_TIMEOUT;
        let answer = one_phase(self.call(shard, shard::Request::Outcome { txn }, deadline).await);
        if answer == OnePhase::Unknown {
            sleep(ATTEMPT_PAUSE).await;
        }
        self.tell(Event::OnePhase { txn, shard, answer });
    }

    async fn finish(self, shard: ShardId, decisions: Vec<(TxnId, shard::Decision)>) {
        let began = std::time::Instant::now();
        let _spans: Vec<Span> =
            decisions.iter().map(|(txn, _)| txn_span!("ask to finish", *txn, %shard)).collect();
        let request = shard::Request::Finish { epoch: self.epoch, decisions: decisions.clone() };
        let answer = self.call(shard, request, Instant::now() + ATTEMPT_TIMEOUT).await;
        let ok = matches!(answer, Ok(shard::Response::Finished));
        if ok {
            self.inner.metrics.phase(Phase::Finish, began);
            fault::pass(FaultPoint::FinishAcknowledged).await;
        } else {
            sleep(ATTEMPT_PAUSE).await;
        }
        self.tell(Event::Delivered { shard, decisions, ok });
    }

    async fn collect(self, shard: ShardId, after: Option<TxnId>) {
        while self.inner.core.lock().leader.as_ref().is_some_and(|leader| leader.epoch() == self.epoch) {
            let request = shard::Request::Prepared { epoch: self.epoch, after, count_max: PAGE };
            match self.call(shard, request, Instant::now() + ATTEMPT_TIMEOUT).await {
                Ok(shard::Response::Prepared { txns, more }) => {
                    let txns: Vec<TxnId> = txns.into_iter().map(|prepared| prepared.txn).collect();
                    if !txns.is_empty() {
                        tracing::info!(%shard, count = txns.len(), "transactions in doubt");
                    }
                    return self.tell(Event::Page { shard, txns, more });
                }
                Ok(_) => tracing::warn!(%shard, "the shard answered something else"),
                Err(error) => tracing::debug!(%shard, %error, "cannot collect prepared transactions yet"),
            }
            sleep(ATTEMPT_PAUSE).await;
        }
    }
}

fn one_phase(answer: Result<shard::Response, RouteError>) -> OnePhase {
    match answer {
        Ok(shard::Response::Outcome(outcome)) => OnePhase::Ended(outcome),
        Ok(shard::Response::Expired) => OnePhase::Expired,
        Ok(_) => OnePhase::Unknown,
        Err(error) => {
            tracing::debug!(%error, "the shard did not tell the outcome");
            OnePhase::Unknown
        }
    }
}
