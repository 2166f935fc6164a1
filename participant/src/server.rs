//! One participant process: store, network, node.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;
use troth_protocol::clock::Clock;
use troth_protocol::net::quic::{EndpointError, Quic};
use troth_protocol::net::tls::Credentials;
use troth_protocol::net::{Peer, Transport};
use troth_protocol::process;
use troth_protocol::routing::Router;
use troth_replication::{OpenError, StartError, Store};

use crate::config::Config;
use crate::families;
use crate::node::{Front, Node};

/// The participant cannot start. Every message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("{0}")]
    Endpoint(#[from] EndpointError),
    /// The data folder cannot be used.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// What is stored is damaged.
    #[error("{0}")]
    Start(#[from] StartError),
    /// The address cannot be written into the data folder.
    #[error("cannot write into the data folder: {0}")]
    Publish(#[from] std::io::Error),
}

/// A running participant.
pub struct Server {
    quic: Arc<Quic>,
    node: Arc<Node>,
    store: Store,
}

impl Server {
    /// Starts a participant.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn start(
        config: Config,
        credentials: &Credentials,
        clock: Clock,
    ) -> Result<Server, ServerError> {
        let cluster = credentials.identity().cluster;
        let owner = format!("participant {} of cluster {cluster}", config.id);
        let store = Store::open(&config.data, &owner, &families::ALL)?;
        let quic = Quic::bind(config.quic.clone(), credentials)?;
        process::publish_address(&config.data, quic.local_addr())?;
        let address = config.advertise.clone().unwrap_or_else(|| quic.local_addr().to_string());
        let seeds = config.coordinators.iter().map(|address| Peer::coordinator(address)).collect();
        let transport: Arc<dyn Transport> = Arc::new(quic.clone());
        let router = Arc::new(Router::new(transport, seeds));
        tracing::info!(node = config.id, %cluster, address, "participant");
        let node = Node::start(config, cluster, address, store.clone(), router, clock).await?;
        quic.serve(Arc::new(Front(node.clone())));
        Ok(Server { quic, node, store })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.quic.local_addr()
    }

    /// Why it cannot go on, once it cannot.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.node.failure()
    }

    /// Stops, and returns when its folder can be opened again. What was acknowledged stays.
    pub async fn shutdown(self) {
        let Server { quic, node, store } = self;
        quic.close().await;
        node.shutdown().await;
        drop((quic, node));
        store.closed().await;
    }
}
