//! Frames on a stream: reading them whole, and writing what waits in one go.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use super::BUDGET_UNIT;
use crate::limits::SHARED_FRAME_BYTES_MAX;
use crate::wire::{self, HEADER_BYTES, Header, WireError};

/// How long the rest of a large frame may take once room is made for it.
const LARGE_FRAME_TIMEOUT: Duration = Duration::from_secs(20);

/// A frame as it arrived, its checksum verified.
pub(super) struct Frame {
    pub header: Header,
    pub payload: Bytes,
    /// The share of the budget that a large frame holds until it is done with.
    pub budget: Option<OwnedSemaphorePermit>,
}

impl Frame {
    /// Whether it came on a stream of its own, which then is the way back too.
    pub(super) fn has_own_stream(&self) -> bool {
        self.header.length as usize > SHARED_FRAME_BYTES_MAX
    }
}

/// Whether a frame that is to be sent needs a stream of its own.
pub(super) fn needs_own_stream(frame: &Bytes) -> bool {
    frame.len() - HEADER_BYTES > SHARED_FRAME_BYTES_MAX
}

/// Why a stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the stream ended inside a frame")]
    Truncated,
    #[error("a large frame took longer than {} s to arrive", LARGE_FRAME_TIMEOUT.as_secs())]
    TooSlow,
}

/// Reads frames from a stream.
pub(super) struct Reader {
    stream: quinn::RecvStream,
    buffer: BytesMut,
    large: Arc<Semaphore>,
}

impl Reader {
    pub(super) fn new(stream: quinn::RecvStream, large: Arc<Semaphore>) -> Reader {
        Reader { stream, buffer: BytesMut::with_capacity(16 << 10), large }
    }

    /// The next frame; `None` at the end of the stream.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, ReadError> {
        if !self.fill(HEADER_BYTES).await? {
            return if self.buffer.is_empty() { Ok(None) } else { Err(ReadError::Truncated) };
        }
        let head: [u8; HEADER_BYTES] = self.buffer[..HEADER_BYTES].try_into().expect("filled");
        let header = Header::read(&head)?;
        self.buffer.advance(HEADER_BYTES);
        let length = header.length as usize;
        let (budget, filled) = if length > SHARED_FRAME_BYTES_MAX {
            let units = length.div_ceil(BUDGET_UNIT) as u32;
            let permit = self.large.clone().acquire_many_owned(units).await;
            let budget = permit.expect("the budget is never closed");
            let filled = timeout(LARGE_FRAME_TIMEOUT, self.fill(length)).await;
            (Some(budget), filled.map_err(|_| ReadError::TooSlow)??)
        } else {
            (None, self.fill(length).await?)
        };
        if !filled {
            return Err(ReadError::Truncated);
        }
        let payload = self.buffer.split_to(length).freeze();
        wire::open(&head, &payload)?;
        Ok(Some(Frame { header, payload, budget }))
    }

    /// Reads until that many bytes are there; false if the stream ends before.
    async fn fill(&mut self, bytes: usize) -> Result<bool, std::io::Error> {
        while self.buffer.len() < bytes {
            let missing = bytes - self.buffer.len();
            self.buffer.reserve(missing.max(16 << 10));
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Writes frames to a stream until there are no more senders or the connection breaks: always all
/// that wait, at once.
pub(super) async fn write_frames(mut stream: quinn::SendStream, mut frames: mpsc::Receiver<Bytes>) {
    let mut batch = Vec::with_capacity(64);
    while frames.recv_many(&mut batch, 64).await > 0 {
        if stream.write_all_chunks(&mut batch).await.is_err() {
            return;
        }
        batch.clear();
    }
    // The other side may be gone already; then there is nobody to tell.
    let _ = stream.finish();
}
