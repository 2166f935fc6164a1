//! Bounds that every part agrees on. A limit that is larger than another one by necessity says so
//! at compile time.

use std::time::Duration;

/// The longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 4 << 10;

/// The largest value, in bytes.
pub const VALUE_BYTES_MAX: usize = 1 << 20;

/// The most bytes of keys and values that one transaction may read for validation and write.
pub const TXN_BYTES_MAX: usize = 32 << 20;

/// The most keys and ranges that one transaction may name: reads and writes together.
pub const TXN_KEYS_MAX: usize = 100_000;

/// How old a transaction or snapshot may grow before it is refused, unless configured otherwise.
pub const TXN_AGE_MAX: Duration = Duration::from_secs(5 * 60);

/// How long the outcome of a transaction stays answerable, unless configured otherwise.
pub const OUTCOME_RETENTION: Duration = Duration::from_secs(60 * 60);

/// How long a version that was overwritten stays readable, unless configured otherwise.
/// Longer than [`TXN_AGE_MAX`], so that no permitted snapshot loses a version it could read.
pub const VERSION_RETENTION: Duration = Duration::from_secs(10 * 60);

/// The largest frame, in bytes of payload. The largest transaction fits with room for its framing.
pub const FRAME_BYTES_MAX: usize = 48 << 20;

/// A frame of at most this many payload bytes shares a stream with others; a larger one gets a
/// stream of its own, so that nothing small waits behind it.
pub const SHARED_FRAME_BYTES_MAX: usize = 64 << 10;

/// How far ahead of a server's clock a read timestamp from a client may lie.
pub const READ_AHEAD_MAX: Duration = Duration::from_secs(60 * 60);

/// The most rows that one page of a scan returns.
pub const SCAN_ROWS_MAX: usize = 10_000;

/// A page of a scan ends after the row that brings it to this many bytes.
pub const SCAN_BYTES_MAX: usize = 1 << 20;

/// An answer to a read ends after the value that brings it to this many bytes.
pub const READ_BYTES_MAX: usize = 4 << 20;

const _: () = assert!(KEY_BYTES_MAX + VALUE_BYTES_MAX < TXN_BYTES_MAX);
// Every key may cost this much framing beside its own bytes.
const _: () = assert!(TXN_BYTES_MAX + TXN_KEYS_MAX * 64 + (1 << 20) < FRAME_BYTES_MAX);
const _: () = assert!(READ_BYTES_MAX + VALUE_BYTES_MAX < FRAME_BYTES_MAX);
const _: () = assert!(SCAN_BYTES_MAX + KEY_BYTES_MAX + VALUE_BYTES_MAX < FRAME_BYTES_MAX);
const _: () = assert!(TXN_AGE_MAX.as_secs() < VERSION_RETENTION.as_secs());
const _: () = assert!(VERSION_RETENTION.as_secs() <= OUTCOME_RETENTION.as_secs());
