//! A network between servers that a test can spoil.
//!
//! In front of each server stands a UDP proxy, and others know the server by its address only. A server
//! calls others from the socket on which it listens, so a proxy knows who talks, and what passes depends on
//! who talks to whom:
//!
//! ```text
//!   A ──┐                   ┌─▶ proxy of B ──▶ B          both directions of what A says to B,
//!       └───────────────────┘                             and of what B answers, pass here;
//!   A ◀── proxy of A ◀──────────────────────── B          what B says to A on its own passes there
//! ```
//!
//! What is wrong is held as impairments of links. A link goes from where one party talks to where another
//! does, in this direction only. Several may impair the same link; their effects add up.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rand::{Rng, RngExt};
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// The largest datagram.
const DATAGRAM_MAX: usize = 64 << 10;

/// Those who may talk through one proxy.
const CALLERS_MAX: usize = 256;

/// Datagrams that are on their way for longer than they need. More are lost, as in any network.
const DELAYED_MAX: usize = 16_384;

/// How long one that is overtaken is held back at most.
const OVERTAKEN_BY: Duration = Duration::from_millis(20);

/// From where one party talks to where another does.
pub type Way = (SocketAddr, SocketAddr);

/// What is wrong with a link. Parts are of all datagrams, from 0 to 1.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Link {
    /// Nothing passes.
    pub cut: bool,
    /// The part that is lost.
    pub loss: f64,
    /// The part that comes twice.
    pub duplicated: f64,
    /// The part that is overtaken by later ones.
    pub reordered: f64,
    /// The part of which one bit is wrong.
    pub corrupted: f64,
    /// How much longer each takes.
    pub delay: Duration,
    /// How much longer than that it may take by chance.
    pub jitter: Duration,
}

impl Link {
    /// Nothing passes.
    pub const CUT: Link = Link {
        cut: true,
        loss: 0.0,
        duplicated: 0.0,
        reordered: 0.0,
        corrupted: 0.0,
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
    };

    /// Both.
    fn and(self, other: &Link) -> Link {
        let either = |one: f64, other: f64| 1.0 - (1.0 - one) * (1.0 - other);
        Link {
            cut: self.cut || other.cut,
            loss: either(self.loss, other.loss),
            duplicated: either(self.duplicated, other.duplicated),
            reordered: either(self.reordered, other.reordered),
            corrupted: either(self.corrupted, other.corrupted),
            delay: self.delay + other.delay,
            jitter: self.jitter + other.jitter,
        }
    }
}

/// How much has passed, and what has happened to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Datagrams that have passed, some of them late or damaged.
    pub passed: u64,
    /// Lost because a link was cut.
    pub cut: u64,
    /// Of these, those that were to begin a connection.
    pub refused: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Sent twice.
    pub duplicated: u64,
    /// Held back, so that others might overtake them.
    pub reordered: u64,
    /// Damaged.
    pub corrupted: u64,
    /// Delayed.
    pub delayed: u64,
}

/// A network of proxies. They end when it is dropped.
pub struct Network {
    links: Arc<Links>,
    delayed: Arc<Semaphore>,
    proxies: Mutex<JoinSet<()>>,
}

impl Default for Network {
    fn default() -> Network {
        Network::new()
    }
}

impl Network {
    /// A network that does nothing wrong.
    pub fn new() -> Network {
        let delayed = Arc::new(Semaphore::new(DELAYED_MAX));
        Network { links: Arc::default(), delayed, proxies: Mutex::new(JoinSet::new()) }
    }

    /// Puts a proxy in front of a server, and tells where others find it.
    ///
    /// # Panics
    /// If the system has no sockets.
    pub async fn serve(&self, server: SocketAddr) -> SocketAddr {
        let front = Arc::new(UdpSocket::bind(("127.0.0.1", 0)).await.expect("a socket"));
        let address = front.local_addr().expect("it is bound");
        let passage = Passage { links: self.links.clone(), delayed: self.delayed.clone() };
        self.proxies.lock().spawn(carry(front, server, passage));
        address
    }

    /// What is wrong between its parties.
    pub fn links(&self) -> &Arc<Links> {
        &self.links
    }
}

/// Something is wrong with some links, until this is dropped.
pub struct Impairment {
    links: Arc<Links>,
    number: u64,
    ways: Vec<Way>,
}

impl Impairment {
    /// Something else is wrong with them from now on.
    pub fn set(&self, link: Link) {
        let mut impaired = self.links.impaired.write();
        for way in &self.ways {
            impaired.entry(*way).or_default().insert(self.number, link);
        }
    }
}

impl Drop for Impairment {
    fn drop(&mut self) {
        let mut impaired = self.links.impaired.write();
        for way in &self.ways {
            if let Some(here) = impaired.get_mut(way) {
                here.remove(&self.number);
                if here.is_empty() {
                    impaired.remove(way);
                }
            }
        }
    }
}

/// What is wrong between parties, and what has passed.
#[derive(Default)]
pub struct Links {
    /// What is wrong with each link, by the number of the impairment.
    impaired: RwLock<HashMap<Way, HashMap<u64, Link>>>,
    numbers: AtomicU64,
    traffic: Counters,
}

#[derive(Default)]
struct Counters {
    passed: AtomicU64,
    cut: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
    duplicated: AtomicU64,
    reordered: AtomicU64,
    corrupted: AtomicU64,
    delayed: AtomicU64,
}

impl Links {
    /// Impairs links for as long as what is returned lives.
    pub fn impair(self: &Arc<Links>, ways: impl IntoIterator<Item = Way>, link: Link) -> Impairment {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let ways: Vec<Way> = ways.into_iter().collect();
        let impairment = Impairment { links: self.clone(), number, ways };
        impairment.set(link);
        impairment
    }

    /// Cuts two parties off from each other.
    pub fn cut(self: &Arc<Links>, one: SocketAddr, other: SocketAddr) -> Impairment {
        self.impair([(one, other), (other, one)], Link::CUT)
    }

    /// What has passed so far, and what has happened to it.
    pub fn traffic(&self) -> Traffic {
        let counters = &self.traffic;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            passed: count(&counters.passed),
            cut: count(&counters.cut),
            refused: count(&counters.refused),
            lost: count(&counters.lost),
            duplicated: count(&counters.duplicated),
            reordered: count(&counters.reordered),
            corrupted: count(&counters.corrupted),
            delayed: count(&counters.delayed),
        }
    }

    /// What becomes of a datagram: how much later than on a sound link each copy of it comes, if any does.
    /// It may be damaged.
    pub fn fate(&self, way: Way, datagram: &mut [u8], rng: &mut impl Rng) -> [Option<Duration>; 2] {
        let mut copies = [None, None];
        let link = self.impaired.read().get(&way).map(|here| here.values().fold(Link::default(), Link::and));
        let Some(link) = link else {
            self.count(|traffic| &traffic.passed);
            copies[0] = Some(Duration::ZERO);
            return copies;
        };
        if link.cut {
            self.count(|traffic| &traffic.cut);
            if begins_a_connection(datagram) {
                self.count(|traffic| &traffic.refused);
            }
            return copies;
        }
        let mut by_chance = |part: f64| part > 0.0 && rng.random::<f64>() < part;
        if by_chance(link.loss) {
            self.count(|traffic| &traffic.lost);
            return copies;
        }
        let corrupted = by_chance(link.corrupted) && !datagram.is_empty();
        let duplicated = by_chance(link.duplicated);
        let reordered = [by_chance(link.reordered), by_chance(link.reordered)];
        if corrupted {
            self.count(|traffic| &traffic.corrupted);
            let at = rng.random_range(0..datagram.len());
            datagram[at] ^= 1 << rng.random_range(0..8);
        }
        if duplicated {
            self.count(|traffic| &traffic.duplicated);
        }
        for (copy, reordered) in copies.iter_mut().zip(reordered).take(if duplicated { 2 } else { 1 }) {
            let mut delay = link.delay + link.jitter.mul_f64(rng.random());
            if reordered {
                self.count(|traffic| &traffic.reordered);
                delay += OVERTAKEN_BY.mul_f64(rng.random());
            }
            self.count(|traffic| &traffic.passed);
            if !delay.is_zero() {
                self.count(|traffic| &traffic.delayed);
            }
            *copy = Some(delay);
        }
        copies
    }

    fn count(&self, which: impl FnOnce(&Counters) -> &AtomicU64) {
        which(&self.traffic).fetch_add(1, Ordering::Relaxed);
    }
}

/// How datagrams pass a proxy.
#[derive(Clone)]
struct Passage {
    links: Arc<Links>,
    delayed: Arc<Semaphore>,
}

impl Passage {
    /// Lets a datagram pass, or not.
    async fn pass(&self, way: Way, datagram: &mut [u8], exit: Exit<'_>) {
        let copies = self.links.fate(way, datagram, &mut rand::rng());
        for delay in copies.into_iter().flatten() {
            if delay.is_zero() {
                exit.send(datagram).await;
            } else {
                self.send_later(datagram, exit, delay);
            }
        }
    }

    fn send_later(&self, datagram: &[u8], exit: Exit<'_>, delay: Duration) {
        let Ok(permit) = self.delayed.clone().try_acquire_owned() else { return };
        let (datagram, socket, to) = (datagram.to_vec(), exit.socket.clone(), exit.to);
        tokio::spawn(async move {
            sleep(delay).await;
            Exit { socket: &socket, to }.send(&datagram).await;
            drop(permit);
        });
    }
}

/// A QUIC packet that begins a connection: an Initial one, in the first version of QUIC.
fn begins_a_connection(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|first| first & 0xf0 == 0xc0)
}

/// Where a datagram leaves a proxy.
#[derive(Clone, Copy)]
struct Exit<'s> {
    socket: &'s Arc<UdpSocket>,
    /// `None`: the socket is connected.
    to: Option<SocketAddr>,
}

impl Exit<'_> {
    /// Datagrams that cannot be sent are lost.
    async fn send(&self, datagram: &[u8]) {
        let _ = match self.to {
            Some(to) => self.socket.send_to(datagram, to).await,
            None => self.socket.send(datagram).await,
        };
    }
}

async fn carry(front: Arc<UdpSocket>, server: SocketAddr, passage: Passage) {
    let mut callers: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut backward = JoinSet::new();
    let mut datagram = vec![0; DATAGRAM_MAX];
    loop {
        // An error is that of a datagram that somebody did not want.
        let Ok((length, caller)) = front.recv_from(&mut datagram).await else { continue };
        if !callers.contains_key(&caller) && callers.len() == CALLERS_MAX {
            continue;
        }
        let back = match callers.get(&caller) {
            Some(back) => back.clone(),
            None => {
                let back = Arc::new(UdpSocket::bind(("127.0.0.1", 0)).await.expect("a socket"));
                back.connect(server).await.expect("loopback");
                callers.insert(caller, back.clone());
                backward.spawn(carry_back(back.clone(), front.clone(), (server, caller), passage.clone()));
                back
            }
        };
        let exit = Exit { socket: &back, to: None };
        passage.pass((caller, server), &mut datagram[..length], exit).await;
    }
}

async fn carry_back(back: Arc<UdpSocket>, front: Arc<UdpSocket>, way: Way, passage: Passage) {
    let mut datagram = vec![0; DATAGRAM_MAX];
    let (_, caller) = way;
    loop {
        match back.recv(&mut datagram).await {
            Ok(length) => {
                let exit = Exit { socket: &front, to: Some(caller) };
                passage.pass(way, &mut datagram[..length], exit).await;
            }
            // The server is not there at the moment: that is told by a packet, which is read here.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::time::timeout;

    use super::*;

    /// A server that sends everything back, its network, and one who talks to it.
    struct Scene {
        network: Network,
        server: SocketAddr,
        caller: UdpSocket,
        front: SocketAddr,
        _server: JoinSet<()>,
    }

    impl Scene {
        async fn new() -> Scene {
            let network = Network::new();
            let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
            let server = socket.local_addr().expect("it is bound");
            let mut tasks = JoinSet::new();
            tasks.spawn(async move {
                let mut datagram = [0; 100];
                loop {
                    let (length, from) = socket.recv_from(&mut datagram).await.expect("received");
                    socket.send_to(&datagram[..length], from).await.expect("sent");
                }
            });
            let front = network.serve(server).await;
            let caller = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
            Scene { network, server, caller, front, _server: tasks }
        }

        fn forth(&self) -> Way {
            (self.caller.local_addr().expect("it is bound"), self.server)
        }

        fn back(&self) -> Way {
            (self.server, self.forth().0)
        }

        async fn send(&self, byte: u8) {
            self.caller.send_to(&[byte; 20], self.front).await.expect("sent");
        }

        /// The next that comes back, if one does in a while.
        async fn next(&self) -> Option<Vec<u8>> {
            let mut datagram = [0; 100];
            let received = timeout(Duration::from_millis(300), self.caller.recv(&mut datagram)).await.ok()?;
            Some(datagram[..received.expect("received")].to_vec())
        }

        async fn echo(&self, byte: u8) -> Option<Vec<u8>> {
            self.send(byte).await;
            self.next().await
        }
    }

    #[tokio::test]
    async fn each_direction_is_cut_for_itself_and_heals() {
        let scene = Scene::new().await;
        assert_eq!(scene.echo(1).await, Some(vec![1; 20]));
        for way in [scene.forth(), scene.back()] {
            let before = scene.network.links().traffic().cut;
            let cut = scene.network.links().impair([way], Link::CUT);
            assert_eq!(scene.echo(2).await, None);
            assert_eq!(scene.network.links().traffic().cut, before + 1);
            drop(cut);
            assert_eq!(scene.echo(3).await, Some(vec![3; 20]));
        }
        let stranger: SocketAddr = "127.0.0.1:1".parse().expect("an address");
        let _cut = scene.network.links().cut(stranger, scene.server);
        assert_eq!(scene.echo(4).await, Some(vec![4; 20]), "others are not concerned");
    }

    #[tokio::test]
    async fn who_is_cut_off_twice_must_be_healed_twice() {
        let scene = Scene::new().await;
        let (client, server) = scene.forth();
        let first = scene.network.links().cut(client, server);
        let second = scene.network.links().cut(client, server);
        drop(first);
        assert_eq!(scene.echo(1).await, None);
        drop(second);
        assert_eq!(scene.echo(2).await, Some(vec![2; 20]));
    }

    #[tokio::test]
    async fn a_part_is_lost_and_a_part_comes_twice() {
        let scene = Scene::new().await;
        let lossy = scene.network.links().impair([scene.forth()], Link { loss: 1.0, ..Link::default() });
        assert_eq!(scene.echo(1).await, None);
        lossy.set(Link { duplicated: 1.0, ..Link::default() });
        assert_eq!(scene.echo(2).await, Some(vec![2; 20]));
        assert_eq!(scene.next().await, Some(vec![2; 20]));
        lossy.set(Link { loss: 0.3, ..Link::default() });
        let before = scene.network.links().traffic();
        for byte in 0..200 {
            scene.send(byte).await;
        }
        while scene.next().await.is_some() {}
        let lost = scene.network.links().traffic().lost - before.lost;
        assert!((20..=120).contains(&lost), "{lost} of 200 were lost, and 60 were to be expected");
    }

    #[tokio::test]
    async fn bits_are_flipped_and_later_ones_overtake() {
        let scene = Scene::new().await;
        let impaired =
            scene.network.links().impair([scene.back()], Link { corrupted: 1.0, ..Link::default() });
        let corrupted = scene.echo(0).await.expect("it comes");
        assert_eq!(corrupted.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        impaired.set(Link { reordered: 0.5, ..Link::default() });
        let mut came = Vec::new();
        for byte in 0..60 {
            scene.send(byte).await;
        }
        while let Some(datagram) = scene.next().await {
            came.push(datagram[0]);
        }
        assert!(!came.is_sorted(), "{came:?}");
        came.sort();
        assert_eq!(came, (0..60).collect::<Vec<u8>>());
    }

    #[tokio::test]
    async fn delays_add_up() {
        let scene = Scene::new().await;
        let delay = Duration::from_millis(60);
        let slow = Link { delay, ..Link::default() };
        let _impaired = [
            scene.network.links().impair([scene.forth(), scene.back()], slow),
            scene.network.links().impair([scene.forth()], slow),
        ];
        let began = Instant::now();
        assert_eq!(scene.echo(1).await, Some(vec![1; 20]));
        assert!(began.elapsed() >= 3 * delay, "{:?}", began.elapsed());
    }
}
