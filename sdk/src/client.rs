//! A connection to a cluster.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::{Instant, sleep};
use troth_protocol::net::quic::{Quic, QuicConfig};
use troth_protocol::net::{Peer, Transport};
use troth_protocol::routing::{Router, pauses};
use troth_protocol::{ClientId, ClusterMap, TxnId};

use crate::config::ClientConfig;
use crate::error::Error;
use crate::operator::Operator;
use crate::reader::{Patience, Reader, after};
use crate::snapshot::Snapshot;
use crate::timestamps::Timestamps;
use crate::transaction::{Commit, End, Handle, Outcome, Transaction};

/// The shortest and longest pause before a transaction is tried again.
const RETRY_MIN: Duration = Duration::from_micros(500);
const RETRY_MAX: Duration = Duration::from_millis(250);

/// A connection to a cluster. Cheap to clone; all clones share it.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    id: ClientId,
    timeout: Duration,
    quic: Arc<Quic>,
    router: Arc<Router>,
    timestamps: Timestamps,
}

impl Client {
    /// Connects to a cluster, and waits until it is ready.
    ///
    /// # Errors
    /// [`Error::Config`] if the certificates cannot be used; [`Error::Unavailable`] if no coordinator
    /// answers, or the cluster is not ready, within the configured timeout.
    pub async fn connect(config: ClientConfig) -> Result<Client, Error> {
        let (quic, router) = bind(&config)?;
        let id = ClientId(rand::random());
        let timestamps = Timestamps::start(&router, id);
        let client =
            Client { inner: Arc::new(Inner { id, timeout: config.timeout, quic, router, timestamps }) };
        client.ready().await?;
        Ok(client)
    }

    /// Waits until the cluster has placed its shards.
    async fn ready(&self) -> Result<(), Error> {
        let Inner { router, timeout, .. } = &*self.inner;
        let deadline = after(*timeout);
        let mut pauses = pauses();
        while !router.map().is_placed() {
            let map = router.map();
            let troubles = router.troubles().join("; ");
            if router.is_hopeless() {
                return Err(Error::Config(format!("no coordinator can be used: {troubles}")));
            }
            if Instant::now() >= deadline {
                let reason = match map.nodes.len() {
                    0 if map.shards == 0 && troubles.is_empty() => {
                        "coordinators answer, and have no cluster yet: a majority of them must run".to_owned()
                    }
                    0 if map.shards == 0 => format!("no coordinator answers: {troubles}"),
                    nodes => format!("the cluster waits for more participants; {nodes} have registered"),
                };
                return Err(Error::unavailable(reason));
            }
            let attempt = deadline.min(Instant::now() + Duration::from_secs(2));
            router.refresh_map(attempt).await;
            if !router.map().is_placed() {
                sleep(pauses.next().unwrap_or_default()).await;
            }
        }
        Ok(())
    }

    /// Runs a closure as a transaction and commits it. If the transaction meets another one, or a
    /// server fails on the way, the closure is run again, in a new transaction, until it commits or
    /// the timeout of the configuration has passed: so it must have no effects of its own.
    ///
    /// The closure's own errors end the transaction without a commit and come back as they are.
    /// A closure that captures variables borrows them: write `async |tx| { … }`, without `move`.
    ///
    /// The closure needs not commit. If it does, what came of that is what comes back: the closure's value if the
    /// transaction was committed, another run if it was aborted. After a rollback the value comes back, and nothing
    /// has happened. After the deadline nothing is sent: a closure that takes longer than that has had no effect.
    ///
    /// # Errors
    /// The closure's own error; or an [`Error`], turned into that type: [`Error::Aborted`] and
    /// other retriable ones when the timeout has passed, [`Error::Unknown`] if it is not known
    /// whether the transaction was committed (it is not run again then).
    pub async fn transact<T, E, F, Fut>(&self, run: F) -> Result<T, E>
    where
        F: Fn(Transaction) -> Fut,
        Fut: Future<Output = Result<T, E>>,
        E: From<Error>,
    {
        let deadline = after(self.inner.timeout);
        let mut pauses = ExponentialBuilder::new()
            .with_min_delay(RETRY_MIN)
            .with_max_delay(RETRY_MAX)
            .with_jitter()
            .without_max_times()
            .build();
        for number in 1.. {
            let error = match self.attempt(&run, number, deadline).await {
                Attempt::Done(value) => return Ok(value),
                Attempt::Own(error) => return Err(error),
                Attempt::Failed(error) => error,
            };
            let mut pause = pauses.next().unwrap_or(RETRY_MAX);
            if let Error::Overloaded { retry_after } = &error {
                // Not all at once.
                pause = pause.max(retry_after.mul_f64(1.0 + 0.5 * rand::random::<f64>()));
            }
            if !error.is_retriable() || Instant::now() + pause >= deadline {
                return Err(error.into());
            }
            tracing::debug!(%error, "trying the transaction again");
            sleep(pause).await;
        }
        unreachable!("an attempt takes longer than to count it")
    }

    async fn attempt<T, E, F, Fut>(&self, run: &F, number: u32, deadline: Instant) -> Attempt<T, E>
    where
        F: Fn(Transaction) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let transaction = match self.begin_with(number, Patience::Until(deadline)).await {
            Ok(transaction) => transaction,
            Err(error) => return Attempt::Failed(error),
        };
        let result = run(transaction.clone()).await;
        // What has been sent cannot be done again, whatever the closure met besides.
        match transaction.ended() {
            Some(End::Sent(handle) | End::Answered(Ok(Commit::Unknown { handle }))) => {
                return Attempt::Failed(Error::Unknown(handle));
            }
            Some(End::Answered(Ok(Commit::Committed { .. }))) => {
                return result.map_or_else(Attempt::Own, Attempt::Done);
            }
            Some(End::Answered(_) | End::RolledBack) | None => {}
        }
        let value = match (result, transaction.failure()) {
            (Ok(value), None) => value,
            // Whatever the closure made of it, what it met was this.
            (_, Some(failure)) if failure.is_retriable() => return Attempt::Failed(failure),
            (Err(error), _) => return Attempt::Own(error),
            (Ok(_), Some(failure)) => return Attempt::Failed(failure),
        };
        let answer = match transaction.ended() {
            None => transaction.commit().await,
            // The closure wanted nothing to happen.
            Some(End::RolledBack) => return Attempt::Done(value),
            // It has committed by itself.
            Some(End::Answered(answer)) => answer,
            Some(End::Sent(handle)) => Ok(Commit::Unknown { handle }),
        };
        match answer {
            Ok(Commit::Committed { .. }) => Attempt::Done(value),
            Ok(Commit::Aborted { cause }) => Attempt::Failed(Error::Aborted { cause }),
            Ok(Commit::Unknown { handle }) => Attempt::Failed(Error::Unknown(handle)),
            Err(error) => Attempt::Failed(error),
        }
    }

    /// Begins a transaction by hand; see [`Client::transact`] for the way with retries. Each of its
    /// calls has the configured timeout for itself; in all it may take five minutes (by default)
    /// before the servers refuse it as too old.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if no coordinator leader answers within the configured timeout.
    pub async fn begin(&self) -> Result<Transaction, Error> {
        self.begin_with(1, Patience::Each(self.inner.timeout)).await
    }

    async fn begin_with(&self, attempt: u32, patience: Patience) -> Result<Transaction, Error> {
        let (start, epoch) = self.inner.timestamps.begin(patience.deadline()).await?;
        let id = TxnId { start, client: self.inner.id };
        let reader = Reader { router: self.inner.router.clone(), at: start, patience };
        Ok(Transaction::new(id, epoch, attempt, reader))
    }

    /// The database as of now, for reading only. It sees everything that was committed before this
    /// call.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if no coordinator leader answers within the configured timeout.
    pub async fn snapshot(&self) -> Result<Snapshot, Error> {
        let patience = Patience::Each(self.inner.timeout);
        let (at, _) = self.inner.timestamps.look(patience.deadline()).await?;
        Ok(Snapshot { reader: Reader { router: self.inner.router.clone(), at, patience } })
    }

    /// Finds out how any transaction ended, also one of another client. The answer is the same for
    /// ever; where it was not decided yet, asking makes sure that it never commits.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the cluster cannot say within the configured timeout: ask again.
    pub async fn outcome(&self, txn: TxnId) -> Result<Outcome, Error> {
        Handle::new(txn, Vec::new(), self.inner.router.clone()).resolve(self.inner.timeout).await
    }

    /// The cluster map that this client has: nodes, and where the shards are.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.inner.router.map()
    }

    /// Fetches a newer cluster map, if there is one.
    pub async fn refresh_map(&self) {
        self.inner.router.refresh_map(Instant::now() + Duration::from_secs(2)).await;
    }

    /// Asks the servers how they are, with this client's certificate.
    pub fn operator(&self) -> Operator {
        Operator::with(self.inner.router.clone(), self.inner.quic.clone())
    }

    /// The transport of this client, for what has no better way.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        self.inner.router.transport()
    }

    /// Says goodbye to the servers, so that they need not find out by themselves. Transactions
    /// under way fail.
    pub async fn close(&self) {
        self.inner.router.close();
        self.inner.quic.close().await;
    }
}

/// Prepares to call servers, and waits for nobody.
pub(crate) fn bind(config: &ClientConfig) -> Result<(Arc<Quic>, Arc<Router>), Error> {
    let mut quic_config = QuicConfig { bind: config.bind, ..QuicConfig::default() };
    if let Some(sockets) = &config.sockets {
        quic_config.sockets = sockets.clone();
    }
    let quic =
        Quic::bind(quic_config, &config.credentials).map_err(|error| Error::Config(error.to_string()))?;
    if let Some(files) = config.credentials.files() {
        quic.follow_files(files.clone());
    }
    let transport: Arc<dyn Transport> = Arc::new(quic.clone());
    let seeds = config.coordinators.iter().map(|address| Peer::coordinator(address)).collect();
    Ok((quic, Arc::new(Router::new(transport, seeds))))
}

/// How one attempt ended.
enum Attempt<T, E> {
    Done(T),
    /// The closure's own error.
    Own(E),
    Failed(Error),
}
