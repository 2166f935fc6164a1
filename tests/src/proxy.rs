//! A UDP proxy in front of a server, so that a test can cut it off from some of those who talk to it.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

/// The largest datagram.
const DATAGRAM_MAX: usize = 64 << 10;

/// Those who may talk through one proxy.
const CALLERS_MAX: usize = 256;

/// A proxy in front of a server. It ends when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    cut: Arc<Mutex<HashSet<SocketAddr>>>,
    refused: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Listens somewhere, and carries everything to the server and back.
    ///
    /// # Panics
    /// If the system has no sockets.
    pub async fn start(server: SocketAddr) -> Proxy {
        let front = Arc::new(UdpSocket::bind(("127.0.0.1", 0)).await.expect("a socket"));
        let address = front.local_addr().expect("it is bound");
        let cut: Arc<Mutex<HashSet<SocketAddr>>> = Arc::default();
        let mut tasks = JoinSet::new();
        let refused: Arc<AtomicU64> = Arc::default();
        tasks.spawn(carry(front, server, cut.clone(), refused.clone()));
        Proxy { address, cut, refused, _tasks: tasks }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on nothing passes from or to who talks from this address.
    pub fn cut(&self, caller: SocketAddr) {
        self.cut.lock().insert(caller);
    }

    /// How often one who is cut off has tried to connect anew: first its old connections must have died.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Everything passes again.
    pub fn heal(&self) {
        self.cut.lock().clear();
    }
}

/// A QUIC packet that begins a connection: an Initial one, in the first version of QUIC.
fn begins_a_connection(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|first| first & 0xf0 == 0xc0)
}

async fn carry(
    front: Arc<UdpSocket>,
    server: SocketAddr,
    cut: Arc<Mutex<HashSet<SocketAddr>>>,
    refused: Arc<AtomicU64>,
) {
    let mut callers: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut backward = JoinSet::new();
    let mut datagram = vec![0; DATAGRAM_MAX];
    loop {
        // An error is that of a datagram that somebody did not want.
        let Ok((length, caller)) = front.recv_from(&mut datagram).await else { continue };
        if cut.lock().contains(&caller) {
            refused.fetch_add(begins_a_connection(&datagram[..length]).into(), Ordering::Relaxed);
            continue;
        }
        if !callers.contains_key(&caller) && callers.len() == CALLERS_MAX {
            continue;
        }
        let back = match callers.get(&caller) {
            Some(back) => back.clone(),
            None => {
                let back = Arc::new(UdpSocket::bind(("127.0.0.1", 0)).await.expect("a socket"));
                back.connect(server).await.expect("loopback");
                callers.insert(caller, back.clone());
                backward.spawn(carry_back(back.clone(), front.clone(), caller, cut.clone()));
                back
            }
        };
        let _ = back.send(&datagram[..length]).await;
    }
}

async fn carry_back(
    back: Arc<UdpSocket>,
    front: Arc<UdpSocket>,
    caller: SocketAddr,
    cut: Arc<Mutex<HashSet<SocketAddr>>>,
) {
    let mut datagram = vec![0; DATAGRAM_MAX];
    loop {
        match back.recv(&mut datagram).await {
            Ok(length) if !cut.lock().contains(&caller) => {
                let _ = front.send_to(&datagram[..length], caller).await;
            }
            Ok(_) => {}
            // The server is not there at the moment: that is told by a packet, which is read here.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}
