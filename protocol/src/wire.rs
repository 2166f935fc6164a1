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
            return Err(WireError::Version { theirs: bytes[4].into() });
        }
        let kind = match bytes[5] {
            1 => Kind::Request,
            2 => Kind::Response,
            other => return Err(WireError::Kind(other)),
        };
        let length = u32_at(8);
        if length as usize > FRAME_BYTES_MAX {
            return Err(WireError::TooLarge { length: length.into() });
        }
        Ok(Header { kind, length, timeout_millis: u32_at(12), correlation: u64_at(16), checksum: u64_at(24) })
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
        return Err(WireError::TooLarge { length: length as u64 });
    }
    let mut header = Header { kind, length: length as u32, timeout_millis, correlation, checksum: 0 };
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
    if checksum(header, payload) == expected { Ok(()) } else { Err(WireError::Checksum) }
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
    pub const OURS: Hello = Hello { version_min: VERSION_MIN, version_max: VERSION };

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use expect_test::{Expect, expect};
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;
    use crate::limits::FRAME_BYTES_MAX;
    use crate::message::samples::{prepare, requests, responses, work};
    use crate::message::{Request, Response};

    /// Sixteen bytes to a line.
    fn hex(bytes: &[u8]) -> String {
        let line = |line: &[u8]| {
            let bytes: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            bytes.join(" ") + "\n"
        };
        bytes.chunks(16).map(line).collect()
    }

    fn check_bytes(bytes: &[u8], expected: Expect) {
        expected.assert_eq(&hex(bytes));
    }

    fn frame() -> Bytes {
        seal(Kind::Request, 0x1122_3344_5566_7788, 1_500, &prepare()).expect("a small frame")
    }

    /// Why there is no message in some bytes.
    #[derive(PartialEq, Debug)]
    enum Refusal {
        Wire(WireError),
        /// They end too early.
        Truncated,
    }

    /// What a reader does with a stream that consists of these bytes.
    fn receive(stream: &[u8]) -> Result<(Header, Request), Refusal> {
        let (head, rest) = stream.split_first_chunk().ok_or(Refusal::Truncated)?;
        let header = Header::read(head).map_err(Refusal::Wire)?;
        let payload = rest.get(..header.length as usize).ok_or(Refusal::Truncated)?;
        open(head, payload).map_err(Refusal::Wire)?;
        let request = decode(payload).map_err(Refusal::Wire)?;
        Ok((header, request))
    }

    /// A frame whose header was changed in one place, with a checksum that is right again.
    fn forged(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut forged = frame().to_vec();
        forged[at..at + bytes.len()].copy_from_slice(bytes);
        let (head, payload) = forged.split_at_mut(HEADER_BYTES);
        let sum = checksum(head, payload);
        head[24..32].copy_from_slice(&sum.to_be_bytes());
        forged
    }

    #[test]
    fn a_frame_is_a_format() {
        check_bytes(
            &frame(),
            expect![[r#"
                54 52 54 48 01 01 00 00 00 00 01 11 00 00 05 dc
                11 22 33 44 55 66 77 88 ff 37 0d 56 f6 9d d5 c4
                00 07 00 00 00 00 00 00 00 01 70 6f 73 74 67 72
                65 73 73 65 65 6e fc ff ff ff 04 00 00 00 05 00
                00 00 00 00 00 00 7b 6c 69 73 74 7d 2f 7b 6c 69
                73 74 7d 30 f2 ff ff ff 07 00 00 00 01 f0 ff ff
                ff 07 00 00 00 06 00 00 00 00 00 00 00 61 20 6b
                65 79 20 74 68 61 74 20 69 73 20 6c 6f 6e 67 65
                72 20 74 68 61 6e 20 61 20 77 6f 72 64 76 61 6c
                75 65 67 6f 6e 65 d7 ff ff ff 20 00 00 00 01 ee
                ff ff ff 05 00 00 00 eb ff ff ff 04 00 00 00 00
                00 00 00 00 00 00 00 00 01 07 00 03 08 07 06 05
                04 03 02 01 ff c0 ee ff c0 ee ff c0 03 00 00 00
                00 00 00 00 09 00 00 00 00 00 00 00 44 ff ff ff
                02 00 00 00 52 ff ff ff 01 00 00 00 68 ff ff ff
                01 00 00 00 a2 ff ff ff 02 00 00 00 00 00 00 00
                00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
                00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
                00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
                00
            "#]],
        );
    }

    #[test]
    fn a_hello_is_a_format() {
        check_bytes(
            &Hello::OURS.to_bytes(),
            expect![[r#"
            54 52 54 48 00 01 00 01 00 00 00 00 00 00 00 00
        "#]],
        );
    }

    #[test]
    fn work_in_a_log_is_a_format() {
        check_bytes(
            &encode(&work()),
            expect![[r#"
            73 65 65 6e fc ff ff ff 04 00 00 00 05 00 00 00
            00 00 00 00 7b 6c 69 73 74 7d 2f 7b 6c 69 73 74
            7d 30 f2 ff ff ff 07 00 00 00 01 f0 ff ff ff 07
            00 00 00 06 00 00 00 00 00 00 00 61 20 6b 65 79
            20 74 68 61 74 20 69 73 20 6c 6f 6e 67 65 72 20
            74 68 61 6e 20 61 20 77 6f 72 64 76 61 6c 75 65
            67 6f 6e 65 d7 ff ff ff 20 00 00 00 01 ee ff ff
            ff 05 00 00 00 eb ff ff ff 04 00 00 00 00 00 00
            00 00 00 00 00 00 7e ff ff ff 01 00 00 00 94 ff
            ff ff 01 00 00 00 ce ff ff ff 02 00 00 00
        "#]],
        );
    }

    #[test]
    fn every_message_is_a_format() {
        let mut lines = String::new();
        for request in requests() {
            let bytes = encode(&request);
            lines += &format!("{} {} {:016x}\n", request.name(), bytes.len(), xxh3_64(&bytes));
        }
        for (index, response) in responses().iter().enumerate() {
            let bytes = encode(response);
            lines += &format!("response {index} {} {:016x}\n", bytes.len(), xxh3_64(&bytes));
        }
        expect![[r#"
            Timestamps 121 3616b72a130cb940
            Commit 288 2abbaac2bf0c340a
            Outcome 130 c8b379d8e0c7bda1
            WhoLeads 121 57ac92b8aecadf40
            Map 121 2fec82f48ee9af50
            Register 214 05ba93abfc0dcfb7
            Moved 137 5d2d1158d04c85b9
            Carried 121 a0efd039563ed48e
            Resolve 169 de0d6d8053030b5a
            Ends 121 b7840a2f787c3a77
            Greet 137 3f85da615b3a809d
            Greet 121 42913ed348d51d44
            Read 138 a317dbd68bc80805
            Scan 122 d84610938af5c722
            ShardWhoLeads 121 64a3eb0f4cc7d01a
            Prepare 273 9ffbd94d74fb0095
            CommitOnePhase 255 c9fb88f0eeff51a4
            Finish 171 d734e23dad9949d5
            Prepared 121 4db54efb2e920fe2
            ShardOutcome 121 171892a6b0d8fd20
            Raft 291 2a360a928a5e3797
            Raft 121 be676a72b64b0b75
            Raft 121 0feecdd71abf75b8
            Raft 121 6f70b93fd3889a89
            Raft 157 b9d2210565f5e0be
            Raft 171 6ce561c20ac8f94d
            Raft 185 0a8b701a3369f308
            Status 121 d0973be228800bd1
            Overview 121 35fdf0a6e36e422d
            Node 121 1ce4d6e64682252b
            Coordinators 153 09f5a63d86392533
            Coordinators 129 5df08c26e259ba68
            Coordinators 121 031cb7793c0a26e3
            InDoubt 121 259e5bb4e2433a3d
            Txn 121 0d698946cf000ab5
            ResolveByHand 121 8d3d48c9e5313e3d
            Switchover 121 ba2bfe4c35a53dcc
            Fault 121 6b67823133c1c092
            response 0 174 ee57fde4f59b817e
            response 1 174 07851ef1417a0fe9
            response 2 174 9a66891350d3b530
            response 3 418 951701bfe9b0fe50
            response 4 174 cc2fa8ab52bd4f96
            response 5 418 f0039e669126e993
            response 6 190 93a395f0b7cdaf2e
            response 7 206 fc6f34c2403edc18
            response 8 174 395ee81807404b79
            response 9 174 fa3a6b75f399ffff
            response 10 174 29164e7ca0dd7e36
            response 11 174 6df36435181b952c
            response 12 174 fcccd2c9f789eb81
            response 13 201 7e384e2da7069e3f
            response 14 191 e14f9751da3d6667
            response 15 204 cae67000f4ce8d42
            response 16 174 8244877a1b7ea4e9
            response 17 174 60dbf9a89e01a1f5
            response 18 174 b5497b3fc42a5407
            response 19 207 f01c4699660e630c
            response 20 175 4f85a8a614a329a3
            response 21 178 787b325cba2d1c50
            response 22 175 f3a59f14b45370b6
            response 23 174 4a50dd395b432d4c
            response 24 174 90c244d1315e2d5c
            response 25 174 cba5a76335241ec8
            response 26 174 a05f53965cdbcbdf
            response 27 174 2219652ea6afb881
            response 28 175 488e1932ab3efd02
            response 29 178 59ea10398f084725
            response 30 175 a06d1bf2b70b2829
            response 31 174 40c450d00c03223d
            response 32 174 2d7f6c60aa9e5de1
            response 33 174 79c3d62cb8354de4
            response 34 174 9ab19e8c7c3e22c8
            response 35 174 63991f088ae3f2b9
            response 36 174 3e8e23fde7cc96aa
            response 37 174 2f0f9c969684d0f0
            response 38 174 a2b271b707583ba6
            response 39 174 ca8a0f3b30b7990a
            response 40 174 3a42e83fe1f12e89
            response 41 174 ce18399bb4406a48
            response 42 182 5eda537186f04a5b
            response 43 174 8e46f61f91712e8a
            response 44 174 6af5cedb18dbbf0d
            response 45 258 127fb45ca9e12eb2
            response 46 226 52215edc19280d5f
            response 47 618 7bbf4f3c099274e2
            response 48 174 be5e35b304bec12f
            response 49 174 c279a822a1b28b6e
            response 50 174 0c530a9e24e2379c
            response 51 174 a2fbed53dfb11815
            response 52 174 0046b861ba04ebb6
            response 53 174 5d7ff5c53bc6752d
            response 54 174 8646b653d6669e57
            response 55 174 bc94fa27b1f176de
            response 56 174 fc699eb44fba9658
            response 57 174 fc8efc8703ee9449
            response 58 174 607aafde36894a3a
            response 59 174 19478c9ebfdc95dc
            response 60 174 91c0a7172903f803
            response 61 174 16999c48c8843628
            response 62 175 627a1303188742e6
            response 63 174 024974e0caee22ea
            response 64 174 baa9b030588e6cc7
            response 65 174 de1f3b8f0c58449c
            response 66 174 c86735394f8138b2
            response 67 174 059264866265ae8a
            response 68 174 3918a36c2feb4a28
            response 69 174 c0e18a782a96e85c
        "#]]
        .assert_eq(&lines);
    }

    #[test]
    fn every_message_comes_back_as_it_was() {
        for request in requests() {
            let frame = seal(Kind::Request, 7, 1_500, &request).expect("a small frame");
            let (header, received) = receive(&frame).expect("what was sealed opens");
            assert_eq!(received, request);
            assert_eq!((header.kind, header.correlation, header.timeout_millis), (Kind::Request, 7, 1_500));
        }
        for response in responses() {
            let bytes = encode(&response);
            assert_eq!(decode(&bytes), Ok(response));
        }
    }

    #[test]
    fn a_message_is_read_from_any_alignment() {
        let bytes = encode(&prepare());
        for offset in 0..16 {
            let mut shifted = vec![0; offset];
            shifted.extend_from_slice(&bytes);
            assert_eq!(decode(&shifted[offset..]), Ok(prepare()), "shifted by {offset}");
        }
    }

    #[test]
    fn the_samples_know_every_request() {
        let names: BTreeSet<_> = requests().iter().map(Request::name).collect();
        assert_eq!(names.len(), 29, "{names:?}");
    }

    #[test]
    fn a_frame_cut_anywhere_is_never_a_frame() {
        let frame = frame();
        for length in 0..frame.len() {
            assert_eq!(receive(&frame[..length]), Err(Refusal::Truncated), "after {length} bytes");
        }
    }

    #[test]
    fn one_flipped_bit_anywhere_is_never_a_frame() {
        for bit in 0..frame().len() * 8 {
            let mut flipped = frame().to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // More bytes follow on a stream, so that a length that grew finds some.
            flipped.resize(1 << 16, 0xa5);
            let refusal = receive(&flipped).expect_err("no bit is without meaning");
            let expected = match bit / 8 {
                0..4 => matches!(refusal, Refusal::Wire(WireError::Magic(_))),
                4 => matches!(refusal, Refusal::Wire(WireError::Version { .. })),
                // Request and response differ in more than one bit.
                5 => matches!(refusal, Refusal::Wire(WireError::Kind(_))),
                8..12 => matches!(
                    refusal,
                    Refusal::Truncated | Refusal::Wire(WireError::Checksum | WireError::TooLarge { .. })
                ),
                _ => refusal == Refusal::Wire(WireError::Checksum),
            };
            assert!(expected, "bit {bit}: {refusal:?}");
        }
    }

    #[test]
    fn foreign_headers_are_refused_by_name_though_their_checksum_is_right() {
        let check = |at: usize, bytes: &[u8], expected: &str| {
            let refusal = receive(&forged(at, bytes)).expect_err(expected);
            let Refusal::Wire(error) = refusal else {
                panic!("{refusal:?} instead of {expected}");
            };
            assert_eq!(error.to_string(), expected);
        };
        check(0, b"HTTP", "not a Troth frame: it begins with 0x48545450");
        check(4, &[9], "protocol version 9 is not supported; this side speaks 1 to 1");
        check(4, &[0], "protocol version 0 is not supported; this side speaks 1 to 1");
        check(5, &[0], "unknown frame kind 0");
        check(5, &[3], "unknown frame kind 3");
        let above = FRAME_BYTES_MAX as u32 + 1;
        check(8, &above.to_be_bytes(), "a frame of 50331649 bytes is larger than 50331648 allows");
        check(8, &[0xff; 4], "a frame of 4294967295 bytes is larger than 50331648 allows");
    }

    #[test]
    fn a_payload_of_another_kind_is_malformed() {
        let frame = seal(Kind::Request, 7, 0, &Bytes::from(vec![0xff; 500])).expect("a small frame");
        let refusal = receive(&frame).expect_err("bytes are no request");
        assert!(matches!(refusal, Refusal::Wire(WireError::Malformed(_))), "{refusal:?}");
    }

    #[test]
    fn the_largest_payload_is_sealed_and_one_byte_more_is_not() {
        let overhead = encode(&Bytes::from_static(&[1; 64])).len() - 64;
        let seal = |bytes: usize| seal(Kind::Response, 7, 0, &Bytes::from(vec![1; bytes - overhead]));
        let frame = seal(FRAME_BYTES_MAX).expect("the largest payload");
        let head = frame.first_chunk().expect("a header");
        assert_eq!(Header::read(head).map(|header| header.length as usize), Ok(FRAME_BYTES_MAX));
        let length = FRAME_BYTES_MAX as u64 + 1;
        assert_eq!(seal(FRAME_BYTES_MAX + 1), Err(WireError::TooLarge { length }));
    }

    #[test]
    fn hellos_agree_on_the_newest_common_version_or_say_why_not() {
        let hello = |version_min, version_max| {
            let hello = Hello { version_min, version_max };
            Hello::agree(&hello.to_bytes())
        };
        assert_eq!(hello(1, 1), Ok(1));
        assert_eq!(hello(1, 9), Ok(1), "a newer program that still speaks our version");
        assert_eq!(hello(0, 1), Ok(1));
        assert_eq!(hello(2, 9), Err(WireError::Version { theirs: 2 }), "too new");
        assert_eq!(hello(0, 0), Err(WireError::Version { theirs: 0 }), "too old");
        let mut foreign = Hello::OURS.to_bytes();
        foreign[0] = b'X';
        assert_eq!(Hello::agree(&foreign), Err(WireError::Magic(0x5852_5448)));
    }

    proptest! {
        #[test]
        fn garbage_is_refused_not_panicked_on(garbage in proptest::collection::vec(any::<u8>(), 0..600)) {
            // Almost nothing random is a message; what counts is that there is an answer.
            let _ = (decode::<Request>(&garbage), decode::<Response>(&garbage), receive(&garbage));
        }

        #[test]
        fn almost_a_message_is_refused_not_panicked_on(
            message in proptest::sample::select(requests()),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
            length: proptest::sample::Index,
        ) {
            let mut bytes = encode(&message);
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let _ = decode::<Request>(&bytes);
            bytes.truncate(length.index(bytes.len()));
            let _ = decode::<Request>(&bytes);
        }

        #[test]
        fn almost_an_answer_is_refused_not_panicked_on(
            message in proptest::sample::select(responses()),
            at: proptest::sample::Index,
            byte: u8,
        ) {
            let mut bytes = encode(&message);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode::<Response>(&bytes);
        }
    }
}
