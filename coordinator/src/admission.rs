//! Who may begin a transaction now, and who is told to come back later.
//!
//! A transaction that is refused at its beginning has cost next to nothing; one that is refused at its
//! commit has been read for. So the number of transactions that are under way, from the timestamp that
//! begins one to its decision, has a limit, and beyond it no more begin.
//!
//! ```text
//!   limit ▲ a little, while it is reached and commits are quick
//!         ▼ to a tenth less than are under way, when half of the commits take longer than the target
//! ```
//!
//! It begins at its largest: where nothing is known to be slow, nobody is refused.
//!
//! *Fair*: a client that has fewer under way than its share of the limit may begin, however many the
//! others have. *Separate*: a transaction that waits for a shard much longer than usual does not count,
//! and of those that wait for one shard there is a limit of its own: so a slow shard holds up nobody
//! but those who need it.
//!
//! Pure: time is an argument.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use troth_protocol::{ClientId, ShardId, TxnId};

/// The limit is looked at this often.
const WINDOW: Duration = Duration::from_millis(100);

/// With fewer commits in a window than this, the window is not over.
const SAMPLES_MIN: usize = 16;

/// Samples of one window.
const SAMPLES_MAX: usize = 4096;

/// The quickest window of this long a time tells how long a commit takes if nobody is in its way.
const QUIET_MEMORY: Duration = Duration::from_secs(30);

/// A client that has not asked for this long has no share.
const CLIENT_MEMORY: Duration = Duration::from_secs(1);

/// Clients that are remembered; beyond that they share as one.
const CLIENTS_MAX: usize = 4096;

/// A transaction that has begun is counted at most this long before its commit arrives.
const BEGUN_MEMORY: Duration = Duration::from_secs(1);

/// A transaction that waits this many times longer than half of the others do waits for a slow shard;
/// and not before this long.
const SLOW_FACTOR: u32 = 8;
const SLOW_MIN: Duration = Duration::from_millis(200);

/// The limit falls at once to as many as are under way, but no further than this, and below by tenths:
/// that few commits are slow may have another reason than their number.
const LIMIT_FALLS_TO: usize = 256;

/// Half of the limit may wait for one shard, but at least and at most so many.
const WAITING_MIN: usize = 64;
const WAITING_MAX: usize = 1024;

/// The shortest and longest time after which who was refused shall come back.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_millis(1000);

/// What bounds admission.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// The least transactions under way that the limit allows.
    pub limit_min: usize,
    /// The most.
    pub limit_max: usize,
    /// Fewer are admitted when half of the commits take longer than this, and longer than twice what
    /// they take when there is little to do.
    pub target: Duration,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { limit_min: 16, limit_max: 8192, target: Duration::from_millis(100) }
    }
}

/// What became of a request to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Admitted {
    /// So many may begin.
    pub count: u32,
    /// The others shall come back after this.
    pub retry_after: Duration,
}

#[derive(Clone, Debug)]
struct Client {
    asked: Instant,
    /// Transactions that have begun, by when they are not counted any more.
    begun: VecDeque<(Instant, usize)>,
    begun_count: usize,
    /// Transactions whose commit has arrived and is not decided.
    flights: usize,
}

#[derive(Clone, Debug)]
struct Flight {
    arrived: Instant,
    /// Whose it counts as, unless it waits for a slow shard.
    client: Option<ClientId>,
    /// Shards that it waits for.
    waits_for: BTreeSet<ShardId>,
    /// It waits for a slow shard, and does not count.
    stuck: bool,
}

/// Who may begin. See the [module](self).
#[derive(Clone, Debug)]
pub struct Admission {
    bounds: Bounds,
    limit: f64,
    clients: BTreeMap<ClientId, Client>,
    flights: BTreeMap<TxnId, Flight>,
    by_age: BTreeSet<(Instant, TxnId)>,
    waiting: BTreeMap<ShardId, usize>,
    begun: usize,
    stuck: usize,
    /// Of those that begin, this share comes to commit.
    share: f64,
    begun_lately: f64,
    arrived_lately: f64,
    /// The window.
    window: Instant,
    samples: Vec<Duration>,
    /// Whether the limit was reached in this window.
    reached: bool,
    /// The most that were under way in this window.
    peak: usize,
    /// What half of the commits took at most, in the last window.
    usual: Duration,
    /// The quickest windows: when, and how quick.
    quiet: VecDeque<(Instant, Duration)>,
    /// Counted in this window and the one before: decided, and refused.
    decided: [f64; 2],
    refused: [f64; 2],
}

impl Admission {
    /// Nobody has asked yet.
    pub fn new(bounds: Bounds, now: Instant) -> Admission {
        Admission {
            bounds,
            limit: bounds.limit_max as f64,
            clients: BTreeMap::new(),
            flights: BTreeMap::new(),
            by_age: BTreeSet::new(),
            waiting: BTreeMap::new(),
            begun: 0,
            stuck: 0,
            share: 1.0,
            begun_lately: 0.0,
            arrived_lately: 0.0,
            window: now,
            samples: Vec::new(),
            reached: false,
            peak: 0,
            usual: Duration::ZERO,
            quiet: VecDeque::new(),
            decided: [0.0; 2],
            refused: [0.0; 2],
        }
    }

    /// How many transactions may be under way.
    pub fn limit(&self) -> usize {
        self.limit as usize
    }

    /// How many are: those that have begun and will come to commit, and those that are being decided;
    /// without those that wait for a slow shard.
    pub fn under_way(&self) -> usize {
        (self.begun as f64 * self.share) as usize + self.flights.len() - self.stuck
    }

    /// A client wants to begin so many.
    pub fn begin(&mut self, now: Instant, client: ClientId, count: u32) -> Admitted {
        self.expire(now);
        let client = if self.clients.len() >= CLIENTS_MAX && !self.clients.contains_key(&client) {
            ClientId::default()
        } else {
            client
        };
        let active = self.clients.len() + usize::from(!self.clients.contains_key(&client));
        let fair = self.limit() / active.max(1);
        let free = self.limit().saturating_sub(self.under_way());
        let own = self.clients.entry(client).or_insert_with(|| Client {
            asked: now,
            begun: VecDeque::new(),
            begun_count: 0,
            flights: 0,
        });
        own.asked = now;
        let held = (own.begun_count as f64 * self.share) as usize + own.flights;
        let granted = free.max(fair.saturating_sub(held)).min(count as usize);
        if granted > 0 {
            own.begun.push_back((now + BEGUN_MEMORY, granted));
            own.begun_count += granted;
            self.begun += granted;
            self.begun_lately += granted as f64;
        }
        let refused = count as usize - granted;
        self.reached |= refused > 0 || granted == free;
        self.peak = self.peak.max(self.under_way());
        self.refused[0] += refused as f64;
        Admitted { count: granted as u32, retry_after: self.retry_after() }
    }

    /// When those that are refused now would get their turn, if all came back.
    fn retry_after(&self) -> Duration {
        let decided: f64 = self.decided.iter().sum();
        let refused: f64 = self.refused.iter().sum();
        (2 * WINDOW).mul_f64((refused / decided.max(1.0)).min(100.0)).clamp(RETRY_MIN, RETRY_MAX)
    }

    /// A commit has arrived.
    ///
    /// # Errors
    /// If too many wait for one of the shards already: come back after this.
    pub fn arrive(
        &mut self,
        now: Instant,
        txn: TxnId,
        shards: impl IntoIterator<Item = ShardId>,
    ) -> Result<(), Duration> {
        let waits_for: BTreeSet<ShardId> = shards.into_iter().collect();
        let most = (self.limit() / 2).clamp(WAITING_MIN, WAITING_MAX);
        if waits_for.iter().any(|shard| self.waiting.get(shard).is_some_and(|count| *count >= most)) {
            self.refused[0] += 1.0;
            return Err(SLOW_MIN);
        }
        self.arrived_lately += 1.0;
        for shard in &waits_for {
            *self.waiting.entry(*shard).or_default() += 1;
        }
        if let Some(client) = self.clients.get_mut(&txn.client) {
            client.flights += 1;
            if let Some((_, count)) = client.begun.front_mut() {
                *count -= 1;
                if *count == 0 {
                    client.begun.pop_front();
                }
                client.begun_count -= 1;
                self.begun -= 1;
            }
        }
        self.by_age.insert((now, txn));
        self.flights.insert(txn, Flight { arrived: now, client: Some(txn.client), waits_for, stuck: false });
        Ok(())
    }

    /// A shard has done its part.
    pub fn heard(&mut self, txn: TxnId, shard: ShardId) {
        if self.flights.get_mut(&txn).is_some_and(|flight| flight.waits_for.remove(&shard)) {
            self.waits_less(shard);
        }
    }

    fn waits_less(&mut self, shard: ShardId) {
        let count = self.waiting.get_mut(&shard).expect("it was counted");
        *count -= 1;
        if *count == 0 {
            self.waiting.remove(&shard);
        }
    }

    /// A transaction is decided, or given up. `sample`: this tells how long that takes.
    pub fn decided(&mut self, now: Instant, txn: TxnId, sample: bool) {
        let Some(flight) = self.flights.remove(&txn) else { return };
        self.by_age.remove(&(flight.arrived, txn));
        self.stuck -= usize::from(flight.stuck);
        for shard in flight.waits_for {
            self.waits_less(shard);
        }
        if let Some(client) = flight.client.and_then(|client| self.clients.get_mut(&client)) {
            client.flights = client.flights.saturating_sub(1);
        }
        self.decided[0] += 1.0;
        if sample && self.samples.len() < SAMPLES_MAX {
            self.samples.push(now.saturating_duration_since(flight.arrived));
        }
    }

    /// Looks at the window, if it is over. To be called often.
    pub fn tick(&mut self, now: Instant) {
        self.expire(now);
        self.find_stuck(now);
        let over = now >= self.window + WINDOW;
        let enough = self.samples.len() >= SAMPLES_MIN || now >= self.window + 10 * WINDOW;
        if !over || !enough {
            return;
        }
        if self.samples.len() >= SAMPLES_MIN {
            let middle = self.samples.len() / 2;
            self.usual = *self.samples.select_nth_unstable(middle).1;
            self.remember_quiet(now);
            let quick = self.quiet.iter().map(|(_, took)| *took).min().unwrap_or(self.usual);
            if self.usual > self.bounds.target.max(2 * quick) {
                self.limit = 0.9 * self.limit.min(self.peak.max(LIMIT_FALLS_TO) as f64);
            } else if self.reached {
                self.limit += (self.limit * 0.05).max(1.0);
            }
            self.limit = self.limit.clamp(self.bounds.limit_min as f64, self.bounds.limit_max as f64);
        }
        if self.begun_lately >= 1.0 {
            let seen = (self.arrived_lately / self.begun_lately).min(1.0);
            self.share = (0.8 * self.share + 0.2 * seen).max(0.01);
        }
        self.window = now;
        self.samples.clear();
        self.reached = false;
        self.peak = self.under_way();
        (self.begun_lately, self.arrived_lately) = (0.0, 0.0);
        self.decided = [0.0, self.decided[0]];
        self.refused = [0.0, self.refused[0]];
    }

    /// Keeps the quickest windows, each with those that were quicker later.
    fn remember_quiet(&mut self, now: Instant) {
        while self.quiet.front().is_some_and(|(at, _)| *at + QUIET_MEMORY < now) {
            self.quiet.pop_front();
        }
        while self.quiet.back().is_some_and(|(_, took)| *took >= self.usual) {
            self.quiet.pop_back();
        }
        self.quiet.push_back((now, self.usual));
    }

    fn find_stuck(&mut self, now: Instant) {
        let slow = SLOW_MIN.max(SLOW_FACTOR * self.usual);
        for (arrived, txn) in &self.by_age {
            if now.saturating_duration_since(*arrived) < slow {
                break;
            }
            let flight = self.flights.get_mut(txn).expect("both hold the same");
            if !flight.stuck {
                flight.stuck = true;
                self.stuck += 1;
                // Its client shall not be held up with it.
                if let Some(client) = flight.client.take().and_then(|client| self.clients.get_mut(&client)) {
                    client.flights = client.flights.saturating_sub(1);
                }
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        let (mut begun, clients) = (self.begun, &mut self.clients);
        clients.retain(|_, client| {
            while client.begun.front().is_some_and(|(until, _)| *until <= now) {
                let (_, count) = client.begun.pop_front().expect("looked at just now");
                client.begun_count -= count;
                begun -= count;
            }
            let idle = client.begun.is_empty() && client.flights == 0;
            !idle || client.asked + CLIENT_MEMORY > now
        });
        self.begun = begun;
    }
}

#[cfg(test)]
mod tests {
    use troth_protocol::Timestamp;

    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    fn client(number: u64) -> ClientId {
        ClientId(number)
    }

    fn txn(start: u64, by: u64) -> TxnId {
        TxnId { start: Timestamp(start), client: client(by) }
    }

    /// A cluster that decides `capacity` transactions a millisecond, in the order of their arrival.
    struct Model {
        admission: Admission,
        now: Instant,
        queue: VecDeque<TxnId>,
        next: u64,
        capacity: usize,
        done: BTreeMap<ClientId, usize>,
    }

    impl Model {
        fn new(capacity: usize) -> Model {
            let now = Instant::now();
            let admission = Admission::new(Bounds::default(), now);
            Model { admission, now, queue: VecDeque::new(), next: 0, capacity, done: BTreeMap::new() }
        }

        /// A millisecond in which clients want to begin so many each.
        fn milli(&mut self, wanted: &[(u64, u32)]) -> u32 {
            self.now += MILLI;
            let mut admitted = 0;
            for (by, count) in wanted {
                let granted = self.admission.begin(self.now, client(*by), *count).count;
                admitted += granted;
                for _ in 0..granted {
                    self.next += 1;
                    let txn = txn(self.next, *by);
                    self.admission
                        .arrive(self.now, txn, [ShardId((self.next % 16) as u16)])
                        .expect("no slow shard");
                    self.queue.push_back(txn);
                }
            }
            for txn in self.queue.drain(..self.capacity.min(self.queue.len())) {
                *self.done.entry(txn.client).or_default() += 1;
                self.admission.decided(self.now, txn, true);
            }
            self.admission.tick(self.now);
            admitted
        }
    }

    #[test]
    fn four_times_too_much_is_shed_and_what_is_admitted_stays_quick() {
        let mut model = Model::new(6);
        for _ in 0..20_000 {
            model.milli(&[(1, 24)]);
        }
        let before = model.done[&client(1)];
        let mut worst = 0;
        for _ in 0..5_000 {
            model.milli(&[(1, 24)]);
            worst = worst.max(model.queue.len() / model.capacity);
        }
        let done = model.done[&client(1)] - before;
        assert!(done >= 29_900, "nothing is left idle: {done} of 30000");
        assert!(worst < 250, "it took {worst} ms");
        let told = model.admission.begin(model.now, client(1), 1000);
        assert!(told.count < 1000 && told.retry_after > RETRY_MIN, "{told:?}");
    }

    #[test]
    fn what_a_cluster_can_do_is_not_shed() {
        let mut model = Model::new(6);
        let mut admitted = 0;
        for _ in 0..5_000 {
            admitted += model.milli(&[(1, 5)]);
        }
        assert_eq!(admitted, 25_000);
    }

    #[test]
    fn a_greedy_client_does_not_starve_the_others() {
        let mut model = Model::new(6);
        for _ in 0..10_000 {
            model.milli(&[(1, 60), (2, 1), (3, 1)]);
        }
        model.done.clear();
        for _ in 0..1_000 {
            model.milli(&[(1, 60), (2, 1), (3, 1)]);
        }
        // Each wants a sixth of what there is, which is less than its share.
        assert!(model.done[&client(2)] >= 950 && model.done[&client(3)] >= 950, "{:?}", model.done);
        assert!(model.done[&client(1)] >= 3_800, "and the rest is not wasted: {:?}", model.done);
    }

    #[test]
    fn transactions_that_only_read_do_not_use_up_the_limit() {
        let mut model = Model::new(6);
        for _ in 0..20_000 {
            model.now += MILLI;
            model.admission.begin(model.now, client(9), 50);
            model.milli(&[(1, 4)]);
        }
        model.done.clear();
        for _ in 0..1_000 {
            model.now += MILLI;
            let readers = model.admission.begin(model.now, client(9), 50);
            assert!(readers.count > 25, "{readers:?}");
            model.milli(&[(1, 4)]);
        }
        assert!(model.done[&client(1)] >= 3_900, "{:?}", model.done);
    }

    #[test]
    fn a_slow_shard_holds_up_only_those_who_need_it() {
        let mut model = Model::new(6);
        for _ in 0..1_000 {
            model.milli(&[(1, 5)]);
        }
        let slow = ShardId(99);
        let (mut stuck, mut refused) = (0, 0);
        model.done.clear();
        for number in 0..5_000u64 {
            let txn = txn(1_000_000 + number, 1);
            match model.admission.arrive(model.now, txn, [slow]) {
                Ok(()) => stuck += 1,
                Err(_) => refused += 1,
            }
            model.milli(&[(1, 5)]);
        }
        assert!(
            stuck <= WAITING_MAX && refused >= 5_000 - WAITING_MAX,
            "{stuck} wait, {refused} were refused"
        );
        assert!(model.done[&client(1)] >= 24_500, "the others go on: {:?}", model.done);
    }

    #[test]
    fn everything_that_is_counted_is_counted_down() {
        let now = Instant::now();
        let mut admission = Admission::new(Bounds::default(), now);
        assert_eq!(admission.begin(now, client(1), 5).count, 5);
        let shards = [ShardId(1), ShardId(2)];
        admission.arrive(now, txn(1, 1), shards).expect("admitted");
        admission.arrive(now, txn(2, 7), shards).expect("admitted");
        assert_eq!(admission.under_way(), 6);
        admission.heard(txn(1, 1), ShardId(1));
        admission.heard(txn(1, 1), ShardId(1));
        admission.decided(now, txn(1, 1), true);
        admission.decided(now, txn(1, 1), true);
        admission.tick(now + 2 * BEGUN_MEMORY);
        assert_eq!(admission.stuck, 1, "the other one waits for ever");
        admission.decided(now, txn(2, 7), false);
        assert_eq!((admission.under_way(), admission.stuck, admission.begun), (0, 0, 0));
        assert!(admission.waiting.is_empty() && admission.by_age.is_empty() && admission.clients.is_empty());
    }
}
