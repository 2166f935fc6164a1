//! A network inside one process, for tests of what lies above the transport.
//!
//! Messages are encoded and decoded as on a real wire, so that nothing works here that would not
//! work there.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use super::{BoxFuture, CallError, Identity, Peer, Service, Transport, forbidden};
use crate::message::{Request, Response};
use crate::wire;

/// Services by address, and who cannot hear whom.
#[derive(Clone, Default)]
pub struct Network {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    services: HashMap<Peer, Arc<dyn Service>>,
    /// (caller's name, peer) between which nothing passes.
    cut: std::collections::HashSet<(String, Peer)>,
}

impl Network {
    /// An empty network.
    pub fn new() -> Network {
        Network::default()
    }

    /// Puts a service at an address, in place of any before it.
    pub fn serve(&self, peer: Peer, service: Arc<dyn Service>) {
        self.inner.lock().services.insert(peer, service);
    }

    /// Takes the service at an address away.
    pub fn remove(&self, peer: &Peer) {
        self.inner.lock().services.remove(peer);
    }

    /// Lets nothing pass from a caller, by name, to a peer; or lets it pass again.
    pub fn set_cut(&self, caller: &str, peer: &Peer, cut: bool) {
        let link = (caller.to_owned(), peer.clone());
        let mut inner = self.inner.lock();
        if cut {
            inner.cut.insert(link)
        } else {
            inner.cut.remove(&link)
        };
    }

    /// A way to call others as somebody.
    pub fn transport(&self, identity: Identity) -> Arc<dyn Transport> {
        Arc::new(Caller { network: self.clone(), identity })
    }
}

struct Caller {
    network: Network,
    identity: Identity,
}

impl Transport for Caller {
    fn call<'a>(
        &'a self,
        peer: &'a Peer,
        request: Request,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Response, CallError>> {
        Box::pin(async move {
            let unreachable =
                |reason: &str| CallError::Unreachable { peer: peer.clone(), reason: reason.into() };
            let service = {
                let inner = self.network.inner.lock();
                if inner.cut.contains(&(self.identity.name.clone(), peer.clone())) {
                    return Err(unreachable("the network is cut"));
                }
                inner.services.get(peer).cloned().ok_or_else(|| unreachable("nobody is there"))?
            };
            let request: Request = wire::decode(&wire::encode(&request)).expect("requests survive the wire");
            let response = if request.permits(self.identity.role) {
                timeout_at(deadline, service.handle(&self.identity, request, deadline))
                    .await
                    .map_err(|_| CallError::DeadlineExceeded { peer: peer.clone() })?
            } else {
                forbidden(&self.identity, &request)
            };
            Ok(wire::decode(&wire::encode(&response)).expect("responses survive the wire"))
        })
    }
}
