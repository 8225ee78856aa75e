//! The read barrier: proves that local state contains every write acknowledged before a read began.
//! One task takes all waiting readers, makes one round for them and wakes them together; on a follower
//! the round is one question to the leader. It never reads data. The only voter of a cluster needs no round: see `Progress::reads_are_local`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kelson_api::Error;
use openraft::ReadPolicy;
use openraft::errors::{LinearizableReadError, RaftError};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};

use crate::forward::Forwarder;
use crate::progress::Progress;
use crate::status::Status;
use crate::types::Raft;

/// A round without an answer is repeated after this long. Source: etcd.
const RETRY: Duration = Duration::from_millis(500);
/// Readers that wait for one round.
const WAITING: usize = 65_536;

type Barrier = Result<u64, Error>;

#[derive(Default)]
struct Room {
    waiting: Vec<oneshot::Sender<Barrier>>,
    closed: bool,
}

/// Readers that wait for a barrier, and what is needed to give them one.
pub(crate) struct Reads {
    room: Mutex<Room>,
    arrived: Notify,
    progress: Arc<Progress>,
    status: watch::Receiver<Status>,
    timeout: Duration,
    failed: AtomicU64,
    slow: AtomicU64,
}

impl Reads {
    pub(crate) fn new(
        progress: Arc<Progress>,
        status: watch::Receiver<Status>,
        timeout: Duration,
    ) -> Arc<Reads> {
        let room = Mutex::default();
        let (failed, slow) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Reads { room, arrived: Notify::new(), progress, status, timeout, failed, slow })
    }

    /// Returns an applied index that covers everything acknowledged before the call. Cancel safe.
    pub(crate) async fn barrier(&self) -> Barrier {
        if self.progress.reads_are_local() {
            return Ok(self.progress.applied());
        }
        let start = Instant::now();
        let barrier = self.wait_for_round().await;
        if barrier.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        } else if start.elapsed() > self.timeout / 2 {
            self.slow.fetch_add(1, Ordering::Relaxed);
        }
        barrier
    }

    /// Barriers that failed since start, and those that took more than half the timeout.
    pub(crate) fn failed_and_slow(&self) -> (u64, u64) {
        (self.failed.load(Ordering::Relaxed), self.slow.load(Ordering::Relaxed))
    }

    async fn wait_for_round(&self) -> Barrier {
        let (sender, receiver) = oneshot::channel();
        {
            let mut room = self.room.lock();
            if room.closed {
                return Err(Error::Stopped);
            }
            if room.waiting.len() >= WAITING {
                return Err(Error::TooManyRequests);
            }
            room.waiting.push(sender);
        }
        self.arrived.notify_one();
        match tokio::time::timeout(self.timeout, receiver).await {
            Ok(Ok(barrier)) => barrier,
            Ok(Err(_)) => Err(Error::Stopped),
            Err(_) => Err(Error::Timeout),
        }
    }

    pub(crate) fn close(&self) {
        let mut room = self.room.lock();
        room.closed = true;
        for reader in room.waiting.drain(..) {
            reader.send(Err(Error::Stopped)).ok();
        }
        drop(room);
        self.arrived.notify_one();
    }

    /// Makes rounds until [`Reads::close`].
    pub(crate) async fn run(self: Arc<Self>, raft: Raft, forwarder: Forwarder) {
        loop {
            self.arrived.notified().await;
            let readers = {
                let mut room = self.room.lock();
                if room.closed {
                    return;
                }
                std::mem::take(&mut room.waiting)
            };
            if readers.is_empty() {
                continue;
            }
            let barrier = self.round(&raft, &forwarder, &readers).await;
            for reader in readers {
                // A reader that left does not want to know.
                reader.send(barrier).ok();
            }
        }
    }

    async fn round(
        &self,
        raft: &Raft,
        forwarder: &Forwarder,
        readers: &[oneshot::Sender<Barrier>],
    ) -> Barrier {
        let leader_changes = self.status.borrow().leader_changes;
        let mut status = self.status.clone();
        while readers.iter().any(|reader| !reader.is_closed()) {
            status.mark_unchanged();
            let (leader, is_leader) = {
                let status = status.borrow();
                (status.leader, status.is_leader)
            };
            let confirmed = match leader {
                Some(leader) if !is_leader => self.asked_leader(raft, forwarder, leader).await,
                _ => confirmed_here(raft).await,
            };
            if let Some(barrier) = confirmed {
                return barrier;
            }
            // Nobody could confirm: try again when the leader changes, or after a while.
            drop(tokio::time::timeout(RETRY, status.changed()).await);
            let now = status.borrow().leader_changes;
            // The first leader of this process is no change: readers waited for it.
            if now != leader_changes && leader_changes != 0 {
                return Err(Error::LeaderChanged);
            }
        }
        Err(Error::Timeout)
    }

    /// `None` = nobody could confirm.
    async fn asked_leader(
        &self,
        raft: &Raft,
        forwarder: &Forwarder,
        leader: u64,
    ) -> Option<Barrier> {
        let index = forwarder.read_index(leader).await?;
        if self.progress.applied() >= index {
            return Some(Ok(index));
        }
        // openraft counts from 0.
        let waiting = raft.wait(Some(self.timeout));
        match waiting.applied_index_at_least(Some(index - 1), "a read").await {
            Ok(_) => Some(Ok(index)),
            Err(openraft::metrics::WaitError::Timeout(..)) => Some(Err(Error::Timeout)),
            Err(openraft::metrics::WaitError::ShuttingDown) => Some(Err(Error::Stopped)),
        }
    }
}

/// A round by this member as leader; `None` = it does not lead, or no quorum says so.
async fn confirmed_here(raft: &Raft) -> Option<Barrier> {
    match raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
        // openraft has waited until the index is applied.
        Ok(read) => Some(Ok(read.index() + 1)),
        Err(RaftError::Fatal(_)) => Some(Err(Error::Stopped)),
        Err(RaftError::APIError(
            LinearizableReadError::ForwardToLeader(_) | LinearizableReadError::QuorumNotEnough(_),
        )) => None,
    }
}
