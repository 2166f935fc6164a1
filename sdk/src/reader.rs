//! Reading at one moment, from whatever shards hold the keys.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::time::Instant;
use troth_protocol::message::shard::{Request, Response, Row, Version};
use troth_protocol::routing::{Resend, Router};
use troth_protocol::{Key, KeyRange, ShardId, Timestamp};

use crate::error::Error;

/// Keys that one request names.
const KEYS_MAX: usize = 1000;

/// How long to wait for answers.
#[derive(Clone, Copy)]
pub(crate) enum Patience {
    /// Everything together, until then.
    Until(Instant),
    /// Every call by itself, this long.
    Each(Duration),
}

/// Nobody waits for longer, and every clock can count so far: ten years.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// The moment after a time, however long that is.
pub(crate) fn after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(LONGEST)
}

impl Patience {
    /// When a call that begins now must be over.
    pub(crate) fn deadline(self) -> Instant {
        match self {
            Patience::Until(deadline) => deadline,
            Patience::Each(timeout) => after(timeout),
        }
    }
}

/// Reads at a moment.
#[derive(Clone)]
pub(crate) struct Reader {
    pub(crate) router: Arc<Router>,
    pub(crate) at: Timestamp,
    pub(crate) patience: Patience,
}

impl Reader {
    pub(crate) fn shards(&self) -> u16 {
        self.router.map().shards
    }

    /// The versions of keys, in the order of the keys. Shards are asked at the same time.
    pub(crate) async fn read(&self, keys: &[Key]) -> Result<Vec<Version>, Error> {
        let mut places: BTreeMap<ShardId, Vec<usize>> = BTreeMap::new();
        for (place, key) in keys.iter().enumerate() {
            places.entry(key.shard(self.shards())).or_default().push(place);
        }
        let requests = places.iter().flat_map(|(shard, places)| {
            places.chunks(KEYS_MAX).map(|chunk| self.read_shard(*shard, chunk, keys))
        });
        let mut versions = vec![Version { version: Timestamp::ZERO, value: None }; keys.len()];
        for (places, found) in try_join_all(requests).await? {
            for (place, version) in places.iter().zip(found) {
                versions[*place] = version;
            }
        }
        Ok(versions)
    }

    async fn read_shard<'a>(
        &self,
        shard: ShardId,
        places: &'a [usize],
        keys: &[Key],
    ) -> Result<(&'a [usize], Vec<Version>), Error> {
        let mut versions = Vec::with_capacity(places.len());
        // Many large values take several answers.
        while versions.len() < places.len() {
            let keys: Vec<Key> = places[versions.len()..].iter().map(|place| keys[*place].clone()).collect();
            let wanted = keys.len();
            let request = Request::Read { at: self.at, keys };
            let answer =
                self.router.shard(shard, request, Resend::Idempotent, self.patience.deadline()).await;
            match answer.map_err(Error::routed)? {
                Response::Values(found) if (1..=wanted).contains(&found.len()) => versions.extend(found),
                _ => return Err(Error::unavailable("a shard answered something else")),
            }
        }
        Ok((places, versions))
    }

    /// A page of a range from one shard, and whether there may be more.
    pub(crate) async fn page(
        &self,
        shard: ShardId,
        range: KeyRange,
        rows_max: u32,
    ) -> Result<(Vec<Row>, bool), Error> {
        let request = Request::Scan { at: self.at, range, rows_max };
        let answer = self.router.shard(shard, request, Resend::Idempotent, self.patience.deadline()).await;
        match answer.map_err(Error::routed)? {
            Response::Page { rows, more } => Ok((rows, more)),
            _ => Err(Error::unavailable("a shard answered something else")),
        }
    }
}
