//! The Snapshot call: the bytes of a snapshot file in pieces of a fixed size, then their SHA-256. A
//! thread of its own reads the file; a slow client holds up that thread and nothing else.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use kelson_api::Error;
use kelson_api::etcdserverpb::SnapshotResponse;
use kelson_storage::Reader;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tonic::Status;

use super::gate::LeaderWatch;
use crate::metrics::Metrics;

/// Bytes of each piece but the last. Tools rely on nothing but the sum; the number is etcd's.
const PIECE_BYTES: usize = 32 * 1024;

/// Pieces read ahead of the client; the reading thread waits when they are not taken.
const AHEAD_MAX: usize = 16;

/// The messages of one snapshot.
pub(super) struct Pieces {
    messages: mpsc::Receiver<Result<SnapshotResponse, Status>>,
    thread: JoinHandle<()>,
    /// Says when the stream must end; none once it has.
    ended: Option<Pin<Box<dyn Future<Output = Error> + Send>>>,
}

impl Stream for Pieces {
    type Item = Result<SnapshotResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(ended) = &mut self.ended else {
            return Poll::Ready(None);
        };
        if let Poll::Ready(error) = ended.as_mut().poll(context) {
            self.ended = None;
            return Poll::Ready(Some(Err(error.into())));
        }
        if let Some(message) = ready!(self.messages.poll_recv(context)) {
            return Poll::Ready(Some(message));
        }
        // The messages end when the thread does; if it panicked, the end must not look like one.
        let finished = ready!(Pin::new(&mut self.thread).poll(context));
        self.ended = None;
        Poll::Ready(finished.err().map(|error| {
            tracing::error!(%error, "sending a snapshot ended unexpectedly");
            Err(Status::internal("snapshot ended unexpectedly"))
        }))
    }
}

/// Snapshots sent at once; further callers wait. Each holds a thread and keeps compaction from
/// removing what it still has to read.
const SENDING_MAX: usize = 4;

/// Counts the snapshots that are being sent.
#[derive(Clone)]
pub(super) struct Places(Arc<Semaphore>);

impl Places {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(SENDING_MAX)))
    }
}

/// Starts a snapshot of the state of this moment.
pub(super) async fn start(
    places: &Places,
    reader: Reader,
    metrics: &Metrics,
    version: String,
    mut leader: LeaderWatch,
) -> Pieces {
    let place = Arc::clone(&places.0).acquire_owned().await;
    let place = place.expect("the semaphore is never closed");
    let (sender, messages) = mpsc::channel(AHEAD_MAX);
    let duration = metrics.disk_backend_snapshot_duration.clone();
    let thread = tokio::task::spawn_blocking(move || {
        let _place = place;
        let started = Instant::now();
        match reader.snapshot() {
            Ok(file) => {
                let out = Out { sender, version, left: file.total_bytes };
                out.send_all(file.chunks);
            }
            Err(error) => {
                tracing::error!(%error, "a snapshot could not be started");
                let _ = sender.blocking_send(Err(Status::unknown(error.to_string())));
            }
        }
        duration.observe(started.elapsed().as_secs_f64());
    });
    Pieces { messages, thread, ended: Some(Box::pin(async move { leader.ended().await })) }
}

/// The way out: where messages go and how many bytes are still to come.
struct Out {
    sender: mpsc::Sender<Result<SnapshotResponse, Status>>,
    version: String,
    left: u64,
}

/// Why sending ended early.
enum Ended {
    ClientLeft,
    Failed(Status),
}

impl Out {
    fn send_all(mut self, chunks: impl Iterator<Item = io::Result<Bytes>>) {
        match self.try_send_all(chunks) {
            Ok(()) | Err(Ended::ClientLeft) => {}
            Err(Ended::Failed(status)) => {
                let _ = self.sender.blocking_send(Err(status));
            }
        }
    }

    /// Cuts the chunks into pieces and sends them, then the digest.
    fn try_send_all(
        &mut self,
        chunks: impl Iterator<Item = io::Result<Bytes>>,
    ) -> Result<(), Ended> {
        let mut digest = Sha256::new();
        let mut pending = BytesMut::with_capacity(2 * PIECE_BYTES);
        for chunk in chunks {
            let mut chunk = chunk.map_err(|error| {
                tracing::error!(%error, "a snapshot could not be read to its end");
                Ended::Failed(Status::unknown(error.to_string()))
            })?;
            digest.update(&chunk);
            while !chunk.is_empty() {
                let missing = (PIECE_BYTES - pending.len()).min(chunk.len());
                pending.extend_from_slice(&chunk.split_to(missing));
                if pending.len() == PIECE_BYTES {
                    self.send_data(pending.split().freeze())?;
                }
            }
        }
        if !pending.is_empty() {
            self.send_data(pending.freeze())?;
        }
        if self.left != 0 {
            tracing::error!(missing = self.left, "a snapshot is shorter than announced");
            return Err(Ended::Failed(Status::unknown("snapshot is shorter than announced")));
        }
        self.send(Bytes::copy_from_slice(&digest.finalize()))
    }

    fn send_data(&mut self, blob: Bytes) -> Result<(), Ended> {
        let Some(left) = self.left.checked_sub(blob.len() as u64) else {
            tracing::error!("a snapshot is longer than announced");
            return Err(Ended::Failed(Status::unknown("snapshot is longer than announced")));
        };
        self.left = left;
        self.send(blob)
    }

    fn send(&self, blob: Bytes) -> Result<(), Ended> {
        let message = SnapshotResponse {
            header: None,
            remaining_bytes: self.left,
            blob,
            version: self.version.clone(),
        };
        self.sender.blocking_send(Ok(message)).map_err(|_| Ended::ClientLeft)
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    /// Sends these chunks and collects what arrives.
    async fn collect(
        total: u64,
        chunks: Vec<io::Result<Bytes>>,
    ) -> Vec<Result<SnapshotResponse, Status>> {
        let (sender, mut messages) = mpsc::channel(1);
        let out = Out { sender, version: "3.7.0".to_owned(), left: total };
        let thread = tokio::task::spawn_blocking(move || out.send_all(chunks.into_iter()));
        let mut received = Vec::new();
        while let Some(message) = messages.recv().await {
            received.push(message);
        }
        thread.await.expect("no panic");
        received
    }

    #[tokio::test]
    async fn pieces_have_a_fixed_size_and_a_digest_ends_them() {
        let data: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
        let chunks = data.chunks(7_000).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        let messages = collect(100_000, chunks).await;
        let messages: Vec<SnapshotResponse> =
            messages.into_iter().collect::<Result<_, _>>().expect("no error");
        let sizes: Vec<usize> = messages.iter().map(|m| m.blob.len()).collect();
        assert_eq!(sizes, [32_768, 32_768, 32_768, 1_696, 32]);
        let left: Vec<u64> = messages.iter().map(|m| m.remaining_bytes).collect();
        assert_eq!(left, [67_232, 34_464, 1_696, 0, 0]);
        assert!(messages.iter().all(|m| m.version == "3.7.0" && m.header.is_none()));
        let sent: Vec<u8> = messages[..4].iter().flat_map(|m| m.blob.to_vec()).collect();
        assert_eq!(sent, data);
        assert_eq!(messages[4].blob[..], Sha256::digest(&data)[..]);
    }

    #[tokio::test]
    async fn a_broken_snapshot_ends_without_a_digest() {
        let half = || Ok(Bytes::from(vec![1; 32_768]));
        let failed = collect(65_536, vec![half(), Err(io::Error::other("torn"))]).await;
        assert!(failed[0].is_ok() && failed[1].is_err() && failed.len() == 2);
        let short = collect(65_536, vec![half()]).await;
        assert!(short[0].is_ok() && short[1].is_err() && short.len() == 2);
        let long = collect(10, vec![half()]).await;
        assert!(long[0].is_err() && long.len() == 1);
    }

    #[tokio::test]
    async fn a_panic_is_no_end() {
        let (sender, messages) = mpsc::channel(1);
        let thread = tokio::task::spawn_blocking(move || {
            let _sender = sender;
            panic!("on purpose");
        });
        let mut pieces = Pieces { messages, thread, ended: Some(Box::pin(std::future::pending())) };
        let status = pieces.next().await.expect("an answer").expect_err("an error");
        assert_eq!(status.code(), tonic::Code::Internal);
        assert!(pieces.next().await.is_none());
    }
}
