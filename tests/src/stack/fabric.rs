//! Datagrams in memory: what stands in for UDP beneath the real QUIC.
//!
//! A datagram takes a moment, as the seed says, and what the [links](crate::network::Links) add to that. It
//! arrives at the next tick of the cluster's clock.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use troth_protocol::net::quic::Sockets;

use crate::network::Links;

/// Datagrams that wait at one socket. More are lost.
const INBOX_MAX: usize = 8192;

/// Datagrams that are under way. More are lost.
const FLYING_MAX: usize = 1 << 17;

/// The first port that a socket gets that does not ask for one.
const PORT_FIRST: u16 = 40_000;

/// A network in memory. Cheap to clone.
#[derive(Clone)]
pub struct Fabric {
    shared: Arc<Shared>,
}

struct Shared {
    links: Arc<Links>,
    inner: Mutex<Inner>,
}

struct Inner {
    now: Duration,
    rng: StdRng,
    /// How long a datagram takes at least and at most on a sound link.
    takes: (Duration, Duration),
    /// By when they arrive, and of those at the same time, by when they were sent.
    flying: BTreeMap<(Duration, u64), Datagram>,
    sent: u64,
    inboxes: HashMap<SocketAddr, Inbox>,
    ports: u16,
}

struct Datagram {
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Inbox {
    waiting: VecDeque<(SocketAddr, Vec<u8>)>,
    reader: Option<Waker>,
}

impl fmt::Debug for Fabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fabric").finish_non_exhaustive()
    }
}

impl Fabric {
    /// A network without sockets, on which a datagram takes so long at least and at most.
    pub fn new(seed: u64, takes: (Duration, Duration)) -> Fabric {
        let inner = Inner {
            now: Duration::ZERO,
            rng: StdRng::seed_from_u64(seed),
            takes,
            flying: BTreeMap::new(),
            sent: 0,
            inboxes: HashMap::new(),
            ports: PORT_FIRST,
        };
        Fabric { shared: Arc::new(Shared { links: Arc::default(), inner: Mutex::new(inner) }) }
    }

    /// What is wrong with its links, and what has passed.
    pub fn links(&self) -> &Arc<Links> {
        &self.shared.links
    }

    /// Time has passed: what is due arrives.
    pub fn advance(&self, now: Duration) {
        let mut inner = self.shared.inner.lock();
        inner.now = now;
        while let Some(first) = inner.flying.first_entry()
            && first.key().0 <= now
        {
            let Datagram { from, to, bytes } = first.remove();
            // Nobody may be there any more.
            let Some(inbox) = inner.inboxes.get_mut(&to) else { continue };
            if inbox.waiting.len() < INBOX_MAX {
                inbox.waiting.push_back((from, bytes));
                if let Some(reader) = inbox.reader.take() {
                    reader.wake();
                }
            }
        }
    }

    /// Where a machine gets its sockets from.
    pub fn sockets(&self) -> Arc<dyn Sockets> {
        Arc::new(self.clone())
    }
}

impl Sockets for Fabric {
    fn open(&self, mut address: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let mut inner = self.shared.inner.lock();
        if address.port() == 0 {
            inner.ports += 1;
            address.set_port(inner.ports);
        }
        if inner.inboxes.contains_key(&address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        inner.inboxes.insert(address, Inbox::default());
        Ok(Arc::new(Socket { shared: Arc::downgrade(&self.shared), address }))
    }
}

/// A socket of the network. It is gone when it is dropped, with what waits there.
struct Socket {
    shared: Weak<Shared>,
    address: SocketAddr,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.address).finish()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.inner.lock().inboxes.remove(&self.address);
        }
    }
}

impl Socket {
    fn shared(&self) -> io::Result<Arc<Shared>> {
        self.shared.upgrade().ok_or_else(|| io::ErrorKind::NetworkDown.into())
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let shared = self.shared()?;
        let mut inner = shared.inner.lock();
        let Inner { now, rng, takes, flying, sent, .. } = &mut *inner;
        let mut bytes = transmit.contents.to_vec();
        let way = (self.address, transmit.destination);
        let copies = shared.links.fate(way, &mut bytes, rng);
        for later in copies.into_iter().flatten() {
            if flying.len() < FLYING_MAX {
                let due = *now + rng.random_range(takes.0..=takes.1) + later;
                *sent += 1;
                let datagram = Datagram { from: way.0, to: way.1, bytes: bytes.clone() };
                flying.insert((due, *sent), datagram);
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let shared = self.shared()?;
        let mut inner = shared.inner.lock();
        let inbox = inner.inboxes.get_mut(&self.address).ok_or(io::ErrorKind::NotConnected)?;
        let mut count = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            let Some((from, bytes)) = inbox.waiting.pop_front() else { break };
            let length = bytes.len().min(buf.len());
            buf[..length].copy_from_slice(&bytes[..length]);
            *meta = RecvMeta { addr: from, len: length, stride: length, ecn: None, dst_ip: None };
            count += 1;
        }
        if count == 0 {
            inbox.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

/// A sender never waits: what does not fit is lost.
#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;
    use crate::network::Link;

    fn address(host: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, host], 7000))
    }

    fn send(from: &Arc<dyn AsyncUdpSocket>, to: SocketAddr, contents: &[u8]) {
        let transmit = Transmit { destination: to, ecn: None, contents, segment_size: None, src_ip: None };
        from.try_send(&transmit).expect("sent");
    }

    /// What waits at a socket.
    fn received(socket: &Arc<dyn AsyncUdpSocket>) -> Vec<(SocketAddr, Vec<u8>)> {
        let mut all = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            let mut bytes = [0; 100];
            let mut meta = [RecvMeta::default()];
            match socket.poll_recv(&mut cx, &mut [IoSliceMut::new(&mut bytes)], &mut meta) {
                Poll::Ready(count) => {
                    assert_eq!(count.expect("received"), 1);
                    all.push((meta[0].addr, bytes[..meta[0].len].to_vec()));
                }
                Poll::Pending => return all,
            }
        }
    }

    const MOMENT: Duration = Duration::from_millis(2);

    #[test]
    fn a_datagram_arrives_when_it_is_due_and_not_before() {
        let fabric = Fabric::new(1, (MOMENT, MOMENT));
        let (one, other) = (fabric.open(address(1)).expect("free"), fabric.open(address(2)).expect("free"));
        send(&one, address(2), b"hello");
        fabric.advance(MOMENT / 2);
        assert_eq!(received(&other), []);
        fabric.advance(MOMENT);
        assert_eq!(received(&other), [(address(1), b"hello".to_vec())]);
        assert_eq!(received(&other), []);
    }

    #[test]
    fn links_spoil_what_passes_on_them() {
        let fabric = Fabric::new(1, (MOMENT, MOMENT));
        let (one, other) = (fabric.open(address(1)).expect("free"), fabric.open(address(2)).expect("free"));
        let cut = fabric.links().impair([(address(1), address(2))], Link::CUT);
        send(&one, address(2), b"lost");
        send(&other, address(1), b"the other way");
        drop(cut);
        let _twice =
            fabric.links().impair([(address(1), address(2))], Link { duplicated: 1.0, ..Link::default() });
        send(&one, address(2), b"twice");
        fabric.advance(MOMENT);
        assert_eq!(received(&one), [(address(2), b"the other way".to_vec())]);
        assert_eq!(received(&other), [(address(1), b"twice".to_vec()), (address(1), b"twice".to_vec())]);
    }

    #[test]
    fn an_address_is_taken_until_its_socket_is_gone() {
        let fabric = Fabric::new(1, (MOMENT, MOMENT));
        let one = fabric.open(address(1)).expect("free");
        let taken = fabric.open(address(1)).map(drop).map_err(|error| error.kind());
        assert_eq!(taken, Err(io::ErrorKind::AddrInUse));
        let sender = fabric.open(SocketAddr::from(([10, 0, 0, 2], 0))).expect("any port");
        assert_ne!(sender.local_addr().expect("bound").port(), 0);
        send(&sender, address(1), b"for the one before");
        drop(one);
        fabric.advance(MOMENT);
        let next = fabric.open(address(1)).expect("free again");
        assert_eq!(received(&next), []);
    }

    #[tokio::test]
    async fn whoever_waits_is_woken() {
        let fabric = Fabric::new(1, (MOMENT, MOMENT));
        let (one, other) = (fabric.open(address(1)).expect("free"), fabric.open(address(2)).expect("free"));
        let waits = tokio::spawn(async move {
            let mut bytes = [0; 100];
            let mut meta = [RecvMeta::default()];
            poll_fn(|cx| other.poll_recv(cx, &mut [IoSliceMut::new(&mut bytes)], &mut meta)).await
        });
        tokio::task::yield_now().await;
        send(&one, address(2), b"x");
        fabric.advance(MOMENT);
        assert_eq!(crate::in_time(waits).await.expect("no panic").expect("received"), 1);
    }
}
