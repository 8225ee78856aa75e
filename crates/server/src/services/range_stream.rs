//! RangeStream: one range in chunks of one revision, so that neither side holds a big list at once.
//! A chunk is read only when the client has taken the one before; nothing is read ahead.

use std::pin::Pin;

use futures::Stream;
use kelson_api::etcdserverpb::{RangeRequest, RangeResponse, RangeStreamResponse};
use kelson_api::{Error, Message};
use kelson_raft::Node;
use kelson_storage::{Reader, StreamChunk, StreamedRange};
use tonic::Status;

use super::blocking::Blocking;
use super::gate::LeaderWatch;
use crate::callers::Seen;
use crate::header::header;

/// The answers of one call.
pub(super) type Chunks =
    Pin<Box<dyn Stream<Item = Result<RangeStreamResponse, Status>> + Send + 'static>>;

/// Keys of the first chunk.
const KEYS_FIRST: usize = 10;

/// Keys of a chunk at most, however small they are.
const KEYS_MAX: usize = 10_000;

/// Starts a range that is already checked and reads its first chunk, so that whatever is wrong
/// with the request becomes the status of the call. `chunk_bytes` is the size that chunks aim at.
///
/// # Errors
/// As `Reader::range_chunks`.
pub(super) async fn start(
    node: Node,
    reader: Reader,
    blocking: Blocking,
    request: RangeRequest,
    chunk_bytes: usize,
    stays: Stays,
) -> Result<Chunks, Status> {
    let (range, first) = blocking
        .run(move || {
            let mut range = reader.range_chunks(&request)?;
            let first = range.next_chunk(KEYS_FIRST)?;
            Ok::<_, Error>((range, first))
        })
        .await??;
    let size = ChunkSize { keys: KEYS_FIRST, bytes: chunk_bytes };
    let chunks = RangeChunks { node, blocking, stays, range: Some(range), next: Some(first), size };
    Ok(Box::pin(futures::stream::try_unfold(chunks, |mut chunks| async move {
        Ok(chunks.next().await?.map(|message| (message, chunks)))
    })))
}

/// What must stay as it was for the stream to go on.
pub(super) struct Stays {
    pub(super) leader: LeaderWatch,
    pub(super) seen: Seen,
}

/// A range that is being sent.
struct RangeChunks {
    node: Node,
    blocking: Blocking,
    stays: Stays,
    /// None once the last chunk is sent.
    range: Option<StreamedRange>,
    /// The first chunk, read before the call was answered.
    next: Option<StreamChunk>,
    size: ChunkSize,
}

impl RangeChunks {
    async fn next(&mut self) -> Result<Option<RangeStreamResponse>, Status> {
        let Some(mut range) = self.range.take() else {
            return Ok(None);
        };
        self.stays.seen.still_holds()?;
        let chunk = match self.next.take() {
            Some(first) => first,
            None => {
                let keys = self.size.keys;
                let read = self.blocking.run(move || {
                    let chunk = range.next_chunk(keys);
                    (range, chunk)
                });
                let (back, chunk) = tokio::select! {
                    // A chunk that is there is sent even if the leader is gone meanwhile.
                    biased;
                    read = read => read?,
                    error = self.stays.leader.ended() => return Err(error.into()),
                };
                range = back;
                chunk?
            }
        };
        let mut response = RangeResponse { kvs: chunk.kvs, ..Default::default() };
        if chunk.is_last {
            response.header = Some(header(&self.node, range.started_revision()));
            response.more = range.more();
            response.count = range.count();
        } else {
            self.size.learn(response.encoded_len());
            self.range = Some(range);
        }
        Ok(Some(RangeStreamResponse { range_response: Some(response) }))
    }
}

/// How many keys to read next.
struct ChunkSize {
    keys: usize,
    /// A chunk should have about this many bytes.
    bytes: usize,
}

impl ChunkSize {
    /// Doubles after a small chunk, halves after one of more than four times the aim.
    fn learn(&mut self, bytes: usize) {
        if bytes < self.bytes {
            self.keys = (self.keys * 2).min(KEYS_MAX);
        } else if bytes > self.bytes.saturating_mul(4) {
            self.keys = (self.keys / 2).max(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_grow_and_shrink_towards_their_size() {
        let mut size = ChunkSize { keys: KEYS_FIRST, bytes: 1000 };
        size.learn(999);
        assert_eq!(size.keys, 20);
        size.learn(1000);
        size.learn(4000);
        assert_eq!(size.keys, 20);
        size.learn(4001);
        assert_eq!(size.keys, 10);
        for _ in 0..10 {
            size.learn(1_000_000);
        }
        assert_eq!(size.keys, 1);
        for _ in 0..100 {
            size.learn(0);
        }
        assert_eq!(size.keys, KEYS_MAX);
    }
}
