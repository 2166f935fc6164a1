//! One participant process: store, network, node.

use std::net::SocketAddr;
use std::sync::Arc;

use troth_protocol::clock::Clock;
use troth_protocol::net::tls::Credentials;
use troth_protocol::net::{BoxFuture, Peer, Transport};
use troth_protocol::routing::Router;
use troth_replication::server::{Base, Running, ServerError};

use crate::config::Config;
use crate::families;
use crate::metrics::Health;
use crate::node::{Front, Node};

/// A running participant.
pub struct Server {
    base: Base,
    node: Arc<Node>,
}

impl Server {
    /// Starts a participant.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn start(
        config: Config,
        credentials: &Credentials,
        clock: Clock,
    ) -> BoxFuture<'_, Result<Server, ServerError>> {
        // Boxed, so that it is compiled here and not in every program that starts a server.
        Box::pin(Server::open(config, credentials, clock))
    }

    async fn open(config: Config, credentials: &Credentials, clock: Clock) -> Result<Server, ServerError> {
        let mut base = Base::open(&config.basics, credentials, &families::ALL)?;
        let seeds = config.coordinators.iter().map(|address| Peer::coordinator(address)).collect();
        let transport: Arc<dyn Transport> = Arc::new(base.quic.clone());
        let router = Arc::new(Router::new(transport, seeds));
        let cluster = credentials.identity().cluster;
        let node =
            Node::start(config, cluster, base.address.clone(), base.store.clone(), router, clock).await?;
        base.quic.serve(Arc::new(Front(node.clone())));
        let mut registry = base.registry(node.writer());
        node.metrics().register(&mut registry, &node);
        base.show(registry, Arc::new(Health(Arc::downgrade(&node))), |_, _| axum::Router::new()).await?;
        Ok(Server { base, node })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.base.local_addr()
    }
}

impl Running for Server {
    fn failed(&self) -> BoxFuture<'_, String> {
        Box::pin(async {
            match self.node.failure().wait_for(Option::is_some).await {
                Ok(reason) => reason.clone().unwrap_or_default(),
                Err(_) => "the node has ended".into(),
            }
        })
    }

    fn hand_over(&self) -> BoxFuture<'_, bool> {
        Box::pin(self.node.hand_over())
    }

    fn shutdown(self) -> BoxFuture<'static, ()> {
        Box::pin(async {
            let Server { base, node } = self;
            // Its last sign of life says how far its folder was in the end.
            node.shutdown().await;
            base.quic.close().await;
            drop(node);
            base.close().await;
        })
    }
}
