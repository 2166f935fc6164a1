//! Reading without writing.

use bytes::Bytes;
use troth_protocol::{Key, KeyRange, Timestamp};

use crate::error::Error;
use crate::reader::Reader;
use crate::scan::Scan;
use crate::transaction::checked_key;

/// The database at one moment. Reads never abort anybody and are never aborted; all of them see the
/// same moment, for as long as the servers keep old versions (ten minutes by default). Each call has
/// the timeout of the client's configuration for itself.
#[derive(Clone)]
pub struct Snapshot {
    pub(crate) reader: Reader,
}

impl Snapshot {
    /// The moment.
    pub fn timestamp(&self) -> Timestamp {
        self.reader.at
    }

    /// The value of a key; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Blocked`] if a transaction in doubt is in the way until the deadline;
    /// [`Error::Unavailable`]; [`Error::TooOld`]; [`Error::Limit`] for a key that cannot be.
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>, Error> {
        Ok(self.get_many([key]).await?.pop().flatten())
    }

    /// The values of keys, in their order. All shards are asked at the same time.
    ///
    /// # Errors
    /// As [`Snapshot::get`].
    pub async fn get_many<K: AsRef<[u8]>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Vec<Option<Bytes>>, Error> {
        let keys =
            keys.into_iter().map(|key| checked_key(key.as_ref())).collect::<Result<Vec<Key>, Error>>()?;
        let versions = self.reader.read(&keys).await?;
        Ok(versions.into_iter().map(|version| version.value).collect())
    }

    /// The keys of a range that have a value, in order, with their values: at most `limit` of them.
    /// For the next page, begin just after the last key.
    ///
    /// # Errors
    /// As [`Snapshot::get`].
    pub async fn scan(&self, range: KeyRange, limit: usize) -> Result<Vec<(Key, Bytes)>, Error> {
        let mut rows = Vec::new();
        let mut scan = Scan::new(self.reader.clone(), range, limit);
        while rows.len() < limit
            && let Some(row) = scan.next().await?
        {
            rows.push((row.key, row.value));
        }
        Ok(rows)
    }
}
