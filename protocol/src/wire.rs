//! How a message becomes bytes, and how bytes become a message, once, at the door.
//!
//! A frame is a header of 32 bytes, big-endian, and a payload in rkyv's format:
//!
//! ```text
//! [ magic "TRTH" u32 | version u8 | kind u8 | 0 u16 | length u32 | timeout ms u32 | correlation u64 | checksum u64 | payload ]
//! ```
//!
//! `length` counts the payload. `timeout` is how long the caller waits for the answer, so the
//! deadline travels with the request. `checksum` is xxh3 over the header before it, continued over
//! the payload. Payloads are validated in full when they are decoded; past this module they are
//! types.
//!
//! A connection begins with a [`Hello`] in each direction, whose form never changes, so that any
//! two versions can at least tell each other that they do not understand one another.

use bytes::Bytes;
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::{Archive, Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::limits::FRAME_BYTES_MAX;

/// The first four bytes of every frame and hello.
pub const MAGIC: u32 = u32::from_be_bytes(*b"TRTH");

/// The version of the protocol that this program speaks.
pub const VERSION: u16 = 1;

/// The oldest version of the protocol that this program understands.
pub const VERSION_MIN: u16 = 1;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;

/// Bytes of a hello.
pub const HELLO_BYTES: usize = 16;

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A [`Request`](crate::message::Request).
    Request,
    /// A [`Response`](crate::message::Response).
    Response,
}

/// The header of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the frame carries.
    pub kind: Kind,
    /// Bytes of payload.
    pub length: u32,
    /// How long the caller waits for the answer; 0 in a response.
    pub timeout_millis: u32,
    /// Ties a response to its request.
    pub correlation: u64,
    /// Over the rest of the header and the payload.
    pub checksum: u64,
}

/// Bytes that are not a frame. After one of these a stream cannot be trusted any more.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// Something else than Troth is talking.
    #[error("not a Troth frame: it begins with {0:#010x}")]
    Magic(u32),
    /// The other side is too old or too new.
    #[error("protocol version {theirs} is not supported; this side speaks {VERSION_MIN} to {VERSION}")]
    Version {
        /// What the other side speaks.
        theirs: u16,
    },
    /// An unknown kind of frame.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// The payload is larger than any frame may be.
    #[error("a frame of {length} bytes is larger than {max} allows", max = FRAME_BYTES_MAX)]
    TooLarge {
        /// Bytes announced.
        length: u64,
    },
    /// The bytes changed on their way.
    #[error("the checksum of a frame does not match")]
    Checksum,
    /// The payload is not what its kind says.
    #[error("malformed payload: {0}")]
    Malformed(String),
}

impl Header {
    /// Reads a header. The checksum is verified with the payload, by [`open`].
    ///
    /// # Errors
    /// If these bytes do not begin a frame that this program understands.
    pub fn read(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if u32_at(0) != MAGIC {
            return Err(WireError::Magic(u32_at(0)));
        }
        if u16::from(bytes[4]) != VERSION {
            return Err(WireError::Version {
                theirs: bytes[4].into(),
            });
        }
        let kind = match bytes[5] {
            1 => Kind::Request,
            2 => Kind::Response,
            other => return Err(WireError::Kind(other)),
        };
        let length = u32_at(8);
        if length as usize > FRAME_BYTES_MAX {
            return Err(WireError::TooLarge {
                length: length.into(),
            });
        }
        Ok(Header {
            kind,
            length,
            timeout_millis: u32_at(12),
            correlation: u64_at(16),
            checksum: u64_at(24),
        })
    }

    fn write(&self, bytes: &mut [u8]) {
        bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4] = VERSION as u8;
        bytes[5] = match self.kind {
            Kind::Request => 1,
            Kind::Response => 2,
        };
        bytes[6..8].fill(0);
        bytes[8..12].copy_from_slice(&self.length.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.timeout_millis.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.correlation.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.checksum.to_be_bytes());
    }
}

fn checksum(header: &[u8], payload: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&header[..24]);
    hash.update(payload);
    hash.digest()
}

/// What can be sent: everything that rkyv can serialize.
pub trait Encode: for<'a> Serialize<HighSerializer<Vec<u8>, ArenaHandle<'a>, rancor::Error>> {}
impl<T> Encode for T where T: for<'a> Serialize<HighSerializer<Vec<u8>, ArenaHandle<'a>, rancor::Error>> {}

/// What can be received: everything that rkyv can validate and deserialize.
pub trait Decode: Archive + Sized
where
    Self::Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
        + Deserialize<Self, HighDeserializer<rancor::Error>>,
{
}
impl<T> Decode for T
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
        + Deserialize<T, HighDeserializer<rancor::Error>>,
{
}

/// Appends the encoded form of a value.
pub fn encode_into<T: Encode>(value: &T, out: Vec<u8>) -> Vec<u8> {
    rkyv::api::high::to_bytes_in::<_, rancor::Error>(value, out).expect("writing to memory does not fail")
}

/// The encoded form of a value, without a frame: for values that are stored.
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    encode_into(value, Vec::with_capacity(256))
}

/// Validates and reads what [`encode`] wrote.
///
/// # Errors
/// [`WireError::Malformed`] for any other bytes.
pub fn decode<T>(bytes: &[u8]) -> Result<T, WireError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>>
        + Deserialize<T, HighDeserializer<rancor::Error>>,
{
    rkyv::from_bytes::<T, rancor::Error>(bytes).map_err(|error| WireError::Malformed(error.to_string()))
}

/// Makes a frame of a message.
///
/// # Errors
/// [`WireError::TooLarge`] if the payload exceeds [`FRAME_BYTES_MAX`].
pub fn seal<T: Encode>(
    kind: Kind,
    correlation: u64,
    timeout_millis: u32,
    message: &T,
) -> Result<Bytes, WireError> {
    let mut frame = Vec::with_capacity(512);
    frame.resize(HEADER_BYTES, 0);
    let mut frame = encode_into(message, frame);
    let length = frame.len() - HEADER_BYTES;
    if length > FRAME_BYTES_MAX {
        return Err(WireError::TooLarge {
            length: length as u64,
        });
    }
    let mut header = Header {
        kind,
        length: length as u32,
        timeout_millis,
        correlation,
        checksum: 0,
    };
    let (head, payload) = frame.split_at_mut(HEADER_BYTES);
    header.write(head);
    header.checksum = checksum(head, payload);
    header.write(head);
    Ok(Bytes::from(frame))
}

/// Checks that a payload is the one its header was made for.
///
/// # Errors
/// [`WireError::Checksum`] if it is not.
pub fn open(header: &[u8; HEADER_BYTES], payload: &[u8]) -> Result<(), WireError> {
    let expected = u64::from_be_bytes(header[24..32].try_into().expect("eight bytes"));
    if checksum(header, payload) == expected {
        Ok(())
    } else {
        Err(WireError::Checksum)
    }
}

/// How a connection begins: `[ magic u32 | version min u16 | version max u16 | 0 u64 ]`, big-endian.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The oldest version that the sender understands.
    pub version_min: u16,
    /// The newest version that the sender understands.
    pub version_max: u16,
}

impl Hello {
    /// What this program says.
    pub const OURS: Hello = Hello {
        version_min: VERSION_MIN,
        version_max: VERSION,
    };

    /// The form on the wire.
    pub fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.version_min.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.version_max.to_be_bytes());
        bytes
    }

    /// Reads what the other side said, and agrees on the newest version that both understand.
    ///
    /// # Errors
    /// If it is not a hello, or there is no such version.
    pub fn agree(bytes: &[u8; HELLO_BYTES]) -> Result<u16, WireError> {
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let magic = u32::from_be_bytes(bytes[0..4].try_into().expect("four bytes"));
        if magic != MAGIC {
            return Err(WireError::Magic(magic));
        }
        let (min, max) = (u16_at(4), u16_at(6));
        if max < VERSION_MIN {
            return Err(WireError::Version { theirs: max });
        }
        if min > VERSION {
            return Err(WireError::Version { theirs: min });
        }
        Ok(max.min(VERSION))
    }
}
